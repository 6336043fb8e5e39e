# The arguments of a Triton kernel and its language are no Python types.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportReturnType=false
"""Forgetting attention in Triton for 129 to 256 keys of 16 bits: one launch forward, one backward.

Forward, every program scans the gates of its head, finds the tiles that it skips and leaves both to
the backward pass. There, one program takes all keys of a head in two halves; a row of dS is summed
before its columns are, so that gates lose nothing by the rounding of o. Sums run in a fixed order.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.long_triton import LN2, block_size, cap, load_rows, strides
from cerl.kernels.attention.plan import MARGIN, MEDIUM_KEYS, Plan, Tiles
from cerl.kernels.attention.scan_triton import LOG2E, append, append_before, resets
from cerl.kernels.runtime.launch import Launcher
from cerl.kernels.runtime.overlap import follow, options, starts_early


class Launch(NamedTuple):
    """Query rows, key columns, warps and stages; most registers; forward programs of a head.

    Backward, a block by queries has the columns and all rows of a tile, one by keys the rows and
    all columns.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None  # most of a thread; None leaves it to the compiler
    parts: int = 1


# Positions of the sums that a program keeps: blocks of rows may end past the last position.
LENGTH: tl.constexpr = tl.constexpr(MEDIUM_KEYS + MARGIN)
# Keyed by (role, padded width, bytes of an element).
CONFIGS: dict[tuple[str, int, int], Launch] = {
    ("forward", 16, 2): Launch(64, 64, 4, 1, 128),
    ("forward", 32, 2): Launch(64, 64, 4, 1, 128),
    ("forward", 64, 2): Launch(64, 64, 4, 1, 128),
    ("backward", 16, 2): Launch(32, 64, 4, 1, 128),
    ("backward", 32, 2): Launch(32, 32, 4, 1, 128),
    ("backward", 64, 2): Launch(64, 64, 4, 1),
}


