"""n-step returns of the learnt rows of windows, and regression losses (Huber, quantile Huber).

A learnt row is a row of a window that a loss is computed for; the others are context before it or
rows after it that its n-step return needs. All functions here are pure functions of tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.data import Window


class Batch(NamedTuple):
    """Windows, the positions of their learnt rows, and the numbers that a loss needs."""

    window: Window
    now: Tensor  # [S, M, B, T] int64 positions in W of the learnt rows
    later: Tensor  # [S, M, B, T] int64 positions in W of the rows that bootstrap their returns
    action: Tensor  # [S, M, B, T], or [S, M, B, T, A]
    reward: Tensor  # [S, M, B, T, J] discounted sum of up to n rewards
    discount: Tensor  # [S, M, B, T, J] factor of the bootstrap value, 0 at terminals
    weight: Tensor  # [S, M, B, T], 0 for rows without a loss (e.g. `real` is False)


def learnt(window: Window, *, first: int, n: int, begins: bool) -> tuple[Tensor, Tensor]:
    """The learnt rows of windows: all rows but the first `first` and the last n.

    Args:    first, number of context rows; begins, True if the first learnt row starts an episode
             (sampling episode_start). Then only rows of that episode get a loss; otherwise rows of
             short episodes would be learnt more often than those of long ones.
    Returns: positions [S, M, B, T] in W; weights [S, M, B, T], 0 for rows without a loss.
    """
    width = window.reward.shape[-1]
    rows = torch.arange(first, width - n, device=window.reward.device)
    real = window.real[..., first : width - n].float()
    if begins:
        real = real.cumprod(-1)
    return rows.expand(*window.weight.shape, -1), window.weight.unsqueeze(-1) * real


def batch(window: Window, *, first: int, n: int, gamma: Tensor, begins: bool) -> Batch:
    """Learnt rows, their n-step returns and the rows that bootstrap them.

    Args: first, number of context rows; gamma [J], discount of each value head; begins as in
          `learnt`.
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
    # With n = 1 the positions are the same in all windows. As a view of `arange` they are
    # recognisable as such, and a network may read them as one slice.
    if n == 1:
        later = torch.arange(first + 1, first + 1 + count, device=now.device).expand_as(now)
    else:
        later = now + steps
    action = window.action[:, :, :, first : first + count]
    return Batch(window, now, later, action, reward, discount, weight)


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weights of rows times a bootstrap mask.

    Args:    weight [S, M, B, T]; mask [S, N, B] or [S, N, B, T]; None: all ones.
    Returns: [S, N, B, T], or `weight` itself without a mask.
    """
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
    """n-step returns that stop where an episode ends.

    The return of row t sums k rewards and bootstraps from row t + k with the factor gamma^k, where
    k = min(n, steps to the first row with `real = False`). After a terminal the factor is 0; after
    a truncation the return bootstraps.

    Args:    reward, terminated, real [..., W]; first, position of the first learnt row; learnt, T;
             gamma [J], discount of each value head.
    Returns: sum of rewards [..., T, J]; factor of the bootstrap value [..., T, J]; k [..., T]
             int64.
    Raises:  ValueError if the window has fewer than first + learnt + n rows.
    Source:  Sutton 1988.
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
    """Huber loss (Huber 1964): e^2 / 2 if |e| <= delta, else delta (|e| - delta / 2)."""
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
