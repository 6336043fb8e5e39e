"""Kernels against their definitions in float64, and the definitions against loops.

Without a CUDA device the kernels run in Triton's interpreter (conftest.py asks for it), in float32.
An error may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
"""

from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_agree
from torch import Tensor
from torch.nn import functional as F

from cerl.device.precision import precision
from cerl.kernels import optim
from cerl.kernels.conv import col2im, conv2d, patches

pytest.importorskip("triton")
# Torch says so when the first matrix product of a process is one of a backward pass.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    """Of one convolution, as the arguments of `conv2d` have it."""

    seeds: int
    inputs: int
    members: int
    rows: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: int
    stride: int


SMALL = {
    "shared input, uneven stride": Shape(2, 1, 3, 2, 12, 11, 4, 5, 4, 2),
    "own inputs": Shape(1, 3, 3, 2, 9, 10, 3, 16, 3, 1),
    "shared weights": Shape(2, 2, 1, 1, 11, 11, 5, 7, 5, 3),
    "stride as wide as the kernel, pixels left over": Shape(1, 1, 1, 3, 14, 13, 4, 16, 4, 4),
    "stride wider than the kernel": Shape(1, 1, 2, 2, 11, 9, 2, 3, 2, 3),
    "rows in shares": Shape(1, 1, 2, 8, 8, 8, 2, 3, 2, 1),
    "one cell": Shape(1, 2, 2, 1, 3, 3, 1, 1, 3, 1),
    "long runs": Shape(1, 1, 1, 1, 4, 5, 23, 18, 3, 1),
}
NATURE = {
    f"nature {k}, N={n}": Shape(1, 1 if k == 1 else n, n, 32, *rest)
    for n in (1, 10)
    for k, rest in enumerate(
        ((84, 84, 4, 32, 8, 4), (20, 20, 32, 64, 4, 2), (9, 9, 64, 64, 3, 1)), 1
    )
}
REAL = {
    **NATURE,
    "one environment": Shape(1, 1, 10, 1, 84, 84, 4, 32, 8, 4),
    "boards": Shape(10, 1, 10, 32, 10, 10, 7, 16, 3, 1),
    "second layer above a shared one": Shape(2, 1, 10, 8, 20, 20, 32, 64, 4, 2),
    "shared layer, own batches": Shape(1, 10, 1, 32, 20, 20, 32, 64, 4, 2),
}


