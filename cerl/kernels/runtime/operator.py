"""One decorator that turns a function which launches kernels into an operator of torch.

A compiler, a dispatch mode or a transform of torch needs a registered operator: an opaque call with
known result shapes and a known gradient. Plain eager code needs none of that, and dispatching a
registered operator takes longer than launching a kernel. A call that none of them observes
therefore runs the function directly. Everything is built once, when the function is decorated.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar, cast, get_origin

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling

P = ParamSpec("P")
R = TypeVar("R")
_PLAIN = Tensor, torch.nn.Parameter


class Operator(Protocol[P, R]):
    """A decorated function; `host` is the function itself, `registered` the operator of torch."""

    host: Callable[..., R]
    registered: Any

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def operator(
    name: str,
    *,
    shapes: Callable[..., Any],
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
    gradient_of: str = "",
    results: int | None = None,
    mutates: Sequence[str] = (),
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Makes the operator `cerl::name` of a function, whose annotations are the operator's schema.

    The operator takes the function's positional parameters, by position alone; the first of them is
    a tensor or a list of tensors. Parameters after `*` need a default and are not part of the
    operator; benchmarks and tests pass them to `host`.

    Args:    shapes takes the same arguments and makes uninitialised tensors of the results' shapes
             and types (None for a function without results).
             save(ctx, inputs, output) keeps what gradient(ctx, *grads) needs, as in
             `torch.autograd.Function`; pass both or none. gradient returns one entry per input, and
             must itself call an operator. Without them the results cannot be differentiated.
             gradient_of: name of the operator whose gradient this one computes, for the message
             that refuses second derivatives.
             results: how many of the first results the caller gets (None: all). The others only
             serve the gradient: `save` gets them all, and the function may leave those out for
             which `shapes` makes tensors without elements.
             mutates: names of the parameters that the function writes to.
    Raises:  ValueError for one of save and gradient without the other.
    """
    if (save is None) != (gradient is None):
        raise ValueError(f"{name}: got one of save and gradient; pass both or none")
    reason = _refusal(name, gradient_of)
    keep = save or _keep_nothing
    differentiate = gradient or functools.partial(_refuse, reason)

    def decorate(function: Callable[P, R]) -> Operator[P, R]:
        host: Callable[..., Any] = function
        prototype = _positional(host)
        in_a_list = _is_list(next(iter(inspect.signature(prototype).parameters.values())))

        def whole(*inputs: Any) -> Any:
            output = host(*inputs)
            if results is None or len(output) == count:
                return output
            return (*output, *shapes(*inputs)[len(output) :])

        writes = tuple(mutates)
        registered = torch.library.custom_op(
            f"cerl::{name}",
            whole,
            mutates_args=writes,
            schema=torch.library.infer_schema(prototype, mutates_args=writes),
        )
        count = len(registered._opoverload._schema.returns)
        registered.register_fake(shapes)
        if not mutates:  # torch takes no gradient for operators that write to their inputs
            registered.register_autograd(differentiate, setup_context=keep)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = host(*inputs)
            keep(ctx, inputs, output)
            return output if results is None else output[:results]

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        apply: Callable[..., Any] = type(name, (torch.autograd.Function,), methods).apply

        def call(*inputs: Any) -> Any:
            if traced(inputs[0][0] if in_a_list else inputs[0]):
                output = registered(*inputs)
            elif differentiated(inputs):
                return apply(*inputs)
            else:
                output = host(*inputs)
            return output if results is None else output[:results]

        made = cast(Operator[P, R], functools.update_wrapper(call, host))
        made.host, made.registered = host, registered
        return made

    return decorate


def traced(x: Tensor) -> bool:
    """Whether a compiler, a mode, a transform or a tensor subclass observes calls with `x`.

    The call must then go through a registered operator. So must a call with `meta` tensors, which
    have no memory and need only the shapes of the results.
    """
    return (
        is_compiling()
        or type(x) not in _PLAIN
        or x.is_meta
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _are_functorch_transforms_active()
    )


def differentiated(inputs: tuple[Any, ...]) -> bool:
    """Whether a call may be differentiated: autograd records it, or forward mode is on."""
    return (is_grad_enabled() and _any_requires_grad(*inputs)) or forward_ad._current_level >= 0


def once(x: Tensor, of: str) -> Tensor:
    """Returns x; differentiating its gradient again raises an error, as for the kernels.

    For definitions in plain torch, which autograd could differentiate twice.

    Args: of, the name of the operator, for the error message.
    """
    return _Once.apply(x, _refusal(of, of))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reason):
        ctx.reason = reason
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Never.apply(grad, ctx.reason), None


class _Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reason):
        ctx.reason = reason
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(ctx.reason)


def _refusal(name: str, gradient_of: str) -> str:
    """The message that refuses to differentiate the results of operator `name`."""
    if not gradient_of:
        return f"{name}: this operator has no gradient; detach its inputs"
    return (
        f"{gradient_of}: its gradient cannot be differentiated again; call backward or grad "
        "without create_graph=True, or detach the gradient"
    )


def _refuse(reason: str, ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(reason)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The `save` of operators whose differentiation is refused."""


def _positional(host: Callable[..., Any]) -> Callable[..., Any]:
    """`host` without its keyword-only parameters, so that `infer_schema` leaves them out."""

    @functools.wraps(host)
    def prototype(*inputs: Any) -> Any:
        return host(*inputs)

    signature = inspect.signature(host)
    kept = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    vars(prototype)["__signature__"] = signature.replace(parameters=kept)
    return prototype


def _is_list(parameter: inspect.Parameter) -> bool:
    return get_origin(parameter.annotation) in (list, Sequence)
