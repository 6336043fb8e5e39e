"""Kernels whose launch overlaps the end of the kernel before (programmatic dependent launch).

Such a kernel is launched with the options that `overlap` gives, and calls `follow` before it reads
what the previous kernel wrote. On devices without the feature, and in the interpreter, options and
call have no effect.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OVERLAP = True


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Waits until the previous kernel is done, then lets the next kernel start.

    Code before this call runs while the previous kernel may still run. It may only read memory that
    was written before the previous kernel started, and only if the previous kernel calls `follow`
    too: all kernels before that one are then done.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def _able(device: torch.device) -> bool:
    """Whether the device can start a kernel early: compute capability 9.0 or newer."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def starts_early(x: Tensor) -> bool:
    """Whether a kernel that calls `follow` starts early on the device of x."""
    return OVERLAP and x.is_cuda and _able(x.device)


def options(early: bool) -> dict[str, bool]:
    """Launch options of a kernel that calls `follow`, which starts early or not."""
    return {"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": False}


def overlap(x: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that calls `follow`, on the device of x."""
    return options(starts_early(x))
