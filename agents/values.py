"""What a network's output says about a value: the number itself, or a distribution.

Heads, sharing, tandem and acting are the same lines for both kinds (`cerl/agents/dqn.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cerl import returns
from cerl.config import LossConfig


class ValueKind(NamedTuple):
    """How outputs of a network are read as values, and compared with a target."""

    # Numbers per action; where it is 1, outputs and losses have no axis of atoms.
    atoms: int
    # Output [..., atoms] -> value [...].
    mean: Callable[[Tensor], Tensor]
    # Prediction [..., atoms], target [..., atoms] -> loss [...].
    error: Callable[[Tensor, Tensor], Tensor]


def expected_value(loss: LossConfig) -> ValueKind:
    """Expected values with Huber or squared error (`mse` without the 1/2, as the original's)."""

    def error(q: Tensor, target: Tensor) -> Tensor:
        if loss.kind == "mse":
            return (q - target).square()
        return returns.huber(q - target, delta=loss.huber_delta)

    return ValueKind(1, lambda q: q, error)


def quantile_value(loss: LossConfig) -> ValueKind:
    """`loss.quantiles` quantiles per action, kappa = `loss.huber_delta`.

    Their mean acts, the quantile Huber loss regresses them (QR-DQN, Dabney et al. 2018).
    """

    def error(theta: Tensor, target: Tensor) -> Tensor:
        return returns.quantile_huber(theta, target, kappa=loss.huber_delta)

    return ValueKind(loss.quantiles, lambda q: q.mean(-1), error)
