"""The stopwatch that all benchmarks share; also compiling kernels ahead, and listing kernels.

On a GPU, times are measured between device events; on a CPU, with the wall clock. Python's garbage
collector is off during a measurement, as in `timeit`, so that no call pays for cleaning up objects
of earlier ones.
"""

import contextlib
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

CALLS = 20  # most calls in one CUDA graph
SPAN = 20.0  # ms that one graph should take at most: long calls get fewer, but at least 1, a graph
LIMIT = 200.0  # ms that all repeats of a number should take at most; at least 3 repeats are made

Call = Callable[[], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """The device of a benchmark, and how many calls it makes for each timing."""

    device: str = "auto"
    """cpu, cuda, cuda:N or auto"""
    calls: int = 50
    """calls per timing; the table shows the median of five timings"""

    def __post_init__(self) -> None:
        if self.calls < 1:
            raise ValueError(f"--calls: expected a number from 1 on, got {self.calls}")


class Spent(NamedTuple):
    """Milliseconds of one call of a function."""

    graph: float  # replayed in a CUDA graph
    eager: float  # called from Python


Timer = Callable[[Call], Spent]


def microseconds(step: Call, device: torch.device, *, calls: int, repeats: int = 5) -> float:
    """Median time of one call in microseconds, after six calls that are not timed.

    Args: step, the call, captured as a CUDA graph by the caller where training captures it; calls,
          how many calls one timing holds; repeats, timings of which the median is taken.
    """
    for _ in range(6):
        step()
    return _median(lambda: _many(step, calls), device, repeats=repeats) * 1e3 / calls


def stopwatch(repeats: int) -> Timer:
    """A timer for the current CUDA device, which measures a call in a graph and from Python.

    Args:    repeats, timings of which the median is taken; fewer (but 3) where calls are long.
    Raises:  ValueError for less than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"--repeats: expected a number from 1 on, got {repeats}")
    device = torch.device("cuda")

    def spent(call: Call) -> Spent:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels, which cannot be done during a capture
            call()
            call()
        torch.cuda.current_stream().wait_stream(side)
        guess = _median(lambda: _many(call, 3), device, repeats=1) / 3
        calls = max(1, min(CALLS, int(SPAN / guess)))
        times = max(min(repeats, 3), min(repeats, int(LIMIT / (calls * guess))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _many(call, calls)
        replayed = _median(graph.replay, device, repeats=times) / calls
        return Spent(replayed, _median(lambda: _many(call, calls), device, repeats=times) / calls)

    return spent


def untimed(call: Call) -> Spent:
    """A timer that calls once and measures nothing, for compiling kernels ahead."""
    call()
    return Spent(0.0, 0.0)


def once(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """The result of a call, and the wall-clock seconds until the device has finished it."""
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def _many(call: Call, calls: int) -> None:
    for _ in range(calls):
        call()


def _median(run: Call, device: torch.device, *, repeats: int) -> float:
    """Median time of a run in milliseconds, after one run that is not timed.

    On a GPU all repeats are enqueued before the host waits, so no repeat is charged for a wait.
    """
    run()
    with _uncollected():
        if device.type != "cuda":
            return statistics.median(once(run, device)[1] * 1e3 for _ in range(repeats))
        torch.cuda.synchronize()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in marks:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Turns Python's garbage collector off within the `with` block."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def device_name(device: torch.device) -> str:
    """The name of the GPU or the CPU, which rows of benchmarks carry."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return "CPU"


def needed_device() -> torch.device:
    """The current CUDA device. Raises: RuntimeError where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "this benchmark times GPU kernels and found no CUDA device; run it on a machine that "
            "has one"
        )
    return torch.device("cuda")


def profiled(step: Call, device: torch.device, *, calls: int = 20) -> None:
    """Prints the GPU kernels that a call launches, those that take the most time first."""
    if device.type != "cuda":
        print(f"--profile: lists GPU kernels, and this run is on {device}", flush=True)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        _many(step, calls)
        torch.cuda.synchronize()
    list_kernels(recorded.key_averages(), calls=calls)


def list_kernels(events: Any, *, calls: int) -> None:
    """Prints time and launches of each kernel for one call.

    Args: events, `key_averages()` of a profile; calls, how many calls the profile recorded.
    """
    kernels = [event for event in events if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    print("   us a call   launches  kernel")
    for event in kernels:
        spent, count = event.self_device_time_total / calls, event.count / calls
        print(f"{spent:12.1f}  {count:9.1f}  {event.key[:110]}")
    total = sum(event.self_device_time_total for event in kernels) / calls
    print(f"{total:12.1f}  {sum(e.count for e in kernels) / calls:9.1f}  all", flush=True)


def compiled(
    task: Callable[..., object], given: Sequence[tuple[Any, ...]], *, jobs: int, seconds: float
) -> None:
    """Compiles kernels ahead: worker processes call a task, which fills Triton's cache on the disk.

    A call that fails is printed and skipped; the benchmark then compiles that kernel when it needs
    it, or fails on it.

    Args: given, the arguments of each call; jobs, worker processes; seconds, after which the rest
          is skipped.
    """
    begin, context = time.monotonic(), multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(given))) as pool:
        waiting = [pool.apply_async(_finished, (task, arguments)) for arguments in given]
        for arguments, result in zip(given, waiting, strict=True):
            try:
                result.get(timeout=max(0.0, begin + seconds - time.monotonic()))
            except multiprocessing.TimeoutError:
                print("compiling ahead: out of time", flush=True)
                break
            except Exception as error:
                text = str(error).strip().partition("\n")[0]
                print(f"compiling ahead {arguments}: {type(error).__name__}: {text}", flush=True)
    print(f"compiling ahead took {time.monotonic() - begin:.0f} s", flush=True)


def _finished(task: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """Calls a task, waits for the GPU, and drops the result: the caller's process needs none."""
    task(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
