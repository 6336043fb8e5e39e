"""Population of two-hidden-layer perceptrons in Triton: forward, gradients of inputs and weights.

A program of the forward pass takes a block of rows of one network through all layers: one hidden
layer is whole on chip, tiles of the other go into the next product at once. The backward pass goes
down the same way in one program; gradients of the weights are products over all rows of a network:
of a layer with few inputs by the pass down, with few outputs by a program for every tile, else by
cuBLAS, in half the time. Every sum runs in a fixed order.

Where weights want a gradient both hidden layers and their gradients are saved, as rounded operands.
At 200 networks x 256 rows x 256 units one is 52 MB, 24 us to write and read at 4.3 TB/s; computing
the second again takes 6.7 GFLOP, 27 us at half the peak of tf32, in each kernel that needs it. For
inputs alone the signs of the layers do: a byte a unit, 6 us.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.conv_triton import PROCESSORS, round_operand
from cerl.kernels.mlp import NOTHING, SIGNS, WIDEST

WIDE = 64  # inputs, and rows, from which on cuBLAS multiplies them
NARROW = 32  # inputs up to which the pass down makes the gradient of their weight
SHARED = 16  # groups of networks with inputs in common that get a product each


@triton.jit
def _inputs(p_x, p_tail, row, k, m_row, D: tl.constexpr, A: tl.constexpr):
    """Columns k of [x, tail], 0 beyond them."""
    m_x = m_row[:, None] & (k < D)[None, :]
    m_tail = m_row[:, None] & ((k >= D) & (k < D + A))[None, :]
    o_tail = row[:, None] * A + (k - D)[None, :]
    if A == 0:
        return tl.load(p_x + row[:, None] * D + k[None, :], m_x, other=0.0)
    elif D == 0:
        return tl.load(p_tail + o_tail, m_tail, other=0.0)
    else:
        b_x = tl.load(p_x + row[:, None] * D + k[None, :], m_x, other=0.0)
        return b_x + tl.load(p_tail + o_tail, m_tail, other=0.0)


@triton.jit
def _matrix(p, stride, k, n, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Rows k and columns n of a weight [K, N] for a product, 0 beyond it."""
    o = k[:, None] * stride + n[None, :]
    return round_operand(tl.load(p + o, (k < K)[:, None] & (n < N)[None, :], other=0.0), PRECISION)


@triton.jit
def _activation(b, p_bias, n, N: tl.constexpr):
    """ReLU of a product plus the bias of columns n; NaN stays."""
    b += tl.load(p_bias + n, n < N, other=0.0).to(tl.float32)[None, :]
    return tl.where(b < 0.0, 0.0, b)


@triton.jit
def _keep(p, b, row, n, m_row, N: tl.constexpr, KEEP: tl.constexpr):
    """Stores columns n of an activation (2), or whether its gradient passes (1): NaN lets it."""
    o, m = row[:, None] * N + n[None, :], m_row[:, None] & (n < N)[None, :]
    if KEEP == 2:
        tl.store(p + o, b, m)
    elif KEEP == 1:
        tl.store(p + o, tl.where(b <= 0.0, 0, 1).to(tl.uint8), m)


