"""The lock of a run folder: only one process trains a run, and others can see that it does.

Some file systems of clusters lock files on one machine only, or not at all. There, the heartbeats
of a run say whether another machine trains it (`trained`), and a process that finds out that
another one trains the same run stops (`cerl/record/heartbeat.py`).
"""

import contextlib
import errno
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cerl.record import heartbeat
from cerl.record.heartbeat import Beat

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK = ".lock"  # file in a run folder that the training process locks; freed when it dies
# Seconds to wait for the lock: `under_way` of another process holds it for a moment.
PATIENCE = 1.0
# A heartbeat of another machine is taken for a sign of life if the file system wrote it less than
# so many seconds ago. A run writes one every five seconds; the rest allows for a busy file system
# and for clocks that differ. The time at which the file system wrote the file is compared, not the
# time in it: so it does not matter what the clock of the machine that trains says.
FRESH = 60.0
# Errors of file systems that know no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context that keeps other processes from training the run of a folder.

    Raises: ValueError if another process trains it already; OSError if the lock file cannot be
            made.
    """
    refusal = (
        f"{folder}: another process is training this run{{}}; wait for it, or stop it (it saves a "
        f"checkpoint) and go on with `cerl train --resume {folder}`"
    )
    try:
        with _lock(folder, patience=PATIENCE):
            # Another machine may not see this lock, nor this one the lock of another machine.
            beat = heartbeat.read(folder)
            path = folder / LOCK
            if (
                beat is not None
                and not beat.over
                and (beat.host != platform.node() or not works(path))
                and _recent(folder, now=clock(path))
            ):
                where = f" on {beat.host} (process {beat.pid}, a sign of life within {FRESH:.0f} s)"
                raise ValueError(refusal.format(where))
            yield
    except Timeout:
        raise ValueError(refusal.format("")) from None


@contextlib.contextmanager
def _lock(folder: Path, *, patience: float) -> Iterator[None]:
    path = folder / LOCK
    if not works(path):
        yield
        return
    lock = FileLock(path)
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
    """Whether a process of this machine, or of one that shares its locks, is training the run of a
    folder. It may be asked by many processes at once, and needs no more than to read the folder."""
    if fcntl is not None:
        return locked(folder / LOCK)
    if not (folder / LOCK).exists():
        return False
    try:
        with _lock(folder, patience=0):
            return False
    except Timeout:
        return True


def locked(path: Path) -> bool:
    """Whether a process holds the exclusive lock of a file, as far as one can tell (POSIX only)."""
    return held_by_any(path) is True


def held_by_any(path: Path) -> bool | None:
    """Whether a process holds the exclusive lock of a file (POSIX only).

    The test takes a shared lock for a moment: so tests do not take each other for a process that
    trains, and a process that starts to train waits longer (`PATIENCE`) than a test takes. It needs
    no permission to write, and changes no file.

    Returns: None if the file system cannot tell; False if there is no such file.
    """
    assert fcntl is not None, "the caller checks that this is POSIX"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:  # nobody has trained the run yet
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def works(path: Path) -> bool:
    """Whether the file system of a file, which is created if it is missing, can lock files.

    True as well if the file cannot be opened: then that is the error, not the lock.
    """
    if fcntl is None:
        return True
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(handle)
    return True


def trained(folder: Path, beat: Beat | None, *, now: float, host: str) -> bool:
    """Whether a process trains the run of a folder, on this machine or on another one.

    A process on this machine holds the lock of the folder. The locks of other machines may be
    invisible, so for them a heartbeat counts that the file system wrote less than `FRESH` seconds
    ago. Where the file system has no locks, that holds for this machine too.

    Args: beat, the newest heartbeat of the folder; now, seconds since 1970, by the clock of the
          file system if possible (`clock`); host, the name of this machine.
    """
    held = held_by_any(folder / LOCK) if fcntl is not None else under_way(folder)
    if held:
        return True
    if beat is None or beat.over or (held is False and beat.host == host):
        return False
    return _recent(folder, now=now)


def _recent(folder: Path, *, now: float) -> bool:
    """Whether the heartbeat of a folder was written less than `FRESH` seconds ago."""
    try:
        return abs(now - (folder / heartbeat.FILE).stat().st_mtime) < FRESH
    except OSError:
        return False


def clock(path: Path) -> float:
    """Seconds since 1970 by the clock of a file's file system, which stamps the file; those of this
    machine if that is not possible."""
    try:
        os.utime(path)
        return path.stat().st_mtime
    except OSError:
        return time.time()
