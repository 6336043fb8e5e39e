"""Random bits and normal numbers in Triton; `random.py` defines them."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.runtime.blocks import power_of_two
from cerl.kernels.runtime.operator import operator
from cerl.kernels.splitmix import FIRST, INDEX, SECOND, STEP, signed

TAU = tl.constexpr(2.0 * math.pi)
GRAIN = tl.constexpr(2.0**-24)  # distance between neighbouring uniform numbers

# Factors of the hash, which the kernels take as compile-time constants.
FACTORS = {"STEP": signed(STEP), "INDEX": signed(INDEX), "FIRST": FIRST, "SECOND": SECOND}


@triton.jit
def mixed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Hashes 64-bit integers, to uint64."""
    z = z.to(tl.uint64)
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit
def hashed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The upper 32 bits of the hash, int64."""
    return (mixed(z, FIRST, SECOND) >> 32).to(tl.int64)


@triton.jit
def _normal_grid(
    p_key,
    p_step,
    p_out,
    offset,
    count,
    STEP: tl.constexpr,
    INDEX: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_seed = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(p_key + i_seed) + tl.load(p_step) * STEP + offset
    even = 2 * o.to(tl.int64)
    near = (mixed(z + even * INDEX, FIRST, SECOND) >> 40).to(tl.float32)
    turn = (mixed(z + (even + 1) * INDEX, FIRST, SECOND) >> 40).to(tl.float32)
    radius = tl.math.sqrt_rn(-2.0 * tl.log(1.0 - near * GRAIN))
    normal = radius * tl.cos(turn * GRAIN * TAU)
    tl.store(p_out + i_seed.to(tl.int64) * count + o, normal, mask=o < count)


@triton.jit
def _hash_grid(
    p_key,
    p_step,
    p_out,
    offset,
    count,
    STEP: tl.constexpr,
    INDEX: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_seed = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(p_key + i_seed) + tl.load(p_step) * STEP
    z = hashed(z + offset + o.to(tl.int64) * INDEX, FIRST, SECOND)
    tl.store(p_out + i_seed.to(tl.int64) * count + o, z, mask=o < count)


@operator(
    "hash_grid",
    shapes=lambda key, step, offset, count: key.new_empty(key.shape[0], count),
)
def hash_grid(key: Tensor, step: Tensor, offset: int, count: int) -> Tensor:
    """`cerl.kernels.random.hash_grid` in one launch."""
    out = key.new_empty(len(key), count)
    _launch(_hash_grid, key, step, out, offset, block=1024)
    return out


@operator(
    "normal_grid",
    shapes=lambda key, step, offset, count: key.new_empty(key.shape[0], count, dtype=torch.float32),
)
def normal_grid(key: Tensor, step: Tensor, offset: int, count: int) -> Tensor:
    """`cerl.kernels.random.normal_grid` in one launch."""
    out = key.new_empty(len(key), count, dtype=torch.float32)
    _launch(_normal_grid, key, step, out, offset, block=512)
    return out


def _launch(
    kernel: Any, key: Tensor, step: Tensor, out: Tensor, offset: int, *, block: int
) -> None:
    seeds, count = out.shape
    block = min(block, power_of_two(count))
    kernel[(-(-count // block), seeds)](
        key,
        step,
        out,
        offset,
        count,
        **FACTORS,
        BLOCK=block,
    )
