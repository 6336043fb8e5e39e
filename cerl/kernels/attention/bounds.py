"""Bounds on the products of forgetting attention, and the thresholds of pruning that follow.

With |scale * q . k| <= bound and N keys, scores whose decay D is below

    log_eps - ln N - 2 bound

make up a share of at most exp(log_eps) of the softmax of their row. A threshold is computed in
float32 and must not come out above its exact value, or too much is skipped. `docs/attention.md`,
"How a threshold is rounded", derives the allowance SLACK.
"""

import math

import torch
from torch import Tensor

from cerl.kernels.attention.check import check_placement

# Share by which bounds are enlarged: more than float32 loses in 128 squares and a few roundings.
SLACK = 2.0**-16


def norm_bound(
    w_q: Tensor, w_k: Tensor, *, width: int, dtype: torch.dtype, scale: float | None = None
) -> Tensor:
    """Largest |scale * q . k| where q and k are rows of RMS norm w_q and w_k: a `bound`.

    A normalised row has at most the length sqrt(width) max|w|. Covers up to two roundings of each
    row to `dtype`, as of a norm computed in that type or in float32.

    Args:    w_q [..., width]; w_k [..., width], leading axes that broadcast (per head, or none; for
             grouped heads repeat w_k); dtype of the q and k that meet.
    Returns: float32, the broadcast leading axes.
    Raises:  ValueError for weights of another width.
    """
    if w_q.shape[-1:] != (width,) or w_k.shape[-1:] != (width,):
        raise ValueError(
            f"norm_bound: expected weights of {width} entries a row, got w_q {list(w_q.shape)} and "
            f"w_k {list(w_k.shape)}; width is that of a head"
        )
    scale = float(width**-0.5) if scale is None else abs(scale)
    largest = w_q.detach().abs().amax(-1).double() * w_k.detach().abs().amax(-1).double()
    rounded = (1.0 + torch.finfo(dtype).eps / 2.0) ** 4 * (1.0 + SLACK)
    return (largest * (width * scale * rounded)).float()


def limit_of(
    q: Tensor,
    keys: int,
    *,
    threshold: Tensor | float | None = None,
    bound: Tensor | float | None = None,
    log_eps: float = 0.0,
    times: float = 2.0,
) -> Tensor | None:
    """A threshold for every batch row and head: the one given, or the one of a bound.

    Args:    q [B, M, Hq, D]; keys, N; threshold or bound broadcastable to [B, Hq], or neither;
             times: how often the bound is subtracted, 2 for the static rule and 1 for `room` of
             the running rule.
    Returns: float32 [B, Hq] contiguous; None without threshold and bound.
    """
    if bound is not None:
        if isinstance(bound, Tensor):
            bound = bound.detach().double()
        threshold = (log_eps - math.log(keys) - times * bound) * (1.0 + SLACK)
    size = q.shape[0], q.shape[2]
    if isinstance(threshold, Tensor):
        # A bound of NaN skips nothing.
        threshold = threshold.detach().float().nan_to_num(-math.inf, math.inf, -math.inf)
        return threshold.expand(size).contiguous()
    if threshold is None:
        return None
    return torch.full(size, threshold, dtype=torch.float32, device=q.device)


def measured_bound(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Length of the longest query times that of the longest key and |scale|, float64 [B, Hq]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    long_q, long_k = (
        torch.linalg.vector_norm(x.detach(), dim=3, dtype=wide).amax(1).double() for x in (q, k)
    )
    long_k = long_k.repeat_interleave(q.shape[2] // k.shape[2], 1)
    return long_q * long_k * (abs(scale) * (1.0 + SLACK))


def measured_limits(
    q: Tensor, k: Tensor, *, log_eps: float, scale: float, running: bool
) -> tuple[Tensor, Tensor | None]:
    """`limit_of` a measured bound, of 2 and if `running` of 1 times it, by the kernel."""
    from cerl.kernels.attention import measure_triton

    check_placement(q, k)
    limits = measure_triton.measured_limits(
        q.detach(),
        k.detach(),
        log_eps=log_eps,
        scale=abs(scale),
        slack=SLACK,
        count=1 + running,
    )
    return limits[0], limits[1] if running else None
