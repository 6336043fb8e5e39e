"""Gradients of forgetting attention in Triton for sequences of any length, in three launches.

A kernel by queries makes dq and leaves three numbers of each row for the next one; a kernel by keys
makes dk and dv and the column sums of dS; a scan makes the gradients of the gates from these
(`docs/attention.md`, "Gradients of the gates"). The first two both recompute the scores, so that no
sum depends on the order of programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.long_triton import (
    LANES,
    choose,
    fall,
    grid,
    key_ranges,
    pair_scores,
    place,
)
from cerl.kernels.attention.plan import Plan
from cerl.kernels.attention.rows_triton import load_rows, strides, tiled, vector, vectors
from cerl.kernels.attention.scan_triton import LOG2E, gate_gradient, load_decay, sum_pointers
from cerl.kernels.runtime.blocks import block_size
from cerl.kernels.runtime.overlap import follow, overlap


@triton.jit
def _outer(a_x, a_y, b_x, b_y):
    """Of two pairs of numbers the larger first one and the smaller second one."""
    return tl.maximum(a_x, b_x), tl.minimum(a_y, b_y)


@triton.jit
def _look(p_left, j0, jl, begin, offset, queries, total, PM: tl.constexpr):
    """Looks at LANES query tiles from `begin` on, at the first key that their rows visit.

    Returns: for each tile its number + 1 if its first row sees a key up to jl, else 0; and its
             number if its last row does not see all keys from j0 on, else `total`.
    """
    tile = begin + tl.arange(0, LANES)
    last = offset + queries - 1
    b_first = tl.load(p_left + tl.minimum(offset + tile * PM, last))
    b_last = tl.load(p_left + tl.minimum(offset + tile * PM + PM - 1, last))
    inside = tile < total
    m_miss = inside & (b_last > j0)
    return tl.where(inside & (b_first <= jl), tile + 1, 0), tl.where(m_miss, tile, total)


@triton.jit
def _last_tiles(p_left, j0, offset, queries, PM: tl.constexpr, PN: tl.constexpr):
    """How far down, in query tiles, the key tile of j0 is visited, and seen as a whole from j0 on.

    Both ranges of query tiles begin at the diagonal. Under the running rule some query tiles of the
    first range do not visit the key tile; their rows are masked.
    """
    jl = j0 // PN * PN + PN - 1
    begin = tl.maximum(j0 - offset, 0) // PM
    total = tl.cdiv(queries, PM)
    visited, whole = _look(p_left, j0, jl, begin, offset, queries, total, PM)
    for base in range(begin + LANES, total, LANES):
        more, miss = _look(p_left, j0, jl, base, offset, queries, total, PM)
        visited, whole = _outer(visited, whole, more, miss)
    visited, whole = tl.reduce((visited, whole), 0, _outer)
    visited = tl.maximum(visited, begin)
    return visited, tl.minimum(whole, visited)


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
    p_terms,
    p_sums,
    p_sees,
    p_high,
    p_low,
    s_q,
    s_do,
    pairs,
    offset,
    queries,
    padded,
    length,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the share of BM query rows to the gradients of a block of keys; scores are [key, query].

    MASKED blocks take exact decays of pairs and a mask; the others count decays from the first row.
    """
    b_q = load_rows(p_q, i_b, i_h, begin, queries, s_q, D, BD, BM, TMA)
    b_do = load_rows(p_do, i_b, i_h, begin, queries, s_do, D, BD, BM, TMA)
    b_delta = vector(p_terms, o_pair, begin, padded, BM, TMA)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if MASKED:
        i = offset + begin + tl.arange(0, BM)
        hi_i = vector(p_sums, o_pair, offset + begin, length, BM, EVEN)
        b_left = vector(p_sees, o_pair, offset + begin, length, BM, EVEN)
        b_near = vector(p_terms, 2 * pairs + o_pair, begin, padded, BM, TMA)
        m_pair = (column[:, None] <= i[None, :]) & (column[:, None] >= b_left[None, :])
        b_s = pair_scores(b_s, scale, hi_i[None, :], hi_j[:, None], lo_j[:, None], m_pair)
        b_p = tl.exp2(b_s - b_near[None, :])
    else:
        hi_r, lo_r = load_decay(p_high, p_low, offset + begin)
        b_bias = ((hi_r - hi_j) + (lo_r - lo_j)) * LOG2E
        b_far = vector(p_terms, pairs + o_pair, begin, padded, BM, TMA)
        b_p = tl.exp2(b_s * scale + b_bias[:, None] - b_far[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_ds = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_ds - b_delta[None, :])
    b_column += tl.sum(b_ds, 1)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, b_column


@triton.jit(do_not_specialize=["pairs", "heads", "queries", "padded", "keys", "length"])
def _backward_keys(
    p_q,
    p_k,
    p_v,
    p_do,
    p_decay,
    p_sums,
    p_left,
    p_sees,
    p_terms,
    p_dk,
    p_dv,
    p_column,
    s_q,
    s_k,
    s_v,
    s_do,
    pairs,
    heads,
    queries,
    padded,
    keys,
    length,
    scale,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dk, dv and the column sums of dS, of BN keys of one key head; its query heads in turn."""
    key_heads = heads // GROUPS
    i_pair, i_tile = place()
    if i_pair * GROUPS >= pairs:
        return
    i_b, i_kh = (i_pair // key_heads).to(tl.int64), i_pair % key_heads
    offset = keys - queries
    j0 = i_tile * BN
    column = j0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    b_k = load_rows(p_k, i_b, i_kh, j0, keys, s_k, D, BD, BN, False)
    b_v = load_rows(p_v, i_b, i_kh, j0, keys, s_v, D, BD, BN, False)
    follow(OVERLAP)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for group in range(GROUPS):
        i_h = i_kh * GROUPS + group
        o_pair = i_b * heads + i_h
        p_high, p_low, _ = sum_pointers(p_decay, o_pair, pairs, length)
        hi_j, lo_j = load_decay(p_high, p_low, column)
        visited, whole = _last_tiles(p_left + o_pair * length, j0, offset, queries, PM, PN)
        end = tl.minimum(visited * PM, queries)
        first = tl.maximum(j0 - offset, 0) // BM * BM
        first = tl.minimum(first, end)
        diagonal = tl.cdiv(tl.maximum(j0 + BN - 1 - offset, 0), BM) * BM
        diagonal = tl.maximum(tl.minimum(diagonal, end), first)
        clean = diagonal
        if not ONE_LOOP:
            clean = tl.maximum(tl.minimum(whole * PM, end), diagonal)
        near = tl.cdiv(diagonal - first, BM)
        far = tl.cdiv(end - clean, BM)
        b_column = tl.zeros([BN], tl.float32)
        for step in tl.range(near + far, num_stages=2):
            begin = tl.where(step < near, first + step * BM, clean + (step - near) * BM)
            b_dk, b_dv, b_column = _keys_block(
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
                p_terms,
                p_sums,
                p_sees,
                p_high,
                p_low,
                s_q,
                s_do,
                pairs,
                offset,
                queries,
                padded,
                length,
                scale * LOG2E,
                D,
                BD,
                PRECISION,
                BM,
                TMA,
                EVEN,
                True,
            )
        if not ONE_LOOP:
            for begin in range(diagonal, clean, BM):
                b_dk, b_dv, b_column = _keys_block(
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
                    p_terms,
                    p_sums,
                    p_sees,
                    p_high,
                    p_low,
                    s_q,
                    s_do,
                    pairs,
                    offset,
                    queries,
                    padded,
                    length,
                    scale * LOG2E,
                    D,
                    BD,
                    PRECISION,
                    BM,
                    TMA,
                    EVEN,
                    False,
                )
        tl.store(p_column + o_pair * length + column, b_column)
    o_out = (i_b * keys * key_heads + i_kh) * D
    o_tile = column[:, None] * (key_heads * D) + d[None, :]
    m_tile = (column < keys)[:, None] & (d < D)[None, :]
    tl.store(p_dk + o_out + o_tile, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_tile)
    tl.store(p_dv + o_out + o_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["pairs", "heads", "queries", "keys", "length"])
def _backward_queries(
    p_q,
    p_k,
    p_v,
    p_o,
    p_do,
    p_decay,
    p_sums,
    p_left,
    p_lse,
    p_dlse,
    p_terms,
    p_dq,
    s_q,
    s_k,
    s_v,
    s_o,
    s_do,
    s_l,
    pairs,
    heads,
    queries,
    keys,
    length,
    scale,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    KM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dq of BM query rows of one head, and p_terms: three numbers of each row for the other kernel.

    0: sum(o do) - dlse, as if o had not been rounded.
    1: what unmasked scores subtract: the log-sum-exp in base 2, less the decay from the first row
       of the row's block of KM, which those scores lack.
    2: what masked scores subtract: the log-sum-exp in base 2, less the low part of the row's sum.
    """
    i_pair, i_tile = place()
    if i_pair >= pairs:
        return
    tiles = tl.num_programs(1)
    i_tile = tiles - 1 - i_tile
    i_b, i_h = (i_pair // heads).to(tl.int64), i_pair % heads
    offset = keys - queries
    i_kh = i_h // GROUPS
    o_pair = i_pair.to(tl.int64)
    p_high, p_low, _ = sum_pointers(p_decay, o_pair, pairs, length)
    p_left += o_pair * length
    d = tl.arange(0, BD)
    row = i_tile * BM + tl.arange(0, BM)
    safe = tl.minimum(row, queries - 1)
    i = offset + safe
    i0 = offset + i_tile * BM
    i1 = offset + tl.minimum(i_tile * BM + BM - 1, queries - 1)
    tile0 = offset + i_tile * BM // PM * PM
    follow(OVERLAP)
    # The keys begin where the first row of the tile begins to visit. If this block is not the first
    # one of its tile, its own first row may begin later.
    edge = tl.maximum(tl.load(p_left + tile0) // PN * PN, tl.load(p_left + i0) // BN * BN)
    whole, diagonal, edges = key_ranges(p_left, edge, i0, i1, ONE_LOOP, BN)
    begin = i_tile * BM
    b_lse = tl.load(p_lse + (i_b * queries + safe) * heads + i_h) * LOG2E
    hi_i, lo_i = load_decay(p_high, p_low, i)
    hi_r, lo_r = load_decay(p_high, p_low, i0)
    b_left = tl.load(p_left + i)
    b_dlse = tl.zeros([BM], tl.float32)
    if DLSE:
        b_dlse = tl.load(p_dlse + i_b * s_l[0] + i_h * s_l[2] + safe * s_l[1])
    b_q = load_rows(p_q, i_b, i_h, begin, queries, s_q, D, BD, BM, False)
    b_do = load_rows(p_do, i_b, i_h, begin, queries, s_do, D, BD, BM, False)
    b_o = load_rows(p_o, i_b, i_h, begin, queries, s_o, D, BD, BM, False)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1) - b_dlse
    b_near = b_lse - lo_i * LOG2E
    b_far = b_lse - ((hi_i - hi_r) + (lo_i - lo_r)) * LOG2E
    b_term = b_far
    if KM < BM:
        hi_r, lo_r = load_decay(p_high, p_low, offset + safe // KM * KM)
        b_term = b_lse - ((hi_i - hi_r) + (lo_i - lo_r)) * LOG2E
        hi_r, lo_r = load_decay(p_high, p_low, i0)
    # Rows past the end get weight 0, exp2(-inf), so that the kernel by keys needs no mask for them.
    m_row = row < queries
    o_padded = o_pair * (tiles * BM) + row
    o_term = pairs.to(tl.int64) * (tiles * BM)
    tl.store(p_terms + o_term + o_padded, tl.where(m_row, b_term, float("inf")))
    tl.store(p_terms + 2 * o_term + o_padded, tl.where(m_row, b_near, float("inf")))
    b_dq = tl.zeros([BM, BD], tl.float32)
    b_row = tl.zeros([BM], tl.float32)
    scale2 = scale * LOG2E
    for step in range(edges + tl.cdiv(i1 + 1 - diagonal, BN)):
        begin = tl.where(step < edges, edge + step * BN, diagonal + (step - edges) * BN)
        column = begin + tl.arange(0, BN)
        b_k = load_rows(p_k, i_b, i_kh, begin, keys, s_k, D, BD, BN, TMA)
        b_v = load_rows(p_v, i_b, i_kh, begin, keys, s_v, D, BD, BN, TMA)
        hi_j = vector(p_sums, i_pair, begin, length, BN, TMA)
        lo_j = vector(p_sums, pairs + i_pair, begin, length, BN, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_pair = (column[None, :] <= i[:, None]) & (column[None, :] >= b_left[:, None])
        b_s = pair_scores(b_s, scale2, hi_i[:, None], hi_j[None, :], lo_j[None, :], m_pair)
        b_p = tl.exp2(b_s - b_near[:, None])
        b_ds = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_ds - b_delta[:, None])
        b_row += tl.sum(b_ds, 1)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if not ONE_LOOP:
        for begin in range(whole, diagonal, BN):
            b_k = load_rows(p_k, i_b, i_kh, begin, keys, s_k, D, BD, BN, TMA)
            b_v = load_rows(p_v, i_b, i_kh, begin, keys, s_v, D, BD, BN, TMA)
            b_fall, frame = fall(
                p_sums, p_high, p_low, i_pair, pairs, begin, hi_r, lo_r, length, BN, TMA
            )
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_s = b_s * scale2 + b_fall[None, :]
            b_p = tl.exp2(b_s - (b_far - frame)[:, None])
            b_ds = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_ds = b_p * (b_ds - b_delta[:, None])
            b_row += tl.sum(b_ds, 1)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    # With o unrounded a row of dS sums to dlse; the difference corrects delta for o.
    tl.store(p_terms + o_padded, tl.where(m_row, b_delta + b_row - b_dlse, 0.0))
    tl.store(
        p_dq + (i_b * queries * heads + i_h) * D + row[:, None] * (heads * D) + d[None, :],
        (b_dq * scale).to(p_dq.dtype.element_ty),
        mask=m_row[:, None] & (d < D)[None, :],
    )


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    o: Tensor,
    lse: Tensor,
    decay: Tensor,
    left: Tensor,
    *,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_f.

    Args: as of `long_triton.forward`, which made o, lse, decay and left; rows of do contiguous;
          dlse [B, M, Hq] or None, for zeros.
    """
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    pairs = batch * heads
    start = None if start is None else start.view(torch.uint8)
    by_key, by_query = choose("keys", q), choose("queries", q)
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    padded = -(-queries // by_query.rows) * by_query.rows
    terms = log_f.new_empty(3, batch, heads, padded)
    lse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    column = log_f.new_empty(batch, heads, decay.shape[3])
    options = dict(
        GROUPS=groups,
        D=width,
        BD=block_size(width),
        PRECISION="ieee",
        ONE_LOOP=plan.few,
        PM=plan.tiles.rows,
        PN=plan.tiles.columns,
    )
    m, n = by_query.rows, by_query.columns
    tma, (k_rows, v_rows) = tiled(n, k, v)
    _backward_queries[grid(pairs, padded // m, k)](
        q,
        k_rows,
        v_rows,
        o,
        do,
        decay,
        vectors(decay, n, tma),
        left,
        lse,
        lse if dlse is None else dlse,
        terms,
        dq,
        *strides(q, k, v, o, do),
        lse_strides,
        pairs,
        heads,
        queries,
        keys,
        decay.shape[3],
        scale,
        **options,
        DLSE=dlse is not None,
        KM=by_key.rows,
        BM=m,
        BN=n,
        TMA=tma,
        **by_query.options,
        **overlap(q),
    )
    m, n = by_key.rows, by_key.columns
    tma, (q_rows, do_rows) = tiled(m, q, do)
    even = tma and (keys - queries) % 4 == 0  # blocks of positions begin on 16 bytes
    _backward_keys[grid(pairs // groups, -(-keys // n), k)](
        q_rows,
        k,
        v,
        do_rows,
        decay,
        vectors(decay, m, even),
        left,
        vectors(left, m, even),
        vectors(terms, m, tma),
        dk,
        dv,
        column,
        *strides(q, k, v, do),
        pairs,
        heads,
        queries,
        padded,
        keys,
        decay.shape[3],
        scale,
        **options,
        BM=m,
        BN=n,
        TMA=tma,
        EVEN=even,
        **by_key.options,
        **overlap(q),
    )
    dlog_f = gate_gradient(log_f, start, dlse, column, queries=queries)
    return dq, dk, dv, dlog_f
