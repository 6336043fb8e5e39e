"""Block sizes, by which kernels split their work, and the launch options that go with them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

PROCESSORS = 132  # multiprocessors of the H200 that the tables of blocks were measured on


class Blocks(NamedTuple):
    """Block sizes of a kernel's program, its warps and its pipeline stages.

    Unless the launch says otherwise, a program computes a tile of rows x columns of the result, and
    each step of its loop adds `depth` terms of the sum.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    units: int = 1024  # of a perceptron: the most units of a split hidden layer in a program
    splits: int = 1  # shares of the sum, each of which a program of its own adds up

    @property
    def options(self) -> dict[str, Any]:
        """Options of the launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; Triton's own function takes longer."""
    return 1 << (size - 1).bit_length()


def block_size(size: int) -> int:
    """As `power_of_two`, but at least 16, the smallest side of a matrix instruction."""
    return max(power_of_two(size), 16)


def precision(x: Tensor) -> str:
    """How products of float32 round, as Triton's `input_precision`: "tf32" or "ieee".

    On CUDA as torch's own products do; in the interpreter, which has no tf32, always "ieee".
    """
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
