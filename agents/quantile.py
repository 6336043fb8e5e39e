"""Quantile regression for the ensembles of `cerl.agents.dqn` (QR-DQN, Dabney et al. 2018).

Only what a value is changes: K quantiles per action, whose mean acts and whose regression is the
quantile Huber loss. Heads, sharing, tandem and acting are the same lines as for scalar values.
"""

from torch import Tensor

from cerl import returns
from cerl.agents.dqn import ValueKind
from cerl.config import LossConfig


def quantile_value(loss: LossConfig) -> ValueKind:
    """`loss.quantiles` quantiles per action, kappa = `loss.huber_delta`."""

    def error(theta: Tensor, target: Tensor) -> Tensor:
        return returns.quantile_huber(theta, target, kappa=loss.huber_delta)

    return ValueKind(loss.quantiles, lambda q: q.mean(-1), error)
