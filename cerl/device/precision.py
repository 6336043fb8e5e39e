"""A context that sets the precision of matrix products."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Sets the precision of matrix products inside the context.

    Args: name, tf32 or fp32 (a CPU always computes in fp32), or bf16, which uses autocast.
    """
    if device.type == "meta":  # tensors without memory, see `cerl.footprint.estimate`
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        # No cache, since a cached bf16 copy of a weight would become stale when an optimiser
        # updates the weight in place.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
