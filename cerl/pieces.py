"""Rows of replay on the disk: pieces that are written once, beside training.

The ring is append-only in absolute time indices, so what was written of rows [first, last) stays
true, and a checkpoint only has to name the pieces that cover the ring: a manifest. Whole pieces are
copied out of the ring as soon as their rows are there, compressed and written by one thread. The
rows since then, less than a piece, are written anew by every checkpoint (the tail).
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cerl import files
from cerl.replay import Replay
from cerl.tree import CheckpointError, Free, kind, lost, match, plain

FOLDER = "replay"  # of a run folder
PIECE = 64 * 2**20  # bytes of rows in a piece, before compression
CHUNK = 4 * 2**20  # bytes that are compressed at a time
STAGED = 2  # pieces that have left the ring and are not on the disk yet, at most
LEVEL = 1  # of zstd: frames shrink 90 times and more, random numbers by a tenth; about 1 GB/s

_NAME = re.compile(r"\d{1,18}-\d{1,18}-[0-9a-f]{12}\.rows")
_LENGTH = struct.Struct("<I")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of one time index: [S, E, ...]


class Piece(NamedTuple):
    """A file with the rows [first, last) of all seeds and environments."""

    name: str
    first: int
    last: int
    size: int  # bytes of the file
    checksum: int  # CRC-32 of the file


class Manifest(NamedTuple):
    """What a checkpoint says of replay; its pieces cover the last min(total, rows) time indices."""

    total: int  # time indices ever written
    rows: int  # R, time indices that the ring holds
    misses: list[int]  # of every seed
    layout: dict[str, str]  # type and shape [S, E, ...] of one time index of every field
    pieces: list[Piece]

    def state(self) -> dict[str, Any]:
        """Plain data, as a checkpoint holds it."""
        return self._asdict() | {"pieces": [tuple(piece) for piece in self.pieces]}

    @property
    def names(self) -> set[str]:
        """Files that must stay as long as the checkpoint does."""
        return {piece.name for piece in self.pieces}


def manifest(state: Any) -> Manifest:
    """What `Manifest.state` wrote. Raises: CheckpointError if this is anything else."""
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
    """Types and shapes of a time index, the widest types first: so that all lie aligned."""
    fields = {name: (ring.dtype, (len(ring), *ring.shape[2:])) for name, ring in rings.items()}
    return dict(sorted(fields.items(), key=lambda field: -field[1][0].itemsize))


def _said(fields: Layout) -> dict[str, str]:
    return {
        name: f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        for name, (dtype, shape) in fields.items()
    }


def width(fields: Layout) -> int:
    """Bytes of one time index of all seeds and environments."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in fields.values())


def _split(flat: Tensor, fields: Layout, count: int) -> Iterator[tuple[str, Tensor]]:
    """The bytes of a piece as [S, count, E, ...] of every field."""
    at = 0
    for name, (dtype, (seeds, *rest)) in fields.items():
        size = dtype.itemsize * seeds * count * math.prod(rest)
        yield name, flat[at : at + size].view(dtype).view(seeds, count, *rest)
        at += size


