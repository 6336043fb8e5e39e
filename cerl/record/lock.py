"""The lock of a run folder: only one process trains a run, and others can see that it does."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # file in a run folder that the training process locks; freed when it dies
# Seconds to wait for the lock: `under_way` of another process holds it for a moment.
PATIENCE = 1.0


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context that keeps other processes from training the run of a folder.

    Raises: ValueError if another process trains it already; OSError if the lock file cannot be
            made.
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
    """Whether a process is training the run of a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with _lock(folder, patience=0):
            return False
    except Timeout:
        return True
