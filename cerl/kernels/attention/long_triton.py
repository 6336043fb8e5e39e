"""Forgetting attention in Triton for sequences of any length: the forward pass.

Most scores take one multiply-add: their decay is counted from the first row of the query tile
instead of from their own row, which adds a constant to each row, and softmax does not depend on
that. Blocks that need a mask, on the diagonal or where an episode begins, use exact decays. A scan
of the gates (`scan_triton.py`) has found which tiles to visit. Sums run in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.attention.launch import Launch
from cerl.kernels.attention.plan import Plan, Tiles
from cerl.kernels.attention.rows_triton import load_rows, strides, tiled, vector, vectors
from cerl.kernels.attention.scan_triton import LN2, LOG2E, load_decay, prepare, sum_pointers
from cerl.kernels.runtime.blocks import block_size
from cerl.kernels.runtime.overlap import follow, overlap

LANES: tl.constexpr = tl.constexpr(128)  # tiles that are compared at once


# Keyed by (role, padded width, bytes of an element): the output, the gradients of k and v, and the
# gradient of q. Forward and queries must have the same columns.
# Timed on an H200 at 4,4096,16,64 and 16,1024,8,128; `cerl bench attention-tiles` times others.
CONFIGS: dict[tuple[str, int, int], Launch] = {
    ("forward", 64, 2): Launch(64, 64, 4, 2, 128),
    ("forward", 128, 2): Launch(64, 64, 4, 2),
    ("forward", 64, 4): Launch(64, 32, 4, 1),
    ("forward", 128, 4): Launch(64, 32, 8, 1),
    ("keys", 64, 2): Launch(64, 64, 4, 3),
    ("keys", 128, 2): Launch(32, 64, 4, 3),
    ("keys", 64, 4): Launch(32, 32, 4, 1),
    ("keys", 128, 4): Launch(32, 32, 8, 1),
    ("queries", 64, 2): Launch(64, 64, 4, 2, 168),
    ("queries", 128, 2): Launch(64, 64, 4, 2),
    ("queries", 64, 4): Launch(32, 32, 4, 1),
    ("queries", 128, 4): Launch(32, 32, 8, 1),
}
CACHE = 32 << 20  # bytes for k and v, of the 50 MiB of the H200 that the tables were measured on


@triton.jit
def key_ranges(p_left, edge, i0, i1, ONE_LOOP: tl.constexpr, BN: tl.constexpr):
    """Cuts the keys that the rows i0 to i1 visit, from `edge` on, into three parts.

    From `edge` to `whole` some rows see only a part of a block, from `whole` to `diagonal` all rows
    see all keys, from there on the causal mask cuts. With ONE_LOOP the middle part is empty.

    Returns: whole, diagonal, and how many blocks of BN keys lie before `whole`.
    """
    diagonal = tl.maximum(edge, (i0 + 1) // BN * BN)
    whole = diagonal
    if not ONE_LOOP:
        whole = tl.minimum(tl.maximum(edge, tl.cdiv(tl.load(p_left + i1), BN) * BN), diagonal)
    return whole, diagonal, (whole - edge) // BN


@triton.jit
def _near_tiles(
    p_high,
    p_low,
    p_left,
    p_count,
    p_room,
    i,
    i0,
    b_left,
    m_row,
    hi_i,
    lo_i,
    b_lse,
    whole,
    near,
    PN: tl.constexpr,
):
    """Applies the running rule (`pruning.nearer_tiles`) to the key tiles from `whole` to `near`.

    b_lse is the log-sum-exp of the rows over the keys from `near` on. Adds the number of skipped
    tiles to p_count, and moves p_left of the rows past those tiles, for the backward pass.

    Returns: where the tiles that are kept begin.
    """
    hi_r, lo_r = load_decay(p_high, p_low, i0)
    b_limit = b_lse - ((hi_i - hi_r) + (lo_i - lo_r))
    # A row whose episode begins inside its tile sees no earlier tile and sets no limit.
    limit = tl.load(p_room) + tl.min(tl.where(m_row & (b_left <= i0), b_limit, float("inf")))
    skipped = tl.zeros([LANES], tl.int32)
    for base in range(whole // PN, near // PN, LANES):
        tile = base + tl.arange(0, LANES)
        inside = tile < near // PN
        b_high, b_low = load_decay(p_high, p_low, tl.where(inside, tile * PN + PN - 1, i0))
        skipped += (inside & ((hi_r - b_high) + (lo_r - b_low) < limit)).to(tl.int32)
    count = tl.sum(skipped)
    whole += count * PN
    tl.store(p_left + i, tl.maximum(b_left, whole), mask=m_row & (count > 0))
    tl.atomic_add(p_count, count.to(tl.float32), sem="relaxed")
    return whole


@triton.jit
def place():
    """The head and the tile of this program, in a `grid`; a head past the last one does nothing."""
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.program_id(1)


@triton.jit
def fall(
    p_sums,
    p_high,
    p_low,
    i_pair,
    pairs,
    begin,
    hi_r,
    lo_r,
    length,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Decays (base 2) from BN keys to a later row r, as the sum of a vector and a number.

    The vector holds the decays from each key to the last key of the block, the number the decay
    from there to r. Neither is above 0, so that the sum loses nothing by cancellation.
    """
    b_fall = vector(p_sums, 2 * pairs + i_pair, begin, length, BN, TMA)
    high, low = load_decay(p_high, p_low, begin + BN - 1)
    return b_fall, ((hi_r - high) + (lo_r - low)) * LOG2E


