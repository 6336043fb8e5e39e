"""How kernels cut their work: block sizes, and the launch options that a table gives for them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

PROCESSORS = 132  # multiprocessors of the H200 that the tables of blocks were measured on


class Blocks(NamedTuple):
    """Block sizes of a kernel's program, its warps and its pipeline stages.

    Rows and columns are those of the result that a program makes and depth is the length of a step
    of its sum, unless the launch says otherwise.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    units: int = 1024  # of a perceptron's other hidden layer, most in a program
    splits: int = 1  # shares of the sum, a program each

    @property
    def options(self) -> dict[str, Any]:
        """Options of the launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`; Triton's own function takes longer."""
    return 1 << (size - 1).bit_length()


def block_size(size: int) -> int:
    """The smallest power of two that holds `size`, at least the 16 of a matrix instruction."""
    return max(power_of_two(size), 16)


def precision(x: Tensor) -> str:
    """How float32 products round: as torch's own on CUDA; in the interpreter only as float32."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
