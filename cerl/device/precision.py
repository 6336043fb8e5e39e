"""Precision of matrix products while a block runs."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Matrix products in tf32 or fp32 (a GPU's; the CPU knows only fp32), or bf16 by autocast."""
    if device.type == "meta":  # tensors without memory, see `cerl.footprint.estimate`
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        # Without the cache: a cached bf16 copy would outlive an in-place update of its weight.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