@triton.jit
def pair_scores(b_qk, scale, hi_i, hi_j, lo_j, m_pair):
    """Scores in base 2 of pairs, which lack only the low part of the sum of row i; -inf if masked.

    The caller adds that part to the maximum or the log-sum-exp of the row, which is one number.
    Arguments in [i, j] or [j, i] broadcast form.
    """
    b_s = b_qk * scale - lo_j * LOG2E
    return tl.where(m_pair, b_s + (hi_i - hi_j) * LOG2E, float("-inf"))


@triton.jit
def _soften(b_s, b_v, b_max, b_sum, b_o, frame, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One block of the running softmax in base 2, whose scores lack `frame`: one number a row."""
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


@triton.jit(do_not_specialize=["pairs", "heads", "queries", "keys", "length"])
def _forward(
    p_q,
    p_k,
    p_v,
    p_decay,
    p_sums,
    p_left,
    p_room,
    p_count,
    p_o,
    p_lse,
    s_q,
    s_k,
    s_v,
    pairs,
    heads,
    queries,
    keys,
    length,
    scale,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    RUNNING: tl.constexpr,
    PN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Output and log-sum-exp of one query tile of one head."""
    i_pair, i_tile = place()
    if i_pair >= pairs:
        return
    i_tile = tl.num_programs(1) - 1 - i_tile  # tiles with the most keys start first
    i_b, i_h = (i_pair // heads).to(tl.int64), i_pair % heads
    offset = keys - queries
    i_kh = i_h // GROUPS
    p_high, p_low, _ = sum_pointers(p_decay, i_pair, pairs, length)
    p_left += i_pair.to(tl.int64) * length
    d = tl.arange(0, BD)
    row = i_tile * BM + tl.arange(0, BM)
    i = offset + tl.minimum(row, queries - 1)
    i0 = offset + i_tile * BM
    i1 = offset + tl.minimum(i_tile * BM + BM - 1, queries - 1)
    b_q = load_rows(p_q, i_b, i_h, i_tile * BM, queries, s_q, D, BD, BM, False)
    follow(OVERLAP)
    edge = tl.load(p_left + i0) // PN * PN
    whole, near, edges = key_ranges(p_left, edge, i0, i1, ONE_LOOP, BN)
    calm = False  # whether all rows see the first visited tile as a whole; the running rule asks
    if RUNNING:
        calm = tl.load(p_left + i1) <= edge
        near = tl.where(calm, tl.maximum(edge, i0 // PN * PN - PN), near)
    hi_i, lo_i = load_decay(p_high, p_low, i)
    b_left = tl.load(p_left + i)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    scale *= LOG2E
    for step in range(edges + tl.cdiv(i1 + 1 - near, BN)):
        begin = tl.where(step < edges, edge + step * BN, near + (step - edges) * BN)
        column = begin + tl.arange(0, BN)
        b_k = load_rows(p_k, i_b, i_kh, begin, keys, s_k, D, BD, BN, TMA)
        b_v = load_rows(p_v, i_b, i_kh, begin, keys, s_v, D, BD, BN, TMA)
        hi_j = vector(p_sums, i_pair, begin, length, BN, TMA)
        lo_j = vector(p_sums, pairs + i_pair, begin, length, BN, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_pair = (column[None, :] <= i[:, None]) & (column[None, :] >= b_left[:, None])
        b_s = pair_scores(b_s, scale, hi_i[:, None], hi_j[None, :], lo_j[None, :], m_pair)
        b_max, b_sum, b_o = _soften(b_s, b_v, b_max, b_sum, b_o, lo_i * LOG2E, PRECISION, True)

    m_row = row < queries
    if RUNNING:
        whole = _near_tiles(
            p_high,
            p_low,
            p_left,
            p_count + i_pair,
            p_room + i_pair,
            i,
            i0,
            b_left,
            m_row,
            hi_i,
            lo_i,
            (b_max + tl.log2(b_sum)) * LN2,
            whole,
            tl.where(calm, near, whole),
            PN,
        )
    if not ONE_LOOP:
        # In the loop below every row takes the decay of row r, the first of its tile, so that the
        # scores of row i lack b_shift, the decay from r to i.
        hi_r, lo_r = load_decay(p_high, p_low, i0)
        b_shift = ((hi_i - hi_r) + (lo_i - lo_r)) * LOG2E
        b_near = b_max
        b_max = b_near - b_shift
        b_start = b_max
        for begin in range(whole, near, BN):
            b_k = load_rows(p_k, i_b, i_kh, begin, keys, s_k, D, BD, BN, TMA)
            b_v = load_rows(p_v, i_b, i_kh, begin, keys, s_v, D, BD, BN, TMA)
            b_fall, frame = fall(
                p_sums, p_high, p_low, i_pair, pairs, begin, hi_r, lo_r, length, BN, TMA
            )
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_s = b_s * scale + b_fall[None, :]
            b_max, b_sum, b_o = _soften(b_s, b_v, b_max, b_sum, b_o, frame, PRECISION, False)

        # Where the loop has found no larger score, the old maximum is put back: subtracting the
        # shift and adding it again would round it.
        b_max = tl.where(b_max == b_start, b_near, b_max + b_shift)
    b_o = b_o * (1.0 / b_sum)[:, None]
    p_o += (i_b * queries * heads + i_h) * D
    p_lse += i_b * queries * heads + i_h
    tl.store(p_lse + row * heads, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)
    tl.store(
        p_o + row[:, None] * (heads * D) + d[None, :],
        b_o.to(p_o.dtype.element_ty),
        mask=m_row[:, None] & (d < D)[None, :],
    )


def choose(role: str, q: Tensor) -> Launch:
    """The table's launch for the width and type of q; heads below 64 wide take that of 64."""
    return CONFIGS[role, max(64, block_size(q.shape[-1])), q.element_size()]


def check_launches(tiles: Tiles, forward: Launch, keys: Launch, queries: Launch) -> None:
    """Raises: ValueError if the three do not work on the plan's tiles and on the same blocks."""
    if (
        forward.rows != tiles.rows
        or forward.columns != queries.columns
        or any(tiles.rows % launch.rows for launch in (queries, keys))
        or any(tiles.columns % launch.columns for launch in (queries, keys))
        or queries.rows % keys.rows
    ):
        raise ValueError(
            f"CONFIGS: expected forward rows of {tiles.rows}, blocks that divide tiles of "
            f"{tiles.rows} by {tiles.columns}, the columns of forward and queries alike, and rows "
            f"of keys that divide those of queries, got forward {forward}, keys {keys} and queries "
            f"{queries}"
        )


def grid(heads: int, tiles: int, k: Tensor) -> tuple[int, int, int]:
    """The grid: heads of a group, tiles, groups. Programs start in this order, heads fastest.

    A group holds as many heads as have their rows of four tensors in the cache together; all its
    heads are at about the same tile at a time.
    """
    size = 4 * k.shape[1] * k.shape[3] * k.element_size()
    groups = -(-heads // max(1, CACHE // size))
    return -(-heads // groups), tiles, groups


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    room: Tensor | None,
    *,
    plan: Plan,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, M, Hq, D], lse [B, M, Hq], tiles not visited [B, Hq]; decayed sums and first keys.

    Args:    as of `operator.attend`, with a plan of the long regime.
    Returns: the last two as `scan_triton.prepare` makes them; the running rule has moved left.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    start = None if start is None else start.view(torch.uint8)
    launch, pairs = choose("forward", q), batch * heads
    check_launches(plan.tiles, launch, choose("keys", q), choose("queries", q))
    decay, left, count = prepare(
        log_f,
        start,
        threshold,
        plan=plan,
        queries=queries,
        window=window,
        block=launch.columns,
    )
    o = q.new_empty(batch, queries, heads, width)
    lse = log_f.new_empty(batch, queries, heads)
    tma, (k_rows, v_rows) = tiled(launch.columns, k, v)
    _forward[grid(pairs, -(-queries // launch.rows), k)](
        q,
        k_rows,
        v_rows,
        decay,
        vectors(decay, launch.columns, tma),
        left,
        lse if room is None else room,
        count,
        o,
        lse,
        *strides(q, k, v),
        pairs,
        heads,
        queries,
        keys,
        decay.shape[3],
        scale,
        GROUPS=heads // k.shape[2],
        D=width,
        BD=block_size(width),
        PRECISION="ieee",
        ONE_LOOP=plan.few,
        RUNNING=room is not None,
        PN=plan.tiles.columns,
        BM=launch.rows,
        BN=launch.columns,
        TMA=tma,
        **launch.options,
        **overlap(q),
    )
    return o, lse, count, decay, left
