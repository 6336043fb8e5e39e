"""The threshold of pruning that follows from the lengths of the given q and k, in one launch.

A program finds the longest query and the longest key of one head, so that few heads with many rows
do not fill the GPU. The definition, `bounds.measured_bound` and `bounds.limit_of`, takes twelve
launches.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.rows_triton import strides
from cerl.kernels.runtime.blocks import block_size

ROWS, WARPS = 256, 8  # rows of a turn of the loop


@triton.jit
def _longest(p, s_t, count, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """Length of the longest of `count` rows; infinite where one is NaN."""
    d = tl.arange(0, BD)
    b_longest = tl.zeros([BT], tl.float32)
    for first in range(0, count, BT):
        t = first + tl.arange(0, BT)
        o = t[:, None].to(tl.int64) * s_t + d[None, :]
        b = tl.load(p + o, (t < count)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        square = tl.sum(b * b, 1)
        b_longest = tl.maximum(b_longest, tl.where(square == square, square, float("inf")))
    return tl.sqrt(tl.max(b_longest, 0))


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
def _measure(
    p_q,
    p_k,
    p_limits,
    s_q,
    s_k,
    heads,
    queries,
    keys,
    offset,
    factor,
    D: tl.constexpr,
    BD: tl.constexpr,
    GROUPS: tl.constexpr,
    LIMITS: tl.constexpr,
    BT: tl.constexpr,
):
    """Limit n of one batch row and query head: offset - factor |q| |k| / n, from the longest rows.

    p_limits is [LIMITS, B, Hq], for n = 1 and, with two LIMITS, n = 2. Strides s_q and s_k are
    (batch, time, head).
    """
    i = tl.program_id(0)
    i_batch, i_head = (i // heads).to(tl.int64), (i % heads).to(tl.int64)
    q = _longest(p_q + i_batch * s_q[0] + i_head * s_q[2], s_q[1], queries, D, BD, BT)
    k = _longest(p_k + i_batch * s_k[0] + (i_head // GROUPS) * s_k[2], s_k[1], keys, D, BD, BT)
    known = (q < float("inf")) & (k < float("inf"))  # else nothing is skipped
    bound = tl.where(known, q, 0.0) * tl.where(known, k, 0.0)
    for n in tl.static_range(LIMITS):
        limit = offset - factor / (n + 1) * bound
        tl.store(p_limits + n * tl.num_programs(0) + i, tl.where(known, limit, -float("inf")))


def measured_limits(
    q: Tensor, k: Tensor, *, log_eps: float, scale: float, slack: float, count: int
) -> Tensor:
    """log_eps - ln N - 2 U, and with a count of 2 also log_eps - ln N - U: float32 [count, B, Hq].

    U = scale max|q| max|k|; a head with NaN or infinity in q or k gets -inf, which skips nothing.

    Args: q [B, M, Hq, D] and k [B, N, Hkv, D], rows contiguous; scale at least 0; slack, the share
          by which limits are enlarged to make up for rounding (`bounds.SLACK`); count, 1 or 2.
    """
    batch, queries, heads, width = q.shape
    keys, key_heads = k.shape[1:3]
    limits = torch.empty(count, batch, heads, dtype=torch.float32, device=q.device)
    _measure[(batch * heads,)](
        q,
        k,
        limits,
        *strides(q, k),
        heads,
        queries,
        keys,
        float((log_eps - math.log(keys)) * (1.0 + slack)),
        float(2.0 * scale * (1.0 + slack) ** 2),
        D=width,
        BD=block_size(width),
        GROUPS=heads // key_heads,
        LIMITS=count,
        BT=ROWS,
        num_warps=WARPS,
    )
    return limits
