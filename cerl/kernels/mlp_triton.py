"""Population of two-hidden-layer perceptrons in Triton: operators and launches.

One program computes all layers for a block of rows of one network; another one goes back through
them. The gradient of a weight is a product over all rows of a network, computed in one of three
places:

    a layer with few inputs      in the backward program, which adds the term of its rows
    a layer with few outputs     in a program for every tile of the weight
    any other                    by cuBLAS, in half the time of such programs

If weights need a gradient, both hidden layers and their gradients are stored, rounded as operands
of products. At 200 networks x 256 rows x 256 units one of these tensors is 52 MB, which takes 24 us
to write and read at 4.3 TB/s. Computing the second layer again would take 6.7 GFLOP, 27 us at half
the peak of tf32, in each kernel that needs it. If only inputs need a gradient, the signs of the
activations are enough: one byte a unit, 6 us.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cerl.kernels import mlp_kernels
from cerl.kernels.mlp_plan import (
    ACTIVATIONS,
    FORWARD,
    GRADIENT,
    NARROW,
    NOTHING,
    SHARED,
    SIGNS,
    WIDE,
    WIDEST,
    row_blocks,
    tiles,
)
from cerl.kernels.runtime.blocks import Blocks, block_size, precision
from cerl.kernels.runtime.operator import operator
from cerl.kernels.runtime.streams import parallel


class Hidden(NamedTuple):
    """Gradients of both hidden layers before their ReLU, rounded as operands of products."""

    below: Tensor  # [G, B, H1]
    above: Tensor  # [G, B, H2]
    sum1: Tensor  # [G, blocks, H1] float32, sums over the rows of a block
    sum2: Tensor  # [G, blocks, H2]
    first: Tensor  # [blocks, G, in, H1], terms of the first weight's gradient, instead of `below`


def _shapes(x, tail, w1, b1, w2, b2, w3, b3, keep):
    nets, rows = w1.shape[0], x.shape[1]
    kept = [
        x.new_empty(
            (nets, rows, weight.shape[2]) if keep else 0,
            dtype=torch.uint8 if keep == SIGNS else x.dtype,
        )
        for weight in (w1, w2)
    ]
    dtype = torch.promote_types(x.dtype, b3.dtype)
    return x.new_empty(nets, rows, w3.shape[2], dtype=dtype), *kept


def _save(ctx, inputs, output) -> None:
    x, tail, w1, b1, w2, b2, w3, b3, ctx.keep = inputs
    _, a1, a2 = output
    ctx.dtypes = b1.dtype, b2.dtype, b3.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, tail, w1, w2, w3, a1, a2)


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    wants_x, wants_tail = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and saved[1].numel() > 0
    if ctx.keep == ACTIVATIONS:
        grad_x, grad_tail, *leaves = mlp_backward(grad, *saved, wants_x, wants_tail)
        for k, dtype in enumerate(ctx.dtypes):
            leaves[2 * k + 1] = leaves[2 * k + 1].to(dtype)
    else:
        grad_x, grad_tail = input_gradient(grad, *saved, wants_x, wants_tail)
        leaves = [None] * 6
    grad_tail = grad_tail if wants_tail else None
    return grad_x if wants_x else None, grad_tail, *leaves, None


@operator("mlp", shapes=_shapes, save=_save, gradient=_gradient, results=1)
def mlp(
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    keep: int,
    *,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, B, O] and, for the backward pass, both hidden layers as `keep` says.

    The layers are [G, B, H], empty for NOTHING. Other arguments as in `mlp.definition`.
    """
    nets, fan_in, h1 = w1.shape
    h2, out = w3.shape[1:]
    rows, width, more = x.shape[1], x.shape[2], tail.shape[2]
    _check_sizes(rows, h1, h2, fan_in, out)
    dtype = torch.uint8 if keep == SIGNS else x.dtype
    a1, a2 = (
        x.new_empty((nets, rows, size) if keep != NOTHING else 0, dtype=dtype) for size in (h1, h2)
    )
    w1, w3, b3 = w1.contiguous(), _rowwise(w3), _rowwise(b3)
    x, tail = x.contiguous(), tail.contiguous()
    sums = multiply(x, w1[:, :width]) if by_library(x, nets) else None
    if sums is not None:
        w1, width, fan_in = w1[:, width:], 0, more
    block = blocks or row_blocks(FORWARD, nets, rows, inputs=fan_in, hidden=max(h1, h2))
    units = min(block.units, block_size(h2)) if fan_in <= block.depth else block_size(h2)
    parts, final = triton.cdiv(h2, units), torch.promote_types(x.dtype, b3.dtype)
    y = x.new_empty(parts, nets, rows, out, dtype=final if parts == 1 else torch.float32)
    mlp_kernels.forward[(nets * parts * triton.cdiv(rows, block.rows),)](
        x,
        tail if more else x,
        w1,
        b1.contiguous(),
        w2.contiguous(),
        b2.contiguous(),
        w3,
        b3,
        x if sums is None else sums,
        y,
        a1,
        a2,
        w1.stride(0),
        w3.stride(0),
        w3.stride(1),
        b3.stride(0),
        nets // x.shape[0],
        nets // tail.shape[0],
        rows,
        D=width,
        A=more,
        H1=h1,
        H2=h2,
        O=out,
        KEEP=keep,
        SUM=sums is not None,
        PRECISION=precision(x),
        BR=block.rows,
        BK=block.depth,
        BH1=block_size(h1),
        BH2=units,
        BT=block.columns,
        BO=block_size(out),
        **block.options,
    )
    return _joined(y).to(final), a1, a2


