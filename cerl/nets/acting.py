"""Layers for acting, where the rows of an environment are computed with one member's weights.

At any time one member acts in an environment: the acting member, also called the member on duty.
Where a weight is small next to the rows, the products with all members' weights are computed and
the acting member's is selected; otherwise the weights of the acting members are gathered first.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cerl.nets.layers import matmul


class Duty(NamedTuple):
    """The acting member of every environment."""

    member: Tensor  # [S, E] int64 in [0, N)
    place: Tensor  # [S, E] int64, its index among the members of all seeds, N * seed + member

    @classmethod
    def of(cls, member: Tensor, members: int) -> "Duty":
        """The acting members as a `Duty`. Args: member [S, E] int64 in [0, members)."""
        seed = torch.arange(member.shape[0], device=member.device).unsqueeze(1)
        return cls(member, member + members * seed)


def pick(leaf: Tensor, duty: Duty | None) -> Tensor:
    """Reshapes a parameter so that it broadcasts over activations [S, N, B, W, *rest].

    Args:    leaf [S, N, *rest]; duty, the acting members, or None where all members compute.
    Returns: [S, N, 1, 1, *rest], or those of the acting members [S, 1, E, 1, *rest].
    """
    if duty is None or leaf.shape[1] == 1:
        return leaf[:, :, None, None]
    rows = leaf.flatten(0, 1).index_select(0, duty.place.flatten())
    return rows.unflatten(0, duty.place.shape)[:, None, :, None]


def networks(leaf: Tensor, duty: Duty | None) -> Tensor:
    """A parameter with one entry for each network that runs.

    Without `duty` the networks of all members run, with it the acting member's of each environment.

    Args:    leaf [S, N, *rest].
    Returns: [S * N, *rest], with `duty` [S * E, *rest].
    """
    leaf = leaf.flatten(0, 1)
    return leaf if duty is None else leaf.index_select(0, duty.place.flatten())


def worth_gathering(*, envs: int, members: int) -> bool:
    """Whether to gather the acting members' weights before a network runs on one row each.

    The weights of a large network cost more memory traffic than its few rows. Gathering reads and
    writes E sets of weights, and the products read them again: 3 E sets. Products with all members'
    weights read N sets. A small network takes only the time of its launches, whichever way it goes.
    """
    return 3 * envs < members


def gathered(net: nn.Module, member: Tensor) -> dict[str, Tensor]:
    """Parameters of the acting members; those that all members share stay as they are.

    Args:    member [S, E] int64 in [0, N).
    Returns: {name: [S, E, *rest], or [S, 1, *rest] if shared}, for `torch.func.functional_call`.
    """
    leaves = dict(net.named_parameters())
    members = max(leaf.shape[1] for leaf in leaves.values())
    duty = Duty.of(member, members)
    return {
        name: leaf if leaf.shape[1] == 1 else networks(leaf, duty).unflatten(0, member.shape)
        for name, leaf in leaves.items()
    }


def project(x: Tensor, weight: Tensor, duty: Duty | None) -> Tensor:
    """Multiplies every row by the weight of its member; the products have the type of x.

    Args:    x [S, M, B, W, in] with M = 1 or N; weight [S, N, in, out]; duty, the acting members,
             for which M is 1 and axis B are the E environments, or None where all members compute.
    Returns: [S, N, B, W, out], with `duty` [S, 1, E, W, out].
    """
    batch, rows = x.shape[2:4]
    if duty is None or weight.shape[1] == 1:
        return matmul(x.flatten(2, 3), weight.to(x.dtype)).unflatten(2, (batch, rows))
    members, width = weight.shape[1:3]
    # Cost model: numbers moved to and from memory for one output column. Gathering reads, writes
    # and again reads the weights of B environments: 3 B D. Computing all members reads N weights,
    # and writes and reads N outputs for each of the B W rows: N (D + 2 B W).
    if 3 * batch * width < members * (width + 2 * batch * rows):
        own = weight.flatten(0, 1).index_select(0, duty.place.flatten()).to(x.dtype)
        y = x[:, 0].flatten(0, 1) @ own  # [S * E, W, out]
        return y.unflatten(0, duty.place.shape).unsqueeze(1)
    every = matmul(x.flatten(2, 3), weight.to(x.dtype)).unflatten(2, (batch, rows))
    index = duty.member[:, None, :, None, None].expand(-1, 1, -1, *every.shape[3:])
    return every.gather(1, index)
