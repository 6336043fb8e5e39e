"""Scan of gated recurrent units in Triton: one program computes all steps of a block of rows.

With up to 128 units, in tf32 or 16 bits, the recurrent weights are read once and stay on chip, and
so does the state. Larger weights are read tile by tile in every step. The state then goes through
memory: a program writes it, waits at a barrier and reads it back. Every sum runs in a fixed order.

The forward pass saves only the states. The backward pass first recomputes the products with them as
one matrix product over all rows, and then runs from the last step to the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.runtime.blocks import PROCESSORS, Blocks, block_size, precision
from cerl.kernels.runtime.operator import operator
from cerl.kernels.runtime.rounding import round_operand

WIDEST = 256  # units whose sums for a block of rows fit on chip
HELD = 128  # units whose recurrent weights fit on chip


@triton.jit
def _sigmoid(b):
    return 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def _tanh(b):
    e = tl.exp(-2.0 * tl.abs(b))
    b_abs = (1.0 - e) / (1.0 + e)
    return tl.where(b < 0.0, -b_abs, b_abs)


@triton.jit
def _tile(p, k, n, gate, stride, D: tl.constexpr, PRECISION: tl.constexpr):
    """Rows k and columns n of a gate's weight [D, D], of which each row begins `stride` later."""
    o = k[:, None] * stride + gate + n[None, :]
    return round_operand(tl.load(p + o, (k < D)[:, None] & (n < D)[None, :], other=0.0), PRECISION)


