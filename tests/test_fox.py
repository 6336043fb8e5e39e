"""FoX's attention is compared with the paper's equations, number by number; its cache."""

import math
from typing import Any

import pytest
import torch
from rounding import assert_agree
from torch import Tensor

from cerl.kernels.attention.step import Cache
from cerl.kernels.fox import shifted
from cerl.nets.fox import Fox, gate_biases

S, N, B, W, D, H = 2, 2, 2, 9, 16, 2
DH = D // H


def make(variant: str, *, cache: int = 4, prune: float | None = None, heads: int = H) -> Fox:
    fox = Fox(
        S,
        N,
        width=D,
        heads=heads,
        variant=variant,
        cache=cache,
        gate_bias=(2.0, 9.0),
        prune=prune,
        impl="auto",
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in fox.parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            leaf.copy_(
                noise * 0.4 if leaf.dim() == 4 and leaf.shape[2] == D else leaf + noise * 0.2
            )
    return fox


def inputs(rows: int = W, often: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(S, N, B, rows, D, generator=generator)
    return x, torch.rand(S, 1, B, rows, generator=generator) < often


def by_loops(fox: Fox, x: Tensor, start: Tensor) -> Tensor:
    """Lin et al. 2025, one query and key at a time, in float64."""
    leaf = {name: part.detach().double() for name, part in fox.named_parameters()}
    y = torch.zeros(x.shape, dtype=torch.float64)
    for s in range(S):
        for n in range(N):
            own = {name: part[s, n] for name, part in leaf.items()}
            for b in range(B):
                y[s, n, b] = sequence(fox, own, x[s, n, b].double(), start[s, 0, b])
    return y


def unit(z: Tensor, scale: Tensor, eps: float) -> Tensor:
    return z / (z.square().mean() + eps).sqrt() * scale


def sequence(fox: Fox, own: dict[str, Tensor], x: Tensor, start: Tensor) -> Tensor:
    rows, pro = x.shape[0], fox.pro
    names = ["q", "k", "v"] + (["gate", "f", "shift_k", "shift_v"] if pro else ["f"])
    part = dict(zip(names, (x @ own["wide.weight"]).split(fox.columns, 1), strict=True))
    o = torch.zeros(rows, D, dtype=torch.float64)
    for h in range(H):
        cut = slice(h * DH, (h + 1) * DH)
        log_f = torch.log(torch.sigmoid(part["f"][:, h] + own["bias"][h]))
        q, k, v = [], [], []
        for t in range(rows):
            q_t, k_t, v_t = (part[name][t, cut] for name in "qkv")
            if pro:
                none = t == 0 or bool(start[t])
                a_k, a_v = (torch.sigmoid(part[f"shift_{name}"][t, h]) for name in "kv")
                old_k, old_v = (
                    torch.zeros(DH) if none else part[name][t - 1, cut] for name in "kv"
                )
                k_t, v_t = a_k * old_k + (1 - a_k) * k_t, a_v * old_v + (1 - a_v) * v_t
                q_t, k_t = unit(q_t, own["q_scale"][h], 1e-5), unit(k_t, own["k_scale"][h], 1e-5)
            q.append(q_t)
            k.append(k_t)
            v.append(v_t)
        for i in range(rows):
            first = max(j for j in range(i + 1) if j == 0 or start[j])
            seen = range(max(first, i - fox.cache + 1), i + 1)
            scores = torch.stack(
                [q[i] @ k[j] / math.sqrt(DH) + log_f[j + 1 : i + 1].sum() for j in seen]
            )
            mixed = scores.softmax(0) @ torch.stack([v[j] for j in seen])
            o[i, cut] = unit(mixed, own["o_scale"][h], 1e-6) if pro else mixed
    if pro:
        o = o * torch.sigmoid(part["gate"])
    return o @ own["output.weight"]


@pytest.mark.parametrize("variant", ["llama", "pro"])
@pytest.mark.parametrize("cache", [1, 4, 20])
def test_rows_follow_the_papers_equations(variant, cache):
    fox = make(variant, cache=cache)
    x, start = inputs()
    with torch.no_grad():
        y, _ = fox(x, start, None, None)
    assert_agree(y, by_loops(fox, x, start))


@pytest.mark.parametrize("variant", ["llama", "pro"])
def test_rows_in_pieces_are_the_whole(variant):
    fox = make(variant)
    x, start = inputs()
    with torch.no_grad():
        y, _ = fox(x, start, None, None)
        past, pieces = None, []
        for cut in (slice(0, 1), slice(1, 6), slice(6, 9)):
            piece, past = fox(x[:, :, :, cut], start[..., cut], past, None)
            pieces.append(piece)
    assert_agree(torch.cat(pieces, 3), y)


def test_gate_forgets_with_its_time_scales():
    f = torch.sigmoid(gate_biases(3, (2.0, 50.0)).double())
    want = [math.exp(-1 / 2), math.exp(-1 / 10), math.exp(-1 / 50)]
    torch.testing.assert_close(f, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert not gate_biases(3, None).any()
    assert gate_biases(1, (5.0, 50.0)).isfinite().all()


def test_shift_mixes_with_the_row_before_of_the_same_episode():
    z = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    logit = torch.tensor([0.0, math.log(3.0), 0.0, math.log(3.0)]).view(1, 4, 1)  # 1/2 3/4 1/2 3/4
    begins = torch.tensor([[False, False, True, False]])
    y = shifted(z, torch.full((1, 1, 1), 10.0), logit, begins)
    torch.testing.assert_close(y.flatten(), torch.tensor([5.5, 1.25, 2.0, 5.0]))


@pytest.mark.parametrize("variant", ["llama", "pro"])
@pytest.mark.parametrize("rows", [3, 6, 17])
def test_refill_leaves_the_cache_that_steps_leave(variant, rows):
    fox, ring = make(variant, cache=6), 6
    x, start = inputs(rows, often=0.1)
    ours, theirs = (fox.carry(S * N * B, torch.float32, "cpu") for _ in range(2))
    with torch.no_grad():
        _, past = fox(x, start, None, None)
        fox.refill(past, ours)
        for t in range(rows):
            fox.step(x[:, :, :, t : t + 1], start[..., t : t + 1], theirs, None)
    mine, other = Cache(*ours[:6]), Cache(*theirs[:6])
    assert torch.equal(mine.length, other.length)
    assert_agree(mine.norm, other.norm)
    for part, want in zip(ours[6:], theirs[6:], strict=True):
        assert_agree(part, want)
    assert len(ours) == (8 if variant == "pro" else 6)

    def newest(cache: Cache, name: str) -> Tensor:  # age 0 first
        slots = (cache.position.long().unsqueeze(2) - 1 - torch.arange(ring)) % ring  # [G, H, R]
        field: Any = getattr(cache, name)
        return field.gather(2, slots.unsqueeze(3).expand(-1, -1, -1, DH))

    seen = (torch.arange(ring) < mine.length.unsqueeze(2)).unsqueeze(3)
    for name in ("k", "v"):
        assert_agree(newest(mine, name) * seen, newest(other, name) * seen)


@pytest.mark.parametrize("variant", ["llama", "pro"])
def test_pruning_skips_blocks_and_keeps_the_output(variant, monkeypatch):
    from cerl.nets import fox as module

    shares, operator = [], module.forgetting_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        o, skipped = operator(*args, **options, return_skipped=True)
        shares.append(skipped)
        return o

    x, start = inputs(400, often=0.0)
    outputs = []
    for prune in (None, -10.0):
        fox = make(variant, cache=400, prune=prune)
        with torch.no_grad():
            fox.bias.sub_(2.0)
            if prune is not None:
                monkeypatch.setattr(module, "forgetting_attention", watched)
            outputs.append(fox(x, start, None, None)[0])
    assert (shares[0] > 0.2).all()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("variant", ["llama", "pro"])
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_of_heads_in_16_bits_start_on_16_bytes(variant, heads, monkeypatch):
    from cerl.nets import fox as module

    fox, operator, seen = make(variant, heads=heads), module.forgetting_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.extend((part.stride(1) * part.element_size(), part.data_ptr()) for part in (q, k, v))
        return operator(q, k, v, *rest, **options)

    monkeypatch.setattr(module, "forgetting_attention", watched)
    x, start = inputs()
    with torch.no_grad():
        fox(x.bfloat16(), start, None, None)
    assert len(seen) == 3 and all(number % 16 == 0 for pair in seen for number in pair)
