"""Kernels that begin to start while the kernel before them ends (programmatic dependent launch).

A launch takes the options of `overlap`, and its kernel calls `follow`; on devices that cannot, and
in the interpreter, both do nothing.
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
    """Waits until the kernel before this one is done; then the next one may start, and wait.

    What is loaded earlier must be older than that kernel, which must have waited like this.
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
