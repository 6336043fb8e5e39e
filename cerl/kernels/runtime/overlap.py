"""Kernels whose launch overlaps the end of the kernel before (programmatic dependent launch).

Such a kernel is launched with the options that `overlap` gives, and calls `follow` before it reads
what earlier kernels wrote. On devices without the feature, and in the interpreter, both do nothing.
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
    """Waits until the kernel before this one is done, then lets the next one start.

    Loads before this call may only read memory that was written before the previous kernel started;
    and the previous kernel must have called `follow` itself, so that all before it are done.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def _able(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def starts_early(x: Tensor) -> bool:
    """Whether a kernel that begins with `follow` does so on the device of x."""
    return OVERLAP and x.is_cuda and _able(x.device)


def options(early: bool) -> dict[str, bool]:
    """Options of the launch of a kernel that begins with `follow`."""
    return {"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": False}


def overlap(x: Tensor) -> dict[str, bool]:
    return options(starts_early(x))