def hidden_gradient(
    grad: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    a1: Tensor,
    a2: Tensor,
    x: Tensor,
    tail: Tensor,
    *,
    hidden: bool,
    columns: tuple[int, int],
    blocks: Blocks | None = None,
) -> tuple[Hidden, Tensor]:
    """Gradients of the hidden layers before their ReLU, and of some columns of the input.

    Args:    grad [G, B, O]; a1, a2 [G, B, H] as `mlp` kept them; x [X, B, D] and tail [T, B, A],
             the input; columns, the first and the last + 1 that need a gradient.
    Returns: gradients of the hidden layers (empty unless `hidden`); of the columns, float32
             [G, B, columns].
    """
    nets, fan_in, h1 = w1.shape
    weight = hidden and fan_in <= NARROW
    rows, h2, out = a1.shape[1], *w3.shape[1:]
    first, last = columns
    _check_sizes(rows, h1, h2, fan_in, out)
    w3 = _rowwise(w3)
    table = GRADIENT if block_size(out) <= 32 else GRADIENT[1:]  # wider outputs spill with 64 rows
    block = blocks or row_blocks(table, nets, rows, inputs=last - first, hidden=max(h1, h2))
    units, tall = min(block.units, block_size(h1)), triton.cdiv(rows, block.rows)
    parts = triton.cdiv(h1, units)
    inner = w1.new_empty(parts, nets, rows, last - first, dtype=torch.float32)
    sums = [(nets, tall, size) if hidden else 0 for size in (h1, h2)]
    sums.append((tall, nets, fan_in, h1) if weight else 0)
    gradients = Hidden(
        w1.new_empty((nets, rows, h1) if hidden and not weight else 0),
        w1.new_empty((nets, rows, h2) if hidden else 0),
        *(w1.new_empty(shape, dtype=torch.float32) for shape in sums),
    )
    x = x.contiguous()
    mlp_kernels.hidden_gradient[(nets * parts * tall,)](
        grad.contiguous(),
        w1.contiguous(),
        w2.contiguous(),
        w3,
        a1,
        a2,
        x,
        tail.contiguous() if tail.shape[2] else x,
        *gradients,
        inner,
        w3.stride(0),
        w3.stride(1),
        nets // x.shape[0],
        nets // tail.shape[0],
        rows,
        D=x.shape[2],
        A=tail.shape[2],
        H1=h1,
        H2=h2,
        O=out,
        HIDDEN=hidden,
        WEIGHT=weight,
        FIRST=first,
        LAST=last,
        PRECISION=precision(w1),
        BR=block.rows,
        BK=block.depth,
        BX=block_size(fan_in) if weight else 16,
        BH1=units,
        BT=block.columns,
        BO=block_size(out),
        **block.options,
    )
    return gradients, _joined(inner)


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    tail: Tensor | None = None,
    *,
    out: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of one layer's weight [G, in, N] and, in float32, bias [G, N].

    Args: grad [G, B, N] of the layer's output before its ReLU; x [X, B, D] and tail [T, B, A], the
          layer's input; out [G, in, N], rows of a larger tensor to write the weight's gradient to.
    """
    nets, rows, width = grad.shape[0], x.shape[1], x.shape[2]
    more = 0 if tail is None else tail.shape[2]
    columns = grad.shape[2]
    weight = x.new_empty(nets, width + more, columns) if out is None else out
    bias = x.new_empty(nets, columns, dtype=torch.float32)
    x, grad = x.contiguous(), grad.contiguous()
    block = blocks or tiles(nets, rows, inputs=width + more, outputs=columns)
    count = triton.cdiv(width + more, block.depth) * triton.cdiv(columns, block.columns)
    mlp_kernels.weight_gradient[(nets * count,)](
        grad,
        x,
        x if tail is None or not more else tail.contiguous(),
        weight,
        bias,
        weight.stride(0),
        nets // x.shape[0],
        1 if tail is None else nets // tail.shape[0],
        rows,
        D=width,
        A=more,
        N=columns,
        PRECISION=precision(x),
        BR=block.rows,
        BK=block.depth,
        BN=block.columns,
        **block.options,
    )
    return weight, bias


def first_gradient(hidden: Hidden, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first layer's weight and bias, in the form of `weight_gradient`."""
    if hidden.first.numel():
        return _joined(hidden.first).to(x.dtype), hidden.sum1.sum(1)
    nets, width = hidden.below.shape[0], x.shape[2]
    if not by_library(x, nets):
        return weight_gradient(hidden.below, x, tail)
    weight = x.new_empty(nets, width + tail.shape[2], hidden.below.shape[2])
    multiply(x.mT, hidden.below, weight[:, :width])
    if not tail.shape[2]:
        return weight, hidden.sum1.sum(1)
    return weight, weight_gradient(hidden.below, tail, out=weight[:, width:])[1]


