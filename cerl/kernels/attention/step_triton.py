"""One step of forgetting attention in Triton: append and attend in one launch.

A program owns one key head of one batch row with its query heads and its part of the cache, so that
no program waits for another. It walks back from the newest key to the oldest one that pruning
keeps, BN keys a round. Each of these BN places keeps a running softmax of its own; they are merged
once, at the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.scan_triton import LOG2E
from cerl.kernels.runtime.blocks import block_size, power_of_two


class Launch(NamedTuple):
    """Block size of a step, which has one query a head; unlike `launch.Launch` without rows."""

    columns: int  # keys a round of the loop
    warps: int
    stages: int  # rounds that are computed or being loaded at the same time


# Keyed by (padded width, bytes of an element), for one query head a key head. Chosen so that, with
# triton 3.6 for sm_90, no registers spill, a multiprocessor holds at least four programs, and each
# program has 32 KiB of loads under way.
CONFIGS: dict[tuple[int, int], Launch] = {
    (16, 2): Launch(128, 4, 5),
    (32, 2): Launch(64, 4, 5),
    (64, 2): Launch(32, 4, 5),
    (128, 2): Launch(16, 4, 5),
    (16, 4): Launch(128, 4, 3),
    (32, 4): Launch(64, 4, 3),
    (64, 4): Launch(32, 4, 3),
    (128, 4): Launch(16, 4, 3),
}


@triton.jit
def _two_sum(hi, lo, x):
    """(hi + lo) + x in two floats."""
    total = hi + x
    part = total - hi
    lo += (hi - (total - part)) + (x - part)
    rounded = total + lo
    return rounded, lo - (rounded - total)


@triton.jit
def _read_decay(p_decay, slot, ring, m):
    """Both parts of the sums in these slots."""
    return tl.load(p_decay + slot, m, other=0.0), tl.load(p_decay + ring + slot, m, other=0.0)


@triton.jit
def _decay_of(p_decay, sums, slot, age, ring, m):
    """Slots [1, N] of the keys of these ages, and D from them to the newest key [BG, N].

    From a key of the lap before, D is what the sum of that lap gained after the key plus the sum of
    this lap so far.
    """
    high, low, total_high, total_low = sums
    at = slot - age[None, :]
    before = at < 0
    at = tl.where(before, at + ring, at)
    b_high, b_low = _read_decay(p_decay, at, ring, m)
    b_decay = tl.where(before, total_high, high) - b_high
    b_decay += tl.where(before, total_low, low) - b_low
    return at, b_decay + tl.where(before, high, 0.0)


@triton.jit(do_not_specialize=["heads", "ring", "window"])
def _step(
    p_q,
    p_k,
    p_v,
    p_log_f,
    p_start,
    p_keys,
    p_values,
    p_decay,
    p_norm,
    p_position,
    p_length,
    p_o,
    s_q,
    s_k,
    s_v,
    s_f,
    s_sb,
    heads,
    ring,
    window,
    scale,
    log_eps,
    G: tl.constexpr,
    BG: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRUNE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLACK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Appends the new key of one key head to the cache, and attends with its G query heads.

    Tuples of strides are (batch, head).
    """
    i_pair = tl.program_id(0)
    i_b, i_h = (i_pair // heads).to(tl.int64), i_pair % heads
    i_pair = i_pair.to(tl.int64)
    p_keys += i_pair * ring * D
    p_values += i_pair * ring * D
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    m_g, m_d = g < G, d < D
    p_decay += (i_pair * G * 2 * ring + g * (2 * ring))[:, None]  # [BG, 1]
    p_length += i_pair * G + g

    slot = tl.load(p_position + i_pair)
    start = tl.load(p_start + i_b * s_sb).to(tl.int1)
    b_f = tl.load(p_log_f + i_b * s_f[0] + (i_h * G + g) * s_f[1], m_g, other=0.0)
    length = tl.load(p_length, m_g, other=0)
    norm = tl.load(p_norm + i_pair)
    b_q = tl.load(
        p_q + i_b * s_q[0] + (i_h * G + g)[:, None] * s_q[1] + d[None, :],
        m_g[:, None] & m_d[None, :],
        other=0.0,
    ).to(tl.float32)
    b_new_k = tl.load(p_k + i_b * s_k[0] + i_h * s_k[1] + d, m_d, other=0.0)
    b_new_v = tl.load(p_v + i_b * s_v[0] + i_h * s_v[1] + d, m_d, other=0.0)

    length = tl.where(start | (b_f == float("-inf")), 0, length)
    old = tl.minimum(length, window - 1)  # ages 1 to `old` are seen
    m_old, m_lap = (m_g & (length > 0))[:, None], (m_g & (slot > 0) & (length > 0))[:, None]
    high, low = _read_decay(p_decay, tl.maximum(slot - 1, 0), ring, m_lap)
    high, low = _two_sum(high, low, tl.where(m_old, b_f[:, None], 0.0))
    total_high, total_low = _read_decay(p_decay, ring - 1, ring, m_old & (old > slot)[:, None])
    sums = high, low, total_high, total_low

    if PRUNE:  # loaded before the threshold is computed, so that both waits overlap
        ends = (1 + tl.arange(0, BLOCKS)) * BLOCK  # ages of the newest keys of blocks
        m_ends = ends[None, :] <= old[:, None]
        _, b_ends = _decay_of(p_decay, sums, slot, ends, ring, m_ends)

    b_key, b_value = b_new_k.to(tl.float32), b_new_v.to(tl.float32)
    norm = tl.where(start, 0.0, norm)
    norm = tl.maximum(norm, tl.sqrt(tl.sum(b_key * b_key)), propagate_nan=tl.PropagateNan.ALL)
    if PRUNE:
        b_bound = tl.sqrt(tl.sum(b_q * b_q, 1)) * norm * tl.abs(scale)
        b_threshold = log_eps - tl.log((old + 1).to(tl.float32)) - 2.0 * b_bound
        m_below = b_ends < (b_threshold * (1.0 + SLACK))[:, None]  # false for NaN: it is read
        # D falls with age, so that the blocks that are kept are the newest ones.
        blocks = tl.sum((m_ends & (m_below == 0)).to(tl.int32), 1)
        old = tl.minimum(old, blocks * BLOCK + BLOCK - 1)

    # All places begin with the score of the new key as their maximum; place 0 alone counts the key.
    b_q *= scale * LOG2E
    b_score = tl.sum(b_q * b_key[None, :], 1)[:, None]
    m_place = (tl.arange(0, BN) == 0)[None, :]
    b_max = tl.zeros([BG, BN], tl.float32) + b_score
    b_sum = tl.zeros([BG, BN], tl.float32) + tl.where(m_place, 1.0, 0.0)
    b_o = tl.zeros([BG, BN, BD], tl.float32)
    b_o += tl.where(m_place[:, :, None], b_value[None, None, :], 0.0)
    oldest = tl.max(old)
    for begin in tl.range(1, oldest + 1, BN, num_stages=STAGES):
        age = begin + tl.arange(0, BN)
        m_seen = age[None, :] <= old[:, None]
        at, b_decay = _decay_of(p_decay, sums, slot, age, ring, m_seen)
        o_row = tl.reshape(at, [1, BN, 1]) * D + d[None, None, :]
        m_row = (age <= oldest)[None, :, None] & m_d[None, None, :]
        b_k = tl.load(p_keys + o_row, m_row, other=0.0).to(tl.float32)
        b_v = tl.load(p_values + o_row, m_row, other=0.0).to(tl.float32)
        b_s = tl.sum(b_q[:, None, :] * b_k, 2) + b_decay * LOG2E
        b_s = tl.where(m_seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, b_s)
        b_p, b_shrink = tl.exp2(b_s - b_new), tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + b_p
        b_o = b_o * b_shrink[:, :, None] + b_p[:, :, None] * b_v
        b_max = b_new
    b_weight = tl.exp2(b_max - tl.max(b_max, 1)[:, None])
    b_o = tl.sum(b_o * b_weight[:, :, None], 1) / tl.sum(b_sum * b_weight, 1)[:, None]

    tl.debug_barrier()  # all warps have read the parts of the cache that are written below
    o_o = (i_pair * G + g)[:, None] * D + d[None, :]
    tl.store(p_o + o_o, b_o.to(p_o.dtype.element_ty), m_g[:, None] & m_d[None, :])
    tl.store(p_keys + slot * D + d, b_new_k, m_d)
    tl.store(p_values + slot * D + d, b_new_v, m_d)
    tl.store(p_decay + slot, high, m_g[:, None])
    tl.store(p_decay + ring + slot, low, m_g[:, None])
    tl.store(p_norm + i_pair, norm)
    tl.store(p_position + i_pair, tl.where(slot + 1 < ring, slot + 1, 0))
    tl.store(p_length, tl.minimum(length + 1, ring), m_g)


def config(width: int, itemsize: int, group: int) -> Launch:
    """The table's launch, with smaller blocks where `group` query heads share a key head.

    The accumulators of all of them are held in registers; more than 8 heads of 64 spill.
    """
    columns, warps, stages = CONFIGS[width, itemsize]
    return Launch(max(columns // group, 16), warps if group * width <= 512 else 8, stages)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    norm: Tensor,
    position: Tensor,
    length: Tensor,
    *,
    window: int,
    log_eps: float | None,
    scale: float,
    block: int,
    slack: float,
    launch: Launch | None = None,
) -> Tensor:
    """One launch of a step as in `step.definition`; writes the cache.

    Args:    as checked by `forgetting_attention_step`, rows of q, k and v contiguous; block and
             slack are BLOCK and SLACK of the definition; launch replaces the table's choice.
    Returns: o [B, Hq, D] contiguous.
    """
    (batch, heads, width), (key_heads, ring) = q.shape, keys.shape[1:3]
    group, padded = heads // key_heads, block_size(width)
    launch = launch or config(padded, q.element_size(), power_of_two(group))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _step[(batch * key_heads,)](
        q,
        k,
        v,
        log_f,
        start,
        keys,
        values,
        decay,
        norm,
        position,
        length,
        o,
        q.stride()[:2],
        k.stride()[:2],
        v.stride()[:2],
        log_f.stride(),
        start.stride(0),
        key_heads,
        ring,
        window,
        scale,
        log_eps or 0.0,
        G=group,
        BG=power_of_two(group),
        D=width,
        BD=padded,
        PRUNE=log_eps is not None,
        BLOCK=block,
        SLACK=slack,
        BLOCKS=power_of_two(max(ring // block, 1)),
        BN=launch.columns,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return o
