"""The population's perceptron against loops over networks, and its kernels against float64.

Without a CUDA device the kernels run in Triton's interpreter (conftest.py asks for it), in float32.
An error may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
What that means for tf32 is told in tf32.py.
"""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_agree
from tf32 import RoundedProduct, worse
from torch import Tensor

from cerl.device.precision import precision
from cerl.kernels.mlp import mlp
from cerl.kernels.mlp_plan import ACTIVATIONS, NOTHING, SIGNS
from cerl.kernels.runtime.blocks import Blocks

pytest.importorskip("triton")
from cerl.kernels import mlp_triton  # noqa: E402

# Torch says so when the first matrix product of a process is one of a backward pass.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "tail", "w1", "w2", "w3", "b1", "b2", "b3")


class Shape(NamedTuple):
    """Networks, axes of x and of tail, rows, sizes of x, tail and layers."""

    lead: tuple[int, ...]
    x: tuple[int, ...]
    tail: tuple[int, ...]
    rows: int
    sizes: tuple[int, int, int, int, int]  # in, more (0: no tail), hidden, hidden, out


SMALL = {
    "shared by critics": Shape((2, 3, 2), (2, 3, 1), (), 63, (23, 0, 64, 64, 10)),
    "shared by members": Shape((2, 3, 2), (2, 1, 1), (), 33, (17, 0, 64, 32, 12)),
    "own inputs": Shape((3,), (3,), (), 1, (17, 0, 64, 64, 1)),
    "shared across, not along": Shape((2, 3), (1, 3), (), 5, (4, 0, 16, 16, 2)),
    "tail of members, observations of seeds": Shape(
        (2, 3, 2), (2, 1, 1), (2, 3, 1), 33, (17, 6, 64, 64, 10)
    ),
    "observations of members, tail of seeds": Shape(
        (2, 3, 2), (2, 3, 1), (2, 1, 1), 20, (7, 3, 16, 64, 1)
    ),
    "odd hidden sizes": Shape((2, 2), (2, 2), (2, 1), 40, (5, 2, 24, 50, 3)),
    "wide": Shape((2,), (1,), (2,), 17, (376, 17, 64, 48, 17)),
    "wide, shared": Shape((2, 3), (2, 1), (), 64, (70, 0, 32, 48, 12)),
    "wide, shared, with a tail": Shape((2, 3, 2), (2, 1, 1), (2, 3, 1), 70, (70, 6, 32, 48, 3)),
    "wide, with a wide tail": Shape((2, 3, 2), (2, 3, 1), (2, 3, 1), 64, (70, 38, 32, 48, 3)),
    "wide, shared, with a wide tail": Shape((2, 3), (2, 1), (2, 3), 64, (70, 40, 32, 48, 3)),
    "wide, shared by few": Shape((18, 2), (18, 1), (18, 1), 64, (64, 2, 16, 16, 2)),
    "full size": Shape((2,), (1,), (2,), 256, (17, 6, 256, 256, 10)),
}
if DEVICE == "cpu":  # the interpreter takes its time for every network
    for shared, x, tail in (
        ("shared by critics", (1, 3, 1), ()),
        ("shared by members", (1, 1, 1), ()),
        ("wide, shared, with a tail", (1, 1, 1), (1, 3, 1)),
        ("wide, with a wide tail", (1, 3, 1), (1, 3, 1)),
    ):
        SMALL[shared] = SMALL[shared]._replace(lead=(1, 3, 2), x=x, tail=tail)
LARGE = {
    "critics, obs 17": Shape((10, 10, 2), (10, 1, 1), (10, 1, 1), 256, (17, 6, 256, 256, 10)),
    "critics of actors, obs 17": Shape((10, 10, 2), (10, 10, 1), (), 256, (23, 0, 256, 256, 1)),
    "actors, obs 17": Shape((10, 10), (10, 1), (), 256, (17, 0, 256, 256, 12)),
    "critics, obs 376": Shape((10, 10, 2), (10, 1, 1), (10, 10, 1), 256, (376, 17, 256, 256, 10)),
    "actors, obs 376": Shape((10, 10), (10, 1), (), 256, (376, 0, 256, 256, 34)),
    "one network": Shape((1, 1, 2), (1, 1, 1), (1, 1, 1), 256, (17, 6, 256, 256, 1)),
    "acting": Shape((10, 10), (10, 1), (), 1, (17, 0, 256, 256, 12)),
}
SUBSETS = {
    "all": NAMES,
    "inputs": ("x", "tail"),
    "x": ("x",),
    "tail": ("tail",),
    "parameters": NAMES[2:],
    "one bias": ("b2",),
}


