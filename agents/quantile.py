"""Quantile regression for the ensembles of `cerl.agents.dqn` (QR-DQN, Dabney et al. 2018).

Only what a value is changes: K quantiles per action, whose mean acts and whose regression is the
quantile Huber loss. Heads, sharing, tandem and acting are the same lines as for scalar values.
"""

from torch import Tensor

from cerl import returns
from cerl.agents.dqn import ValueKind, scalar_value
from cerl.config import DqnConfig, QuantileConfig


def value_kind(agent: DqnConfig | QuantileConfig) -> ValueKind:
    """What a value is to an agent of discrete actions."""
    return quantile_value(agent) if isinstance(agent, QuantileConfig) else scalar_value(agent)


def quantile_value(agent: QuantileConfig) -> ValueKind:
    """`agent.quantiles` quantiles per action, kappa = `agent.huber_delta`."""

    def error(theta: Tensor, target: Tensor) -> Tensor:
        return returns.quantile_huber(theta, target, kappa=agent.huber_delta)

    return ValueKind(agent.quantiles, lambda q: q.mean(-1), error)
