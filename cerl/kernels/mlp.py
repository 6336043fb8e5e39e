"""Multilayer perceptrons of a whole population, two hidden layers with ReLU: definition, dispatch.

On CUDA all layers of a block of rows are one program with the activations on chip
(`mlp_triton.py`), behind custom operators, so that torch.compile traces over it. What is computed
for the backward pass depends on what requires a gradient: detach the weights of frozen networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, autocast_dtype, runs_triton
from cerl.kernels.runtime.streams import parallel

# What a forward pass leaves for the backward pass: nothing; a byte for every hidden activation,
# which is all that the gradient of the input needs of it; the activations.
NOTHING, SIGNS, ACTIVATIONS = 0, 1, 2

WIDEST = 1024  # units of a hidden layer that fit on chip


def fits(hidden: Sequence[int]) -> bool:
    """Whether hidden layers of these sizes are those of `mlp`."""
    return len(hidden) == 2 and max(hidden) <= WIDEST


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    tail: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Output of relu(relu([x, tail] W1 + b1) W2 + b2) W3 + b3 for every network.

    Products of float32 take tf32 where `torch.backends.cuda.matmul.allow_tf32` says so; under
    autocast inputs and weights are cast to its dtype and hidden activations have it too, biases and
    sums (but for those of cuBLAS) keep theirs. Hidden sizes are best powers of two: the kernel
    rounds them up.

    Args:    x [*lead, rows, in]; weights of the three layers [*lead, in, out]; biases [*lead, out];
             tail [*lead, rows, more], further inputs of every row. An axis of `lead` may be 1 in x
             and in tail: shared by the networks along it, free of copies where all axes after it
             are 1 too. Weights may be cut along their last axis. impl as in `cerl.kernels`.
    Returns: [*lead, rows, out] in the wider of the dtypes of input and last bias.
    Raises:  ValueError where shapes or dtypes do not fit together.
    """
    lead = _check(x, weights, biases, tail)
    rows, device = x.shape[-2], x.device
    parts = [x, x[..., :0] if tail is None else tail]
    if (dtype := autocast_dtype(device)) is not None:
        parts, weights = [part.to(dtype) for part in parts], [w.to(dtype) for w in weights]
    x, tail = (_folded(part, lead) for part in parts)
    w1, w2, w3 = (weight.flatten(0, len(lead) - 1) for weight in weights)
    b1, b2, b3 = (bias.flatten(0, len(lead) - 1) for bias in biases)
    if not runs_triton(impl, device):
        y = _definition(x, tail, w1, b1, w2, b2, w3, b3)
    else:
        grad, inner = torch.is_grad_enabled(), (x, tail)
        keep = SIGNS if grad and any(part.requires_grad for part in inner) else NOTHING
        if grad and any(leaf.requires_grad for leaf in (w1, b1, w2, b2, w3, b3)):
            keep = ACTIVATIONS
        y = _mlp(x, tail, w1, b1, w2, b2, w3, b3, keep)[0]
    return y.view(*lead, rows, y.shape[-1])


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], tail: Tensor | None
) -> tuple[int, ...]:
    """The networks' axes."""
    if len(weights) != 3 or len(biases) != 3:
        raise ValueError(
            "mlp: expected weights and biases of two hidden layers and an output, got "
            f"{len(weights)} and {len(biases)}; use separate layers for other depths"
        )
    lead, fan_in = tuple(weights[0].shape[:-2]), x.shape[-1]
    inputs = {"x": x}
    if tail is not None:
        inputs["tail"], fan_in = tail, fan_in + tail.shape[-1]
    if not lead:
        raise ValueError(
            "mlp: weights need an axis of networks before [in, out], got "
            f"{list(weights[0].shape)}; unsqueeze one"
        )
    for name, part in inputs.items():
        shared = part.dim() == len(lead) + 2 and all(
            mine in (1, whole) for mine, whole in zip(part.shape, lead, strict=False)
        )
        if not shared or part.shape[-2] != x.shape[-2]:
            raise ValueError(
                f"mlp: expected {name} {[*lead, *x.shape[-2:-1], 'width']}, any of the first "
                f"{len(lead)} sizes may be 1, got {list(part.shape)}; fold further axes into rows"
            )
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        out = weight.shape[-1]
        if weight.shape != (*lead, fan_in, out) or bias.shape != (*lead, out):
            raise ValueError(
                f"mlp: expected weight {k} {[*lead, fan_in, out]} and bias {k} {[*lead, out]}, "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        fan_in = out
    dtypes = {tensor.dtype for tensor in (*inputs.values(), *weights)}
    if len(dtypes) > 1 and autocast_dtype(x.device) is None:
        raise ValueError(
            f"mlp: inputs and weights must be of one dtype, got {sorted(map(str, dtypes))}; cast "
            "them, or use autocast"
        )
    if 0 in (*lead, *x.shape[-2:], *(weight.shape[-1] for weight in weights)):
        raise ValueError(f"mlp: an axis is empty, x is {list(x.shape)} and networks {list(lead)}")
    return lead


def _folded(part: Tensor, lead: tuple[int, ...]) -> Tensor:
    """One axis of inputs, each shared by as many networks in a row.

    Args:    part [*lead or 1, rows, width].
    Returns: [X, rows, width], X a divisor of the number of networks.
    """
    keep = len(lead)
    while keep and part.shape[keep - 1] == 1:
        keep -= 1
    part = part.expand(*lead[:keep], *part.shape[keep:])
    return part.flatten(0, len(lead) - 1)


def _definition(
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
) -> Tensor:
    """The definition.

    Args:    x [X, B, D]; tail [T, B, A]; w1 [G, D + A, H1]; w2 [G, H1, H2]; w3 [G, H2, O]; biases
             [G, out]. X and T divide G: input i serves the G / X networks from i G / X on.
    Returns: [G, B, O].
    """
    nets, count = w1.shape[0], max(x.shape[0], tail.shape[0])
    if tail.shape[-1]:
        parts = (part.repeat_interleave(count // part.shape[0], 0) for part in (x, tail))
        x = torch.cat(list(parts), -1)  # [max(X, T), B, D + A]
    fan_in, hidden = w1.shape[1:]
    # The networks of one input as columns of one product, which reads the input once.
    wide = w1.reshape(count, nets // count, fan_in, hidden).transpose(1, 2).flatten(2)
    y = (x @ wide).unflatten(2, (nets // count, hidden)).transpose(1, 2).flatten(0, 1)
    # Of one input this is a view, of several a copy; sums over rows add up in another order in
    # another layout, and the bits of a network's gradient would depend on the number of inputs.
    y = y.contiguous()
    y = F.relu(y + b1.unsqueeze(1)).to(x.dtype)
    y = F.relu(y @ w2 + b2.unsqueeze(1)).to(x.dtype)
    return y @ w3 + b3.unsqueeze(1)


@torch.library.custom_op("cerl::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and, of both hidden layers, what `keep` says [G, B, H] (empty: NOTHING)."""
    from cerl.kernels import mlp_triton

    return mlp_triton.forward(x, tail, w1, b1, w2, b2, w3, b3, keep=keep)


@torch.library.custom_op("cerl::mlp_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor,
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    a1: Tensor,
    a2: Tensor,
    wants_x: bool,
    wants_tail: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of tail, empty unless wanted."""
    from cerl.kernels import mlp_triton

    _, inner = mlp_triton.hidden_gradient(
        grad,
        w1,
        w2,
        w3,
        a1,
        a2,
        x,
        tail,
        hidden=False,
        columns=_columns(x, tail, wants_x, wants_tail),
    )
    return _parts(inner, x, tail, wants_x, wants_tail)


@torch.library.custom_op("cerl::mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor,
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    a1: Tensor,
    a2: Tensor,
    wants_x: bool,
    wants_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of tail (empty unless wanted), w1, b1, w2, b2, w3, b3."""
    from cerl.kernels import mlp_triton

    def down() -> tuple[mlp_triton.Hidden, Tensor]:
        columns = _columns(x, tail, wants_x, wants_tail)
        return mlp_triton.hidden_gradient(
            grad, w1, w2, w3, a1, a2, x, tail, hidden=True, columns=columns
        )

    def last() -> tuple[Tensor, Tensor]:
        return mlp_triton.weight_gradient(grad, a2)

    # The last waves of the large kernels leave most of the GPU to those that wait.
    (hidden, inner), (third,) = parallel(x.device, down, last, patient=True)

    def middle() -> Tensor:
        return mlp_triton.multiply(a1.mT, hidden.above)

    def rest() -> tuple[Tensor, Tensor, Tensor]:
        return *mlp_triton.first_gradient(hidden, x, tail), hidden.sum2.sum(1)

    second, ((first, bias1, bias2),) = parallel(x.device, middle, rest, patient=True)
    leaves = (first, bias1, second, bias2, *third)
    return *_parts(inner, x, tail, wants_x, wants_tail), *leaves


def _columns(x: Tensor, tail: Tensor, wants_x: bool, wants_tail: bool) -> tuple[int, int]:
    """First and last + 1 of the input columns that want a gradient."""
    split, fan_in = x.shape[-1], x.shape[-1] + tail.shape[-1]
    if not (wants_x or wants_tail):
        return 0, 0
    return 0 if wants_x else split, fan_in if wants_tail else split


def _parts(
    inner: Tensor, x: Tensor, tail: Tensor, wants_x: bool, wants_tail: bool
) -> tuple[Tensor, Tensor]:
    """Splits the gradient of the wanted columns, and sums it over the networks of one input.

    Args: inner [G, B, columns], float32.
    """
    sizes = [part.shape[-1] if wanted else 0 for part, wanted in ((x, wants_x), (tail, wants_tail))]
    grads = []
    for part, cut in zip((x, tail), inner.split(sizes, -1), strict=True):
        if cut.shape[-1] == 0:
            grads.append(part.new_empty(0))
            continue
        cut = cut.unflatten(0, (part.shape[0], -1))
        whole = cut.shape[1] == 1
        cut = (cut[:, 0] if whole else cut.sum(1)).to(part.dtype)
        # Results of an operator share no memory: pieces of one tensor are copied.
        grads.append(cut.clone(memory_format=torch.contiguous_format) if whole else cut)
    return grads[0], grads[1]


@_mlp.register_fake
def _(x, tail, w1, b1, w2, b2, w3, b3, keep):
    nets, rows = w1.shape[0], x.shape[1]
    kept = [
        x.new_empty(
            (nets, rows, weight.shape[2]) if keep else 0,
            dtype=torch.uint8 if keep == SIGNS else x.dtype,
        )
        for weight in (w1, w2)
    ]
    dtype = torch.promote_types(x.dtype, b3.dtype)
    return x.new_empty(nets, rows, w3.shape[2], dtype=dtype), *kept


@_input_gradient.register_fake
def _(grad, x, tail, w1, w2, w3, a1, a2, wants_x, wants_tail):
    wanted = ((x, wants_x), (tail, wants_tail and tail.shape[-1] > 0))
    return tuple(part.new_empty(part.shape if wants else 0) for part, wants in wanted)


@_mlp_backward.register_fake
def _(grad, x, tail, w1, w2, w3, a1, a2, wants_x, wants_tail):
    wanted = ((x, wants_x), (tail, wants_tail and tail.shape[-1] > 0))
    grads = [part.new_empty(part.shape if wants else 0) for part, wants in wanted]
    for weight in (w1, w2, w3):
        bias = weight.new_empty(weight.shape[0], weight.shape[2], dtype=torch.float32)
        grads += [weight.new_empty(weight.shape), bias]
    return tuple(grads)


def _save(ctx, inputs, output) -> None:
    x, tail, w1, b1, w2, b2, w3, b3, ctx.keep = inputs
    _, a1, a2 = output
    ctx.dtypes = b1.dtype, b2.dtype, b3.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, tail, w1, w2, w3, a1, a2)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    wants_x, wants_tail = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and saved[1].numel() > 0
    if ctx.keep == ACTIVATIONS:
        grad_x, grad_tail, *leaves = _mlp_backward(grad, *saved, wants_x, wants_tail)
        for k, dtype in enumerate(ctx.dtypes):
            leaves[2 * k + 1] = leaves[2 * k + 1].to(dtype)
    else:
        grad_x, grad_tail = _input_gradient(grad, *saved, wants_x, wants_tail)
        leaves = [None] * 6
    grad_tail = grad_tail if wants_tail else None
    return grad_x if wants_x else None, grad_tail, *leaves, None


_mlp.register_autograd(_backward, setup_context=_save)
