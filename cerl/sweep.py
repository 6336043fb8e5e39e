"""Grids of runs on this machine, one after the other or several at a time, resumable as a whole.

A sweep that was interrupted goes on when it is started again with the same folder: finished runs
are kept, those that have a checkpoint are resumed, the others are trained. A run that another
process is training is left to it, and counts as failed.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cerl import checkpoint, train
from cerl.config import Config, ConfigError, dump, load_file
from cerl.held import under_way

TELL_EVERY = 30.0  # seconds between looks at runs side by side


def sweep(configs: Sequence[Config], out: Path, *, jobs: int = 1) -> list[Path]:
    """Trains every config, below the folder `out`.

    Args:    jobs, runs at a time; more than one run as processes of their own, whose output goes to
             `out`/logs.
    Returns: the run folders, in order.
    Raises:  RuntimeError naming the runs that failed, after the others were trained.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    console = Console(highlight=False)
    configs = [config.model_copy(update={"out": str(out)}) for config in configs]
    run = _one_by_one if jobs == 1 else _side_by_side
    failures = run(configs, out, console, jobs)
    if failures:
        lines = "\n".join(failures)
        raise RuntimeError(
            f"{len(failures)} of {len(configs)} runs failed, the others are in {out} "
            f"(cerl report {out}); the same command tries the failed ones again:\n{lines}"
        )
    return [earlier(config, out)[0] for config in configs]


def title(config: Config) -> str:
    """What a run is, in a few words."""
    return f"{config.preset or 'run'} on {config.env.family}/{config.env.name}"


def earlier(config: Config, out: Path) -> list[Path]:
    """Run folders of the same config below `out`, finished ones first, then newest first."""
    found = []
    for path in out.glob("*/config.yaml"):
        try:
            same = load_file(path) == config
        except ConfigError:  # of another version of cerl
            same = False
        if same:
            found.append(path.parent)

    def order(folder: Path) -> tuple[bool, float]:
        return (folder / train.FINISHED).is_file(), folder.stat().st_mtime

    return sorted(found, key=order, reverse=True)


def _begun(folder: Path) -> bool:
    """Whether a run is to be resumed, which is refused while another process trains it."""
    return bool(checkpoint.files(folder)) or under_way(folder)


def _one_by_one(configs: Sequence[Config], out: Path, console: Console, jobs: int) -> list[str]:
    failures = []
    for number, config in enumerate(configs, 1):
        console.print(f"[bold]run {number} of {len(configs)}[/]: {title(config)}")
        folder = next(iter(earlier(config, out)), None)
        try:
            if folder is not None and (folder / train.FINISHED).is_file():
                console.print(f"finished before: {folder}")
            elif folder is not None and _begun(folder):
                console.print(f"resuming {folder}")
                train.resume(folder, trusted=True)  # the caller named the same modules
            else:
                train.train(config)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            console.print(f"[bold red]failed[/]: {error}")
            failures.append(f"{title(config)}: {error}")
    return failures


class _Job(NamedTuple):
    name: str
    process: subprocess.Popen
    log: Path

    def last_line(self) -> str:
        """The error if there is one, else the line written last."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["starting"])[-1].strip()


def _side_by_side(configs: Sequence[Config], out: Path, console: Console, jobs: int) -> list[str]:
    (out / "logs").mkdir(parents=True, exist_ok=True)
    waiting, running, failures = list(enumerate(configs, 1)), [], []
    told = time.monotonic()
    with train.stop_flag() as stopped:
        while (waiting or running) and not stopped():
            while waiting and len(running) < jobs:
                job = _start(*waiting.pop(0), out, console)
                running += [job] if job else []
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                code = job.process.returncode
                console.print(f"{job.name}: {'done' if code == 0 else 'failed'}; {job.log}")
                if code:
                    failures.append(f"{job.name}: {job.last_line()} (exit code {code}, {job.log})")
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                for job in running:
                    console.print(f"{job.name}: {job.last_line()}")
        if stopped():
            console.print("interrupted: waiting for the runs to save; the same command goes on")
            for job in running:
                job.process.send_signal(signal.SIGINT)
            for job in running:
                job.process.wait()
            raise KeyboardInterrupt
    return failures


def _start(number: int, config: Config, out: Path, console: Console) -> _Job | None:
    """Starts a run as a process; None if it is finished."""
    name = f"run {number}, {title(config)}"
    folder = next(iter(earlier(config, out)), None)
    if folder is not None and (folder / train.FINISHED).is_file():
        console.print(f"{name}: finished before: {folder}")
        return None
    stem = title(config).replace(" on ", "-").replace("/", "-").replace(":", "-")
    log = out / "logs" / f"{number:03d}-{stem}.txt"
    if folder is not None and _begun(folder):
        command = ["--resume", str(folder), "--trust"]
    else:
        command = [str(log.with_suffix(".yaml"))]
        dump(config, command[0])
    console.print(f"{name}: {'resuming' if len(command) > 1 else 'starting'}; {log}")
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            [sys.executable, "-m", "cerl", "train", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Job(name, process, log)
