"""What tf32 means, for tests of kernels: products of operands rounded to 10 bits of mantissa.

Which products torch gives to tf32 depends on the sizes (one row, or 23 columns, it may multiply in
float32), and how cuBLAS rounds is its own business. So an error in tf32 is compared with the worse
of two, that of torch's own products and that of these.
"""

import torch
from torch import Tensor


def rounded(values: Tensor) -> Tensor:
    """float32 with the 10 bits of mantissa of tf32, to nearest, ties to even."""
    bits = values.contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


class RoundedProduct(torch.autograd.Function):
    """Matrix product of operands rounded to tf32, sums in float32; its gradients are alike."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return rounded(a) @ rounded(b)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), grad = ctx.saved_tensors, rounded(grads[0])
        return grad @ rounded(b).mT, rounded(a).mT @ grad


def worse(results: dict, others: dict, exact: dict) -> dict:
    """Of every tensor the one whose largest error is larger."""

    def error(result: dict, name: str) -> Tensor:
        return (result[name].double() - exact[name]).abs().max()

    return {
        name: max(results, others, key=lambda result, name=name: error(result, name))[name]
        for name in results
    }
