"""Which tiles the running rule of pruning skips, compared with a loop over tiles and rows."""

import math
from typing import Any, Literal

import pytest
import torch

from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.plan import Tiles
from cerl.kernels.attention.pruning import decayed_sums, nearer_tiles, visited_tiles


@pytest.mark.parametrize("queries", [60, 41])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("tiles", [Tiles(4, 4), Tiles(6, 3)])
def test_running_rule_is_that_of_a_loop(queries, window, tiles):
    keys, heads = 60, 3
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(1, heads, queries, keys, generator=g, dtype=torch.float64)
    log_f = -0.4 * torch.rand(1, keys, heads, generator=g)
    start = torch.rand(1, keys, generator=g) < 0.05
    sums, left = decayed_sums(log_f, start, window)
    offset = keys - queries
    scores = scores + sums[:, :, offset:, None] - sums[:, :, None]
    room = torch.tensor([[-2.0, -4.0, -7.0]])
    static = visited_tiles(sums, left, queries, tiles, -9.0)
    got = nearer_tiles(static, scores, sums, left, room, tiles)
    want = static.clone()
    for h in range(heads):
        for m in range(static.shape[2]):
            r = offset + m * tiles.rows
            rows = [i for i in range(r, min(r + tiles.rows, keys))]
            begin = int(static[0, h, m].int().argmax())
            near = max(begin, r // tiles.columns - 1)
            if int(left[0, h, rows[-1]]) > begin * tiles.columns:
                continue
            limit = math.inf
            for i in rows:
                if int(left[0, h, i]) <= r:
                    seen = scores[
                        0, h, i - offset, max(near * tiles.columns, left[0, h, i]) : i + 1
                    ]
                    total = float(seen.logsumexp(0) - (sums[0, h, i] - sums[0, h, r]))
                    limit = min(limit, total)
            for n in range(begin, near):
                end = (n + 1) * tiles.columns - 1
                decay = float(sums[0, h, r] - sums[0, h, end])
                want[0, h, m, n] = decay >= limit + float(room[0, h])
    assert torch.equal(got, want)
    assert window or int(got.sum()) < int(static.sum())


def test_running_rule_drops_no_more_than_it_says():
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 700, 2, 8, generator=g).double() for _ in range(3))
    log_f = (-0.15 * torch.rand(1, 700, 2, generator=g)).double()
    whole = forgetting_attention(q, k, v, log_f)
    for log_eps in (-10.0, -2.0):
        options: dict[str, Any] = dict(bound="measured", log_eps=log_eps, return_skipped=True)
        o, skipped = forgetting_attention(q, k, v, log_f, rule="running", **options)
        _, static = forgetting_attention(q, k, v, log_f, **options)
        assert bool((skipped > static).all())
        most = 2.0 * math.exp(log_eps) * float(v.abs().max())
        assert 0.0 < float((o - whole).abs().max()) <= most


def test_few_keys_are_those_of_the_static_rule():
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 256, 1, 8, generator=g) for _ in range(3))
    log_f = -torch.rand(1, 256, 1, generator=g)
    rules: tuple[Literal["static", "running"], ...] = ("static", "running")
    static, running = (
        forgetting_attention(q, k, v, log_f, bound=3.0, rule=rule, return_skipped=True)
        for rule in rules
    )
    assert all(torch.equal(a, b) for a, b in zip(static, running, strict=True))
    assert float(static[1]) > 0.0