@triton.jit
def _forward(
    p_x,
    p_tail,
    p_w1,
    p_b1,
    p_w2,
    p_b2,
    p_w3,
    p_b3,
    p_sum,
    p_y,
    p_a1,
    p_a2,
    s_net1,
    s_net3,
    s_row3,
    s_bias3,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    KEEP: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BH1: tl.constexpr,
    BH2: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """BR rows of one network's output, and what KEEP says of its hidden layers.

    Of narrow inputs a program takes BH2 units of the second hidden layer, and what they add to the
    output: p_y is [parts, G, B, O]; the first part adds the bias. If SUM, p_sum [G, B, H1] is what
    further inputs add to the first layer.
    """
    PARTS: tl.constexpr = (H2 + BH2 - 1) // BH2
    blocks = tl.cdiv(batch, BR)
    i_row = tl.program_id(0) % blocks
    i_part = (tl.program_id(0) // blocks) % PARTS
    i_net = (tl.program_id(0) // (blocks * PARTS)).to(tl.int64)
    nets = tl.num_programs(0) // (blocks * PARTS)
    p_x += (i_net // share_x) * batch * D
    p_tail += (i_net // share_tail) * batch * A
    p_w1 += i_net * s_net1
    p_sum += i_net * batch * H1
    p_w2 += i_net * (H1 * H2)
    p_w3 += i_net * s_net3
    p_a1 += i_net * batch * H1
    p_a2 += i_net * batch * H2
    p_y += (i_part * nets + i_net) * batch * O

    row = i_row * BR + tl.arange(0, BR)
    m_row = row < batch
    o = tl.arange(0, BO)
    out = tl.zeros([BR, BO], tl.float32)
    if D + A <= BK:
        # Narrow inputs: a tile of the first layer at a time goes into the sums of the second.
        k = tl.arange(0, BK)
        n = i_part * BH2 + tl.arange(0, BH2)
        m_first = m_row & (i_part == 0)
        if D + A > 0:
            b_x = round_operand(_inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
        acc = tl.zeros([BR, BH2], tl.float32)
        for first in range(0, H1, BT):
            h = first + tl.arange(0, BT)
            b_h = tl.zeros([BR, BT], tl.float32)
            if SUM:
                m_sum = m_row[:, None] & (h < H1)[None, :]
                b_h += tl.load(p_sum + row[:, None] * H1 + h[None, :], m_sum, other=0.0)
            if D + A > 0:
                b_w1 = _matrix(p_w1, H1, k, h, D + A, H1, PRECISION)
                b_h = tl.dot(b_x, b_w1, b_h, input_precision=PRECISION)
            b_a1 = _activation(b_h, p_b1 + i_net * H1, h, H1).to(p_w2.dtype.element_ty)
            b_a1 = round_operand(b_a1, PRECISION)
            _keep(p_a1, b_a1, row, h, m_first, H1, KEEP)
            b_w2 = _matrix(p_w2, H2, h, n, H1, H2, PRECISION)
            acc = tl.dot(b_a1, b_w2, acc, input_precision=PRECISION)
        b_a2 = _activation(acc, p_b2 + i_net * H2, n, H2).to(p_w3.dtype.element_ty)
        _keep(p_a2, b_a2, row, n, m_row, H2, KEEP)
        b_w3 = _matrix(p_w3, s_row3, n, o, H2, O, PRECISION)
        out = tl.dot(round_operand(b_a2, PRECISION), b_w3, out, input_precision=PRECISION)
    else:
        # The whole first layer, so that the inputs are read once; then a tile of the second.
        h = tl.arange(0, BH1)
        acc = tl.zeros([BR, BH1], tl.float32)
        if SUM:
            m_sum = m_row[:, None] & (h < H1)[None, :]
            acc += tl.load(p_sum + row[:, None] * H1 + h[None, :], m_sum, other=0.0)
        for first in range(0, D + A, BK):
            k = first + tl.arange(0, BK)
            b_x = round_operand(_inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
            b_w1 = _matrix(p_w1, H1, k, h, D + A, H1, PRECISION)
            acc = tl.dot(b_x, b_w1, acc, input_precision=PRECISION)
        b_a1 = _activation(acc, p_b1 + i_net * H1, h, H1).to(p_w2.dtype.element_ty)
        b_a1 = round_operand(b_a1, PRECISION)
        _keep(p_a1, b_a1, row, h, m_row, H1, KEEP)
        for first in range(0, H2, BT):
            n = first + tl.arange(0, BT)
            b_w2 = _matrix(p_w2, H2, h, n, H1, H2, PRECISION)
            b_h = tl.dot(b_a1, b_w2, input_precision=PRECISION)
            b_a2 = _activation(b_h, p_b2 + i_net * H2, n, H2).to(p_w3.dtype.element_ty)
            _keep(p_a2, b_a2, row, n, m_row, H2, KEEP)
            b_w3 = _matrix(p_w3, s_row3, n, o, H2, O, PRECISION)
            out = tl.dot(round_operand(b_a2, PRECISION), b_w3, out, input_precision=PRECISION)
    m_bias = (o < O) & (i_part == 0)
    out += tl.load(p_b3 + i_net * s_bias3 + o, m_bias, other=0.0).to(tl.float32)[None, :]
    m_y = m_row[:, None] & (o < O)[None, :]
    tl.store(p_y + row[:, None] * O + o[None, :], out.to(p_y.dtype.element_ty), m_y)


@triton.jit
def _hidden_gradient(
    p_grad,
    p_w1,
    p_w2,
    p_w3,
    p_a1,
    p_a2,
    p_x,
    p_tail,
    p_below,
    p_above,
    p_sum1,
    p_sum2,
    p_first,
    p_inner,
    s_net3,
    s_row3,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    HIDDEN: tl.constexpr,
    WEIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BH1: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """From BR rows of one network's output down to the first hidden layer, before its ReLU.

    A program takes BH1 units of that layer. If HIDDEN, p_below [G, B, H1] and p_above [G, B, H2]
    take the gradients of both hidden layers and p_sum1, p_sum2 [G, blocks, H] their sums over the
    rows; if WEIGHT, p_first [blocks, G, D + A, H1] instead of p_below what the rows add to the
    gradient of the first layer's weight. p_inner [parts, G, B, LAST - FIRST] takes what is added
    to those columns of the input.
    """
    PARTS: tl.constexpr = (H1 + BH1 - 1) // BH1
    blocks = tl.cdiv(batch, BR)
    i_row = tl.program_id(0) % blocks
    i_part = (tl.program_id(0) // blocks) % PARTS
    i_net = (tl.program_id(0) // (blocks * PARTS)).to(tl.int64)
    nets = tl.num_programs(0) // (blocks * PARTS)
    p_grad += i_net * batch * O
    p_w1 += i_net * ((D + A) * H1)
    p_w2 += i_net * (H1 * H2)
    p_w3 += i_net * s_net3
    p_a1 += i_net * batch * H1
    p_a2 += i_net * batch * H2
    p_above += i_net * batch * H2
    p_sum1 += (i_net * blocks + i_row) * H1
    p_sum2 += (i_net * blocks + i_row) * H2

    row = i_row * BR + tl.arange(0, BR)
    m_row = row < batch
    h = i_part * BH1 + tl.arange(0, BH1)
    o = tl.arange(0, BO)
    m_grad = m_row[:, None] & (o < O)[None, :]
    b_g = tl.load(p_grad + row[:, None] * O + o[None, :], m_grad, other=0.0)
    b_g = round_operand(b_g.to(p_w3.dtype.element_ty), PRECISION)
    acc = tl.zeros([BR, BH1], tl.float32)
    for first in range(0, H2, BT):
        n = first + tl.arange(0, BT)
        b_w3 = _matrix(p_w3, s_row3, n, o, H2, O, PRECISION)
        b_h = tl.dot(b_g, tl.trans(b_w3), input_precision=PRECISION)
        m_a2 = m_row[:, None] & (n < H2)[None, :]
        b_a2 = tl.load(p_a2 + row[:, None] * H2 + n[None, :], m_a2, other=0)
        b_h = tl.where(b_a2 <= 0, 0.0, b_h).to(p_w2.dtype.element_ty)
        if HIDDEN:
            tl.store(p_sum2 + n, tl.sum(b_h.to(tl.float32), 0), (n < H2) & (i_part == 0))
        b_h = round_operand(b_h, PRECISION)
        if HIDDEN:
            tl.store(p_above + row[:, None] * H2 + n[None, :], b_h, m_a2 & (i_part == 0))
        b_w = _matrix(p_w2, H2, h, n, H1, H2, PRECISION)
        acc = tl.dot(b_h, tl.trans(b_w), acc, input_precision=PRECISION)
    o_a1 = row[:, None] * H1 + h[None, :]
    m_a1 = m_row[:, None] & (h < H1)[None, :]
    b_a1 = tl.load(p_a1 + o_a1, m_a1, other=0)
    b_h1 = tl.where(b_a1 <= 0, 0.0, acc).to(p_w1.dtype.element_ty)
    if HIDDEN:
        tl.store(p_sum1 + h, tl.sum(b_h1.to(tl.float32), 0), h < H1)
    b_h1 = round_operand(b_h1, PRECISION)
    if WEIGHT:
        p_x += (i_net // share_x) * batch * D
        p_tail += (i_net // share_tail) * batch * A
        p_first += (i_row * nets + i_net) * ((D + A) * H1)
        # Names that the loop below does not carry: types and sizes differ there.
        every = tl.arange(0, BX)
        b_x = round_operand(_inputs(p_x, p_tail, row, every, m_row, D, A), PRECISION)
        b_first = tl.dot(tl.trans(b_x), b_h1, input_precision=PRECISION)
        m_first = (every < D + A)[:, None] & (h < H1)[None, :]
        tl.store(p_first + every[:, None] * H1 + h[None, :], b_first, m_first)
    elif HIDDEN:
        tl.store(p_below + i_net * batch * H1 + o_a1, b_h1, m_a1)
    if LAST > FIRST:
        p_inner += (i_part * nets + i_net) * batch * (LAST - FIRST)
        for first in range(FIRST, LAST, BK):
            k = first + tl.arange(0, BK)
            b_w = _matrix(p_w1, H1, k, h, LAST, H1, PRECISION)
            b_k = tl.dot(b_h1, tl.trans(b_w), input_precision=PRECISION)
            o_inner = row[:, None] * (LAST - FIRST) + (k - FIRST)[None, :]
            tl.store(p_inner + o_inner, b_k, m_row[:, None] & (k < LAST)[None, :])


@triton.jit
def _weight_gradient(
    p_grad,
    p_x,
    p_tail,
    p_weight,
    p_bias,
    s_net,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile [BK, BN] of one layer's weight gradient, and of the bias's where BK begins at 0."""
    TILES_K: tl.constexpr = (D + A + BK - 1) // BK
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    i = tl.program_id(0)
    i_n, i = i % TILES_N, i // TILES_N
    i_k = i % TILES_K
    i_net = (i // TILES_K).to(tl.int64)
    p_x += (i_net // share_x) * batch * D
    p_tail += (i_net // share_tail) * batch * A
    p_grad += i_net * batch * N

    k = i_k * BK + tl.arange(0, BK)
    n = i_n * BN + tl.arange(0, BN)
    acc = tl.zeros([BK, BN], tl.float32)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, batch, BR):
        row = first + tl.arange(0, BR)
        m_row = row < batch
        b_x = round_operand(_inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
        m_n = m_row[:, None] & (n < N)[None, :]
        b_g = tl.load(p_grad + row[:, None] * N + n[None, :], m_n, other=0.0)
        total += tl.sum(b_g.to(tl.float32), 0)
        b_g = round_operand(b_g.to(b_x.dtype), PRECISION)
        acc = tl.dot(tl.trans(b_x), b_g, acc, input_precision=PRECISION)
    o_weight = i_net * s_net + k[:, None] * N + n[None, :]
    m_weight = (k < D + A)[:, None] & (n < N)[None, :]
    tl.store(p_weight + o_weight, acc.to(p_weight.dtype.element_ty), m_weight)
    if i_k == 0:
        tl.store(p_bias + i_net * N + n, total, n < N)


class Hidden(NamedTuple):
    """Gradients of both hidden layers before their ReLU, rounded as operands of products."""

    below: Tensor  # [G, B, H1]
    above: Tensor  # [G, B, H2]
    sum1: Tensor  # [G, blocks, H1] float32, sums over the rows of a block
    sum2: Tensor  # [G, blocks, H2]
    first: Tensor  # [blocks, G, in, H1], terms of the first weight's gradient; then no `below`


class Blocks(NamedTuple):
    """Launch of one kernel.

    In `forward` and `hidden_gradient`: rows of a program, columns of a tile of one hidden layer,
    input columns of a step, units of the other hidden layer that a program takes. In
    `weight_gradient`: rows of a step, columns of a tile of the layer's outputs and of its inputs.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    units: int = WIDEST


def forward(
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    keep: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and what `keep` says of both hidden layers: see `mlp._mlp`, `mlp._definition`."""
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
    block = blocks or _row_blocks(FORWARD, nets, rows, inputs=fan_in, hidden=max(h1, h2))
    units = min(block.units, power(h2)) if fan_in <= block.depth else power(h2)
    parts, final = triton.cdiv(h2, units), torch.promote_types(x.dtype, b3.dtype)
    y = x.new_empty(parts, nets, rows, out, dtype=final if parts == 1 else torch.float32)
    _forward[(nets * parts * triton.cdiv(rows, block.rows),)](
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
        PRECISION=_precision(x),
        BR=block.rows,
        BK=block.depth,
        BH1=power(h1),
        BH2=units,
        BT=block.columns,
        BO=power(out),
        num_warps=block.warps,
        num_stages=block.stages,
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

    Args:    grad [G, B, O]; a1, a2 [G, B, H] as `forward` kept them; x [X, B, D] and tail
             [T, B, A], the input; columns, first and last + 1.
    Returns: of the hidden layers (empty unless `hidden`); float32 [G, B, columns].
    """
    nets, fan_in, h1 = w1.shape
    weight = hidden and fan_in <= NARROW
    rows, h2, out = a1.shape[1], *w3.shape[1:]
    first, last = columns
    _check_sizes(rows, h1, h2, fan_in, out)
    w3 = _rowwise(w3)
    table = GRADIENT if power(out) <= 32 else GRADIENT[1:]  # 64 rows of more outputs spill
    block = blocks or _row_blocks(table, nets, rows, inputs=last - first, hidden=max(h1, h2))
    units, row_blocks = min(block.units, power(h1)), triton.cdiv(rows, block.rows)
    parts = triton.cdiv(h1, units)
    inner = w1.new_empty(parts, nets, rows, last - first, dtype=torch.float32)
    sums = [(nets, row_blocks, size) if hidden else 0 for size in (h1, h2)]
    sums.append((row_blocks, nets, fan_in, h1) if weight else 0)
    gradients = Hidden(
        w1.new_empty((nets, rows, h1) if hidden and not weight else 0),
        w1.new_empty((nets, rows, h2) if hidden else 0),
        *(w1.new_empty(shape, dtype=torch.float32) for shape in sums),
    )
    x = x.contiguous()
    _hidden_gradient[(nets * parts * row_blocks,)](
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
        PRECISION=_precision(w1),
        BR=block.rows,
        BK=block.depth,
        BX=power(fan_in) if weight else 16,
        BH1=units,
        BT=block.columns,
        BO=power(out),
        num_warps=block.warps,
        num_stages=block.stages,
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

    Args: grad [G, B, N] of what the layer put out before its ReLU; x [X, B, D] and tail [T, B, A],
          the layer's input; out, rows of a larger weight that take the result.
    """
    nets, rows, width = grad.shape[0], x.shape[1], x.shape[2]
    more = 0 if tail is None else tail.shape[2]
    columns = grad.shape[2]
    weight = x.new_empty(nets, width + more, columns) if out is None else out
    bias = x.new_empty(nets, columns, dtype=torch.float32)
    x, grad = x.contiguous(), grad.contiguous()
    block = blocks or _tiles(nets, rows, inputs=width + more, outputs=columns)
    tiles = triton.cdiv(width + more, block.depth) * triton.cdiv(columns, block.columns)
    _weight_gradient[(nets * tiles,)](
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
        PRECISION=_precision(x),
        BR=block.rows,
        BK=block.depth,
        BN=block.columns,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return weight, bias


def first_gradient(hidden: Hidden, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first layer's weight and bias, as `weight_gradient`."""
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
    """Whether cuBLAS multiplies an input [X, B, D]: if wide, and if few launches do it.

    It may be shared by networks, and a batch of the library's has one stride. A tail, which fewer
    networks share, is left to the kernels.
    """
    return min(x.shape[1:]) >= WIDE and (x.shape[0] <= SHARED or x.shape[0] == nets)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Products [G, M, N] of every network's matrices by cuBLAS: a [X, M, K], b [G, K, N]."""
    if out is None:
        out = b.new_empty(b.shape[0], a.shape[1], b.shape[2])
    share = b.shape[0] // a.shape[0]
    if share == 1:
        return torch.bmm(a, b, out=out)
    for part, mine, result in zip(a, b.split(share), out.split(share), strict=True):
        torch.bmm(part.expand(share, -1, -1), mine, out=result)
    return out


def _joined(parts: Tensor) -> Tensor:
    """The sum over the first axis, free of a launch where that has one entry."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _rowwise(tensor: Tensor) -> Tensor:
    """The tensor itself where only its last axis must lie side by side, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _precision(x: Tensor) -> str:
    """How float32 products round: as torch's own on CUDA; in the interpreter only as float32."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _check_sizes(rows: int, h1: int, h2: int, *widths: int) -> None:
    """A program holds a row of either hidden layer; offsets inside a network are 32-bit."""
    if max(h1, h2) > WIDEST:
        raise ValueError(
            f"mlp: hidden layers of {h1} and {h2} units do not fit on chip, at most {WIDEST} do; "
            'use separate layers, or impl="reference"'
        )
    most = max(h1, h2, *widths)
    if max(rows, h1, h2) * most >= 2**31:
        raise ValueError(
            f"mlp: {rows} rows of {most} numbers, or weights of {most} x {max(h1, h2)}, are too "
            "many for one network, at most 2^31 - 1 numbers fit; split the batch or see by fewer "
            "features"
        )


def power(size: int) -> int:
    """The smallest power of two that holds `size`, at least the 16 of a matrix instruction."""
    return max(triton.next_power_of_2(size), 16)


# The fastest of `cerl bench sac-tiles` on an H200 in tf32, 100 and 200 networks x 256 rows, hidden
# layers of 256; those of 512 and 1024 go by what the compiler reports (registers, shared memory).

FORWARD = (Blocks(32, 64, 32, 4, 2), Blocks(16, 32, 32, 4, 2))
GRADIENT = (Blocks(64, 16, 32, 4, 3), Blocks(32, 32, 32, 4, 2), Blocks(16, 32, 32, 4, 2))
BROAD = (Blocks(32, 16, 32, 8, 2), Blocks(16, 16, 32, 8, 2))  # hidden layers above 256
TILES = (Blocks(32, 64, 64, 2, 3), Blocks(32, 32, 32, 2, 3))


def _row_blocks(
    table: tuple[Blocks, ...], nets: int, rows: int, *, inputs: int, hidden: int
) -> Blocks:
    """Launch of a program that goes through all layers: the first that leaves no processor idle.

    Args: inputs, columns read or written of the first layer's; hidden, the wider layer's units.
    """
    hidden, depth = power(hidden), power(max(inputs, 1))
    if hidden > 256:
        table = BROAD if hidden <= 512 else BROAD[1:]
    fits = [block for block in table if block.rows <= power(rows)] or table[-1:]
    for block in fits:
        parts = triton.cdiv(hidden, block.units)
        if nets * parts * triton.cdiv(rows, block.rows) >= PROCESSORS:
            break
    columns = min(block.columns, hidden)
    if inputs > block.depth:  # its steps take shared memory too, of which many GPUs have 99 KiB
        columns = min(columns, 32)
    return block._replace(columns=columns, depth=min(block.depth, depth))


def _tiles(nets: int, rows: int, *, inputs: int, outputs: int) -> Blocks:
    """Launch of `weight_gradient`: the first tile that leaves not half of the processors idle."""
    tile = TILES[-1]
    for tile in TILES:
        depth, columns = min(tile.depth, power(inputs)), min(tile.columns, power(outputs))
        tall, wide = triton.cdiv(inputs, depth), triton.cdiv(outputs, columns)
        tile = tile._replace(rows=min(tile.rows, power(rows)), columns=columns, depth=depth)
        empty = tall * depth > max(1.2 * inputs, 64)
        if nets * tall * wide >= PROCESSORS // 2 and not empty:
            break
    return tile
