"""A cache of compiled kernels by the signature of their arguments.

Triton inspects every argument on each launch, which takes longer than the launch itself. The binary
that it chooses depends on the types of the tensors, on whether their addresses are multiples of 16
bytes, and on the values of the integers. A launch that agrees in all of these with an earlier one
reuses the binary of the earlier one without a look at its arguments.
"""

from typing import Any

from torch import Tensor
from triton.runtime import KernelInterface

MANY = 1024  # binaries that are kept of a kernel; the next one empties the cache first


class Launcher:
    """A kernel together with its compile-time constants and launch options.

    The parameters of the kernel are tensors, then integers or tuples of integers (the strides of a
    tensor), then one float, then the constants that `options` names. Python globals that the kernel
    reads must keep their values.
    """

    def __init__(self, kernel: KernelInterface, **options: Any) -> None:
        names = [name for name in vars(kernel)["arg_names"] if name in options]
        self.kernel, self.options = kernel, options
        self.constants = tuple(options[name] for name in names)
        self.binaries: dict[Any, Any] = {}

    def __call__(
        self,
        programs: int,
        tensors: tuple[Tensor, ...],
        sizes: tuple[int | tuple[int, ...], ...],
        factor: float,
    ) -> None:
        """Launches `programs` programs on the current device, where the tensors must be."""
        factor = float(factor)  # for an integer Triton would compile another binary
        pointers = [x.data_ptr() for x in tensors]
        kind = sizes, tensors[0].device, tuple([x.dtype for x in tensors])
        aligned = not any([pointer & 15 for pointer in pointers])
        binary = self.binaries.get(kind) if aligned else None
        if binary is not None:
            binary[programs, 1, 1](*pointers, *sizes, factor, *self.constants)
            return
        binary = self.kernel[programs, 1, 1](*tensors, *sizes, factor, **self.options)
        if binary is not None and aligned:  # None in the interpreter, which compiles nothing
            if len(self.binaries) >= MANY:
                self.binaries.clear()
            self.binaries[kind] = binary
