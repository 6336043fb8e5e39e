"""Triton kernels, each beside the plain-torch definition of the same name and signature.

`impl` picks one: "reference" is the definition, "triton" the kernel (CUDA tensors, or Triton's
interpreter), "auto" the kernel on CUDA and the definition on the CPU. No kernel ever gives way to
its definition on its own.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]

# Kind of device that tensors without memory stand for (`cerl/device/estimate.py`): its kernels are
# asked for the shapes of their results.
_stands_for = "cpu"

# Asked here, since torch.compile cannot trace the question.
INSTALLED = importlib.util.find_spec("triton") is not None


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, or stands for one that is."""
    return x.is_cuda or (x.is_meta and _stands_for == "cuda")


def runs_triton(impl: str, device: torch.device) -> bool:
    """Whether `impl` means the Triton kernel for tensors on `device`.

    Raises: ValueError for an unknown `impl` or a device that Triton cannot run on; RuntimeError
            where Triton is needed and not installed.
    """
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl: expected auto, reference or triton, got {impl!r}")
    kind = _stands_for if device.type == "meta" else device.type
    if impl == "reference" or (impl == "auto" and kind != "cuda"):
        return False
    if device.type == "meta":
        return INSTALLED
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'impl="triton" needs CUDA tensors, got {device.type}; use impl="auto", or set '
            "TRITON_INTERPRET=1 before Triton is imported to run kernels in its interpreter"
        )
    if not INSTALLED:
        raise RuntimeError(
            'impl="triton" needs the package triton, which is not installed; install it with '
            '`pip install triton`, or pass impl="reference"'
        )
    return True


@contextlib.contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Inside, tensors on the `meta` device go the way that those of a device of `kind` do."""
    global _stands_for
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast asks of products on a device; None where it is off or unknown."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products keep the types of their inputs inside; tensors without memory know no autocast."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
