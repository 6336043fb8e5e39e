"""Optimiser steps in Triton: a launch takes many leaves, and reads and writes each element once.

A program updates one block of one leaf. It finds its leaf by comparing its id with the number of
every leaf's first block. Updates are elementwise, so the order of programs does not matter.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.runtime.operator import operator

BLOCK = 1024  # elements of a program; 8 for each thread, two 16-byte accesses of every tensor
GROUP = 16  # most leaves of a launch


@triton.jit
def _pointer(p_leaves, starts, i_block, ALIGNED: tl.constexpr):
    """Pointer to the leaf that block `i_block` belongs to."""
    p = p_leaves[0]
    for k in tl.static_range(1, len(p_leaves)):
        p = tl.where(i_block >= starts[k], p_leaves[k], p)
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def _locate(starts, sizes, i_block, BLOCK: tl.constexpr):
    """Offset of a block inside its leaf, and how many elements the leaf has from there on."""
    start = starts[0]
    size = sizes[0]
    for k in tl.static_range(1, len(starts)):
        here = i_block >= starts[k]
        start = tl.where(here, starts[k], start)
        size = tl.where(here, sizes[k], size)
    offset = (i_block - start).to(tl.int64) * BLOCK
    return offset, size - offset


@triton.jit
def _rmsprop_block(
    p_w, p_g, p_m, p_v, p_d, o, m, lr, decay, rest, eps, momentum, MOMENTUM: tl.constexpr
):
    b_g = tl.load(p_g + o, m)
    b_m = tl.load(p_m + o, m)
    b_v = tl.load(p_v + o, m)
    b_w = tl.load(p_w + o, m)
    b_m += rest * (b_g - b_m)
    b_v = decay * b_v + rest * b_g * b_g
    # Rounding may leave v a hair below m^2; a NaN must come through.
    b_root = tl.maximum(b_v - b_m * b_m, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps
    b_u = lr * tl.math.div_rn(b_g, tl.math.sqrt_rn(b_root))
    tl.store(p_m + o, b_m, m)
    tl.store(p_v + o, b_v, m)
    if MOMENTUM:
        b_u += momentum * tl.load(p_d + o, m)
        tl.store(p_d + o, b_u, m)
    tl.store(p_w + o, b_w - b_u, m)


@triton.jit
def _rmsprop(
    p_leaves,
    p_grads,
    p_first,
    p_second,
    p_velocity,
    starts,
    sizes,
    lr,
    decay,
    rest,
    eps,
    momentum,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    offset, left = _locate(starts, sizes, i_block, BLOCK)
    p_w = _pointer(p_leaves, starts, i_block, ALIGNED) + offset
    p_g = _pointer(p_grads, starts, i_block, ALIGNED) + offset
    p_m = _pointer(p_first, starts, i_block, ALIGNED) + offset
    p_v = _pointer(p_second, starts, i_block, ALIGNED) + offset
    p_d = _pointer(p_velocity, starts, i_block, ALIGNED) + offset
    o = tl.arange(0, BLOCK)
    # A mask that depends on the size would forbid 16-byte accesses.
    if left >= BLOCK:
        _rmsprop_block(p_w, p_g, p_m, p_v, p_d, o, None, lr, decay, rest, eps, momentum, MOMENTUM)
    else:
        _rmsprop_block(
            p_w, p_g, p_m, p_v, p_d, o, o < left, lr, decay, rest, eps, momentum, MOMENTUM
        )


@triton.jit
def _adam_block(
    p_w,
    p_g,
    p_m,
    p_v,
    p_t,
    o,
    m,
    scale,
    correction,
    rest1,
    beta2,
    rest2,
    eps,
    rate,
    FOLLOWS: tl.constexpr,
):
    b_g = tl.load(p_g + o, m)
    b_m = tl.load(p_m + o, m)
    b_v = tl.load(p_v + o, m)
    b_w = tl.load(p_w + o, m)
    b_m += rest1 * (b_g - b_m)
    b_v = beta2 * b_v + rest2 * b_g * b_g
    tl.store(p_m + o, b_m, m)
    tl.store(p_v + o, b_v, m)
    b_root = tl.math.sqrt_rn(b_v) * correction + eps
    b_w -= scale * tl.math.div_rn(b_m, b_root)
    tl.store(p_w + o, b_w, m)
    if FOLLOWS:
        b_t = tl.load(p_t + o, m)
        tl.store(p_t + o, b_t + rate * (b_w - b_t), m)


@triton.jit
def _adam(
    p_leaves,
    p_grads,
    p_first,
    p_second,
    p_targets,
    p_count,
    starts,
    sizes,
    lr,
    log1,
    log2,
    rest1,
    beta2,
    rest2,
    eps,
    rate,
    FOLLOWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    offset, left = _locate(starts, sizes, i_block, BLOCK)
    p_w = _pointer(p_leaves, starts, i_block, ALIGNED) + offset
    p_g = _pointer(p_grads, starts, i_block, ALIGNED) + offset
    p_m = _pointer(p_first, starts, i_block, ALIGNED) + offset
    p_v = _pointer(p_second, starts, i_block, ALIGNED) + offset
    p_t = _pointer(p_targets, starts, i_block, ALIGNED) + offset
    # In float64, because in float32 1 - beta^t would lose most of its digits in early steps.
    count = tl.load(p_count).to(tl.float64)
    scale = (lr / (1.0 - tl.exp(count * log1))).to(tl.float32)
    correction = (1.0 / tl.sqrt(1.0 - tl.exp(count * log2))).to(tl.float32)
    o = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _adam_block(
            p_w,
            p_g,
            p_m,
            p_v,
            p_t,
            o,
            None,
            scale,
            correction,
            rest1,
            beta2,
            rest2,
            eps,
            rate,
            FOLLOWS,
        )
    else:
        _adam_block(
            p_w,
            p_g,
            p_m,
            p_v,
            p_t,
            o,
            o < left,
            scale,
            correction,
            rest1,
            beta2,
            rest2,
            eps,
            rate,
            FOLLOWS,
        )


@operator(
    "rmsprop",
    shapes=lambda *inputs: None,
    mutates=("leaves", "first", "second", "velocity"),
)
def rmsprop(
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    velocity: Sequence[Tensor],
    lr: float,
    decay: float,
    eps: float,
    momentum: float,
) -> None:
    """`cerl.kernels.optim.rmsprop`, which reads and writes everything once."""
    velocity = velocity if momentum else leaves  # not read without momentum
    for part in _groups(leaves, grads, first, second, velocity):
        starts, sizes, blocks = _layout(part[0])
        _rmsprop[(blocks,)](
            *part,
            starts,
            sizes,
            lr,
            decay,
            1.0 - decay,
            eps,
            momentum,
            MOMENTUM=momentum != 0.0,
            ALIGNED=_aligned(part),
            BLOCK=BLOCK,
        )


@operator(
    "adam",
    shapes=lambda *inputs: None,
    mutates=("leaves", "first", "second", "targets"),
)
def adam(
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    targets: Sequence[Tensor],
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    rate: float,
) -> None:
    """`cerl.kernels.optim.adam`, which reads and writes everything once."""
    follows = len(targets) > 0
    for part in _groups(leaves, grads, first, second, targets if follows else leaves):
        starts, sizes, blocks = _layout(part[0])
        _adam[(blocks,)](
            *part,
            count,
            starts,
            sizes,
            lr,
            math.log(beta1) if beta1 else -math.inf,
            math.log(beta2) if beta2 else -math.inf,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            eps,
            rate,
            FOLLOWS=follows,
            ALIGNED=_aligned(part),
            BLOCK=BLOCK,
        )


def _groups(
    leaves: Sequence[Tensor], grads: Sequence[Tensor], *state: Sequence[Tensor]
) -> list[tuple[tuple[Tensor, ...], ...]]:
    """Splits the lists into launches of at most GROUP leaves.

    Returns: for every launch its leaves, their gradients and their states.
    Raises:  ValueError for a tensor that is not float32, not contiguous or not of its leaf's shape.
    """
    grads = [grad.contiguous() for grad in grads]
    for number, tensors in enumerate(zip(leaves, grads, *state, strict=True)):
        for tensor in tensors:
            if tensor.dtype != torch.float32:
                raise ValueError(
                    f"leaf {number}: leaves, gradients and states must be float32, "
                    f"got {tensor.dtype}; convert it"
                )
            if tensor.shape != tensors[0].shape or not tensor.is_contiguous():
                raise ValueError(
                    f"leaf {number}: expected contiguous tensors of shape "
                    f"{list(tensors[0].shape)}, got {list(tensor.shape)} with strides "
                    f"{list(tensor.stride())}"
                )
    lists = (leaves, grads, *state)
    return [
        tuple(tuple(tensors[k : k + GROUP]) for tensors in lists)
        for k in range(0, len(leaves), GROUP)
    ]


def _layout(leaves: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """First block and size of every leaf, and the number of blocks."""
    sizes = tuple(leaf.numel() for leaf in leaves)
    starts, blocks = [], 0
    for size in sizes:
        starts.append(blocks)
        blocks += -(-size // BLOCK)
    return tuple(starts), sizes, blocks


def _aligned(part: tuple[tuple[Tensor, ...], ...]) -> bool:
    """Whether the address of every tensor is a multiple of 16 bytes (that of a view may not be)."""
    return all(tensor.data_ptr() % 16 == 0 for tensors in part for tensor in tensors)
