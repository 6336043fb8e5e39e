"""How GPU benchmarks take time and tell it: stopwatch, rows, compiling ahead."""

import contextlib
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

CALLS = 20  # in a graph, at most
SPAN = 20.0  # ms of all of them, where calls are long: fewer, but one
LIMIT = 200.0  # ms of the repeats of one number, where that leaves 3

Call = Callable[[], object]
Rows = list[dict[str, Any]]


class Spent(NamedTuple):
    """Milliseconds of one call: replayed in a CUDA graph, and as called from Python (no garbage
    collection meanwhile)."""

    graph: float
    eager: float


Timer = Callable[[Call], Spent]


def stopwatch(repeats: int) -> Timer:
    """Times a call on the current CUDA device. Raises: ValueError for less than one repeat."""
    if repeats < 1:
        raise ValueError(f"--repeats: expected a number from 1 on, got {repeats}")

    def spent(call: Call) -> Spent:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, as capture cannot
            call()
            call()
        torch.cuda.current_stream().wait_stream(side)
        guess = _median(lambda: _many(call, 3), 1) / 3
        calls = max(1, min(CALLS, int(SPAN / guess)))
        times = max(min(repeats, 3), min(repeats, int(LIMIT / (calls * guess))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _many(call, calls)
        replayed = _median(graph.replay, times) / calls
        with uncollected():
            return Spent(replayed, _median(lambda: _many(call, calls), times) / calls)

    return spent


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector rests, as in `timeit`: a call is not charged for old objects."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def untimed(call: Call) -> Spent:
    """A timer that only calls, as compilation wants it."""
    call()
    return Spent(0.0, 0.0)


def _many(call: Call, calls: int) -> None:
    for _ in range(calls):
        call()


def _median(run: Call, repeats: int) -> float:
    """Milliseconds between device events, after one run that does not count."""
    run()
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


class Report:
    """Rows, printed and written as soon as they are there."""

    def __init__(self, title: str, out: Path | None) -> None:
        self.title, self.rows, self.failed = title, Rows(), Rows()
        self.file: TextIO | None = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.file = out.open("a")
        print(title)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, row: dict[str, Any]) -> None:
        if not self.rows:
            print("  ".join(_padded(name, name, row[name]) for name in row))
        self.rows.append(row)
        print("  ".join(_padded(name, value, value) for name, value in row.items()), flush=True)
        self._write(row)

    def fail(self, row: dict[str, Any], error: Exception) -> None:
        """A row that could not be measured; the run goes on."""
        text = (str(error) or type(error).__name__).strip().partition("\n")[0]
        self.failed.append(row | {"error": f"{type(error).__name__}: {text}"})
        print(*row.values(), self.failed[-1]["error"], flush=True)
        self._write(self.failed[-1])

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"table": self.title, **row}) + "\n")
            self.file.flush()

    def finished(self) -> Rows:
        """All rows. Raises: RuntimeError if some could not be measured."""
        if self.failed:
            raise RuntimeError(
                f"{len(self.failed)} of {len(self.rows) + len(self.failed)} rows failed, the first "
                f"with {self.failed[0]['error']}; the others are above"
            )
        return self.rows


def _padded(name: str, value: object, kind: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    width = max(len(name), 17 if isinstance(kind, str) else 7)
    return text.ljust(width) if isinstance(kind, str) else text.rjust(width)


def compiled(
    task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *, jobs: int, seconds: float
) -> None:
    """Calls a task with each tuple of arguments in processes of its own, which fill Triton's cache.

    What fails is told and left to the process that needs it.
    """
    begin, context = time.monotonic(), multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(arguments))) as pool:
        waiting = [pool.apply_async(task, given) for given in arguments]
        for given, result in zip(arguments, waiting, strict=True):
            try:
                result.get(timeout=max(0.0, begin + seconds - time.monotonic()))
            except multiprocessing.TimeoutError:
                print("compiling ahead: out of time", flush=True)
                break
            except Exception as error:
                text = str(error).strip().partition("\n")[0]
                print(f"compiling ahead {given}: {type(error).__name__}: {text}", flush=True)
    print(f"compiling ahead took {time.monotonic() - begin:.0f} s", flush=True)
