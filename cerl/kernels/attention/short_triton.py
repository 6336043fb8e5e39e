"""Forgetting attention in Triton for short sequences: one launch forward and one backward.

A program holds all keys of a head and takes the queries in blocks. It may hold several heads; then
every block of numbers leads with an axis of PAIRS (pairs of batch row and head). The keys fill the
last of BT slots: the key at position t is in slot t + BT - keys. Each slot before position 0 is an
episode of its own, so that every slot sees a key. Sums run in a fixed order. Tuples of strides are
(batch, time, head).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.rows_triton import strides
from cerl.kernels.attention.scan_triton import LN2, LOG2E, append, append_before
from cerl.kernels.runtime.blocks import block_size
from cerl.kernels.runtime.launch import Launcher
from cerl.kernels.runtime.overlap import follow, options, starts_early


class Launch(NamedTuple):
    """Block sizes of a program that holds whole heads; unlike `launch.Launch` without columns."""

    rows: int  # of queries in a block
    pairs: int  # heads of a program
    warps: int
    registers: int | None = None  # most of a thread; not kept where query heads share a key head


# Forward and backward, keyed by (padded length, padded width, bytes of an element). Products in
# float32 run without matrix units, and spill where blocks are larger.
CONFIGS: dict[tuple[int, int, int], tuple[Launch, Launch]] = {
    (16, 16, 2): (Launch(16, 2, 1), Launch(16, 2, 1)),
    (16, 32, 2): (Launch(16, 2, 1), Launch(16, 2, 1)),
    (16, 64, 2): (Launch(16, 1, 1), Launch(16, 1, 2)),
    (32, 16, 2): (Launch(32, 1, 1), Launch(32, 1, 1)),
    (32, 32, 2): (Launch(32, 1, 2), Launch(32, 1, 2)),
    (32, 64, 2): (Launch(32, 1, 2), Launch(32, 1, 4)),
    (64, 16, 2): (Launch(64, 1, 4), Launch(64, 1, 4, 128)),
    (64, 32, 2): (Launch(64, 1, 4), Launch(64, 1, 4, 128)),
    (64, 64, 2): (Launch(64, 1, 4), Launch(64, 1, 4, 128)),
    (128, 16, 2): (Launch(128, 1, 8), Launch(128, 1, 8)),
    (128, 32, 2): (Launch(128, 1, 8), Launch(128, 1, 8)),
    (128, 64, 2): (Launch(128, 1, 8), Launch(128, 1, 8)),
    (16, 16, 4): (Launch(16, 1, 2), Launch(16, 1, 2)),
    (16, 32, 4): (Launch(16, 1, 2), Launch(16, 1, 2)),
    (16, 64, 4): (Launch(16, 1, 2), Launch(16, 1, 2)),
    (32, 16, 4): (Launch(32, 1, 4), Launch(32, 1, 4)),
    (32, 32, 4): (Launch(32, 1, 4), Launch(32, 1, 4)),
    (32, 64, 4): (Launch(16, 1, 4), Launch(32, 1, 8)),
    (64, 16, 4): (Launch(32, 1, 8), Launch(16, 1, 8)),
    (64, 32, 4): (Launch(16, 1, 4), Launch(16, 1, 8)),
    (64, 64, 4): (Launch(16, 1, 4), Launch(16, 1, 8)),
    (128, 16, 4): (Launch(16, 1, 8), Launch(16, 1, 8)),
    (128, 32, 4): (Launch(16, 1, 8), Launch(16, 1, 8)),
    (128, 64, 4): (Launch(16, 1, 8), Launch(16, 1, 16)),
}


@triton.jit
def _pairs(pairs, heads, PAIRS: tl.constexpr):
    """Batch row (int64) and head of this program; [PAIRS, 1] if it holds several.

    Where the last program has more places than pairs are left, it computes the last pair again.
    """
    i = tl.program_id(0)
    if PAIRS > 1:
        i = tl.minimum(i * PAIRS + tl.arange(0, PAIRS), pairs - 1)[:, None]
    return (i // heads).to(tl.int64), i % heads


@triton.jit
def _gates(p_log_f, p_start, t, keys, s_ft, s_st, STARTS: tl.constexpr):
    """log_f at t, 0 where an episode of this head begins, and whether one does."""
    inside = (t >= 0) & (t < keys)
    b_f = tl.load(p_log_f + t * s_ft, mask=inside, other=0.0)
    m_reset = (b_f == float("-inf")) | (t <= 0)
    if STARTS:
        m_reset = m_reset | tl.load(p_start + t * s_st, mask=inside, other=0)
    return tl.where(m_reset, 0.0, b_f), m_reset


@triton.jit
def _decay(b_f, m_reset, slot, window):
    """Decayed sums in two floats, and the first slot that each slot sees."""
    b_left = tl.where(m_reset, slot, -1)
    # The interpreter does not scan along axis -1.
    b_left, b_high, b_low = tl.associative_scan(
        (b_left, b_f, b_f * 0.0), len(b_f.shape) - 1, append
    )
    return b_high, b_low, tl.maximum(b_left, slot - window + 1)


@triton.jit
def _rows(p, row, inside, s_t, D: tl.constexpr, BD: tl.constexpr):
    """Rows [..., BD] of a head; zeros outside and past D."""
    d = tl.arange(0, BD)
    m = tl.expand_dims(inside, -1)
    if D < BD:
        m = m & (d < D)
    return tl.load(tl.expand_dims(p + row * s_t, -1) + d, mask=m, other=0.0)


@triton.jit
def _store(p, row, inside, s_t, b, D: tl.constexpr, BD: tl.constexpr):
    """Stores rows [..., BD] of a head, but not outside nor past D."""
    d = tl.arange(0, BD)
    m = tl.expand_dims(inside, -1)
    if D < BD:
        m = m & (d < D)
    tl.store(tl.expand_dims(p + row * s_t, -1) + d, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _pick(b, block, PAIRS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """The entries [..., BM] of one block of queries, out of those of all slots [..., BT]."""
    BLOCKS: tl.constexpr = BT // BM
    if BLOCKS == 1:
        return b
    else:
        here = tl.arange(0, BLOCKS)[:, None] == block
        b = tl.reshape(b, [BLOCKS, BM] if PAIRS == 1 else [PAIRS, BLOCKS, BM])
        return tl.sum(tl.where(here, b, tl.zeros_like(b)), -2)


@triton.jit
def _place(b, block, PAIRS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """The entries [..., BM] of one block of queries, in their slots of [..., BT], others 0."""
    BLOCKS: tl.constexpr = BT // BM
    if BLOCKS == 1:
        return b
    else:
        here = tl.arange(0, BLOCKS)[:, None] == block
        b = tl.where(here, tl.expand_dims(b, -2), 0.0)
        return tl.reshape(b, [BT] if PAIRS == 1 else [PAIRS, BT])


@triton.jit
def _slots(block, PAIRS: tl.constexpr, BM: tl.constexpr):
    """Numbers of the slots of a block, with a leading axis where there is one of pairs."""
    i = block * BM + tl.arange(0, BM)
    if PAIRS > 1:
        i = i[None, :]
    return i


@triton.jit
def _scores(b_qk, hi_i, lo_i, hi_j, lo_j, left_i, i, j, scale):
    """Scores in base 2, -inf where i does not see j; all arguments broadcast to the shape of b_qk.

    Decays are added to 0 times the products, which makes the compiler keep both in the same layout.
    """
    b_decay = ((b_qk * 0.0 + hi_i) - hi_j) + ((b_qk * 0.0 + lo_i) - lo_j)
    b_s = b_qk * (scale * LOG2E) + b_decay * LOG2E
    return tl.where((j <= i) & (j >= left_i), b_s, float("-inf"))


@triton.jit
def _first_block(queries, BT: tl.constexpr, BM: tl.constexpr):
    """The block of queries that holds the first one."""
    if BT == BM:
        return 0
    else:
        return (BT - queries) // BM


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
    p_o,
    p_lse,
    p_skipped,
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
    PAIRS: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Output and log-sum-exp of PAIRS heads."""
    follow(OVERLAP)
    i_b, i_h = _pairs(pairs, heads, PAIRS)
    slot = _slots(0, PAIRS, BT)
    i_kh = i_h // GROUPS
    t = slot - (BT - keys)
    inside = t >= 0
    # All loads are issued before the scan, which waits for its own, so that they overlap.
    b_f, m_reset = _gates(
        p_log_f + i_b * s_fb + i_h * s_fh, p_start + i_b * s_sb, t, keys, s_ft, s_st, STARTS
    )
    b_k = _rows(p_k + i_b * s_k[0] + i_kh * s_k[2], t, inside, s_k[1], D, BD)
    b_v = _rows(p_v + i_b * s_v[0] + i_kh * s_v[2], t, inside, s_v[1], D, BD)
    p_q += i_b * s_q[0] + i_h * s_q[2]
    first = _first_block(queries, BT, BM)
    row = _slots(first, PAIRS, BM) - (BT - queries)
    b_q = _rows(p_q, row, row >= 0, s_q[1], D, BD)
    b_high, b_low, b_left = _decay(b_f, m_reset, slot, window)
    p_o += (i_b * queries * heads + i_h) * D
    p_lse += i_b * queries * heads + i_h
    hi_j, lo_j = tl.expand_dims(b_high, -2), tl.expand_dims(b_low, -2)
    tl.store(p_skipped + i_b * heads + i_h, 0.0)
    for block in range(first, BT // BM):
        i = _slots(block, PAIRS, BM)
        row = i - (BT - queries)
        hi_i = tl.expand_dims(_pick(b_high, block, PAIRS, BT, BM), -1)
        lo_i = tl.expand_dims(_pick(b_low, block, PAIRS, BT, BM), -1)
        left_i = tl.expand_dims(_pick(b_left, block, PAIRS, BT, BM), -1)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        i, j = tl.expand_dims(i, -1), tl.expand_dims(slot, -2)
        b_s = _scores(b_s, hi_i, lo_i, hi_j, lo_j, left_i, i, j, scale)
        b_max = tl.max(b_s, -1)
        b_p = tl.exp2(b_s - tl.expand_dims(b_max, -1))
        b_sum = tl.sum(b_p, -1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_o = b_o * tl.expand_dims(1.0 / b_sum, -1)
        tl.store(p_lse + row * heads, (b_max + tl.log2(b_sum)) * LN2, mask=row >= 0)
        _store(p_o, row, row >= 0, heads * D, b_o, D, BD)
        if BM < BT:
            row += BM
            b_q = _rows(p_q, row, row < queries, s_q[1], D, BD)


@triton.jit
def _queries(
    p_q,
    p_do,
    p_lse,
    p_dlse,
    s_q,
    s_do,
    s_lt,
    row,
    queries,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    DLSE: tl.constexpr,
):
    """q and do of rows, their log-sum-exp in base 2, and dlse.

    A row that is no query gets a log-sum-exp of infinity, and so the weight 0.
    """
    inside = (row >= 0) & (row < queries)
    b_q = _rows(p_q, row, inside, s_q[1], D, BD)
    b_do = _rows(p_do, row, inside, s_do[1], D, BD)
    b_lse = tl.load(p_lse + row * heads, mask=inside, other=float("inf")) * LOG2E
    b_dlse = tl.zeros_like(b_lse)
    if DLSE:
        b_dlse = tl.load(p_dlse + row * s_lt, mask=inside, other=0.0)
    return b_q, b_do, b_lse, b_dlse


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
        "window",
    ]
)
def _backward(
    p_q,
    p_k,
    p_v,
    p_log_f,
    p_start,
    p_lse,
    p_do,
    p_dlse,
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
    s_do,
    s_lb,
    s_lt,
    s_lh,
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
    DLSE: tl.constexpr,
    PAIRS: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All gradients of PAIRS key heads and of the query heads that read them, one after another.

    Blocks of scores are [key, query].
    """
    follow(OVERLAP)
    key_heads = heads // GROUPS
    i_b, i_kh = _pairs(pairs, key_heads, PAIRS)
    slot = _slots(0, PAIRS, BT)
    t = slot - (BT - keys)
    inside = t >= 0
    b_k = _rows(p_k + i_b * s_k[0] + i_kh * s_k[2], t, inside, s_k[1], D, BD)
    b_v = _rows(p_v + i_b * s_v[0] + i_kh * s_v[2], t, inside, s_v[1], D, BD)
    b_dk = tl.zeros(b_k.shape, tl.float32)
    b_dv = tl.zeros(b_k.shape, tl.float32)
    first = _first_block(queries, BT, BM)
    for group in range(GROUPS):
        i_h = i_kh * GROUPS + group
        # All loads are issued before the scan, which waits for its own, so that they overlap.
        p_f, p_s = p_log_f + i_b * s_fb + i_h * s_fh, p_start + i_b * s_sb
        b_f, m_reset = _gates(p_f, p_s, t, keys, s_ft, s_st, STARTS)
        _, m_next = _gates(p_f, p_s, t + 1, keys, s_ft, s_st, STARTS)
        p_qh, p_doh = p_q + i_b * s_q[0] + i_h * s_q[2], p_do + i_b * s_do[0] + i_h * s_do[2]
        o_h = i_b * queries * heads + i_h
        p_lseh, p_dlseh = p_lse + o_h, p_dlse + i_b * s_lb + i_h * s_lh
        row = _slots(first, PAIRS, BM) - (BT - queries)
        b_q, b_do, b_lse, b_dlse = _queries(
            p_qh,
            p_doh,
            p_lseh,
            p_dlseh,
            s_q,
            s_do,
            s_lt,
            row,
            queries,
            heads,
            D,
            BD,
            DLSE,
        )
        b_high, b_low, b_left = _decay(b_f, m_reset, slot, window)
        hi_j, lo_j = tl.expand_dims(b_high, -1), tl.expand_dims(b_low, -1)
        b_flow = tl.zeros_like(b_high)
        for block in range(first, BT // BM):
            i = _slots(block, PAIRS, BM)
            row = i - (BT - queries)
            hi_i = tl.expand_dims(_pick(b_high, block, PAIRS, BT, BM), -2)
            lo_i = tl.expand_dims(_pick(b_low, block, PAIRS, BT, BM), -2)
            left_i = tl.expand_dims(_pick(b_left, block, PAIRS, BT, BM), -2)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            i, j = tl.expand_dims(i, -2), tl.expand_dims(slot, -1)
            b_s = _scores(b_s, hi_i, lo_i, hi_j, lo_j, left_i, i, j, scale)
            b_p = tl.exp2(b_s - tl.expand_dims(b_lse, -2))
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_ds = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            # Delta is summed over the keys, which are all here: that is more exact than sum(o do),
            # as o is rounded.
            b_delta = tl.sum(b_p * b_ds, -2) - b_dlse
            b_ds = b_p * (b_ds - tl.expand_dims(b_delta, -2))
            b_flow += _place(tl.sum(b_ds, -2), block, PAIRS, BT, BM) - tl.sum(b_ds, -1)
            b_round = b_ds.to(b_q.dtype)
            b_dk = tl.dot(b_round, b_q, b_dk, input_precision="ieee")
            b_dq = tl.dot(tl.trans(b_round), b_k, input_precision="ieee") * scale
            _store(p_dq + o_h * D, row, row >= 0, heads * D, b_dq, D, BD)
            if BM < BT:
                b_q, b_do, b_lse, b_dlse = _queries(
                    p_qh,
                    p_doh,
                    p_lseh,
                    p_dlseh,
                    s_q,
                    s_do,
                    s_lt,
                    row + BM,
                    queries,
                    heads,
                    D,
                    BD,
                    DLSE,
                )
        # log_f at t is part of the sums of t and of later positions, up to the next episode.
        _, b_gate = tl.associative_scan(
            (m_next.to(tl.int32), b_flow), len(b_flow.shape) - 1, append_before, reverse=True
        )
        o_gate = (i_b * keys + t) * heads + i_h
        tl.store(p_dlog_f + o_gate, tl.where(m_reset, 0.0, b_gate), mask=inside)
    o_key = (i_b * keys * key_heads + i_kh) * D
    _store(p_dk + o_key, t, inside, key_heads * D, b_dk * scale, D, BD)
    _store(p_dv + o_key, t, inside, key_heads * D, b_dv, D, BD)


@functools.cache
def _launcher(
    launch: Launch,
    length: int,
    queries: int,
    width: int,
    groups: int,
    starts: bool,
    early: bool,
    dlse: bool | None = None,
) -> Launcher:
    """The kernel with what is fixed when it is compiled; backward if dlse is not None."""
    backward = {} if dlse is None else dict(DLSE=dlse)
    return Launcher(
        _forward if dlse is None else _backward,
        D=width,
        BD=block_size(width),
        GROUPS=groups,
        STARTS=starts,
        **backward,
        PAIRS=launch.pairs,
        BT=length,
        BM=min(launch.rows, queries, length),
        num_warps=launch.warps,
        num_stages=1,
        maxnreg=launch.registers if groups == 1 else None,
        **options(early),
    )


def _choose(
    role: int, q: Tensor, k: Tensor, start: Tensor | None, launch: Launch | None, *dlse: bool
) -> tuple[int, Launcher]:
    """Heads of a program, and what launches it."""
    _, queries, heads, width = q.shape
    _, keys, key_heads, _ = k.shape
    length = block_size(keys)
    launch = launch or CONFIGS[length, block_size(width), q.element_size()][role]
    given = block_size(queries), width, heads // key_heads, start is not None, starts_early(q)
    return launch.pairs, _launcher(launch, length, *given, *dlse)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    *,
    window: int,
    scale: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp [B, M, Hq] and number of tiles skipped [B, Hq] (0), all float32 but o.

    Args:    as checked by `forgetting_attention`, at most 128 keys, D at most 64, rows of q, k and
             v contiguous; window 0 is none; launch replaces the table's choice.
    """
    batch, queries, heads, _ = q.shape
    keys, pairs = k.shape[1], batch * heads
    together, run = _choose(0, q, k, start, launch)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = log_f.new_empty(batch, queries, heads)
    skipped = log_f.new_empty(batch, heads)
    run(
        -(-pairs // together),
        (q, k, v, log_f, log_f if start is None else start, o, lse, skipped),
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
    return o, lse, skipped


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
    *,
    window: int,
    scale: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_f; arguments as of `forward`, rows of do contiguous.

    o is not looked at.
    """
    batch, queries, heads, _ = q.shape
    keys, pairs = k.shape[1], batch * k.shape[2]
    together, run = _choose(1, q, k, start, launch, dlse is not None)
    dq, dk, dv, dlog_f = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_f)
    )
    run(
        -(-pairs // together),
        (
            q,
            k,
            v,
            log_f,
            log_f if start is None else start,
            lse,
            do,
            lse if dlse is None else dlse,
            dq,
            dk,
            dv,
            dlog_f,
        ),
        (
            *strides(q, k, v),
            *log_f.stride(),
            *((0, 0) if start is None else start.stride()),
            *strides(do),
            *((0, 0, 0) if dlse is None else dlse.stride()),
            pairs,
            heads,
            queries,
            keys,
            window or keys,
        ),
        scale,
    )
    return dq, dk, dv, dlog_f
