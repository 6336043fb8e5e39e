"""2-D convolution of an ensemble, channels last, with bias and ReLU: definition and dispatch.

On CUDA it is an implicit matrix product that never writes patches to memory (`conv_triton.py`),
behind custom operators, so that torch.compile traces over it. A member axis of one is shared: an
input by all members, or a weight by all inputs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, autocast_dtype, runs_triton
from cerl.kernels.fold import patches


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
    """Valid convolution, plus bias, then ReLU if asked.

    Products of float32 take tf32 where `torch.backends.cuda.matmul.allow_tf32` says so; under
    autocast x and weight are cast to its dtype and the output has it too, sums stay float32.

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
    # Groups [G] that share nothing; within one, every weight meets every row.
    if members == 1:
        x = x.flatten(1, 2)  # [S, M * B, ...]
    elif inputs == 1:
        x = x.squeeze(1)
    else:
        x = x.flatten(0, 1)  # [S * N, B, ...]
        weight = weight.flatten(0, 1).unsqueeze(1)
        bias = bias.flatten(0, 1).unsqueeze(1)
    call = _conv2d if runs_triton(impl, device) else _definition
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
            f"conv2d: inputs of {x.shape[1]} members met weights of {weight.shape[1]}; the two "
            "must be equal or one of them 1"
        )
    if min(x.shape[3], x.shape[4]) < kernel:
        raise ValueError(
            f"conv2d: an input of {x.shape[3]} x {x.shape[4]} cells is smaller than the kernel "
            f"({kernel} x {kernel}); pad it"
        )


def _definition(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int, relu: bool
) -> Tensor:
    """The definition, group by group.

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


@torch.library.custom_op("cerl::conv2d", mutates_args=())
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int, relu: bool
) -> Tensor:
    from cerl.kernels import conv_triton

    return conv_triton.forward(x, weight, bias, kernel=kernel, stride=stride, relu=relu)


@torch.library.custom_op("cerl::conv2d_backward", mutates_args=())
def _conv2d_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    relu: bool,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless wanted), weight and, in float32, bias."""
    from cerl.kernels import conv_triton

    grad, turned, part = conv_triton.output_gradient(grad, y, relu=relu, plain=wants_x)
    grad_weight, grad_bias = conv_triton.weight_gradient(
        turned, part, x, kernel=kernel, stride=stride
    )
    if not wants_x:
        return x.new_empty(0), grad_weight, grad_bias
    size = x.shape[2], x.shape[3]
    grad_x = conv_triton.input_gradient(grad, weight, size=size, kernel=kernel, stride=stride)
    return grad_x, grad_weight, grad_bias


@_conv2d.register_fake
def _(x, weight, bias, kernel, stride, relu):
    height, width = ((size - kernel) // stride + 1 for size in x.shape[2:4])
    groups, members, _, filters = weight.shape
    return x.new_empty(groups, members, x.shape[1], height, width, filters)


@_conv2d_backward.register_fake
def _(grad, y, x, weight, kernel, stride, relu, wants_x):
    bias = grad.new_empty(*weight.shape[:2], weight.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape if wants_x else 0), weight.new_empty(weight.shape), bias


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.kernel, ctx.stride, ctx.relu = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, output)


def _backward(ctx, grad):
    x, weight, y = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0]
    options = ctx.kernel, ctx.stride, ctx.relu
    grad_x, grad_weight, grad_bias = _conv2d_backward(grad, y, x, weight, *options, wants_x)
    return grad_x if wants_x else None, grad_weight, grad_bias.to(ctx.bias_dtype), None, None, None


_conv2d.register_autograd(_backward, setup_context=_save)
