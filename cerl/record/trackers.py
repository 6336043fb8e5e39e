"""Trackers: the curves of a run in Weights & Biases or in trackio, live or offline.

Every seed is a run of the tracker, and the run folder is their group. `tracking.json` in the run
folder holds the identifiers of these runs, so that a resumed run continues their curves. A tracker
that fails gets nothing more, a sentence says so, and training goes on.
"""

import contextlib
import contextvars
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cerl import __version__
from cerl.config import Config
from cerl.record import files
from cerl.record.tags import with_usual
from cerl.text import visible

FILE = "tracking.json"
_LARGEST = 1 << 20  # bytes of that file
START = 30.0  # seconds that a tracker may take to start the run of a seed
END = 60.0  # seconds that it may take at the end to send what is left of a seed

Identifiers = dict[str, dict[str, str]]


class Tracker:
    """The runs of one tracker, one for each seed. It is a `cerl.record.boards.Board`."""

    def __init__(self, name: str, folder: Path, config: Config) -> None:
        """Args: name, wandb or trackio; folder of the run, exists."""
        self.name, self.folder, self.config = name, folder, config
        self.after: int | None = None
        self.notes: list[str] = []
        self.failed = False
        self.runs: list[Any] = []
        self.shown_by = name

    def write(self, seed: int, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one seed, see `cerl.record.boards.Board`."""

        def send() -> None:
            if not self.runs:
                self._open()
            self.runs[seed].log(with_usual(scalars, step=step), step=step)

        if not self.failed:
            self._attempt(send)

    def _open(self) -> None:
        seeds = [str(seed) for seed in self.config.seeds]
        known = identifiers(self.folder)
        own = {} if self.after == -1 else known.get(self.name, {})
        chosen = {seed: own.get(seed) or secrets.token_hex(4) for seed in seeds}
        if chosen != known.get(self.name):
            text = json.dumps(known | {self.name: chosen}, indent=1)
            files.write_text(self.folder / FILE, f"{text}\n")
        with contextlib.redirect_stdout(io.StringIO()):
            for seed in seeds:
                self.runs.append(_START[self.name](self, seed, chosen[seed]))

    def facts(self, seed: str) -> dict[str, Any]:
        """The options of a seed, as the tracker shows them: its seed, and every option of the run.

        Args: seed, its value.
        """
        options = self.config.model_dump(mode="json")
        return {"seed": int(seed), "version": __version__, **options}

    def flush(self) -> None:
        """Nothing is done: trackers send by themselves."""

    def close(self) -> None:
        runs, self.runs = self.runs, []
        for run in runs:

            def finish(run: Any = run) -> None:
                with contextlib.redirect_stdout(io.StringIO()):
                    run.finish()

            self._attempt(finish)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Calls a function of the tracker. An error of any kind ends the tracker, not the run:
        trackers raise errors of networks, of logins and of processes of their own."""
        try:
            action()
        except Exception as error:
            if not self.failed:
                reason = visible(str(error).strip().partition("\n")[0]) or type(error).__name__
                self.notes.append(
                    f"{self.name}: no more numbers are sent ({reason}); the run goes on, and its "
                    "tables have all of them"
                )
            self.failed = True


def identifiers(folder: Path) -> Identifiers:
    """The identifiers of the trackers' runs of a run folder, by tracker and value of the seed.

    Returns: {} if the file is missing or is not one of ours: then new curves begin.
    """
    try:
        content, _ = files.read_small(folder / FILE, most=_LARGEST)
        found = json.loads(content)
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: {
            seed: own
            for seed, own in ids.items()
            if isinstance(own, str) and re.fullmatch(r"[0-9a-f]{8}", own)
        }
        for name, ids in found.items()
        if name in _START and isinstance(ids, dict)
    }


def _wandb(tracker: Tracker, seed: str, own: str) -> Any:
    """Starts or continues a run of Weights & Biases; offline where it cannot be reached."""
    import wandb  # pyright: ignore[reportMissingImports]

    folder, config = tracker.folder, tracker.config
    files.own_folder(folder / "wandb")  # raises an error if it is a link out of the run folder
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and tracker.runs and tracker.runs[-1].offline:
        mode = "offline"

    def start(mode: str) -> Any:
        return wandb.init(
            id=own,
            resume="allow",
            reinit="create_new",
            project=config.log.project,
            group=folder.name,
            name=f"{folder.name} seed {seed}",
            job_type=config.env.title,
            config=tracker.facts(seed),
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=START, finish_timeout=END
            ),
        )

    try:
        # Without this question `init` would ask for a key at a terminal, and the run would wait.
        if mode == "online" and not wandb.login(prompt=False):
            raise ConnectionError("not logged in; `wandb login` does it")
        run = start(mode)
    except Exception as error:
        if mode != "online":
            raise
        reason = visible(str(error).strip().partition("\n")[0]).rstrip(".")
        tracker.notes.append(
            f"wandb: the numbers stay in {folder / 'wandb'} ({reason}); `wandb sync` sends them"
        )
        run = start("offline")
    offline = f"wandb sync --append {folder / 'wandb' / 'offline-run-*'}"
    tracker.shown_by = offline if run.offline else f"wandb ({run.url})"
    return run


def _trackio(tracker: Tracker, seed: str, own: str) -> Any:
    """Starts or continues a run of trackio, which keeps it in its database on this machine."""
    import trackio  # pyright: ignore[reportMissingImports]

    folder, project = tracker.folder, tracker.config.log.project
    tracker.shown_by = f"trackio show --project {project}"

    def start() -> Any:
        # trackio knows a run by its name, so the identifier is a part of it.
        return trackio.init(
            project=project,
            name=f"{folder.name} seed {seed} {own}",
            group=folder.name,
            config=tracker.facts(seed),
            resume="allow",
            embed=False,
        )

    # trackio finishes the run that is current before it starts another one. Each seed starts in a
    # context of its own, in which no run is current.
    return contextvars.Context().run(start)


_START: dict[str, Callable[[Tracker, str, str], Any]] = {"wandb": _wandb, "trackio": _trackio}