def leaves(shape: Shape, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random x, weight and bias, the same numbers in every precision up to float32."""
    generator = torch.Generator().manual_seed(7)
    s, m, n, rows, h, w, c, f, kernel, _ = shape
    fan_in = kernel * kernel * c
    sizes = ((s, m, rows, h, w, c), (s, n, fan_in, f), (s, n, f))
    scales = (1.0, fan_in**-0.5, 0.5)
    return [
        (torch.randn(size, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()
        for size, scale in zip(sizes, scales, strict=True)
    ]


def upstream(shape: Shape) -> Tensor:
    """Random gradient of y, 0 where rounding could decide whether the ReLU passes."""
    with torch.no_grad():
        x, weight, bias = leaves(shape)
        options: dict[str, Any] = dict(kernel=shape.kernel, stride=shape.stride)
        y = conv2d(x, weight, bias, **options, relu=False, impl="reference")
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(DEVICE)
        return noise * (y.abs() > 0.05)


def run(
    shape: Shape,
    *,
    impl: Any,
    relu: bool = True,
    dtype: torch.dtype = torch.float32,
    products: str = "fp32",
) -> dict[str, Tensor]:
    """y and the gradients of everything."""
    x, weight, bias = leaves(shape, dtype=dtype)
    grad = upstream(shape)
    with precision(products, torch.device(DEVICE)):
        y = conv2d(x, weight, bias, kernel=shape.kernel, stride=shape.stride, relu=relu, impl=impl)
        grads = torch.autograd.grad(y, (x, weight, bias), grad.to(y.dtype))
    return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *grads), strict=True))


def assert_as_good(ours: dict, theirs: dict, exact: dict) -> None:
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((got[name].double() - want).abs().max() for got in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * want.abs().max(), (name, error, allowed)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_definition_is_the_convolution_of_torch(shape, relu):
    ours = run(shape, impl="reference", relu=relu, dtype=torch.float64)
    x, weight, bias = leaves(shape)
    s, m, n, c, k = shape.seeds, shape.inputs, shape.members, shape.channels, shape.kernel
    outputs = []
    for seed in range(s):
        for member in range(max(m, n)):
            mine = 0 if n == 1 else member
            kernels = weight[seed, mine].view(k, k, c, -1).permute(3, 2, 0, 1)
            image = x[seed, 0 if m == 1 else member].movedim(-1, 1)
            outputs.append(F.conv2d(image, kernels, bias[seed, mine], stride=shape.stride))
    y = torch.stack(outputs).unflatten(0, (s, max(m, n))).movedim(3, -1)
    y = y.relu() if relu else y
    grads = torch.autograd.grad(y, (x, weight, bias), upstream(shape).double())
    for name, want in zip(("y", "x", "weight", "bias"), (y, *grads), strict=True):
        assert_agree(ours[name], want)


def test_col2im_sums_every_entry_into_its_pixel():
    image = torch.randn(2, 7, 6, 3, dtype=torch.float64)
    columns = patches(image, kernel=3, stride=2)
    weight = torch.randn_like(columns)
    want = torch.zeros_like(image)
    for b in range(2):
        for y in range(3):
            for x in range(2):
                entries = weight[b, y, x].view(3, 3, 3)
                assert torch.equal(
                    columns[b, y, x].view(3, 3, 3), image[b, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
                )
                want[b, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3] += entries
    assert_agree(col2im(weight, image.shape, kernel=3, stride=2), want)


QUICK = ("shared weights", "stride wider than the kernel", "one cell", "long runs")


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        shape if name in QUICK else pytest.param(shape, marks=pytest.mark.slow)
        for name, shape in SMALL.items()
    ],
    ids=SMALL.keys(),
)
def test_kernel_agrees_with_the_definition(shape, relu):
    exact = run(shape, impl="reference", relu=relu, dtype=torch.float64)
    theirs = run(shape, impl="reference", relu=relu)
    assert_as_good(run(shape, impl="triton", relu=relu), theirs, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["tf32", "fp32", "bf16"])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
def test_kernel_agrees_with_the_definition_at_real_sizes(shape, products):
    exact = run(shape, impl="reference", dtype=torch.float64)
    theirs, ours, again = (
        run(shape, impl=impl, products=products) for impl in ("reference", "auto", "triton")
    )
    assert_as_good(ours, theirs, exact)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["shared input, uneven stride", "shared weights"])
def test_seed_with_nan_leaves_the_other_bitwise_alone(impl, name):
    shape = SMALL[name]
    options: dict[str, Any] = dict(kernel=shape.kernel, stride=shape.stride, relu=True, impl=impl)
    results = []
    for poisoned in (False, True):
        tensors, grad = leaves(shape, dtype=torch.float32), upstream(shape)
        if poisoned:
            with torch.no_grad():
                for tensor in tensors:
                    tensor[1] = torch.nan
            grad[1] = torch.nan
        y = conv2d(*tensors, **options)
        results.append((y, *torch.autograd.grad(y, tensors, grad)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[0], dirty[0])
        assert dirty[1].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_relu_passes_nan_on(impl):
    shape = SMALL["own inputs"]
    x, weight, bias = leaves(shape, dtype=torch.float32)
    with torch.no_grad():
        bias[0, 1, 2] = torch.nan
    y = conv2d(x, weight, bias, kernel=3, stride=1, relu=True, impl=impl)
    (grad,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    want = torch.zeros_like(y, dtype=torch.bool)
    want[0, 1, ..., 2] = True
    assert torch.equal(y.isnan(), want)
    assert grad[0, 1, 2] == y[0, 1, ..., 2].numel()


def test_image_may_lie_channels_first():
    shape = SMALL["own inputs"]
    x, weight, bias = leaves(shape, dtype=torch.float32)
    strided = x.detach().movedim(-1, -3).contiguous().movedim(-3, -1)
    assert not strided.is_contiguous()
    options: dict[str, Any] = dict(kernel=3, stride=1, relu=True, impl="triton")
    assert torch.equal(conv2d(strided, weight, bias, **options), conv2d(x, weight, bias, **options))


@pytest.mark.slow
def test_torch_compile_traces_over_the_kernel():
    shape = Shape(1, 1, 2, 2, 9, 9, 3, 4, 3, 2)
    x, weight, bias = leaves(shape, dtype=torch.float32)
    options: dict[str, Any] = dict(kernel=3, stride=2, relu=True, impl="triton")

    def loss(x: Tensor) -> Tensor:
        return (conv2d(x * 0.5, weight, bias, **options) + 1.0).square().sum()

    fused = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    eager, traced = (torch.autograd.grad(f(x), (x, weight, bias)) for f in (loss, fused))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_autocast_casts_the_products_and_keeps_gradients_in_float32():
    shape = SMALL["own inputs"]
    exact = run(shape, impl="reference", dtype=torch.float64)
    got = run(shape, impl="reference", products="bf16")
    assert got["y"].dtype == torch.bfloat16
    for name, want in exact.items():
        assert name == "y" or got[name].dtype == torch.float32
        assert (got[name].double() - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (1, 2, 26, 5)}, "expected weight"),
        ({"bias": (1, 2, 4)}, "and bias"),
        ({"x": (1, 3, 2, 9, 9, 3)}, "equally many members, or one of them 1, got 3 and 2"),
        ({"x": (1, 2, 2, 2, 9, 3)}, "smaller than the kernel"),
        ({"x": (2, 2, 9, 9, 3)}, "expected x"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    sizes = {"x": (1, 2, 2, 9, 9, 3), "weight": (1, 2, 27, 5), "bias": (1, 2, 5), **change}
    x, weight, bias = (torch.zeros(size) for size in sizes.values())
    with pytest.raises(ValueError, match=message):
        conv2d(x, weight, bias, kernel=3, stride=1, relu=True)


def test_impl_must_fit_the_device(monkeypatch):
    x, weight, bias = torch.zeros(1, 1, 1, 3, 3, 1), torch.zeros(1, 1, 9, 1), torch.zeros(1, 1, 1)
    options: dict[str, Any] = dict(kernel=3, stride=1, relu=True)
    with pytest.raises(ValueError, match="expected auto, reference or triton, got 'cuda'"):
        conv2d(x, weight, bias, **options, impl="cuda")  # pyright: ignore[reportArgumentType]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        conv2d(x, weight, bias, **options, impl="triton")


# Optimisers: leaf sizes around the block of 1024, more leaves than one launch takes.
SIZES = [(2, 3, 41, 17), (2, 1, 7), (2, 3, 1), (2, 512), (2, 513), *[(2, k) for k in range(1, 15)]]


def moments(sizes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Leaves, gradients, first and second moments, velocity; float64 of float32 numbers."""
    generator = torch.Generator().manual_seed(3)

    def draw() -> list[Tensor]:
        return [torch.randn(size, generator=generator).to(DEVICE).double() for size in sizes]

    w, g, m, noise, d = draw(), draw(), draw(), draw(), draw()
    # One second moment lies a hair below the square of the first, as rounding may leave it.
    v = [a.square() + n.square() for a, n in zip(m, noise, strict=True)]
    m[0][0, 0, 0] = g[0][0, 0, 0] = 0.7
    v[0][0, 0, 0] = 0.49 - 1e-9
    return [w, g, m, v, d]


def stepped(name: str, impl: Any, dtype: torch.dtype, state: list[list[Tensor]], momentum: float):
    """Every list after one step; `momentum` is the rate of Adam's targets."""
    w, g, m, v, d = ([t.to(dtype, copy=True) for t in tensors] for tensors in state)
    if name == "rmsprop":
        d = d if momentum else []
        options = dict(lr=1e-2, decay=0.95, eps=1e-5, momentum=momentum)
        optim.rmsprop(w, g, m, v, d, **options, impl=impl)
        return {"w": w, "m": m, "v": v, "d": d}
    d = d if momentum else []
    options: dict[str, Any] = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-5, rate=momentum)
    optim.adam(w, g, m, v, d, count=torch.tensor(2, device=DEVICE), **options, impl=impl)
    return {"w": w, "m": m, "v": v, "d": d}


