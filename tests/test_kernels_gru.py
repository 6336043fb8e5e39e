"""The recurrent scan against a loop over rows and torch's cell, and its kernel against float64.

Without a CUDA device the kernel runs in Triton's interpreter (conftest.py asks for it), in float32.
An error may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
What that means for tf32 is told in tf32.py.
"""

from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_agree
from tf32 import RoundedProduct, worse
from torch import Tensor

from cerl.device.precision import precision
from cerl.kernels.gru import cell, gru

pytest.importorskip("triton")
from cerl.kernels import gru_triton  # noqa: E402
from cerl.kernels.runtime.blocks import Blocks, block_size  # noqa: E402

# Torch says so when the first matrix product of a process is one of a backward pass.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight", "bias", "h")


class Shape(NamedTuple):
    """Networks, entries of start, batch, rows, units."""

    nets: int
    starts: int
    batch: int
    rows: int
    width: int


SMALL = {
    "one row": Shape(1, 1, 1, 1, 16),
    "starts of all networks": Shape(4, 2, 5, 9, 16),
    "starts of each": Shape(3, 3, 17, 7, 32),
    "odd width": Shape(2, 1, 3, 12, 24),
    "wide": Shape(2, 1, 3, 5, 136),
}
LARGE = {
    "128, 128 rows": Shape(10, 1, 32, 128, 128),
    "128, 512 rows": Shape(10, 1, 32, 512, 128),
    "64, 512 rows": Shape(30, 3, 32, 512, 64),
    "256, 128 rows": Shape(10, 1, 32, 128, 256),
    "acting": Shape(10, 1, 512, 1, 128),
    "refill": Shape(64, 64, 1, 63, 128),
    "odd": Shape(3, 3, 33, 100, 72),
}


