"""2-D convolution of an ensemble, channels last, with bias and ReLU: definition and dispatch.

On CUDA the convolution is a matrix product that never writes the patches to memory
(`conv_triton.py`); the definition writes them (im2col). A member axis of size 1 means shared: one
input for the weights of all members, or one weight for the inputs of all members.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, autocast_dtype, runs_triton


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    kernel: int,
    stride: int,
    relu: bool,
    impl: Impl = "auto",
) -> Tensor:
    """Convolution without padding, plus bias, then a ReLU if `relu`.

    Products of float32 are in tf32 where `torch.backends.cuda.matmul.allow_tf32` says so. Under
    autocast x, weight and output have autocast's dtype; sums stay float32.

    Args:    x [S, M, B, height, width, channels]; weight [S, N, kernel * kernel * channels,
             filters] ordered (ky, kx, c); bias [S, N, filters]; M and N equal or one of them 1;
             impl as in `cerl.kernels`.
    Returns: [S, max(M, N), B, out height, out width, filters].
    Raises:  ValueError where the shapes do not fit together.
    """
    _check(x, weight, bias, kernel=kernel)
    seeds, inputs, rows = x.shape[:3]
    members, device = weight.shape[1], x.device
    if (dtype := autocast_dtype(device)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    # The work splits into G groups that share nothing. Within a group, every weight is applied to
    # every row.
    if members == 1:
        x = x.flatten(1, 2)  # [S, M * B, ...]
    elif inputs == 1:
        x = x.squeeze(1)
    else:
        x = x.flatten(0, 1)  # [S * N, B, ...]
        weight = weight.flatten(0, 1).unsqueeze(1)
        bias = bias.flatten(0, 1).unsqueeze(1)
    call = _definition
    if runs_triton(impl, device):
        from cerl.kernels import conv_triton

        call = conv_triton.conv2d
    y = call(x.contiguous(), weight.contiguous(), bias.contiguous(), kernel, stride, relu)
    return y.view(seeds, max(inputs, members), rows, *y.shape[3:])


def _check(x: Tensor, weight: Tensor, bias: Tensor, *, kernel: int) -> None:
    if x.dim() != 6 or weight.dim() != 4 or bias.dim() != 3:
        raise ValueError(
            "conv2d: expected x [S, M, B, height, width, channels], weight [S, N, fan in, filters] "
            f"and bias [S, N, filters], got {list(x.shape)}, {list(weight.shape)} and "
            f"{list(bias.shape)}"
        )
    fan_in, filters = kernel * kernel * x.shape[5], weight.shape[3]
    expected = (x.shape[0], weight.shape[1], fan_in, filters)
    if weight.shape != expected or bias.shape != (*expected[:2], filters):
        raise ValueError(
            f"conv2d: expected weight {list(expected)} (kernel {kernel}, {x.shape[5]} channels) "
            f"and bias {[*expected[:2], filters]}, got {list(weight.shape)} and {list(bias.shape)}"
        )
    if x.shape[1] != weight.shape[1] and 1 not in (x.shape[1], weight.shape[1]):
        raise ValueError(
            f"conv2d: expected inputs and weights of equally many members, or one of them 1, got "
            f"{x.shape[1]} and {weight.shape[1]}"
        )
    if min(x.shape[3], x.shape[4]) < kernel:
        raise ValueError(
            f"conv2d: an input of {x.shape[3]} x {x.shape[4]} cells is smaller than the kernel "
            f"({kernel} x {kernel}); pad it"
        )


def _definition(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int, relu: bool
) -> Tensor:
    """The convolution in plain torch, for groups that share nothing.

    Args:    x [G, B, h, w, c]; weight [G, N, fan in, filters]; bias [G, N, filters].
    Returns: [G, N, B, h', w', filters].
    """
    groups, members, fan_in, filters = weight.shape
    columns = patches(x, kernel=kernel, stride=stride)  # [G, B, h', w', fan in]
    wide = weight.transpose(1, 2).reshape(groups, fan_in, members * filters)
    y = columns.flatten(1, 3) @ wide
    y = y.unflatten(2, (members, filters)).transpose(1, 2) + bias.unsqueeze(2)
    y = y.unflatten(2, columns.shape[1:4]).to(x.dtype)
    return (F.relu(y) if relu else y).contiguous()


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
