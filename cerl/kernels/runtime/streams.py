"""Runs independent computations in parallel on a GPU, most of which small kernels leave idle."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

First = TypeVar("First")
Other = TypeVar("Other")

# Priorities of CUDA streams. While blocks of several kernels wait to start, those from a stream of
# priority BEFORE go first. A kernel in a CUDA graph keeps the priority of the stream on which it
# was captured.
BEFORE, BEHIND = -1, 0


def parallel(
    device: torch.device,
    first: Callable[[], First],
    *others: Callable[[], Other],
    patient: bool = False,
) -> tuple[First, list[Other]]:
    """Runs `first` on the current stream and each of `others` on a side stream.

    In a CUDA graph they become parallel branches. On the CPU, and under torch.compile, they run one
    after the other. Nested calls use the same side streams, so that an inner branch may have to
    wait for an outer one.

    Args:    first may record gradients, the others must not; none may write what another reads;
             patient: the others run at the lower priority BEHIND, and so only on multiprocessors
             that `first` leaves idle. This works if the current stream has the priority BEFORE, as
             in `cerl.graph.captured`.
    Returns: the result of `first`, and the results of the others in order.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return first(), [other() for other in others]
    current = torch.cuda.current_stream(device)
    priority = BEHIND if patient else BEFORE
    streams = [_side_stream(device, number, priority) for number in range(len(others))]
    results = []
    # Memory that a side stream allocates goes back to that side stream when it is freed. The side
    # stream reuses it only after it has waited for the current stream in the next call, and by then
    # the current stream has read the results.
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
