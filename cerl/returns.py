"""n-step returns, losses of a regression error: pure functions of tensors."""

import torch
from torch import Tensor


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
