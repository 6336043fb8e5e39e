"""The operator decorator: eager calls and calls by torch.library, gradients, errors."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cerl.kernels.runtime.operator import once, operator

CALLS: list[str] = []


def shapes(x, y, power):
    return x.new_empty(x.shape), x.new_empty(0)


@operator(
    "test_scaled_backward",
    shapes=lambda grad, x, y: (x.new_empty(x.shape), x.new_empty(x.shape)),
    gradient_of="test_scaled",
)
def scaled_backward(grad: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    CALLS.append("backward")
    return grad * (1.0 if y is None else y), grad * x


def save(ctx, inputs, output):
    x, y, _ = inputs
    ctx.saw = len(output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y)


def gradient(ctx, grad, *_):
    dx, dy = scaled_backward(grad, *ctx.saved_tensors)
    return dx, dy if ctx.needs_input_grad[1] else None, None


@operator("test_scaled", shapes=shapes, save=save, gradient=gradient, results=1)
def scaled(x: Tensor, y: Tensor | None, power: int, *, loud: bool = False) -> tuple[Tensor, Tensor]:
    """x y; the second result, which is empty, is left out."""
    CALLS.append("loud" if loud else "forward")
    return (x.clone() if y is None else x * y,)  # pyright: ignore[reportReturnType]


@operator("test_moved", shapes=lambda leaves, steps, rate: None, mutates=("leaves",))
def moved(leaves: Sequence[Tensor], steps: Sequence[Tensor], rate: float) -> None:
    for leaf, step in zip(leaves, steps, strict=True):
        leaf.add_(step, alpha=rate)


class Watch(TorchDispatchMode):
    """Writes down the operators of this file that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cerl":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, generator=generator).requires_grad_() for _ in range(2))


def test_call_that_nobody_observes_goes_past_the_dispatcher(monkeypatch):
    x, y = inputs()
    # The registered operator would call this function.
    monkeypatch.setattr(scaled.registered, "_opoverload", None)
    CALLS.clear()
    z = scaled(x, y, 1)[0]
    dx, dy = torch.autograd.grad(z.sum(), (x, y))
    assert torch.equal(dx, y) and torch.equal(dy, x)
    with torch.no_grad():
        assert torch.equal(scaled(x, None, 1)[0], x)
    assert scaled(x.detach(), None, 1)[0].grad_fn is None
    assert CALLS == ["forward", "backward", "forward", "forward"]


def test_observed_call_is_that_of_the_registered_operator():
    x, y = inputs()
    with Watch() as watch:
        z = scaled(x, y, 1)[0]
        dx, dy = torch.autograd.grad(z.sum(), (x, y))
    assert watch.seen == ["cerl::test_scaled", "cerl::test_scaled_backward"]
    assert torch.equal(dx, y) and torch.equal(dy, x)


def test_tensors_without_memory_get_the_shapes_of_the_results():
    CALLS.clear()
    x = torch.empty(3, 2, device="meta")
    z = scaled(x, None, 1)[0]
    assert z.shape == x.shape and z.is_meta and not CALLS


def test_compiled_gradient_is_that_of_eager_code():
    x, y = inputs()

    def loss(x, y):
        return (scaled(x, y, 1)[0] ** 2).sum()

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(loss(x, y), (x, y)),
        torch.autograd.grad(fused(x, y), (x, y)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("observed", [False, True])
def test_gradient_cannot_be_differentiated_again(observed):
    x, y = inputs()
    call = scaled.registered if observed else scaled
    (dx,) = torch.autograd.grad(call(x, y, 1)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^test_scaled: its gradient cannot be differentiated"):
        dx.sum().backward()


def test_definition_can_refuse_as_its_operator_does():
    (x, _) = inputs()
    (dx,) = torch.autograd.grad(once(x, "test_scaled").square().sum(), x, create_graph=True)
    assert torch.equal(dx, 2 * x)
    with pytest.raises(RuntimeError, match="^test_scaled: its gradient cannot be differentiated"):
        dx.sum().backward()


def test_operator_without_a_gradient_says_so():
    @operator("test_sign", shapes=lambda x: x.new_empty(x.shape))
    def sign(x: Tensor) -> Tensor:
        return x.sign()

    with pytest.raises(RuntimeError, match="test_sign: this operator has no gradient"):
        sign(inputs()[0]).sum().backward()


@pytest.mark.parametrize("observed", [False, True])
def test_lists_that_an_operator_writes_to(observed):
    leaves, steps = ([torch.full((2,), float(k)) for k in range(3)] for _ in range(2))
    (moved.registered if observed else moved)(leaves, steps, 0.5)
    assert [leaf.tolist() for leaf in leaves] == [[1.5 * k] * 2 for k in range(3)]


def test_registered_forms_are_ones_that_torch_compiles():
    x, y = inputs()
    torch.library.opcheck(scaled.registered, (x, y, 1))
    torch.library.opcheck(scaled_backward.registered, (x.detach(), x.detach(), None))
    torch.library.opcheck(moved.registered, ([x.detach()], [y.detach()], 0.5))


def test_schema_is_that_of_the_positional_parameters():
    schema = str(scaled.registered._opoverload._schema)
    assert schema == "cerl::test_scaled(Tensor x, Tensor? y, SymInt power) -> (Tensor, Tensor)"
    CALLS.clear()
    scaled.host(*inputs(), 1, loud=True)
    assert CALLS == ["loud"]


def test_gradient_needs_what_it_saves():
    with pytest.raises(ValueError, match="one of save and gradient"):
        operator("test_half", shapes=shapes, save=save)
