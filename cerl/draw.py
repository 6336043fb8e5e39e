"""Counter-based random numbers: hash(seed, purpose, step, index) in integer torch operations.

No generator holds state, so a seed draws the same numbers alone or among others, CUDA graphs need no
registration, and a number can be drawn again from its coordinates (a bootstrap mask from the id of its
row). The hash is the finaliser of splitmix64 over a linear combination of the coordinates.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What a number is for; two purposes never share a stream.
INIT, EXPLORE, ACTION, MEMBER, TIE, SAMPLE, MASK, OWNER, ENV, BATCHES, SHARED, NOISE = range(12)

_STEP, _INDEX, _PURPOSE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xA0761D6478BD642F
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z &= (1 << 64) - 1
    z = ((z ^ (z >> 30)) * _FIRST) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * _SECOND) & ((1 << 64) - 1)
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    # `>>` keeps the sign on int64, so the masks make the shifts logical.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_FIRST)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_SECOND)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def seed_keys(seeds: Sequence[int], *, salt: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Key of every seed.

    Args:    seeds are the user's numbers; salt separates consumers (training, evaluation) of one seed.
    Returns: [S] int64.
    """
    keys = [_signed(_mix_int(_mix_int(seed + 1) + salt * _PURPOSE)) for seed in seeds]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def bits(key: Tensor, purpose: int, step: Tensor | int, index: Tensor) -> Tensor:
    """32 random bits at each coordinate.

    Args:    key [S] from `seed_keys`; step int, or int64 tensor that broadcasts against index;
             index int64 tensor [S or 1, ...].
    Returns: int64 in [0, 2**32), the broadcast shape.
    """
    offset = _signed(_mix_int(purpose + 1) * _PURPOSE)
    at = step * _signed(_STEP) if isinstance(step, Tensor) else _signed(step * _STEP)
    z = key.view(-1, *([1] * (index.dim() - 1))) + (at + (index * _signed(_INDEX) + offset))
    return (_mix(z) >> 32) & 0xFFFFFFFF


def _grid(key: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape), device=key.device).view(1, *shape)


def uniform(key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int]) -> Tensor:
    """Uniform float32 in [0, 1), a multiple of 2**-24. Returns: [S, *shape]."""
    return (bits(key, purpose, step, _grid(key, shape)) >> 8).float() * 2.0**-24


def randint(key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int], *, high: Tensor | int) -> Tensor:
    """Uniform int64 in [0, high) with high <= 2**31; bias below high / 2**32. Returns: [S, *shape]."""
    return (bits(key, purpose, step, _grid(key, shape)) * high) >> 32


def normal(key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 (Box and Muller). Returns: [S, *shape]."""
    u = uniform(key, purpose, step, (*shape, 2))
    radius = torch.sqrt(-2.0 * torch.log(1.0 - u[..., 0]))
    return radius * torch.cos(2.0 * math.pi * u[..., 1])