@triton.jit
def _forward(
    p_x,
    p_weight,
    p_bias,
    p_h,
    p_start,
    p_y,
    share,
    batch,
    rows,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """All states of BR rows of one network."""
    blocks = tl.cdiv(batch, BR)
    i_net = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m_i = i < batch
    d = tl.arange(0, BD)
    m = m_i[:, None] & (d < D)[None, :]
    p_weight += i_net * (3 * D * D)
    p_h += i_net * batch * D
    p_x += i_net * batch * rows * (3 * D)
    p_y += i_net * batch * rows * D
    p_start += (i_net // share) * batch * rows
    o_x = i[:, None].to(tl.int64) * rows * (3 * D) + d[None, :]
    o_y = i[:, None].to(tl.int64) * rows * D + d[None, :]
    o_start = i.to(tl.int64) * rows

    b_bias = tl.load(p_bias + i_net * D + d, d < D, other=0.0)[None, :]
    b_h = tl.load(p_h + i[:, None] * D + d[None, :], m, other=0.0)
    if BK == BD:
        b_wr = _tile(p_weight, d, d, 0, 3 * D, D, PRECISION)
        b_wz = _tile(p_weight, d, d, D, 3 * D, D, PRECISION)
        b_wn = _tile(p_weight, d, d, 2 * D, 3 * D, D, PRECISION)
    for t in range(rows):
        b_start = tl.load(p_start + o_start + t, m_i, other=0) != 0
        o_t = o_x + t * (3 * D)
        b_r = tl.load(p_x + o_t, m, other=0.0).to(tl.float32)
        b_z = tl.load(p_x + o_t + D, m, other=0.0).to(tl.float32)
        b_n = tl.load(p_x + o_t + 2 * D, m, other=0.0).to(tl.float32)
        b_h = tl.where(b_start[:, None], 0.0, b_h)
        b_s = tl.zeros([BR, BD], tl.float32)
        if BK == BD:
            b_a = round_operand(b_h.to(p_weight.dtype.element_ty), PRECISION)
            b_r = tl.dot(b_a, b_wr, b_r, input_precision=PRECISION)
            b_z = tl.dot(b_a, b_wz, b_z, input_precision=PRECISION)
            b_s = tl.dot(b_a, b_wn, b_s, input_precision=PRECISION)
        else:
            for first in range(0, D, BK):
                k = first + tl.arange(0, BK)
                m_a = (m_i & (b_start == 0))[:, None] & (k < D)[None, :]
                if t == 0:
                    b_a = tl.load(p_h + i[:, None] * D + k[None, :], m_a, other=0.0)
                else:
                    o_a = (i[:, None].to(tl.int64) * rows + t - 1) * D + k[None, :]
                    b_a = tl.load(p_y + o_a, m_a, other=0.0)
                b_a = round_operand(b_a.to(p_weight.dtype.element_ty), PRECISION)
                b_w = _tile(p_weight, k, d, 0, 3 * D, D, PRECISION)
                b_r = tl.dot(b_a, b_w, b_r, input_precision=PRECISION)
                b_w = _tile(p_weight, k, d, D, 3 * D, D, PRECISION)
                b_z = tl.dot(b_a, b_w, b_z, input_precision=PRECISION)
                b_w = _tile(p_weight, k, d, 2 * D, 3 * D, D, PRECISION)
                b_s = tl.dot(b_a, b_w, b_s, input_precision=PRECISION)
        b_z = _sigmoid(b_z)
        b_n = _tanh(b_n + _sigmoid(b_r) * (b_s + b_bias))
        b_h = b_n + b_z * (b_h - b_n)
        tl.store(p_y + o_y + t * D, b_h, m)
        if BK < BD:
            tl.debug_barrier()


@triton.jit
def _backward(
    p_grad,
    p_x,
    p_product,
    p_last,
    p_weight,
    p_bias,
    p_start,
    p_dx,
    p_ds,
    p_dh,
    share,
    batch,
    rows,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients of BR rows of one network, from the last step to the first.

    Results: p_dx [G, B, W, 3 D], gradients of the inputs' terms in r, z and n; p_ds [G, B, W, D],
             gradient of the state's term in n (in r and z it equals that of the inputs' term);
             p_dh [G, B, D], gradient of the state before row 0.
    Args:    p_last [G, B, W, D], the state before every row; p_product [G, B, W, 3 D], the products
             of these states with the weights.
    """
    blocks = tl.cdiv(batch, BR)
    i_net = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m_i = i < batch
    d = tl.arange(0, BD)
    m = m_i[:, None] & (d < D)[None, :]
    p_weight += i_net * (3 * D * D)
    p_x += i_net * batch * rows * (3 * D)
    p_product += i_net * batch * rows * (3 * D)
    p_dx += i_net * batch * rows * (3 * D)
    p_last += i_net * batch * rows * D
    p_grad += i_net * batch * rows * D
    p_ds += i_net * batch * rows * D
    p_start += (i_net // share) * batch * rows
    o_x = i[:, None].to(tl.int64) * rows * (3 * D) + d[None, :]
    o_y = i[:, None].to(tl.int64) * rows * D + d[None, :]
    o_start = i.to(tl.int64) * rows

    b_bias = tl.load(p_bias + i_net * D + d, d < D, other=0.0)[None, :]
    b_dh = tl.zeros([BR, BD], tl.float32)
    if BK == BD:
        b_wr = _tile(p_weight, d, d, 0, D, D, PRECISION)
        b_wz = _tile(p_weight, d, d, D * D, D, D, PRECISION)
        b_wn = _tile(p_weight, d, d, 2 * D * D, D, D, PRECISION)
    for back in range(rows):
        t = rows - 1 - back
        b_start = tl.load(p_start + o_start + t, m_i, other=0) != 0
        o_t = o_x + t * (3 * D)
        b_r = tl.load(p_x + o_t, m, other=0.0).to(tl.float32)
        b_z = tl.load(p_x + o_t + D, m, other=0.0).to(tl.float32)
        b_n = tl.load(p_x + o_t + 2 * D, m, other=0.0).to(tl.float32)
        b_r = _sigmoid(b_r + tl.load(p_product + o_t, m, other=0.0).to(tl.float32))
        b_z = _sigmoid(b_z + tl.load(p_product + o_t + D, m, other=0.0).to(tl.float32))
        b_s = tl.load(p_product + o_t + 2 * D, m, other=0.0).to(tl.float32) + b_bias
        b_n = _tanh(b_n + b_r * b_s)
        b_last = tl.load(p_last + o_y + t * D, m, other=0.0)
        b_dh += tl.load(p_grad + o_y + t * D, m, other=0.0)
        b_dn = b_dh * (1.0 - b_z) * (1.0 - b_n * b_n)
        b_dz = (b_dh * (b_last - b_n) * b_z * (1.0 - b_z)).to(p_dx.dtype.element_ty)
        b_dr = (b_dn * b_s * b_r * (1.0 - b_r)).to(p_dx.dtype.element_ty)
        b_ds = (b_dn * b_r).to(p_dx.dtype.element_ty)
        tl.store(p_dx + o_t, b_dr, m)
        tl.store(p_dx + o_t + D, b_dz, m)
        tl.store(p_dx + o_t + 2 * D, b_dn.to(p_dx.dtype.element_ty), m)
        tl.store(p_ds + o_y + t * D, b_ds, m)
        b_dh *= b_z
        if BK == BD:
            b_dr, b_dz = round_operand(b_dr, PRECISION), round_operand(b_dz, PRECISION)
            b_dh = tl.dot(b_dr, b_wr, b_dh, input_precision=PRECISION)
            b_dh = tl.dot(b_dz, b_wz, b_dh, input_precision=PRECISION)
            b_ds = round_operand(b_ds, PRECISION)
            b_dh = tl.dot(b_ds, b_wn, b_dh, input_precision=PRECISION)
        else:
            tl.debug_barrier()
            for first in range(0, D, BK):
                k = first + tl.arange(0, BK)
                m_k = m_i[:, None] & (k < D)[None, :]
                o_k = (i[:, None].to(tl.int64) * rows + t) * D + k[None, :]
                o_g = (i[:, None].to(tl.int64) * rows + t) * (3 * D) + k[None, :]
                b_w = _tile(p_weight, k, d, 0, D, D, PRECISION)
                b_k = round_operand(tl.load(p_dx + o_g, m_k, other=0.0), PRECISION)
                b_dh = tl.dot(b_k, b_w, b_dh, input_precision=PRECISION)
                b_w = _tile(p_weight, k, d, D * D, D, D, PRECISION)
                b_k = round_operand(tl.load(p_dx + o_g + D, m_k, other=0.0), PRECISION)
                b_dh = tl.dot(b_k, b_w, b_dh, input_precision=PRECISION)
                b_w = _tile(p_weight, k, d, 2 * D * D, D, D, PRECISION)
                b_k = round_operand(tl.load(p_ds + o_k, m_k, other=0.0), PRECISION)
                b_dh = tl.dot(b_k, b_w, b_dh, input_precision=PRECISION)
        b_dh = tl.where(b_start[:, None], 0.0, b_dh)
    tl.store(p_dh + i_net * batch * D + i[:, None] * D + d[None, :], b_dh, m)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradient(ctx, grad):
    return *gru_backward(grad, *ctx.saved_tensors), None


@operator(
    "gru",
    shapes=lambda x, weight, bias, h, start: h.new_empty(*x.shape[:3], weight.shape[1]),
    save=_save,
    gradient=_gradient,
)
def gru(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    h: Tensor,
    start: Tensor,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """States [G, B, W, D] float32; arguments as in `gru.gru`."""
    nets, batch, rows = x.shape[:3]
    width = weight.shape[1]
    block = blocks or launch(x, width)
    y = h.new_empty(nets, batch, rows, width)
    _forward[(nets * triton.cdiv(batch, block.rows),)](
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        h.contiguous(),
        start.contiguous(),
        y,
        nets // start.shape[0],
        batch,
        rows,
        D=width,
        PRECISION=precision(x),
        BR=block.rows,
        BD=block.columns,
        BK=block.depth,
        **block.options,
    )
    return y


@operator(
    "gru_backward",
    shapes=lambda grad, x, weight, bias, h, start, y: tuple(
        part.new_empty(part.shape) for part in (x, weight, bias, h)
    ),
    gradient_of="gru",
)
def gru_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    h: Tensor,
    start: Tensor,
    y: Tensor,
    *,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and h."""
    nets, batch, rows = x.shape[:3]
    width = weight.shape[1]
    block = blocks or launch(x, width)
    last = torch.cat([h.unsqueeze(2), y[:, :, :-1]], 2)
    begins = start.repeat_interleave(nets // start.shape[0], 0).unsqueeze(3)
    last = last.masked_fill_(begins, 0.0)  # [G, B, W, D]
    flat = last.to(x.dtype).flatten(1, 2)
    product = flat @ weight  # [G, B * W, 3 D]
    dx = x.new_empty(x.shape)
    ds = x.new_empty(y.shape)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    _backward[(nets * triton.cdiv(batch, block.rows),)](
        grad.contiguous(),
        x.contiguous(),
        product,
        last,
        weight.mT.contiguous(),
        bias.contiguous(),
        start.contiguous(),
        dx,
        ds,
        dh,
        nets // start.shape[0],
        batch,
        rows,
        D=width,
        PRECISION=precision(x),
        BR=block.rows,
        BD=block.columns,
        BK=block.depth,
        **block.options,
    )
    two = dx.flatten(1, 2)[..., : 2 * width]
    dweight = torch.cat([flat.mT @ two, flat.mT @ ds.flatten(1, 2)], 2)
    return dx, dweight, ds.float().sum((1, 2)), dh


# Chosen from what the compiler reports for sm_90 (registers, spills, shared memory): not measured.
# At 128 units the weights take 105 KB of shared memory in 16 bits and 210 KB in 32. Beside them,
# products of float32 that is not rounded to tf32 would spill registers, so these products read the
# weights tile by tile.


def launch(x: Tensor, width: int) -> Blocks:
    """Blocks of both kernels: rows and units of a program, and weight rows in a step of a product.

    Args:   x [G, B, W, 3 width].
    Raises: ValueError for a state that does not fit on chip.
    """
    if width > WIDEST:
        raise ValueError(
            f"gru: a state of {width} units does not fit on chip, at most {WIDEST} do; use a "
            'narrower network, or impl="reference"'
        )
    exact = x.dtype == torch.float32 and precision(x) == "ieee"
    size = block_size(width)
    if width > HELD:
        depth, warps = (32, 8) if x.dtype == torch.float32 else (64, 16)
        return Blocks(16, size, depth, warps, 1)
    if exact:
        return Blocks(16, size, 16, 8, 1)
    many = x.shape[1] > 16 and x.shape[0] * triton.cdiv(x.shape[1], 16) > PROCESSORS
    warps = 8 if size == 128 or x.dtype == torch.float32 else 4
    return Blocks(32 if many else 16, size, size, warps, 1)
