"""im2col and col2im: cutting an image into patches and its transpose, channels last."""

from collections.abc import Sequence

import torch
from torch import Tensor


def patches(x: Tensor, *, kernel: int, stride: int) -> Tensor:
    """Every kernel x kernel patch as a row (im2col).

    Args:    x [*lead, height, width, channels].
    Returns: [*lead, out height, out width, kernel * kernel * channels], ordered (ky, kx, c).
    """
    return _Patches.apply(x, kernel, stride)


class _Patches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: int, stride: int) -> Tensor:
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        view = x.unfold(-3, kernel, stride).unfold(-3, kernel, stride)  # [..., h', w', c, ky, kx]
        return view.movedim(-3, -1).flatten(-3)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return col2im(grads[0], ctx.shape, kernel=ctx.kernel, stride=ctx.stride), None, None


def col2im(columns: Tensor, shape: Sequence[int], *, kernel: int, stride: int) -> Tensor:
    """Sums every patch entry back into the pixel that it came from.

    Args:    columns [*lead, out height, out width, kernel * kernel * channels], ordered
             (ky, kx, c); shape [*lead, height, width, channels] of the image.
    Returns: the image, `shape`.
    """
    height, width = columns.shape[-3:-1]
    entries = columns.unflatten(-1, (kernel, kernel, shape[-1]))
    image = torch.zeros(*shape, dtype=columns.dtype, device=columns.device)
    for y in range(kernel):
        for x in range(kernel):
            rows = slice(y, y + stride * (height - 1) + 1, stride)
            cells = slice(x, x + stride * (width - 1) + 1, stride)
            image[..., rows, cells, :] += entries[..., y, x, :]
    return image
