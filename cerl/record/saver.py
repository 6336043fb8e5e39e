"""The Saver: writes checkpoints when asked, and tries again later where the disk takes none."""

import math
import time
from collections.abc import Callable
from typing import Any

from cerl.record.checkpoint import Checkpoints
from cerl.record.log import Logger
from cerl.state import CheckpointError

RETRY = 60.0  # seconds before something that could not be written is tried again


class Saver:
    """Saves a run, its rows first; a failure is said once, and the run goes on.

    `saved` names the state of the newest checkpoint, in whatever terms the caller uses. `owed` says
    that a checkpoint was due and could not be written.
    """

    def __init__(self, checkpoints: Checkpoints, logger: Logger) -> None:
        self.checkpoints, self.logger = checkpoints, logger
        self.saved: object = None
        self.owed = False
        self.saved_at, self.tried_at, self.complaint = time.monotonic(), -math.inf, ""

    def save(self, state: Callable[[], dict[str, Any]], *, name: object, must: bool) -> None:
        """Writes a checkpoint of a state, unless the newest one is of this very state.

        Args: name, of the state, see `saved`; must, raise CheckpointError where it cannot be
              written (else that is noted, and tried again a minute later).
        """
        if self.saved == name:
            return
        self.owed = True
        if not must and not self._patient():
            return

        def write() -> None:
            # A checkpoint never leads the record: rows that are lost would not be made again.
            if not self.logger.flush():
                raise CheckpointError(
                    f"{self.checkpoints.folder}: no checkpoint was saved, since the rows up to it "
                    "could not be written either; free some space"
                )
            self.checkpoints.save(state())

        if must:
            write()
        elif not self._written(write):
            return
        self.saved, self.saved_at = name, time.monotonic()
        self.owed, self.complaint = False, ""

    def stream(self) -> None:
        """Hands new rows of replay to the disk; what it does not take is tried again later."""
        if self._patient():
            self._written(self.checkpoints.stream)

    def late(self, minutes: float) -> bool:
        """Whether a checkpoint is owed, or the newest one is that old (never for 0 minutes)."""
        old = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        return old or self.owed

    def _patient(self) -> bool:
        """Whether the last failure is long enough ago to try again."""
        return time.monotonic() - self.tried_at > RETRY

    def _written(self, write: Callable[[], object]) -> bool:
        """Whether a write to the disk succeeded; a failure is said once."""
        try:
            write()
        except CheckpointError as error:
            self.tried_at = time.monotonic()
            if str(error) != self.complaint:
                self.logger.note(f"{error}; the run goes on and tries again")
            self.complaint = str(error)
            return False
        return True
