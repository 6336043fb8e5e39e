"""Ensemble convolution in Triton: forward, gradient of the input, gradients of weight and bias.

Each is a matrix product that reads patches straight from the image. With channels last, the entries
of a patch that share ky (its row in the kernel) lie side by side in memory. The rows of a group
meet the weights of all its N members, whose filters are columns of one product. Sums run in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.runtime.blocks import (
    PROCESSORS,
    Blocks,
    block_size,
    power_of_two,
    precision,
)
from cerl.kernels.runtime.operator import operator
from cerl.kernels.runtime.rounding import round_operand


@triton.jit
def _forward(
    p_x,
    p_weight,
    p_bias,
    p_y,
    batch,
    members,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of y: BR rows (image, y, x) by BF columns (member, filter)."""
    OH: tl.constexpr = (H - KERNEL) // STRIDE + 1
    OW: tl.constexpr = (W - KERNEL) // STRIDE + 1
    RUN: tl.constexpr = KERNEL * C  # entries of a patch that lie side by side
    STEPS: tl.constexpr = (RUN + BK - 1) // BK
    rows = batch * (OH * OW)
    columns = members * F
    tiles = tl.cdiv(columns, BF)
    i_column = tl.program_id(0) % tiles
    i_row = tl.program_id(0) // tiles
    i_group = (i_row // tl.cdiv(rows, BR)).to(tl.int64)
    i_row = i_row % tl.cdiv(rows, BR)
    p_x += i_group * batch * (H * W * C)
    p_weight += i_group * members * (KERNEL * RUN * F)
    p_bias += i_group * columns
    p_y += i_group * members * rows * F

    row = i_row * BR + tl.arange(0, BR)
    inside = tl.minimum(row, rows - 1)  # rows past the end repeat the last and are not stored
    cell = inside % (OH * OW)
    o_x = ((inside // (OH * OW)) * H + (cell // OW) * STRIDE) * (W * C)
    o_x += (cell % OW) * (STRIDE * C)
    column = i_column * BF + tl.arange(0, BF)
    m_column = column < columns
    o_weight = (column // F) * (KERNEL * RUN * F) + column % F
    acc = tl.zeros([BR, BF], tl.float32)
    for i in range(KERNEL * STEPS):
        ky = i // STEPS
        k = (i % STEPS) * BK + tl.arange(0, BK)
        o_a = o_x[:, None] + (ky * (W * C) + k)[None, :]
        o_w = ((ky * RUN + k) * F)[:, None] + o_weight[None, :]
        if RUN % BK == 0:
            b_a = tl.load(p_x + o_a)
            b_w = tl.load(p_weight + o_w, m_column[None, :], other=0.0)
        else:
            b_a = tl.load(p_x + o_a, (k < RUN)[None, :], other=0.0)
            b_w = tl.load(p_weight + o_w, (k < RUN)[:, None] & m_column[None, :], other=0.0)
        b_a, b_w = round_operand(b_a, PRECISION), round_operand(b_w, PRECISION)
        acc = tl.dot(b_a, b_w, acc, input_precision=PRECISION)
    acc += tl.load(p_bias + column, m_column, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # a NaN stays NaN
    o_y = (row * F)[:, None] + ((column // F) * (rows * F) + column % F)[None, :]
    m_y = (row < rows)[:, None] & m_column[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), m_y)


@triton.jit(do_not_specialize=["steps", "shares"])
def _output_gradient(
    p_grad,
    p_y,
    p_out,
    p_turned,
    p_part,
    rows,
    steps,
    shares,
    F: tl.constexpr,
    RELU: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):
    """Gradient before the ReLU, rounded for the products, and its sums over shares of the rows.

    The rounded gradient goes to p_turned [G * N, F, rows] and, if PLAIN, to p_out [G * N, rows, F].
    The sums of the gradient before rounding go to p_part [shares, G * N, F]; added up, they are the
    gradient of the bias.
    """
    i_net = tl.program_id(0) // shares
    i_share = tl.program_id(0) % shares
    f = tl.arange(0, BF)
    base = i_net.to(tl.int64) * rows * F
    start = i_share * steps * BR
    total = tl.zeros([BR, BF], tl.float32)
    for first in range(start, tl.minimum(start + steps * BR, rows), BR):
        row = first + tl.arange(0, BR)
        o = base + row[:, None] * F + f[None, :]
        m = (row < rows)[:, None] & (f < F)[None, :]
        b_g = tl.load(p_grad + o, m, other=0.0)
        if RELU:
            b_g = tl.where(tl.load(p_y + o, m, other=0.0) <= 0.0, 0.0, b_g)
        total += b_g.to(tl.float32)
        b_g = round_operand(b_g, PRECISION)
        if PLAIN:
            tl.store(p_out + o, b_g, m)
        o_turned = base + f[:, None] * rows + row[None, :]
        tl.store(p_turned + o_turned, tl.trans(b_g), (f < F)[:, None] & (row < rows)[None, :])
    nets = tl.num_programs(0) // shares
    tl.store(p_part + (i_share * nets + i_net) * F + f, tl.sum(total, 0), f < F)


@triton.jit
def _input_gradient(
    p_grad,
    p_weight,
    p_out,
    batch,
    members,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of the gradient of x: BR blocks of STRIDE x STRIDE pixels by BQ (py, px, channel).

    In the forward pass, pixel (STRIDE by + py, STRIDE bx + px) enters the output cell
    (by - jy, bx - jx) through the kernel's entry (STRIDE jy + py, STRIDE jx + px). So all pixels
    of a block get their gradients from the same cells, each through entries of its own. The sum
    runs over members, (jy, jx) and filters.
    """
    OH: tl.constexpr = (H - KERNEL) // STRIDE + 1
    OW: tl.constexpr = (W - KERNEL) // STRIDE + 1
    HB: tl.constexpr = (H + STRIDE - 1) // STRIDE
    WB: tl.constexpr = (W + STRIDE - 1) // STRIDE
    TAPS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    STEPS: tl.constexpr = (F + BK - 1) // BK
    COLUMNS: tl.constexpr = STRIDE * STRIDE * C
    TILES: tl.constexpr = (COLUMNS + BQ - 1) // BQ
    rows = batch * (HB * WB)
    i_column = tl.program_id(0) % TILES
    i_row = tl.program_id(0) // TILES
    i_group = (i_row // tl.cdiv(rows, BR)).to(tl.int64)
    i_row = i_row % tl.cdiv(rows, BR)
    size = batch * (OH * OW * F)  # elements of a member's output
    p_grad += i_group * members * size
    p_weight += i_group * members * (KERNEL * KERNEL * C * F)
    p_out += i_group * batch * (H * W * C)

    row = i_row * BR + tl.arange(0, BR)
    m_row = row < rows
    image = row // (HB * WB)
    by = (row % (HB * WB)) // WB
    bx = row % WB
    o_row = ((image * OH + by) * OW + bx) * F
    column = i_column * BQ + tl.arange(0, BQ)
    py = column // (STRIDE * C)
    px = (column // C) % STRIDE
    c = column % C
    o_column = ((py * KERNEL + px) * C + c) * F
    acc = tl.zeros([BR, BQ], tl.float32)
    for i in range(members * (TAPS * TAPS * STEPS)):
        k = (i % STEPS) * BK + tl.arange(0, BK)
        jx = (i // STEPS) % TAPS
        jy = (i // (STEPS * TAPS)) % TAPS
        member = i // (STEPS * TAPS * TAPS)
        m_cell = m_row & (by >= jy) & (by < OH + jy) & (bx >= jx) & (bx < OW + jx)
        o_a = (o_row + (member * size - (jy * OW + jx) * F))[:, None] + k[None, :]
        m_a = m_cell[:, None] & (k < F)[None, :] if F % BK else m_cell[:, None]
        m_tap = (column < COLUMNS) & (py + STRIDE * jy < KERNEL) & (px + STRIDE * jx < KERNEL)
        o_tap = (member * (KERNEL * KERNEL) + (jy * KERNEL + jx) * STRIDE) * (C * F)
        o_w = (o_column + o_tap)[:, None] + k[None, :]
        m_w = m_tap[:, None] & (k < F)[None, :] if F % BK else m_tap[:, None]
        b_a = tl.load(p_grad + o_a, m_a, other=0.0)
        b_w = round_operand(tl.load(p_weight + o_w, m_w, other=0.0), PRECISION)
        acc = tl.dot(b_a, tl.trans(b_w), acc, input_precision=PRECISION)
    y = by[:, None] * STRIDE + py[None, :]
    x = bx[:, None] * STRIDE + px[None, :]
    o_out = (((image * H)[:, None] + y) * W + x) * C + c[None, :]
    m_out = m_row[:, None] & (column < COLUMNS)[None, :] & (y < H) & (x < W)
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), m_out)


@triton.jit(do_not_specialize=["steps", "splits"])
def _weight_gradient(
    p_turned,
    p_x,
    p_weight,
    batch,
    members,
    steps,
    splits,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
):
    """One tile of the gradient of the weight, BK patch entries by BF columns (member, filter).

    A program sums over one of `splits` shares of the rows, steps * BR rows each. If there are
    several shares (WHOLE is false), p_weight is [splits, G, N, fan in, F], and `_add_shares` adds
    them.
    """
    OH: tl.constexpr = (H - KERNEL) // STRIDE + 1
    OW: tl.constexpr = (W - KERNEL) // STRIDE + 1
    RUN: tl.constexpr = KERNEL * C
    FAN_IN: tl.constexpr = KERNEL * RUN
    TILES_K: tl.constexpr = (FAN_IN + BK - 1) // BK
    rows = batch * (OH * OW)
    columns = members * F
    tiles = tl.cdiv(columns, BF)
    i = tl.program_id(0)
    i_column, i = i % tiles, i // tiles
    i_k, i = i % TILES_K, i // TILES_K
    i_share = i % splits
    i_group = (i // splits).to(tl.int64)
    p_x += i_group * batch * (H * W * C)
    p_turned += i_group * members * rows * F

    k = i_k * BK + tl.arange(0, BK)
    m_k = k < FAN_IN
    o_k = (k // RUN) * (W * C) + k % RUN
    column = i_column * BF + tl.arange(0, BF)
    m_column = column < columns
    o_column = column * rows
    start = i_share * steps * BR
    # The transposed tile is summed: both operands then have the layout that matrix units read.
    acc = tl.zeros([BF, BK], tl.float32)
    for first in range(start, tl.minimum(start + steps * BR, rows), BR):
        row = first + tl.arange(0, BR)
        m_row = row < rows
        cell = row % (OH * OW)
        o_x = ((row // (OH * OW)) * H + (cell // OW) * STRIDE) * (W * C)
        o_x += (cell % OW) * (STRIDE * C)
        m_a = m_row[:, None] & m_k[None, :] if FAN_IN % BK else m_row[:, None]
        b_a = tl.load(p_x + o_x[:, None] + o_k[None, :], m_a, other=0.0)
        b_a = round_operand(b_a, PRECISION)
        m_g = m_column[:, None] & m_row[None, :]
        b_g = tl.load(p_turned + o_column[:, None] + row[None, :], m_g, other=0.0)
        acc = tl.dot(b_g, b_a, acc, input_precision=PRECISION)

    net = i_group * members + column // F
    if not WHOLE:
        net += i_share * (tl.num_programs(0) // (splits * TILES_K * tiles)) * members
    o_weight = ((net * FAN_IN)[None, :] + k[:, None]) * F + (column % F)[None, :]
    m_weight = m_k[:, None] & m_column[None, :]
    tl.store(p_weight + o_weight, tl.trans(acc).to(p_weight.dtype.element_ty), m_weight)


@triton.jit
def _add(p_part, p_out, i_block, size, splits, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """Adds `splits` shares of one block of elements; SHARES is the next power of two."""
    i = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES)
    o = (share.to(tl.int64) * size)[:, None] + i[None, :]
    b_part = tl.load(p_part + o, (share < splits)[:, None] & (i < size)[None, :], other=0.0)
    tl.store(p_out + i, tl.sum(b_part, 0).to(p_out.dtype.element_ty), i < size)


@triton.jit(do_not_specialize=["blocks", "splits", "shares"])
def _add_shares(
    p_weights,
    p_biases,
    p_weight,
    p_bias,
    blocks,
    size,
    splits,
    bias_size,
    shares,
    SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the shares of the weight's gradient and of the bias's gradient.

    The first `blocks` programs do the weight's, the others the bias's; each reads BLOCK elements.

    Args: p_weights [splits, size]; p_biases [shares, bias_size]; SPLITS >= splits and
          SHARES >= shares, powers of two.
    """
    i_block = tl.program_id(0)
    if i_block < blocks:
        _add(p_weights, p_weight, i_block, size, splits, SPLITS, BLOCK // SPLITS)
    else:
        _add(p_biases, p_bias, i_block - blocks, bias_size, shares, SHARES, BLOCK // SHARES)


def _shapes(x, weight, bias, kernel, stride, relu) -> Tensor:
    height, width = ((size - kernel) // stride + 1 for size in x.shape[2:4])
    groups, members, _, filters = weight.shape
    return x.new_empty(groups, members, x.shape[1], height, width, filters)


def _gradient_shapes(
    grad, y, x, weight, kernel, stride, relu, wants_x
) -> tuple[Tensor, Tensor, Tensor]:
    bias = grad.new_empty(*weight.shape[:2], weight.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape if wants_x else 0), weight.new_empty(weight.shape), bias


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.kernel, ctx.stride, ctx.relu = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, output)


def _gradient(ctx, grad):
    x, weight, y = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0]
    options = ctx.kernel, ctx.stride, ctx.relu
    grad_x, grad_weight, grad_bias = conv2d_backward(grad, y, x, weight, *options, wants_x)
    return grad_x if wants_x else None, grad_weight, grad_bias.to(ctx.bias_dtype), None, None, None


@operator("conv2d", shapes=_shapes, save=_save, gradient=_gradient)
def conv2d(x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int, relu: bool) -> Tensor:
    """The convolution of `conv.conv2d` on its group axis.

    Args:    x [G, B, h, w, c]; weight [G, N, fan in, F]; bias [G, N, F].
    Returns: [G, N, B, h', w', F].
    """
    groups, batch, height, width, channels = x.shape
    members, filters = weight.shape[1], weight.shape[3]
    y = _shapes(x, weight, bias, kernel, stride, relu)
    _check_sizes(x, y)
    rows, columns = batch * y.shape[3] * y.shape[4], members * filters
    tile = _forward_blocks(groups, rows, columns, kernel=kernel, run=kernel * channels)
    grid = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _forward[(grid,)](
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        y,
        batch,
        members,
        H=height,
        W=width,
        C=channels,
        F=filters,
        KERNEL=kernel,
        STRIDE=stride,
        RELU=relu,
        PRECISION=precision(x),
        BR=tile.rows,
        BF=tile.columns,
        BK=tile.depth,
        **tile.options,
    )
    return y


@operator("conv2d_backward", shapes=_gradient_shapes, gradient_of="conv2d")
def conv2d_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    relu: bool,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless `wants_x`), of weight and, in float32, of bias."""
    grad, turned, part = output_gradient(grad, y, relu=relu, plain=wants_x)
    grad_weight, grad_bias = weight_gradient(turned, part, x, kernel=kernel, stride=stride)
    if not wants_x:
        return x.new_empty(0), grad_weight, grad_bias
    size = x.shape[2], x.shape[3]
    grad_x = input_gradient(grad, weight, size=size, kernel=kernel, stride=stride)
    return grad_x, grad_weight, grad_bias


def output_gradient(
    grad: Tensor, y: Tensor, *, relu: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient before the ReLU, in the two layouts that the gradients of x and of the weight read.

    Returns: that gradient [G, N, B, h', w', F], rounded to tf32 if products are in tf32 (empty
             unless `plain`); the same with the filters first, [G, N, F, B, h', w']; sums of the
             gradient before rounding over shares of the rows, float32 [shares, G, N, F].
    """
    groups, members, *cells, filters = y.shape
    rows, wide = cells[0] * cells[1] * cells[2], power_of_two(filters)
    tall = max(2048 // wide, 1)
    shares = max(min(triton.cdiv(rows, 2 * tall), triton.cdiv(8 * PROCESSORS, groups * members)), 1)
    steps = triton.cdiv(rows, min(shares, 64) * tall)
    shares = triton.cdiv(rows, steps * tall)
    out = y.new_empty(y.shape if plain else 0)
    turned = y.new_empty(groups, members, filters, *cells)
    part = y.new_empty(shares, groups, members, filters, dtype=torch.float32)
    _output_gradient[(groups * members * shares,)](
        grad.contiguous(),
        y.contiguous(),
        out,
        turned,
        part,
        rows,
        steps,
        shares,
        F=filters,
        RELU=relu,
        PLAIN=plain,
        PRECISION=precision(y),
        BR=tall,
        BF=wide,
    )
    return out, turned, part


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    *,
    size: tuple[int, int],
    kernel: int,
    stride: int,
) -> Tensor:
    """Gradient of x [G, B, *size, c], summed over members.

    Args: grad, the first result of `output_gradient`; size, height and width of x.
    """
    groups, members, batch = grad.shape[:3]
    channels, filters = weight.shape[2] // kernel**2, weight.shape[3]
    out = grad.new_empty(groups, batch, *size, channels)
    rows = batch * triton.cdiv(size[0], stride) * triton.cdiv(size[1], stride)
    columns = stride * stride * channels
    tile = _input_gradient_blocks(groups, rows, columns, filters=filters)
    grid = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _input_gradient[(grid,)](
        grad,
        weight.contiguous(),
        out,
        batch,
        members,
        H=size[0],
        W=size[1],
        C=channels,
        F=filters,
        KERNEL=kernel,
        STRIDE=stride,
        PRECISION=precision(grad),
        BR=tile.rows,
        BQ=tile.columns,
        BK=tile.depth,
        **tile.options,
    )
    return out


def weight_gradient(
    turned: Tensor,
    part: Tensor,
    x: Tensor,
    *,
    kernel: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [G, N, fan in, F] and, in float32, of bias [G, N, F].

    Args: turned and part as `output_gradient` returns them; x [G, B, h, w, c].
    """
    groups, batch, height, width, channels = x.shape
    members, filters, _, high, wide = turned.shape[1:]
    fan_in, rows, columns = kernel**2 * channels, batch * high * wide, members * filters
    weight = turned.new_empty(groups, members, fan_in, filters)
    bias = part.new_empty(groups, members, filters)
    tile = _weight_gradient_blocks(groups, fan_in, columns, rows=rows)
    steps = triton.cdiv(rows, tile.splits * tile.depth)
    splits = triton.cdiv(rows, steps * tile.depth)
    whole = splits == 1
    weights = weight if whole else part.new_empty(splits, *weight.shape)
    tiles = triton.cdiv(fan_in, tile.rows) * triton.cdiv(columns, tile.columns)
    _weight_gradient[(groups * splits * tiles,)](
        turned,
        x.contiguous(),
        weights,
        batch,
        members,
        steps,
        splits,
        H=height,
        W=width,
        C=channels,
        F=filters,
        KERNEL=kernel,
        STRIDE=stride,
        PRECISION=precision(x),
        WHOLE=whole,
        BK=tile.rows,
        BF=tile.columns,
        BR=tile.depth,
        **tile.options,
    )
    block, powers = 2048, [power_of_two(n) for n in (splits, part.shape[0])]
    count = 0 if whole else triton.cdiv(weight.numel(), block // powers[0])
    _add_shares[(count + triton.cdiv(bias.numel(), block // powers[1]),)](
        weights,
        part,
        weight,
        bias,
        count,
        weight.numel(),
        splits,
        bias.numel(),
        part.shape[0],
        SPLITS=powers[0],
        SHARES=powers[1],
        BLOCK=block,
    )
    return weight, bias


def _check_sizes(x: Tensor, y: Tensor) -> None:
    """Refuses tensors that are too large for 32-bit offsets inside a group."""
    for name, tensor in (("input", x), ("output", y)):
        if tensor[0].numel() >= 2**31:
            raise ValueError(
                f"conv2d: the {name} of one group of members has {tensor[0].numel()} elements, at "
                "most 2^31 - 1 fit; split the batch"
            )


def _wide(size: int) -> int:
    """Side of a tile along `size`: 64 unless that leaves more than a tenth of the tiles empty."""
    return 64 if triton.cdiv(size, 64) * 64 <= 1.1 * size else min(block_size(size), 32)


# Tiles below are the best of some twenty tried on an H200 (tf32, B = 32, the three convolutions of
# the Nature network with N = 1 and 10, and 10 x 10 boards with S = N = 10). Two warps avoid wgmma,
# which four would use: it needs both float32 operands contiguous along the sum, and so transposes
# them first.


def _forward_blocks(groups: int, rows: int, columns: int, *, kernel: int, run: int) -> Blocks:
    depth = min(block_size(run), 32)
    stages = 2 if kernel * triton.cdiv(run, depth) < 4 else 3
    if groups * rows * columns >= PROCESSORS * 64 * 64:
        return Blocks(min(block_size(rows), 64), _wide(columns), depth, 2, stages)
    return Blocks(min(block_size(rows), 32), min(block_size(columns), 32), depth, 4, stages)


def _input_gradient_blocks(groups: int, rows: int, columns: int, *, filters: int) -> Blocks:
    depth = min(block_size(filters), 32)
    if groups * rows * columns >= 2 * PROCESSORS * 64 * 64:
        return Blocks(min(block_size(rows), 128), min(block_size(columns), 64), depth)
    return Blocks(min(block_size(rows), 32), min(block_size(columns), 64), depth)


def _weight_gradient_blocks(groups: int, fan_in: int, columns: int, *, rows: int) -> Blocks:
    wide = _wide(columns)
    small = wide == 64 and groups * fan_in * columns < 16 * 64 * 64
    tall = 32 if small else _wide(fan_in)
    # A few programs a multiprocessor hide each other's latency. A share of the sum has 192 rows or
    # more, since each share writes a whole tile.
    programs = (3 if wide == 64 else 5) * PROCESSORS
    tiles = groups * triton.cdiv(fan_in, tall) * triton.cdiv(columns, wide)
    splits = max(min(programs // tiles, rows // 192), 1)
    return Blocks(tall, wide, 32, 2, 3, splits=splits)
