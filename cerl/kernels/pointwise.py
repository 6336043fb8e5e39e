"""Sigmoids whose bits do not depend on where in a tensor an element lies.

On the CPU PyTorch computes sigmoid, SiLU, softplus and atanh of a tensor's last few elements by
another formula than those of all other elements, so a seed's numbers would depend on how many seeds
share its tensor. exp, log1p, tanh and log-sigmoid have one formula for all elements, and the
functions here are made of them.
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
