"""Captures functions without arguments as CUDA graphs or tapes; compiles methods."""

import types
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from cerl.kernels.runtime.streams import BEFORE
from cerl.tape.taped import Taped

WARM_UP = 3
Result = TypeVar("Result")


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that does the same as `step`, as a CUDA graph from its fourth call on.

    The first WARM_UP calls run `step` eagerly, and they are real: they change state. The next call
    captures the graph, which executes nothing, and then replays it once. So the k-th call is always
    the k-th step. On a CPU a tape takes the place of the graph (`cerl/tape/`).

    Args: step, must write its results into existing tensors (copy in place, never rebind a name to
          a new tensor) and must not wait for the device.
    """
    if device.type == "cpu":
        return Taped(step)
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
    """A bound method compiled into few kernels by torch.compile, for the shapes of its first call.

    The compiler limits the recompilations of a code object, and each instance of a class needs a
    compilation of its own. So the method of every instance gets its own copy of the code object.
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
