"""Steps of soft actor-critic: kernels against their definitions in float64.

Without a CUDA device the kernels run in Triton's interpreter (conftest.py asks for it). An error
may be twice that of the definition in float32, plus 1e-5 of the largest value.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cerl.kernels import sac

pytest.importorskip("triton")
from cerl.kernels import sac_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Leaves = dict[str, Tensor]


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def squashed_case(options: dict[str, Any], rows: int, actions: int) -> tuple[Leaves, Callable]:
    raw = numbers(2, 3, rows, 2 * actions, seed=1, scale=2.0)
    raw[0, 0, 0] = 30.0  # a saturated tanh
    # As the two halves of one draw, whose seeds do not lie side by side.
    noise = numbers(2, 2, 3, rows, actions, seed=2)
    limits: dict[str, Any] = dict(low=-3.0, high=1.0) | options

    def call(t: Leaves, impl: Any) -> tuple[Tensor, ...]:
        return sac.squashed(t["raw"], t["noise"][:, 1], **limits, impl=impl)

    return {"raw": raw, "noise": noise}, call


def regression_case(delta: float, members: int, rows: int, heads: int) -> tuple[Leaves, Callable]:
    t = {"q": numbers(2, 3, 2, rows, heads, seed=1), "y": numbers(2, 3, rows, heads, seed=2)}
    t["weight"] = (numbers(2, members, rows, seed=3) > 0).float()
    t["weight"][0, 0] = 0.0

    def call(t: Leaves, impl: Any) -> tuple[Tensor, ...]:
        return (sac.regression(t["q"], t["y"], t["weight"], delta=delta, impl=impl),)

    return t, call


def objective_case(mean: bool, members: int, rows: int, critics: int) -> tuple[Leaves, Callable]:
    t = {"q": numbers(2, 3, critics, rows, seed=1), "log_p": numbers(2, 3, rows, seed=2)}
    t |= {"log_alpha": numbers(2, 3, 1, seed=4)}
    t["weight"] = (numbers(2, members, rows, seed=3) > 0).float()
    t["weight"][1, 0] = 0.0
    t["q"][0, 1, :, 0] = 0.25  # critics that agree share the gradient

    def call(t: Leaves, impl: Any) -> tuple[Tensor, ...]:
        options: dict[str, Any] = dict(goal=-1.5, mean=mean, impl=impl)
        return sac.objective(t["q"], t["log_p"], t["log_alpha"], t["weight"], **options)

    return t, call


CASES = {
    "sample": squashed_case({"clip": False}, 37, 6),
    "sample of wide actions": squashed_case({"clip": False}, 256, 17),
    "clipped sample of one action": squashed_case({"clip": True}, 5, 1),
    "regression": regression_case(0.0, 1, 37, 1),
    "regression of heads": regression_case(0.6, 1, 256, 10),
    "regression with own weights": regression_case(0.6, 3, 300, 3),
    "objective": objective_case(False, 1, 256, 2),
    "objective with own weights": objective_case(False, 3, 37, 3),
    "objective of the mean critic": objective_case(True, 1, 300, 5),
}
WANTED = ("raw", "q", "log_p", "log_alpha")


def results(case: str, impl: Any, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of what differentiates, under random gradients of the outputs."""
    start, call = CASES[case]
    t = {k: v.to(DEVICE, dtype).requires_grad_(k in WANTED) for k, v in start.items()}
    out = call(t, impl)
    own = [y for y in out if y.requires_grad]
    grads = [numbers(*y.shape, seed=9 + k).to(y) for k, y in enumerate(own)]
    leaves = [leaf for leaf in t.values() if leaf.requires_grad]
    return [y.detach() for y in out] + list(torch.autograd.grad(own, leaves, grads))