def _spans(first: int, last: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Where rows [first, last) lie in a ring, and where from `first` on."""
    at = first
    while at < last:
        place = at % rows
        count = min(last - at, rows - place)
        yield slice(place, place + count), slice(at - first, at - first + count)
        at += count


def _write(path: Path, rows: memoryview) -> tuple[int, int]:
    """Compresses rows into a new file, on the disk when this returns. Returns: size, checksum."""
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
    """What is wrong with the pieces of a run folder; None if every byte is as it was written.

    Raises: CheckpointError if a file may not be read.
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
    """Copies the rows of a manifest into rings [S, R, E, ...], piece by piece.

    Raises: CheckpointError if a piece is damaged; the rings are then partly written.
    """
    fields = layout(rings)
    longest = max((piece.last - piece.first for piece in of.pieces), default=0)
    buffer = torch.zeros(longest * width(fields), dtype=torch.uint8)
    for piece in of.pieces:
        if (reason := _damage(folder, piece)) is not None:
            raise CheckpointError(f"{folder / FOLDER / piece.name}: damaged ({reason})")
        count = piece.last - piece.first
        flat = buffer[: count * width(fields)]
        _unpack(folder, piece, flat)
        begin = max(piece.first, of.total - of.rows)
        skipped = begin - piece.first
        for name, block in _split(flat, fields, count):
            for ring, part in _spans(begin, piece.last, of.rows):
                for seed in range(len(block)):
                    rings[name][seed, ring].copy_(block[seed, skipped:][part])


def whole(folder: Path, of: Manifest) -> dict[str, Tensor]:
    """The ring of a manifest as `Replay.state_dict` has it, in memory of its own.

    Raises: CheckpointError if a piece is damaged.
    """
    rings = {}
    for name, text in of.layout.items():
        dtype, _, shape = text.partition(" ")
        seeds, *rest = json.loads(shape)
        rings[name] = torch.zeros(seeds, of.rows, *rest, dtype=getattr(torch, dtype))
    read(folder, of, rings)
    return rings | {"total": torch.tensor(of.total), "misses": torch.tensor(of.misses)}


def _unpack(folder: Path, piece: Piece, flat: Tensor) -> None:
    """Fills bytes with the rows of a piece. Raises: CheckpointError if there are more, or less."""
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
    """Deletes the pieces of a run folder that nobody needs; for the only writer of the folder."""
    place = folder / FOLDER
    if place.is_symlink() or not place.is_dir():
        return
    for name in os.listdir(place):
        if _NAME.fullmatch(name) and name not in keep:
            with contextlib.suppress(OSError):
                (place / name).unlink()


class _Thread:
    """Runs calls one after the other, beside the caller; ends with the process, finished or not."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="replay writer", daemon=True)
        self.thread.start()

    def submit(self, call: Callable[[], Any]) -> Future:
        future: Future = Future()
        self.calls.put((future, call))
        return future

    def _run(self) -> None:
        while (job := self.calls.get()) is not None:
            future, call = job
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def close(self, *, wait: bool) -> None:
        self.calls.put(None)
        if wait:
            self.thread.join()


class _Job(NamedTuple):
    """A piece on its way to the disk."""

    name: str
    first: int
    last: int
    tail: bool
    buffer: Tensor
    future: Future  # of (size, checksum)


class Pieces:
    """Writes a ring into the pieces of a run folder.

    `stream` and `save` raise OSError where the disk does; what was not written is then tried again
    by later calls for as long as the ring still holds it, and nothing on the disk is lost.
    """

    def __init__(self, folder: Path, replay: Replay) -> None:
        self.folder, self.replay = folder, replay
        self.rings = replay.rings()
        self.layout = layout(self.rings)
        self.width = width(self.layout)
        # A ring that is no larger than a piece is written whole by every checkpoint.
        self.whole = replay.rows * self.width <= PIECE
        self.count = min(replay.rows, max(1, PIECE // self.width))  # time indices of a piece
        self.live: list[Piece] = []  # whole pieces of rows that the ring still holds
        self.tail: Piece | None = None
        self.sent = 0  # rows before this one are in pieces, written or on their way
        self.total = 0  # of the ring when it was last asked
        self.calls = 0  # of `stream` since
        self.jobs: deque[_Job] = deque()
        # Made before training, of which making them would be the longest pause.
        self.buffers = [] if self.whole else [self._buffer() for _ in range(STAGED)]
        self.thread: _Thread | None = None

    @property
    def staging(self) -> int:
        """Bytes of host memory that rows on their way to the disk take (pinned, with a GPU)."""
        return (1 if self.whole else STAGED) * self.count * self.width

    @property
    def names(self) -> set[str]:
        """Files that the next checkpoint may name."""
        tail = [self.tail] if self.tail is not None else []
        return {piece.name for piece in (*self.live, *tail)} | {job.name for job in self.jobs}

    def load(self, of: Manifest) -> None:
        """Reads the ring, in place. Raises: CheckpointError if it is another run's, or damaged."""
        expected = {"rows": self.replay.rows, "misses": [0] * len(self.replay.misses)}
        expected |= {"layout": _said(self.layout), "total": 0, "pieces": Free()}
        match(expected, of.state(), "checkpoint.replay")
        if expected["rows"] != of.rows or expected["layout"] != of.layout:
            raise CheckpointError(
                f"checkpoint.replay: expected {expected['rows']} rows of {expected['layout']}, got "
                f"{of.rows} of {plain(str(of.layout), 400)}; it belongs to a run with other options"
            )
        read(self.folder, of, self.rings)
        self.replay.total.fill_(of.total)
        self.replay.misses.copy_(torch.tensor(of.misses))
        self.live, self.tail, self.total, self.calls = list(of.pieces), None, of.total, 0
        self.sent = of.total
        if self.live and (self.whole or self.live[-1].last - self.live[-1].first < self.count):
            self.tail = self.live.pop()
            self.sent = self.tail.first
        if self.whole:
            self.live, self.sent = [], 0

    def stream(self) -> bool:
        """Sends the rows of whole pieces to the disk; cheap where there are none. Call it once
        a time index. Returns: True if a piece has been written since the last call."""
        self.calls += 1
        written = self._settle(wait=False) if self.jobs else False
        # Asking the ring waits for the device, so it is done only once there may be enough.
        if self.whole or self.calls < self.count:
            return written
        self.calls = 0  # where this fails, it is tried again after another piece of rows
        written |= self._send_whole()
        self.calls = self.total - self.sent
        return written

    def save(self) -> Manifest:
        """Brings all rows of the ring to the disk. Returns: what a checkpoint says of them."""
        self._settle(wait=True)
        self._look_again()
        self._send_whole()
        self._settle(wait=True)
        first = self._begin()
        if self.tail is None or (self.tail.first, self.tail.last) != (first, self.total):
            self.tail = None
            if first < self.total:
                self._send(first, self.total, tail=True)
                self._settle(wait=True)
        if self.total:
            files.sync_folder(self.folder / FOLDER)
        self.calls = self.total - first
        pieces = [*self.live, *([self.tail] if self.tail is not None else [])]
        misses = self.replay.misses.tolist()
        return manifest(
            Manifest(self.total, self.replay.rows, misses, _said(self.layout), pieces).state()
        )

    def close(self) -> None:
        """Ends the thread. Rows on their way, which no checkpoint names, are not waited for."""
        if self.thread is not None:
            self.thread.close(wait=not self.jobs)
            self.thread = None

    def _begin(self) -> int:
        """The first row that is not on its way to the disk and still is in the ring."""
        self.sent = max(self.sent, self.total - self.replay.rows)
        behind = self.total - self.replay.rows
        self.live = [piece for piece in self.live if piece.last > behind]
        return self.sent

    def _look_again(self) -> None:
        """Forgets pieces that somebody has deleted, so that their rows are written again."""
        if self.tail is not None and not self._lies(self.tail):
            self.tail = None
        for index, piece in enumerate(self.live):
            if not self._lies(piece):
                self.live = self.live[:index]
                self.sent = min(self.sent, piece.first)
                return

    def _lies(self, piece: Piece) -> bool:
        """Whether a piece still is on the disk."""
        path = self.folder / FOLDER / piece.name
        return path.is_file() and path.stat().st_size == piece.size

    def _send_whole(self) -> bool:
        self.total, written = int(self.replay.total), False
        while not self.whole and self.total - self._begin() >= self.count:
            written |= self._send(self.sent, self.sent + self.count, tail=False)
        return written

    def _send(self, first: int, last: int, *, tail: bool) -> bool:
        """Copies rows out of the ring for the thread, waiting while it is too far behind."""
        written = False
        while len(self.jobs) >= STAGED:
            written |= self._settle(wait=True, only=1)
        files.own_folder(self.folder / FOLDER)
        buffer = self.buffers.pop() if self.buffers else self._buffer()
        flat = buffer[: (last - first) * self.width]
        for name, block in _split(flat, self.layout, last - first):
            for ring, part in _spans(first, last, self.replay.rows):
                # Seed by seed both sides are one block of memory, which needs no copy between.
                for seed in range(len(block)):
                    block[seed, part].copy_(self.rings[name][seed, ring], non_blocking=True)
        if self.rings["obs"].is_cuda:
            torch.cuda.current_stream(self.rings["obs"].device).synchronize()
        name = f"{first:012d}-{last:012d}-{secrets.token_hex(6)}.rows"
        path, rows = self.folder / FOLDER / name, flat.numpy().data
        self.thread = self.thread or _Thread()
        future = self.thread.submit(lambda: _write(path, rows))
        self.jobs.append(_Job(name, first, last, tail, buffer, future))
        if not tail:
            self.sent = last
        return written

    def _buffer(self) -> Tensor:
        pin = self.rings["obs"].is_cuda
        return torch.zeros(self.count * self.width, dtype=torch.uint8, pin_memory=pin)

    def _settle(self, *, wait: bool, only: int = 0) -> bool:
        """Takes over what the thread has written, in order. Returns: whether there was any.

        Args:   wait for what is under way; only, that many pieces (0: all).
        Raises: OSError, or whatever else stopped the thread; the rows count as not sent then.
        """
        done = 0
        while self.jobs and (wait or self.jobs[0].future.done()) and (not only or done < only):
            job = self.jobs[0]
            error = job.future.exception()
            if error is not None:
                self._abandon()
                raise error
            self.jobs.popleft()
            self.buffers.append(job.buffer)
            piece = Piece(job.name, job.first, job.last, *job.future.result())
            if job.tail:
                self.tail = piece
            else:
                self.live.append(piece)
            done += 1
        return done > 0

    def _abandon(self) -> None:
        """Takes back everything from the first piece on that could not be written."""
        self.sent = min(self.sent, self.jobs[0].first)
        self.calls = 0
        while self.jobs:
            job = self.jobs[0]
            if job.future.exception() is None:
                with contextlib.suppress(OSError):
                    (self.folder / FOLDER / job.name).unlink()
            self.buffers.append(job.buffer)
            self.jobs.popleft()
