"""Random bits by hashing coordinates, and normal numbers made of them: definitions, dispatch.

On CUDA a grid of numbers is one launch instead of two dozen (`random_triton.py`).
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cerl.kernels import Impl, runs_triton
from cerl.kernels.splitmix import FIRST, INDEX, SECOND, STEP, signed

Number = TypeVar("Number", int, Tensor)


def _mixed(z: Number, wrap: Callable[[Number], Number]) -> Number:
    """The finaliser of splitmix64 (Steele et al. 2014), on signed 64-bit numbers.

    Args: wrap, which reduces a product to 64 bits.
    """
    # `>>` keeps the sign, so the masks make the shifts logical.
    z = wrap((z ^ ((z >> 30) & ((1 << 34) - 1))) * signed(FIRST))
    z = wrap((z ^ ((z >> 27) & ((1 << 37) - 1))) * signed(SECOND))
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def mix(z: Tensor) -> Tensor:
    """Hashes int64 tensors, whose products wrap around to 64 bits by themselves."""
    return _mixed(z, lambda product: product)


def mix_number(z: int) -> int:
    """Hashes the low 64 bits of one number, to an int64."""
    return _mixed(signed(z), signed)


def gaussian(u: Tensor) -> Tensor:
    """Standard normal numbers from pairs of uniform ones in [0, 1) (Box and Muller 1958).

    Args:    u [..., 2].
    Returns: [...].
    """
    radius = torch.sqrt(-2.0 * torch.log(1.0 - u[..., 0]))
    return radius * torch.cos(2.0 * math.pi * u[..., 1])


def hash_at(key: Tensor, step: Tensor | int, index: Tensor | int, *, offset: int) -> Tensor:
    """32 random bits for each (key, step, index); this defines the streams of `cerl/draw.py`.

    Args:    key, step, index int64, which broadcast; offset, by which streams for different
             purposes differ.
    Returns: int64 in [0, 2**32).
    """
    at = step * signed(STEP) if isinstance(step, Tensor) else signed(step * STEP)
    place = index * signed(INDEX) if isinstance(index, Tensor) else signed(index * INDEX)
    return (mix(key + (at + (place + offset))) >> 32) & 0xFFFFFFFF


def hash_grid(key: Tensor, step: Tensor, *, offset: int, count: int, impl: Impl = "auto") -> Tensor:
    """32 random bits at indices 0 .. count - 1 of every key.

    Args:    key [S] int64; step [] int64; offset as in `hash_at`; impl as in `cerl.kernels`.
    Returns: [S, count] int64 in [0, 2**32).
    """
    if runs_triton(impl, key.device):
        from cerl.kernels import random_triton

        return random_triton.hash_grid(key, step, offset, count)
    index = torch.arange(count, device=key.device)
    return hash_at(key.unsqueeze(-1), step, index, offset=offset)


def normal_grid(
    key: Tensor, step: Tensor, *, offset: int, count: int, impl: Impl = "auto"
) -> Tensor:
    """Standard normal numbers 0 .. count - 1 of every key, by `gaussian`.

    Number i is made of the uniform numbers at indices 2 i and 2 i + 1.

    Args:    as in `hash_grid`.
    Returns: [S, count] float32.
    """
    if runs_triton(impl, key.device):
        from cerl.kernels import random_triton

        return random_triton.normal_grid(key, step, offset, count)
    bits = hash_grid(key, step, offset=offset, count=2 * count, impl="reference")
    return gaussian((bits.unflatten(1, (count, 2)) >> 8).float() * 2.0**-24)
