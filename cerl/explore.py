"""Exploration: the epsilon schedule, the noise of one acting step, which member is on duty.

The random numbers of a seed depend only on its value, the step and the environment's index.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cerl import draw
from cerl.config import EnsembleConfig, ExploreConfig
from cerl.own_code import imported_callable


class Noise(NamedTuple):
    """Random choices of one acting step."""

    explore: Tensor  # [S, E] bool, True: take the random action instead of the agent's
    action: Tensor  # [S, E] int64, or [S, E, A] float32 in [-1, 1), uniform
    tie: Tensor  # [S, E, A] float32 in [0, 1), breaks ties of the vote (empty A where nobody votes)
    member: Tensor  # [S, E] float32 in [0, 1), from which `duty` chooses the member on duty
    normal: Tensor  # [S, E, K, M, A] float32 standard normal, K samples for each of M policies; A
    # is 0 for discrete actions


class Moment(NamedTuple):
    """An agent step of training, as a rule of the user's own sees it."""

    keys: Tensor  # [S] int64, random keys of the seeds
    step: Tensor  # [] int64, counts agent steps of an environment
    epsilon: Tensor  # [] float32, the share of random actions
    member: Tensor  # [S, E] int64, the member on duty
    start: Tensor  # [S, E] bool, an episode begins
    members: int  # N


# Changes the random choices of an agent step. It runs inside a CUDA graph: it returns new tensors,
# has no branch on tensor values, and treats every seed by itself.
Rule = Callable[[Noise, Moment], Noise]


def rules_of(names: Sequence[str]) -> list[Rule]:
    """The rules that explore.rules names. Raises: ImportError, RuntimeError or ValueError."""
    return [imported_callable(name, key="explore.rules") for name in names]


def ruled(rules: Sequence[Rule], noise: Noise, moment: Moment) -> Noise:
    """The random choices of a step after every rule, in their order.

    Raises: ValueError if a rule returns anything but a Noise of the same shapes and types.
    """
    for rule in rules:
        changed = rule(noise, moment)
        if not isinstance(changed, Noise) or _form(changed) != _form(noise):
            got = _form(changed) if isinstance(changed, Noise) else type(changed).__name__
            raise ValueError(
                f"explore.rules: expected {getattr(rule, '__name__', rule)} to return a "
                f"cerl.explore.Noise of {_form(noise)}, got {got}"
            )
        noise = changed
    return noise


def _form(noise: Noise) -> str:
    """Shape and type of every part, for a message."""
    parts = noise._asdict().items()
    return ", ".join(f"{name} {list(part.shape)} {part.dtype}" for name, part in parts)


def epsilon(config: ExploreConfig, step: Tensor) -> Tensor:
    """Epsilon, the share of random actions.

    It is `start` for the first `hold` steps, then falls linearly to `end` over `decay` steps.

    Args:    step int64, agent steps of one seed.
    Returns: float32, the shape of `step`.
    Source:  Dopamine's linearly decaying epsilon, as the code of Lin et al. 2024 uses it.
    """
    assert config.end is not None, "expected Config.epsilon_schedule, which has a number for `end`"
    # In int64, since float32 cannot count beyond 2**24 steps.
    left = (config.hold + config.decay - step).clamp(0, config.decay)
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

    Args: key [S]; step int64 [], counts acting steps; eps, epsilon; samples, K; policies, M.
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

    Args: key [S]; step int64 [], counts acting steps; eps, epsilon; votes, whether to draw the
          numbers that break the ties of a vote.
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
    """The member on duty, i.e. the one that acts.

    Args:    u [S, E] float32, uniform in [0, 1).
    Returns: [S, E] int64 in [0, N).
    """
    if config.duty == "first":
        return torch.zeros_like(u, dtype=torch.int64)
    if config.duty == "tandem":
        return (u >= config.active_probability).long()
    return (u * config.members).long()
