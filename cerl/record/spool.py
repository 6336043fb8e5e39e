"""Writes the rows of replay to the disk in pieces, while training goes on.

As soon as there are enough new rows for a piece, they are copied out of the ring buffer, and a
thread compresses and writes them. The newest rows, fewer than a piece, are the tail; every
checkpoint writes them to a file of their own. A ring that is no larger than one piece is written
completely by every checkpoint. If the disk is too slow, training waits, so a checkpoint never has
more than `STAGED` pieces and a tail left to write.
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
STAGED = 2  # most pieces that are copied out of the ring and not on the disk yet


class _Thread:
    """A thread that runs calls one after the other. It does not keep the process from ending."""

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
    """A piece that the thread is going to write or is writing."""

    name: str
    first: int
    last: int
    tail: bool  # whether it is the tail
    buffer: Tensor
    future: Future  # its result is (size, checksum)


class Spool:
    """Writes the rows of replay into pieces in a run folder.

    `stream` and `save` raise OSError if the disk fails. Later calls then try again with the rows
    that the ring still holds; files that are on the disk already are unharmed.
    """

    def __init__(self, folder: Path, replay: Replay) -> None:
        self.folder, self.replay = folder, replay
        self.rings = replay.rings()
        self.layout = pieces.layout(self.rings)
        self.width = pieces.width(self.layout)
        # A ring that is no larger than a piece is written completely by every checkpoint.
        self.whole = replay.rows * self.width <= PIECE
        self.count = min(replay.rows, max(1, PIECE // self.width))  # time indices of a piece
        self.live: list[Piece] = []  # written pieces, except the tail, with rows of the ring
        self.tail: Piece | None = None
        self.sent = 0  # first row that is neither written nor passed to the thread
        self.total = 0  # `replay.total` when it was last read
        self.calls = 0  # calls of `stream` since then
        self.jobs: deque[_Job] = deque()
        # Allocated here, since allocating pinned memory during training would pause it for long.
        self.buffers = [] if self.whole else [self._buffer() for _ in range(STAGED)]
        self.thread: _Thread | None = None

    @property
    def staging(self) -> int:
        """Bytes of host memory for the buffers of rows (pinned memory with a GPU)."""
        return (1 if self.whole else STAGED) * self.count * self.width

    @property
    def names(self) -> set[str]:
        """Names of all files that the next checkpoint may name."""
        tail = [self.tail] if self.tail is not None else []
        return {piece.name for piece in (*self.live, *tail)} | {job.name for job in self.jobs}

    def load(self, of: Manifest) -> None:
        """Reads the rows of a manifest into the replay, in place.

        Raises: CheckpointError if they are damaged, or have other shapes than the replay.
        """
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
        """Passes new rows to the thread once they fill a piece; most calls do almost nothing. To be
        called once for every time index.

        Returns: True if a piece has been written since the last call.
        Raises:  OSError.
        """
        self.calls += 1
        written = self._settle(wait=False) if self.jobs else False
        # Reading replay.total waits for the device, so calls are counted here, and it is read only
        # when there may be enough rows for a piece.
        if self.whole or self.calls < self.count:
            return written
        self.calls = 0  # if sending fails, the next attempt comes after another piece of rows
        written |= self._send_whole()
        self.calls = self.total - self.sent
        return written

    def save(self) -> Manifest:
        """Writes all rows of the ring that are not on the disk yet, and waits for that.

        Returns: the manifest for a checkpoint.
        Raises:  OSError.
        """
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
        """Ends the thread without waiting for rows that are being written: no checkpoint names
        them."""
        if self.thread is not None:
            self.thread.close(wait=not self.jobs)
            self.thread = None

    def _begin(self) -> int:
        """The first row of the ring that is neither written nor passed to the thread. Also forgets
        pieces whose rows the ring has overwritten."""
        self.sent = max(self.sent, self.total - self.replay.rows)
        behind = self.total - self.replay.rows
        self.live = [piece for piece in self.live if piece.last > behind]
        return self.sent

    def _look_again(self) -> None:
        """Forgets pieces whose files are gone, so that their rows are written again."""
        if self.tail is not None and not self._lies(self.tail):
            self.tail = None
        for index, piece in enumerate(self.live):
            if not self._lies(piece):
                self.live = self.live[:index]
                self.sent = min(self.sent, piece.first)
                return

    def _lies(self, piece: Piece) -> bool:
        """Whether the file of a piece exists and has the right size."""
        path = self.folder / pieces.FOLDER / piece.name
        return path.is_file() and path.stat().st_size == piece.size

    def _send_whole(self) -> bool:
        """Passes all new rows that fill a piece to the thread. Returns: as `_send`."""
        self.total, written = int(self.replay.total), False
        while not self.whole and self.total - self._begin() >= self.count:
            written |= self._send(self.sent, self.sent + self.count, tail=False)
        return written

    def _send(self, first: int, last: int, *, tail: bool) -> bool:
        """Copies rows out of the ring and passes them to the thread. Waits first, if the thread is
        STAGED pieces behind.

        Returns: whether a piece was written meanwhile.
        """
        written = False
        while len(self.jobs) >= STAGED:
            written |= self._settle(wait=True, only=1)
        files.own_folder(self.folder / pieces.FOLDER)
        buffer = self.buffers.pop() if self.buffers else self._buffer()
        flat = buffer[: (last - first) * self.width]
        for name, block in pieces.split(flat, self.layout, last - first):
            for ring, part in pieces.spans(first, last, self.replay.rows):
                # For one seed both sides are contiguous, so torch copies without a temporary.
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
        """Collects the pieces that the thread has written, in order.

        Args:    wait, until pieces are written that are not yet; only, at most this many pieces
                 (0: all).
        Returns: whether there were any.
        Raises:  OSError, or any other error of the thread; their rows will be sent again.
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
        """Drops the first piece, which could not be written, and all after it; `sent` goes back, so
        that their rows will be sent again."""
        self.sent = min(self.sent, self.jobs[0].first)
        self.calls = 0
        while self.jobs:
            job = self.jobs[0]
            if job.future.exception() is None:
                with contextlib.suppress(OSError):
                    (self.folder / pieces.FOLDER / job.name).unlink()
            self.buffers.append(job.buffer)
            self.jobs.popleft()
