"""Diagnostics of one batch that the agents have in common: means over rows, own and others' rows.

Own rows of a member are those that it acted in; on the others it learns off-policy from what other
members did.
"""

import torch
from torch import Tensor

from cerl.agent import Metrics
from cerl.data import Window
from cerl.returns import Batch


def own_rows(window: Window, batch: Batch, *, members: int, context: int) -> Tensor:
    """True for the learnt rows in which a member acted itself. Returns: [S, N, rows] bool."""
    acted = window.member[..., context : context + batch.now.shape[3]].flatten(2)  # [S, 1, rows]
    return acted == torch.arange(members, device=acted.device).view(1, -1, 1)


def row_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over rows, [S, N, rows] -> [S, N]; NaN where the weights sum to 0.

    A row of weight 0 does not count, whatever its value.
    """
    total = torch.where(weight > 0, values * weight, 0.0).sum(2)
    return total / weight.sum(2)


def by_owner(name: str, values: Tensor, weight: Tensor, own: Tensor) -> Metrics:
    """Means over all rows, over a member's own rows, and over those of others.

    Args:    values [S, N, rows]; weight [S, 1 or N, rows]; own [S, N, rows] bool.
    Returns: {name, name_own, name_others: [S, N]}; NaN where the batch has no such row.
    """
    weight = weight.expand_as(values)
    return {
        name: row_mean(values, weight),
        f"{name}_own": row_mean(values, weight * own),
        f"{name}_others": row_mean(values, weight * ~own),
    }


def value_spread(values: Tensor, weight: Tensor) -> Tensor:
    """Standard deviation over members (divisor N - 1) of their values, mean over rows.

    Args: values [S, N, rows] of N >= 2 members; weight [S, 1, rows]. Returns: [S].
    """
    return row_mean(values.std(1, keepdim=True), weight)[:, 0]


def vote_disagreement(greedy: Tensor, weight: Tensor, *, actions: int) -> Tensor:
    """Share of rows in which a member's greedy action has fewer votes than another action.

    Args: greedy [S, N, rows] int64, every member's vote; weight [S, 1, rows]. Returns: [S, N].
    """
    votes = torch.nn.functional.one_hot(greedy, actions).sum(1)  # [S, rows, A]
    mine = votes.gather(2, greedy.transpose(1, 2)).transpose(1, 2)  # [S, N, rows]
    minority = mine < votes.amax(2).unsqueeze(1)
    return row_mean(minority.float(), weight.expand(greedy.shape))
