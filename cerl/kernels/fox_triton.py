"""Inputs of FoX's Pro attention in Triton: one launch forward, one backward and a sum.

A program takes a block of rows of one network and one head. The shift mixes k of a row into the
next row, so the backward program recomputes the norms of k for its rows and for the rows that
follow them. It sums the gradients of the parameters over its rows; torch then adds the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.runtime.blocks import power_of_two
from cerl.kernels.runtime.operator import operator

# Rows times columns of a program. With twice as many, a multiprocessor would hold half as many
# programs (by the registers that the compiler reports for sm_90). Rows of y are read in 16-byte
# words if P, the number of its columns, is a multiple of 16.
ELEMENTS = 1024


@triton.jit
def _row(p, row, d, m, stride, D: tl.constexpr):
    """Columns d of the given rows in float32, 0 outside the mask."""
    o = row[:, None] * stride + d[None, :]
    return tl.load(p + o, m[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _previous(
    p, p_before, row, d, m, begins, stride, steps, H, D: tl.constexpr, BEFORE: tl.constexpr
):
    """Columns d of the row before each row, 0 where `begins`.

    Before the first row of a sequence comes its row of p_before if BEFORE, else 0.
    """
    t = row % steps
    b = _row(p, row - 1, d, m & (t > 0) & (begins == 0), stride, D)
    if BEFORE:
        b += _row(p_before, row // steps, d, m & (t == 0) & (begins == 0), H * D, D)
    return b


@triton.jit
def _sigmoid(b):
    return 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def _log1p(b):
    """log(1 + b) for b in [0, 1]; a series for small b, where 1 + b would lose digits."""
    return tl.where(b < 0.03, b * (1.0 - b * (0.5 - b * (1.0 / 3.0 - 0.25 * b))), tl.log(1.0 + b))


@triton.jit
def _forward(
    p_y,
    p_bias,
    p_q_scale,
    p_k_scale,
    p_start,
    p_before_k,
    p_before_v,
    p_q,
    p_k,
    p_v,
    p_log_f,
    p_gate,
    stride,
    rows,
    steps,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BEFORE: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """log_f, q, k, v and gate (computed in this order) of BR rows of one network and head."""
    blocks = tl.cdiv(rows, BR)
    i_net = (tl.program_id(0) // blocks).to(tl.int64)
    i_h = tl.program_id(1)
    row = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m = row < rows
    d = tl.arange(0, BD)
    m_out = m[:, None] & (d < D)[None, :]
    p_y += i_net * rows * stride + i_h * D
    p_logit = p_y + 4 * H * D - i_h * D + i_h + row * stride
    p_start += i_net * rows
    o_before = i_net * (rows // steps) * (H * D) + i_h * D
    o_scale = (i_net * H + i_h) * D + d
    o_out = i_net * rows * (H * D) + i_h * D + row[:, None] * (H * D) + d[None, :]
    begins = tl.load(p_start + row, m, other=0)

    b = tl.load(p_logit, m, other=0.0).to(tl.float32) + tl.load(p_bias + i_net * H + i_h)
    b = tl.minimum(b, 0.0) - _log1p(tl.exp(-tl.abs(b)))
    tl.store(p_log_f + i_net * rows * H + row * H + i_h, b, m)

    b_x = _row(p_y, row, d, m, stride, D)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
    b_x *= tl.load(p_q_scale + o_scale, d < D, other=0.0)[None, :]
    tl.store(p_q + o_out, b_x.to(p_q.dtype.element_ty), m_out)

    b_a = _sigmoid(tl.load(p_logit + H, m, other=0.0).to(tl.float32))[:, None]
    b_x = _row(p_y + H * D, row, d, m, stride, D)
    b_o = _previous(
        p_y + H * D, p_before_k + o_before, row, d, m, begins, stride, steps, H, D, BEFORE
    )
    b_x += b_a * (b_o - b_x)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
    b_x *= tl.load(p_k_scale + o_scale, d < D, other=0.0)[None, :]
    tl.store(p_k + o_out, b_x.to(p_k.dtype.element_ty), m_out)

    b_a = _sigmoid(tl.load(p_logit + 2 * H, m, other=0.0).to(tl.float32))[:, None]
    b_x = _row(p_y + 2 * H * D, row, d, m, stride, D)
    b_o = _previous(
        p_y + 2 * H * D, p_before_v + o_before, row, d, m, begins, stride, steps, H, D, BEFORE
    )
    b_x += b_a * (b_o - b_x)
    tl.store(p_v + o_out, b_x.to(p_v.dtype.element_ty), m_out)

    b_x = _row(p_y + 3 * H * D, row, d, m, stride, D)
    tl.store(p_gate + o_out, b_x.to(p_gate.dtype.element_ty), m_out)


@triton.jit
def _normed_gradient(b_x, b_grad, b_scale, eps, D: tl.constexpr):
    """For y = x / rms(x) * scale: the gradient of x, and each row's term in scale's gradient."""
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
    b_u = b_x * b_r
    b_g = b_grad * b_scale[None, :]
    return b_r * (b_g - b_u * (tl.sum(b_g * b_u, 1) / D)[:, None]), b_grad * b_u


@triton.jit
def _backward(
    p_dq,
    p_dk,
    p_dv,
    p_dlog_f,
    p_dgate,
    p_y,
    p_bias,
    p_q_scale,
    p_k_scale,
    p_start,
    p_before_k,
    p_before_v,
    p_dy,
    p_sums,
    stride,
    rows,
    steps,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    REST: tl.constexpr,
    BEFORE: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of BR rows of y in one head, and their terms in the parameters' gradients.

    The columns of the forget gate's logit, q, k, v, the output gate and the unused rest of y are
    computed in this order. p_sums [G, blocks, H, 2 D + 1] takes the terms, summed over the
    program's rows, of the scale of q, the scale of k and the bias.
    """
    blocks = tl.cdiv(rows, BR)
    i_net = (tl.program_id(0) // blocks).to(tl.int64)
    i_h = tl.program_id(1)
    row = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m = row < rows
    d = tl.arange(0, BD)
    m_d = d < D
    m_out = m[:, None] & m_d[None, :]
    p_y += i_net * rows * stride + i_h * D
    p_dy += i_net * rows * stride + i_h * D
    o_logit = 4 * H * D - i_h * D + i_h + row * stride
    o_dy = row[:, None] * stride + d[None, :]
    p_start += i_net * rows
    o_before = i_net * (rows // steps) * (H * D) + i_h * D
    o_scale = (i_net * H + i_h) * D + d
    o_head = i_net * rows * (H * D) + i_h * D
    p_sums += (tl.program_id(0).to(tl.int64) * H + i_h) * (2 * D + 1)
    to: tl.constexpr = p_dy.dtype.element_ty
    begins = tl.load(p_start + row, m, other=0)
    # Rows whose next row is of the same episode: the shift mixes them into that row's k and v.
    m_next = m & (row % steps < steps - 1)
    m_next = m_next & (tl.load(p_start + row + 1, m_next, other=1) == 0)

    b = tl.load(p_y + o_logit, m, other=0.0).to(tl.float32) + tl.load(p_bias + i_net * H + i_h)
    b = _sigmoid(-b) * tl.load(p_dlog_f + i_net * rows * H + row * H + i_h, m, other=0.0)
    tl.store(p_dy + o_logit, b.to(to), m)
    tl.store(p_sums + 2 * D, tl.sum(b, 0))

    b_scale = tl.load(p_q_scale + o_scale, m_d, other=0.0)
    b_x = _row(p_y, row, d, m, stride, D)
    b_g = _row(p_dq + o_head, row, d, m, H * D, D)
    b_g, b_s = _normed_gradient(b_x, b_g, b_scale, eps, D)
    tl.store(p_dy + o_dy, b_g.to(to), m_out)
    tl.store(p_sums + d, tl.sum(b_s, 0), m_d)

    b_scale = tl.load(p_k_scale + o_scale, m_d, other=0.0)
    b_a = _sigmoid(tl.load(p_y + o_logit + H, m, other=0.0).to(tl.float32))[:, None]
    b_x = _row(p_y + H * D, row, d, m, stride, D)
    b_o = _previous(
        p_y + H * D, p_before_k + o_before, row, d, m, begins, stride, steps, H, D, BEFORE
    )
    b_g = _row(p_dk + o_head, row, d, m, H * D, D)
    b_g, b_s = _normed_gradient(b_x + b_a * (b_o - b_x), b_g, b_scale, eps, D)
    tl.store(p_sums + D + d, tl.sum(b_s, 0), m_d)
    b_l = tl.sum(b_g * (b_o - b_x), 1)[:, None] * b_a * (1.0 - b_a)
    tl.store(p_dy + (o_logit + H)[:, None], b_l.to(to), m[:, None])
    b_g *= 1.0 - b_a
    # k also enters the next row by the shift, so that row's norm is differentiated again here.
    b_a = _sigmoid(tl.load(p_y + o_logit + H + stride, m_next, other=0.0).to(tl.float32))[:, None]
    b_n = _row(p_y + H * D, row + 1, d, m_next, stride, D)
    b_x = b_n + b_a * (b_x - b_n)
    b_n = _row(p_dk + o_head, row + 1, d, m_next, H * D, D)
    b_n, b_s = _normed_gradient(b_x, b_n, b_scale, eps, D)
    b_g += tl.where(m_next[:, None], b_a * b_n, 0.0)
    tl.store(p_dy + H * D + o_dy, b_g.to(to), m_out)

    b_a = _sigmoid(tl.load(p_y + o_logit + 2 * H, m, other=0.0).to(tl.float32))[:, None]
    b_x = _row(p_y + 2 * H * D, row, d, m, stride, D)
    b_o = _previous(
        p_y + 2 * H * D, p_before_v + o_before, row, d, m, begins, stride, steps, H, D, BEFORE
    )
    b_g = _row(p_dv + o_head, row, d, m, H * D, D)
    b_l = tl.sum(b_g * (b_o - b_x), 1)[:, None] * b_a * (1.0 - b_a)
    tl.store(p_dy + (o_logit + 2 * H)[:, None], b_l.to(to), m[:, None])
    b_g *= 1.0 - b_a
    p_next = p_y + o_logit + 2 * H + stride
    b_a = _sigmoid(tl.load(p_next, m_next, other=0.0).to(tl.float32))[:, None]
    b_g += b_a * _row(p_dv + o_head, row + 1, d, m_next, H * D, D)
    tl.store(p_dy + 2 * H * D + o_dy, b_g.to(to), m_out)

    b_g = _row(p_dgate + o_head, row, d, m, H * D, D)
    tl.store(p_dy + 3 * H * D + o_dy, b_g.to(to), m_out)
    for first in range(0, REST, 8):
        rest = first + tl.arange(0, 8)
        o_rest = row[:, None] * stride + (4 * H * D + 3 * H - i_h * D) + rest[None, :]
        m_rest = m[:, None] & (rest < REST)[None, :] & (i_h == 0)
        tl.store(p_dy + o_rest, tl.zeros([BR, 8], to), m_rest)


def _shapes(y, bias, q_scale, k_scale, start, before_k, before_v, eps):
    (rows, steps), (heads, head) = start.shape, q_scale.shape[1:]
    q, k, v, gate = (y.new_empty(rows, steps, heads, head) for _ in range(4))
    return q, k, v, bias.new_empty(rows, steps, heads), gate


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, *grads):
    return *fox_inputs_backward(*grads, *ctx.saved_tensors, ctx.eps), *[None] * 4


@operator("fox_inputs", shapes=_shapes, save=_save, gradient=_gradient)
def fox_inputs(
    y: Tensor,
    bias: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    start: Tensor,
    before_k: Tensor | None,
    before_v: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_f and gate; arguments as in `fox.fox_inputs`, and eps of the norms."""
    nets, batch, steps, stride = y.shape
    heads, head = q_scale.shape[1:]
    _check_size(batch * steps, stride)
    results = _shapes(y, bias, q_scale, k_scale, start, before_k, before_v, eps)
    rows, wide = _block(head, batch * steps)
    _forward[(nets * triton.cdiv(batch * steps, rows), heads)](
        y.contiguous(),
        bias.contiguous(),
        q_scale.contiguous(),
        k_scale.contiguous(),
        start.contiguous(),
        y if before_k is None else before_k.contiguous(),
        y if before_v is None else before_v.contiguous(),
        *results,
        stride,
        batch * steps,
        steps,
        eps,
        H=heads,
        D=head,
        BEFORE=before_k is not None,
        BR=rows,
        BD=wide,
        num_warps=4,
    )
    return results


@operator(
    "fox_inputs_backward",
    shapes=lambda dq, dk, dv, dlog_f, dgate, *inputs: tuple(
        part.new_empty(part.shape) for part in inputs[:4]
    ),
    gradient_of="fox_inputs",
)
def fox_inputs_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_f: Tensor,
    dgate: Tensor,
    y: Tensor,
    bias: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    start: Tensor,
    before_k: Tensor | None,
    before_v: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, bias, q_scale and k_scale."""
    nets, batch, steps, stride = y.shape
    heads, head = q_scale.shape[1:]
    rows, wide = _block(head, batch * steps)
    blocks = triton.cdiv(batch * steps, rows)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    sums = bias.new_empty(nets, blocks, heads, 2 * head + 1)
    _backward[(nets * blocks, heads)](
        dq.contiguous(),
        dk.contiguous(),
        dv.contiguous(),
        dlog_f.contiguous(),
        dgate.contiguous(),
        y.contiguous(),
        bias.contiguous(),
        q_scale.contiguous(),
        k_scale.contiguous(),
        start.contiguous(),
        y if before_k is None else before_k.contiguous(),
        y if before_v is None else before_v.contiguous(),
        dy,
        sums,
        stride,
        batch * steps,
        steps,
        eps,
        H=heads,
        D=head,
        REST=stride - heads * (4 * head + 3),
        BEFORE=before_k is not None,
        BR=rows,
        BD=wide,
        num_warps=4,
    )
    dq_scale, dk_scale, dbias = sums.sum(1).split([head, head, 1], -1)
    return dy, dbias.squeeze(2).clone(), dq_scale.clone(), dk_scale.clone()


def _block(head: int, rows: int) -> tuple[int, int]:
    """Rows and columns of a program; columns are the head's width, up to a power of two."""
    wide = power_of_two(head)
    return min(max(ELEMENTS // wide, 16), power_of_two(rows)), wide


def _check_size(rows: int, stride: int) -> None:
    """Refuses tensors that are too large for 32-bit offsets inside a network."""
    if (rows + 1) * stride >= 2**31:
        raise ValueError(
            f"fox_inputs: {rows} rows of {stride} numbers are too many for one network, fewer than "
            "2^31 numbers fit; split the batch"
        )
