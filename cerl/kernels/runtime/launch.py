"""Launches that Triton prepares once: its look at every argument takes longer than a launch.

What it compiles depends on the types of the tensors, on whether they begin on 16 bytes, and on the
integers. A launch in which all of that is as in one before goes to the same binary at once.
"""

from typing import Any

from torch import Tensor
from triton.runtime import KernelInterface

MANY = 1024  # launches of a kernel that are told apart at a time


class Launcher:
    """A kernel with what is fixed when it is compiled, and with the options of its launch.

    The kernel takes tensors, integers, one float, and the rest from `options`. Globals that it
    reads may not change.
    """

    def __init__(self, kernel: KernelInterface, **options: Any) -> None:
        names = [name for name in vars(kernel)["arg_names"] if name in options]
        self.kernel, self.options = kernel, options
        self.constants = tuple(options[name] for name in names)
        self.binaries: dict[Any, Any] = {}

    def __call__(
        self, programs: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], factor: float
    ) -> None:
        """Launches `programs` programs on the current device, which is that of the tensors."""
        factor = float(factor)  # Triton would compile for an integer
        pointers = [x.data_ptr() for x in tensors]
        kind = sizes, tensors[0].device, tuple([x.dtype for x in tensors])
        aligned = not any([pointer & 15 for pointer in pointers])
        binary = self.binaries.get(kind) if aligned else None
        if binary is not None:
            binary[programs, 1, 1](*pointers, *sizes, factor, *self.constants)
            return
        binary = self.kernel[programs, 1, 1](*tensors, *sizes, factor, **self.options)
        if binary is not None and aligned:  # the interpreter compiles nothing
            if len(self.binaries) >= MANY:
                self.binaries.clear()
            self.binaries[kind] = binary
