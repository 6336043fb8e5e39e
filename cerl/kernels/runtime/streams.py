"""Independent computations side by side on a GPU, which small kernels leave mostly idle."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

First = TypeVar("First")
Other = TypeVar("Other")

# Priorities of CUDA streams. Where blocks of several kernels could start, those of a stream with
# the priority BEFORE do. Kernels of a graph keep the priority of the stream that captured them.
BEFORE, BEHIND = -1, 0


def parallel(
    device: torch.device,
    first: Callable[[], First],
    *others: Callable[[], Other],
    patient: bool = False,
) -> tuple[First, list[Other]]:
    """Runs `first` here and each other on a stream; in a CUDA graph they become parallel branches.

    On the CPU, and under torch.compile, they run one after the other. Nested calls share streams:
    an inner branch may wait for an outer one.

    Args:    first may record gradients, the others must not; none may write what another reads;
             patient: the others run at the lower priority BEHIND, and so only on multiprocessors
             that `first` leaves idle. That takes a current stream of the priority BEFORE, as
             `cerl.graph.captured` has.
    Returns: the result of `first`, and of the others in order.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return first(), [other() for other in others]
    current = torch.cuda.current_stream(device)
    priority = BEHIND if patient else BEFORE
    streams = [_side_stream(device, number, priority) for number in range(len(others))]
    results = []
    # Memory that a side stream allocates goes back to that stream when it is freed. The stream
    # reuses it only after it has waited for the current stream again, which by then has read it.
    for stream, other in zip(streams, others, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(other())
    own = first()
    for stream in streams:
        current.wait_stream(stream)
    return own, results


@functools.cache
def _side_stream(device: torch.device, number: int, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)
