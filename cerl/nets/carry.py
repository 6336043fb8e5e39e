"""Carries of networks with several readers: one tuple that holds the readers' carries in order.

A carry is what acting remembers of earlier rows (`cerl.data.Carry`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerl.data import ActInput, Carry, Window
from cerl.nets.reader import Reader


def empty(readers: Sequence[Reader], *, envs: int, evaluating: bool, device: torch.device) -> Carry:
    """The carry of all readers before the first row."""
    parts = (r.carry(envs=envs, evaluating=evaluating, device=device) for r in readers)
    return tuple(tensor for part in parts for tensor in part)


def step(
    readers: Sequence[Reader], seen: ActInput, carry: Carry, *, evaluating: bool
) -> list[Tensor]:
    """Feeds one new row to every reader; `carry` is written in place.

    Returns: the features of each reader, [S, 1 or N, E, ...].
    """
    parts = zip(readers, _parts(readers, carry), strict=True)
    return [reader.step(seen, part, evaluating=evaluating) for reader, part in parts]


def refill(
    readers: Sequence[Reader], window: Window, carry: Carry, member: Tensor, *, evaluating: bool
) -> None:
    """Recomputes the carry of every reader; arguments as in `Reader.refill`."""
    for reader, part in zip(readers, _parts(readers, carry), strict=True):
        reader.refill(window, part, member, evaluating=evaluating)


def _parts(readers: Sequence[Reader], carry: Carry) -> list[Carry]:
    """Splits a carry into those of the readers, which are all () if `carry` is ()."""
    parts, rest = [], carry
    for reader in readers:
        parts.append(rest[: reader.carried])
        rest = rest[reader.carried :]
    return parts
