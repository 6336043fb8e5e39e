"""Which blocks of scores forgetting attention computes: sums of its gates, and the rules that skip.

Part of the definition, in plain torch; the kernels skip the same tiles. A tile is a block of query
rows by key columns, as of `plan.Tiles`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels.attention.plan import Tiles


def decayed_sums(
    log_f: Tensor, start: Tensor | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of log_f since the episode began, and the first key that each position sees.

    An episode of a head begins at index 0, where start is set, and where log_f is -inf; log_f
    counts as 0 there and passes no gradient. No sum crosses an episode, however large it is.

    Args:    log_f [B, N, H]; start [B, N] bool; window in steps, the own one included.
    Returns: sums [B, H, N] float64; left [B, H, N] int32. D_ij = sums_i - sums_j for
             left_i <= j <= i.
    """
    keys = log_f.shape[1]
    reset = log_f == -math.inf
    if start is not None:
        reset = reset | start.unsqueeze(2)
    t = torch.arange(keys, device=log_f.device, dtype=torch.int32)
    reset = (reset | (t == 0).unsqueeze(1)).transpose(1, 2)  # [B, H, N]
    sums = log_f.transpose(1, 2).double().masked_fill(reset, 0.0)
    left = torch.where(reset, t, 0).cummax(2).values
    # Each round doubles how many of the last terms a sum holds: 1, 2, 4 and so on.
    step = 1
    while step < keys:
        before = F.pad(sums[..., :-step], (step, 0))
        sums = sums + before.masked_fill(t - step < left, 0.0)
        step *= 2
    return sums, left if window is None else left.maximum(t - (min(window, keys) - 1))


def visited(
    log_f: Tensor,
    *,
    queries: int,
    tiles: Tiles,
    start: Tensor | None = None,
    window: int | None = None,
    threshold: Tensor | float | None = None,
) -> Tensor:
    """The tiles that the static rule computes: in every row of tiles a run up to the diagonal.

    Tile (m, n) is visited if it has a pair j <= i and either its last key is no earlier than the
    first query of m, or that query sees the last key and the decay D between them is at least the
    threshold. That D is the largest of the tile.

    Args:    log_f, start and window as for `decayed_sums`; queries: the last M of N positions;
             threshold broadcastable to [B, H], taken as 0 where it is larger.
    Returns: bool [B, H, query tiles, key tiles].
    """
    sums, left = decayed_sums(log_f.detach(), start, window)
    return visited_tiles(sums, left, queries, tiles, threshold)


def visited_tiles(
    sums: Tensor, left: Tensor, queries: int, tiles: Tiles, threshold: Tensor | float | None
) -> Tensor:
    """What `visited` returns, from sums and left as of `decayed_sums`."""
    keys = sums.shape[2]
    device = sums.device
    # Positions: first and last query of every row of tiles, first and last key of every column.
    first = torch.arange(keys - queries, keys, tiles.rows, device=device)
    last = (first + tiles.rows - 1).clamp(max=keys - 1)
    begin = torch.arange(0, keys, tiles.columns, device=device)
    end = begin + tiles.columns - 1  # past the last key for the tile on the diagonal at most
    seen = left[:, :, first].unsqueeze(3) <= end
    if threshold is not None:
        decay = sums[:, :, first].unsqueeze(3) - sums[:, :, end.clamp(max=keys - 1)].unsqueeze(2)
        if isinstance(threshold, Tensor):
            threshold = threshold.clamp(max=0.0).expand(sums.shape[:2])[..., None, None]
        seen &= decay >= threshold
    return (begin <= last.unsqueeze(1)) & ((end >= first.unsqueeze(1)) | seen)


def nearer_tiles(
    visited: Tensor, scores: Tensor, sums: Tensor, left: Tensor, room: Tensor, tiles: Tiles
) -> Tensor:
    """Of the visited tiles, those that the running rule keeps too.

    Each row of tiles computes its near tiles first: the one on the diagonal and the one before it.
    The softmax sum of a query over those keys is a lower bound of its whole sum. A tile further
    away is skipped if, for every query of the row of tiles, D from the query to the tile's last key
    is below the log of that sum plus `room` = log_eps - ln N - bound. Rows of tiles in which some
    query does not see the first visited tile as a whole keep all their tiles.

    Args:    visited [B, H, query tiles, key tiles]; scores [B, H, M, N], D included; sums and left
             as of `decayed_sums`; room [B, H].
    Returns: bool like visited.
    """
    keys, queries = sums.shape[2], scores.shape[2]
    rows, columns = tiles
    place = torch.arange(keys, device=sums.device)
    first = place[keys - queries :: rows]
    begin = visited.int().argmax(3)  # [B, H, query tiles]
    near = begin.maximum(first // columns - 1)
    wide = (near * columns).repeat_interleave(rows, 2)[:, :, :queries]
    i, b_left = place[keys - queries :, None], left[:, :, keys - queries :]
    seen = (place <= i) & (place >= wide.maximum(b_left)[..., None])
    # The log of each query's near sum, moved to the first query of its tile, whose D is looked at.
    row_sums = sums[:, :, keys - queries :]
    first_sums = sums[:, :, first].repeat_interleave(rows, 2)[:, :, :queries]
    limit = scores.masked_fill(~seen, -math.inf).logsumexp(3) - (row_sums - first_sums)
    # A query whose episode begins inside its tile sees no earlier tile, so it may lose them all.
    after = b_left > first.repeat_interleave(rows)[:queries]
    limit = limit.masked_fill(after, math.inf)
    limit = F.pad(limit, (0, -queries % rows), value=math.inf).unflatten(2, (-1, rows)).amin(3)
    ends = torch.arange(columns - 1, keys + columns - 1, columns, device=sums.device)
    decay = sums[:, :, first, None] - sums[:, :, None, ends.clamp(max=keys - 1)]
    last = (first + rows - 1).clamp(max=keys - 1)
    calm = left[:, :, last] <= begin * columns  # all queries see the first visited tile as a whole
    tile = torch.arange(len(ends), device=sums.device)
    gone = decay < (limit + room[:, :, None])[..., None]
    return visited & ~(gone & (tile < near[..., None]) & calm[..., None])


def skipped_share(visited: Tensor, queries: int, keys: int, tiles: Tiles) -> Tensor:
    """Share of the tiles with a causal pair that are not visited, float32 [B, H]."""
    return 1.0 - visited.sum((2, 3)) / causal_tiles(queries, keys, tiles)


def causal_tiles(queries: int, keys: int, tiles: Tiles) -> int:
    """How many tiles have a pair of a query and a key that is not later."""
    ends = (min(keys - queries + row + tiles.rows, keys) for row in range(0, queries, tiles.rows))
    return sum(-(-end // tiles.columns) for end in ends)
