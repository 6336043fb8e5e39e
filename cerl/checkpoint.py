"""Checkpoints of a run: numbered files in its folder, written whole or not at all, checked on load.

A checkpoint is written beside the others and renamed only once it is on the disk, so a crash or a
full disk leaves the ones before it as they are. torch does not verify its own archive; `load` does.
"""

import contextlib
import errno
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from cerl import __version__
from cerl.files import create, sync_folder, temporary

FORMAT = 4  # raised where what a checkpoint holds has another shape, or leaves other names
_NAME = re.compile(r"checkpoint-(\d{6,})\.pt")
_SCALARS = (int, float, bool, str, bytes, type(None))
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What the standard library raises over an archive whose bytes are wrong.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, ValueError, RuntimeError, KeyError),
)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; nothing that was on the disk is changed."""


class _File:
    """Hands torch's writes to a file and keeps the error that torch would replace by its own."""

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


def put(mine: Tensor, saved: Tensor, *, what: str) -> None:
    """Copies a saved tensor in place. Raises: CheckpointError if it has another shape or type."""
    if mine.shape != saved.shape or mine.dtype != saved.dtype:
        raise CheckpointError(
            f"checkpoint: expected {what} of shape {list(mine.shape)} and {mine.dtype}, got "
            f"{list(saved.shape)} and {saved.dtype}; it belongs to a run with other options"
        )
    with torch.no_grad():
        mine.copy_(saved)


def put_net(net: nn.Module, saved: Mapping[str, Tensor], *, what: str) -> None:
    """`put` for the state of a network. Raises: CheckpointError if tensors are missing or left."""
    mine = net.state_dict()
    missing, left = sorted(mine.keys() - saved.keys()), sorted(saved.keys() - mine.keys())
    if missing or left:
        raise CheckpointError(
            f"checkpoint: expected {', '.join(missing) or 'nothing else'} in {what}, got "
            f"{', '.join(left) or 'nothing'} instead; it belongs to a run with other options, or "
            "to another version of cerl: use the one in the run folder's versions.yaml"
        )
    for name, tensor in mine.items():
        put(tensor, saved[name], what=f"{what}.{name}")


def files(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints of a run folder, the oldest first; whether they are intact is not looked at."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(filter(_NAME.fullmatch, names), key=_number)]


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else 0


def save(folder: str | os.PathLike[str], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes `checkpoint-<number>.pt`, one number above the newest, then deletes all but `keep`.

    Args:    state, nested dicts, lists and tuples of tensors, numbers, strings, bytes and None.
             Tensors may be on any device; each travels to the host on its own.
    Returns: the file.
    Raises:  ValueError if the state holds anything else (it could not be loaded), or keep < 1;
             CheckpointError if the disk is full or the folder not writable: the temporary file is
             removed, and what was there stays.
    """
    folder = Path(folder)
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 checkpoint to stay, got {keep}")
    needed = _bytes(state)
    before = files(folder)
    target = folder / f"checkpoint-{_number(before[-1].name) + 1 if before else 1:06d}.pt"
    fresh = temporary(target)
    try:
        _check_space(folder, needed)
        _write(fresh, {"format": FORMAT, "cerl": __version__, "state": state})
        os.replace(fresh, target)
        sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(_unsaved(folder, before, needed, error)) from error
        raise
    for old in files(folder)[:-keep]:
        with contextlib.suppress(OSError):
            old.unlink()
    return target


def _write(path: Path, content: dict[str, Any]) -> None:
    """The content, on the disk when this returns. Raises: OSError."""
    with create(path) as raw:
        file = _File(raw)
        try:
            torch.save(content, file)  # pyright: ignore[reportArgumentType]
        except Exception:
            if file.error is not None:
                raise file.error from None
            raise
        raw.flush()
        os.fsync(raw.fileno())


def _bytes(state: dict[str, Any]) -> int:
    """Size of a state's storages, each once. Raises: ValueError over what could not be loaded."""
    storages = {}
    for path, leaf in _leaves(state, ""):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            storages[leaf.device, storage.data_ptr()] = storage.nbytes()
        elif type(leaf) not in _SCALARS:
            raise ValueError(
                f"checkpoint state at {path[1:] or 'its root'}: expected tensors, numbers, "
                "strings, bytes or None in dicts, lists and tuples, got "
                f"{type(leaf).__name__}, which could not be loaded again (arrays: torch.from_numpy)"
            )
    return sum(storages.values())


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if type(node) in (dict, OrderedDict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}")
    elif type(node) in (list, tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node


def _check_space(folder: Path, needed: int) -> None:
    """Refuses before anything is written where the tensors alone do not fit."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _unsaved(folder: Path, before: list[Path], needed: int, error: OSError) -> str:
    last = f"the newest is still {before[-1].name}" if before else "there is none yet"
    if error.errno not in _FULL:
        return (
            f"{folder}: the checkpoint could not be written ({error.strerror or error}); {last}. "
            "Make the folder writable and resume"
        )
    free = shutil.disk_usage(folder).free
    return (
        f"{folder}: the disk is full: a checkpoint needs {_size(needed)} beside the ones that are "
        f"kept, {_size(free)} are free; {last}. Free some space, or save checkpoints without the "
        "replay buffer (log.save_replay: false), and resume"
    )


def _size(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def load(
    path: str | os.PathLike[str], *, map_location: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The state that `save` was given, after checking every byte of the file.

    On the CPU tensors stay mapped to the file until they are copied, so a large replay buffer is
    never in memory twice.

    Args:   path of a checkpoint, or of a run folder: its newest one.
    Raises: CheckpointError if there is none, or if it is damaged (names the newest intact one
            before it), from a newer cerl, or no checkpoint at all. Never falls back on its own.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = files(path)
        if not found:
            raise CheckpointError(
                f"{path}: no checkpoint in this folder (expected checkpoint-<number>.pt); the run "
                "ended before its first one, start it again with `cerl train`"
            )
        file = found[-1]
    damage = _damage(file)
    if damage is not None:
        raise CheckpointError(f"{file}: damaged checkpoint ({damage}); {_alternative(file)}")
    return _content(file, map_location)


def _damage(file: Path) -> str | None:
    """What is wrong with a file's bytes; None if every checksum of the archive agrees."""
    if not file.is_file():
        raise CheckpointError(f"{file}: expected a checkpoint or a run folder, found no such file")
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except _DAMAGE as error:
        return f"{file.stat().st_size:,} bytes, not a whole archive: {error}"
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    return None if bad is None else f"checksum of {bad} does not agree"


def _alternative(file: Path) -> str:
    """What to do about a damaged checkpoint: the newest intact one before it, if any."""
    for older in reversed([f for f in files(file.parent) if _number(f.name) < _number(file.name)]):
        if _damage(older) is None:
            return f"{older} is intact: move {file.name} out of the folder to go on from there"
    return "no intact checkpoint came before it; start the run again with `cerl train`"


def _content(file: Path, map_location: torch.device | str) -> dict[str, Any]:
    device = torch.device(map_location)
    try:
        content = torch.load(
            file, map_location=device, weights_only=True, mmap=device.type == "cpu"
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{file}: intact, but no checkpoint of cerl: {reason}; {_alternative(file)}"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(found, int) or "state" not in content:
        raise CheckpointError(f"{file}: intact, but no checkpoint of cerl; {_alternative(file)}")
    if found != FORMAT:
        raise CheckpointError(
            f"{file}: checkpoint format {found}, written by cerl {content.get('cerl')}; this is "
            f"cerl {__version__}, which reads format {FORMAT}. Use the version that wrote it"
        )
    return content["state"]
