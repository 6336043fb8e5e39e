"""The measured bound for pruning: the kernel is compared with the definition and with a loop."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.bounds import SLACK, limit_of, measured_bound

pytest.importorskip("triton")
from cerl.kernels.attention.measure_triton import measured_limits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(
    queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q and k of which no row lies right after another, the longest rows anywhere."""
    g = torch.Generator().manual_seed(keys)

    def rows(n: int, h: int) -> Tensor:
        x = torch.randn(3, n, h, 2 * width, generator=g) * torch.rand(3, n, h, 1, generator=g)
        return x.to(DEVICE, dtype)[..., :width]

    return rows(queries, heads[0]), rows(keys, heads[1])


def kernel(q: Tensor, k: Tensor, times: float = 2.0) -> Tensor:
    """The first limit alone, or the second of two."""
    count = 1 if times == 2.0 else 2
    return measured_limits(q, k, log_eps=-10.0, scale=0.3, slack=SLACK, count=count)[-1]


def definition(q: Tensor, k: Tensor, times: float = 2.0) -> Tensor:
    bound = measured_bound(q, k, 0.3)
    limit = limit_of(q, k.shape[1], bound=bound, log_eps=-10.0, times=times)
    assert limit is not None
    return limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("times", [1.0, 2.0])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"),
    [(130, 130, (2, 2), 64), (1, 300, (4, 2), 24), (257, 600, (3, 1), 17), (140, 140, (2, 1), 128)],
)
def test_limit_is_that_of_the_definition_and_below_the_exact_one(
    queries, keys, heads, width, times, dtype
):
    q, k = draw(queries, keys, heads, width, dtype)
    got = kernel(q, k, times)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, definition(q, k, times), rtol=2 * SLACK, atol=0.0)
    for b in range(3):
        for h in range(heads[0]):
            shared = h // (heads[0] // heads[1])
            longest = [max(x.double().norm(dim=1)) for x in (q[b, :, h], k[b, :, shared])]
            bound = 0.3 * float(longest[0] * longest[1])
            exact = -10.0 - math.log(keys) - times * bound
            assert exact * (1 + 4 * SLACK) <= float(got[b, h]) <= exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_bound_that_is_not_known_skips_nothing_of_its_head_alone(bad, which):
    tensors = draw(150, 300, (2, 2), 24, torch.float32)
    want = kernel(*tensors)
    tensors[which][1, 149, 1, 3] = bad
    tensors[1 - which][1, :, 1] = 0.0
    got = kernel(*tensors)
    assert got[1, 1] == -math.inf
    got[1, 1] = want[1, 1]
    assert torch.equal(got, want)


@pytest.mark.slow
def test_attention_takes_the_measured_limit():
    q, k = draw(200, 200, (2, 2), 24, torch.float32)
    g = torch.Generator().manual_seed(1)
    v = torch.randn(3, 200, 2, 24, generator=g).to(DEVICE)
    log_f = -torch.rand(3, 200, 2, generator=g).to(DEVICE)
    given: dict[str, Any] = dict(return_skipped=True, impl="triton")
    want = forgetting_attention(q, k, v, log_f, threshold=kernel_limit(q, k), **given)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_f)]
    got = forgetting_attention(*leaves, bound="measured", log_eps=-2.0, **given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert float(got[1].min()) > 0.1


def kernel_limit(q: Tensor, k: Tensor) -> Tensor:
    scale = q.shape[3] ** -0.5
    return measured_limits(q, k, log_eps=-2.0, scale=scale, slack=SLACK, count=1)[0]