def by_library(x: Tensor, nets: int) -> bool:
    """Whether cuBLAS multiplies an input x [X, B, D]: one that is wide and takes few launches.

    A batched product of cuBLAS has one stride between matrices, so each input that several networks
    share takes a launch of its own. The tail, which fewer networks share, is left to the kernels.
    """
    return min(x.shape[1:]) >= WIDE and (x.shape[0] <= SHARED or x.shape[0] == nets)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Products of every network's matrices, by cuBLAS.

    Args:    a [X, M, K], X a divisor of G: networks that share a matrix are consecutive; b
             [G, K, N]; out, where to write the products, if given.
    Returns: [G, M, N].
    """
    if out is None:
        out = b.new_empty(b.shape[0], a.shape[1], b.shape[2])
    share = b.shape[0] // a.shape[0]
    if share == 1:
        return torch.bmm(a, b, out=out)
    for part, mine, result in zip(a, b.split(share), out.split(share), strict=True):
        torch.bmm(part.expand(share, -1, -1), mine, out=result)
    return out


def _joined(parts: Tensor) -> Tensor:
    """The sum over the first axis; an axis of one entry takes no launch."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _rowwise(tensor: Tensor) -> Tensor:
    """The tensor itself if neighbours along its last axis are neighbours in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_sizes(rows: int, h1: int, h2: int, *widths: int) -> None:
    """Refuses layers too wide for the chip, and networks too large for 32-bit offsets."""
    if max(h1, h2) > WIDEST:
        raise ValueError(
            f"mlp: hidden layers of {h1} and {h2} units do not fit on chip, at most {WIDEST} do; "
            'use separate layers, or impl="reference"'
        )
    most = max(h1, h2, *widths)
    if max(rows, h1, h2) * most >= 2**31:
        raise ValueError(
            f"mlp: {rows} rows of {most} numbers, or weights of {most} x {max(h1, h2)}, are too "
            "many for one network, at most 2^31 - 1 numbers fit; split the batch or use fewer "
            "input features"
        )


def _input_shapes(grad, x, tail, w1, w2, w3, a1, a2, wants_x, wants_tail):
    wanted = ((x, wants_x), (tail, wants_tail and tail.shape[-1] > 0))
    return tuple(part.new_empty(part.shape if wants else 0) for part, wants in wanted)


@operator("mlp_input_gradient", shapes=_input_shapes, gradient_of="mlp")
def input_gradient(
    grad: Tensor,
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    a1: Tensor,
    a2: Tensor,
    wants_x: bool,
    wants_tail: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (empty unless `wants_x`) and of tail (empty unless `wants_tail`)."""
    _, inner = hidden_gradient(
        grad,
        w1,
        w2,
        w3,
        a1,
        a2,
        x,
        tail,
        hidden=False,
        columns=_columns(x, tail, wants_x, wants_tail),
    )
    return _parts(inner, x, tail, wants_x, wants_tail)


