"""The boards of a run: TensorBoard and the trackers that `log.track` names.

All of them get the same numbers under the same tags (`cerl/record/tags.py`). A board never ends a
run: after a failure it is silent, and one sentence says so.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import yaml

from cerl.config import Config, ConfigError
from cerl.record import trackers
from cerl.record.tensorboard import TensorBoard

# Packages of the trackers, and what a user installs them with.
INSTALL = {"wandb": "pip install 'cerl[wandb]'", "trackio": "pip install 'cerl[trackio]'"}


class Board(Protocol):
    """Shows the numbers of a run as curves, one for each seed and tag.

    after   agent steps of one seed that the curves on the board may have, when a session begins:
            -1 if the run starts anew, None in the first session
    notes   sentences that the user has to see; the reader empties the list
    shown_by  the command or the address that shows the curves
    """

    after: int | None
    notes: list[str]
    shown_by: str

    def write(self, seed: int, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars {tag: value} of the seed of index `seed`, at agent steps of one seed."""
        ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check(config: Config) -> None:
    """Raises: ConfigError naming the command, if the package of a tracker is not installed."""
    for name in config.log.track:
        if name in INSTALL and importlib.util.find_spec(name) is None:
            others = [other for other in config.log.track if other not in INSTALL]
            raise ConfigError(
                f"log.track: expected the package {name}, which is not installed; run "
                f"{INSTALL[name]}, or train without it: --log.track "
                f"{' '.join(others) or 'tensorboard'}"
            )


class Boards:
    """All boards of a run."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Args: folder of the run, exists. Nothing is written or sent before the first numbers."""
        self.all: list[Board] = []
        for name in config.log.track:
            if name == "tensorboard":
                options = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
                text = f"```yaml\n{options}```"
                self.all.append(TensorBoard(folder / "tensorboard", config.seeds, text=text))
            else:
                self.all.append(trackers.Tracker(name, folder, config))

    def begin_after(self, step: int) -> None:
        """Continues the curves of a run at `step`, agent steps of one seed; -1: from nothing."""
        for board in self.all:
            board.after = step

    def write(self, seed: int, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one seed to every board, see `Board.write`."""
        for board in self.all:
            board.write(seed, step, scalars)

    def flush(self) -> None:
        for board in self.all:
            board.flush()

    def close(self) -> None:
        for board in self.all:
            board.close()

    def take_notes(self) -> list[str]:
        """Sentences since the last call that the user has to see."""
        found = [sentence for board in self.all for sentence in board.notes]
        for board in self.all:
            board.notes.clear()
        return found

    def shown_by(self) -> str:
        """What shows the curves, as text."""
        return " or ".join(board.shown_by for board in self.all) or "none (log.track is empty)"
