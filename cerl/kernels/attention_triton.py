# The arguments of a Triton kernel and its language are no Python types.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportReturnType=false
"""Forgetting attention in Triton for sequences of any length: forward, backward, gate gradient.

Scores take one multiply-add: the decay of a row enters relative to the first row of its tile, where
softmax cannot see it, and only tiles on the diagonal or on an edge of an episode pay for exact
pairs. Every program finds for itself which tiles it may skip. Sums run in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LANES: tl.constexpr = tl.constexpr(128)  # tiles that one look at a boundary compares


class Launch(NamedTuple):
    """Block sizes of a role: query rows, key columns; warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None  # most of a thread; None leaves it to the compiler


# Keyed by (role, padded width, bytes of an element). Blocks of the backward pass divide the tiles
# of the forward pass, on which pruning is decided.
CONFIGS: dict[tuple[str, int, int], Launch] = {
    ("forward", 64, 2): Launch(128, 64, 8, 3),
    ("forward", 128, 2): Launch(128, 64, 8, 2),
    ("forward", 64, 4): Launch(64, 64, 4, 2),
    ("forward", 128, 4): Launch(64, 64, 8, 1),
    ("keys", 64, 2): Launch(64, 64, 4, 2),
    ("keys", 128, 2): Launch(64, 64, 8, 2),
    ("keys", 64, 4): Launch(32, 32, 4, 1),
    ("keys", 128, 4): Launch(32, 32, 8, 1),
    ("queries", 64, 2): Launch(64, 64, 4, 2),
    ("queries", 128, 2): Launch(64, 64, 8, 2),
    ("queries", 64, 4): Launch(32, 32, 4, 1),
    ("queries", 128, 4): Launch(32, 32, 8, 1),
}


@triton.jit
def _append(a_left, a_hi, a_lo, b_left, b_hi, b_lo):
    """Sum of two runs in two floats; a run that holds a reset (left >= 0) forgets the one before."""
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
def _resets(p_log_f, p_start, t, keys, s_ft, s_st, STARTS: tl.constexpr):
    """log_f at t, and whether an episode of this head begins there."""
    inside = (t >= 0) & (t < keys)
    b_f = tl.load(p_log_f + t * s_ft, mask=inside, other=0.0)
    m_reset = (b_f == float("-inf")) | (t == 0)
    if STARTS:
        m_reset |= tl.load(p_start + t * s_st, mask=inside, other=0).to(tl.int1)
    return b_f, m_reset & inside


@triton.jit
def _sums(p_decay, i_pair, pairs, length):
    """Pointers to the decayed sums of a head, high and low parts, and to their fall."""
    p_high = p_decay + i_pair.to(tl.int64) * length
    p_low = p_high + pairs.to(tl.int64) * length
    return p_high, p_low, p_low + pairs.to(tl.int64) * length


