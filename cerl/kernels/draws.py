# The arguments of a Triton kernel are no Python types.
# pyright: reportArgumentType=false
"""Random bits by hashing coordinates: one launch instead of two dozen."""

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


if triton is not None:

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
        z = (z + offset + o.to(tl.int64) * INDEX).to(tl.uint64)
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        z = z ^ (z >> 31)
        row = p_out + i_seed.to(tl.int64) * count
        tl.store(row + o, (z >> 32).to(tl.int64), mask=o < count)


def hash_grid_triton(key: Tensor, step: Tensor, *, offset: int, count: int) -> Tensor:
    """`hash_grid` in one launch. Raises: RuntimeError without triton."""
    if triton is None:
        raise RuntimeError("hash_grid_triton needs triton: pip install triton (Linux)")
    out = torch.empty(len(key), count, dtype=torch.int64, device=key.device)
    block = min(1024, triton.next_power_of_2(count))
    _hash_kernel[(triton.cdiv(count, block), len(key))](
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
    return out
