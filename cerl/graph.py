"""Captures functions without arguments as CUDA graphs; compiles methods into few kernels."""

import types
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from cerl.kernels.runtime.streams import BEFORE

WARM_UP = 3
Result = TypeVar("Result")


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures `step` after a few calls that run as they are.

    The warm-up calls are real: they change state. The capture executes nothing; the call in which
    it happens replays the graph once. So the k-th call is the k-th step, captured or not.

    Args: step must only touch tensors whose storage stays (copy in place, never rebind) and never
          sync.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device, priority=BEFORE)
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
