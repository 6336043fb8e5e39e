"""What every value head regresses to: the kinds of `cerl/head_kinds.py` on tensors of a batch.

Head (i, j) of member i takes next values of some members' heads; head 0 is always the member's own.
Most kinds only say which value each head takes, so their targets are one gather through a table
(Lin et al. 2024, arXiv:2405.04342).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl.config import EnsembleConfig
from cerl.head_kinds import HEAD_KINDS, HeadKind, NextValues, Source
from cerl.own_code import imported

# Members of the ensemble that is asked how a kind crosses members: a larger one is no different.
PROBE = 1000


class Places(NamedTuple):
    """Which next value every head takes, as indices on the device."""

    chooser: Tensor  # [N, J] int64, member whose next action is taken
    value: Tensor  # [N, J] int64, owner * value_heads + head of the value


class HeadTable(NamedTuple):
    """What every value head of an ensemble regresses to."""

    kind: HeadKind
    members: int  # N
    heads: int  # J
    value_heads: int  # first heads of a network that valuing the next action needs; choosing: 1
    crossed: bool  # some head takes the value of another member's action
    gamma: Tensor  # [J] float32, discount of every head
    own_gamma: float  # that of head 0, the member's own
    # For every `take` of the kind, in their order; made beforehand, since a CUDA graph cannot copy
    # from the host.
    places: tuple[Places, ...]


@dataclass
class _Asked:
    """Stands for next values to find out what a kind takes of them."""

    members: int
    heads: int
    device: torch.device | str
    found: list[tuple[Tensor, ...]]  # chooser, owner and head, [N, J] each, of every `take`

    def take(self, source: Callable[[Any, Any], Source]) -> Tensor:
        i = torch.arange(self.members, device=self.device).unsqueeze(1)
        j = torch.arange(self.heads, device=self.device).unsqueeze(0)
        named = (torch.as_tensor(x, device=self.device) for x in source(i, j))
        self.found.append(tuple(x.expand(self.members, self.heads) for x in named))
        return torch.empty((), device="meta").expand(1, self.members, 1, 1, self.heads)


def _heads(kind: HeadKind, ensemble: EnsembleConfig, members: int) -> int:
    return {"one": 1, "members": members, "horizons": ensemble.horizons}[kind.heads]


def _probed(kind: HeadKind, ensemble: EnsembleConfig) -> tuple[int, bool]:
    """How many heads the values need, and whether members are crossed, of at most `PROBE` members.

    Raises: ValueError if the kind names members or heads that do not exist.
    """
    members = min(ensemble.members, PROBE)
    heads = _heads(kind, ensemble, members)
    asked = _Asked(members, heads, "cpu", [])
    kind.target(asked)
    last, crossed = 0, False
    for chooser, owner, head in asked.found:
        for what, index, most in (
            ("chooser", chooser, members),
            ("owner", owner, members),
            ("head", head, heads),
        ):
            wrong = index[(index < 0) | (index >= most)]
            if len(wrong):
                raise ValueError(
                    f"ensemble.heads: {ensemble.heads} names {what} {int(wrong[0])}, expected "
                    f"0 to {most - 1}"
                )
        last, crossed = max(last, int(head.max())), crossed or bool((chooser != owner).any())
    return (heads if last else 1), crossed


def kind_of(name: str) -> HeadKind:
    """The kind of heads of a name: one of `HEAD_KINDS`, or of a module of the user's own.

    Args:   name, a value of ensemble.heads.
    Raises: ValueError if what a module has under the name is no kind of heads that it may have;
            errors of importing it.
    """
    if name in HEAD_KINDS:
        return HEAD_KINDS[name]
    kind = imported(name, key="ensemble.heads")
    if not isinstance(kind, HeadKind) or kind.heads not in ("one", "members"):
        raise ValueError(
            f"ensemble.heads: expected {name} to be a cerl.head_kinds.HeadKind with heads 'one' or "
            f"'members', got {kind!r}"
        )
    return kind


def head_table(ensemble: EnsembleConfig, *, gamma: float, device: torch.device | str) -> HeadTable:
    """The table of an ensemble.

    Where heads have horizons of their own, head h of J has (J - h) / J of the longest, which is
    1 / (1 - gamma) agent steps.

    Raises: ValueError if the kind of heads names members or heads that do not exist, or makes
            targets of another shape than [S, N, B, T, J].
    """
    kind, members = kind_of(ensemble.heads), ensemble.members
    heads = _heads(kind, ensemble, members)
    value_heads, crossed = _probed(kind, ensemble)
    asked = _Asked(members, heads, device, [])
    made = kind.target(asked)
    if made.shape != (1, members, 1, 1, heads):
        raise ValueError(
            f"ensemble.heads: {ensemble.heads} has to make targets [S, N, B, T, J], "
            f"{[1, members, 1, 1, heads]} here; got {list(made.shape)}"
        )
    discount = torch.full((heads,), gamma, dtype=torch.float64, device=device)
    if kind.heads == "horizons":
        longest = 1.0 / (1.0 - gamma)
        share = torch.arange(heads, 0, -1, dtype=torch.float64, device=device) / heads
        discount = 1.0 - 1.0 / (longest * share)
    return HeadTable(
        kind=kind,
        members=members,
        heads=heads,
        value_heads=value_heads,
        crossed=crossed,
        gamma=discount.to(torch.float32),
        own_gamma=gamma,
        places=tuple(
            Places(chooser.contiguous(), (owner * value_heads + head).contiguous())
            for chooser, owner, head in asked.found
        ),
    )


@torch.no_grad()
def double_q(
    table: HeadTable, *, reward: Tensor, discount: Tensor, choose: Tensor, value: Tensor
) -> Tensor:
    """Regression target of every head, y = r + gamma^k Q'(s', argmax_a Q(s', a)).

    With `choose` of the online network and `value` of the target network this is Double DQN; with
    both of the target network it is DQN. The table says whose choices and values a head takes.

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
    if choose.shape[1] != table.members or value.shape[1] != table.members:
        raise ValueError(
            f"head table of {table.members} members, got choices of {choose.shape[1]} and values "
            f"of {value.shape[1]}"
        )
    if (choose.shape[4], value.shape[4]) != (1, table.value_heads):
        raise ValueError(
            f"head table needs 1 head to choose and {table.value_heads} heads to value, got "
            f"{choose.shape[4]} and {value.shape[4]}"
        )
    best = choose.argmax(-1).movedim(1, 3).flatten(3)  # [S, B, T, N]
    values = value.movedim(1, 3).flatten(3, 4)  # [S, B, T, N * heads, A, *rest]

    def taken(places: Places) -> Tensor:
        action = best.index_select(3, places.chooser.flatten())  # [S, B, T, N * J]
        valued = values.index_select(3, places.value.flatten())
        index = action.view(*action.shape, 1, *([1] * (valued.dim() - 5)))
        picked = valued.gather(4, index.expand(*action.shape, 1, *valued.shape[5:])).squeeze(4)
        return picked.unflatten(3, (table.members, table.heads)).movedim(3, 1)

    return _targets(table, taken)


def next_action_values(table: HeadTable, value: Tensor) -> Tensor:
    """Next value that every head regresses to, where members propose the next actions.

    Args:    value [S, N, K, rows, heads] of every member's heads at the action of every member (K
             is N), or only at its own (K is 1; the table is then not `crossed`).
    Returns: [S, N, rows, J].
    Raises:  ValueError if the table does not fit the members, actions or heads given.
    """
    _, owners, actions, _, valued = value.shape
    if owners != table.members or valued != table.value_heads or actions not in (1, owners):
        raise ValueError(
            f"head table of {table.members} members needs {table.value_heads} heads of each at 1 "
            f"or {table.members} actions, got values [S, N, K, rows, heads] of {list(value.shape)}"
        )
    if table.crossed and actions != table.members:
        raise ValueError(
            f"head table values actions of other members; expected {table.members} actions, got 1"
        )
    flat = value.movedim(3, 1).flatten(2)  # [S, rows, N * K * heads]

    def taken(places: Places) -> Tensor:
        index = places.value.flatten()  # owner * heads + head
        if actions > 1:
            owner, head = places.value // valued, places.value % valued
            index = ((owner * actions + places.chooser) * valued + head).flatten()
        picked = flat.index_select(2, index).unflatten(2, (table.members, table.heads))
        return picked.transpose(1, 2)

    return _targets(table, taken)


def of_choosers(table: HeadTable, values: Tensor) -> Tensor:
    """What the kind of heads makes of numbers that belong to the members' next actions.

    Of a head that takes one next value it is the number of the member whose action is valued.

    Args: values [S, N, rows] of every member's next action. Returns: [S, N, rows, J].
    """

    def taken(places: Places) -> Tensor:
        picked = values.index_select(1, places.chooser.flatten())  # [S, N * J, rows]
        return picked.unflatten(1, (table.members, table.heads)).transpose(2, 3)

    return _targets(table, taken)


@dataclass
class _Taken:
    """Next values at hand, `cerl.head_kinds.NextValues`."""

    pick: Callable[[Places], Tensor]
    places: Iterator[Places]
    members: int
    heads: int

    def take(self, source: Callable[[Any, Any], Source]) -> Tensor:
        return self.pick(next(self.places))


def _targets(table: HeadTable, pick: Callable[[Places], Tensor]) -> Tensor:
    """What the heads regress to, from what `pick` takes for a table of places."""
    values: NextValues = _Taken(pick, iter(table.places), table.members, table.heads)
    return table.kind.target(values)
