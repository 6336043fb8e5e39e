"""A run folder has one writer at a time, which others can see."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # file of a run folder; whoever trains the run holds it, and lets go when it dies


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps others from training the run of a folder. Raises: ValueError if one does already."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: another process is training this run; wait for it, or stop it (it saves a "
            f"checkpoint) and go on with `cerl train --resume {folder}`"
        ) from None
    try:
        yield
    finally:
        lock.release()


def under_way(folder: Path) -> bool:
    """Whether someone is training the run of a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with held(folder):
            return False
    except ValueError:
        return True
