"""The kernels for 129 to 256 keys against the definition in float64, in Triton's interpreter.

An error may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
"""

import functools
import math
from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_agree
from torch import Tensor

from cerl.kernels.attention.definition import forgetting_attention as definition
from cerl.kernels.attention.plan import Plan, make_plan
from cerl.kernels.attention.pruning import visited

pytest.importorskip("triton")
from cerl.kernels.attention import medium_backward_triton as medium_backward
from cerl.kernels.attention import medium_triton as medium

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = medium.Launch(16, 32, 4, 1), medium.Launch(16, 32, 4, 1)


class Case(NamedTuple):
    """B, M, N, Hq, Hkv, D; mean of -log_f; shares of resets and of starts; window, 0 for none.

    The threshold of later heads is lower: times 1, 2, 3 ...; launches are forward and backward.
    """

    shape: tuple[int, int, int, int, int, int]
    gate: float = 0.1
    resets: float = 0.0
    starts: float = 0.0
    window: int = 0
    threshold: float | None = None
    dlse: bool = True
    launches: tuple[medium.Launch | None, medium.Launch | None] = (None, None)


CASES = {
    "129 keys": Case((1, 129, 129, 1, 1, 24)),
    "200 keys, grouped, starts": Case((1, 200, 200, 2, 1, 24), starts=0.01),
    "256 keys, slow gates": Case((1, 256, 256, 2, 2, 64), gate=0.001),
    "256 keys, pruned": Case((1, 256, 256, 2, 2, 64), gate=0.3, threshold=-5.0, dlse=False),
    "255 keys, pruned, grouped": Case(
        (1, 255, 255, 4, 2, 40), gate=0.3, threshold=-3.0, starts=0.01
    ),
    "three tiles, resets of heads": Case((2, 192, 192, 2, 2, 48), resets=0.02),
    "resets everywhere": Case((1, 150, 150, 1, 1, 16), resets=1.0),
    "window of two": Case((1, 150, 150, 1, 1, 16), window=2),
    "window shorter than a tile": Case((1, 200, 200, 1, 1, 17), window=40),
    "one query": Case((2, 1, 129, 2, 1, 40), resets=0.01, gate=0.01),
    "fewer queries": Case((1, 100, 200, 2, 1, 24), gate=0.01),
    "fewer queries, pruned, window": Case(
        (1, 150, 230, 2, 2, 16), threshold=-6.0, window=140, dlse=False
    ),
    "queries begin inside a tile": Case((1, 161, 256, 2, 2, 16), threshold=-4.0, starts=0.01),
    "small blocks": Case((1, 150, 200, 2, 1, 24), threshold=-3.0, starts=0.01, launches=SMALL),
    "two programs of a head": Case(
        (1, 200, 256, 1, 1, 16),
        threshold=-9.0,
        launches=(medium.Launch(64, 64, 4, 1, None, 2), None),
    ),
    "instant forgetting": Case((1, 256, 256, 1, 1, 16), gate=50.0, resets=0.02),
    "little remembered": Case((1, 130, 130, 1, 1, 16), gate=3.0),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Any, Tensor, Any]:
    """q, k, v, log_f; start; do, dlse. None of them contiguous, rows apart."""
    batch, queries, keys, heads, key_heads, width = case.shape
    g = torch.Generator().manual_seed(3)
    q, k, v, do = (
        torch.randn(length, batch, count, width + 3, generator=g)[..., :width].transpose(0, 1)
        for length, count in (
            (queries, heads),
            (keys, key_heads),
            (keys, key_heads),
            (queries, heads),
        )
    )
    log_f = -2.0 * case.gate * torch.rand(batch, heads, keys, generator=g)
    reset = torch.rand(batch, heads, keys, generator=g) < case.resets
    log_f = log_f.masked_fill(reset, -math.inf).transpose(1, 2).to(DEVICE)
    chance = torch.rand(keys, batch, generator=g).T
    start = (chance < case.starts).to(DEVICE)
    dlse = torch.randn(batch, queries, 1, generator=g).expand(batch, queries, heads).to(DEVICE)
    q, k, v, do = (x.to(DEVICE, dtype) for x in (q, k, v, do))
    return [q, k, v, log_f], start if case.starts else None, do, dlse if case.dlse else None


def limit_of(case: Case) -> Tensor | None:
    if case.threshold is None:
        return None
    batch, heads = case.shape[0], case.shape[3]
    return case.threshold * torch.arange(1.0, heads + 1, device=DEVICE).repeat(batch, 1)