OPTIMISERS = [("rmsprop", 0.0), ("rmsprop", 0.9), ("adam", 0.0), ("adam", 0.005)]


@pytest.mark.parametrize(("name", "momentum"), OPTIMISERS)
def test_optimiser_kernel_agrees_with_the_definition(name, momentum):
    state = moments(SIZES)
    exact = stepped(name, "reference", torch.float64, state, momentum)
    theirs = stepped(name, "reference", torch.float32, state, momentum)
    ours = stepped(name, "triton", torch.float32, state, momentum)
    for k in range(len(SIZES)):
        assert_as_good(*({key: x[key][k] for key in x if x[key]} for x in (ours, theirs, exact)))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "momentum"), OPTIMISERS)
def test_optimiser_kernel_agrees_at_real_sizes(name, momentum):
    state = moments([(1, 10, 3136, 512), (1, 10, 512), (1, 10, 512, 10, 18), (1, 10, 10, 1)])
    exact = stepped(name, "reference", torch.float64, state, momentum)
    theirs = stepped(name, "reference", torch.float32, state, momentum)
    ours, again = (stepped(name, i, torch.float32, state, momentum) for i in ("auto", "triton"))
    for k in range(4):
        assert_as_good(*({key: x[key][k] for key in x if x[key]} for x in (ours, theirs, exact)))
        assert all(torch.equal(ours[key][k], again[key][k]) for key in ours if ours[key])


