"""Counter-based random numbers: hash(seed, purpose, step, index) in integer torch operations.

No generator holds state, so a seed draws the same numbers alone or among others, CUDA graphs need
no registration, and a number can be drawn again later from its coordinates: the bootstrap mask of a
row, for example, is recomputed from the row's id. The hash is the finaliser of splitmix64 applied
to a linear combination of the coordinates.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cerl.kernels.random import hash_at, hash_grid, mix_number, normal_grid
from cerl.kernels.splitmix import signed

# Purposes of random numbers. Each has a stream of its own, so no two uses draw the same numbers.
INIT, EXPLORE, ACTION, MEMBER, TIE, SAMPLE, MASK, OWNER, ENV, BATCHES, SHARED, NOISE = range(12)
POLICY, SUBSET = range(12, 14)
FLICKER, DROPOUT, SENSOR = range(32, 35)
# For code of the user's own: OWN, OWN + 1 and so on are used by nothing in cerl.
OWN = 1_000

_PURPOSE = 0xA0761D6478BD642F


def purpose_offset(purpose: int) -> int:
    """The number that the hash adds for a purpose, which selects its stream."""
    return signed(mix_number(purpose + 1) * _PURPOSE)


def seed_keys(seeds: Sequence[int], *, salt: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The random key of every seed.

    Args:    seeds, the user's numbers; salt, another one for each consumer, so that training and
             evaluation of one seed draw different numbers.
    Returns: [S] int64.
    """
    keys = [signed(mix_number(mix_number(seed + 1) + salt * _PURPOSE)) for seed in seeds]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def first_step(number: int) -> int:
    """The step from which the numbered evaluation `number` counts its steps.

    Each evaluation has 2**32 steps of its own, so no two of them draw the same numbers.

    Raises:  ValueError unless the number is in [0, 2**31).
    """
    if not 0 <= number < 2**31:
        raise ValueError(f"number: expected 0 to 2**31 - 1, got {number}")
    return number << 32


def bits(key: Tensor, purpose: int, step: Tensor | int, index: Tensor) -> Tensor:
    """32 random bits at each coordinate.

    Args:    key [S] from `seed_keys`; step int, or int64 tensor that broadcasts against index;
             index int64 tensor [S or 1, ...].
    Returns: int64 in [0, 2**32), the broadcast shape.
    """
    keys = key.view(-1, *([1] * (index.dim() - 1)))
    return hash_at(keys, step, index, offset=purpose_offset(purpose))


def _grid_bits(key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int]) -> Tensor:
    """32 random bits at indices 0, 1, ... of every key, [S, *shape]."""
    return _grid(hash_grid, key, purpose, step, shape)


def _grid(
    grid: Callable[..., Tensor],
    key: Tensor,
    purpose: int,
    step: Tensor | int,
    shape: Sequence[int],
) -> Tensor:
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=key.device)
    offset, count = purpose_offset(purpose), math.prod(shape)
    return grid(key, step, offset=offset, count=count).view(-1, *shape)


def uniform(key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int]) -> Tensor:
    """Uniform float32 in [0, 1), a multiple of 2**-24. Returns: [S, *shape]."""
    return (_grid_bits(key, purpose, step, shape) >> 8).float() * 2.0**-24


def randint(
    key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int], *, high: Tensor | int
) -> Tensor:
    """Uniform int64 in [0, high), high <= 2**31; bias below high / 2**32. Returns: [S, *shape]."""
    return (_grid_bits(key, purpose, step, shape) * high) >> 32


def normal(key: Tensor, purpose: int, step: Tensor | int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 (Box and Muller). Returns: [S, *shape]."""
    return _grid(normal_grid, key, purpose, step, shape)