def leaves(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same random numbers in every precision; bias and h are never of less than float32."""
    nets, _, batch, rows, width = shape
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        "x": normal(nets, batch, rows, 3 * width).to(torch.bfloat16).to(dtype),
        "weight": (1.5 * normal(nets, width, 3 * width) / width**0.5).to(torch.bfloat16).to(dtype),
        "bias": normal(nets, width).float().to(wide),
        "h": normal(nets, batch, width).float().to(wide),
    }
    return {name: leaf.to(DEVICE).requires_grad_() for name, leaf in tensors.items()}


def starts(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    drawn = torch.rand(shape.starts, shape.batch, shape.rows, generator=generator)
    return (drawn < 0.15).to(DEVICE)


def run(
    shape: Shape, *, impl: Any, dtype: torch.dtype = torch.float32, products: str = "fp32"
) -> dict[str, Tensor]:
    """The states and all gradients."""
    t = leaves(shape, dtype)
    with precision(products, torch.device(DEVICE)):
        return differentiated(gru(**t, start=starts(shape), impl=impl), t)


def run_rounded(shape: Shape) -> dict[str, Tensor]:
    """The same of the definition with every product's operands rounded to tf32."""
    t = leaves(shape, torch.float32)
    begins = starts(shape).repeat_interleave(shape.nets // shape.starts, 0).unsqueeze(3)
    h, states = t["h"], []
    with precision("fp32", torch.device(DEVICE)):
        for row in range(shape.rows):
            h = h.masked_fill(begins[:, :, row], 0.0)
            product: Any = RoundedProduct.apply(h, t["weight"])
            h = cell(t["x"][:, :, row], product, t["bias"].unsqueeze(1), h)
            states.append(h)
        return differentiated(torch.stack(states, 2), t)


def differentiated(y: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    grad = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    grads = torch.autograd.grad(y, list(t.values()), grad)
    return {"y": y.detach(), **dict(zip(t, grads, strict=True))}


def assert_as_good(ours: dict, theirs: dict, exact: dict) -> None:
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((got[name].double() - want).abs().max() for got in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * want.abs().max(), (name, error, allowed)


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_definition_is_torchs_cell_row_by_row(shape):
    t = leaves(shape, torch.float64)
    start = starts(shape)
    y = gru(**t, start=start, impl="reference")
    width = shape.width
    for net in range(shape.nets):
        cell = torch.nn.GRUCell(3 * width, width, device=DEVICE, dtype=torch.float64)
        with torch.no_grad():  # whose inputs are the shares themselves
            cell.weight_ih.copy_(torch.eye(3 * width))
            cell.bias_ih.zero_()
            cell.weight_hh.copy_(t["weight"][net].T)
            cell.bias_hh.zero_()[2 * width :] = t["bias"][net]
        h = t["h"][net]
        for row in range(shape.rows):
            begins = start[net * shape.starts // shape.nets, :, row, None]
            h = cell(t["x"][net, :, row], torch.where(begins, 0.0, h))
            assert_agree(y[net, :, row], h)


QUICK = ("one row", "starts of all networks")


@pytest.mark.parametrize(
    "shape",
    [
        shape if name in QUICK else pytest.param(shape, marks=pytest.mark.slow)
        for name, shape in SMALL.items()
    ],
    ids=SMALL.keys(),
)
def test_kernel_agrees_with_the_definition(shape):
    exact = run(shape, impl="reference", dtype=torch.float64)
    theirs = run(shape, impl="reference")
    assert_as_good(run(shape, impl="triton"), theirs, exact)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [16, 32])
def test_weights_held_or_read_in_tiles_give_the_same(depth):
    """With 32 units a depth of 32 holds the weights on chip, one of 16 reads them every step."""
    for name in ("starts of each", "odd width"):
        shape = SMALL[name]
        t = {name: leaf.detach() for name, leaf in leaves(shape, torch.float32).items()}
        block, start = Blocks(16, block_size(shape.width), depth, 4, 1), starts(shape)
        ours = gru_triton.gru.host(**t, start=start, blocks=block)
        theirs = gru(**t, start=start, impl="reference")
        assert_agree(ours, theirs)
        grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(8)).to(DEVICE)
        mine = gru_triton.gru_backward.host(grad, **t, start=start, y=theirs, blocks=block)
        leaf = leaves(shape, torch.float32)
        y = gru(**leaf, start=start, impl="reference")
        for got, want in zip(mine, torch.autograd.grad(y, list(leaf.values()), grad), strict=True):
            assert_agree(got, want)


@pytest.mark.slow
def test_operator_is_one_that_torch_compiles():
    shape = SMALL["starts of all networks"]
    args = [leaf.detach().requires_grad_() for leaf in leaves(shape, torch.float32).values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gru_triton.gru.registered, (*args, starts(shape)), test_utils=tests)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(x=torch.zeros(2, 3, 4, 10)), r"expected x \[G, B, W, 3 D\]"),
        (dict(weight=torch.zeros(2, 4, 8)), r"expected weight \[2, 4, 12\]"),
        (dict(bias=torch.zeros(2, 4, dtype=torch.float64)), "expected bias"),
        (dict(h=torch.zeros(2, 4)), r"expected h \[2, 3, 4\]"),
        (dict(start=torch.zeros(2, 3, 4)), "expected start"),
        (dict(start=torch.zeros(4, 3, 4, dtype=torch.bool)), "got P = 4 and 2 networks"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    right = dict(
        x=torch.zeros(2, 3, 4, 12),
        weight=torch.zeros(2, 4, 12),
        bias=torch.zeros(2, 4),
        h=torch.zeros(2, 3, 4),
        start=torch.zeros(1, 3, 4, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match=message):
        gru(**(right | wrong))


def test_state_that_does_not_fit_on_chip_is_refused():
    t = {
        name: leaf.detach() for name, leaf in leaves(Shape(1, 1, 1, 1, 272), torch.float32).items()
    }
    start = torch.zeros(1, 1, 1, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="272 units does not fit"):
        gru(**t, start=start, impl="triton")
    double = {name: leaf.double() for name, leaf in t.items()}
    with pytest.raises(ValueError, match="got float64"):
        gru(**double, start=start, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["fp32", "tf32"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_kernel_agrees_with_the_definition_at_real_sizes(shape, products):
    exact = run(shape, impl="reference", dtype=torch.float64)
    theirs = run(shape, impl="reference", products=products)
    if products == "tf32":
        theirs = worse(theirs, run_rounded(shape), exact)
    assert_as_good(run(shape, impl="triton", products=products), theirs, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_kernel_in_bf16_agrees_with_the_definition(shape):
    exact = run(shape, impl="reference", dtype=torch.float64)
    theirs = run(shape, impl="reference", dtype=torch.bfloat16)
    assert_as_good(run(shape, impl="triton", dtype=torch.bfloat16), theirs, exact)


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_every_time():
    shape = LARGE["128, 128 rows"]
    one, two = (run(shape, impl="triton", dtype=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
