# The arguments of a Triton kernel and its language are no Python types.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportReturnType=false
"""First and last layer of a population's perceptrons in Triton, and what all their kernels share.

A program takes a block of rows of one network. Between the two cuBLAS multiplies the hidden layers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.conv_triton import round_operand
from cerl.kernels.mlp import NOTHING, SIGNS

# Rows, columns of a tile, warps, stages, from what the compiler reports for sm_90 (registers,
# instructions, shared memory): not measured.
FIRST, LAST = (64, 128, 4, 2), (64, 32, 4, 3)
DEPTH = 32  # inputs of a step


@triton.jit
def inputs(p_x, p_tail, row, k, m_row, D: tl.constexpr, A: tl.constexpr):
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
def matrix(p, stride, k, n, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Rows k and columns n of a weight [K, N] for a product, 0 beyond it."""
    o = k[:, None] * stride + n[None, :]
    return round_operand(tl.load(p + o, (k < K)[:, None] & (n < N)[None, :], other=0.0), PRECISION)


@triton.jit
def activation(b, p_bias, n, N: tl.constexpr):
    """ReLU of a product plus the bias of columns n; NaN stays."""
    b += tl.load(p_bias + n, n < N, other=0.0).to(tl.float32)[None, :]
    return tl.where(b < 0.0, 0.0, b)


@triton.jit
def keep_layer(p, b, row, n, m_row, N: tl.constexpr, KEEP: tl.constexpr):
    """Stores columns n of an activation (2), or whether its gradient passes (1): NaN lets it."""
    o, m = row[:, None] * N + n[None, :], m_row[:, None] & (n < N)[None, :]
    if KEEP == 2:
        tl.store(p + o, b, m)
    elif KEEP == 1:
        tl.store(p + o, tl.where(b <= 0.0, 0, 1).to(tl.uint8), m)


