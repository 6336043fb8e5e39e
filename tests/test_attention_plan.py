"""Which kernels a call runs with which tiles, and that its buffers have the kernels' sizes."""

import pytest
import torch

from cerl.kernels.attention.operator import attend
from cerl.kernels.attention.plan import Tiles, make_plan

HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("keys", "width", "dtype", "regime"),
    [
        (1, 1, HALF, "short"),
        (128, 64, SINGLE, "short"),
        (128, 65, HALF, "long"),
        (129, 64, HALF, "medium"),
        (256, 64, torch.bfloat16, "medium"),
        (200, 64, SINGLE, "long"),
        (200, 65, HALF, "long"),
        (257, 64, HALF, "long"),
    ],
)
def test_regime_follows_from_keys_width_and_type(keys, width, dtype, regime):
    plan = make_plan(keys, width, dtype)
    assert plan.regime == regime
    assert plan.tiles == (Tiles(128, 128) if regime == "short" else Tiles(64, 64))
    assert plan.few == (keys <= 256)
    assert (plan.sums_length == plan.left_length == 0) == (regime == "short")


@pytest.mark.parametrize("keys", [129, 256, 257, 384, 385, 4097])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_buffers_hold_every_position_and_the_blocks_that_end_past_the_last_one(keys, dtype):
    plan = make_plan(keys, 64, dtype)
    # A block of up to 64 positions may begin at the last one.
    assert plan.sums_length >= keys - 1 + 64 and plan.left_length >= keys
    if plan.regime == "long":
        assert plan.sums_length == plan.left_length and plan.sums_length % 128 == 0


@pytest.mark.parametrize(
    ("keys", "queries", "width", "dtype"),
    [(40, 40, 16, SINGLE), (129, 1, 16, HALF), (256, 3, 16, HALF), (257, 2, 16, HALF)],
)
def test_kernels_fill_buffers_of_the_shapes_that_a_compiler_is_told(keys, queries, width, dtype):
    """A wrong length would be read past its end by the backward pass of a compiled program."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 1, width, generator=g).to(device, dtype) for n in (queries, keys, keys)
    )
    log_f = -torch.rand(1, keys, 1, generator=g).to(device)
    given = q, k, v, log_f, None, None, None, 0, 0.25
    made = attend.registered(*given)
    told = attend.registered(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in given))
    assert [(x.shape, x.dtype, x.stride()) for x in made] == [
        (x.shape, x.dtype, x.stride()) for x in told
    ]
    assert not any(x.isnan().any() for x in made[:4])
