"""Forgetting attention in Triton for 129 to 256 keys of 16 bits: the one launch forward.

Every program scans the gates of its head and finds the tiles that it skips; it leaves both to the
backward pass (`medium_backward_triton.py`). Sums run in a fixed order.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.launch import Launch
from cerl.kernels.attention.plan import MARGIN, MEDIUM_KEYS, Plan, Tiles
from cerl.kernels.attention.rows_triton import load_rows, store_rows, strides
from cerl.kernels.attention.scan_triton import LN2, LOG2E, append, resets
from cerl.kernels.runtime.blocks import block_size
from cerl.kernels.runtime.launch import Launcher
from cerl.kernels.runtime.overlap import follow, options, starts_early

# Positions in the buffer of sums: blocks of rows may end past the last position.
LENGTH: tl.constexpr = tl.constexpr(MEDIUM_KEYS + MARGIN)
# Keyed by (role, padded width, bytes of an element). Backward, blocks of the pass by queries have
# all rows of a tile and these columns; blocks of the pass by keys these rows and all columns.
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
    """How many tiles of PN keys each tile of PM queries skips: [BT // PM], the tile it begins at.

    A tile of keys that ends before the first query of a tile of queries is skipped if that query
    does not see its last key, or sees it over a decay below the threshold (`pruning.visited`).
    """
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


# A row of blocks of keys, as a block of four queries visits it; # is a pair that is computed:
#
#             first     begin              end       last
#               |---------|-----------------|---------|
#               |  masks  |    no masks     |  masks  |
#    query 0    |    #####|#################|##       |
#    query 1    |     ####|#################|####     |
#    query 2    |       ##|#################|######   |
#    query 3    |        #|#################|######## |
#                what each                   the
#                query sees                  diagonal
#
# `begin` to `end` are the inner blocks, which a loop without masks takes; the `edges` blocks before
# them and those after them are taken by one loop with masks. The pass by keys of the backward
# kernel walks over blocks of queries in the same way, from the diagonal on.


@triton.jit
def inner_blocks(first, begin, end, last):
    """begin and end of the inner blocks, kept within first and last, and the blocks before them."""
    begin = tl.minimum(tl.maximum(begin, first), last)
    end = tl.maximum(tl.minimum(end, last), begin)
    return begin, end, begin - first


@triton.jit
def edge_block(step, first, end, edges):
    """The block of a step of the loop with masks, which leaves out the inner blocks."""
    return tl.where(step < edges, first + step, end + step - edges)


@triton.jit
def pair_scores(b_qk, scale, hi_i, hi_j, lo_j):
    """Scores in base 2 of pairs, which lack only the low part of the sum of row i.

    The caller adds that part to the maximum or the log-sum-exp of the row, which is one number.
    Arguments in [i, j] or [j, i] broadcast form; lo_j in base 2.
    """
    return (b_qk * scale - lo_j) + (hi_i - hi_j) * LOG2E


# Strides of gates are not in a tuple, where Triton would specialise them (`rows_triton.strides`).
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
    s_q,
    s_k,
    s_v,
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
    # All programs of a head have found the same; the first one writes it.
    m_t = (t < BT) & (part == 0)
    p_sums += i_pair * LENGTH
    p_sees += i_pair * BT
    o_sums = pairs.to(tl.int64) * LENGTH
    tl.store(p_sums + t, b_high, mask=m_t)
    tl.store(p_sums + o_sums + t, b_low, mask=m_t)
    # The backward pass reads whole blocks, so that places past the end need values too: sums of 0,
    # and rows that see no key.
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
        b_q = load_rows(p_q, i_b, i_h, begin, queries, s_q, D, BD, BM, False)
        row = begin + tl.arange(0, BM)
        m_row = row < queries
        i = offset + tl.minimum(row, queries - 1)
        hi_i, frame = tl.gather(b_high, i, 0), tl.gather(b_low, i, 0)
        here = (row // PM)[:, None] == tl.arange(0, BT // PM)[None, :]
        edge = tl.sum(tl.where(here, first[None, :], 0), 1) * PN
        sees_i = tl.maximum(tl.gather(b_left, i, 0), edge)
        # BT is past the last key: a row past the end sees nothing.
        tl.store(p_sees + row, tl.where(m_row, sees_i, BT))
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_o = tl.zeros([BM, BD], tl.float32)
        last = offset + tl.minimum(begin + BM, queries) - 1
        first_tile = tl.min(sees_i) // BN
        inner, end, edges = inner_blocks(
            first_tile, tl.cdiv(tl.max(sees_i), BN), (offset + begin + 1) // BN, last // BN + 1
        )
        for MASKED in tl.static_range(2):
            steps = edges + last // BN + 1 - end if MASKED else end - inner
            for step in range(steps):
                tile = edge_block(step, first_tile, end, edges) if MASKED else inner + step
                j = tile * BN + tl.arange(0, BN)
                b_k = load_rows(p_k, i_b, i_kh, tile * BN, keys, s_k, D, BD, BN, False)
                b_v = load_rows(p_v, i_b, i_kh, tile * BN, keys, s_v, D, BD, BN, False)
                hi_j, lo_j = tl.gather(b_high, j, 0), tl.gather(b_low, j, 0)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                b_s = pair_scores(b_s, scale, hi_i[:, None], hi_j[None, :], lo_j[None, :])
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
        store_rows(p_o, row, m_row, heads * D, b_o * (1.0 / b_sum)[:, None], D, BD)


def constants(
    launch: Launch, tiles: Tiles, width: int, groups: int, starts: bool, early: bool
) -> dict[str, Any]:
    """What is fixed when either medium kernel is compiled, and the options of its launch.

    Raises: ValueError for a launch whose blocks do not divide the tiles.
    """
    if tiles.rows % launch.rows or tiles.columns % launch.columns:
        raise ValueError(
            f"CONFIGS: expected rows and columns that divide tiles of {tiles.rows} by "
            f"{tiles.columns}, got {launch}"
        )
    return dict(
        D=width,
        BD=block_size(width),
        GROUPS=groups,
        STARTS=starts,
        PM=tiles.rows,
        PN=tiles.columns,
        BT=MEDIUM_KEYS,
        BM=launch.rows,
        BN=launch.columns,
        **launch.options,
        **options(early),
    )


@functools.cache
def _launcher(prune: bool, launch: Launch, *given: Any) -> Launcher:
    return Launcher(_forward, PRUNE=prune, PARTS=launch.parts, **constants(launch, *given))


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
    """o [B, M, Hq, D], lse [B, M, Hq], tiles not visited [B, Hq], and what `backward` needs.

    Args:    as checked by `forgetting_attention`, rows of q, k and v contiguous; plan of the medium
             regime; threshold [B, Hq] contiguous; window 0 is none; launch replaces the table's
             choice.
    Returns: the last two are sums [3, B, Hq, plan.sums_length]: of every position the decayed sum,
             its high part and its low part (base 2), and of every query row the log-sum-exp (base
             2) less the low part of its sum; and the first key that each row visits,
             [B, Hq, plan.left_length] int32.
    """
    batch, queries, heads, width = q.shape
    keys, pairs = k.shape[1], batch * heads
    launch = launch or CONFIGS["forward", block_size(width), q.element_size()]
    run = _launcher(
        threshold is not None,
        launch,
        plan.tiles,
        width,
        heads // k.shape[2],
        start is not None,
        starts_early(q),
    )
    start = None if start is None else start.view(torch.uint8)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = log_f.new_empty(batch, queries, heads)
    skipped = log_f.new_empty(batch, heads)
    sums = log_f.new_empty(3, batch, heads, plan.sums_length)
    sees = log_f.new_empty(batch, heads, plan.left_length, dtype=torch.int32)
    run(
        pairs * launch.parts,
        (
            q,
            k,
            v,
            log_f,
            log_f if start is None else start,
            lse if threshold is None else threshold,
            o,
            lse,
            skipped,
            sums,
            sees,
        ),
        (
            *strides(q, k, v),
            *log_f.stride(),
            *((0, 0) if start is None else start.stride()),
            pairs,
            heads,
            queries,
            keys,
            window or keys,
        ),
        scale,
    )
    return o, lse, skipped, sums, sees
