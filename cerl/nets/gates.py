"""Measurements of forget gates and of attention on the rows of a batch: how far back rows look.

Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949) for gates and pruning. The half-life of a
gate is estimated from windows that end before some of the rows are forgotten, as survival times are
from patients who outlive a study (Kaplan and Meier 1958).
"""

import math

import torch
from torch import Tensor

from cerl.kernels.attention.bounds import limit_of, measured_bound
from cerl.kernels.attention.plan import make_plan
from cerl.kernels.attention.pruning import causal_tiles, decayed_sums, visited_tiles

FURTHEST = -1e4  # logarithm of the smallest gate that is told apart from 0


def gauges(
    q: Tensor,
    k: Tensor,
    log_f: Tensor | None,
    *,
    lse: Tensor,
    skipped: Tensor,
    start: Tensor,
    window: int,
    bound: Tensor | str,
    log_eps: float,
    lead: tuple[int, ...],
) -> dict[str, Tensor]:
    """How far back the rows of windows look, over all rows of a batch; G = S * N * B windows.

    Args:    q [G, W, H, Dh]; k [G, W, Hkv, Dh]; log_f [G, W, H], None without gates; lse [G, W, H]
             and skipped [G, H], as the operator returns them; start [G, W] bool, the row begins an
             episode; window, rows that a row sees; bound [G, H] of |q . k| / sqrt(Dh), or
             "measured"; log_eps of pruning; lead (S, N, B).
    Returns: {name: [S, N, H]}; a head whose numbers are not finite has NaN:
             `self_share`, the weight of the row itself in its softmax, mean over the rows; and of
             heads with gates
             `prunable_share`, of the pairs of a row and a row that it sees, those whose decay D
             lies below the threshold of pruning;
             `skipped_share`, of the tiles of pairs that attention computes if nothing is pruned,
             those that it did not compute;
             `gate_half_life` and `gate_half_life_spread`, median and interquartile range of
             `survival` of the rows, in agent steps.
    """
    width, heads = q.shape[3], q.shape[2]
    keys = k.repeat_interleave(heads // k.shape[2], 2)
    score = (q.float() * keys.float()).sum(3) * width**-0.5
    share = (score - lse).exp().unflatten(0, lead)  # [S, N, B, W, H]
    found = {"self_share": share.mean((2, 3))}
    if log_f is None:
        return found
    sums, left = decayed_sums(log_f, start, window)  # [G, H, W]
    limit = limit_of(
        q,
        k.shape[1],
        bound=measured_bound(q, k, width**-0.5) if isinstance(bound, str) else bound,
        log_eps=log_eps,
    )
    assert limit is not None, "it follows from the bound"
    forgotten = _forgotten(log_f, start)
    prunable, pairs = prunable_pairs(forgotten, left, limit)
    tiles = make_plan(k.shape[1], width, q.dtype).tiles
    whole = visited_tiles(sums, left, q.shape[1], tiles, None).sum((2, 3))  # [G, H]
    computed = (1.0 - skipped.double()) * causal_tiles(q.shape[1], k.shape[1], tiles)
    lived, died = survival(forgotten, start)
    lower, median, upper = (_quantile(lived, died, part, lead) for part in (0.25, 0.5, 0.75))
    found |= {
        "prunable_share": _pooled(prunable, lead) / _pooled(pairs, lead),
        "skipped_share": 1.0 - _pooled(computed, lead) / _pooled(whole, lead),
        "gate_half_life": median,
        "gate_half_life_spread": upper - lower,
    }
    finite = log_f.isfinite().all(1).unflatten(0, lead).all(2) & found["self_share"].isfinite()
    return {name: torch.where(finite, x.float(), torch.nan) for name, x in found.items()}


def prunable_pairs(forgotten: Tensor, left: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a row and a row that it sees whose decay is below a threshold, and all such pairs.

    Args:    forgotten [G, H, W] as of `_forgotten`; left [G, H, W], the first row that a row sees;
             limit [G, H], the threshold.
    Returns: [G, H] each.
    """
    # The decay from j to i is forgotten_j - forgotten_i, which only falls towards smaller j.
    kept = torch.searchsorted(forgotten, forgotten + limit.double().unsqueeze(2))
    at = torch.arange(forgotten.shape[2], device=forgotten.device)
    return (kept - left).clamp(min=0).sum(2), (at - left + 1).sum(2)


def survival(forgotten: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """For every row, the steps until the weight of its key has decayed to 1/2.

    Rows of which the episode or the window ends before that are censored: all that is known is
    that they live longer than the steps until then.

    Args:    forgotten [G, H, W] as of `_forgotten`; start [G, W] bool.
    Returns: steps [G, H, W] int64; whether they are those until 1/2, bool, and not until an end.
    """
    rows = start.shape[1]
    at = torch.arange(rows, device=start.device)
    begins = torch.where(start, at, rows)
    coming = begins.flip(1).cummin(1).values.flip(1)  # the first start at or after a row
    end = torch.cat([coming[:, 1:], torch.full_like(coming[:, :1], rows)], 1) - 1
    end = end.unsqueeze(1)  # [G, 1, W], the last row of the episode
    half = torch.searchsorted(forgotten, forgotten + math.log(2.0))
    died = half <= end
    return (torch.where(died, half, end) - at).clamp(min=0), died


def _quantile(lived: Tensor, died: Tensor, part: float, lead: tuple[int, ...]) -> Tensor:
    """Steps after which a share `part` of the rows has died: Kaplan and Meier's estimate.

    Args:    lived, died [G, H, W], as `survival` gives them; lead (S, N, B).
    Returns: [S, N, H] float64; the length of the window if fewer have died by its end.
    """
    rows = lived.shape[2]
    lived, died = (x.unflatten(0, lead).transpose(2, 3).flatten(3) for x in (lived, died))
    empty = torch.zeros(*lived.shape[:3], rows + 1, dtype=torch.float64, device=lived.device)
    deaths = empty.scatter_add(3, lived, died.double())
    ends = empty.scatter_add(3, lived, torch.ones_like(lived, dtype=torch.float64))
    # Rows that have lived for at least so many steps are at risk of dying at that step.
    risk = ends.flip(3).cumsum(3).flip(3)
    alive = (1.0 - deaths / risk.clamp(min=1.0)).cumprod(3)
    # A product of many rounded factors may miss a share of exactly 1/2 by its last bits.
    return (alive > 1.0 - part + 1e-9).sum(3).clamp(max=rows).double()


def _forgotten(log_f: Tensor, start: Tensor) -> Tensor:
    """The sums of -log f from the start of a window up to every row, in nats.

    Starts of episodes forget nothing, so that differences within an episode are decays.

    Args:    log_f [G, W, H]; start [G, W] bool.
    Returns: [G, H, W] float64, never falling along W.
    """
    lost = -log_f.double().clamp(min=FURTHEST).masked_fill(start.unsqueeze(2), 0.0)
    return lost.cumsum(1).transpose(1, 2).contiguous()


def _pooled(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Sums over the batch: [G, H] -> [S, N, H] float64."""
    return x.unflatten(0, lead).double().sum(2)
