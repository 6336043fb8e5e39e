"""Scan of gated recurrent units, every network with its own weights: definition and dispatch.

cuDNN's recurrent layers use one weight for the whole batch, and one launch a step would be
thousands of launches. On CUDA one program runs all steps of a block of rows (`gru_triton.py`). The
caller computes the products with the inputs, which do not depend on the state, as one product over
all rows. Cho et al. 2014 (arXiv:1406.1078), with the reset gate applied after the recurrent product
as in cuDNN.
"""

import torch
from torch import Tensor

from cerl.kernels import Impl, runs_triton
from cerl.kernels.pointwise import sigmoid


def gru(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    h: Tensor,
    start: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """State after every row of a sequence; it is 0 before a row where an episode begins.

    Args:    x [G, B, W, 3 D], the inputs' terms in the reset gate r, the update gate z and the
             candidate n, biases included; weight [G, D, 3 D] of the state, of the type of x; bias
             [G, D] float32, added to the state's product in n; h [G, B, D] float32, the state
             before row 0; start [P, B, W] bool, the row begins an episode: P divides G, and entry i
             belongs to the G / P networks from i G / P on; impl as in `cerl.kernels`.
    Returns: [G, B, W, D] float32.
    Raises:  ValueError where shapes or types do not fit together, or for a state that does not fit
             on chip.
    """
    _check(x, weight, bias, h, start)
    if runs_triton(impl, x.device):
        if x.dtype == torch.float64:
            raise ValueError(
                "gru: the kernel takes float32, float16 and bfloat16, got float64; cast, or pass "
                'impl="reference"'
            )
        from cerl.kernels import gru_triton

        return gru_triton.gru(x, weight, bias, h, start)
    return definition(x, weight, bias, h, start)


def cell(x: Tensor, product: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    """One step: the next state.

    Args:    x, product [..., 3 D], the terms of inputs and state in r, z and n; bias [..., D],
             added to the state's term in n; h [..., D], the state.
    Returns: [..., D] in the type of h.
    """
    x, product = x.to(h.dtype), product.to(h.dtype)
    width = h.shape[-1]
    r, z = sigmoid(x[..., : 2 * width] + product[..., : 2 * width]).chunk(2, -1)
    n = torch.tanh(x[..., 2 * width :] + r * (product[..., 2 * width :] + bias))
    return n + z * (h - n)


def definition(x: Tensor, weight: Tensor, bias: Tensor, h: Tensor, start: Tensor) -> Tensor:
    """The scan, one row after the other; arguments as in `gru`."""
    begins = start.repeat_interleave(x.shape[0] // start.shape[0], 0).unsqueeze(3)
    states = []
    for t in range(x.shape[2]):
        h = h.masked_fill(begins[:, :, t], 0.0)
        product = h.to(x.dtype) @ weight
        h = cell(x[:, :, t], product, bias.unsqueeze(1), h)
        states.append(h)
    return torch.stack(states, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor, h: Tensor, start: Tensor) -> None:
    if x.dim() != 4 or x.shape[3] % 3 or 0 in x.shape:
        raise ValueError(
            f"gru: expected x [G, B, W, 3 D] with no empty axis, got {list(x.shape)}; it holds the "
            "inputs' terms in three gates"
        )
    nets, batch, rows, width = *x.shape[:3], x.shape[3] // 3
    wide = torch.promote_types(x.dtype, torch.float32)
    expected = {
        "weight": (weight, (nets, width, 3 * width), x.dtype),
        "bias": (bias, (nets, width), wide),
        "h": (h, (nets, batch, width), wide),
        "start": (start, (start.shape[0], batch, rows), torch.bool),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"gru: expected {name} {list(shape)} of {dtype}, got {list(tensor.shape)} of "
                f"{tensor.dtype}; x is {list(x.shape)} of {x.dtype}"
            )
    if start.shape[0] < 1 or nets % start.shape[0]:
        raise ValueError(
            f"gru: expected start [P, B, W] with a P that divides the number of networks, got P = "
            f"{start.shape[0]} and {nets} networks"
        )
