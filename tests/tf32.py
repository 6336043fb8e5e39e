"""A definition of tf32 for tests of kernels: operands are rounded to 10 bits of mantissa.

Torch does not use tf32 for all sizes (a product with one row, or 23 columns, may be in float32),
and how cuBLAS rounds is not specified. So the error of a kernel in tf32 is compared with the larger
of two errors: that of torch's own products, and that of the products defined here.
"""

import torch
from torch import Tensor


def rounded(values: Tensor) -> Tensor:
    """float32 values rounded to the 10 bits of mantissa of tf32, to nearest, ties to even."""
    bits = values.contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


class RoundedProduct(torch.autograd.Function):
    """Matrix product of operands rounded to tf32, summed in float32; gradients are such, too."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return rounded(a) @ rounded(b)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), grad = ctx.saved_tensors, rounded(grads[0])
        return grad @ rounded(b).mT, rounded(a).mT @ grad


def worse(results: dict, others: dict, exact: dict) -> dict:
    """For every name, the tensor of the two results whose largest error is larger.

    Args: results and others, tensors by name; exact, the same in float64.
    """

    def error(result: dict, name: str) -> Tensor:
        return (result[name].double() - exact[name]).abs().max()

    return {
        name: max(results, others, key=lambda result, name=name: error(result, name))[name]
        for name in results
    }
