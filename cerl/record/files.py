"""Writing files so that nothing is lost and nothing outside the folder is touched.

A file is written under a fresh name that is created exclusively, brought to the disk, and renamed
over the old one: a reader sees the old or the new file whole, and a link that somebody left in the
folder is replaced, never written through.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # suffix of a file that is being written; one found later is of a dead writer
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe that nobody writes to would wait for ever
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def create(path: Path, *, mode: int = 0o644) -> BinaryIO:
    """A new file for writing. Raises: FileExistsError if anything, or a link, has that name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _PLAIN
    return os.fdopen(os.open(path, flags, mode), "wb")


def read(path: Path) -> BinaryIO:
    """A file for reading. Raises: OSError if the name is a link, or of no plain file."""
    if path.is_symlink():
        raise OSError(
            errno.ELOOP, "expected a file, got a link: nothing is read through links", str(path)
        )
    handle = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _PLAIN)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "expected a plain file", str(path))
    return os.fdopen(handle, "rb")


def read_small(path: Path, *, most: int) -> tuple[bytes, os.stat_result]:
    """What a file of at most so many bytes holds, and what the system knows of it.

    Raises: OSError as `read` does, and if the file is larger, before it fills the memory.
    """
    with read(path) as file:
        facts, content = os.fstat(file.fileno()), file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes", str(path))
    return content, facts


def append(path: Path) -> BinaryIO:
    """A file to write on at its end, made if missing. Raises: OSError if the name is a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | _PLAIN
    return os.fdopen(os.open(path, flags, 0o644), "ab")


def temporary(path: Path) -> Path:
    """A fresh name beside `path` for a file that will replace it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file by what `write` writes, once it is on the disk.

    Raises: OSError; the old file is then as it was and no temporary file stays.
    """
    fresh = temporary(path)
    try:
        with create(fresh) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync_folder(path.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_atomically` of a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut, where the file system can (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporaries(folder: Path) -> None:
    """Deletes what killed writers left in a folder; for the only writer of the folder."""
    for left in folder.glob(f".*{TEMPORARY}"):
        left.unlink(missing_ok=True)


def own_folder(folder: Path) -> Path:
    """A folder to write into, made if it is missing.

    Raises: OSError if the name is a link: files would land outside the folder that holds it.
    """
    if folder.is_symlink():
        raise OSError(
            f"{folder}: expected a folder, got a link to {os.readlink(folder)}; nothing is written "
            "through links, so delete it or put a folder in its place"
        )
    folder.mkdir(exist_ok=True)
    return folder
