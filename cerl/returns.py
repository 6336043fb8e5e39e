"""From windows to numbers: learnt rows, n-step returns, losses of a regression error.

Pure functions of tensors, which know of no network.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.data import Window


class Batch(NamedTuple):
    """Windows, the rows of them that are learnt, and the numbers that a loss needs."""

    window: Window
    now: Tensor  # [S, M, B, T] int64 positions in W of the learnt rows
    later: Tensor  # [S, M, B, T] int64 positions in W of the rows that bootstrap their returns
    action: Tensor  # [S, M, B, T], or [S, M, B, T, A]
    reward: Tensor  # [S, M, B, T, J] n-step sum
    discount: Tensor  # [S, M, B, T, J] of the bootstrap value, 0 at terminals
    weight: Tensor  # [S, M, B, T], 0 where there is nothing to learn


def learnt(window: Window, *, first: int, n: int, begins: bool) -> tuple[Tensor, Tensor]:
    """The learnt rows of windows: all from `first` on but the last n, which are only looked at.

    Args:    begins: windows begin with an episode and only that episode's rows are learnt, so that
             no row is learnt more often where episodes are short.
    Returns: positions [S, M, B, T] in W; weights [S, M, B, T], 0 where nothing can be learnt.
    """
    width = window.reward.shape[-1]
    rows = torch.arange(first, width - n, device=window.reward.device)
    real = window.real[..., first : width - n].float()
    if begins:
        real = real.cumprod(-1)
    return rows.expand(*window.weight.shape, -1), window.weight.unsqueeze(-1) * real


def batch(window: Window, *, first: int, n: int, gamma: Tensor, begins: bool) -> Batch:
    """Learnt rows, their n-step returns and the rows that bootstrap them.

    Args: first, context rows of a window; gamma [J]; begins as in `learnt`.
    """
    now, weight = learnt(window, first=first, n=n, begins=begins)
    count = now.shape[-1]
    reward, discount, steps = n_step(
        window.reward,
        window.terminated,
        window.real,
        first=first,
        learnt=count,
        n=n,
        gamma=gamma,
    )
    if n == 1:  # one position for all windows, which a look may use
        later = torch.arange(first + 1, first + 1 + count, device=now.device).expand_as(now)
    else:
        later = now + steps
    action = window.action[:, :, :, first : first + count]
    return Batch(window, now, later, action, reward, discount, weight)


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """weight [S, M, B, T] times a mask [S, N, B], or one for each learnt row [S, N, B, T]."""
    if mask is None:
        return weight
    return weight * (mask if mask.dim() == 4 else mask.unsqueeze(-1))


def averaging(weight: Tensor) -> Tensor:
    """Weights that make a sum over a batch the mean over its rows, each times its own weight.

    Rows of weight 0 do not count as rows.

    Args: weight [S, M or N, B, T]. Returns: the same shape.
    """
    return weight / (weight > 0).sum((2, 3), keepdim=True).clamp(min=1)


def row_errors(error: Tensor, *, batches: int) -> Tensor:
    """How wrong the values of every window's first learnt row are, for samplers.

    The mean over heads of |error|, and over members where these share the batch.

    Args:    error [S, N, B, T, J] of values; batches M, 1 or N.
    Returns: [S, M, B], detached.
    """
    each = error[:, :, :, 0].detach().float().abs().mean(-1)  # [S, N, B]
    return each if batches > 1 else each.mean(1, keepdim=True)


def n_step(
    reward: Tensor,
    terminated: Tensor,
    real: Tensor,
    *,
    first: int,
    learnt: int,
    n: int,
    gamma: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """n-step return up to the first row that ends its episode.

    k = min(n, steps to the first row that is not real); the return bootstraps at row t + k with
    gamma^k, or not at all after a terminal. Sutton 1988; truncation bootstraps.

    Args:    reward, terminated, real [..., W]; first learnt row `first`, `learnt` rows T;
             gamma [J], discount of each value head.
    Returns: sum of rewards [..., T, J], discount of the bootstrap value [..., T, J], k [..., T]
             int64.
    """
    last = first + learnt
    if last + n > reward.shape[-1]:
        raise ValueError(f"window too short: {reward.shape[-1]} rows, needs {last + n}")
    total = reward[..., first:last, None].expand(*reward.shape[:-1], learnt, gamma.shape[0])
    ended = terminated[..., first:last]
    alive = real[..., first + 1 : last + 1]
    steps = torch.ones_like(reward[..., first:last], dtype=torch.int64)
    for k in range(1, n):
        more = reward[..., first + k : last + k].masked_fill(~alive, 0.0)
        total = total + more[..., None] * gamma**k
        ended = ended | (alive & terminated[..., first + k : last + k])
        steps = steps + alive
        alive = alive & real[..., first + k + 1 : last + k + 1]
    power = gamma if n == 1 else gamma ** steps[..., None]
    return total, torch.where(ended[..., None], 0.0, power), steps


def huber(error: Tensor, *, delta: float) -> Tensor:
    """0.5 e^2 where |e| <= delta, delta (|e| - delta / 2) beyond (Huber 1964)."""
    size = error.abs()
    inside = size.clamp(max=delta)
    return inside * (size - 0.5 * inside)


def quantile_huber(theta: Tensor, target: Tensor, *, kappa: float) -> Tensor:
    """Quantile regression loss of a value distribution, without the factor 1/kappa.

    Args:    theta [..., K] predicted quantiles; target [..., K'] samples of the target.
    Returns: [...], mean over the targets, sum over the quantiles.
    Source:  Dabney et al. 2018, equation 10.
    """
    count = theta.shape[-1]
    tau = (torch.arange(count, device=theta.device, dtype=theta.dtype) + 0.5) / count
    error = target.unsqueeze(-2) - theta.unsqueeze(-1)  # [..., K, K']
    weight = (tau.unsqueeze(-1) - (error.detach() < 0).to(theta.dtype)).abs()
    return (weight * huber(error, delta=kappa)).mean(-1).sum(-1)
