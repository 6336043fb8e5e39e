"""CERL as a table: what every value head regresses to (Lin et al. 2024, arXiv:2405.04342).

Head (i, j) of member i names whose greedy action is taken in the next state, whose value that
action gets, and with which discount. With m = (i + j) mod N: head 0 is always the member's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config import EnsembleConfig


class HeadTable(NamedTuple):
    """Indices are member * heads + head into the flattened [N, heads] of the network called."""

    heads: int  # J
    action_heads: int  # heads that the choice of the next action needs
    value_heads: int  # heads that the next value needs
    action: Tensor  # [N, J] int64, index of the head whose greedy action is taken
    value: Tensor  # [N, J] int64, index of the head that values it
    gamma: Tensor  # [J] float32


def head_table(ensemble: EnsembleConfig, *, gamma: float, device: torch.device | str) -> HeadTable:
    """The table of an ensemble.

    multi_horizon: head h of J has horizon (J - h) / J of the longest, 1 / (1 - gamma).
    """
    members, kind = ensemble.members, ensemble.heads
    heads = {"own": 1, "multi_horizon": ensemble.horizons}.get(kind, members)
    i = torch.arange(members)[:, None].expand(members, heads)
    j = torch.arange(heads)[None, :].expand(members, heads)
    m = (i + j) % members
    discount = torch.full((heads,), gamma, dtype=torch.float64)
    if kind in ("own", "cerl"):
        action, value = m, m
    elif kind == "own_target":
        action, value = m, i * heads + j
    elif kind == "single_actor":
        action, value = torch.zeros_like(m), m
    elif kind == "multi_horizon":
        action, value = i, i * heads + j
        longest = 1.0 / (1.0 - gamma)
        share = torch.arange(heads, 0, -1, dtype=torch.float64) / heads
        discount = 1.0 - 1.0 / (longest * share)
    else:
        raise ValueError(f"ensemble.heads: unknown kind {kind!r}")
    full = kind in ("own_target", "multi_horizon")
    return HeadTable(
        heads=heads,
        action_heads=1,
        value_heads=heads if full else 1,
        action=action.contiguous().to(device),
        value=value.contiguous().to(device),
        gamma=discount.to(torch.float32).to(device),
    )


def next_values(table: HeadTable, choose: Tensor, value: Tensor) -> Tensor:
    """Next value (or value distribution) that every head regresses to.

    Args:    choose [S, N, B, T, heads, A], whose argmax is the next action;
             value [S, N, B, T, heads, A, *rest].
    Returns: [S, N, B, T, J, *rest].
    Raises:  ValueError if the table does not fit the members or heads given.
    """
    members, heads = table.action.shape
    if choose.shape[1] != members or value.shape[1] != members:
        raise ValueError(
            f"head table of {members} members, got choices of {choose.shape[1]} and values of "
            f"{value.shape[1]}"
        )
    if (choose.shape[4], value.shape[4]) != (table.action_heads, table.value_heads):
        raise ValueError(
            f"head table needs {table.action_heads} heads to choose and {table.value_heads} to "
            f"value, got {choose.shape[4]} and {value.shape[4]}"
        )
    best = choose.argmax(-1).movedim(1, 3).flatten(3)  # [S, B, T, N * heads]
    best = best.index_select(3, table.action.flatten())  # [S, B, T, N * J]
    value = value.movedim(1, 3).flatten(3, 4).index_select(3, table.value.flatten())
    index = best.view(*best.shape, 1, *([1] * (value.dim() - 5)))
    taken = value.gather(4, index.expand(*best.shape, 1, *value.shape[5:])).squeeze(4)
    return taken.unflatten(3, (members, heads)).movedim(3, 1)
