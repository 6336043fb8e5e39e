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
    value_heads: int  # first heads of a network that valuing the next action needs; choosing: 1
    action: Tensor  # [N, J] int64, index of the head whose greedy action is taken
    value: Tensor  # [N, J] int64, index of the head that values it
    crossed: bool  # some head values the action of a member that it does not belong to
    gamma: Tensor  # [J] float32, discount of every head
    own_gamma: float  # that of head 0, the member's own


def head_table(ensemble: EnsembleConfig, *, gamma: float, device: torch.device | str) -> HeadTable:
    """The table of an ensemble.

    multi_horizon: head h of J has horizon (J - h) / J of the longest, 1 / (1 - gamma).
    """
    members, kind = ensemble.members, ensemble.heads
    heads = {"own": 1, "multi_horizon": ensemble.horizons}.get(kind, members)
    i = torch.arange(members, device=device)[:, None].expand(members, heads)
    j = torch.arange(heads, device=device)[None, :].expand(members, heads)
    m = (i + j) % members
    discount = torch.full((heads,), gamma, dtype=torch.float64, device=device)
    if kind in ("own", "cerl"):
        action, value = m, m
    elif kind == "own_target":
        action, value = m, i * heads + j
    elif kind == "single_actor":
        action, value = torch.zeros_like(m), m
    elif kind == "multi_horizon":
        action, value = i, i * heads + j
        longest = 1.0 / (1.0 - gamma)
        share = torch.arange(heads, 0, -1, dtype=torch.float64, device=device) / heads
        discount = 1.0 - 1.0 / (longest * share)
    else:
        raise ValueError(f"ensemble.heads: unknown kind {kind!r}")
    full = kind in ("own_target", "multi_horizon")
    return HeadTable(
        heads=heads,
        value_heads=heads if full else 1,
        action=action.contiguous(),
        value=value.contiguous(),
        crossed=members > 1 and kind in ("own_target", "single_actor"),
        gamma=discount.to(torch.float32),
        own_gamma=gamma,
    )


@torch.no_grad()
def double_q(
    table: HeadTable, *, reward: Tensor, discount: Tensor, choose: Tensor, value: Tensor
) -> Tensor:
    """Regression target of every head, y = r + gamma^k Q'(s', argmax_a Q(s', a)).

    With `choose` of the online network and `value` of the target network this is Double DQN; with
    both of the target network it is DQN. The table says whose choice and whose value a head takes.

    Args:    reward [S, M, B, T, J], n-step sums; discount [S, M, B, T, J], gamma^k, 0 at terminals;
             choose [S, N, B, T, 1, A]; value [S, N, B, T, heads, A, *rest], rest: a distribution.
    Returns: [S, N, B, T, J, *rest], detached.
    Raises:  ValueError if the table does not fit the members or heads given.
    Source:  van Hasselt et al. 2016 (arXiv:1509.06461); heads: Lin et al. 2024 (arXiv:2405.04342).
    """
    later = next_values(table, choose, value)
    rest = [1] * (later.dim() - 5)
    reward, discount = (x.view(*x.shape, *rest) for x in (reward, discount))
    return reward + discount * later


def next_values(table: HeadTable, choose: Tensor, value: Tensor) -> Tensor:
    """Next value (or value distribution) that every head regresses to.

    Args:    choose [S, N, B, T, 1, A], whose argmax is the next action;
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
    if (choose.shape[4], value.shape[4]) != (1, table.value_heads):
        raise ValueError(
            f"head table needs 1 head to choose and {table.value_heads} heads to value, got "
            f"{choose.shape[4]} and {value.shape[4]}"
        )
    best = choose.argmax(-1).movedim(1, 3).flatten(3)  # [S, B, T, N * heads]
    best = best.index_select(3, table.action.flatten())  # [S, B, T, N * J]
    value = value.movedim(1, 3).flatten(3, 4).index_select(3, table.value.flatten())
    index = best.view(*best.shape, 1, *([1] * (value.dim() - 5)))
    taken = value.gather(4, index.expand(*best.shape, 1, *value.shape[5:])).squeeze(4)
    return taken.unflatten(3, (members, heads)).movedim(3, 1)


def next_action_values(table: HeadTable, value: Tensor) -> Tensor:
    """Next value that every head regresses to, where members propose the next actions.

    Args:    value [S, N, K, rows, heads] of every member's heads at the action of every member (K
             is N), or only at its own (K is 1; the table is then not `crossed`).
    Returns: [S, N, rows, J].
    Raises:  ValueError if the table does not fit the members, actions or heads given.
    """
    members, heads = table.action.shape
    _, owners, actions, _, valued = value.shape
    if owners != members or valued != table.value_heads or actions not in (1, members):
        raise ValueError(
            f"head table of {members} members needs {table.value_heads} heads of each at 1 or "
            f"{members} actions, got values [S, N, K, rows, heads] of {list(value.shape)}"
        )
    if table.crossed and actions != members:
        raise ValueError(
            f"head table values actions of other members; expected {members} actions, got 1"
        )
    index = table.value.flatten()  # owner * heads + head
    if actions > 1:
        owner, head = table.value // valued, table.value % valued
        index = ((owner * actions + table.action) * valued + head).flatten()
    flat = value.movedim(3, 1).flatten(2)  # [S, rows, N * K * heads]
    return flat.index_select(2, index).unflatten(2, (members, heads)).transpose(1, 2)


def of_actors(table: HeadTable, values: Tensor) -> Tensor:
    """For every head, the value of the member whose next action it values.

    Args: values [S, N, rows] of every member. Returns: [S, N, rows, J].
    """
    members, heads = table.action.shape
    picked = values.index_select(1, table.action.flatten())  # [S, N * J, rows]
    return picked.unflatten(1, (members, heads)).transpose(2, 3)
