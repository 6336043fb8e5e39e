"""Making steps cheap: a nullary function as a CUDA-graph replay, a method as few fused kernels."""

import functools
import types
from collections.abc import Callable
from typing import TypeVar, cast

import torch

WARM_UP = 3
Result = TypeVar("Result")
First = TypeVar("First")
Other = TypeVar("Other")


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures `step` after a few calls that run as they are.

    The warm-up calls are real: they change state. The capture executes nothing; the call in which
    it happens replays the graph once. So the k-th call is the k-th step, captured or not.

    Args: step must only touch tensors whose storage stays (copy in place, never rebind) and never
          sync.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    calls = 0
    graph: torch.cuda.CUDAGraph | None = None

    def run() -> None:
        nonlocal calls, graph
        if graph is None and calls >= WARM_UP:
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()
        calls += 1
        if graph is not None:
            graph.replay()
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)

    return run


def parallel(
    device: torch.device, first: Callable[[], First], *others: Callable[[], Other]
) -> tuple[First, list[Other]]:
    """Runs independent computations side by side on a GPU: `first` here, each other on a stream.

    Small kernels leave most of a GPU idle; in a CUDA graph the streams become parallel branches. On
    the CPU, and under torch.compile, they run one after the other.

    Args:    first may record gradients, the others must not; none may write what another reads.
    Returns: the result of `first`, and of the others in order.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return first(), [other() for other in others]
    current = torch.cuda.current_stream(device)
    streams = [_side_stream(device, number) for number in range(len(others))]
    results = []
    # What a side stream allocates is freed to it and used again only behind the next wait for the
    # current stream, so nothing is overwritten while it is still read.
    for stream, other in zip(streams, others, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(other())
    own = first()
    for stream in streams:
        current.wait_stream(stream)
    return own, results


@functools.cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fused(method: Callable[..., Result]) -> Callable[..., Result]:
    """A bound method compiled into few kernels (torch.compile), for the shapes of its first call.

    The compiler counts recompilations by code object, and every instance is a new specialisation:
    so each gets a code object of its own.
    """
    bound = cast(types.MethodType, method)
    function = cast(types.FunctionType, bound.__func__)
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(types.MethodType(own, bound.__self__), fullgraph=True, dynamic=False)
