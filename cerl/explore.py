"""Exploration: the epsilon schedule, the noise of one acting step, who is on duty.

The numbers of a seed depend on its value, the step and the environment's index alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl import draw
from cerl.config import EnsembleConfig, ExploreConfig


class Noise(NamedTuple):
    """Random choices of one acting step."""

    explore: Tensor  # [S, E] bool, take the random action
    action: Tensor  # [S, E] int64, or [S, E, A] float32 in [-1, 1), uniform
    tie: Tensor  # [S, E, A] float32 in [0, 1), breaks ties of the vote (empty A where nobody votes)
    member: Tensor  # [S, E] float32 in [0, 1), draws the member on duty
    normal: Tensor  # [S, E, K, M, A] float32, K samples of M policies (empty for discrete actions)


def epsilon(config: ExploreConfig, step: Tensor) -> Tensor:
    """Share of random actions after `step` (int64, agent steps of one seed), float32.

    Linear from start to end over `decay` steps once `hold` steps have passed (Lin et al. 2024's
    code: Dopamine's linearly decaying epsilon).
    """
    assert config.end is not None, "Config.exploration says where epsilon ends"
    left = (config.hold + config.decay - step).clamp(0, config.decay)  # int64: 50M passes 2**24
    return config.end + (config.start - config.end) * (left.double() / config.decay).float()


def continuous_noise(
    key: Tensor,
    step: Tensor,
    *,
    envs: int,
    actions: int,
    eps: Tensor | float,
    samples: int,
    policies: int,
) -> Noise:
    """Draws the noise of one step for continuous actions.

    Args: key [S]; step int64 [], counts acting steps; samples K of each of M policies.
    """
    u = draw.uniform(key, draw.EXPLORE, step, (envs, 2 + actions))
    return Noise(
        explore=u[..., 0] < eps,
        action=2.0 * u[..., 2:] - 1.0,
        tie=u[..., :0],
        member=u[..., 1],
        normal=draw.normal(key, draw.NOISE, step, (envs, samples, policies, actions)),
    )


def noise(
    key: Tensor, step: Tensor, *, envs: int, actions: int, eps: Tensor | float, votes: bool
) -> Noise:
    """Draws the noise of one step for discrete actions.

    Args: key [S]; step int64 [], counts acting steps; votes: ties of a vote have to be broken.
    """
    columns = 3 + (actions if votes else 0)
    u = draw.uniform(key, draw.EXPLORE, step, (envs, columns))
    return Noise(
        explore=u[..., 0] < eps,
        action=(u[..., 1] * actions).long(),
        tie=u[..., 3:],
        member=u[..., 2],
        normal=u[..., :0],
    )


def duty(config: EnsembleConfig, u: Tensor) -> Tensor:
    """The member that acts, from u [S, E] uniform in [0, 1). Returns: [S, E] int64."""
    if config.duty == "first":
        return torch.zeros_like(u, dtype=torch.int64)
    if config.duty == "tandem":
        return (u >= config.active_probability).long()
    return (u * config.members).long()
