"""Checkpoints of a run: numbered files in its folder, written whole or not at all, checked on load.

A checkpoint is written under a temporary name and renamed once it is on the disk, so a crash or a
full disk does not harm the older ones. The newest two stay, and those of the agent steps that
log.keep names, whose files are called `checkpoint-<number>-at-<step>.pt`. The rows of replay are in
other files, the pieces, which the checkpoint names (`cerl/record/pieces.py`).
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from cerl import __version__
from cerl.record import archive, pieces
from cerl.record import files as safe
from cerl.record.archive import FORMAT, Damaged
from cerl.record.pieces import Manifest
from cerl.record.spool import Spool
from cerl.replay import Replay
from cerl.state import CheckpointError, size

KEEP = 2  # newest checkpoints that stay in a run folder
# The number of a checkpoint, and the agent step of one that is kept for good.
_NAME = re.compile(r"checkpoint-(\d{6,18})(?:-at-(\d{1,18}))?\.pt")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Loaded(NamedTuple):
    """A checkpoint that was read."""

    state: dict[str, Any]  # on the CPU its tensors are memory-mapped from the file
    file: Path
    damaged: list[str]  # a sentence on each newer checkpoint that could not be used
    replay: Manifest | None  # names the files with its rows of replay, which are not read yet


class _File:
    """A file for `torch.save`. It keeps an OSError of a write, which torch replaces by its own
    error without the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class Checkpoints:
    """Saves checkpoints of one run into its folder, and the rows of its replay.

    Args of the constructor: replay, or None if checkpoints leave it out (log.save_replay).
    """

    def __init__(self, folder: Path, replay: Replay | None) -> None:
        self.folder = folder
        self.spool = None if replay is None else Spool(folder, replay)
        # For each checkpoint the names of the pieces that it needs; None if it cannot be read.
        self.needed = {file.name: _needed(file) for file in files(folder)}

    def restore(self, loaded: Loaded) -> None:
        """Reads the rows of replay of a checkpoint into the replay, in place.

        Raises: CheckpointError if they are damaged, or belong to a run with other options.
        """
        if self.spool is not None and loaded.replay is not None:
            self.spool.load(loaded.replay)
        self._sweep()

    def stream(self) -> None:
        """Passes new rows of replay to a thread that writes them, once they fill a piece.

        Called once in every iteration; most calls only count.

        Raises: CheckpointError if rows could not be written; later calls try again.
        """
        if self.spool is None:
            return
        with self._errors(0):
            written = self.spool.stream()
        if written:
            self._sweep()

    def save(self, state: dict[str, Any], *, kept_at: int = 0) -> Path:
        """Writes a checkpoint of a state and of the rows of replay.

        Args:    state, kept_at as in the function `save` of this module.
        Returns: the file.
        Raises:  CheckpointError if it could not be written; the older ones are then unharmed, and
                 the next call tries again.
        """
        needed = size(state)
        rows = None
        if self.spool is not None:
            with self._errors(needed):
                rows = self.spool.save()
        file = save(self.folder, state, replay=rows, kept_at=kept_at)
        self.needed[file.name] = rows.names if rows is not None else set()
        self._sweep()
        return file

    def close(self) -> None:
        """Ends the thread that writes rows; rows that no checkpoint names yet are given up."""
        if self.spool is not None:
            self.spool.close()

    def needs(self, state: dict[str, Any], *, every: int, iterations: int, stay: int = 0) -> int:
        """The most bytes on the disk that the checkpoints of a run need, without compression.

        Args: state, what `save` will be given; every, iterations between checkpoints; iterations
              of the whole run; stay, the number of checkpoints that are kept for good (log.keep).
        """
        needed = (KEEP + 1 + stay) * size(state)
        if self.spool is not None:
            rows, count = self.spool.replay.rows, self.spool.count
            # The rows of the oldest checkpoint that is kept, and all newer ones. Each checkpoint
            # needs at most one ring of rows, and pieces with only overwritten rows are deleted.
            written = rows + KEEP * min(every, rows) + stay * rows
            # Each checkpoint has a tail of its own; a small ring is nothing but a tail.
            tails = (2 + stay) * count
            needed += self.spool.width * (min(written, iterations) + tails)
        return needed

    def taken(self) -> int:
        """Bytes on the disk that the present checkpoints and pieces of this run take."""
        found = [*files(self.folder), *(self.folder / pieces.FOLDER).glob("*")]
        return sum(file.lstat().st_size for file in found)

    def _sweep(self) -> None:
        """Deletes pieces that neither a checkpoint nor the present ring of replay needs. If a
        checkpoint cannot be read, nothing is deleted, since it may need any of them."""
        self.needed = {file.name: self.needed.get(file.name) for file in files(self.folder)}
        keep = set() if self.spool is None else self.spool.names
        for names in self.needed.values():
            if names is None:
                return
            keep |= names
        pieces.sweep(self.folder, keep)

    @contextlib.contextmanager
    def _errors(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(_unsaved(self.folder, needed, error)) from error


def _needed(file: Path) -> set[str] | None:
    """Names of the pieces that a checkpoint needs; None if it cannot be read."""
    try:
        _, replay = archive.content(file, torch.device("cpu"))
    except CheckpointError:
        return None
    return set() if replay is None else replay.names


def files(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run folder, oldest first. Whether they are intact is not checked."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(filter(_NAME.fullmatch, names), key=_number)]


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found.group(1)) if found else 0


def step_kept(file: Path) -> int:
    """The agent step of a checkpoint that is kept for good (log.keep), which its name says; 0 for
    one that is deleted once there are `KEEP` newer ones."""
    found = _NAME.fullmatch(file.name)
    return int(found.group(2) or 0) if found else 0


def save(
    folder: str | os.PathLike[str],
    state: dict[str, Any],
    *,
    replay: Manifest | None = None,
    keep: int = KEEP,
    kept_at: int = 0,
) -> Path:
    """Writes `checkpoint-<number>.pt`, one number above the newest, then deletes all but the newest
    `keep` checkpoints and those that are kept for good.

    Args:    state, nested dicts, lists and tuples of tensors, numbers, strings, bytes and None;
             tensors may be on any device, and are copied to the host one at a time. replay, names
             the files with the rows of replay, which are already on the disk. kept_at, agent step
             of one seed if this checkpoint is kept for good; its name then ends in `-at-<step>`.
    Returns: the file.
    Raises:  ValueError if the state has anything else, which could not be loaded again, or if
             keep < 1; CheckpointError if the disk is full or the folder cannot be written to: the
             temporary file is then removed, and older checkpoints are unharmed.
    """
    folder = Path(folder)
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 checkpoint to stay, got {keep}")
    needed = size(state)
    before = files(folder)
    number, at = _number(before[-1].name) + 1 if before else 1, f"-at-{kept_at}" if kept_at else ""
    target = folder / f"checkpoint-{number:06d}{at}.pt"
    content = {"format": FORMAT, "cerl": __version__, "state": state}
    content["replay"] = None if replay is None else replay.state()
    try:
        _check_space(folder, needed)
        safe.write_atomically(target, lambda file: _write(file, content))
    except OSError as error:
        raise CheckpointError(_unsaved(folder, needed, error)) from error
    for old in files(folder)[:-keep]:
        if not step_kept(old):
            with contextlib.suppress(OSError):
                old.unlink()
    return target


def _write(raw: BinaryIO, content: dict[str, Any]) -> None:
    """Writes the archive of a checkpoint. Raises: OSError."""
    file = _File(raw)
    try:
        torch.save(content, file)  # pyright: ignore[reportArgumentType]
    except Exception:
        if file.error is not None:
            raise file.error from None
        raise


def _check_space(folder: Path, needed: int) -> None:
    """Raises: OSError if the free space is less than `needed` bytes, those of the tensors."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _unsaved(folder: Path, needed: int, error: OSError) -> str:
    """The error message if a checkpoint could not be written. Args: needed, bytes; 0: unknown."""
    before = files(folder)
    last = f"the newest is still {before[-1].name}" if before else "there is none yet"
    if error.errno not in _FULL:
        return (
            f"{folder}: the checkpoint could not be written ({error.strerror or error}); {last}. "
            "Make the folder writable and resume"
        )
    free = shutil.disk_usage(folder).free
    wanted = (
        f"a checkpoint needs {in_words(needed)} beside the ones that are kept, " if needed else ""
    )
    return (
        f"{folder}: the disk is full: {wanted}{in_words(free)} are free; {last}. Free some space, "
        "or save checkpoints without the replay buffer (log.save_replay: false), and resume"
    )


def in_words(count: float) -> str:
    """A number of bytes in words, e.g. 12.3 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def newest(
    folder: str | os.PathLike[str],
    *,
    replay: bool = True,
    map_location: torch.device | str = "cpu",
) -> Loaded:
    """Finds the newest intact checkpoint of a run folder, to resume from it.

    Every byte is checked, also of the rows of replay unless `replay` is False. Newer checkpoints
    that are damaged are renamed to `damaged-<name>`, and a text file beside each says why. So are
    older ones that are kept for good, if they are not even archives.

    Raises: CheckpointError if there is no intact checkpoint, or if the newest intact one has
            another format; nothing is renamed then.
    """
    loaded, damaged = _search(Path(folder), torch.device(map_location), rows=replay)
    damaged += _ruined(Path(folder), before=loaded.file)
    return loaded._replace(damaged=[_set_aside(file, reason) for file, reason in damaged])


def _ruined(folder: Path, *, before: Path) -> list[tuple[Path, str]]:
    """Checkpoints that are kept for good and cannot be opened, each with what is wrong with it.

    Checksums are not verified, since that would read all of them whenever a run is resumed.

    Args: before, only checkpoints that are older than this one are looked at.
    """
    found = []
    for file in files(folder):
        if step_kept(file) and _number(file.name) < _number(before.name):
            try:
                archive.content(file, torch.device("cpu"))
            except Damaged as error:
                found.append((file, str(error)))
            except CheckpointError:  # of another format, or it may be read later
                continue
    return found


def load(path: str | os.PathLike[str], *, map_location: torch.device | str = "cpu") -> Loaded:
    """Reads a checkpoint without changing anything in its folder, and without rows of replay.

    Args:   path of a checkpoint, or of a run folder, whose newest intact checkpoint is read.
    Raises: CheckpointError if there is none, or if it has another format.
    """
    path, device = Path(path), torch.device(map_location)
    if path.is_dir():
        loaded, damaged = _search(path, device, rows=False)
        return loaded._replace(damaged=[f"{file.name} is {reason}" for file, reason in damaged])
    try:
        return _intact(path, device)
    except Damaged as error:
        raise CheckpointError(f"{path}: {error}; {_alternative(path, device)}") from error


def _search(
    folder: Path, device: torch.device, *, rows: bool
) -> tuple[Loaded, list[tuple[Path, str]]]:
    """The newest intact checkpoint, and all newer ones, each with what is wrong with it.

    Args: rows, whether to check the rows of replay too.
    """
    found = files(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: no checkpoint in this folder (expected checkpoint-<number>.pt); the run "
            "ended before its first one, start it again with `cerl train`"
        )
    damaged: list[tuple[Path, str]] = []
    usable: Path | None = None
    for file in reversed(found):
        try:
            loaded = _intact(file, device)
            if rows and loaded.replay is not None:
                reason = pieces.damage(folder, loaded.replay)
                if reason is not None:
                    usable = usable or file
                    raise Damaged(f"damaged ({reason})")
            return loaded, damaged
        except Damaged as error:
            damaged.append((file, str(error)))
    advice = "start the run again with `cerl train`"
    if usable is not None:
        advice = (
            f"{usable.name} is intact except for its rows of replay: `cerl train --resume {folder} "
            "--log.no-save-replay` resumes from it and refills the replay first"
        )
    said = "; ".join(f"{file.name} is {reason}" for file, reason in damaged)
    raise CheckpointError(f"{folder}: no intact checkpoint: {said}. Nothing was changed; {advice}")


def _set_aside(file: Path, reason: str) -> str:
    """Renames a damaged checkpoint. Returns: a sentence that says so."""
    target, count = file.with_name(f"damaged-{file.name}"), 1
    while os.path.lexists(target):
        count += 1
        target = file.with_name(f"damaged-{file.name}.{count}")
    try:
        os.rename(file, target)
        safe.write_text(target.with_name(f"{target.name}.txt"), f"{reason}\n")
    except OSError as error:
        return f"{file.name} is {reason}; it could not be set aside ({error.strerror or error})"
    return f"{file.name} is {reason}; it was set aside as {target.name}"


def _alternative(file: Path, device: torch.device) -> str:
    """Advice for a damaged checkpoint: names the newest older one that is intact, if any."""
    for older in reversed([f for f in files(file.parent) if _number(f.name) < _number(file.name)]):
        with contextlib.suppress(CheckpointError):
            return f"{_intact(older, device).file} is intact"
    return "no intact checkpoint came before it; start the run again with `cerl train`"


def _intact(file: Path, device: torch.device) -> Loaded:
    """Reads a checkpoint after verifying its checksums; its rows of replay are not looked at.

    Raises: Damaged; CheckpointError if it has another format or cannot be read.
    """
    if not os.path.lexists(file):
        raise CheckpointError(f"{file}: expected a checkpoint or a run folder, found no such file")
    archive.verify(file)
    state, replay = archive.content(file, device)
    return Loaded(state, file, [], replay)
