"""Perceptrons with two hidden layers for a whole population: definition and dispatch.

On CUDA one program computes all layers for a block of rows, with the activations on chip
(`mlp_triton.py`). What it stores for the backward pass depends on which tensors require a gradient:
detach the weights of networks that are not trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, autocast_dtype, on_gpu, runs_triton
from cerl.kernels.mlp_plan import ACTIVATIONS, NOTHING, SIGNS, WIDEST


def fits(hidden: Sequence[int]) -> bool:
    """Whether `mlp` takes hidden layers of these sizes."""
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

    Products of float32 are in tf32 where `torch.backends.cuda.matmul.allow_tf32` says so. Under
    autocast inputs, weights and hidden activations have autocast's dtype; biases and sums keep
    theirs, except sums inside cuBLAS. The kernel rounds hidden sizes up to powers of two.

    Args:    x [*lead, rows, in]; weights of the three layers [*lead, in, out]; biases [*lead, out];
             tail [*lead, rows, more], further inputs of every row. In x and tail an axis of `lead`
             may have size 1: the networks along it then share the input, which is not copied if all
             later axes of `lead` have size 1 too. Weights may be slices along their last axis. impl
             as in `cerl.kernels`.
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
        y = definition(x, tail, w1, b1, w2, b2, w3, b3)
    else:
        grad, inner = torch.is_grad_enabled(), (x, tail)
        keep = SIGNS if grad and any(part.requires_grad for part in inner) else NOTHING
        if grad and any(leaf.requires_grad for leaf in (w1, b1, w2, b2, w3, b3)):
            keep = ACTIVATIONS
        from cerl.kernels import mlp_triton

        y = mlp_triton.mlp(x, tail, w1, b1, w2, b2, w3, b3, keep)[0]
    return y.view(*lead, rows, y.shape[-1])


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], tail: Tensor | None
) -> tuple[int, ...]:
    """Checks shapes and types; returns the axes of the networks, `lead`."""
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
    """Folds `lead` into one axis of X inputs, each of which equally many networks share.

    Args:    part [*lead or 1, rows, width].
    Returns: [X, rows, width]; X divides the number of networks, and those that share an input are
             consecutive.
    """
    keep = len(lead)
    while keep and part.shape[keep - 1] == 1:
        keep -= 1
    part = part.expand(*lead[:keep], *part.shape[keep:])
    return part.flatten(0, len(lead) - 1)


def definition(
    x: Tensor,
    tail: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
) -> Tensor:
    """The perceptrons in plain torch, for G networks on one axis.

    Args:    x [X, B, D]; tail [T, B, A]; w1 [G, D + A, H1]; w2 [G, H1, H2]; w3 [G, H2, O]; biases
             [G, out]. X and T divide G: x[i] belongs to the G / X networks from i G / X on.
    Returns: [G, B, O].
    """
    nets, count = w1.shape[0], max(x.shape[0], tail.shape[0])
    if tail.shape[-1]:
        parts = (part.repeat_interleave(count // part.shape[0], 0) for part in (x, tail))
        x = torch.cat(list(parts), -1)  # [max(X, T), B, D + A]
    fan_in, hidden = w1.shape[1:]
    # Networks that share an input are columns of one product, which reads the input once.
    wide = w1.reshape(count, nets // count, fan_in, hidden).transpose(1, 2).flatten(2)
    y = (x @ wide).unflatten(2, (nets // count, hidden)).transpose(1, 2).flatten(0, 1)
    # With one input y is a view, with several a copy of another layout. Without a common layout
    # sums over rows would add up in another order, and so the bits of a network's gradient would
    # depend on the number of inputs.
    y = y.contiguous()
    y = F.relu(y + b1.unsqueeze(1)).to(x.dtype)
    y = F.relu(y @ w2 + b2.unsqueeze(1)).to(x.dtype)
    return _last(y, w3) + b3.unsqueeze(1)


def _last(y: Tensor, weight: Tensor) -> Tensor:
    """The products of the last layers. Args: y [G, B, H]; weight [G, H, O]."""
    if weight.shape[-1] > 1 or on_gpu(y) or y.is_meta:
        return y @ weight
    # On a CPU a batched product with a single column takes ten times as long as single ones.
    return torch.stack([rows @ column for rows, column in zip(y, weight, strict=True)])