@triton.jit(do_not_specialize=["pairs", "heads", "keys", "length", "window"])
def _prepare(
    p_log_f,
    p_start,
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
    keys,
    length,
    window,
    STARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Decayed sums of one head in two floats, their fall (base 2) within each block of BC
    positions, and the first key that each position sees; BR blocks at a time."""
    i_pair = tl.program_id(0).to(tl.int64)
    p_log_f += (i_pair // heads) * s_fb + (i_pair % heads) * s_fh
    p_start += (i_pair // heads) * s_sb
    p_high, p_low, p_fall = _sums(p_decay, i_pair, pairs, length)
    p_left += i_pair * keys
    row, column = tl.arange(0, BR), tl.arange(0, BC)[None, :]
    left, high, low = tl.program_id(0) * 0, 0.0, 0.0
    for begin in range(0, length, BR * BC):
        t = begin + row[:, None] * BC + column
        b_f, m_reset = _resets(p_log_f, p_start, t, keys, s_ft, s_st, STARTS)
        b_f = tl.where(m_reset, 0.0, b_f)
        b_left = tl.where(m_reset, t, -1)
        b_left, b_high, b_low = tl.associative_scan((b_left, b_f, b_f * 0.0), 1, _append)
        # What stands before each block: the carry, then all blocks above it.
        m_last = column == BC - 1
        e_left = tl.sum(tl.where(m_last, b_left, 0), 1)
        e_high = tl.sum(tl.where(m_last, b_high, 0.0), 1)
        e_low = tl.sum(tl.where(m_last, b_low, 0.0), 1)
        e_left, e_high, e_low = tl.associative_scan((e_left, e_high, e_low), 0, _append)
        e_left, e_high, e_low = _append(left, high, low, e_left, e_high, e_low)
        above = tl.maximum(row - 1, 0)
        a_left = tl.where(row == 0, left, tl.gather(e_left, above, 0))[:, None]
        a_high = tl.where(row == 0, high, tl.gather(e_high, above, 0))[:, None]
        a_low = tl.where(row == 0, low, tl.gather(e_low, above, 0))[:, None]
        b_left, b_high, b_low = _append(a_left, a_high, a_low, b_left, b_high, b_low)
        b_sum = b_high + b_low
        b_low = b_low - (b_sum - b_high)
        left = tl.sum(tl.where(row == BR - 1, e_left, 0))
        high = tl.sum(tl.where(row == BR - 1, e_high, 0.0))
        low = tl.sum(tl.where(row == BR - 1, e_low, 0.0))
        f_high = tl.sum(tl.where(column == 0, b_sum, 0.0), 1)[:, None]
        f_low = tl.sum(tl.where(column == 0, b_low, 0.0), 1)[:, None]
        inside = t < length
        tl.store(p_high + t, b_sum, mask=inside)
        tl.store(p_low + t, b_low, mask=inside)
        tl.store(p_fall + t, ((f_high - b_sum) + (f_low - b_low)) * LOG2E, mask=inside)
        tl.store(p_left + t, tl.maximum(b_left, t - window + 1), mask=t < keys)
    tl.store(p_count + i_pair, 0.0)


@triton.jit
def _decay(p_high, p_low, t):
    return tl.load(p_high + t), tl.load(p_low + t)


@triton.jit
def _first_tile(p_high, p_low, p_left, threshold, i0, PRUNE: tl.constexpr, PN: tl.constexpr):
    """First key tile that the query tile with first position i0 visits."""
    first = tl.load(p_left + i0) // PN
    if PRUNE:
        high, low = _decay(p_high, p_low, i0)
        skipped = tl.zeros([LANES], tl.int32)
        for base in range(first, i0 // PN, LANES):
            tile = base + tl.arange(0, LANES)
            inside = tile < i0 // PN
            b_high, b_low = _decay(p_high, p_low, tl.where(inside, tile * PN + PN - 1, i0))
            skipped += (inside & ((high - b_high) + (low - b_low) < threshold)).to(tl.int32)
        first += tl.sum(skipped)
    return first


@triton.jit
def _last_tiles(
    p_high,
    p_low,
    p_left,
    threshold,
    j0,
    offset,
    queries,
    PRUNE: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
):
    """Ends, in query tiles, of those that visit key j0's tile and of those that see all from j0.

    Both sets begin at the diagonal: what a query sees moves forward only.
    """
    jl = j0 // PN * PN + PN - 1
    begin = tl.maximum(j0 - offset, 0) // PM
    total = tl.cdiv(queries, PM)
    visited = tl.zeros([LANES], tl.int32)
    whole = tl.zeros([LANES], tl.int32)
    for base in range(begin, total, LANES):
        tile = base + tl.arange(0, LANES)
        inside = tile < total
        i0 = offset + tl.minimum(tile * PM, queries - 1)
        m_visit = tl.load(p_left + i0) <= jl
        if PRUNE:
            high, low = _decay(p_high, p_low, tl.minimum(jl, offset + queries - 1))
            b_high, b_low = _decay(p_high, p_low, i0)
            m_visit = m_visit & ((b_high - high) + (b_low - low) >= threshold)
        visited += (inside & (m_visit | (jl >= i0))).to(tl.int32)
        i1 = offset + tl.minimum(tile * PM + PM - 1, queries - 1)
        whole += (inside & (tl.load(p_left + i1) <= j0)).to(tl.int32)
    visited_end = begin + tl.sum(visited)
    return visited_end, tl.minimum(begin + tl.sum(whole), visited_end)


@triton.jit
def _columns(p_left, first, i0, i1, BN: tl.constexpr):
    """Key ranges of one query tile, as starts: edge, whole, diagonal; and how many edge blocks."""
    edge = first
    diagonal = tl.maximum(edge, (i0 + 1) // BN * BN)
    whole = tl.minimum(tl.maximum(edge, tl.cdiv(tl.load(p_left + i1), BN) * BN), diagonal)
    return edge, whole, diagonal, (whole - edge) // BN


@triton.jit
def _swizzle(pairs, tiles, GROUP: tl.constexpr):
    """(pair, tile): GROUP heads at a time, so that their keys stay in cache; heaviest tile first."""
    i = tl.program_id(0)
    group = i // (GROUP * tiles)
    size = tl.minimum(pairs - group * GROUP, GROUP)
    i -= group * (GROUP * tiles)
    return group * GROUP + i % size, i // size


@triton.jit
def _rows(
    p,
    i_b,
    i_h,
    begin,
    limit,
    s_b,
    s_t,
    s_h,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BT, BD] rows of a head from `begin`; past D columns zeros, past `limit` rows any row's."""
    if TMA:
        return p.load([i_b.to(tl.int32), begin, i_h * D]).reshape([BT, BD])
    else:
        t = tl.minimum(begin + tl.arange(0, BT), limit - 1)
        d = tl.arange(0, BD)
        p_tile = p + i_b * s_b + i_h * s_h + t[:, None] * s_t + d[None, :]
        if D == BD:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _vector(p, i_row, begin, length, BT: tl.constexpr, TMA: tl.constexpr):
    """BT numbers of row i_row of a [rows, length] matrix."""
    if TMA:
        return p.load([i_row.to(tl.int32), begin]).reshape([BT])
    else:
        return tl.load(p + i_row.to(tl.int64) * length + begin + tl.arange(0, BT))


@triton.jit
def _fall(p_fall, p_high, p_low, i_pair, begin, hi_r, lo_r, length, BN: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """Decays (base 2) from BN keys on to a row r, as a vector and a number to add to all of it."""
    b_fall = _vector(p_fall, i_pair, begin, length, BN, TMA)
    high, low = _decay(p_high, p_low, begin // BC * BC)
    return b_fall, ((hi_r - high) + (lo_r - low)) * LOG2E


@triton.jit
def _pair_scores(b_qk, hi_i, lo_i, hi_j, lo_j, m_pair):
    """Scores in base 2 of pairs in [i, j] broadcast form, -inf where m_pair is False."""
    b_decay = (hi_i - hi_j) + (lo_i - lo_j)
    return tl.where(m_pair, b_qk + b_decay * LOG2E, float("-inf"))


@triton.jit
def _soften(b_s, b_v, b_max, b_sum, b_o, frame, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One step of the running softmax in base 2; scores still lack `frame`."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) + frame)
    b_pivot = b_new
    if MASKED:
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - (b_pivot - frame)[:, None])
    b_shrink = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_o = b_o * b_shrink[:, None]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_new, b_sum, b_o


@triton.jit(do_not_specialize=["pairs", "heads", "groups", "queries", "keys", "length"])
def _forward(
    p_q,
    p_k,
    p_v,
    p_decay,
    p_fall,
    p_left,
    p_threshold,
    p_o,
    p_lse,
    p_count,
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    pairs,
    heads,
    groups,
    queries,
    keys,
    length,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRUNE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Output and log-sum-exp of one query tile of one head."""
    tiles = tl.cdiv(queries, BM)
    i_pair, i_tile = _swizzle(pairs, tiles, GROUP)
    i_tile = tiles - 1 - i_tile
    i_b, i_h = (i_pair // heads).to(tl.int64), i_pair % heads
    offset = keys - queries
    i_kh = i_h // groups
    p_high, p_low, _ = _sums(p_decay, i_pair, pairs, length)
    p_left += i_pair.to(tl.int64) * keys
    threshold = 0.0
    if PRUNE:
        threshold = tl.minimum(tl.load(p_threshold + i_pair), 0.0)

    d = tl.arange(0, BD)
    row = i_tile * BM + tl.arange(0, BM)
    i = offset + tl.minimum(row, queries - 1)
    i0 = offset + i_tile * BM
    i1 = offset + tl.minimum(i_tile * BM + BM - 1, queries - 1)
    first = _first_tile(p_high, p_low, p_left, threshold, i0, PRUNE, BN)
    tl.atomic_add(p_count + i_pair, first.to(tl.float32), sem="relaxed")
    edge, whole, diagonal, edges = _columns(p_left, first * BN, i0, i1, BN)

    b_q = _rows(p_q, i_b, i_h, i_tile * BM, queries, s_qb, s_qt, s_qh, D, BD, BM, TMA)
    hi_i, lo_i = _decay(p_high, p_low, i)
    b_left = tl.load(p_left + i)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    scale *= LOG2E
    for step in range(edges + tl.cdiv(i1 + 1 - diagonal, BN)):
        begin = tl.where(step < edges, edge + step * BN, diagonal + (step - edges) * BN)
        column = begin + tl.arange(0, BN)
        b_k = _rows(p_k, i_b, i_kh, begin, keys, s_kb, s_kt, s_kh, D, BD, BN, TMA)
        b_v = _rows(p_v, i_b, i_kh, begin, keys, s_vb, s_vt, s_vh, D, BD, BN, TMA)
        hi_j, lo_j = _decay(p_high, p_low, column)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        m_pair = (column[None, :] <= i[:, None]) & (column[None, :] >= b_left[:, None])
        b_s = _pair_scores(
            b_s, hi_i[:, None], lo_i[:, None], hi_j[None, :], lo_j[None, :], m_pair
        )
        b_max, b_sum, b_o = _soften(b_s, b_v, b_max, b_sum, b_o, 0.0, PRECISION, True)

    # From here on scores of row i are relative to c_i - c_r, r the first row of the tile.
    hi_r, lo_r = _decay(p_high, p_low, i0)
    b_shift = ((hi_i - hi_r) + (lo_i - lo_r)) * LOG2E
    b_near = b_max
    b_max = b_near - b_shift
    b_start = b_max
    for begin in range(whole, diagonal, BN):
        b_k = _rows(p_k, i_b, i_kh, begin, keys, s_kb, s_kt, s_kh, D, BD, BN, TMA)
        b_v = _rows(p_v, i_b, i_kh, begin, keys, s_vb, s_vt, s_vh, D, BD, BN, TMA)
        b_fall, frame = _fall(
            p_fall, p_high, p_low, i_pair, begin, hi_r, lo_r, length, BN, BN, TMA
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + b_fall[None, :]
        b_max, b_sum, b_o = _soften(b_s, b_v, b_max, b_sum, b_o, frame, PRECISION, False)

    # A row whose largest score is a near one keeps it unrounded.
    b_max = tl.where(b_max == b_start, b_near, b_max + b_shift)
    b_o = b_o / b_sum[:, None]
    m_row = row < queries
    p_o += (i_b * queries * heads + i_h) * D
    p_lse += i_b * queries * heads + i_h
    tl.store(p_lse + row * heads, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)
    tl.store(
        p_o + row[:, None] * (heads * D) + d[None, :],
        b_o.to(p_o.dtype.element_ty),
        mask=m_row[:, None] & (d < D)[None, :],
    )


@triton.jit
def _keys_block(
    b_k,
    b_v,
    hi_j,
    lo_j,
    column,
    b_dk,
    b_dv,
    b_column,
    begin,
    i_b,
    i_h,
    o_pair,
    p_q,
    p_do,
    p_lse,
    p_delta,
    p_relative,
    p_high,
    p_low,
    p_left,
    s_qb,
    s_qt,
    s_qh,
    s_db,
    s_dt,
    s_dh,
    offset,
    queries,
    padded,
    heads,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what BM query rows give to the gradients of a key block; scores stand [key, query]."""
    row = begin + tl.arange(0, BM)
    safe = tl.minimum(row, queries - 1)
    b_q = _rows(p_q, i_b, i_h, begin, queries, s_qb, s_qt, s_qh, D, BD, BM, TMA)
    b_do = _rows(p_do, i_b, i_h, begin, queries, s_db, s_dt, s_dh, D, BD, BM, TMA)
    b_delta = _vector(p_delta, o_pair, begin, padded, BM, TMA)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
    if MASKED:
        i = offset + safe
        hi_i, lo_i = _decay(p_high, p_low, i)
        b_left = tl.load(p_left + i)
        m_pair = (column[:, None] <= i[None, :]) & (column[:, None] >= b_left[None, :])
        m_pair = m_pair & (row < queries)[None, :]
        b_lse = tl.load(p_lse + safe * heads) * LOG2E
        b_s = _pair_scores(
            b_s, hi_i[None, :], lo_i[None, :], hi_j[:, None], lo_j[:, None], m_pair
        )
        b_p = tl.exp2(b_s - b_lse[None, :])
    else:
        hi_r, lo_r = _decay(p_high, p_low, offset + begin)
        b_bias = ((hi_r - hi_j) + (lo_r - lo_j)) * LOG2E
        b_relative = _vector(p_relative, o_pair, begin, padded, BM, TMA)
        b_p = tl.exp2(b_s + b_bias[:, None] - b_relative[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_ds = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_ds - b_delta[None, :])
    b_column += tl.sum(b_ds, 1)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, b_column


@triton.jit(do_not_specialize=["pairs", "heads", "groups", "queries", "padded", "keys", "length"])
def _backward_keys(
    p_q,
    p_k,
    p_v,
    p_do,
    p_decay,
    p_left,
    p_threshold,
    p_lse,
    p_delta,
    p_relative,
    p_dk,
    p_dv,
    p_column,
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    s_db,
    s_dt,
    s_dh,
    pairs,
    heads,
    groups,
    queries,
    padded,
    keys,
    length,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRUNE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """dk, dv and the column sums of dS of BN keys of one key head, its query heads in turn."""
    key_heads = heads // groups
    i_pair, i_tile = _swizzle(pairs // groups, tl.cdiv(keys, BN), GROUP)
    i_b, i_kh = (i_pair // key_heads).to(tl.int64), i_pair % key_heads
    offset = keys - queries
    j0 = i_tile * BN
    column = j0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    b_k = _rows(p_k, i_b, i_kh, j0, keys, s_kb, s_kt, s_kh, D, BD, BN, TMA)
    b_v = _rows(p_v, i_b, i_kh, j0, keys, s_vb, s_vt, s_vh, D, BD, BN, TMA)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for group in range(groups):
        i_h = i_kh * groups + group
        o_pair = i_b * heads + i_h
        p_high, p_low, _ = _sums(p_decay, o_pair, pairs, length)
        p_l = p_left + o_pair * keys
        threshold = 0.0
        if PRUNE:
            threshold = tl.minimum(tl.load(p_threshold + o_pair), 0.0)
        visited, whole = _last_tiles(
            p_high, p_low, p_l, threshold, j0, offset, queries, PRUNE, PM, PN
        )
        end = tl.minimum(visited * PM, queries)
        first = tl.maximum(j0 - offset, 0) // BM * BM
        first = tl.minimum(first, end)
        diagonal = tl.cdiv(tl.maximum(j0 + BN - 1 - offset, 0), BM) * BM
        diagonal = tl.maximum(tl.minimum(diagonal, end), first)
        clean = tl.maximum(tl.minimum(whole * PM, end), diagonal)
        near = tl.cdiv(diagonal - first, BM)
        far = tl.cdiv(end - clean, BM)
        hi_j, lo_j = _decay(p_high, p_low, column)
        b_column = tl.zeros([BN], tl.float32)
        p_lh = p_lse + i_b * queries * heads + i_h
        for step in range(near + far):
            begin = tl.where(step < near, first + step * BM, clean + (step - near) * BM)
            b_dk, b_dv, b_column = _keys_block(
                b_k, b_v, hi_j, lo_j, column, b_dk, b_dv, b_column, begin, i_b, i_h, o_pair,
                p_q, p_do, p_lh, p_delta, p_relative, p_high, p_low, p_l,
                s_qb, s_qt, s_qh, s_db, s_dt, s_dh, offset, queries, padded, heads, scale * LOG2E,
                D, BD, PRECISION, BM, TMA, True,
            )  # fmt: skip
        for begin in range(diagonal, clean, BM):
            b_dk, b_dv, b_column = _keys_block(
                b_k, b_v, hi_j, lo_j, column, b_dk, b_dv, b_column, begin, i_b, i_h, o_pair,
                p_q, p_do, p_lh, p_delta, p_relative, p_high, p_low, p_l,
                s_qb, s_qt, s_qh, s_db, s_dt, s_dh, offset, queries, padded, heads, scale * LOG2E,
                D, BD, PRECISION, BM, TMA, False,
            )  # fmt: skip
        tl.store(p_column + o_pair * keys + column, b_column, mask=column < keys)
    o_out = (i_b * keys * key_heads + i_kh) * D
    o_tile = column[:, None] * (key_heads * D) + d[None, :]
    m_tile = (column < keys)[:, None] & (d < D)[None, :]
    tl.store(p_dk + o_out + o_tile, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_tile)
    tl.store(p_dv + o_out + o_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["pairs", "heads", "groups", "queries", "keys", "length"])
def _backward_queries(
    p_q,
    p_k,
    p_v,
    p_o,
    p_do,
    p_decay,
    p_fall,
    p_left,
    p_threshold,
    p_lse,
    p_dlse,
    p_delta,
    p_relative,
    p_dq,
    p_row,
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    s_ob,
    s_ot,
    s_oh,
    s_db,
    s_dt,
    s_dh,
    s_lb,
    s_lt,
    s_lh,
    pairs,
    heads,
    groups,
    queries,
    keys,
    length,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRUNE: tl.constexpr,
    DLSE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    KM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """dq and the row sums of dS of BM query rows of one head.

    For the kernel of the keys it leaves sum(o do) - dlse, and the log-sum-exp in base 2 relative
    to the first row of each block of KM.
    """
    tiles = tl.cdiv(queries, BM)
    i_pair, i_tile = _swizzle(pairs, tiles, GROUP)
    i_tile = tiles - 1 - i_tile
    i_b, i_h = (i_pair // heads).to(tl.int64), i_pair % heads
    offset = keys - queries
    i_kh = i_h // groups
    o_pair = i_pair.to(tl.int64)
    p_high, p_low, _ = _sums(p_decay, o_pair, pairs, length)
    p_left += o_pair * keys
    threshold = 0.0
    if PRUNE:
        threshold = tl.minimum(tl.load(p_threshold + i_pair), 0.0)
    d = tl.arange(0, BD)
    row = i_tile * BM + tl.arange(0, BM)
    safe = tl.minimum(row, queries - 1)
    i = offset + safe
    i0 = offset + i_tile * BM
    i1 = offset + tl.minimum(i_tile * BM + BM - 1, queries - 1)
    tile0 = offset + i_tile * BM // PM * PM
    first = _first_tile(p_high, p_low, p_left, threshold, tile0, PRUNE, PN) * PN
    # A block inside a tile may see fewer keys than the tile's first row does.
    first = tl.maximum(first, tl.load(p_left + i0) // BN * BN)
    edge, whole, diagonal, edges = _columns(p_left, first, i0, i1, BN)
    begin = i_tile * BM
    b_q = _rows(p_q, i_b, i_h, begin, queries, s_qb, s_qt, s_qh, D, BD, BM, TMA)
    b_do = _rows(p_do, i_b, i_h, begin, queries, s_db, s_dt, s_dh, D, BD, BM, TMA)
    b_o = _rows(p_o, i_b, i_h, begin, queries, s_ob, s_ot, s_oh, D, BD, BM, TMA)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if DLSE:
        b_delta -= tl.load(p_dlse + i_b * s_lb + i_h * s_lh + safe * s_lt)
    b_lse = tl.load(p_lse + (i_b * queries + safe) * heads + i_h) * LOG2E
    hi_i, lo_i = _decay(p_high, p_low, i)
    m_row = row < queries
    hi_r, lo_r = _decay(p_high, p_low, offset + safe // KM * KM)
    b_relative = b_lse - ((hi_i - hi_r) + (lo_i - lo_r)) * LOG2E
    # Rows past the end weigh nothing, so that the kernel of the keys needs no mask.
    o_padded = o_pair * (tiles * BM) + row
    tl.store(p_delta + o_padded, tl.where(m_row, b_delta, 0.0))
    tl.store(p_relative + o_padded, tl.where(m_row, b_relative, float("inf")))
    b_left = tl.load(p_left + i)
    b_dq = tl.zeros([BM, BD], tl.float32)
    b_row = tl.zeros([BM], tl.float32)
    scale2 = scale * LOG2E
    for step in range(edges + tl.cdiv(i1 + 1 - diagonal, BN)):
        begin = tl.where(step < edges, edge + step * BN, diagonal + (step - edges) * BN)
        column = begin + tl.arange(0, BN)
        b_k = _rows(p_k, i_b, i_kh, begin, keys, s_kb, s_kt, s_kh, D, BD, BN, TMA)
        b_v = _rows(p_v, i_b, i_kh, begin, keys, s_vb, s_vt, s_vh, D, BD, BN, TMA)
        hi_j, lo_j = _decay(p_high, p_low, column)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale2
        m_pair = (column[None, :] <= i[:, None]) & (column[None, :] >= b_left[:, None])
        b_s = _pair_scores(
            b_s, hi_i[:, None], lo_i[:, None], hi_j[None, :], lo_j[None, :], m_pair
        )
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_ds = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_ds - b_delta[:, None])
        b_row += tl.sum(b_ds, 1)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    hi_r, lo_r = _decay(p_high, p_low, i0)
    b_relative = b_lse - ((hi_i - hi_r) + (lo_i - lo_r)) * LOG2E
    for begin in range(whole, diagonal, BN):
        b_k = _rows(p_k, i_b, i_kh, begin, keys, s_kb, s_kt, s_kh, D, BD, BN, TMA)
        b_v = _rows(p_v, i_b, i_kh, begin, keys, s_vb, s_vt, s_vh, D, BD, BN, TMA)
        b_fall, frame = _fall(
            p_fall, p_high, p_low, i_pair, begin, hi_r, lo_r, length, BN, PN, TMA
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale2 + b_fall[None, :]
        b_p = tl.exp2(b_s - (b_relative - frame)[:, None])
        b_ds = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_ds - b_delta[:, None])
        b_row += tl.sum(b_ds, 1)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    tl.store(p_row + o_padded, b_row)
    tl.store(
        p_dq + (i_b * queries * heads + i_h) * D + row[:, None] * (heads * D) + d[None, :],
        (b_dq * scale).to(p_dq.dtype.element_ty),
        mask=m_row[:, None] & (d < D)[None, :],
    )


@triton.jit
def _append_backwards(a_stop, a_sum, b_stop, b_sum):
    return a_stop | b_stop, tl.where(b_stop != 0, b_sum, a_sum + b_sum)


@triton.jit(do_not_specialize=["heads", "queries", "padded", "keys"])
def _gates(
    p_log_f,
    p_start,
    p_row,
    p_column,
    p_dlog_f,
    s_ft,
    s_fb,
    s_fh,
    s_sb,
    s_st,
    heads,
    queries,
    padded,
    keys,
    STARTS: tl.constexpr,
    BT: tl.constexpr,
):
    """dlog_f: sums of what follows within the episode, from its end to its second step."""
    i_pair = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_pair // heads, i_pair % heads
    p_log_f += i_b * s_fb + i_h * s_fh
    p_start += i_b * s_sb
    p_row += i_pair * padded
    p_column += i_pair * keys
    p_dlog_f += i_b * keys * heads + i_h
    offset = keys - queries
    carry = 0.0
    for step in range(tl.cdiv(keys, BT)):
        begin = (tl.cdiv(keys, BT) - 1 - step) * BT
        t = begin + tl.arange(0, BT)
        inside = t < keys
        b_sum = tl.load(p_row + t - offset, mask=inside & (t >= offset), other=0.0)
        b_sum -= tl.load(p_column + t, mask=inside, other=0.0)
        _, m_reset = _resets(p_log_f, p_start, t, keys, s_ft, s_st, STARTS)
        _, m_next = _resets(p_log_f, p_start, t + 1, keys, s_ft, s_st, STARTS)
        b_stop, b_sum = tl.associative_scan(
            (m_next.to(tl.int32), b_sum), 0, _append_backwards, reverse=True
        )
        b_sum += tl.where(b_stop != 0, 0.0, carry)
        carry = tl.sum(tl.where(t == begin, b_sum, 0.0))
        tl.store(p_dlog_f + t * heads, tl.where(m_reset, 0.0, b_sum), mask=inside)


def _width(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _launch(role: str, q: Tensor) -> Launch:
    return CONFIGS[role, max(64, _width(q.shape[-1])), q.element_size()]


def _cap(launch: Launch) -> dict[str, int]:
    return {} if launch.registers is None else {"maxnreg": launch.registers}


def _group(pairs: int, keys: int, q: Tensor) -> int:
    """Heads whose rows of four tensors fit the cache together."""
    size = 4 * keys * q.shape[-1] * q.element_size()
    return max(1, min(pairs, CACHE // size))


CACHE = 32 << 20  # bytes; of the 50 MiB of the H200 that the tables were measured on


def _strides(*tensors: Tensor) -> list[int]:
    return [size for tensor in tensors for size in tensor.stride()[:3]]


def _tiled(*blocks: tuple[int, Tensor]) -> tuple[bool, list]:
    """Whether the copy engine can load these (rows, tensor), and what to hand to the kernel then.

    It takes 16-bit tensors whose heads lie side by side and fill their padded width.
    """
    for _, x in blocks:
        width = x.shape[3]
        if not (
            BULK and x.is_cuda and x.element_size() == 2 and width == _width(width)
            and x.stride(2) == width and x.stride(3) == 1 and x.data_ptr() % 16 == 0
            and all(size % 8 == 0 and size > 0 for size in x.stride()[:2])
        ):  # fmt: skip
            return False, [x for _, x in blocks]
    return True, [
        TensorDescriptor(
            x,
            [x.shape[0], x.shape[1], x.shape[2] * x.shape[3]],
            [x.stride(0), x.stride(1), 1],
            [1, rows, x.shape[3]],
        )
        for rows, x in blocks
    ]


def _vectors(x: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    """[B, Hq, time] float32 for `_vector`."""
    if not tma:
        return x
    return TensorDescriptor(
        x, [x.shape[0] * x.shape[1], x.shape[2]], [x.shape[2], 1], [1, rows]
    )


BULK = True


def prepare(
    log_f: Tensor, start: Tensor | None, *, window: int, block: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed sums, what each position sees, and a zeroed count of tiles.

    Returns: decay [3, B, Hq, L], L = N rounded up to 128: the sums in two floats, and their fall in
             base 2 since the first position of each block; left [B, Hq, N] int32; count [B, Hq].
    """
    batch, keys, heads = log_f.shape
    length = triton.cdiv(keys, 128) * 128
    decay = log_f.new_empty(3, batch, heads, length)
    left = log_f.new_empty(batch, heads, keys, dtype=torch.int32)
    count = log_f.new_empty(batch, heads)
    _prepare[(batch * heads,)](
        log_f, log_f if start is None else start, decay, left, count,
        *log_f.stride(), *((0, 0) if start is None else start.stride()),
        batch * heads, heads, keys, length, window or keys, STARTS=start is not None,
        BR=min(64, triton.next_power_of_2(length // block)), BC=block, num_warps=8,
    )  # fmt: skip
    return decay, left, count


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, M, Hq, D], lse [B, M, Hq], tiles not visited [B, Hq], decayed sums, first visible key.

    Args: as the custom operator in `attention.py`; window 0 is none.
    """
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    start = None if start is None else start.view(torch.uint8)
    launch, pairs = _launch("forward", q), batch * heads
    decay, left, count = prepare(log_f, start, window=window, block=launch.columns)
    o = q.new_empty(batch, queries, heads, width)
    lse = log_f.new_empty(batch, queries, heads)
    tma, rows = _tiled((launch.rows, q), (launch.columns, k), (launch.columns, v))
    _forward[(pairs * triton.cdiv(queries, launch.rows),)](
        *rows, decay, _vectors(decay[2], launch.columns, tma), left,
        lse if threshold is None else threshold, o, lse, count,
        *_strides(q, k, v), pairs, heads, groups, queries, keys, decay.shape[3], scale,
        D=width, BD=_width(width), PRUNE=threshold is not None, GROUP=_group(pairs, keys, q),
        PRECISION="ieee", BM=launch.rows, BN=launch.columns, TMA=tma,
        num_warps=launch.warps, num_stages=launch.stages, **_cap(launch),
    )  # fmt: skip
    return o, lse, count, decay, left


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    o: Tensor,
    lse: Tensor,
    decay: Tensor,
    left: Tensor,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_f; the tiles skipped are those that the forward pass skipped."""
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    pairs = batch * heads
    start = None if start is None else start.view(torch.uint8)
    tile, by_key, by_query = (_launch(role, q) for role in ("forward", "keys", "queries"))
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dlog_f = torch.empty_like(log_f, memory_format=torch.contiguous_format)
    padded = triton.cdiv(queries, by_query.rows) * by_query.rows
    delta, relative, row = (log_f.new_empty(batch, heads, padded) for _ in range(3))
    column = log_f.new_empty(batch, heads, keys)
    options = dict(
        D=width, BD=_width(width), PRUNE=threshold is not None, PRECISION="ieee",
        PM=tile.rows, PN=tile.columns,
    )  # fmt: skip
    limit = lse if threshold is None else threshold
    m, n = by_query.rows, by_query.columns
    tma, rows = _tiled((m, q), (n, k), (n, v), (m, o), (m, do))
    _backward_queries[(pairs * triton.cdiv(queries, by_query.rows),)](
        *rows, decay, _vectors(decay[2], n, tma), left, limit, lse,
        lse if dlse is None else dlse, delta, relative,
        dq, row, *_strides(q, k, v, o, do), *((0, 0, 0) if dlse is None else dlse.stride()),
        pairs, heads, groups, queries, keys, decay.shape[3], scale, **options, DLSE=dlse is not None,
        GROUP=_group(pairs, keys, q), KM=by_key.rows, BM=m, BN=n, TMA=tma,
        num_warps=by_query.warps, num_stages=by_query.stages,
        **_cap(by_query),
    )  # fmt: skip
    m, n = by_key.rows, by_key.columns
    tma, rows = _tiled((m, q), (n, k), (n, v), (m, do))
    _backward_keys[(pairs // groups * triton.cdiv(keys, by_key.columns),)](
        *rows, decay, left, limit, lse, _vectors(delta, m, tma), _vectors(relative, m, tma),
        dk, dv, column,
        *_strides(q, k, v, do), pairs, heads, groups, queries, padded, keys, decay.shape[3],
        scale, **options,
        GROUP=_group(pairs // groups, keys, q), BM=m, BN=n, TMA=tma,
        num_warps=by_key.warps, num_stages=by_key.stages,
        **_cap(by_key),
    )  # fmt: skip
    _gates[(pairs,)](
        log_f, log_f if start is None else start, row, column, dlog_f,
        log_f.stride(1), log_f.stride(0), log_f.stride(2),
        *((0, 0) if start is None else start.stride()), heads, queries, padded, keys,
        STARTS=start is not None, BT=min(2048, max(16, triton.next_power_of_2(keys))),
        num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dlog_f
