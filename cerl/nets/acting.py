"""Rows computed with the weights of one member each: the member that acts in an environment.

While acting, every environment has one stream of rows and one member whose weights it takes. Where
a weight is small next to the rows, all members' products are computed and one is selected;
otherwise the weights of each row are gathered first.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cerl.nets.layers import matmul


class Duty(NamedTuple):
    """Who acts in every environment."""

    member: Tensor  # [S, E] int64 in [0, N)
    place: Tensor  # [S, E] int64, the member's index among those of all seeds, N * seed + member

    @classmethod
    def of(cls, member: Tensor, members: int) -> "Duty":
        """Args: member [S, E] in [0, members)."""
        seed = torch.arange(member.shape[0], device=member.device).unsqueeze(1)
        return cls(member, member + members * seed)


def pick(leaf: Tensor, duty: Duty | None) -> Tensor:
    """A parameter with axes of rows in front of its own, to be broadcast over activations.

    Args:    leaf [S, N, *rest].
    Returns: [S, N, 1, 1, *rest]; on duty [S, 1, E, 1, *rest].
    """
    if duty is None or leaf.shape[1] == 1:
        return leaf[:, :, None, None]
    rows = leaf.flatten(0, 1).index_select(0, duty.place.flatten())
    return rows.unflatten(0, duty.place.shape)[:, None, :, None]


def networks(leaf: Tensor, duty: Duty | None) -> Tensor:
    """A parameter of every network; on duty that of every environment's member.

    Args:    leaf [S, N, *rest].
    Returns: [S * N or S * E, *rest].
    """
    leaf = leaf.flatten(0, 1)
    return leaf if duty is None else leaf.index_select(0, duty.place.flatten())


def worth_gathering(*, envs: int, members: int) -> bool:
    """Whether to gather a network's weights before it runs on one row of every environment.

    The weights of large networks cost more memory traffic than their few rows. Gathering reads and
    writes E sets of weights and reads them again in the products, 3 E; products of all members read
    N sets. Small networks, whose time is that of the launches, are not worth the question.
    """
    return 3 * envs < members


def gathered(net: nn.Module, member: Tensor) -> dict[str, Tensor]:
    """Parameters of the members that act, [S, N, *rest] -> [S, E, *rest]; shared ones as they are.

    Args: member [S, E] int64 in [0, N). Returns: by name, for `torch.func.functional_call`.
    """
    leaves = dict(net.named_parameters())
    members = max(leaf.shape[1] for leaf in leaves.values())
    duty = Duty.of(member, members)
    return {
        name: leaf if leaf.shape[1] == 1 else networks(leaf, duty).unflatten(0, member.shape)
        for name, leaf in leaves.items()
    }


def project(x: Tensor, weight: Tensor, duty: Duty | None) -> Tensor:
    """Product of every row with the weight of its member, in the type of x.

    Args:    x [S, M, B, W, in], M is 1 or N, and 1 on duty, when B are environments; weight
             [S, N, in, out].
    Returns: [S, N, B, W, out]; on duty [S, 1, E, W, out].
    """
    batch, rows = x.shape[2:4]
    if duty is None or weight.shape[1] == 1:
        return matmul(x.flatten(2, 3), weight.to(x.dtype)).unflatten(2, (batch, rows))
    members, width = weight.shape[1:3]
    # Numbers moved for an output column. Gathering first reads a row's weights, writes them and
    # reads them again: 3 B D. Computing all members reads their weights, and writes and reads
    # their outputs: N (D + 2 B W).
    if 3 * batch * width < members * (width + 2 * batch * rows):
        own = weight.flatten(0, 1).index_select(0, duty.place.flatten()).to(x.dtype)
        y = x[:, 0].flatten(0, 1) @ own  # [S * E, W, out]
        return y.unflatten(0, duty.place.shape).unsqueeze(1)
    every = matmul(x.flatten(2, 3), weight.to(x.dtype)).unflatten(2, (batch, rows))
    index = duty.member[:, None, :, None, None].expand(-1, 1, -1, *every.shape[3:])
    return every.gather(1, index)