def _backward_shapes(grad, x, tail, w1, w2, w3, a1, a2, wants_x, wants_tail):
    wanted = ((x, wants_x), (tail, wants_tail and tail.shape[-1] > 0))
    grads = [part.new_empty(part.shape if wants else 0) for part, wants in wanted]
    for weight in (w1, w2, w3):
        bias = weight.new_empty(weight.shape[0], weight.shape[2], dtype=torch.float32)
        grads += [weight.new_empty(weight.shape), bias]
    return tuple(grads)


@operator("mlp_backward", shapes=_backward_shapes, gradient_of="mlp")
def mlp_backward(
    grad: Tensor,
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    a1: Tensor,
    a2: Tensor,
    wants_x: bool,
    wants_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and tail (as in `input_gradient`), w1, b1, w2, b2, w3 and b3."""

    def down() -> tuple[Hidden, Tensor]:
        columns = _columns(x, tail, wants_x, wants_tail)
        return hidden_gradient(grad, w1, w2, w3, a1, a2, x, tail, hidden=True, columns=columns)

    def last() -> tuple[Tensor, Tensor]:
        return weight_gradient(grad, a2)

    # The last programs of a large kernel leave most of the GPU idle; products on streams of lower
    # priority fill it.
    (hidden, inner), (third,) = parallel(x.device, down, last, patient=True)

    def middle() -> Tensor:
        return multiply(a1.mT, hidden.above)

    def rest() -> tuple[Tensor, Tensor, Tensor]:
        return *first_gradient(hidden, x, tail), hidden.sum2.sum(1)

    second, ((first, bias1, bias2),) = parallel(x.device, middle, rest, patient=True)
    leaves = (first, bias1, second, bias2, *third)
    return *_parts(inner, x, tail, wants_x, wants_tail), *leaves


def _columns(x: Tensor, tail: Tensor, wants_x: bool, wants_tail: bool) -> tuple[int, int]:
    """The first and the last + 1 of the input columns that need a gradient."""
    split, fan_in = x.shape[-1], x.shape[-1] + tail.shape[-1]
    if not (wants_x or wants_tail):
        return 0, 0
    return 0 if wants_x else split, fan_in if wants_tail else split


def _parts(
    inner: Tensor, x: Tensor, tail: Tensor, wants_x: bool, wants_tail: bool
) -> tuple[Tensor, Tensor]:
    """Splits the gradient of the input into x and tail, and sums over networks that share them.

    Args: inner [G, B, columns], float32, as `hidden_gradient` returns it.
    """
    sizes = [part.shape[-1] if wanted else 0 for part, wanted in ((x, wants_x), (tail, wants_tail))]
    grads = []
    for part, cut in zip((x, tail), inner.split(sizes, -1), strict=True):
        if cut.shape[-1] == 0:
            grads.append(part.new_empty(0))
            continue
        cut = cut.unflatten(0, (part.shape[0], -1))
        whole = cut.shape[1] == 1
        cut = (cut[:, 0] if whole else cut.sum(1)).to(part.dtype)
        # The results of an operator may not share memory, so pieces of one tensor are copied.
        grads.append(cut.clone(memory_format=torch.contiguous_format) if whole else cut)
    return grads[0], grads[1]
