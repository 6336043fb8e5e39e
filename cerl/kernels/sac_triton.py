"""The small computations of soft actor-critic in Triton, defined in `sac.py`.

Each is one launch forward and one backward. A program of `squashed` takes a block of rows, which
are independent. In `regression` and `objective` one program adds up all rows of a critic or member,
in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.runtime.blocks import power_of_two
from cerl.kernels.runtime.operator import operator

ROWS = 64  # most rows of a program of `squashed`
LN2 = tl.constexpr(math.log(2.0))
HALF_LN_TAU = tl.constexpr(0.5 * math.log(2.0 * math.pi))


@triton.jit
def _tanh(x):
    """tanh(x), and exp(-2 |x|)."""
    b_e = tl.exp(-2.0 * tl.abs(x))
    b_t = (1.0 - b_e) / (1.0 + b_e)
    return tl.where(x < 0.0, -b_t, b_t), b_e


@triton.jit
def _sample(p_raw, p_normal, row, a, m, s_seed, per_seed, low, high, A: tl.constexpr, CLIP):
    """What forward and backward need of a block of samples, each [rows, BA].

    Noise; raw log deviation (its tanh unless CLIP); log deviation; deviation; sample before the
    tanh.
    """
    b_mean = tl.load(p_raw + row[:, None] * (2 * A) + a[None, :], m, other=0.0)
    b_raw = tl.load(p_raw + row[:, None] * (2 * A) + (A + a)[None, :], m, other=0.0)
    o_normal = (row // per_seed) * s_seed + (row % per_seed) * A
    b_n = tl.load(p_normal + o_normal[:, None] + a[None, :], m, other=0.0)
    if CLIP:
        b_share = b_raw
        b_log = tl.where(b_raw < low, low, tl.where(b_raw > high, high, b_raw))
    else:
        b_share, _ = _tanh(b_raw)
        b_log = low + (high - low) * (0.5 * (1.0 + b_share))
    b_std = tl.exp(b_log)
    return b_n, b_share, b_log, b_std, b_mean + b_std * b_n


@triton.jit
def _squashed(
    p_raw,
    p_normal,
    p_action,
    p_log_p,
    s_seed,
    per_seed,
    rows,
    low,
    high,
    A: tl.constexpr,
    CLIP: tl.constexpr,
    BR: tl.constexpr,
    BA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    a = tl.arange(0, BA)
    m = (row < rows)[:, None] & (a < A)[None, :]
    b_n, _, b_log, _, b_u = _sample(
        p_raw, p_normal, row, a, m, s_seed, per_seed, low, high, A, CLIP
    )
    b_a, b_e = _tanh(b_u)
    tl.store(p_action + row[:, None] * A + a[None, :], b_a, m)
    # softplus(-2 u) + u = |u| + log(1 + exp(-2 |u|))
    b_jacobian = -2.0 * (tl.abs(b_u) + tl.log(1.0 + b_e) - LN2)
    b_p = -0.5 * b_n * b_n - b_log - HALF_LN_TAU - b_jacobian
    tl.store(p_log_p + row, tl.sum(tl.where(m, b_p, 0.0), 1), row < rows)


@triton.jit
def _squashed_backward(
    p_grad,
    p_grad_log_p,
    p_raw,
    p_normal,
    p_out,
    s_seed,
    per_seed,
    rows,
    low,
    high,
    A: tl.constexpr,
    CLIP: tl.constexpr,
    BR: tl.constexpr,
    BA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    a = tl.arange(0, BA)
    m = (row < rows)[:, None] & (a < A)[None, :]
    b_n, b_share, _, b_std, b_u = _sample(
        p_raw, p_normal, row, a, m, s_seed, per_seed, low, high, A, CLIP
    )
    b_a, _ = _tanh(b_u)
    b_l = tl.load(p_grad_log_p + row, row < rows, other=0.0)[:, None]
    b_g = tl.load(p_grad + row[:, None] * A + a[None, :], m, other=0.0)
    b_g = b_g * (1.0 - b_a * b_a) + 2.0 * b_l * b_a
    b_log = b_g * b_std * b_n - b_l
    if CLIP:
        b_log = tl.where((b_share < low) | (b_share > high), 0.0, b_log)
    else:
        b_log = b_log * (0.5 * (high - low)) * (1.0 - b_share * b_share)
    tl.store(p_out + row[:, None] * (2 * A) + a[None, :], b_g, m)
    tl.store(p_out + row[:, None] * (2 * A) + (A + a)[None, :], b_log, m)


@triton.jit
def _share(p_weight, rows, BR: tl.constexpr):
    """The factor that normalises weights: 1 / max(their sum, 1), or NaN if a weight is NaN."""
    total = tl.zeros([BR], tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        total += tl.load(p_weight + row, row < rows, other=0.0)
    whole = tl.sum(total, 0)
    return 1.0 / tl.where(whole < 1.0, 1.0, whole)


@triton.jit
def _regression(
    p_q,
    p_y,
    p_weight,
    p_out,
    critics,
    shared,
    rows,
    delta,
    J: tl.constexpr,
    HUBER: tl.constexpr,
    BR: tl.constexpr,
    BJ: tl.constexpr,
):
    """Errors of all heads of one critic; `shared` consecutive critics use the same row weights."""
    i = tl.program_id(0).to(tl.int64)
    p_y += (i // critics) * rows * J
    p_weight += (i // shared) * rows
    p_q += i * rows * J
    share = _share(p_weight, rows, BR)
    j = tl.arange(0, BJ)
    total = tl.zeros([BR, BJ], tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        m = (row < rows)[:, None] & (j < J)[None, :]
        o = row[:, None] * J + j[None, :]
        b_w = tl.load(p_weight + row, row < rows, other=0.0) * share
        b_e = tl.load(p_q + o, m, other=0.0) - tl.load(p_y + o, m, other=0.0)
        b_loss = b_e * b_e
        if HUBER:
            b_size = tl.abs(b_e)
            b_far = delta * (2.0 * b_size - delta)
            b_loss = tl.where((j > 0)[None, :] & (b_size > delta), b_far, b_loss)
        total += b_loss * b_w[:, None]
    tl.store(p_out + i * J + j, tl.sum(total, 0), j < J)


@triton.jit
def _regression_backward(
    p_grad,
    p_q,
    p_y,
    p_weight,
    p_out,
    s_seed,
    s_member,
    s_critic,
    s_head,
    members,
    critics,
    shared,
    rows,
    delta,
    J: tl.constexpr,
    HUBER: tl.constexpr,
    BR: tl.constexpr,
    BJ: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_member, i_critic = i // critics, i % critics
    p_y += i_member * rows * J
    p_weight += (i // shared) * rows
    p_q += i * rows * J
    p_out += i * rows * J
    p_grad += (i_member // members) * s_seed + (i_member % members) * s_member
    share = _share(p_weight, rows, BR)
    j = tl.arange(0, BJ)
    b_g = tl.load(p_grad + i_critic * s_critic + j * s_head, j < J, other=0.0)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        m = (row < rows)[:, None] & (j < J)[None, :]
        o = row[:, None] * J + j[None, :]
        b_w = tl.load(p_weight + row, row < rows, other=0.0) * share
        b_e = tl.load(p_q + o, m, other=0.0) - tl.load(p_y + o, m, other=0.0)
        if HUBER:
            b_far = tl.where(b_e > delta, delta, tl.where(b_e < -delta, -delta, b_e))
            b_e = tl.where((j > 0)[None, :], b_far, b_e)
        tl.store(p_out + o, 2.0 * b_e * b_w[:, None] * b_g[None, :], m)


@triton.jit
def _value(p_q, row, m, rows, C: tl.constexpr, MEAN: tl.constexpr):
    """Value of a row by C critics, NaN if one of them is; and how many critics it comes from.

    MEAN: their mean, from all C; else the least, from those that are equal to it.
    """
    b_v = tl.load(p_q + row, m, other=0.0)
    for c in tl.static_range(1, C):
        b_q = tl.load(p_q + c * rows + row, m, other=0.0)
        b_v = b_v + b_q if MEAN else tl.minimum(b_v, b_q, propagate_nan=tl.PropagateNan.ALL)
    if MEAN:
        return b_v / C, tl.full(row.shape, C, tl.float32)
    b_count = tl.zeros(row.shape, tl.float32)
    for c in tl.static_range(C):
        b_count += tl.where(tl.load(p_q + c * rows + row, m, other=0.0) == b_v, 1.0, 0.0)
    return b_v, b_count


@triton.jit
def _objective(
    p_q,
    p_log_p,
    p_log_alpha,
    p_weight,
    p_actor,
    p_temperature,
    p_entropy,
    p_value,
    shared,
    rows,
    goal,
    C: tl.constexpr,
    MEAN: tl.constexpr,
    BR: tl.constexpr,
):
    """Losses of one member; `shared` consecutive members use the same row weights."""
    i = tl.program_id(0).to(tl.int64)
    p_q += i * C * rows
    p_log_p += i * rows
    p_weight += (i // shared) * rows
    share = _share(p_weight, rows, BR)
    values = tl.zeros([BR], tl.float32)
    logs = tl.zeros([BR], tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        m = row < rows
        b_w = tl.load(p_weight + row, m, other=0.0) * share
        b_v, _ = _value(p_q, row, m, rows, C, MEAN)
        values += b_v * b_w
        logs += tl.load(p_log_p + row, m, other=0.0) * b_w
    value, log_p = tl.sum(values, 0), tl.sum(logs, 0)
    alpha = tl.exp(tl.load(p_log_alpha + i))
    tl.store(p_actor + i, alpha * log_p - value)
    tl.store(p_temperature + i, alpha * (-log_p - goal))
    tl.store(p_entropy + i, -log_p)
    tl.store(p_value + i, value)


@triton.jit
def _objective_backward(
    p_grad,
    p_grad_temperature,
    p_temperature,
    p_q,
    p_log_alpha,
    p_weight,
    p_out_q,
    p_out_log_p,
    p_out_log_alpha,
    s_seed,
    s_member,
    s_seed_temperature,
    s_member_temperature,
    members,
    shared,
    rows,
    C: tl.constexpr,
    MEAN: tl.constexpr,
    BR: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_seed, i_member = i // members, i % members
    p_q += i * C * rows
    p_out_q += i * C * rows
    p_weight += (i // shared) * rows
    share = _share(p_weight, rows, BR)
    grad = tl.load(p_grad + i_seed * s_seed + i_member * s_member)
    alpha = tl.exp(tl.load(p_log_alpha + i))
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        m = row < rows
        b_g = tl.load(p_weight + row, m, other=0.0) * share * grad
        tl.store(p_out_log_p + i * rows + row, b_g * alpha, m)
        b_v, b_count = _value(p_q, row, m, rows, C, MEAN)
        for c in tl.static_range(C):
            b_part = -b_g / b_count
            if not MEAN:
                b_q = tl.load(p_q + c * rows + row, m, other=0.0)
                b_part = tl.where(b_q > b_v, 0.0, b_part)
            tl.store(p_out_q + c * rows + row, b_part, m)
    o_temperature = i_seed * s_seed_temperature + i_member * s_member_temperature
    below = tl.load(p_grad_temperature + o_temperature)
    tl.store(p_out_log_alpha + i, below * tl.load(p_temperature + i))


def _samples(raw: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, int, tuple[int], dict]:
    """Arguments of a launch over samples: contiguous tensors, number of rows, grid and sizes."""
    raw = raw.contiguous()
    if not normal[0].is_contiguous():
        normal = normal.contiguous()
    rows, actions = normal.shape[:-1].numel(), normal.shape[-1]
    block = min(ROWS, power_of_two(rows))
    sizes = {"A": actions, "BR": block, "BA": power_of_two(actions), "num_warps": 2}
    return raw, normal, rows, (-(-rows // block),), sizes


def _save_squashed(ctx, inputs, output) -> None:
    raw, normal, *ctx.options = inputs
    ctx.save_for_backward(raw, normal)


def _squashed_gradient(ctx, grad, grad_log_p):
    return squashed_backward(grad, grad_log_p, *ctx.saved_tensors, *ctx.options), *[None] * 4


@operator(
    "squashed",
    shapes=lambda raw, normal, low, high, clip: (
        raw.new_empty(normal.shape),
        raw.new_empty(normal.shape[:-1]),
    ),
    save=_save_squashed,
    gradient=_squashed_gradient,
)
def squashed(
    raw: Tensor, normal: Tensor, low: float, high: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """`cerl.kernels.sac.squashed` in one launch."""
    raw, normal, rows, grid, sizes = _samples(raw, normal)
    action, log_p = raw.new_empty(normal.shape), raw.new_empty(normal.shape[:-1])
    per_seed, stride = rows // raw.shape[0], normal.stride(0)
    _squashed[grid](
        raw, normal, action, log_p, stride, per_seed, rows, low, high, CLIP=clip, **sizes
    )
    return action, log_p


@operator(
    "squashed_backward",
    shapes=lambda grad, grad_log_p, raw, normal, low, high, clip: raw.new_empty(raw.shape),
    gradient_of="squashed",
)
def squashed_backward(
    grad: Tensor,
    grad_log_p: Tensor,
    raw: Tensor,
    normal: Tensor,
    low: float,
    high: float,
    clip: bool,
) -> Tensor:
    """Gradient of raw in `squashed`, [S, N, rows, 2 A]."""
    raw, normal, rows, grid, sizes = _samples(raw, normal)
    out = torch.empty_like(raw)
    _squashed_backward[grid](
        grad.contiguous(),
        grad_log_p.contiguous(),
        raw,
        normal,
        out,
        normal.stride(0),
        rows // raw.shape[0],
        rows,
        low,
        high,
        CLIP=clip,
        **sizes,
    )
    return out


def _save_regression(ctx, inputs, output) -> None:
    *tensors, ctx.delta = inputs
    ctx.save_for_backward(*tensors)


def _regression_gradient(ctx, grad):
    return regression_backward(grad, *ctx.saved_tensors, ctx.delta), None, None, None


@operator(
    "regression",
    shapes=lambda q, y, weight, delta: q.new_empty(*q.shape[:3], q.shape[4]),
    save=_save_regression,
    gradient=_regression_gradient,
)
def regression(q: Tensor, y: Tensor, weight: Tensor, delta: float) -> Tensor:
    """`cerl.kernels.sac.regression` in one launch, with one program for each critic."""
    seeds, members, critics, rows, heads = q.shape
    out = q.new_empty(seeds, members, critics, heads)
    _regression[(seeds * members * critics,)](
        q.contiguous(),
        y.contiguous(),
        weight.contiguous(),
        out,
        critics,
        members // weight.shape[1] * critics,
        rows,
        delta,
        J=heads,
        HUBER=delta > 0,
        BR=min(128, power_of_two(rows)),
        BJ=power_of_two(heads),
    )
    return out


@operator(
    "regression_backward",
    shapes=lambda grad, q, y, weight, delta: q.new_empty(q.shape),
    gradient_of="regression",
)
def regression_backward(grad: Tensor, q: Tensor, y: Tensor, weight: Tensor, delta: float) -> Tensor:
    """Gradient of q in `regression`, [S, N, C, rows, J]."""
    seeds, members, critics, rows, heads = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _regression_backward[(seeds * members * critics,)](
        grad,
        q.contiguous(),
        y.contiguous(),
        weight.contiguous(),
        out,
        *grad.stride(),
        members,
        critics,
        members // weight.shape[1] * critics,
        rows,
        delta,
        J=heads,
        HUBER=delta > 0,
        BR=min(128, power_of_two(rows)),
        BJ=power_of_two(heads),
    )
    return out


def _save_objective(ctx, inputs, output) -> None:
    q, _, log_alpha, weight, _, ctx.mean = inputs
    ctx.save_for_backward(output[1], q, log_alpha, weight)
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _objective_gradient(ctx, grad, grad_temperature, *_):
    zero = torch.zeros_like
    grad = zero(ctx.saved_tensors[0]) if grad is None else grad
    below = zero(grad) if grad_temperature is None else grad_temperature
    grads = objective_backward(grad, below, *ctx.saved_tensors, ctx.mean)
    return *grads, None, None, None


@operator(
    "objective",
    shapes=lambda q, log_p, log_alpha, weight, goal, mean: tuple(
        q.new_empty(q.shape[:2]) for _ in range(4)
    ),
    save=_save_objective,
    gradient=_objective_gradient,
)
def objective(
    q: Tensor, log_p: Tensor, log_alpha: Tensor, weight: Tensor, goal: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cerl.kernels.sac.objective` in one launch, with one program for each member."""
    seeds, members, critics, rows = q.shape
    actor, temperature, entropy, value = (q.new_empty(seeds, members) for _ in range(4))
    _objective[(seeds * members,)](
        q.contiguous(),
        log_p.contiguous(),
        log_alpha.contiguous(),
        weight.contiguous(),
        actor,
        temperature,
        entropy,
        value,
        members // weight.shape[1],
        rows,
        goal,
        C=critics,
        MEAN=mean,
        BR=min(256, power_of_two(rows)),
    )
    return actor, temperature, entropy, value


def _objective_backward_shapes(
    grad, grad_temperature, temperature, q, log_alpha, weight, mean
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*q.shape[:2], q.shape[3])
    return q.new_empty(q.shape), q.new_empty(rows), q.new_empty(log_alpha.shape)


@operator("objective_backward", shapes=_objective_backward_shapes, gradient_of="objective")
def objective_backward(
    grad: Tensor,
    grad_temperature: Tensor,
    temperature: Tensor,
    q: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, log_p and log_alpha in `objective`."""
    seeds, members, critics, rows = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out_log_p, out_log_alpha = q.new_empty(seeds, members, rows), q.new_empty(log_alpha.shape)
    _objective_backward[(seeds * members,)](
        grad,
        grad_temperature,
        temperature,
        q.contiguous(),
        log_alpha.contiguous(),
        weight.contiguous(),
        out,
        out_log_p,
        out_log_alpha,
        *grad.stride(),
        *grad_temperature.stride(),
        members,
        members // weight.shape[1],
        rows,
        C=critics,
        MEAN=mean,
        BR=min(256, power_of_two(rows)),
    )
    return out, out_log_p, out_log_alpha
