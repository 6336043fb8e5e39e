"""The Saver: writes checkpoints, and tries again later if the disk is full or fails."""

import math
import time
from collections.abc import Callable
from typing import Any

from cerl.record.checkpoint import Checkpoints
from cerl.record.log import Logger
from cerl.state import CheckpointError

RETRY = 60.0  # seconds after a failed write until the next attempt


class Saver:
    """Saves a run: first its tables, then a checkpoint. If that fails, the run goes on, and the
    user is told once.

    `saved` is the name of the state in the newest checkpoint, any value that the caller gave to
    `save`. `owed` is True while a checkpoint is due that could not be written.
    """

    def __init__(self, checkpoints: Checkpoints, logger: Logger) -> None:
        self.checkpoints, self.logger = checkpoints, logger
        self.saved: object = None
        self.owed = False
        self.saved_at, self.tried_at, self.complaint = time.monotonic(), -math.inf, ""

    def save(
        self,
        state: Callable[[], dict[str, Any]],
        *,
        name: object,
        must: bool,
        kept_at: int = 0,
    ) -> None:
        """Writes a checkpoint of a state, unless the newest checkpoint has this state already.

        Args:   state, a function that returns the state; name, any value that differs between
                states; must, raise an error if it cannot be written. Otherwise a failure is noted,
                and a call at least RETRY seconds later tries again; kept_at, the agent step of one
                seed if the checkpoint is kept for good, 0 if not.
        Raises: CheckpointError, if `must`.
        """
        if self.saved == name:
            return
        self.owed = True
        # Only this state can be kept at this step, so a recent failure is no reason to wait.
        if not must and not kept_at and not self._patient():
            return

        def write() -> None:
            # A checkpoint must not be ahead of the tables: a run resumed from it would never
            # compute the missing rows again.
            if not self.logger.flush():
                raise CheckpointError(
                    f"{self.checkpoints.folder}: no checkpoint was saved, since the result rows "
                    "before it could not be written; free some space"
                )
            self.checkpoints.save(state(), kept_at=kept_at)

        if must:
            write()
        elif not self._written(write):
            if kept_at:
                self.logger.note(
                    f"no checkpoint is kept at agent step {kept_at:,} (log.keep): it could not be "
                    "written, and later ones are of later steps"
                )
            return
        self.saved, self.saved_at = name, time.monotonic()
        self.owed, self.complaint = False, ""

    def stream(self) -> None:
        """Writes new rows of replay to the disk; rows that cannot be written are tried again."""
        if self._patient():
            self._written(self.checkpoints.stream)

    def late(self, minutes: float) -> bool:
        """Whether a checkpoint is owed, or the newest one is older than `minutes` (0: no limit)."""
        old = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        return old or self.owed

    def _patient(self) -> bool:
        """Whether the last failure is at least RETRY seconds ago."""
        return time.monotonic() - self.tried_at > RETRY

    def _written(self, write: Callable[[], object]) -> bool:
        """Calls `write`. Returns: whether it succeeded; a failure is noted once."""
        try:
            write()
        except CheckpointError as error:
            self.tried_at = time.monotonic()
            if str(error) != self.complaint:
                self.logger.note(f"{error}; the run goes on and tries again")
            self.complaint = str(error)
            return False
        return True