@pytest.mark.parametrize("case", CASES)
def test_kernel_agrees_with_the_definition(case):
    exact = results(case, "reference", torch.float64)
    theirs, ours = (results(case, impl, torch.float32) for impl in ("reference", "triton"))
    for mine, other, want in zip(ours, theirs, exact, strict=True):
        assert mine.shape == want.shape and mine.dtype == torch.float32
        error, allowed = ((got.double() - want).abs().max() for got in (mine, other))
        assert error <= 2 * allowed + 1e-5 * want.abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_seed_with_nan_leaves_the_other_bitwise_alone(case, impl, monkeypatch):
    clean = results(case, impl, torch.float32)
    start, call = CASES[case]
    dirty = {name: tensor.clone() for name, tensor in start.items()}
    for tensor in dirty.values():
        tensor[1] = torch.nan
    monkeypatch.setitem(CASES, case, (dirty, call))
    for mine, theirs in zip(clean, results(case, impl, torch.float32), strict=True):
        assert torch.equal(mine[0], theirs[0]) and theirs[1].isnan().any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_regression_by_hand(impl):
    # Errors 3 and -1 of the own head, 3 and -1 of the other: 9 and 1; 2 * 2 * 3 - 4 and 1.
    q = torch.tensor([[3.0, 3.0], [-1.0, -1.0]], device=DEVICE).view(1, 1, 1, 2, 2)
    y, weight = torch.zeros(1, 1, 2, 2, device=DEVICE), torch.ones(1, 1, 2, device=DEVICE)
    loss = sac.regression(q, y, weight, delta=2.0, impl=impl)
    assert loss.flatten().tolist() == [5.0, 4.5]
    # A single weight below 1 is not blown up to a mean.
    weight = torch.tensor([[[0.5, 0.0]]], device=DEVICE)
    half = sac.regression(q, y, weight, delta=0.0, impl=impl)
    assert half.flatten().tolist() == [4.5, 4.5]


@pytest.mark.parametrize("case", ["sample", "regression of heads", "objective"])
def test_operators_tell_the_truth_about_themselves(case):
    start, _ = CASES[case]
    t = {k: v.to(DEVICE).requires_grad_(k in WANTED) for k, v in start.items()}
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if "raw" in t:
        args: tuple[Any, ...] = (t["raw"], t["noise"][:, 1], -3.0, 1.0, False)
        torch.library.opcheck(sac_triton.squashed.registered, args, test_utils=checks)
    elif "y" in t:
        args = (t["q"], t["y"], t["weight"], 0.6)
        torch.library.opcheck(sac_triton.regression.registered, args, test_utils=checks)
    else:
        args = (t["q"], t["log_p"], t["log_alpha"], t["weight"], -1.5, False)
        torch.library.opcheck(sac_triton.objective.registered, args, test_utils=checks)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"noise \[S, N, rows, A\].*got \[1, 2, 3, 2\]"):
        sac.squashed(
            torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 3, 2), low=-1.0, high=1.0, clip=True
        )
    with pytest.raises(ValueError, match=r"of \[1, 2, 3, 5\], got \[1, 2, 3, 2\]"):
        sac.squashed(
            torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 2), low=-1.0, high=1.0, clip=True
        )
    with pytest.raises(ValueError, match=r"weights \[1, '1 or N', 3\], got .* \[1, 5, 3\]"):
        q, y = torch.zeros(1, 2, 2, 3, 4), torch.zeros(1, 2, 3, 4)
        sac.regression(q, y, torch.zeros(1, 5, 3), delta=0.0)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"log_p": (2, 3, 5)}, "2, 3, 5"),
        ({"log_alpha": (2, 3)}, "2, 3"),
        ({"weight": (2, 2, 4)}, "2, 2, 4"),
    ],
)
def test_objective_names_shapes_that_do_not_fit(change, got):
    shapes = {"q": (2, 3, 2, 4), "log_p": (2, 3, 4), "log_alpha": (2, 3, 1), "weight": (2, 1, 4)}
    tensors = [torch.zeros(shape) for shape in (shapes | change).values()]
    with pytest.raises(ValueError, match=rf"weights \[2, '1 or N', 4\], got .*\[{got}\]"):
        sac.objective(*tensors, goal=0.0, mean=False)


def test_kernels_take_float32_alone():
    q, y, weight = torch.zeros(1, 2, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 1, 3)
    half, *others = (x.to(DEVICE) for x in (q.half(), y, weight))
    with pytest.raises(ValueError, match="regression: the kernel takes float32, got torch.float16"):
        sac.regression(half, *others, delta=0.0, impl="triton")


def test_gradient_of_strided_temperatures_lies_where_they_do():
    t = objective_case(False, 1, 5, 2)[0]
    turned = t["log_alpha"].transpose(0, 1).contiguous().transpose(0, 1)
    grads = []
    for log_alpha in (t["log_alpha"], turned):
        leaf = log_alpha.to(DEVICE).requires_grad_()
        q, log_p, weight = (t[name].to(DEVICE) for name in ("q", "log_p", "weight"))
        _, loss, *_ = sac.objective(q, log_p, leaf, weight, goal=0.5, mean=False, impl="triton")
        grads.append(torch.autograd.grad(loss.sum(), leaf)[0])
    assert not turned.is_contiguous() and torch.equal(*grads)
