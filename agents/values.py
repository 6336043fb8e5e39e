"""The kinds of value that a network of discrete actions predicts: an expectation or quantiles.

Heads, sharing, tandem and acting are the same code for both kinds (`cerl/agents/dqn.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cerl import returns
from cerl.config import DqnConfig, QuantileConfig


class ValueKind(NamedTuple):
    """How a network's outputs become values, and their error against a target."""

    # Numbers per action; where it is 1, outputs and losses have no axis of atoms.
    atoms: int
    # Output [..., atoms] -> value [...].
    mean: Callable[[Tensor], Tensor]
    # Prediction [..., atoms], target [..., atoms] -> loss [...].
    error: Callable[[Tensor, Tensor], Tensor]


def value_kind(agent: DqnConfig | QuantileConfig) -> ValueKind:
    """The kind of value that an agent of discrete actions predicts."""
    return quantile_value(agent) if isinstance(agent, QuantileConfig) else expected_value(agent)


def expected_value(agent: DqnConfig) -> ValueKind:
    """Expected values with Huber or squared error.

    `mse` has no factor 1/2, as in the code of Lin et al. 2024.
    """

    def error(q: Tensor, target: Tensor) -> Tensor:
        if agent.loss == "mse":
            return (q - target).square()
        return returns.huber(q - target, delta=agent.huber_delta)

    return ValueKind(1, lambda q: q, error)


def quantile_value(agent: QuantileConfig) -> ValueKind:
    """`agent.quantiles` quantiles per action (QR-DQN, Dabney et al. 2018).

    Their mean is the value by which actions are chosen. They are trained by the quantile Huber
    loss, with kappa = `agent.huber_delta`.
    """

    def error(theta: Tensor, target: Tensor) -> Tensor:
        return returns.quantile_huber(theta, target, kappa=agent.huber_delta)

    return ValueKind(agent.quantiles, lambda q: q.mean(-1), error)
