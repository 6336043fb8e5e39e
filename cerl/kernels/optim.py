"""Optimiser steps on lists of leaves (parameter tensors), in place: definitions and dispatch.

On CUDA one launch steps up to sixteen leaves, and reads and writes everything once
(`optim_triton.py`). The definitions in plain torch read and write about three times as often.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerl.kernels import Impl, runs_triton

Leaves = Sequence[Tensor]


def rmsprop(
    leaves: Leaves,
    grads: Leaves,
    first: Leaves,
    second: Leaves,
    velocity: Leaves,
    *,
    lr: float,
    decay: float,
    eps: float,
    momentum: float,
    impl: Impl = "auto",
) -> None:
    """Centred RMSProp, epsilon inside the root (Graves 2013, equations 38 to 45).

    m <- decay m + (1 - decay) g;  v <- decay v + (1 - decay) g^2;  u = lr g / sqrt(v - m^2 + eps)
    w <- w - u, or with momentum d <- momentum d + u, w <- w - d.

    Args:   first, second and velocity hold m, v and d of every leaf; velocity is empty without
            momentum; impl as in `cerl.kernels`.
    Raises: ValueError from the kernel if a tensor is not float32, has another shape than its leaf
            or is not contiguous (gradients need not be).
    """
    if runs_triton(impl, leaves[0].device):
        from cerl.kernels import optim_triton

        optim_triton.rmsprop(leaves, grads, first, second, velocity, lr, decay, eps, momentum)
        return
    leaves, grads, first, second, velocity = map(list, (leaves, grads, first, second, velocity))
    torch._foreach_lerp_(first, grads, 1.0 - decay)
    torch._foreach_mul_(second, decay)
    torch._foreach_addcmul_(second, grads, grads, 1.0 - decay)
    root = torch._foreach_addcmul(second, first, first, -1.0)
    torch._foreach_clamp_min_(root, 0.0)  # rounding may leave v a hair below m^2
    torch._foreach_add_(root, eps)
    torch._foreach_sqrt_(root)
    step = torch._foreach_div(grads, root)
    if momentum:
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, step, alpha=lr)
        torch._foreach_sub_(leaves, velocity)
    else:
        torch._foreach_sub_(leaves, step, alpha=lr)


def adam(
    leaves: Leaves,
    grads: Leaves,
    first: Leaves,
    second: Leaves,
    targets: Leaves,
    *,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    rate: float,
    impl: Impl = "auto",
) -> None:
    """Adam with both moments corrected for their start at 0 (Kingma & Ba 2015, algorithm 1).

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    w <- w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), and then as `follow`
    target <- target + rate (w - target)

    Args:   first and second hold m and v of every leaf; targets, one for every leaf, or an empty
            list if no target network follows; count, int64 [] on the leaves' device, is t, the
            number of this step, from 1 on; impl as in `cerl.kernels`.
    Raises: as `rmsprop`.
    """
    if runs_triton(impl, leaves[0].device):
        from cerl.kernels import optim_triton

        state = first, second, targets, count
        optim_triton.adam(leaves, grads, *state, lr, beta1, beta2, eps, rate)
        return
    leaves, grads, first, second = map(list, (leaves, grads, first, second))
    step = count.double()
    scale = (lr / (1.0 - beta1**step)).to(leaves[0].dtype)
    correction = torch.rsqrt(1.0 - beta2**step).to(leaves[0].dtype)
    torch._foreach_lerp_(first, grads, 1.0 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1.0 - beta2)
    root = torch._foreach_sqrt(second)
    torch._foreach_mul_(root, correction)
    torch._foreach_add_(root, eps)
    step = torch._foreach_div(first, root)
    torch._foreach_mul_(step, scale)
    torch._foreach_sub_(leaves, step)
    if targets:
        follow(targets, leaves, rate=rate)


def follow(leaves: Leaves, goals: Leaves, *, rate: float) -> None:
    """Moves every leaf in place towards its goal, by the share `rate` of the distance."""
    torch._foreach_lerp_(list(leaves), list(goals), rate)
