"""The kernels of short sequences against the definition in float64, in Triton's interpreter.

An error may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cerl.kernels.attention.definition import forgetting_attention as definition
from cerl.kernels.attention.plan import make_plan

pytest.importorskip("triton")
from cerl.kernels.attention import short_triton as short

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """B, M, N, Hq, Hkv, D; mean of -log_f; shares of resets and of starts; window, 0 for none."""

    shape: tuple[int, int, int, int, int, int]
    gate: float = 0.1
    resets: float = 0.0
    starts: float = 0.0
    window: int = 0
    dlse: bool = True
    dtype: torch.dtype = torch.float32
    launch: short.Launch | None = None


CASES = {
    "one step": Case((1, 1, 1, 2, 1, 5)),
    "one query": Case((1, 1, 9, 2, 2, 16), starts=0.2),
    "one query, three blocks": Case((2, 1, 63, 1, 1, 16), resets=0.05),
    "15 steps": Case((3, 15, 15, 3, 3, 24), resets=0.1),
    "63 steps, resets and starts": Case((2, 63, 63, 2, 2, 16), resets=0.05, starts=0.05),
    "resets everywhere": Case((1, 20, 20, 2, 2, 16), resets=1.0),
    "window of one": Case((1, 20, 20, 1, 1, 16), window=1),
    "fewer queries, grouped, window": Case((1, 40, 100, 4, 2, 40), starts=0.03, window=17),
    "fewer queries in blocks": Case(
        (1, 40, 100, 2, 1, 24), starts=0.03, launch=short.Launch(16, 1, 4)
    ),
    "half, 100 steps": Case((1, 100, 100, 1, 1, 64), gate=1.0, starts=0.03, dtype=torch.float16),
    "128 steps, instant forgetting": Case((1, 128, 128, 2, 1, 64), gate=50.0, resets=0.1),
    "nothing remembered": Case((1, 50, 50, 2, 2, 16), gate=1e4),
    "no gradient of lse": Case((1, 33, 33, 1, 1, 16), dlse=False),
    "many heads in a program": Case(
        (2, 15, 15, 3, 3, 16), starts=0.1, launch=short.Launch(16, 4, 4)
    ),
    "many heads, grouped, in blocks": Case(
        (2, 20, 30, 4, 2, 16), starts=0.1, window=9, launch=short.Launch(16, 2, 4)
    ),
    "half, table's many heads": Case((1, 16, 16, 3, 3, 16), resets=0.1, dtype=torch.float16),
}


def inputs(case: Case) -> Any:
    """q, k, v, log_f; start; do, dlse. None of them contiguous, rows apart."""
    batch, queries, keys, heads, key_heads, width = case.shape
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v, do = (
        normal(length, batch, count, width + 3)[..., :width].transpose(0, 1).to(case.dtype)
        for length, count in (
            (queries, heads),
            (keys, key_heads),
            (keys, key_heads),
            (queries, heads),
        )
    )
    log_f = -2.0 * case.gate * torch.rand(batch, heads, keys, generator=generator)
    reset = torch.rand(batch, heads, keys, generator=generator) < case.resets
    log_f = log_f.masked_fill(reset, -math.inf).transpose(1, 2)
    chance = torch.rand(keys, batch, generator=generator).T
    start = chance < case.starts
    dlse = normal(batch, queries, 1).expand(batch, queries, heads) if case.dlse else None
    tensors = [x.to(DEVICE) for x in (q, k, v, log_f)]
    start = start.to(DEVICE) if case.starts else None
    return tensors, start, do.to(DEVICE), dlse if dlse is None else dlse.to(DEVICE)


def run(tensors: Any, start: Any, do: Any, dlse: Any, **options: Any) -> list[Tensor]:
    """o, lse and the gradients of the kernels."""
    q, k, v, log_f = tensors
    o, lse, _ = short.forward(q, k, v, log_f, start, **options)
    return [o, lse, *short.backward(do, dlse, q, k, v, log_f, start, o, lse, **options)]


def expected(case: Case, dtype: torch.dtype, tensors: Any, start: Any, do: Any, dlse: Any) -> Any:
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [
        x.detach().to(t).requires_grad_()
        for x, t in zip(tensors, (dtype, dtype, dtype, gate), strict=True)
    ]
    _, _, keys, _, _, width = case.shape
    options: dict[str, Any] = dict(start=start, window=case.window or None)
    options |= dict(tiles=make_plan(keys, width, case.dtype).tiles)
    q, k, v, log_f = leaves
    o, lse, _ = definition(q, k, v, log_f, **options)
    outputs, gradients = [o], [do.to(o.dtype)]
    if dlse is not None:
        outputs, gradients = [o, lse], [do.to(o.dtype), dlse.to(lse.dtype)]
    return [o, lse, *torch.autograd.grad(outputs, leaves, gradients)]


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_definition(name: str) -> None:
    case = CASES[name]
    tensors, start, do, dlse = inputs(case)
    options: dict[str, Any] = dict(
        window=case.window, scale=case.shape[5] ** -0.5, launch=case.launch
    )
    outputs = run(tensors, start, do, dlse, **options)
    exact = expected(case, torch.float64, tensors, start, do, dlse)
    same = expected(case, case.dtype, tensors, start, do, dlse)
    names = ("o", "lse", "dq", "dk", "dv", "dlog_f")
    for what, ours, ref, plain in zip(names, outputs, exact, same, strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        error = (ours.double() - ref).abs().max()
        limit = 2.0 * (plain.double() - ref).abs().max() + 1e-5 * ref.abs().max()
        assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.2e}"


def test_gates_at_resets_have_no_gradient() -> None:
    case = Case((2, 30, 30, 2, 2, 16), resets=0.2, starts=0.1)
    tensors, start, do, _ = inputs(case)
    gradient = run(tensors, start, do, None, window=0, scale=0.25)[5]
    reset = tensors[3].isinf() | start.unsqueeze(2)
    reset[:, 0] = True
    assert not gradient[reset].any() and (gradient[~reset] != 0).float().mean() > 0.5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_in_one_row_of_the_batch_stays_there() -> None:
    tensors, _, do, _ = inputs(Case((2, 32, 32, 1, 1, 16)))
    clean = run(tensors, None, do, None, window=0, scale=0.25)
    for x in tensors:
        x[1] = math.nan
    for ours, ref in zip(run(tensors, None, do, None, window=0, scale=0.25), clean, strict=True):
        assert torch.equal(ours[0], ref[0])
        assert ours[1].isnan().any()


def test_nothing_is_skipped() -> None:
    (q, k, v, log_f), start, _, _ = inputs(Case((2, 60, 100, 2, 1, 16), gate=9.0, starts=0.1))
    _, _, skipped = short.forward(q, k, v, log_f, start, window=20, scale=1.0)
    assert torch.equal(skipped, torch.zeros(2, 2, device=DEVICE))