@triton.jit
def _first_tiles(
    b_high,
    b_low,
    b_left,
    p_threshold,
    offset,
    queries,
    PRUNE: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    BT: tl.constexpr,
):
    """First key tiles that query tiles visit: how many tiles of PN keys are skipped before."""
    tile = tl.arange(0, BT // PM)
    i0 = offset + tile * PM
    m_tile = i0 < offset + queries
    i0 = tl.minimum(i0, BT - 1)
    end = tl.arange(0, BT // PN) * PN + PN - 1
    m_seen = end[None, :] >= tl.gather(b_left, i0, 0)[:, None]
    if PRUNE:
        high = tl.gather(b_high, i0, 0)[:, None] - tl.gather(b_high, end, 0)[None, :]
        low = tl.gather(b_low, i0, 0)[:, None] - tl.gather(b_low, end, 0)[None, :]
        m_seen = m_seen & (high + low >= tl.minimum(tl.load(p_threshold), 0.0))
    m_skip = (end[None, :] < i0[:, None]) & m_tile[:, None] & (m_seen == 0)
    return tl.sum(m_skip.to(tl.int32), 1)


@triton.jit
def _inner(first, begin, end, last):
    """Of the blocks first..last, those of begin..end that need no mask, and how many precede."""
    begin = tl.minimum(tl.maximum(begin, first), last)
    end = tl.maximum(tl.minimum(end, last), begin)
    return begin, end, begin - first


@triton.jit
def _turn(step, first, end, edges):
    """The block of a step over those that need masks, on both sides of the inner ones."""
    return tl.where(step < edges, first + step, end + step - edges)


@triton.jit
def _scores(b_qk, scale, hi_i, hi_j, lo_j):
    """Scores in base 2 of pairs, exact but for the low part of c_i, which the caller adds to rows.

    All in [i, j] or [j, i] broadcast form, lo_j in base 2.
    """
    return (b_qk * scale - lo_j) + (hi_i - hi_j) * LOG2E


@triton.jit(
    do_not_specialize=["s_fb", "s_ft", "s_fh", "s_sb", "s_st", "pairs", "queries", "keys", "window"]
)
def _forward(
    p_q,
    p_k,
    p_v,
    p_log_f,
    p_start,
    p_threshold,
    p_o,
    p_lse,
    p_skipped,
    p_sums,
    p_sees,
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    s_fb,
    s_ft,
    s_fh,
    s_sb,
    s_st,
    pairs,
    heads,
    queries,
    keys,
    window,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    GROUPS: tl.constexpr,
    STARTS: tl.constexpr,
    PRUNE: tl.constexpr,
    PM: tl.constexpr,
    PN: tl.constexpr,
    BT: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Output and log-sum-exp of one head, or of every PARTS-th block of its rows."""
    follow(OVERLAP)
    i_pair, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_b, i_h = (i_pair // heads).to(tl.int64), i_pair % heads
    i_pair = i_b * heads + i_h
    i_kh = i_h // GROUPS
    offset = keys - queries
    t = tl.arange(0, BT)
    b_f, m_reset = resets(
        p_log_f + i_b * s_fb + i_h * s_fh, p_start + i_b * s_sb, t, keys, s_ft, s_st, STARTS
    )
    b_left = tl.where(m_reset, t, -1)
    b_f = tl.where(m_reset, 0.0, b_f)
    b_left, b_high, b_low = tl.associative_scan((b_left, b_f, b_f * 0.0), 0, append)
    b_left = tl.maximum(b_left, t - window + 1)
    scale *= LOG2E
    first = _first_tiles(
        b_high, b_low, b_left, p_threshold + i_pair, offset, queries, PRUNE, PM, PN, BT
    )
    b_low *= LOG2E
    # Of the programs of a head, one speaks for all.
    m_t = (t < BT) & (part == 0)
    p_sums += i_pair * LENGTH
    p_sees += i_pair * BT
    o_sums = pairs.to(tl.int64) * LENGTH
    tl.store(p_sums + t, b_high, mask=m_t)
    tl.store(p_sums + o_sums + t, b_low, mask=m_t)
    # Past the end: what the backward pass may read, and nothing that is not written.
    blocks = tl.cdiv(queries, BM)
    past = tl.arange(0, 2 * BT)
    m_past = (part == 0) & (past < LENGTH)
    tl.store(p_sums + past, 0.0, mask=m_past & (past >= BT))
    tl.store(p_sums + o_sums + past, 0.0, mask=m_past & (past >= BT))
    tl.store(p_sums + 2 * o_sums + past, 0.0, mask=m_past & (past >= blocks * BM))
    tl.store(p_sees + past, BT, mask=m_past & (past >= blocks * BM) & (past < BT))
    tl.store(p_skipped + i_pair, tl.sum(first), mask=part == 0)
    p_o += (i_b * queries * heads + i_h) * D
    p_lse += i_b * queries * heads + i_h
    column = tl.arange(0, BN)[None, :]
    for turn in range(tl.cdiv(blocks - part, PARTS)):
        begin = (part + turn * PARTS) * BM
        b_q = load_rows(p_q, i_b, i_h, begin, queries, s_qb, s_qt, s_qh, D, BD, BM, False)
        row = begin + tl.arange(0, BM)
        m_row = row < queries
        i = offset + tl.minimum(row, queries - 1)
        hi_i, frame = tl.gather(b_high, i, 0), tl.gather(b_low, i, 0)
        here = (row // PM)[:, None] == tl.arange(0, BT // PM)[None, :]
        edge = tl.sum(tl.where(here, first[None, :], 0), 1) * PN
        sees_i = tl.maximum(tl.gather(b_left, i, 0), edge)
        # A row past the end sees nothing.
        tl.store(p_sees + row, tl.where(m_row, sees_i, BT))
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_o = tl.zeros([BM, BD], tl.float32)
        last = offset + tl.minimum(begin + BM, queries) - 1
        first_tile = tl.min(sees_i) // BN
        inner, end, edges = _inner(
            first_tile, tl.cdiv(tl.max(sees_i), BN), (offset + begin + 1) // BN, last // BN + 1
        )
        for MASKED in tl.static_range(2):
            steps = edges + last // BN + 1 - end if MASKED else end - inner
            for step in range(steps):
                tile = _turn(step, first_tile, end, edges) if MASKED else inner + step
                j = tile * BN + tl.arange(0, BN)
                b_k = load_rows(p_k, i_b, i_kh, tile * BN, keys, s_kb, s_kt, s_kh, D, BD, BN, False)
                b_v = load_rows(p_v, i_b, i_kh, tile * BN, keys, s_vb, s_vt, s_vh, D, BD, BN, False)
                hi_j, lo_j = tl.gather(b_high, j, 0), tl.gather(b_low, j, 0)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                b_s = _scores(b_s, scale, hi_i[:, None], hi_j[None, :], lo_j[None, :])
                if MASKED:
                    m_pair = column <= (i - tile * BN)[:, None]
                    m_pair &= column >= (sees_i - tile * BN)[:, None]
                    b_s = tl.where(m_pair, b_s, float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, 1) + frame)
                b_pivot = b_new
                if MASKED:
                    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_s - (b_pivot - frame)[:, None])
                b_shrink = tl.exp2(b_max - b_pivot)
                b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
                b_o = b_o * b_shrink[:, None]
                b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
                b_max = b_new
        b_lse = b_max + tl.log2(b_sum)
        tl.store(p_lse + row * heads, b_lse * LN2, mask=m_row)
        tl.store(p_sums + 2 * o_sums + row, b_lse - frame)
        _store(p_o, row, m_row, heads * D, b_o * (1.0 / b_sum)[:, None], D, BD)


@triton.jit
def _store(p, row, inside, s_t, b, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    m = inside[:, None]
    if D < BD:
        m = m & (d < D)[None, :]
    tl.store(p + row[:, None] * s_t + d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit(
    do_not_specialize=[
        "s_fb", "s_ft", "s_fh", "s_sb", "s_st", "s_lb", "s_lt", "s_lh", "pairs", "queries", "keys",
    ]
)  # fmt: skip
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
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    s_fb,
    s_ft,
    s_fh,
    s_sb,
    s_st,
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

    By PM queries and BN keys first, which leaves sum(o do) - dlse of each row as if o had not been
    rounded; then by PN keys and BM queries, which leaves column sums of dS; then of the gates.
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
            b_q = load_rows(p_q, i_b, i_h, begin, queries, s_qb, s_qt, s_qh, D, BD, PM, False)
            b_do = load_rows(p_do, i_b, i_h, begin, queries, s_db, s_dt, s_dh, D, BD, PM, False)
            b_o = load_rows(p_o, i_b, i_h, begin, queries, s_ob, s_ot, s_oh, D, BD, PM, False)
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
            inner, end, edges = _inner(
                first_tile,
                tl.cdiv(tl.load(p_see + PM - 1), BN),
                (offset + begin + 1) // BN,
                last // BN + 1,
            )
            for MASKED in tl.static_range(2):
                steps = edges + last // BN + 1 - end if MASKED else end - inner
                for step in range(steps):
                    tile = _turn(step, first_tile, end, edges) if MASKED else inner + step
                    b_k = load_rows(
                        p_k, i_b, i_kh, tile * BN, keys, s_kb, s_kt, s_kh, D, BD, BN, False
                    )
                    b_v = load_rows(
                        p_v, i_b, i_kh, tile * BN, keys, s_vb, s_vt, s_vh, D, BD, BN, False
                    )
                    hi_j = tl.load(p_high + tile * BN + c)
                    lo_j = tl.load(p_high + (o_sums + tile * BN) + c)
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                    b_s = _scores(b_s, scale2, hi_i[:, None], hi_j[None, :], lo_j[None, :])
                    if MASKED:
                        m_pair = c[None, :] <= (offset + row - tile * BN)[:, None]
                        m_pair &= c[None, :] >= (sees_i - tile * BN)[:, None]
                        b_s = tl.where(m_pair, b_s, float("-inf"))
                    b_p = tl.exp2(b_s - b_term[:, None])
                    b_ds = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
                    b_ds = b_p * (b_ds - b_delta[:, None])
                    b_row += tl.sum(b_ds, 1)
                    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
            # A row of dS sums to dlse; what is over is the rounding of o in delta, which ends here.
            tl.store(p_delta + (i_pair * BT + begin) + r, b_delta + b_row - b_dlse)
            _store(p_dq + o_h * D, row, m_row, heads * D, b_dq * scale, D, BD)

    tl.debug_barrier()
    r, c = tl.arange(0, BM), tl.arange(0, PN)
    o_key = (i_b * keys * key_heads + i_kh) * D
    for tile in range(tl.cdiv(keys, PN)):
        j = tile * PN + c
        b_k = load_rows(p_k, i_b, i_kh, tile * PN, keys, s_kb, s_kt, s_kh, D, BD, PN, False)
        b_v = load_rows(p_v, i_b, i_kh, tile * PN, keys, s_vb, s_vt, s_vh, D, BD, PN, False)
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
            # What queries see moves forward only.
            block = tl.arange(0, BT // BM) * BM
            p_see = p_sees + i_pair * BT + block
            last = tl.sum((tl.load(p_see) < tile * PN + PN).to(tl.int32))
            whole = tl.sum((tl.load(p_see + BM - 1) <= tile * PN).to(tl.int32))
            first = tl.maximum(tile * PN - offset, 0) // BM
            inner, end, edges = _inner(
                first, tl.cdiv(tl.maximum(tile * PN + PN - 1 - offset, 0), BM), whole, last
            )
            for MASKED in tl.static_range(2):
                steps = edges + last - end if MASKED else end - inner
                for step in range(steps):
                    begin = (_turn(step, first, end, edges) if MASKED else inner + step) * BM
                    b_q = load_rows(
                        p_q, i_b, i_h, begin, queries, s_qb, s_qt, s_qh, D, BD, BM, False
                    )
                    b_do = load_rows(
                        p_do, i_b, i_h, begin, queries, s_db, s_dt, s_dh, D, BD, BM, False
                    )
                    hi_i = tl.load(p_high + (offset + begin) + r)
                    b_term = tl.load(p_high + (2 * o_sums + begin) + r)
                    b_delta = tl.load(p_delta + (i_pair * BT + begin) + r)
                    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                    b_s = _scores(b_s, scale2, hi_i[None, :], hi_j[:, None], lo_j[:, None])
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
        _store(p_dk + o_key, j, j < keys, key_heads * D, b_dk * scale, D, BD)
        _store(p_dv + o_key, j, j < keys, key_heads * D, b_dv, D, BD)

    tl.debug_barrier()
    t = tl.arange(0, BT)
    inside = t < keys
    for group in range(GROUPS):
        i_h = i_kh * GROUPS + group
        p_gate = p_dlog_f + (i_b * keys + t) * heads + i_h
        # A row of dS sums to dlse.
        b_flow = -tl.load(p_gate, mask=inside, other=0.0)
        if DLSE:
            p_dl = p_dlse + i_b * s_lb + i_h * s_lh + (t - offset) * s_lt
            b_flow += tl.load(p_dl, mask=inside & (t >= offset), other=0.0)
        p_f, p_s = p_log_f + i_b * s_fb + i_h * s_fh, p_start + i_b * s_sb
        _, m_reset = resets(p_f, p_s, t, keys, s_ft, s_st, STARTS)
        _, m_next = resets(p_f, p_s, t + 1, keys, s_ft, s_st, STARTS)
        # The gate at t carries what flows at t and later, up to where the next episode begins.
        _, b_gate = tl.associative_scan(
            (m_next.to(tl.int32), b_flow), 0, append_before, reverse=True
        )
        tl.store(p_gate, tl.where(m_reset, 0.0, b_gate), mask=inside)


@functools.cache
def _launcher(
    launch: Launch,
    tile: Tiles,
    width: int,
    groups: int,
    starts: bool,
    early: bool,
    prune: bool | None = None,
    dlse: bool | None = None,
) -> Launcher:
    """The kernel with what is fixed when it is compiled; backward if dlse is not None.

    Raises: ValueError for a launch whose blocks do not divide the tiles.
    """
    if tile.rows % launch.rows or tile.columns % launch.columns:
        raise ValueError(
            f"CONFIGS: expected rows and columns that divide tiles of {tile.rows} by "
            f"{tile.columns}, got {launch}"
        )
    own = dict(PRUNE=prune, PARTS=launch.parts) if dlse is None else dict(DLSE=dlse)
    return Launcher(
        _forward if dlse is None else _backward,
        D=width, BD=block_size(width), GROUPS=groups, STARTS=starts, **own,
        PM=tile.rows, PN=tile.columns, BT=MEDIUM_KEYS, BM=launch.rows, BN=launch.columns,
        num_warps=launch.warps, num_stages=launch.stages, **cap(launch), **options(early),
    )  # fmt: skip


def _choose(
    role: str,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    start: Tensor | None,
    launch: Launch | None,
    **own: bool,
) -> tuple[int, Launcher]:
    """Forward programs of a head, and what launches a role."""
    heads, width = q.shape[2:]
    launch = launch or CONFIGS[role, block_size(width), q.element_size()]
    given = width, heads // k.shape[2], start is not None, starts_early(q)
    return launch.parts, _launcher(launch, plan.tiles, *given, **own)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    *,
    plan: Plan,
    window: int,
    scale: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, M, Hq, D], lse [B, M, Hq], tiles not visited [B, Hq], and what `backward` wants.

    Args:    as checked by `forgetting_attention`, 16-bit rows of q, k and v contiguous, D at most
             64, N of 129 to 256; threshold [B, Hq] contiguous; window 0 is none; launch replaces
             the table's choice.
    Returns: after the first three [3, B, Hq, 320] of positions the decayed sums, high and low part
             (base 2), and of query rows the log-sum-exp (base 2) less the low part; and the first
             key that each row visits [B, Hq, 256] int32.
    """
    batch, queries, heads, _ = q.shape
    keys, pairs = k.shape[1], batch * heads
    parts, run = _choose("forward", plan, q, k, start, launch, prune=threshold is not None)
    start = None if start is None else start.view(torch.uint8)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = log_f.new_empty(batch, queries, heads)
    skipped = log_f.new_empty(batch, heads)
    sums = log_f.new_empty(3, batch, heads, plan.sums_length)
    sees = log_f.new_empty(batch, heads, plan.left_length, dtype=torch.int32)
    run(
        pairs * parts,
        (
            q, k, v, log_f, log_f if start is None else start,
            lse if threshold is None else threshold, o, lse, skipped, sums, sees,
        ),
        (
            *strides(q, k, v), *log_f.stride(), *((0, 0) if start is None else start.stride()),
            pairs, heads, queries, keys, window or keys,
        ),
        scale,
    )  # fmt: skip
    return o, lse, skipped, sums, sees


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
    """Gradients of q, k, v and log_f; arguments as of `forward`, rows of do contiguous."""
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    pairs = batch * heads
    _, run = _choose("backward", plan, q, k, start, launch, dlse=dlse is not None)
    start = None if start is None else start.view(torch.uint8)
    dq, dk, dv, dlog_f = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_f)
    )
    delta = lse.new_empty(batch, heads, plan.left_length)
    run(
        batch * key_heads,
        (
            q, k, v, log_f, log_f if start is None else start, sums, sees, o,
            do, lse if dlse is None else dlse, delta, dq, dk, dv, dlog_f,
        ),
        (
            *strides(q, k, v), *log_f.stride(), *((0, 0) if start is None else start.stride()),
            *strides(o, do), *((0, 0, 0) if dlse is None else dlse.stride()),
            pairs, heads, queries, keys,
        ),
        scale,
    )  # fmt: skip
    return dq, dk, dv, dlog_f
