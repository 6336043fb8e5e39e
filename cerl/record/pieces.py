"""Rows of replay on the disk: files that are written once (pieces), and manifests that name them.

Replay is a ring buffer; its rows are numbered over the whole run by their time index. A row does
not change until it is overwritten, so a piece with the rows [first, last) stays valid, and a
checkpoint only has to name the pieces that cover the ring. A piece holds the fields one after the
other, [S, rows, E, ...] each, as chunks compressed by zstd; the length of a chunk stands before it.
"""

import contextlib
import errno
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cerl.record import files
from cerl.state import CheckpointError, Free, kind, lost, match, plain

FOLDER = "replay"  # folder of the pieces inside a run folder
CHUNK = 4 * 2**20  # bytes that are compressed at a time
# Compression level of zstd. It runs at about 1 GB/s; Atari frames shrink 90 times and more, random
# numbers by a tenth.
LEVEL = 1

_NAME = re.compile(r"\d{1,18}-\d{1,18}-[0-9a-f]{12}\.rows")
_LENGTH = struct.Struct("<I")

# Type and shape [S, E, ...] of every field at one time index.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Piece(NamedTuple):
    """A file with the rows [first, last) of all seeds and environments."""

    name: str
    first: int
    last: int
    size: int  # bytes of the file
    checksum: int  # CRC-32 of the file


class Manifest(NamedTuple):
    """The part of a checkpoint about replay; names pieces with the last min(total, rows) rows."""

    total: int  # time indices written since the run began
    rows: int  # R, time indices that the ring holds
    misses: list[int]  # for every seed, slots of batches for which sampling found no valid row
    layout: dict[str, str]  # type and shape [S, E, ...] of one time index of every field
    pieces: list[Piece]

    def state(self) -> dict[str, Any]:
        """The manifest as plain data, for a checkpoint."""
        return self._asdict() | {"pieces": [tuple(piece) for piece in self.pieces]}

    @property
    def names(self) -> set[str]:
        """Names of the files that the checkpoint needs."""
        return {piece.name for piece in self.pieces}


def manifest(state: Any) -> Manifest:
    """The manifest whose plain data this is. Raises: CheckpointError if it is none."""
    where = "checkpoint.replay"
    free = {"misses": Free(_numbers), "layout": Free(_texts), "pieces": Free(_pieces)}
    match({"total": 0, "rows": 0, **free}, state, where)
    got = Manifest(**state | {"pieces": [Piece(*piece) for piece in state["pieces"]]})
    begin = max(0, got.total - got.rows)
    ends = [begin, *(piece.last for piece in got.pieces)]
    fits = all(0 <= piece.first < piece.last <= piece.first + got.rows for piece in got.pieces)
    joined = all(piece.first == end for piece, end in zip(got.pieces[1:], ends[1:], strict=False))
    starts = not got.pieces or got.pieces[0].first <= begin
    if got.rows < 1 or ends[-1] != got.total or not (fits and joined and starts):
        raise CheckpointError(f"{where}: expected pieces that cover the ring, got others")
    return got


def _numbers(value: Any) -> str | None:
    fine = type(value) is list and all(type(item) is int and abs(item) < 2**63 for item in value)
    return None if fine else f"expected a list of numbers, got {kind(value)}"


def _texts(value: Any) -> str | None:
    fine = isinstance(value, dict) and all(type(v) is str for pair in value.items() for v in pair)
    return None if fine else f"expected texts by name, got {kind(value)}"


def _pieces(value: Any) -> str | None:
    types = [str, int, int, int, int]
    fine = type(value) is list and all(
        type(item) is tuple
        and [type(entry) for entry in item] == types
        and _NAME.fullmatch(str(item[0]))
        for item in value
    )
    return None if fine else f"expected a list of pieces, got {kind(value)} that holds others"


def layout(rings: Mapping[str, Tensor]) -> Layout:
    """Types and shapes of the fields; the widest types come first, so that all are aligned.

    Args: rings [S, R, E, ...], the fields of replay by name.
    """
    fields = {name: (ring.dtype, (len(ring), *ring.shape[2:])) for name, ring in rings.items()}
    return dict(sorted(fields.items(), key=lambda field: -field[1][0].itemsize))


def described(fields: Layout) -> dict[str, str]:
    """The layout as texts for a manifest, e.g. {"reward": "float32 [2, 8]"}."""
    return {
        name: f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        for name, (dtype, shape) in fields.items()
    }


def layout_of(held: Manifest) -> Layout:
    """Types and shapes of the fields of a manifest's rows, in their order.

    Raises: CheckpointError if the manifest says something else.
    """
    found: Layout = {}
    for name, text in held.layout.items():
        type_name, _, shape = text.partition(" ")
        dtype, sizes = getattr(torch, type_name, None), re.fullmatch(r"\[\d+(, \d+)*\]", shape)
        if not isinstance(dtype, torch.dtype) or not sizes:
            raise CheckpointError(
                f"checkpoint.replay.layout: expected a type and sizes, got {plain(text)}"
            )
        found[name] = dtype, tuple(json.loads(shape))
    return found


