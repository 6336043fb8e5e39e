"""Writes a ring of replay into pieces, beside training.

Whole pieces are copied out of the ring as soon as their rows are there; one thread compresses and
writes them. The rows since then, less than a piece, are written anew by every checkpoint (the
tail), as is a ring that is no larger than a piece. If the disk is too slow, training waits, so a
checkpoint never has more than `STAGED` pieces and a tail to write.
"""

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl.record import files, pieces
from cerl.record.pieces import Manifest, Piece
from cerl.replay import Replay
from cerl.state import CheckpointError, Free, match, plain

PIECE = 64 * 2**20  # bytes of rows in a piece, before compression
STAGED = 2  # pieces that have left the ring and are not on the disk yet, at most


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


class Spool:
    """Writes a ring into the pieces of a run folder.

    `stream` and `save` raise OSError where the disk does; what was not written is then tried again
    by later calls for as long as the ring still holds it, and nothing on the disk is lost.
    """

    def __init__(self, folder: Path, replay: Replay) -> None:
        self.folder, self.replay = folder, replay
        self.rings = replay.rings()
        self.layout = pieces.layout(self.rings)
        self.width = pieces.width(self.layout)
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
        expected |= {"layout": pieces.described(self.layout), "total": 0, "pieces": Free()}
        match(expected, of.state(), "checkpoint.replay")
        if expected["rows"] != of.rows or expected["layout"] != of.layout:
            raise CheckpointError(
                f"checkpoint.replay: expected {expected['rows']} rows of {expected['layout']}, got "
                f"{of.rows} of {plain(str(of.layout), 400)}; it belongs to a run with other options"
            )
        pieces.read(self.folder, of, self.rings)
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
            files.sync_folder(self.folder / pieces.FOLDER)
        self.calls = self.total - first
        held = [*self.live, *([self.tail] if self.tail is not None else [])]
        fields, misses = pieces.described(self.layout), self.replay.misses.tolist()
        made = Manifest(self.total, self.replay.rows, misses, fields, held)
        return pieces.manifest(made.state())

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
        path = self.folder / pieces.FOLDER / piece.name
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
        files.own_folder(self.folder / pieces.FOLDER)
        buffer = self.buffers.pop() if self.buffers else self._buffer()
        flat = buffer[: (last - first) * self.width]
        for name, block in pieces.split(flat, self.layout, last - first):
            for ring, part in pieces.spans(first, last, self.replay.rows):
                # Seed by seed both sides are one block of memory, which needs no copy between.
                for seed in range(len(block)):
                    block[seed, part].copy_(self.rings[name][seed, ring], non_blocking=True)
        if self.rings["obs"].is_cuda:
            torch.cuda.current_stream(self.rings["obs"].device).synchronize()
        name = f"{first:012d}-{last:012d}-{secrets.token_hex(6)}.rows"
        path, rows = self.folder / pieces.FOLDER / name, flat.numpy().data
        self.thread = self.thread or _Thread()
        future = self.thread.submit(lambda: pieces.write(path, rows))
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
                    (self.folder / pieces.FOLDER / job.name).unlink()
            self.buffers.append(job.buffer)
            self.jobs.popleft()
