"""Ensemble convolution in Triton: forward, gradient of the input, gradients of weight and bias.

Each is a matrix product whose left operand is read straight from the image: in a channels-last image
the entries of a patch that share ky lie side by side. Group g of G holds rows that all its N weights
see; filters of several members are columns of one product. Sums run in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


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
        acc = tl.dot(b_a, b_w, acc, input_precision=PRECISION)
    acc += tl.load(p_bias + column, m_column, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # NaN stays
    o_y = (row * F)[:, None] + ((column // F) * (rows * F) + column % F)[None, :]
    m_y = (row < rows)[:, None] & m_column[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), m_y)


@triton.jit
def _input_gradient(
    p_grad,
    p_y,
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
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of the gradient of x: BR blocks of STRIDE x STRIDE pixels by BQ of (py, px, channel).

    Pixel (STRIDE by + py, STRIDE bx + px) is reached by tap (STRIDE jy + py, STRIDE jx + px) from the
    output cell (by - jy, bx - jx): all pixels of a block read the same cells, with weights of their
    own. The sum runs over members, taps (jy, jx) and filters.
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
    p_y += i_group * members * size
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
        if RELU:
            b_a = tl.where(tl.load(p_y + o_a, m_a, other=0.0) <= 0.0, 0.0, b_a)
        b_w = tl.load(p_weight + o_w, m_w, other=0.0)
        acc = tl.dot(b_a, tl.trans(b_w), acc, input_precision=PRECISION)
    y = by[:, None] * STRIDE + py[None, :]
    x = bx[:, None] * STRIDE + px[None, :]
    o_out = (((image * H)[:, None] + y) * W + x) * C + c[None, :]
    m_out = m_row[:, None] & (column < COLUMNS)[None, :] & (y < H) & (x < W)
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), m_out)


@triton.jit(do_not_specialize=["share", "splits"])
def _weight_gradient(
    p_grad,
    p_y,
    p_x,
    p_weight,
    p_bias,
    p_part,
    batch,
    members,
    share,
    splits,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
):
    """One tile of the gradient of the weight, BK patch entries by BF columns (member, filter).

    The sum runs over one of `splits` shares of the rows, `share` rows each; unless that is the WHOLE
    of them it goes to `p_part` [splits, G, N, fan in + 1, F], whose last row is the bias's.
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
    p_grad += i_group * members * rows * F
    p_y += i_group * members * rows * F

    k = i_k * BK + tl.arange(0, BK)
    m_k = k < FAN_IN
    o_k = (k // RUN) * (W * C) + k % RUN
    column = i_column * BF + tl.arange(0, BF)
    m_column = column < columns
    o_column = (column // F) * (rows * F) + column % F
    start = i_share * share
    # The transpose of the tile: its right operand, x, then reaches the matrix units as it lies.
    acc = tl.zeros([BF, BK], tl.float32)
    total = tl.zeros([BR, BF], tl.float32)
    for first in range(start, tl.minimum(start + share, rows), BR):
        row = first + tl.arange(0, BR)
        m_row = row < rows  # a share is a multiple of BR
        cell = row % (OH * OW)
        o_x = ((row // (OH * OW)) * H + (cell // OW) * STRIDE) * (W * C)
        o_x += (cell % OW) * (STRIDE * C)
        m_a = m_row[:, None] & m_k[None, :] if FAN_IN % BK else m_row[:, None]
        b_a = tl.load(p_x + o_x[:, None] + o_k[None, :], m_a, other=0.0)
        o_g = (row * F)[:, None] + o_column[None, :]
        m_g = m_row[:, None] & m_column[None, :]
        b_g = tl.load(p_grad + o_g, m_g, other=0.0)
        if RELU:
            b_g = tl.where(tl.load(p_y + o_g, m_g, other=0.0) <= 0.0, 0.0, b_g)
        total += b_g.to(tl.float32)
        acc = tl.dot(tl.trans(b_g), b_a, acc, input_precision=PRECISION)

    b_weight = tl.trans(acc)
    sums = tl.sum(total, 0)
    filter = column % F
    m_weight = m_k[:, None] & m_column[None, :]
    if WHOLE:
        net = i_group * members + column // F
        o_weight = (net * FAN_IN)[None, :] + k[:, None]
        o_weight = o_weight * F + filter[None, :]
        tl.store(p_weight + o_weight, b_weight.to(p_weight.dtype.element_ty), m_weight)
        tl.store(p_bias + net * F + filter, sums, m_column & (i_k == 0))
    else:
        groups = tl.num_programs(0) // (splits * TILES_K * tiles)
        net = (i_share * groups + i_group) * members + column // F
        o_weight = (net * (FAN_IN + 1))[None, :] + k[:, None]
        tl.store(p_part + o_weight * F + filter[None, :], b_weight, m_weight)
        o_bias = (net * (FAN_IN + 1) + FAN_IN) * F + filter
        tl.store(p_part + o_bias, sums, m_column & (i_k == 0))


@triton.jit(do_not_specialize=["splits"])
def _add_shares(
    p_part,
    p_weight,
    p_bias,
    size,
    splits,
    FAN_IN: tl.constexpr,
    F: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients from the shares' sums, `size` elements a share; SHARES >= splits, a power of two."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES)
    mask = i < size
    b_part = tl.load(
        p_part + (share.to(tl.int64) * size)[:, None] + i[None, :],
        (share < splits)[:, None] & mask[None, :],
        other=0.0,
    )
    acc = tl.sum(b_part, 0)
    net = i // ((FAN_IN + 1) * F)
    at = i % ((FAN_IN + 1) * F)
    m_weight = at < FAN_IN * F
    o_weight = net * (FAN_IN * F) + at
    tl.store(p_weight + o_weight, acc.to(p_weight.dtype.element_ty), mask & m_weight)
    tl.store(p_bias + net * F + at - FAN_IN * F, acc, mask & ~m_weight)


class Blocks(NamedTuple):
    """Tile of one product: rows and columns of the result, depth of a step of the sum."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    splits: int = 1  # shares of the sum (weight gradient only)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    kernel: int,
    stride: int,
    relu: bool,
    blocks: Blocks | None = None,
) -> Tensor:
    """x [G, B, h, w, c], weight [G, N, fan in, F], bias [G, N, F] -> [G, N, B, h', w', F]."""
    groups, batch, height, width, channels = x.shape
    members, filters = weight.shape[1], weight.shape[3]
    high, wide = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    y = x.new_empty(groups, members, batch, high, wide, filters)
    _check_sizes(x, y)
    rows, columns = batch * high * wide, members * filters
    tile = blocks or _forward_blocks(groups, rows, columns, run=kernel * channels)
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
        PRECISION=_precision(),
        BR=tile.rows,
        BF=tile.columns,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def input_gradient(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    relu: bool,
    blocks: Blocks | None = None,
) -> Tensor:
    """Gradient of x [G, B, *size, c] from that of y [G, N, B, h', w', F], summed over members."""
    groups, members, batch = grad.shape[:3]
    channels, filters = weight.shape[2] // kernel**2, weight.shape[3]
    out = grad.new_empty(groups, batch, *size, channels)
    _check_sizes(out, y)
    rows = batch * triton.cdiv(size[0], stride) * triton.cdiv(size[1], stride)
    columns = stride * stride * channels
    tile = blocks or _input_gradient_blocks(groups, rows, columns, filters=filters)
    grid = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _input_gradient[(grid,)](
        grad.contiguous(),
        y.contiguous(),
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
        RELU=relu,
        PRECISION=_precision(),
        BR=tile.rows,
        BQ=tile.columns,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def weight_gradient(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    *,
    kernel: int,
    stride: int,
    relu: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [G, N, fan in, F] and, in float32, of bias [G, N, F]."""
    groups, batch, height, width, channels = x.shape
    members, high, wide, filters = grad.shape[1], *grad.shape[3:]
    fan_in, rows, columns = kernel**2 * channels, batch * high * wide, members * filters
    weight = grad.new_empty(groups, members, fan_in, filters)
    bias = grad.new_empty(groups, members, filters, dtype=torch.float32)
    _check_sizes(x, y)
    tile = blocks or _weight_gradient_blocks(groups, fan_in, columns, rows=rows)
    share = triton.cdiv(triton.cdiv(rows, tile.splits), tile.depth) * tile.depth
    splits = triton.cdiv(rows, share)
    part = bias
    if splits > 1:
        part = bias.new_empty(splits, groups * members * (fan_in + 1) * filters)
    tiles = triton.cdiv(fan_in, tile.rows) * triton.cdiv(columns, tile.columns)
    _weight_gradient[(groups * splits * tiles,)](
        grad.contiguous(),
        y.contiguous(),
        x.contiguous(),
        weight,
        bias,
        part,
        batch,
        members,
        share,
        splits,
        H=height,
        W=width,
        C=channels,
        F=filters,
        KERNEL=kernel,
        STRIDE=stride,
        RELU=relu,
        PRECISION=_precision(),
        WHOLE=splits == 1,
        BK=tile.rows,
        BF=tile.columns,
        BR=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        count, shares = part.shape[1], triton.next_power_of_2(splits)
        block = max(2048 // shares, 32)
        _add_shares[(triton.cdiv(count, block),)](
            part,
            weight,
            bias,
            count,
            splits,
            FAN_IN=fan_in,
            F=filters,
            SHARES=shares,
            BLOCK=block,
        )
    return weight, bias


def _precision() -> str:
    """How float32 products round: as torch's own matrix products on CUDA."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _check_sizes(x: Tensor, y: Tensor) -> None:
    """Offsets inside a group are 32-bit."""
    for name, tensor in (("input", x), ("output", y)):
        if tensor[0].numel() >= 2**31:
            raise ValueError(
                f"conv2d: the {name} of one group of members has {tensor[0].numel()} elements, at "
                "most 2^31 - 1 fit; split the batch"
            )


def _power(size: int, *, least: int = 16, most: int) -> int:
    """The smallest power of two that holds `size`, within bounds."""
    return min(max(triton.next_power_of_2(size), least), most)


def _forward_blocks(groups: int, rows: int, columns: int, *, run: int) -> Blocks:
    depth = _power(run, most=32)
    wide = _power(columns, most=64)
    tall = 64 if groups * rows * columns >= 132 * 2 * 64 * wide else 32
    return Blocks(min(tall, _power(rows, most=64)), wide, depth)


def _input_gradient_blocks(groups: int, rows: int, columns: int, *, filters: int) -> Blocks:
    depth = _power(filters, most=32)
    wide = _power(columns, most=64)
    tall = 64 if groups * rows * columns >= 132 * 2 * 64 * wide else 32
    return Blocks(min(tall, _power(rows, most=64)), wide, depth)


def _weight_gradient_blocks(groups: int, fan_in: int, columns: int, *, rows: int) -> Blocks:
    tall, wide = _power(fan_in, most=64), _power(columns, most=64)
    tiles = groups * triton.cdiv(fan_in, tall) * triton.cdiv(columns, wide)
    splits = max(min(264 // tiles, rows // 128), 1)
    return Blocks(tall, wide, 32, splits=splits)