def width(fields: Layout) -> int:
    """Bytes of one time index, for all seeds and environments."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in fields.values())


def split(flat: Tensor, fields: Layout, count: int) -> Iterator[tuple[str, Tensor]]:
    """Views of the bytes of a piece, [S, count, E, ...] for every field.

    Args: flat [bytes] uint8; count, time indices of the piece.
    """
    at = 0
    for name, (dtype, (seeds, *rest)) in fields.items():
        size = dtype.itemsize * seeds * count * math.prod(rest)
        yield name, flat[at : at + size].view(dtype).view(seeds, count, *rest)
        at += size


def spans(first: int, last: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices that copy rows [first, last) between a ring and an array that starts at `first`.

    Args:   rows, R.
    Yields: a slice of the ring and the matching slice of the array; two pairs if the ring wraps.
    """
    at = first
    while at < last:
        place = at % rows
        count = min(last - at, rows - place)
        yield slice(place, place + count), slice(at - first, at - first + count)
        at += count


def write(path: Path, rows: memoryview) -> tuple[int, int]:
    """Compresses rows into a new file and waits until it is on the disk.

    Returns: bytes of the file, and its CRC-32.
    Raises:  OSError; the file is removed then.
    """
    codec = pa.Codec("zstd", compression_level=LEVEL)
    size = checksum = 0
    file = files.create(path)
    try:
        with file:
            for at in range(0, len(rows), CHUNK):
                packed = codec.compress(rows[at : at + CHUNK])
                for part in (_LENGTH.pack(len(packed)), packed):
                    size, checksum = size + len(part), zlib.crc32(part, checksum)
                    file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    return size, checksum


def damage(folder: Path, of: Manifest) -> str | None:
    """What is wrong with the pieces of a manifest; None if sizes and checksums are right.

    Raises: CheckpointError if a file cannot be read for a reason that may pass, e.g. rights.
    """
    for piece in of.pieces:
        reason = _damage(folder, piece)
        if reason is not None:
            return f"{FOLDER}/{piece.name}, rows {piece.first:,} to {piece.last:,}: {reason}"
    return None


def _damage(folder: Path, piece: Piece) -> str | None:
    try:
        size = checksum = 0
        with _open(folder, piece) as file:
            while part := file.read(CHUNK):
                size, checksum = size + len(part), zlib.crc32(part, checksum)
    except OSError as error:
        return lost(folder / FOLDER / piece.name, error)
    if size != piece.size:
        return f"expected {piece.size:,} bytes, got {size:,}"
    return None if checksum == piece.checksum else "its checksum does not agree"


def _open(folder: Path, piece: Piece) -> Any:
    if (folder / FOLDER).is_symlink():
        raise OSError(errno.ELOOP, f"{FOLDER} is a link, and nothing is read through links")
    return files.read(folder / FOLDER / piece.name)


def read(folder: Path, of: Manifest, rings: Mapping[str, Tensor]) -> None:
    """Copies the rows of a manifest into the rings [S, R, E, ...] of replay, in place.

    Raises: CheckpointError if a piece is damaged; the rings are then partly overwritten.
    """
    fields = layout(rings)
    longest = max((piece.last - piece.first for piece in of.pieces), default=0)
    buffer = torch.zeros(longest * width(fields), dtype=torch.uint8)
    for piece in of.pieces:
        if (reason := _damage(folder, piece)) is not None:
            raise CheckpointError(f"{folder / FOLDER / piece.name}: damaged ({reason})")
        count = piece.last - piece.first
        flat = buffer[: count * width(fields)]
        unpack(folder, piece, flat)
        begin = max(piece.first, of.total - of.rows)
        skipped = begin - piece.first
        for name, block in split(flat, fields, count):
            for ring, part in spans(begin, piece.last, of.rows):
                for seed in range(len(block)):
                    rings[name][seed, ring].copy_(block[seed, skipped:][part])


def whole(folder: Path, of: Manifest) -> dict[str, Tensor]:
    """Reads the rows of a manifest into new tensors, in the format of `Replay.state_dict`.

    Raises: CheckpointError if a piece is damaged.
    """
    rings = {
        name: torch.zeros(seeds, of.rows, *rest, dtype=dtype)
        for name, (dtype, (seeds, *rest)) in layout_of(of).items()
    }
    read(folder, of, rings)
    return rings | {"total": torch.tensor(of.total), "misses": torch.tensor(of.misses)}


def unpack(folder: Path, piece: Piece, flat: Tensor) -> None:
    """Decompresses a piece into `flat` [bytes] uint8.

    Raises: CheckpointError if the piece has more or fewer bytes.
    """
    codec = pa.Codec("zstd")
    try:
        with _open(folder, piece) as file:
            for chunk in flat.split(CHUNK):
                packed = file.read(*_LENGTH.unpack(file.read(_LENGTH.size)))
                rows = codec.decompress(packed, decompressed_size=len(chunk))
                chunk.numpy()[:] = np.frombuffer(rows, dtype=np.uint8)
            if file.read(1):
                raise ValueError("more rows than expected")
    except (OSError, ValueError, struct.error, pa.ArrowException) as error:
        raise CheckpointError(
            f"{folder / FOLDER / piece.name}: expected {len(flat):,} bytes of rows, got others; "
            "it belongs to a run with other options"
        ) from error


def sweep(folder: Path, keep: Collection[str]) -> None:
    """Deletes all pieces of a run folder except `keep`; only for the writer of the folder."""
    place = folder / FOLDER
    if place.is_symlink() or not place.is_dir():
        return
    for name in os.listdir(place):
        if _NAME.fullmatch(name) and name not in keep:
            with contextlib.suppress(OSError):
                (place / name).unlink()
