"""Masked softmax attention of torch, rotary positions, and blocks made of both.

`tests/test_fox.py` compares these blocks with a loop over queries and keys.
"""

import pytest
import torch
from rounding import assert_agree
from torch import Tensor
from torch.nn import functional as F

from cerl.nets.fox import Fox
from cerl.nets.transformer import attend_ring, attend_rows, attention, rotated, visible

S, N, B, W, D, H = 2, 2, 2, 9, 16, 2
DH = D // H


def make(cache: int) -> Fox:
    net = Fox(
        S,
        N,
        width=D,
        heads=H,
        cache=cache,
        variant="llama",
        gate="none",
        rotary=True,
        gate_bias=None,
        prune=None,
        impl="auto",
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in net.parameters():
            leaf.copy_(0.4 * torch.randn(leaf.shape, generator=generator))
    return net


@pytest.mark.parametrize("starts", [1, N])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_rows_attend_to_the_keys_that_they_see(starts, key_heads):
    generator = torch.Generator().manual_seed(9)
    q = torch.randn(S, N, B, 5, 4, DH, generator=generator)
    k, v = torch.randn(2, S, N, B, W, key_heads, DH, generator=generator)
    seen = visible(torch.rand(S, starts, B, W, generator=generator) < 0.3, 5, 4)
    o = attend_rows(q, k, v, seen)
    for s in range(S):
        for n in range(N):
            for b in range(B):
                for i in range(5):
                    keys = seen[s, n % starts, b, i].nonzero().flatten()
                    for h in range(4):
                        g = h * key_heads // 4
                        scores = k[s, n, b, keys, g].double() @ q[s, n, b, i, h].double()
                        p = (scores / DH**0.5).softmax(0)
                        assert_agree(o[s, n, b, i, h], p @ v[s, n, b, keys, g].double())


def test_a_query_attends_to_the_newest_keys_of_its_ring():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, DH, generator=generator)
    k, v = torch.randn(2, 2, 2, 5, DH, generator=generator)
    slot, length = torch.tensor([1, 4]), torch.tensor([3, 2])
    o = attend_ring(q, k, v, slot, length)
    for g, slots in enumerate(([1, 0, 4], [4, 3])):
        for h in range(4):
            scores = k[g, h // 2, slots].double() @ q[g, h].double() / DH**0.5
            assert_agree(o[g, h], scores.softmax(0) @ v[g, h // 2, slots].double())


def test_positions_stay_exact_after_a_million_steps():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 64, generator=generator)
    near, far = (
        (rotated(torch.tensor([first + 3]), q)[0] * rotated(torch.tensor([first]), k)[0]).sum()
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
