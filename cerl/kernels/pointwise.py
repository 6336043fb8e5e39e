"""Sigmoids whose bits do not depend on where in a tensor an element lies.

PyTorch computes the last few elements of a tensor on the CPU by another formula than all others in
sigmoid, SiLU, softplus and atanh. A seed's numbers would then depend on how many seeds stand beside
it. exp, log1p, tanh and log-sigmoid are the same everywhere, and so is what is made of them here.
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
