"""Gated recurrent units as a block of the trunk, every member with its own weights.

Cho et al. 2014 (arXiv:1406.1078). The products with the inputs are one matrix product for all rows;
the recurrence, which must run step by step, is one scan (`kernels/gru.py`).
"""

import torch
from torch import Tensor, nn

from cerl.kernels import Impl
from cerl.kernels.gru import cell, gru
from cerl.nets.acting import Duty, networks, pick, project
from cerl.nets.layers import Linear, Projection


class Gru(nn.Module):
    """A gated recurrent unit of every member, with a state of D numbers.

    Parameters: inputs and recurrent [S, N, D, 3 D], the weights that inputs and state have in the
                reset gate r, the update gate z and the candidate n, side by side; inputs has a
                bias [S, N, 3 D]; bias [S, N, D] is added to the state's product in n.
    """

    def __init__(self, seeds: int, members: int, *, width: int, impl: Impl) -> None:
        super().__init__()
        self.width = width
        self.impl: Impl = impl
        self.inputs = Linear(seeds, members, width, 3 * width)
        self.recurrent = Projection(seeds, members, width, 3 * width)
        self.bias = nn.Parameter(torch.zeros(seeds, members, width))

    @staticmethod
    def size(width: int) -> int:
        """Number of parameters of one member."""
        return 6 * width * width + 4 * width

    def forward(
        self, x: Tensor, start: Tensor, past: Tensor | None, duty: Duty | None
    ) -> tuple[Tensor, Tensor]:
        """States after every row.

        Args:    x [S, N, B, W, D]; start [S, 1 or N, B, W] bool, the row begins an episode; past
                 [S, N, B, D], the state before row 0, or None for 0; duty, the acting members, for
                 which N is 1 and axis B are the E environments, or None.
        Returns: [S, N, B, W, D] float32, and the last state [S, N, B, D].
        """
        lead = x.shape[:3]
        share = self._from_inputs(x, duty)
        if past is None:
            past = torch.zeros(*lead, self.width, dtype=torch.float32, device=x.device)
        weight = networks(self.recurrent.weight.to(x.dtype), duty)
        bias = networks(self.bias, duty)
        if self.bias.shape[1] == 1:  # the members share one network, which runs over all their rows
            start = start.expand(*lead, -1).flatten(1, 2).unsqueeze(1)
        elif duty is not None:  # every environment has a network of its own
            start = start.flatten(0, 2).unflatten(0, (-1, 1, 1))
        share = share.reshape(len(weight), -1, *share.shape[3:])
        h = past.reshape(len(weight), -1, self.width)
        y = gru(share, weight, bias, h, start.flatten(0, 1), impl=self.impl).view(x.shape)
        return y, y[:, :, :, -1]

    def carry(self, streams: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """A state of 0 for every stream, float32 whatever the type of the products."""
        return [torch.zeros(streams, self.width, device=device)]

    def step(self, x: Tensor, start: Tensor, carry: list[Tensor], duty: Duty | None) -> Tensor:
        """The state after one new row of every stream; `carry` is written in place.

        Args:    x [S, N, E, 1, D]; start [S, 1, E, 1] bool; duty as in `forward`.
        Returns: [S, N, E, 1, D] float32.
        """
        h = carry[0].view(*x.shape[:3], 1, self.width).masked_fill(start.unsqueeze(4), 0.0)
        product = project(h.to(x.dtype), self.recurrent.weight, duty)
        h = cell(self._from_inputs(x, duty), product, pick(self.bias, duty), h)
        carry[0].copy_(h.flatten(0, 3))
        return h

    def refill(self, past: Tensor, carry: list[Tensor]) -> None:
        """Writes a state that `forward` returned, [S, N, E, D], into the carry."""
        carry[0].copy_(past.flatten(0, 2))

    def _from_inputs(self, x: Tensor, duty: Duty | None) -> Tensor:
        """The terms of the inputs in r, z and n, [S, N, B, W, 3 D] in the type of x."""
        share = project(x, self.inputs.weight, duty)
        return share + pick(self.inputs.bias, duty).to(x.dtype)