def leaves(
    shape: Shape, *, dtype: torch.dtype, wanted: Any = NAMES, calm: bool = False
) -> dict[str, Tensor]:
    """Random inputs and layers, the same numbers in every precision; `wanted` require gradients.

    `calm` keeps most hidden units away from the kink of the ReLU, on whose side rounding decides.
    """
    generator = torch.Generator().manual_seed(5)

    def normal(size: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(size, generator=generator) * scale

    width, more, *outs = shape.sizes
    tensors = {"x": normal((*shape.x, shape.rows, width), 1.0)}
    if more:
        tensors["tail"] = normal((*shape.tail, shape.rows, more), 1.0)
    fan_in = width + more
    for k, out in enumerate(outs, 1):
        tensors[f"w{k}"] = normal((*shape.lead, fan_in, out), (0.4 if calm else 1.4) / fan_in**0.5)
        bias = normal((*shape.lead, out), 0.3)
        tensors[f"b{k}"] = bias.sign() * 1.2 if calm else bias
        fan_in = out
    return {
        name: tensor.to(DEVICE, dtype).requires_grad_(name in wanted)
        for name, tensor in tensors.items()
    }


def call(t: dict[str, Tensor], **options: Any) -> Tensor:
    weights, biases = ([t[f"{kind}{k}"] for k in (1, 2, 3)] for kind in "wb")
    return mlp(t["x"], weights, biases, tail=t.get("tail"), **options)


def by_loops(t: dict[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
    """The output, and how near a row comes to a kink of its network [*lead, rows]."""
    outputs, nearest = [], []
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape.lead)).view(
        -1, len(shape.lead)
    ):
        net = tuple(index.tolist())
        rows = [
            t[name][tuple(min(i, n - 1) for i, n in zip(net, t[name].shape, strict=False))]
            for name in ("x", "tail")
            if name in t
        ]
        a, near = torch.cat(rows, -1), []
        for k in (1, 2):
            a = a @ t[f"w{k}"][net] + t[f"b{k}"][net]
            near.append(a.abs().amin(-1))
            a = a.clamp(min=0)
        outputs.append(a @ t["w3"][net] + t["b3"][net])
        nearest.append(torch.minimum(*near))
    return (
        torch.stack(outputs).view(*shape.lead, *outputs[0].shape),
        torch.stack(nearest).view(*shape.lead, -1),
    )


def upstream(shape: Shape, *, gap: float, calm: bool) -> Tensor:
    """Random gradient of the output, 0 where a hidden unit is nearer than `gap` to its kink."""
    with torch.no_grad():
        y, nearest = by_loops(leaves(shape, dtype=torch.float64, calm=calm), shape)
        far = (nearest > gap).unsqueeze(-1)
        assert far.double().mean() > 0.3
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(DEVICE)
        return noise * far


def run(
    shape: Shape,
    *,
    impl: Any,
    dtype: torch.dtype = torch.float32,
    wanted: Any = NAMES,
    products: str = "fp32",
    gap: float = 1e-4,
    calm: bool = False,
) -> dict[str, Tensor]:
    """y and the gradients of the leaves wanted."""
    t = leaves(shape, dtype=dtype, wanted=wanted, calm=calm)
    leaf = {name: t[name] for name in t if name in wanted}
    with precision(products, torch.device(DEVICE)):
        y = call(t, impl=impl)
        if not leaf:
            assert not y.requires_grad
            return {"y": y}
        grad = upstream(shape, gap=gap, calm=calm).to(y.dtype)
        grads = torch.autograd.grad(y, list(leaf.values()), grad)
    return {"y": y.detach(), **dict(zip(leaf, grads, strict=True))}


def run_rounded(shape: Shape, *, gap: float, calm: bool) -> dict[str, Tensor]:
    """y and all gradients of the definition with every product's operands rounded to tf32."""
    t = leaves(shape, dtype=torch.float32, calm=calm)
    a = torch.cat([t[k].expand(*shape.lead, -1, -1) for k in ("x", "tail") if k in t], -1)
    with precision("fp32", torch.device(DEVICE)):
        for k in (1, 2, 3):
            product: Any = RoundedProduct.apply(a, t[f"w{k}"])
            a = product + t[f"b{k}"].unsqueeze(-2)
            a = a.relu() if k < 3 else a
        grads = torch.autograd.grad(a, list(t.values()), upstream(shape, gap=gap, calm=calm))
    return {"y": a.detach(), **dict(zip(t, grads, strict=True))}


def assert_as_good(ours: dict, theirs: dict, exact: dict) -> None:
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((got[name].double() - want).abs().max() for got in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * want.abs().max(), (name, error, allowed)


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_definition_is_a_loop_over_networks(shape):
    ours = run(shape, impl="reference", dtype=torch.float64)
    t = leaves(shape, dtype=torch.float64)
    y, _ = by_loops(t, shape)
    grads = torch.autograd.grad(y, list(t.values()), upstream(shape, gap=1e-4, calm=False).double())
    for name, want in zip(("y", *t), (y, *grads), strict=True):
        assert_agree(ours[name], want)


QUICK = (
    "own inputs",
    "shared across, not along",
    "odd hidden sizes",
    "wide",
    "observations of members, tail of seeds",
)


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


@functools.cache
def every_gradient(shape: Shape) -> dict[str, Tensor]:
    return run(shape, impl="triton")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", SUBSETS.values(), ids=SUBSETS.keys())
def test_any_subset_of_gradients_is_the_same(wanted):
    shape = SMALL["tail of members, observations of seeds"]
    every, some = every_gradient(shape), run(shape, impl="triton", wanted=wanted)
    assert some.keys() == {"y", *wanted}
    for name in some:
        assert_agree(some[name], every[name])


def test_forward_keeps_what_the_gradients_wanted_need():
    shape, outputs = SMALL["shared by members"], []
    for wanted, size in (((), 0), (("x",), 1), (("b2",), 4)):
        t = leaves(shape, dtype=torch.float32, wanted=wanted)
        y = call(t, impl="triton")
        outputs.append(y.detach())
        if wanted:
            assert y.grad_fn is not None
            operator: Any = y.grad_fn.next_functions[0][0]  # y is a view of its output
            kept = [a.nbytes for a in operator.saved_tensors[-2:]]
            assert kept == [y[..., 0].numel() * units * size for units in (64, 32)]
        else:
            assert y.grad_fn is None
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_first_heads_of_a_wider_layer_need_no_copy(impl):
    shape = SMALL["shared by critics"]
    t, cut = (leaves(shape, dtype=torch.float32) for _ in range(2))
    whole = call(t, impl=impl)[..., :1]
    head = {name: cut[name][..., :1] if name in ("w3", "b3") else cut[name] for name in cut}
    assert not head["w3"].is_contiguous()
    first = call(head, impl=impl)
    assert_agree(first, whole)
    grad = upstream(shape, gap=1e-4, calm=False)[..., :1]
    pairs = (
        torch.autograd.grad(y, list(ts.values()), grad) for y, ts in ((first, cut), (whole, t))
    )
    for ours, theirs in zip(*pairs, strict=True):
        assert_agree(ours, theirs)


def test_kernel_takes_strided_inputs():
    shape = SMALL["own inputs"]._replace(rows=5)
    t = leaves(shape, dtype=torch.float32)
    turned = dict(t)
    for name in ("x", "w1", "w2", "w3"):
        turned[name] = t[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    y, again = call(t, impl="triton"), call(turned, impl="triton")
    assert torch.equal(y, again)
    grad = torch.randn(1, *y.shape[1:], device=DEVICE).expand_as(y)
    ours, theirs = (torch.autograd.grad(out, list(t.values()), grad) for out in (again, y))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sizes", [(23, 0, 64, 32, 10), (50, 0, 32, 64, 1)], ids=["narrow", "wide"])
def test_any_launch_gives_the_same(sizes):
    """Other tiles add in another order, no more."""
    nets = 3 if DEVICE == "cuda" else 1
    t = leaves(Shape((nets,), (nets,), (), 33, sizes), dtype=torch.float32, wanted=())
    x, tail = t["x"], t["x"][..., :0]
    layers = [t[f"{kind}{k}"] for k in (1, 2, 3) for kind in "wb"]
    y, a1, a2 = mlp_triton.mlp.host(x, tail, *layers, ACTIVATIONS)
    grad, (w1, _, w2, _, w3, _) = torch.ones_like(y), layers
    columns = (nets, x.shape[-1])

    def backward(blocks: Blocks | None) -> tuple[Tensor, ...]:
        hidden, inner = mlp_triton.hidden_gradient(
            grad, w1, w2, w3, a1, a2, x, tail, hidden=True, columns=columns, blocks=blocks
        )
        sums = hidden.sum1.sum(1), hidden.sum2.sum(1), hidden.first.sum(0)
        return *hidden[:2], *sums, inner, *mlp_triton.weight_gradient(grad, a2, blocks=blocks)

    expected = (y, a1, a2, *backward(None))
    tiles = (Blocks(16, 16, 16, 4, 2), Blocks(32, 64, 32, 2, 1), Blocks(16, 16, 32, 4, 2, 16))
    for tile in tiles:
        forward = mlp_triton.mlp.host(x, tail, *layers, ACTIVATIONS, blocks=tile)
        other = (*forward, *backward(tile))
        for ours, theirs in zip(other, expected, strict=True):
            assert_agree(ours, theirs)


@pytest.mark.slow
def test_half_precision_accumulates_in_float32():
    shape = SMALL["shared by critics"]
    exact = run(shape, impl="reference", dtype=torch.float64, gap=0.02, calm=True)
    results = []
    for impl in ("reference", "triton"):
        t = leaves(shape, dtype=torch.float32, calm=True)
        half = {name: leaf.half() if name[0] != "b" else leaf for name, leaf in t.items()}
        y = call(half, impl=impl)
        grads = torch.autograd.grad(y, list(t.values()), upstream(shape, gap=0.02, calm=True))
        results.append({"y": y.detach(), **dict(zip(t, grads, strict=True))})
    theirs, ours = results
    assert ours["y"].dtype == torch.float32
    assert_as_good(ours, theirs, exact)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_seed_with_nan_leaves_the_other_bitwise_alone(impl):
    shape, results = SMALL["tail of members, observations of seeds"], []
    for poisoned in (False, True):
        t = leaves(shape, dtype=torch.float32)
        grad = upstream(shape, gap=1e-4, calm=False)
        if poisoned:
            with torch.no_grad():
                for tensor in t.values():
                    tensor[1] = torch.nan
            grad[1] = torch.nan
        y = call(t, impl=impl)
        results.append((y, *torch.autograd.grad(y, list(t.values()), grad)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[0], dirty[0])
        assert dirty[1].isnan().any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_relu_passes_nan_on(impl):
    t = leaves(SMALL["own inputs"], dtype=torch.float32)
    with torch.no_grad():
        t["b1"][1, 3] = torch.nan
    y = call(t, impl=impl)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [NAMES, ("tail",), ()], ids=["all", "tail", "none"])
def test_operators_trace_and_differentiate(wanted):
    shape = SMALL["observations of members, tail of seeds"]
    t = leaves(shape, dtype=torch.float32, wanted=wanted)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    y = torch.compile(call, backend=compiler, fullgraph=True)(t, impl="triton")
    want = call(t, impl="triton")
    assert torch.equal(y, want)
    assert len(graphs) == 1
    if wanted:
        leaf = [t[name] for name in wanted]
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(out, leaf, grad) for out in (y, want))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_operators_tell_the_truth_about_themselves():
    shape = SMALL["observations of members, tail of seeds"]
    lead, checks = 12, ("test_schema", "test_faketensor", "test_autograd_registration")
    for wanted, keep in ((NAMES, ACTIVATIONS), (("tail",), SIGNS), ((), NOTHING)):
        t = leaves(shape, dtype=torch.float32, wanted=wanted)
        x = t["x"].expand(2, 3, 2, -1, -1).reshape(lead, *t["x"].shape[-2:])
        tail = t["tail"].expand(2, 3, 2, -1, -1).reshape(lead, *t["tail"].shape[-2:])
        layers = [t[f"{kind}{k}"].flatten(0, 2) for k in (1, 2, 3) for kind in "wb"]
        args = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in (x, tail, *layers)]
        torch.library.opcheck(mlp_triton.mlp.registered, (*args, keep), test_utils=checks)


def test_bad_arguments_name_what_was_expected():
    t = leaves(SMALL["own inputs"], dtype=torch.float32)
    weights, biases = ([t[f"{kind}{k}"] for k in (1, 2, 3)] for kind in "wb")
    with pytest.raises(ValueError, match="two hidden layers and an output, got 2 and 3"):
        mlp(t["x"], weights[:2], biases)
    with pytest.raises(ValueError, match=r"expected x \[3, 1, 'width'\].* got \[2, 1, 17\]"):
        mlp(t["x"][:2], weights, biases)
    with pytest.raises(ValueError, match=r"expected weight 1 \[3, 18, 64\]"):
        mlp(t["x"], weights, biases, tail=t["x"][..., :1])
    with pytest.raises(ValueError, match=r"bias 2 \[3, 64\], got .* \[3, 63\]"):
        mlp(t["x"], weights, [biases[0], biases[1][:, 1:], biases[2]])
    with pytest.raises(ValueError, match="must be of one dtype"):
        mlp(t["x"].double(), weights, biases)
    with pytest.raises(ValueError, match="an axis is empty"):
        mlp(t["x"][:, :0], weights, biases)
    with pytest.raises(ValueError, match="need an axis of networks"):
        mlp(t["x"][0], [w[0] for w in weights], [b[0] for b in biases])
    wide = [torch.zeros(1, *size) for size in ((2, 2048), (2048, 16), (16, 1))]
    flat = [torch.zeros(1, size) for size in (2048, 16, 1)]
    with pytest.raises(ValueError, match="of 2048 and 16 units do not fit on chip, at most 1024"):
        mlp(torch.zeros(1, 4, 2).to(DEVICE), [w.to(DEVICE) for w in wide], flat, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["tf32", "fp32", "bf16"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_kernel_agrees_with_the_definition_at_real_sizes(shape, products):
    options: dict[str, Any] = dict(gap=1e-3 if products == "fp32" else 0.02, calm=True)
    exact = run(shape, impl="reference", dtype=torch.float64, **options)
    ours, again = (
        run(shape, impl=impl, products=products, **options) for impl in ("auto", "triton")
    )
    theirs = run(shape, impl="reference", products=products, **options)
    if products == "tf32":
        theirs = worse(theirs, run_rounded(shape, **options), exact)
    assert_as_good(ours, theirs, exact)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["critics, obs 17", "critics, obs 376"])
@pytest.mark.parametrize("wanted", [*SUBSETS.values(), ()], ids=[*SUBSETS, "none"])
def test_replayed_graph_is_bitwise_the_eager_call(wanted, shape):
    shape = LARGE[shape]
    t = leaves(shape, dtype=torch.float32, wanted=())

    def step() -> list[Tensor]:
        # Leaves of its own: autograd keeps a leaf's first stream, and the calls are on three.
        own = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in t.items()}
        leaf, y = [own[name] for name in own if name in wanted], call(own)
        return [y, *(torch.autograd.grad(y, leaf, torch.ones_like(y)) if leaf else ())]

    with precision("tf32", torch.device(DEVICE)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        t["x"].mul_(-0.5)
        graph.replay()
        eager = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
