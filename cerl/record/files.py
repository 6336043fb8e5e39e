"""Reads and writes files safely: no half-written files, and no access through symbolic links.

A file is written under a new temporary name, flushed to the disk (fsync), and renamed over the old
one. So a reader sees either the old or the new file, each complete. A symbolic link of that name is
replaced and never followed, so nothing outside the folder is touched.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # suffix of a file that is being written; killed processes leave such files
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe without a writer would block forever
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def create(path: Path, *, mode: int = 0o644) -> BinaryIO:
    """Creates a file for writing. Raises: FileExistsError if the name exists, even as a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _PLAIN
    return os.fdopen(os.open(path, flags, mode), "wb")


def read(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises: OSError if it is a link, or not a regular file."""
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
    """The content of a small file, and its `os.stat_result`.

    Args:   most, bytes that the file may have; a larger one is not read into memory.
    Raises: OSError as `read` does, and if the file is larger.
    """
    with read(path) as file:
        facts, content = os.fstat(file.fileno()), file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes", str(path))
    return content, facts


def append(path: Path) -> BinaryIO:
    """Opens a file for appending; creates it if missing. Raises: OSError if it is a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | _PLAIN
    return os.fdopen(os.open(path, flags, 0o644), "ab")


def temporary(path: Path) -> Path:
    """A new random name in the same folder, for a file that will replace `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file, or creates it.

    Args:   write, called with the new file, writes its content.
    Raises: OSError; the old file is then unchanged, and no temporary file is left.
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
    """Replaces a file by a text in UTF-8, see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut (on POSIX; elsewhere it does nothing)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporaries(folder: Path) -> None:
    """Deletes temporary files that killed processes left; only for the writer of the folder."""
    for left in folder.glob(f".*{TEMPORARY}"):
        left.unlink(missing_ok=True)


def own_folder(folder: Path) -> Path:
    """The folder itself, created if it is missing.

    Raises: OSError if it is a link: files would be written outside its parent folder.
    """
    if folder.is_symlink():
        raise OSError(
            f"{folder}: expected a folder, got a link to {os.readlink(folder)}; nothing is written "
            "through links, so delete it or put a folder in its place"
        )
    folder.mkdir(exist_ok=True)
    return folder
