"""Grids of runs on this machine, one after the other, and resumable as a whole.

A sweep that was interrupted goes on when it is started again with the same folder: finished runs
are kept, the run under way is resumed from its checkpoint, the others are trained.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cerl import checkpoint, train
from cerl.config import Config, ConfigError, load_file


def sweep(configs: Sequence[Config], out: Path) -> list[Path]:
    """Trains every config, below the folder `out`.

    Returns: the run folders, in order.
    Raises:  RuntimeError naming the runs that failed, after the others were trained.
    """
    console, folders, failures = Console(highlight=False), [], []
    for number, config in enumerate(configs, 1):
        config = config.model_copy(update={"out": str(out)})
        name = f"{config.preset or 'run'} on {config.env.family}/{config.env.name}"
        console.print(f"[bold]run {number} of {len(configs)}[/]: {name}")
        try:
            folders.append(_one(config, out, console))
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            console.print(f"[bold red]failed[/]: {error}")
            failures.append(f"{name}: {error}")
    if failures:
        lines = "\n".join(failures)
        raise RuntimeError(
            f"{len(failures)} of {len(configs)} runs failed, the others are in {out} "
            f"(cerl report {out}); the same command tries the failed ones again:\n{lines}"
        )
    return folders


def _one(config: Config, out: Path, console: Console) -> Path:
    for folder in earlier(config, out):
        if (folder / train.FINISHED).is_file():
            console.print(f"finished before: {folder}")
            return folder
        if checkpoint.files(folder):
            console.print(f"resuming {folder}")
            return train.resume(folder)
    return train.train(config)


def earlier(config: Config, out: Path) -> list[Path]:
    """Run folders of the same config below `out`, newest first."""
    found = []
    for path in out.glob("*/config.yaml"):
        try:
            same = load_file(path) == config
        except ConfigError:  # of another version of cerl
            same = False
        if same:
            found.append(path.parent)
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)
