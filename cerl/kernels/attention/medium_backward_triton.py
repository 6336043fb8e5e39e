"""Gradients of forgetting attention in Triton for 129 to 256 keys of 16 bits, in one launch.

A program takes all keys of a head. It sums each row of dS before it sums columns, to correct the
rows for the rounding of o (`docs/attention.md`, "Gradients of the gates"). Sums run in a fixed
order.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.launch import Launch
from cerl.kernels.attention.medium_triton import (
    CONFIGS,
    LENGTH,
    constants,
    edge_block,
    inner_blocks,
    pair_scores,
)
from cerl.kernels.attention.plan import Plan
from cerl.kernels.attention.rows_triton import load_rows, store_rows, strides
from cerl.kernels.attention.scan_triton import LOG2E, append_before, resets
from cerl.kernels.runtime.blocks import block_size
from cerl.kernels.runtime.launch import Launcher
from cerl.kernels.runtime.overlap import follow, starts_early


# Strides of gates are not in a tuple, where Triton would specialise them (`rows_triton.strides`).
@triton.jit(
    do_not_specialize=[
        "s_fb",
        "s_ft",
        "s_fh",
        "s_sb",
        "s_st",
        "s_lb",
        "s_lt",
        "s_lh",
        "pairs",
        "queries",
        "keys",
    ]
)
def _backward(
    p_q,
    p_k,
    p_v,
    p_log_f,
    p_start,
    p_sums,
    p_sees,
    p_o,
    p_do,
    p_dlse,
    p_delta,
    p_dq,
    p_dk,
    p_dv,
    p_dlog_f,
    s_q,
    s_k,
    s_v,
    s_fb,
    s_ft,
    s_fh,
    s_sb,
    s_st,
    s_o,
    s_do,
    s_lb,
    s_lt,
    s_lh,
    pairs,
    heads,
    queries,
    keys,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    GROUPS: tl.constexpr,
    STARTS: tl.constexpr,
    DLSE: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All gradients of one key head and of the query heads that read it, one after another.

    First dq, by blocks of PM queries and BN keys; this pass leaves sum(o do) - dlse of each row as
    if o had not been rounded. Then dk and dv, by blocks of PN keys and BM queries; this pass leaves
    the column sums of dS. Last the gradients of the gates, from those sums.
    """
    follow(OVERLAP)
    key_heads = heads // GROUPS
    r, c = tl.arange(0, PM), tl.arange(0, BN)
    scale2 = scale * LOG2E
    i_b, i_kh = (tl.program_id(0) // key_heads).to(tl.int64), tl.program_id(0) % key_heads
    offset = keys - queries
    o_sums = pairs.to(tl.int64) * LENGTH
    for group in range(GROUPS):
        i_h = i_kh * GROUPS + group
        i_pair = i_b * heads + i_h
        o_h = i_b * queries * heads + i_h
        p_high = p_sums + i_pair * LENGTH
        for begin in range(0, queries, PM):
            b_q = load_rows(p_q, i_b, i_h, begin, queries, s_q, D, BD, PM, False)
            b_do = load_rows(p_do, i_b, i_h, begin, queries, s_do, D, BD, PM, False)
            b_o = load_rows(p_o, i_b, i_h, begin, queries, s_o, D, BD, PM, False)
            row = begin + r
            m_row = row < queries
            hi_i = tl.load(p_high + (offset + begin) + r)
            b_term = tl.load(p_high + (2 * o_sums + begin) + r)
            sees_i = tl.load(p_sees + (i_pair * BT + begin) + r)
            b_dlse = tl.zeros([PM], tl.float32)
            if DLSE:
                p_dl = p_dlse + i_b * s_lb + i_h * s_lh
                b_dlse = tl.load(p_dl + row * s_lt, mask=m_row, other=0.0)
            b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1) - b_dlse
            b_row = tl.zeros([PM], tl.float32)
            b_dq = tl.zeros([PM, BD], tl.float32)
            last = offset + tl.minimum(begin + PM, queries) - 1
            p_see = p_sees + (i_pair * BT + begin)
            first_tile = tl.load(p_see) // BN
            inner, end, edges = inner_blocks(
                first_tile,
                tl.cdiv(tl.load(p_see + PM - 1), BN),
                (offset + begin + 1) // BN,
                last // BN + 1,
            )
            for MASKED in tl.static_range(2):
                steps = edges + last // BN + 1 - end if MASKED else end - inner
                for step in range(steps):
                    tile = edge_block(step, first_tile, end, edges) if MASKED else inner + step
                    b_k = load_rows(p_k, i_b, i_kh, tile * BN, keys, s_k, D, BD, BN, False)
                    b_v = load_rows(p_v, i_b, i_kh, tile * BN, keys, s_v, D, BD, BN, False)
                    hi_j = tl.load(p_high + tile * BN + c)
                    lo_j = tl.load(p_high + (o_sums + tile * BN) + c)
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                    b_s = pair_scores(b_s, scale2, hi_i[:, None], hi_j[None, :], lo_j[None, :])
                    if MASKED:
                        m_pair = c[None, :] <= (offset + row - tile * BN)[:, None]
                        m_pair &= c[None, :] >= (sees_i - tile * BN)[:, None]
                        b_s = tl.where(m_pair, b_s, float("-inf"))
                    b_p = tl.exp2(b_s - b_term[:, None])
                    b_ds = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
                    b_ds = b_p * (b_ds - b_delta[:, None])
                    b_row += tl.sum(b_ds, 1)
                    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
            # With o unrounded a row of dS sums to dlse; the difference corrects delta for o.
            tl.store(p_delta + (i_pair * BT + begin) + r, b_delta + b_row - b_dlse)
            store_rows(p_dq + o_h * D, row, m_row, heads * D, b_dq * scale, D, BD)

    tl.debug_barrier()
    r, c = tl.arange(0, BM), tl.arange(0, PN)
    o_key = (i_b * keys * key_heads + i_kh) * D
    for tile in range(tl.cdiv(keys, PN)):
        j = tile * PN + c
        b_k = load_rows(p_k, i_b, i_kh, tile * PN, keys, s_k, D, BD, PN, False)
        b_v = load_rows(p_v, i_b, i_kh, tile * PN, keys, s_v, D, BD, PN, False)
        b_dk = tl.zeros([PN, BD], tl.float32)
        b_dv = tl.zeros([PN, BD], tl.float32)
        for group in range(GROUPS):
            i_h = i_kh * GROUPS + group
            i_pair = i_b * heads + i_h
            o_h = i_b * queries * heads + i_h
            p_high = p_sums + i_pair * LENGTH
            hi_j = tl.load(p_high + tile * PN + c)
            lo_j = tl.load(p_high + (o_sums + tile * PN) + c)
            b_column = tl.zeros([PN], tl.float32)
            # The first key that a query sees never moves back from one query to the next, so that
            # blocks of queries with a given property are counted instead of searched.
            block = tl.arange(0, BT // BM) * BM
            p_see = p_sees + i_pair * BT + block
            last = tl.sum((tl.load(p_see) < tile * PN + PN).to(tl.int32))
            whole = tl.sum((tl.load(p_see + BM - 1) <= tile * PN).to(tl.int32))
            first = tl.maximum(tile * PN - offset, 0) // BM
            inner, end, edges = inner_blocks(
                first, tl.cdiv(tl.maximum(tile * PN + PN - 1 - offset, 0), BM), whole, last
            )
            for MASKED in tl.static_range(2):
                steps = edges + last - end if MASKED else end - inner
                for step in range(steps):
                    begin = (edge_block(step, first, end, edges) if MASKED else inner + step) * BM
                    b_q = load_rows(p_q, i_b, i_h, begin, queries, s_q, D, BD, BM, False)
                    b_do = load_rows(p_do, i_b, i_h, begin, queries, s_do, D, BD, BM, False)
                    hi_i = tl.load(p_high + (offset + begin) + r)
                    b_term = tl.load(p_high + (2 * o_sums + begin) + r)
                    b_delta = tl.load(p_delta + (i_pair * BT + begin) + r)
                    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                    b_s = pair_scores(b_s, scale2, hi_i[None, :], hi_j[:, None], lo_j[:, None])
                    if MASKED:
                        sees_i = tl.load(p_sees + (i_pair * BT + begin) + r)
                        m_pair = r[None, :] >= (j - (offset + begin))[:, None]
                        m_pair &= j[:, None] >= sees_i[None, :]
                        b_s = tl.where(m_pair, b_s, float("-inf"))
                    b_p = tl.exp2(b_s - b_term[None, :])
                    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                    b_ds = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                    b_ds = b_p * (b_ds - b_delta[None, :])
                    b_column += tl.sum(b_ds, 1)
                    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
            tl.store(p_dlog_f + (i_b * keys + j) * heads + i_h, b_column, mask=j < keys)
        store_rows(p_dk + o_key, j, j < keys, key_heads * D, b_dk * scale, D, BD)
        store_rows(p_dv + o_key, j, j < keys, key_heads * D, b_dv, D, BD)

    tl.debug_barrier()
    t = tl.arange(0, BT)
    inside = t < keys
    for group in range(GROUPS):
        i_h = i_kh * GROUPS + group
        p_gate = p_dlog_f + (i_b * keys + t) * heads + i_h
        # Row t of dS, which sums to dlse, pulls sum t up; column t of dS pulls it down.
        b_flow = -tl.load(p_gate, mask=inside, other=0.0)
        if DLSE:
            p_dl = p_dlse + i_b * s_lb + i_h * s_lh + (t - offset) * s_lt
            b_flow += tl.load(p_dl, mask=inside & (t >= offset), other=0.0)
        p_f, p_s = p_log_f + i_b * s_fb + i_h * s_fh, p_start + i_b * s_sb
        _, m_reset = resets(p_f, p_s, t, keys, s_ft, s_st, STARTS)
        _, m_next = resets(p_f, p_s, t + 1, keys, s_ft, s_st, STARTS)
        # log_f at t is part of the sums of t and of later positions, up to the next episode.
        _, b_gate = tl.associative_scan(
            (m_next.to(tl.int32), b_flow), 0, append_before, reverse=True
        )
        tl.store(p_gate, tl.where(m_reset, 0.0, b_gate), mask=inside)


@functools.cache
def _launcher(dlse: bool, *given: Any) -> Launcher:
    return Launcher(_backward, DLSE=dlse, **constants(*given))


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
    sums: Tensor,
    sees: Tensor,
    *,
    plan: Plan,
    scale: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_f.

    Args: as of `medium_triton.forward`, which made o, lse, sums and sees; rows of do contiguous;
          dlse [B, M, Hq] or None, for zeros; launch replaces the table's choice.
    """
    batch, queries, heads, width = q.shape
    keys, key_heads = k.shape[1:3]
    run = _launcher(
        dlse is not None,
        launch or CONFIGS["backward", block_size(width), q.element_size()],
        plan.tiles,
        width,
        heads // key_heads,
        start is not None,
        starts_early(q),
    )
    start = None if start is None else start.view(torch.uint8)
    dq, dk, dv, dlog_f = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_f)
    )
    delta = lse.new_empty(batch, heads, plan.left_length)
    run(
        batch * key_heads,
        (
            q,
            k,
            v,
            log_f,
            log_f if start is None else start,
            sums,
            sees,
            o,
            do,
            lse if dlse is None else dlse,
            delta,
            dq,
            dk,
            dv,
            dlog_f,
        ),
        (
            *strides(q, k, v),
            *log_f.stride(),
            *((0, 0) if start is None else start.stride()),
            *strides(o, do),
            *((0, 0, 0) if dlse is None else dlse.stride()),
            batch * heads,
            heads,
            queries,
            keys,
        ),
        scale,
    )
    return dq, dk, dv, dlog_f
