"""Softmax attention with rotary positions against a loop over queries and keys."""

import math

import pytest
import torch
from rounding import assert_agree
from torch import Tensor
from torch.nn import functional as F

from cerl.nets.transformer import Transformer, attention, rotated, visible

S, N, B, W, D, H = 2, 2, 2, 9, 16, 2
DH = D // H


def make(cache: int) -> Transformer:
    net = Transformer(S, N, width=D, heads=H, cache=cache)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in net.parameters():
            leaf.copy_(0.4 * torch.randn(leaf.shape, generator=generator))
    return net


def turned(z: Tensor, at: int) -> Tensor:
    """Pairs (i, i + Dh / 2) as complex numbers."""
    half = DH // 2
    angle = torch.tensor([at * 10000.0 ** (-2 * i / DH) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(half, dtype=torch.float64), angle)
    y = torch.complex(z[:half], z[half:]) * turn
    return torch.cat([y.real, y.imag])


@pytest.mark.parametrize("cache", [1, 4, 20])
@pytest.mark.parametrize("starts", [1, N])
def test_rows_are_a_loop_over_queries_and_keys(cache, starts):
    net = make(cache)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(S, N, B, W, D, generator=generator)
    start = torch.rand(S, starts, B, W, generator=generator) < 0.2
    with torch.no_grad():
        y, _ = net(x, start, None, None)
    for s in range(S):
        for n in range(N):
            wide, output = (part[s, n].detach().double() for part in net.parameters())
            for b in range(B):
                begins = start[s, n % starts, b]
                q, k, v = (x[s, n, b].double() @ wide).view(W, 3, H, DH).unbind(1)
                for i in range(W):
                    first = max(j for j in range(i + 1) if j == 0 or begins[j])
                    seen = range(max(first, i - cache + 1), i + 1)
                    o = []
                    for h in range(H):
                        # Any number may be added to positions.
                        at = turned(q[i, h], i + 5)
                        scores = torch.stack([at @ turned(k[j, h], j + 5) for j in seen])
                        p = (scores / math.sqrt(DH)).softmax(0)
                        o.append(sum(p[m] * v[j, h] for m, j in enumerate(seen)))
                    want = torch.cat(o) @ output
                    assert_agree(y[s, n, b, i], want)


def test_positions_stay_exact_after_a_million_steps():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 64, generator=generator)
    near, far = (
        (rotated(q, torch.tensor([first + 3])) * rotated(k, torch.tensor([first]))).sum()
        for first in (0, 10**6)
    )
    assert_agree(near, far)


def test_visible_keys_are_those_of_the_window_and_the_episode():
    start = torch.tensor([0, 0, 0, 1, 0], dtype=torch.bool).view(1, 1, 1, 5)
    seen = visible(start, 4, 2)[0, 0, 0].long().tolist()
    assert seen == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_long_streams_equal_the_window():
    net = make(3)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(S, N, B, 40, D, generator=generator)
    start = torch.zeros(S, 1, B, 40, dtype=torch.bool)
    start[..., 25] = True
    carry = net.carry(S * N * B, torch.float32, "cpu")
    carry[2].fill_(10**6)  # rows that the streams have seen
    with torch.no_grad():
        y, _ = net(x, start, None, None)
        for t in range(40):
            got = net.step(x[:, :, :, t : t + 1], start[..., t : t + 1], carry, None)
            assert_agree(got[:, :, :, 0], y[:, :, :, t])
    assert (carry[2] == 15).all() and (carry[3] == 3).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [(515, 515), (64, 72), (130, 301)])
def test_gradient_is_that_of_torch_and_the_same_bits_each_time(rows, keys, dtype):
    generator = torch.Generator("cuda").manual_seed(3)
    start = torch.rand(16, 1, 1, keys, device="cuda", generator=generator) < 0.01
    seen = visible(start, rows, 400)[:, 0]  # [16, 1, rows, keys]

    def gradients(attend) -> list[Tensor]:
        generator.manual_seed(4)
        shapes = ((16, rows, 20, 32), (16, keys, 20, 32), (16, keys, 20, 32), (16, rows, 20, 32))
        q, k, v, do = (
            torch.randn(shape, device="cuda", generator=generator).to(dtype).transpose(1, 2)
            for shape in shapes
        )
        leaves = [part.requires_grad_() for part in (q, k, v)]
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    first = gradients(lambda q, k, v: attention(q, k, v, seen))
    torchs = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got, want in zip(first, torchs, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for _ in range(10):
        again = gradients(lambda q, k, v: attention(q, k, v, seen))
        assert all(map(torch.equal, first, again))