def run(case: Case, tensors: list[Tensor], start: Any, do: Tensor, dlse: Any) -> list[Tensor]:
    """o, lse, the gradients of the kernels and the skipped tiles."""
    q, k, v, log_f = tensors
    limit, scale, (one, two) = limit_of(case), case.shape[5] ** -0.5, case.launches
    options: dict[str, Any] = dict(plan=plan_of(case), scale=scale)
    o, lse, skipped, sums, sees = medium.forward(
        q, k, v, log_f, start, limit, window=case.window, launch=one, **options
    )
    given = do, dlse, q, k, v, log_f, start, o, lse, sums, sees
    return [o, lse, *medium_backward.backward(*given, launch=two, **options), skipped]


@functools.cache
def of_kernels(name: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], Tensor]:
    """The inputs of a case, o, lse and gradients, and the skipped tiles."""
    given = inputs(CASES[name], dtype)
    *outputs, skipped = run(CASES[name], *given)
    return given, outputs, skipped


def expected(case: Case, dtype: torch.dtype, tensors: Any, start: Any, do: Any, dlse: Any) -> Any:
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [
        x.detach().to(t).requires_grad_()
        for x, t in zip(tensors, (dtype, dtype, dtype, gate), strict=True)
    ]
    options: dict[str, Any] = dict(start=start, window=case.window or None)
    options |= dict(tiles=plan_of(case).tiles)
    q, k, v, log_f = leaves
    o, lse, _ = definition(q, k, v, log_f, threshold=limit_of(case), **options)
    outputs, gradients = [o], [do.to(o.dtype)]
    if dlse is not None:
        outputs, gradients = [o, lse], [do.to(o.dtype), dlse.to(lse.dtype)]
    found = torch.autograd.grad(outputs, leaves, gradients)
    return [x.detach() for x in (o, lse, *found)]


def plan_of(case: Case) -> Plan:
    _, _, keys, _, _, width = case.shape
    plan = make_plan(keys, width, torch.float16)
    assert plan.regime == "medium"
    return plan


QUICK = ("129 keys", "one query", "window of two", "little remembered")
each_case = pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@each_case
def test_kernels_match_the_definition(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given, outputs, _ = of_kernels(name, dtype)
    exact, same = (expected(case, kind, *given) for kind in (torch.float64, dtype))
    names = ("o", "lse", "dq", "dk", "dv", "dlog_f")
    for what, ours, ref, plain in zip(names, outputs, exact, same, strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        error = (ours.double() - ref).abs().max()
        limit = 2.0 * (plain.double() - ref).abs().max() + 1e-5 * ref.abs().max()
        assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.2e}"


@each_case
def test_skipped_tiles_are_those_of_the_definition(name: str) -> None:
    case = CASES[name]
    ((*_, log_f), start, _, _), _, skipped = of_kernels(name, torch.float16)
    options: dict[str, Any] = dict(queries=case.shape[1], tiles=plan_of(case).tiles)
    causal = visited(torch.zeros_like(log_f), **options)
    options |= dict(start=start, window=case.window or None)
    unpruned = visited(log_f, **options)
    pruned = visited(log_f, threshold=limit_of(case), **options)
    assert torch.equal(skipped, (causal.sum((2, 3)) - pruned.sum((2, 3))).float())
    assert torch.equal(pruned, unpruned) == (case.threshold is None)


def test_launches_that_do_not_divide_the_tiles_are_refused() -> None:
    case = CASES["129 keys"]
    (q, k, v, log_f), _, _, _ = inputs(case, torch.float16)
    options: dict[str, Any] = dict(plan=plan_of(case), launch=medium.Launch(128, 64, 4, 1))
    with pytest.raises(ValueError, match="divide tiles of 64 by 64"):
        medium.forward(q, k, v, log_f, None, None, window=0, scale=1.0, **options)


def test_gates_at_resets_have_no_gradient() -> None:
    case = Case((1, 140, 140, 2, 2, 16), resets=0.2, starts=0.1)
    tensors, start, do, dlse = inputs(case, torch.float16)
    gradient = run(case, tensors, start, do, dlse)[5]
    reset = tensors[3].isinf() | start.unsqueeze(2)
    reset[:, 0] = True
    assert not gradient[reset].any() and (gradient[~reset] != 0).float().mean() > 0.5


def test_sums_are_as_exact_as_two_floats() -> None:
    """Pairs of an episode after a fall of 1e4 keep a decay of about 1e-3 apart."""
    case = Case((1, 256, 256, 1, 1, 16), gate=5e-4, dlse=False)
    tensors, start, do, dlse = inputs(case, torch.float16)
    q, k, v, log_f = tensors
    log_f[:, 100] = -1e4
    lse = run(case, [torch.zeros_like(q), k, v, log_f], start, do, dlse)[1]
    sums = log_f[0, 101:, 0].double().cumsum(0)  # key 100 begins what is left
    sums = torch.cat([torch.zeros(1, dtype=torch.float64, device=DEVICE), sums])
    want = (sums[:, None] - sums[None, :]).tril().exp().tril().sum(1).log()
    assert_agree(lse[0, 100:, 0], want)
