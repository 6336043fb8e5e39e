"""A nullary function as a CUDA-graph replay; the function itself on the CPU."""

from collections.abc import Callable

import torch

WARM_UP = 3


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures `step` after a few calls that run as they are.

    The warm-up calls are real: they change state. The capture executes nothing; the call in which it
    happens replays the graph once. So the k-th call is the k-th step, captured or not.

    Args: step must only touch tensors whose storage stays (copy in place, never rebind) and never sync.
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
