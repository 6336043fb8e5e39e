"""The one stopwatch of benchmarks, and what serves it: compiling ahead, a list of kernels.

On a GPU, times are between device events; on a CPU, of the wall. Python's garbage collector rests
meanwhile, as in `timeit`: a call is not charged for old objects.
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

CALLS = 20  # in a graph, at most
SPAN = 20.0  # ms of all of them, where calls are long: fewer, but one
LIMIT = 200.0  # ms of the repeats of one number, where that leaves 3

Call = Callable[[], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Where a benchmark runs, and how often it calls what it times."""

    device: str = "auto"
    """cpu, cuda, cuda:N or auto"""
    calls: int = 50
    """calls per timing; the median of five timings is told"""

    def __post_init__(self) -> None:
        if self.calls < 1:
            raise ValueError(f"--calls: expected a number from 1 on, got {self.calls}")


class Spent(NamedTuple):
    """Milliseconds of one call: replayed in a CUDA graph, and as called from Python."""

    graph: float
    eager: float


Timer = Callable[[Call], Spent]


def microseconds(step: Call, device: torch.device, *, calls: int, repeats: int = 5) -> float:
    """Median time of one call as it is made in training, after warm-up (and capture)."""
    for _ in range(6):
        step()
    return _median(lambda: _many(step, calls), device, repeats=repeats) * 1e3 / calls


def stopwatch(repeats: int) -> Timer:
    """Times a call on the current CUDA device. Raises: ValueError for less than one repeat."""
    if repeats < 1:
        raise ValueError(f"--repeats: expected a number from 1 on, got {repeats}")
    device = torch.device("cuda")

    def spent(call: Call) -> Spent:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, as capture cannot
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
    """A timer that only calls, as compilation wants it."""
    call()
    return Spent(0.0, 0.0)


def once(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """A result, and the seconds of the wall until the device has it too."""
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def _many(call: Call, calls: int) -> None:
    for _ in range(calls):
        call()


def _median(run: Call, device: torch.device, *, repeats: int) -> float:
    """Milliseconds of a run, after one that does not count. Only the GPU waits between runs."""
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
    """Python's garbage collector rests."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def device_name(device: torch.device) -> str:
    """What rows say about the machine: the name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # of Linux only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return "CPU"


def needed_device() -> torch.device:
    """The CUDA device. Raises: RuntimeError where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "this benchmark times GPU kernels and found no CUDA device; run it where there is one"
        )
    return torch.device("cuda")


def profiled(step: Call, device: torch.device, *, calls: int = 20) -> None:
    """Prints the kernels of a call on a GPU, those that take the most time first."""
    if device.type != "cuda":
        print("--profile: the kernels of a GPU are listed, and this is none", flush=True)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        _many(step, calls)
        torch.cuda.synchronize()
    list_kernels(recorded.key_averages(), calls=calls)


def list_kernels(events: Any, *, calls: int) -> None:
    """Args: events, averages of a profile by kernel, recorded over so many calls."""
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
    """Calls a task with each tuple of arguments in processes of its own, which fill Triton's cache.

    What fails is told and left to the process that needs it.
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
    """Calls a task, and waits for what it started on the GPU. Its result stays in the process."""
    task(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
