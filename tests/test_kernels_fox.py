"""Inputs of FoX's Pro attention: the kernel against the definition in float64.

`test_fox.py` holds the definition to the paper's equations. Without a CUDA device the kernel runs
in Triton's interpreter (conftest.py asks for it), in float32. An error may be twice that of the
definition in the same precision, plus 1e-5 of the largest value.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cerl.kernels.fox import EPS, fox_inputs

pytest.importorskip("triton")
from cerl.kernels import fox_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "log_f", "gate")
PARAMETERS = ("y", "bias", "q_scale", "k_scale")


class Shape(NamedTuple):
    """Networks, batch, rows, heads, their width, columns of y that are not read."""

    nets: int
    batch: int
    rows: int
    heads: int
    head: int
    rest: int


SMALL = {
    "one row": Shape(1, 1, 1, 1, 8, 0),
    "steps": Shape(3, 5, 1, 2, 16, 2),
    "blocks of rows": Shape(2, 3, 47, 2, 32, 2),
    "odd heads": Shape(2, 2, 19, 3, 24, 7),
    "wide heads": Shape(1, 2, 9, 1, 128, 13),
}
LARGE = {
    "128 rows": Shape(10, 32, 129, 4, 32, 4),
    "512 rows": Shape(10, 32, 513, 4, 32, 4),
    "wide": Shape(4, 8, 257, 2, 128, 2),
    "acting": Shape(10, 512, 1, 4, 32, 4),
    "on duty": Shape(512, 1, 1, 4, 32, 4),
    "odd": Shape(3, 7, 100, 3, 40, 7),
}


def inputs(shape: Shape, dtype: torch.dtype, *, before: bool) -> dict[str, Tensor]:
    """The same numbers in every precision; parameters and log_f are at least float32."""
    nets, batch, rows, heads, head, rest = shape
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        "y": normal(nets, batch, rows, heads * (4 * head + 3) + rest).to(dtype),
        "bias": 4.0 * normal(nets, heads).to(wide),
        "q_scale": 1.0 + 0.3 * normal(nets, heads, head).to(wide),
        "k_scale": 1.0 + 0.3 * normal(nets, heads, head).to(wide),
    }
    if before:
        for name in ("before_k", "before_v"):
            tensors[name] = normal(nets * batch, heads, head).to(dtype)
    for name in PARAMETERS:
        tensors[name].requires_grad_()
    moved = {name: part.detach().to(DEVICE) for name, part in tensors.items()}
    for name in PARAMETERS:
        moved[name].requires_grad_()
    moved["start"] = (torch.rand(nets * batch, rows, generator=generator) < 0.1).to(DEVICE)
    return moved


def run(
    shape: Shape, *, impl: Any, before: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What attention takes, and all gradients."""
    t = inputs(shape, dtype, before=before)
    outputs = [o for o in fox_inputs(**t, impl=impl) if o is not None]
    generator = torch.Generator().manual_seed(8)
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    back = torch.autograd.grad(outputs, [t[name] for name in PARAMETERS], grads)
    kept = {name: o.detach() for name, o in zip(NAMES, outputs, strict=True)}
    return kept | {f"d {name}": g for name, g in zip(PARAMETERS, back, strict=True)}


def assert_as_good(ours: dict, theirs: dict, exact: dict) -> None:
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((got[name].double() - want).abs().max() for got in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * want.abs().max(), (name, error, allowed)


QUICK = ("one row", "steps", "wide heads")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        shape if name in QUICK else pytest.param(shape, marks=pytest.mark.slow)
        for name, shape in SMALL.items()
    ],
    ids=SMALL.keys(),
)
def test_kernel_agrees_with_the_definition(shape, before):
    exact = run(shape, impl="reference", before=before, dtype=torch.float64)
    theirs = run(shape, impl="reference", before=before)
    assert_as_good(run(shape, impl="triton", before=before), theirs, exact)


def test_logarithms_of_gates_near_one_keep_their_digits():
    """A time scale of 1e5 steps: log f = -log1p(exp(-x))."""
    shape = SMALL["one row"]
    t = inputs(shape, torch.float32, before=False)
    for bias in (-30.0, -3.0, 0.0, 3.0, 3.6, 11.5, 40.0):
        leaf = {**t, "y": torch.zeros_like(t["y"]), "bias": torch.full_like(t["bias"], bias)}
        got = fox_inputs(**leaf, impl="triton").log_f.double()
        want = torch.nn.functional.logsigmoid(leaf["bias"].double())
        torch.testing.assert_close(got.flatten(), want.flatten(), rtol=1e-5, atol=0.0)


@pytest.mark.slow
def test_operator_is_one_that_torch_compiles():
    t = inputs(SMALL["odd heads"], torch.float32, before=True)
    args = tuple(t[name] for name in (*PARAMETERS, "start", "before_k", "before_v"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fox_triton.fox_inputs.registered, (*args, EPS), test_utils=tests)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(y=torch.zeros(2, 3, 5)), r"expected y \[G, B, W, P\]"),
        (dict(y=torch.zeros(2, 3, 5, 50)), "2 heads of 8 need 70 columns of y, got 50"),
        (dict(bias=torch.zeros(2, 3)), r"expected bias \[2, 2\]"),
        (dict(k_scale=torch.zeros(2, 2, 9)), r"expected k_scale \[2, 2, 8\]"),
        (dict(start=torch.zeros(6, 5)), r"expected start \[6, 5\] of torch.bool"),
        (dict(before_k=torch.zeros(6, 2, 8)), "pass both or none"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    right = dict(
        y=torch.zeros(2, 3, 5, 70),
        bias=torch.zeros(2, 2),
        q_scale=torch.zeros(2, 2, 8),
        k_scale=torch.zeros(2, 2, 8),
        start=torch.zeros(6, 5, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match=message):
        fox_inputs(**(right | wrong))


@pytest.mark.gpu
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_kernel_agrees_with_the_definition_at_real_sizes(shape, dtype, before):
    exact = run(shape, impl="reference", before=before, dtype=torch.float64)
    theirs = run(shape, impl="reference", before=before, dtype=dtype)
    assert_as_good(run(shape, impl="triton", before=before, dtype=dtype), theirs, exact)
