"""Whether a run fits beside what other runs of this user have reserved, and reserving its memory.

A run takes hours to fill what it will need, so free memory says little where runs start together.
Each process therefore leaves a file of what it will take, in a folder of this user alone; whoever
comes next takes off free memory what those that are alive have not yet taken.
"""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from cerl.device import free
from cerl.footprint.estimate import HOST, Needs, gigabytes, refusal
from cerl.record import files

SHARE = 0.95  # of free memory, at most, that a run may need
PATIENCE = 10.0  # seconds that others may hold the lock


class Claim(NamedTuple):
    """Memory that another process reserved and has not taken yet."""

    process: int
    left: dict[str, int]  # bytes by place: HOST, or the name of a GPU
    groups: list[str]  # folders of the control groups that the process is in


def check_fits(needs: Needs, *, root: Path = free.ROOT, folder: Path | None = None) -> str:
    """Compares what a run needs with what is free beside what other processes reserved.

    Args:    root, see `free.free_bytes`; folder of reservations, if not this user's.
    Returns: both in words: `needs 9.1 GB: replay 7.1, networks 0.6; free 20.1 GB on cuda:0`.
    Raises:  RuntimeError with the same numbers and what to do, where it does not fit.
    """
    with _shared(folder) as place:
        return _compared(needs, place, root)


@contextlib.contextmanager
def reserved(
    needs: Needs, *, root: Path = free.ROOT, folder: Path | None = None
) -> Iterator["Reservation"]:
    """Checks as `check_fits` does, and keeps the memory from other runs while the block runs.

    Where no file can be written the run goes on without. Raises: RuntimeError as `check_fits`.
    """
    with _shared(folder) as place:
        words = _compared(needs, place, root)
        file = None if place is None else place / f"{os.getpid()}.json"
        reservation = Reservation(needs, file, root, words)
        reservation.write()
    try:
        yield reservation
    finally:
        reservation.end()


class Reservation:
    """The file in which this process says what it will take; `words` are those of `check_fits`."""

    def __init__(self, needs: Needs, file: Path | None, root: Path, words: str) -> None:
        self.words = words
        self._needs, self._file, self._root = needs, file, root
        self._before = free.pages("self", 1, root=root)  # resident, not of this run

    def write(self) -> None:
        """Writes what is still to be taken; called again once the run has taken some of it.

        Nobody else can see how much of a GPU a process holds, so it takes that off itself.
        """
        if self._file is None:
            return
        wanted = {}
        for place, size in self._needs.total().items():
            if place == HOST:
                wanted[HOST] = size
            else:
                device = torch.device(place)
                held = torch.cuda.memory_reserved(device)
                wanted[free.gpu_name(device)] = max(0, size - held)
        said = {
            "process": os.getpid(),
            "started": _started(os.getpid(), self._root),
            "before": self._before,
            "wanted": wanted,
            "groups": [str(folder) for folder in free.group_folders(self._root)],
        }
        with contextlib.suppress(OSError):
            files.write_text(self._file, json.dumps(said))

    def end(self) -> None:
        """Gives the memory back to others."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()


def _compared(needs: Needs, folder: Path | None, root: Path) -> str:
    claims = [] if folder is None else list(_claims(folder, root))
    words = []
    for place, wanted in needs.total().items():
        found = []
        for limit in free.free_bytes(torch.device(place), root=root):
            name = HOST if place == HOST else limit.scope
            left = sum(c.left.get(name, 0) for c in claims if _within(c, limit.scope, place))
            found.append((max(0, limit.free - left), left))
        text = f"needs {needs.listed(place)}"
        if found:
            least, left = min(found)
            if wanted > SHARE * least:
                raise RuntimeError(refusal(needs, place, free=least, reserved=left))
            text += f"; free {gigabytes(least)} on {place}"
        words.append(text)
    return "; ".join(words)


def _within(claim: Claim, scope: str, place: str) -> bool:
    """Whether what another process still wants counts against a limit: it is on this GPU, on this
    machine, or in the control group that the limit is of."""
    if place != HOST or scope == free.MACHINE:
        return True
    return scope in claim.groups


def _claims(folder: Path, root: Path) -> Iterator[Claim]:
    """What processes that are alive have reserved and not yet taken; files of the dead go."""
    for file in sorted(folder.glob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            process, started = int(said["process"]), said["started"]
            wanted = {str(name): int(size) for name, size in said["wanted"].items()}
            groups, before = [str(group) for group in said["groups"]], int(said["before"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of another version, or gone just now
        if process == os.getpid():
            continue
        if not _alive(process) or _started(process, root) != started:
            with contextlib.suppress(OSError):
                file.unlink()
            continue
        resident = free.pages(process, 1, root=root)
        if not resident:  # unknown here: free memory may be without it already
            wanted.pop(HOST, None)
        elif HOST in wanted:
            wanted[HOST] = max(0, wanted[HOST] - max(0, resident - before))
        yield Claim(process, wanted, groups)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # alive, of another user
        return True
    return True


def _started(process: int, root: Path) -> str:
    """When a process began, which tells it from a later one of the same number; "" if unknown."""
    try:
        text = (root / f"proc/{process}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]  # the name before it may hold anything


@contextlib.contextmanager
def _shared(folder: Path | None) -> Iterator[Path | None]:
    """The folder of reservations, locked; None where there can be none."""
    place = _folder(folder)
    if place is None:
        yield None
        return
    lock = FileLock(place / "lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except (OSError, Timeout):
        yield None
        return
    try:
        yield place
    finally:
        lock.release()


def _folder(folder: Path | None) -> Path | None:
    """A folder that is this user's and nobody else's to write in, made if missing; or None."""
    if not hasattr(os, "getuid"):
        return None
    user = os.getuid()
    if folder is None:
        folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"cerl-{user}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022
    return folder if own else None
