"""The recurrent block is compared with torch's, for all members, shared or for those on duty."""

import pytest
import torch
from rounding import assert_agree
from torch import Tensor

from cerl.nets.acting import Duty
from cerl.nets.gru import Gru

S, B, W, D = 2, 4, 11, 8


def make(members: int) -> Gru:
    net = Gru(S, members, width=D, impl="auto")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in net.parameters():
            leaf.copy_(0.6 * torch.randn(leaf.shape, generator=generator))
    return net


def inputs(members: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(S, members, B, W, D, generator=generator)
    return x, torch.rand(S, 1, B, W, generator=generator) < 0.2


def torchs(net: Gru, s: int, n: int, x: Tensor, start: Tensor) -> Tensor:
    """torch.nn.GRU over the episodes of rows [W, D], one after the other."""
    theirs = torch.nn.GRU(D, D, batch_first=True)
    with torch.no_grad():
        weights = net.inputs.weight[s, n].T, net.recurrent.weight[s, n].T
        biases = net.inputs.bias[s, n], torch.cat([torch.zeros(2 * D), net.bias[s, n]])
        for leaf, value in zip(theirs.parameters(), (*weights, *biases), strict=True):
            leaf.copy_(value)
        cuts = [0, *(t for t in range(1, len(x)) if start[t]), len(x)]
        pieces = [theirs(x[a:b])[0] for a, b in zip(cuts, cuts[1:], strict=False)]
    return torch.cat(pieces)


@pytest.mark.parametrize("members, streams", [(3, 3), (1, 1), (1, 3)])
def test_rows_are_torchs_gru_of_every_member(members, streams):
    net = make(members)
    x, start = inputs(streams)
    with torch.no_grad():
        y, last = net(x, start, None, None)
    for s in range(S):
        for n in range(streams):
            for b in range(B):
                want = torchs(net, s, n % members, x[s, n, b], start[s, 0, b])
                assert_agree(y[s, n, b], want)
    assert torch.equal(last, y[:, :, :, -1])


def test_rows_on_duty_are_those_of_the_member():
    net = make(3)
    x, start = inputs(1)
    member = torch.randint(3, (S, B), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, _ = net(x, start, None, Duty.of(member, 3))
    for s in range(S):
        for b in range(B):
            want = torchs(net, s, int(member[s, b]), x[s, 0, b], start[s, 0, b])
            assert_agree(y[s, 0, b], want)


def test_rows_in_pieces_are_the_whole():
    net = make(3)
    x, start = inputs(3)
    with torch.no_grad():
        y, _ = net(x, start, None, None)
        first, past = net(x[:, :, :, :4], start[..., :4], None, None)
        rest, _ = net(x[:, :, :, 4:], start[..., 4:], past, None)
    assert_agree(torch.cat([first, rest], 3), y)