@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_optimiser_kernel_keeps_seeds_apart(name):
    clean = moments(SIZES)
    dirty = [[tensor.clone() for tensor in tensors] for tensors in clean]
    for tensors in dirty:
        for tensor in tensors:
            tensor[1] = torch.nan
    one, two = (stepped(name, "triton", torch.float32, state, 0.0) for state in (clean, dirty))
    for key in ("w", "m", "v"):
        for a, b in zip(one[key], two[key], strict=True):
            assert torch.equal(a[0], b[0])
            assert b[1].isnan().all()


def test_optimiser_kernel_takes_strided_and_unaligned_gradients():
    state = moments([(2, 40, 30), (2, 1500)])
    plain = stepped("rmsprop", "triton", torch.float32, state, 0.0)
    w, g, m, v, _ = ([tensor.float() for tensor in tensors] for tensors in state)
    turned = g[0].transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.cat([g[1].new_zeros(1), g[1].flatten()])[1:].view(2, 1500)
    assert not turned.is_contiguous()
    assert shifted.data_ptr() % 16
    options = dict(lr=1e-2, decay=0.95, eps=1e-5, momentum=0.0)
    optim.rmsprop(w, [turned, shifted], m, v, [], **options, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(w, plain["w"], strict=True))


def test_optimiser_kernel_names_what_it_cannot_take():
    options: dict[str, Any] = dict(lr=0.1, decay=0.9, eps=1e-5, momentum=0.0, impl="triton")
    good, other = torch.zeros(2, 3, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"leaf 0: expected contiguous tensors of shape \[2, 3\]"):
        optim.rmsprop([good], [other], [good], [good], [], **options)
    with pytest.raises(ValueError, match="must be float32, got torch.float64"):
        optim.rmsprop([good], [good.double()], [good], [good], [], **options)