@triton.jit
def _first_layer(
    p_x,
    p_tail,
    p_weight,
    p_bias,
    p_sum,
    p_y,
    p_signs,
    s_net,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    SIGNED: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile [BR, BN] of one network's first hidden layer, rounded as an operand of products.

    If SUM, p_sum [G, B, N] is what further inputs add; if SIGNED, p_signs takes a byte of each.
    """
    TILES: tl.constexpr = (N + BN - 1) // BN
    blocks = tl.cdiv(batch, BR)
    i_n = tl.program_id(0) % TILES
    i_row = (tl.program_id(0) // TILES) % blocks
    i_net = (tl.program_id(0) // (TILES * blocks)).to(tl.int64)
    p_x += (i_net // share_x) * batch * D
    p_tail += (i_net // share_tail) * batch * A
    p_weight += i_net * s_net
    row = i_row * BR + tl.arange(0, BR)
    m_row = row < batch
    n = i_n * BN + tl.arange(0, BN)
    acc = tl.zeros([BR, BN], tl.float32)
    if D + A > 0:
        for first in range(0, D + A, BK):
            k = first + tl.arange(0, BK)
            b_x = round_operand(inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
            b_w = matrix(p_weight, N, k, n, D + A, N, PRECISION)
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    if SUM:
        m_sum = m_row[:, None] & (n < N)[None, :]
        o_sum = row[:, None] * N + n[None, :]
        acc += tl.load(p_sum + i_net * batch * N + o_sum, m_sum, other=0.0)
    b = activation(acc, p_bias + i_net * N, n, N).to(p_y.dtype.element_ty)
    b = round_operand(b, PRECISION)
    keep_layer(p_y + i_net * batch * N, b, row, n, m_row, N, 2)
    if SIGNED:
        keep_layer(p_signs + i_net * batch * N, b, row, n, m_row, N, 1)


@triton.jit
def _last_layer(
    p_x,
    p_bias,
    p_weight,
    p_out_bias,
    p_y,
    p_kept,
    s_net,
    s_row,
    s_bias,
    batch,
    K: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """BR rows of one network's output from the product p_x [G, B, K] before its bias and ReLU."""
    blocks = tl.cdiv(batch, BR)
    i_row = tl.program_id(0) % blocks
    i_net = (tl.program_id(0) // blocks).to(tl.int64)
    p_x += i_net * batch * K
    p_kept += i_net * batch * K
    p_weight += i_net * s_net
    row = i_row * BR + tl.arange(0, BR)
    m_row = row < batch
    o = tl.arange(0, BO)
    out = tl.zeros([BR, BO], tl.float32)
    for first in range(0, K, BT):
        k = first + tl.arange(0, BT)
        m_x = m_row[:, None] & (k < K)[None, :]
        b_x = tl.load(p_x + row[:, None] * K + k[None, :], m_x, other=0.0).to(tl.float32)
        b_x = activation(b_x, p_bias + i_net * K, k, K).to(p_weight.dtype.element_ty)
        keep_layer(p_kept, b_x, row, k, m_row, K, KEEP)
        b_w = matrix(p_weight, s_row, k, o, K, O, PRECISION)
        out = tl.dot(round_operand(b_x, PRECISION), b_w, out, input_precision=PRECISION)
    out += tl.load(p_out_bias + i_net * s_bias + o, o < O, other=0.0).to(tl.float32)[None, :]
    m_y = m_row[:, None] & (o < O)[None, :]
    o_y = row[:, None] * O + o[None, :]
    tl.store(p_y + i_net * batch * O + o_y, out.to(p_y.dtype.element_ty), m_y)


def first_layer(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None,
    *,
    signed: bool,
    blocks: tuple[int, int, int, int] = FIRST,
) -> tuple[Tensor, Tensor]:
    """First hidden layer [G, B, N] rounded as an operand; a byte of each (empty unless `signed`).

    Args: x [X, B, D] and tail [T, B, A]; weight [G, D + A, N], or [G, A, N] where `sums` [G, B, N]
          has what the other inputs add; bias [G, N]; blocks, as FIRST.
    """
    nets, fan_in, out = weight.shape
    rows, more = x.shape[1], tail.shape[2]
    y = x.new_empty(nets, rows, out)
    signs = x.new_empty((nets, rows, out) if signed else 0, dtype=torch.uint8)
    tall, wide, warps, stages = blocks
    tall, wide = min(tall, power(rows)), min(wide, power(out))
    _first_layer[(nets * triton.cdiv(rows, tall) * triton.cdiv(out, wide),)](
        x,
        tail if more else x,
        weight,
        bias,
        x if sums is None else sums,
        y,
        signs,
        weight.stride(0),
        nets // x.shape[0],
        nets // tail.shape[0],
        rows,
        D=fan_in - more,
        A=more,
        N=out,
        SIGNED=signed,
        SUM=sums is not None,
        PRECISION=precision(x),
        BR=tall,
        BK=min(DEPTH, power(max(fan_in, 1))),
        BN=wide,
        num_warps=warps,
        num_stages=stages,
    )
    return y, signs


def last_layer(
    product: Tensor,
    bias: Tensor,
    weight: Tensor,
    out_bias: Tensor,
    *,
    keep: int,
    dtype: torch.dtype,
    blocks: tuple[int, int, int, int] = LAST,
) -> tuple[Tensor, Tensor]:
    """Output [G, B, O] in `dtype`, and what `keep` says of the hidden layer before it.

    Args: product [G, B, K], that layer without its bias [G, K] and ReLU, is overwritten where it is
          kept; weight [G, K, O] and out_bias [G, O], whose last axes lie side by side; blocks, as
          LAST.
    """
    nets, rows, width = product.shape
    out = weight.shape[2]
    y = product.new_empty(nets, rows, out, dtype=dtype)
    kept = product
    if keep == SIGNS:
        kept = torch.empty_like(product, dtype=torch.uint8)
    elif keep == NOTHING:
        kept = product.new_empty(0)
    tall, wide, warps, stages = blocks
    tall = min(tall, power(rows))
    _last_layer[(nets * triton.cdiv(rows, tall),)](
        product,
        bias,
        weight,
        out_bias,
        y,
        kept,
        weight.stride(0),
        weight.stride(1),
        out_bias.stride(0),
        rows,
        K=width,
        O=out,
        KEEP=keep,
        PRECISION=precision(product),
        BR=tall,
        BT=min(wide, power(width)),
        BO=power(out),
        num_warps=warps,
        num_stages=stages,
    )
    return y, kept


def precision(x: Tensor) -> str:
    """How float32 products round: as torch's own on CUDA; in the interpreter only as float32."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def power(size: int) -> int:
    """The smallest power of two that holds `size`, at least the 16 of a matrix instruction."""
    return max(triton.next_power_of_2(size), 16)
