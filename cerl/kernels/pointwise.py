"""Elementwise functions that fit cerl where PyTorch's own ones do not: sigmoids, one-hot.

On the CPU PyTorch computes sigmoid, SiLU, softplus and atanh of a tensor's last few elements by
another formula than those of all other elements, so a seed's numbers would depend on how many seeds
share its tensor. exp, log1p, tanh and log-sigmoid have one formula for all elements, and the
sigmoids here are made of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import on_gpu


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x) if on_gpu(x) else F.logsigmoid(x).exp()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return F.silu(x) if on_gpu(x) else x * sigmoid(x)


def atanh(x: Tensor) -> Tensor:
    """Inverse of tanh, of numbers in (-1, 1)."""
    return 0.5 * (torch.log1p(x) - torch.log1p(-x))


def one_hot(value: Tensor, count: int) -> Tensor:
    """`torch.nn.functional.one_hot`, [...] int64 -> [..., count] int64, without a check of values.

    On the CPU PyTorch's function reads the values, which a tape cannot repeat (`cerl/tape/`).
    """
    if on_gpu(value):
        return F.one_hot(value, count)
    return (value.unsqueeze(-1) == torch.arange(count, device=value.device)).long()
