"""Reserves memory for a run, and checks that it fits beside the other runs of this user.

A run may take hours until it uses all the memory that it needs (replay fills slowly), so free
memory alone does not tell whether another run fits. Each process therefore writes a file with what
it will need, into a folder of this user. A new run subtracts from free memory what processes that
are alive have reserved and not taken yet.
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

SHARE = 0.95  # largest share of free memory that a run may need
PATIENCE = 10.0  # seconds to wait for the lock of the folder


class Claim(NamedTuple):
    """Memory that another process has reserved and not taken yet."""

    process: int  # its number
    left: dict[str, int]  # bytes by place: HOST, or the name of a GPU (`free.gpu_name`)
    groups: list[str]  # folders of the control groups of the process


def check_fits(needs: Needs, *, root: Path = free.ROOT, folder: Path | None = None) -> str:
    """Compares what a run needs with free memory that no other run has reserved.

    Args:    root, see `free.free_bytes`; folder of reservations, None for the usual one.
    Returns: both as text: `needs 9.1 GB: replay 7.1, networks 0.6; free 20.1 GB on cuda:0`.
    Raises:  RuntimeError with the same numbers and advice, if the run does not fit.
    """
    with _shared(folder) as place:
        return _compared(needs, place, root)


@contextlib.contextmanager
def reserved(
    needs: Needs, *, root: Path = free.ROOT, folder: Path | None = None
) -> Iterator["Reservation"]:
    """A context that reserves memory for a run, after checking as `check_fits` does.

    If the file cannot be written, the run goes on without a reservation.

    Raises: RuntimeError as `check_fits`.
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
    """The file that tells other processes what this one will need.

    `words` is the text that `check_fits` returns.
    """

    def __init__(self, needs: Needs, file: Path | None, root: Path, words: str) -> None:
        self.words = words
        self._needs, self._file, self._root = needs, file, root
        self._before = free.pages("self", 1, root=root)  # bytes resident before the run's own

    def write(self) -> None:
        """Writes the file; called again when the run has taken more of its memory.

        Other processes see how much host memory this one has taken, but not how much GPU memory. So
        the file has all that the run needs on the host, and only what is still missing on a GPU.
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
        """Ends the reservation."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()


def _compared(needs: Needs, folder: Path | None, root: Path) -> str:
    """The text of `check_fits`. Raises: RuntimeError if the run does not fit."""
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
    """Whether the claim of another process has to be subtracted from a limit.

    It has to, if the limit is that of a GPU or of the machine, or of a control group that the
    process is in.
    """
    if place != HOST or scope == free.MACHINE:
        return True
    return scope in claim.groups


def _claims(folder: Path, root: Path) -> Iterator[Claim]:
    """The claims of all other processes that are alive; deletes the files of dead ones."""
    for file in sorted(folder.glob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            process, started = int(said["process"]), said["started"]
            wanted = {str(name): int(size) for name, size in said["wanted"].items()}
            groups, before = [str(group) for group in said["groups"]], int(said["before"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # the file is of another version of cerl, or was deleted meanwhile
        if process == os.getpid():
            continue
        if not _alive(process) or _started(process, root) != started:
            with contextlib.suppress(OSError):
                file.unlink()
            continue
        resident = free.pages(process, 1, root=root)
        # If its resident memory is unknown, free memory may already be without what it has taken.
        if not resident:
            wanted.pop(HOST, None)
        elif HOST in wanted:
            wanted[HOST] = max(0, wanted[HOST] - max(0, resident - before))
        yield Claim(process, wanted, groups)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is alive and belongs to another user
        return True
    return True


def _started(process: int, root: Path) -> str:
    """The start time of a process, which tells it from a later process with the same number; "" if
    unknown."""
    try:
        text = (root / f"proc/{process}/stat").read_text()
    except OSError:
        return ""
    # Field 22 of the file. The name of the program, in brackets, may contain blanks and brackets,
    # so fields are counted after the last bracket.
    return text.rpartition(")")[2].split()[19]


@contextlib.contextmanager
def _shared(folder: Path | None) -> Iterator[Path | None]:
    """A context that locks the folder of reservations. Yields: the folder; None if it cannot be
    made or locked."""
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
    """The folder of reservations, created if missing; None if others could write into it."""
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
