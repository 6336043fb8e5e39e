"""A run folder has one writer at a time, which others can see."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # file of a run folder; whoever trains the run holds it, and lets go when it dies
PATIENCE = 1.0  # seconds to wait for one who only looks whether the lock is free


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps others from training the run of a folder.

    Raises: ValueError if one does already; OSError if no lock can be made in the folder.
    """
    try:
        with _lock(folder, patience=PATIENCE):
            yield
    except Timeout:
        raise ValueError(
            f"{folder}: another process is training this run; wait for it, or stop it (it saves a "
            f"checkpoint) and go on with `cerl train --resume {folder}`"
        ) from None


@contextlib.contextmanager
def _lock(folder: Path, *, patience: float) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience)
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        raise OSError(
            f"{folder}: expected a run folder that can be written to, but its lock {LOCK} "
            f"cannot be made ({error.strerror or error})"
        ) from error
    try:
        yield
    finally:
        lock.release()


def under_way(folder: Path) -> bool:
    """Whether someone is training the run of a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with _lock(folder, patience=0):
            return False
    except Timeout:
        return True
