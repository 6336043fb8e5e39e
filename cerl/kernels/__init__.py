"""Triton kernels, each beside its definition in plain torch.

`x.py` holds the public function, its checks and its definition. `x_triton.py`, which is imported
when a kernel is first asked for, holds the kernels, their launches and the operators of torch made
of them (`runtime/operator.py`). The argument `impl` of a public function chooses: "reference" is
the definition, "triton" the kernel (CUDA tensors, or Triton's interpreter), "auto" the kernel on
CUDA and the definition on the CPU. A kernel that cannot run raises an error; the definition never
takes its place silently.
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

# The kind of device that tensors on the `meta` device stand for while memory is estimated
# (`cerl/footprint/estimate.py`). For "cuda", operators give the shapes that the kernels would make.
_stands_for = "cpu"

# Looked up on import, because torch.compile cannot trace the look-up.
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
    """Inside, tensors on the `meta` device take the path that tensors on a `kind` device take."""
    global _stands_for
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast gives to products on a device; None if autocast is off there.

    None also for `meta` tensors, which have no autocast.
    """
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on a device; for `meta` tensors, which have none, it is empty."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
