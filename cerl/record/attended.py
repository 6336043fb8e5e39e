"""What surrounds the training of a run: its lock, its heartbeats, and the note of a failure."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cerl.config import Config
from cerl.record.failure import noted
from cerl.record.heartbeat import Pulse, beating
from cerl.record.lock import held


@contextlib.contextmanager
def attended(folder: Path, config: Config) -> Iterator[Pulse]:
    """A context for the process that trains the run of a folder.

    Yields:  the pulse, whose heartbeats show the run's steps once it follows the run.
    Raises:  ValueError if another process trains the run already; OSError if the folder cannot be
             written to.
    """
    with held(folder), noted(folder), beating(folder, steps=config.schedule.steps) as pulse:
        yield pulse
