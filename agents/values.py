"""What a network's output says about a value: the number itself, or a distribution.

Heads, sharing, tandem and acting are the same lines for both kinds (`cerl/agents/dqn.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cerl import returns
from cerl.config import DqnConfig, QuantileConfig


class ValueKind(NamedTuple):
    """How outputs of a network are read as values, and compared with a target."""

    # Numbers per action; where it is 1, outputs and losses have no axis of atoms.
    atoms: int
    # Output [..., atoms] -> value [...].
    mean: Callable[[Tensor], Tensor]
    # Prediction [..., atoms], target [..., atoms] -> loss [...].
    error: Callable[[Tensor, Tensor], Tensor]


def value_kind(agent: DqnConfig | QuantileConfig) -> ValueKind:
    """What a value is to an agent of discrete actions."""
    return quantile_value(agent) if isinstance(agent, QuantileConfig) else expected_value(agent)


def expected_value(agent: DqnConfig) -> ValueKind:
    """Expected values with Huber or squared error (`mse` without the 1/2, as the original's)."""

    def error(q: Tensor, target: Tensor) -> Tensor:
        if agent.loss == "mse":
            return (q - target).square()
        return returns.huber(q - target, delta=agent.huber_delta)

    return ValueKind(1, lambda q: q, error)


def quantile_value(agent: QuantileConfig) -> ValueKind:
    """`agent.quantiles` quantiles per action, kappa = `agent.huber_delta`.

    Their mean acts, the quantile Huber loss regresses them (QR-DQN, Dabney et al. 2018).
    """

    def error(theta: Tensor, target: Tensor) -> Tensor:
        return returns.quantile_huber(theta, target, kappa=agent.huber_delta)

    return ValueKind(agent.quantiles, lambda q: q.mean(-1), error)
