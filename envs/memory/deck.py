"""Decks of playing cards, shuffled by the random numbers of a reset, and small helpers for rules.

Card c of a pile of decks has rank (c // 4) % 13 (ace first), suit c % 4 (spades, diamonds, clubs,
hearts) and colour c % 2 (black, red), as in POPGym.
"""

import torch
from torch import Tensor

KINDS = {"colors": 2, "suits": 4, "ranks": 13}


def shuffled(u: Tensor, *, kind: str) -> Tensor:
    """The kinds (ranks, suits or colours) of a shuffled pile's cards, in the order of dealing.

    Args:    u [G, cards] in [0, 1): the cards are sorted by them; kind, one of `KINDS`.
    Returns: [G, cards] uint8 in [0, KINDS[kind]).
    """
    card = torch.arange(u.shape[-1], device=u.device)
    value = card // 4 % KINDS["ranks"] if kind == "ranks" else card % KINDS[kind]
    value = value.to(torch.uint8).expand(u.shape)
    return torch.zeros_like(value).scatter(-1, places(u), value)


def places(u: Tensor) -> Tensor:
    """The position to which a stable sort of each row would move each entry, [G, cards] int64.

    Computed by counting smaller entries: a sort would take the compiler a minute to fuse.
    """
    column = torch.arange(u.shape[-1], device=u.device)
    own, other = u.unsqueeze(-1), u.unsqueeze(-2)
    tied = (other == own) & (column < column.unsqueeze(-1))
    return ((other < own) | tied).sum(-1)


def at(values: Tensor, index: Tensor) -> Tensor:
    """One value [G] of each row of `values` [G, n]; an index [G] out of range is clamped."""
    inside = index.clamp(0, values.shape[-1] - 1)
    return values.gather(-1, inside.unsqueeze(-1)).squeeze(-1)


def one_hot(value: Tensor, count: int) -> Tensor:
    """Flags [..., count] bool: the one at `value` [...] is True, or none if out of range."""
    return value.unsqueeze(-1) == torch.arange(count, device=value.device)


def signed(right: Tensor, scale: float) -> Tensor:
    """Rewards [G] float32: scale where right [G], else -scale."""
    return torch.where(right, scale, -scale)
