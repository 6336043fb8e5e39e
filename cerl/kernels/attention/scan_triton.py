"""Scans of the gates along a sequence, in Triton: decayed sums, tiles to visit, gate gradients.

The first scan goes forward, in two floats, and finds the first key that every position sees and the
tiles that may be skipped. The second goes backward, from the last position, and adds up gradients.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.plan import CHUNK, Plan
from cerl.kernels.runtime.overlap import follow, overlap

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
PAST: tl.constexpr = tl.constexpr(CHUNK)  # buffers of positions are a multiple of it


@triton.jit
def append(a_left, a_hi, a_lo, b_left, b_hi, b_lo):
    """Sum of run a and the run b after it, in two floats; a reset in b (left >= 0) drops a."""
    total = a_hi + b_hi
    part = total - a_hi
    rest = (a_hi - (total - part)) + (b_hi - part)
    fresh = b_left >= 0
    return (
        tl.where(fresh, b_left, a_left),
        tl.where(fresh, b_hi, total),
        tl.where(fresh, b_lo, a_lo + b_lo + rest),
    )


@triton.jit
def append_before(a_stop, a_sum, b_stop, b_sum):
    """Sum of run b and the later run a, of a scan in reverse; a stop in b drops a."""
    return a_stop | b_stop, tl.where(b_stop != 0, b_sum, a_sum + b_sum)


@triton.jit
def at(x, index, place):
    """The entries of x at `place` of its first axis, whose index is given in broadcast form."""
    return tl.sum(tl.where(index == place, x, 0), 0)


@triton.jit
def resets(p_log_f, p_start, t, keys, s_ft, s_st, STARTS: tl.constexpr):
    """log_f at t, and whether an episode of this head begins there."""
    inside = (t >= 0) & (t < keys)
    b_f = tl.load(p_log_f + t * s_ft, mask=inside, other=0.0)
    m_reset = (b_f == float("-inf")) | (t == 0)
    if STARTS:
        m_reset |= tl.load(p_start + t * s_st, mask=inside, other=0).to(tl.int1)
    return b_f, m_reset & inside


@triton.jit
def sum_pointers(p_decay, i_pair, pairs, length):
    """Pointers to the decayed sums of a head, high and low parts, and to their fall."""
    p_high = p_decay + i_pair.to(tl.int64) * length
    p_low = p_high + pairs.to(tl.int64) * length
    return p_high, p_low, p_low + pairs.to(tl.int64) * length


@triton.jit
def load_decay(p_high, p_low, t):
    """High and low part of the decayed sums at t."""
    return tl.load(p_high + t), tl.load(p_low + t)


@triton.jit
def _decayed(hi_i, lo_i, hi_j, lo_j, threshold):
    """[i, j]: whether D from key j to query i is below the threshold."""
    return (hi_i[:, None] - hi_j[None, :]) + (lo_i[:, None] - lo_j[None, :]) < threshold


@triton.jit
def _first_tiles(
    p_high,
    p_low,
    threshold,
    first,
    lowest,
    begin,
    hi_i,
    lo_i,
    hi_j,
    lo_j,
    TILES: tl.constexpr,
    PN: tl.constexpr,
):
    """The first key tile that each of TILES query tiles visits.

    Query tile n begins in key tile `begin` + n; hi_i and lo_i are the sums at its first query, hi_j
    and lo_j those at the last key of key tile `begin` + n. The tile sees no key before key tile
    `first`, and earlier query tiles skipped all before `lowest`, so that this one does too. D only
    falls with distance: the tiles skipped are the first ones, and their count says where they end.
    """
    tile = tl.arange(0, TILES)
    first = tl.maximum(first, lowest)
    m_tile = (tile[None, :] < tile[:, None]) & ((begin + tile)[None, :] >= first[:, None])
    skipped = tl.sum((m_tile & _decayed(hi_i, lo_i, hi_j, lo_j, threshold)).to(tl.int32), 1)
    for base in range(lowest, begin, TILES):
        far = base + tile
        m_tile = (far < begin)[None, :] & (far[None, :] >= first[:, None])
        b_high, b_low = load_decay(p_high, p_low, tl.minimum(far, begin - 1) * PN + PN - 1)
        skipped += tl.sum((m_tile & _decayed(hi_i, lo_i, b_high, b_low, threshold)).to(tl.int32), 1)
    return first + skipped


# Strides of gates are not in a tuple, where Triton would specialise them (`rows_triton.strides`).
@triton.jit(
    do_not_specialize=[
        "s_fb",
        "s_ft",
        "s_fh",
        "s_sb",
        "s_st",
        "pairs",
        "heads",
        "queries",
        "keys",
        "length",
        "window",
    ]
)
def _prepare(
    p_log_f,
    p_start,
    p_threshold,
    p_decay,
    p_left,
    p_count,
    s_fb,
    s_ft,
    s_fh,
    s_sb,
    s_st,
    pairs,
    heads,
    queries,
    keys,
    length,
    window,
    STARTS: tl.constexpr,
    PRUNE: tl.constexpr,
    PN: tl.constexpr,
    BLOCK: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Stores the sums, falls and first keys of one head, and counts the tiles not visited.

    A turn of the loop takes BR runs of BS positions. The fall of a position is the decay, in base
    2, from there to the last position of its BLOCK. A tile of PN queries visits the key tiles from
    the first key of its first row on; that key is moved past the tiles that are pruned.
    """
    follow(OVERLAP)
    i_pair = tl.program_id(0).to(tl.int64)
    length = length // PAST * PAST  # tells the compiler that it is a multiple
    p_log_f += (i_pair // heads) * s_fb + (i_pair % heads) * s_fh
    p_start += (i_pair // heads) * s_sb
    p_high, p_low, p_fall = sum_pointers(p_decay, i_pair, pairs, length)
    p_left += i_pair * length
    threshold = 0.0
    if PRUNE:
        threshold = tl.minimum(tl.load(p_threshold + i_pair), 0.0)
    # A thread holds whole runs of BS positions, so that threads exchange only the totals of runs.
    step, run = tl.arange(0, BS)[:, None], tl.arange(0, BR)
    last_run = run | (BLOCK // BS - 1)  # the last run of the block that a run is in
    tile = tl.arange(0, BS * BR // PN)
    offset = keys - queries
    left, high, low = tl.program_id(0) * 0, 0.0, 0.0
    lowest, count = left, left
    for begin in range(0, keys, BS * BR):
        t = begin + run[None, :] * BS + step
        b_f, m_reset = resets(p_log_f, p_start, t, keys, s_ft, s_st, STARTS)
        b_f = tl.where(m_reset, 0.0, b_f)
        b_left = tl.where(m_reset, t, -1)
        b_left, b_high, b_low = tl.associative_scan((b_left, b_f, b_f * 0.0), 0, append)
        # Totals up to the end of each run: the carry of earlier turns, then the runs of this one.
        e_left, e_high, e_low = tl.associative_scan(
            (at(b_left, step, BS - 1), at(b_high, step, BS - 1), at(b_low, step, BS - 1)), 0, append
        )
        e_left, e_high, e_low = append(left, high, low, e_left, e_high, e_low)
        before = tl.maximum(run - 1, 0)
        a_left = tl.where(run == 0, left, tl.gather(e_left, before, 0))[None, :]
        a_high = tl.where(run == 0, high, tl.gather(e_high, before, 0))[None, :]
        a_low = tl.where(run == 0, low, tl.gather(e_low, before, 0))[None, :]
        left, high, low = at(e_left, run, BR - 1), at(e_high, run, BR - 1), at(e_low, run, BR - 1)
        b_left, b_high, b_low = append(a_left, a_high, a_low, b_left, b_high, b_low)
        b_sum = b_high + b_low
        b_low = b_low - (b_sum - b_high)
        b_left = tl.maximum(b_left, t - window + 1)
        e_high, e_low = at(b_sum, step, BS - 1), at(b_low, step, BS - 1)
        f_high = tl.gather(e_high, last_run, 0)[None, :]
        f_low = tl.gather(e_low, last_run, 0)[None, :]
        inside = t < length
        tl.store(p_high + t, b_sum, mask=inside)
        tl.store(p_low + t, b_low, mask=inside)
        tl.store(p_fall + t, ((f_high - b_sum) + (f_low - b_low)) * LOG2E, mask=inside)
        tl.store(p_left + t, b_left, mask=inside)
        # Key tiles are counted from position 0 and query tiles from the first query, so that one
        # query tile begins in every key tile, always at the same place in it.
        place = offset % PN
        i0 = begin + tile * PN + place
        i_run, j_run = (tile * PN + place) // BS, (tile * PN + PN - 1) // BS
        i_left = tl.gather(at(b_left, step, place % BS), i_run, 0)
        first = i_left // PN
        m_tile = (i0 >= offset) & (i0 < keys)
        if PRUNE:
            hi_i = tl.gather(at(b_sum, step, place % BS), i_run, 0)
            lo_i = tl.gather(at(b_low, step, place % BS), i_run, 0)
            hi_j, lo_j = tl.gather(e_high, j_run, 0), tl.gather(e_low, j_run, 0)
            first = _first_tiles(
                p_high,
                p_low,
                threshold,
                first,
                lowest,
                begin // PN,
                hi_i,
                lo_i,
                hi_j,
                lo_j,
                BS * BR // PN,
                PN,
            )
            lowest = tl.maximum(lowest, tl.max(tl.where(m_tile, first, 0)))
            # All threads must have stored what stands above: the next turn loads the sums, and the
            # next store overwrites parts of p_left.
            tl.debug_barrier()
            tl.store(p_left + i0, tl.maximum(i_left, first * PN), mask=m_tile)
        count += tl.sum(tl.where(m_tile, first, 0))
    # Kernels load whole blocks, also past the end: there sums keep their last value.
    t = tl.cdiv(keys, BS * BR) * (BS * BR) + tl.arange(0, PAST)
    inside = t < length
    tl.store(p_high + t, high + low, mask=inside)
    tl.store(p_low + t, low - ((high + low) - high), mask=inside)
    tl.store(p_fall + t, 0.0, mask=inside)
    tl.store(p_left + t, tl.maximum(left, t - window + 1), mask=inside)
    tl.store(p_count + i_pair, count.to(tl.float32))


# Strides of gates are not in a tuple, where Triton would specialise them (`rows_triton.strides`).
@triton.jit(
    do_not_specialize=[
        "s_ft",
        "s_fb",
        "s_fh",
        "s_sb",
        "s_st",
        "s_lb",
        "s_lt",
        "s_lh",
        "heads",
        "queries",
        "keys",
        "length",
    ]
)
def _gates(
    p_log_f,
    p_start,
    p_dlse,
    p_column,
    p_dlog_f,
    s_ft,
    s_fb,
    s_fh,
    s_sb,
    s_st,
    s_lb,
    s_lt,
    s_lh,
    heads,
    queries,
    keys,
    length,
    STARTS: tl.constexpr,
    DLSE: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dlog_f at t: row sums of dS (dlse) less its column sums, from t to the end of the episode.

    BR runs of BS positions at a time, from the last ones on.
    """
    follow(OVERLAP)
    i_pair = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_pair // heads, i_pair % heads
    p_log_f += i_b * s_fb + i_h * s_fh
    p_start += i_b * s_sb
    p_dlse += i_b * s_lb + i_h * s_lh
    length = length // PAST * PAST  # tells the compiler that it is a multiple
    p_column += i_pair * length
    p_dlog_f += i_b * keys * heads + i_h
    offset = keys - queries
    step, run = tl.arange(0, BS)[:, None], tl.arange(0, BR)
    chunks = tl.cdiv(keys, BS * BR)
    carry = 0.0
    for chunk in range(chunks):
        t = (chunks - 1 - chunk) * (BS * BR) + run[None, :] * BS + step
        inside = t < keys
        b_sum = -tl.load(p_column + t, mask=t < length, other=0.0)
        if DLSE:
            m_row = inside & (t >= offset)
            b_sum += tl.load(p_dlse + (t - offset) * s_lt, mask=m_row, other=0.0)
        _, m_reset = resets(p_log_f, p_start, t, keys, s_ft, s_st, STARTS)
        # A gate at a reset has no gradient, and no gradient passes from there to earlier gates.
        b_sum = tl.where(m_reset | (t >= keys), 0.0, b_sum)
        b_stop, b_sum = tl.associative_scan(
            (m_reset.to(tl.int32), b_sum), 0, append_before, reverse=True
        )
        # Totals from each run on: the runs of this turn, then the carry of later positions.
        e_stop, e_sum = tl.associative_scan(
            (at(b_stop, step, 0), at(b_sum, step, 0)), 0, append_before, reverse=True
        )
        e_sum += tl.where(e_stop != 0, 0.0, carry)
        after = tl.gather(e_sum, tl.minimum(run + 1, BR - 1), 0)
        after = tl.where(run == BR - 1, carry, after)[None, :]
        carry = at(e_sum, run, 0)
        b_sum += tl.where(b_stop != 0, 0.0, after)
        tl.store(p_dlog_f + t * heads, b_sum, mask=inside)


class Scan(NamedTuple):
    """How many positions a program scans at a time: steps times runs."""

    steps: int  # positions of a run, which one thread adds up
    runs: int


def scan(keys: int) -> Scan:
    """512, 1024 or 4096 keys at a time; a run divides the smallest block, 32."""
    return Scan(2, 256) if keys <= 512 else Scan(4, 256) if keys <= 1024 else Scan(8, 512)


def prepare(
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    *,
    plan: Plan,
    queries: int,
    window: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed sums, the first key that each position visits, and how many tiles are not visited.

    Args:    log_f [B, N, Hq]; start [B, N] uint8 or bool; threshold [B, Hq] contiguous; window 0 is
             none; block: positions in a block of the falls, which divides the plan's tiles.
    Returns: decay [3, B, Hq, plan.sums_length]: high and low part of the sums, and their fall, in
             base 2, from each position to the last of its block; left [B, Hq, plan.left_length]
             int32: the first key that a position sees, but for the first query of a tile the first
             key of the first tile that is visited, if that is later; count [B, Hq] float32.
    """
    batch, keys, heads = log_f.shape
    decay = log_f.new_empty(3, batch, heads, plan.sums_length)
    left = log_f.new_empty(batch, heads, plan.left_length, dtype=torch.int32)
    count = log_f.new_empty(batch, heads)
    steps, runs = scan(keys)
    _prepare[(batch * heads,)](
        log_f,
        log_f if start is None else start,
        log_f if threshold is None else threshold,
        decay,
        left,
        count,
        *log_f.stride(),
        *((0, 0) if start is None else start.stride()),
        batch * heads,
        heads,
        queries,
        keys,
        plan.sums_length,
        window or keys,
        STARTS=start is not None,
        PRUNE=threshold is not None,
        PN=plan.tiles.columns,
        BLOCK=block,
        BS=steps,
        BR=runs,
        num_warps=runs // 32,
        **overlap(log_f),
    )
    return decay, left, count


def gate_gradient(
    log_f: Tensor, start: Tensor | None, dlse: Tensor | None, column: Tensor, *, queries: int
) -> Tensor:
    """dlog_f [B, N, Hq] from dlse [B, M, Hq] and column sums of dS [B, Hq, plan.sums_length]."""
    batch, keys, heads = log_f.shape
    dlog_f = torch.empty_like(log_f, memory_format=torch.contiguous_format)
    steps, runs = scan(keys)
    _gates[(batch * heads,)](
        log_f,
        log_f if start is None else start,
        column if dlse is None else dlse,
        column,
        dlog_f,
        log_f.stride(1),
        log_f.stride(0),
        log_f.stride(2),
        *((0, 0) if start is None else start.stride()),
        *((0, 0, 0) if dlse is None else dlse.stride()),
        heads,
        queries,
        keys,
        column.shape[2],
        STARTS=start is not None,
        DLSE=dlse is not None,
        BS=steps,
        BR=runs,
        num_warps=runs // 32,
        **overlap(log_f),
    )
    return dlog_f
