# The arguments of a Triton kernel are no Python types.
# pyright: reportArgumentType=false
"""Random bits by hashing coordinates, normal numbers: one launch instead of two dozen."""

import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU needs neither
    triton = None

STEP, INDEX = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """The low 64 bits of `value` as int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors."""
    # `>>` keeps the sign on int64, so the masks make the shifts logical.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * signed(FIRST)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * signed(SECOND)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def hash_at(key: Tensor, step: Tensor | int, index: Tensor | int, *, offset: int) -> Tensor:
    """32 random bits at each coordinate; the definition of the stream.

    Args:    key, step, index int64, broadcast against each other; offset, the purpose's place in
             the stream.
    Returns: int64 in [0, 2**32).
    """
    at = step * signed(STEP) if isinstance(step, Tensor) else signed(step * STEP)
    place = index * signed(INDEX) if isinstance(index, Tensor) else signed(index * INDEX)
    return (mix(key + (at + (place + offset))) >> 32) & 0xFFFFFFFF


def hash_grid(key: Tensor, step: Tensor, *, offset: int, count: int) -> Tensor:
    """32 random bits at indices 0 .. count - 1 of every key.

    Args:    key [S] int64; step [] int64; offset, the purpose's place in the stream.
    Returns: [S, count] int64 in [0, 2**32).
    """
    index = torch.arange(count, device=key.device)
    return hash_at(key.unsqueeze(-1), step, index, offset=offset)


def normal_grid(key: Tensor, step: Tensor, *, offset: int, count: int) -> Tensor:
    """Standard normal numbers 0 .. count - 1 of every key (Box and Muller 1958).

    Number i is made of the uniform numbers at indices 2 i and 2 i + 1.
    Args:    as `hash_grid`.
    Returns: [S, count] float32.
    """
    bits = hash_grid(key, step, offset=offset, count=2 * count).unflatten(1, (count, 2))
    u = (bits >> 8).float() * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(1.0 - u[..., 0]))
    return radius * torch.cos(2.0 * math.pi * u[..., 1])


if triton is not None:
    TAU = tl.constexpr(2.0 * math.pi)
    GRAIN = tl.constexpr(2.0**-24)  # between uniform numbers

    @triton.jit
    def _mixed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
        z = z.to(tl.uint64)
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        return z ^ (z >> 31)

    @triton.jit
    def _normal_kernel(
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
        near = (_mixed(z + even * INDEX, FIRST, SECOND) >> 40).to(tl.float32)
        turn = (_mixed(z + (even + 1) * INDEX, FIRST, SECOND) >> 40).to(tl.float32)
        radius = tl.math.sqrt_rn(-2.0 * tl.log(1.0 - near * GRAIN))
        normal = radius * tl.cos(turn * GRAIN * TAU)
        tl.store(p_out + i_seed.to(tl.int64) * count + o, normal, mask=o < count)

    @triton.jit
    def _hash_kernel(
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
        z = _mixed(z + offset + o.to(tl.int64) * INDEX, FIRST, SECOND)
        row = p_out + i_seed.to(tl.int64) * count
        tl.store(row + o, (z >> 32).to(tl.int64), mask=o < count)


def hash_grid_triton(key: Tensor, step: Tensor, *, offset: int, count: int) -> Tensor:
    """`hash_grid` in one launch. Raises: RuntimeError without triton."""
    if triton is None:
        raise RuntimeError("hash_grid_triton needs triton: pip install triton (Linux)")
    out = torch.empty(len(key), count, dtype=torch.int64, device=key.device)
    _launch(_hash_kernel, key, step, out, offset, count, block=1024)
    return out


def normal_grid_triton(key: Tensor, step: Tensor, *, offset: int, count: int) -> Tensor:
    """`normal_grid` in one launch. Raises: RuntimeError without triton."""
    if triton is None:
        raise RuntimeError("normal_grid_triton needs triton: pip install triton (Linux)")
    out = torch.empty(len(key), count, dtype=torch.float32, device=key.device)
    _launch(_normal_kernel, key, step, out, offset, count, block=512)
    return out


def _launch(
    kernel: Any, key: Tensor, step: Tensor, out: Tensor, offset: int, count: int, *, block: int
) -> None:
    block = min(block, 1 << (count - 1).bit_length())
    kernel[(-(-count // block), len(key))](
        key,
        step,
        out,
        offset,
        count,
        STEP=signed(STEP),
        INDEX=signed(INDEX),
        FIRST=FIRST,
        SECOND=SECOND,
        BLOCK=block,
    )
