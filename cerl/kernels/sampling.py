# The arguments of a Triton kernel are no Python types, nor is a jitted function its signature.
# pyright: reportArgumentType=false, reportCallIssue=false
"""Drawing valid rows of a replay ring and reading their windows, each in one launch.

A slot of a batch draws K candidate rows by hashing its coordinates and takes the first valid one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.kernels import random
from cerl.kernels.random import FIRST, INDEX, SECOND, STEP, signed

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU needs neither
    triton = None


class Picked(NamedTuple):
    """Learnt rows, [S, M, B]."""

    row: Tensor  # int64 absolute time index
    env: Tensor  # int64
    hit: Tensor  # bool, one of the candidates was valid


def pick(
    key: Tensor,
    step: Tensor,
    total: Tensor,
    real: Tensor,
    member: Tensor,
    *,
    offset: int,
    owner_offset: int,
    shape: tuple[int, int, int],
    context: int,
    ahead: int,
    owner: str,
    begins: bool = False,
) -> Picked:
    """Uniformly drawn rows with `context` rows before and `ahead` rows after them in the ring.

    Args:    key [S]; step [] int64; total [] int64, time indices ever written; real, member
             [S, R, E]; offset, owner_offset, places in the random stream; shape (M, B, K);
             owner "any", "own" (the row's member is the slot's) or "disjoint" (a hash of the row
             is); begins: only rows that begin an episode, of which the row before must be in the
             ring (context of at least 1).
    """
    members, batch, candidates = shape
    seeds, rows, envs = real.shape
    count = total.clamp(max=rows)
    span = (count - context - ahead).clamp(min=1)
    bits = random.hash_grid(key, step, offset=offset, count=members * batch * candidates)
    place = ((bits * (span * envs)) >> 32).view(seeds, members, batch, candidates)
    row = total - count + context + place // envs
    env = place % envs
    flat = (row % rows) * envs + env
    valid = take(real, flat) & (count > context + ahead)
    if begins:
        valid = valid & ~take(real, ((row - 1) % rows) * envs + env)
    me = torch.arange(members, device=key.device).view(1, members, 1, 1)
    if owner == "own":
        valid = valid & (take(member, flat) == me)
    elif owner == "disjoint":
        bits = random.hash_at(key.view(-1, 1, 1, 1), row * envs + env, 0, offset=owner_offset)
        belongs = (bits * members) >> 32
        valid = valid & (belongs == me)
    first = valid.to(torch.uint8).argmax(-1, keepdim=True)
    return Picked(*(x.gather(-1, first).squeeze(-1) for x in (row, env, valid)))


def take(ring: Tensor, flat: Tensor) -> Tensor:
    """ring [S, R, E, *rest] at flat [S, ...] positions in R x E -> [S, ..., *rest]."""
    seeds, size = ring.shape[0], ring.shape[1] * ring.shape[2]
    offset = torch.arange(seeds, device=flat.device).view(-1, *([1] * (flat.dim() - 1))) * size
    picked = ring.flatten(0, 2).index_select(0, (flat + offset).flatten())
    return picked.unflatten(0, flat.shape)


class Scalars(NamedTuple):
    """Fields of a window's rows [S, M, B, W], and where its observations lie."""

    action: Tensor  # int64, or float32 [S, M, B, W, A]
    reward: Tensor  # float32
    terminated: Tensor  # bool
    real: Tensor  # bool
    member: Tensor  # int64
    place: Tensor  # int64, index into [S * R * E]


def windows(
    picked: Picked,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    real: Tensor,
    member: Tensor,
    *,
    context: int,
    ahead: int,
) -> Scalars:
    """Small fields of context + 1 + ahead rows around every picked one.

    Args: rings [S, R, E]; that of actions [S, R, E] int64 or [S, R, E, A] float32.
    """
    seeds, rows, envs = real.shape
    offsets = torch.arange(-context, ahead + 1, device=real.device)
    flat = ((picked.row.unsqueeze(-1) + offsets) % rows) * envs + picked.env.unsqueeze(-1)
    fields = (take(ring, flat) for ring in (action, reward, terminated, real))
    start = torch.arange(seeds, device=real.device).view(-1, 1, 1, 1) * (rows * envs)
    return Scalars(*fields, take(member, flat).long(), flat + start)


if triton is not None:

    @triton.jit
    def _hashed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
        z = z.to(tl.uint64)
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        return ((z ^ (z >> 31)) >> 32).to(tl.int64)

    @triton.jit
    def _pick_kernel(
        p_key,
        p_step,
        p_total,
        p_real,
        p_member,
        p_row,
        p_env,
        p_hit,
        offset,
        owner_offset,
        rows,
        envs,
        members,
        batch,
        context,
        ahead,
        STEP: tl.constexpr,
        INDEX: tl.constexpr,
        FIRST: tl.constexpr,
        SECOND: tl.constexpr,
        K: tl.constexpr,
        OWNER: tl.constexpr,
        BEGINS: tl.constexpr,
        BS: tl.constexpr,
        BK: tl.constexpr,
    ):
        i_seed = tl.program_id(1).to(tl.int64)
        slot = tl.program_id(0) * BS + tl.arange(0, BS)
        k = tl.arange(0, BK)
        inside = (slot < members * batch)[:, None] & (k < K)[None, :]
        key = tl.load(p_key + i_seed)
        total = tl.load(p_total)
        count = tl.minimum(total, rows)
        span = tl.maximum(count - context - ahead, 1) * envs
        index = slot.to(tl.int64)[:, None] * K + k[None, :]
        bits = _hashed(key + tl.load(p_step) * STEP + offset + index * INDEX, FIRST, SECOND)
        place = (bits * span) >> 32
        row = total - count + context + place // envs
        env = place % envs
        flat = i_seed * rows * envs + (row % rows) * envs + env
        valid = inside & (tl.load(p_real + flat, mask=inside, other=0) != 0)
        valid = valid & (count > context + ahead)
        if BEGINS:
            before = i_seed * rows * envs + ((row - 1) % rows) * envs + env
            valid = valid & (tl.load(p_real + before, mask=inside, other=1) == 0)
        me = (slot // batch)[:, None]
        if OWNER == "own":
            valid = valid & (tl.load(p_member + flat, mask=inside, other=-1) == me)
        if OWNER == "disjoint":
            owner = _hashed(key + (row * envs + env) * STEP + owner_offset, FIRST, SECOND)
            valid = valid & (((owner * members) >> 32) == me)
        first = tl.min(tl.where(valid, k[None, :], BK), axis=1)
        hit = first < BK
        chosen = k[None, :] == tl.where(hit, first, 0)[:, None]
        row = tl.sum(tl.where(chosen, row, 0), axis=1)
        env = tl.sum(tl.where(chosen, env, 0), axis=1)
        o = i_seed * members * batch + slot
        m_out = slot < members * batch
        tl.store(p_row + o, row, mask=m_out)
        tl.store(p_env + o, env, mask=m_out)
        tl.store(p_hit + o, hit, mask=m_out)

    @triton.jit
    def _windows_kernel(
        p_row,
        p_env,
        p_action,
        p_reward,
        p_terminated,
        p_real,
        p_member,
        p_out_action,
        p_out_reward,
        p_out_terminated,
        p_out_real,
        p_out_member,
        p_out_place,
        rows,
        envs,
        slots,
        context,
        count,
        W: tl.constexpr,
        A: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = o < count
        slot = o // W
        seed = (slot // slots).to(tl.int64)
        row = tl.load(p_row + slot, mask=mask, other=context) + (o % W) - context
        env = tl.load(p_env + slot, mask=mask, other=0)
        place = seed * rows * envs + (row % rows) * envs + env
        for a in tl.static_range(A):  # pyright: ignore[reportGeneralTypeIssues]
            part = tl.load(p_action + place * A + a, mask=mask, other=0)
            tl.store(p_out_action + o * A + a, part, mask=mask)
        tl.store(p_out_reward + o, tl.load(p_reward + place, mask=mask, other=0.0), mask=mask)
        ended = tl.load(p_terminated + place, mask=mask, other=0)
        tl.store(p_out_terminated + o, ended, mask=mask)
        tl.store(p_out_real + o, tl.load(p_real + place, mask=mask, other=0), mask=mask)
        acted = tl.load(p_member + place, mask=mask, other=0).to(tl.int64)
        tl.store(p_out_member + o, acted, mask=mask)
        tl.store(p_out_place + o, place, mask=mask)


def pick_triton(
    key: Tensor,
    step: Tensor,
    total: Tensor,
    real: Tensor,
    member: Tensor,
    *,
    offset: int,
    owner_offset: int,
    shape: tuple[int, int, int],
    context: int,
    ahead: int,
    owner: str,
    begins: bool = False,
) -> Picked:
    """`pick` in one launch. Raises: RuntimeError without triton."""
    if triton is None:
        raise RuntimeError("pick_triton needs triton: pip install triton (Linux)")
    members, batch, candidates = shape
    seeds, rows, envs = real.shape
    device = real.device
    row = torch.empty(seeds, members, batch, dtype=torch.int64, device=device)
    env = torch.empty_like(row)
    hit = torch.empty(seeds, members, batch, dtype=torch.bool, device=device)
    width = triton.next_power_of_2(candidates)
    block = max(1, min(32, 1024 // width))
    _pick_kernel[(triton.cdiv(members * batch, block), seeds)](
        key,
        step,
        total,
        real.view(torch.uint8),
        member,
        row,
        env,
        hit.view(torch.uint8),
        offset,
        owner_offset,
        rows,
        envs,
        members,
        batch,
        context,
        ahead,
        STEP=signed(STEP),
        INDEX=signed(INDEX),
        FIRST=FIRST,
        SECOND=SECOND,
        K=candidates,
        OWNER=owner,
        BEGINS=begins,
        BS=block,
        BK=width,
    )
    return Picked(row, env, hit)


def windows_triton(
    picked: Picked,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    real: Tensor,
    member: Tensor,
    *,
    context: int,
    ahead: int,
) -> Scalars:
    """`windows` in one launch. Raises: RuntimeError without triton."""
    if triton is None:
        raise RuntimeError("windows_triton needs triton: pip install triton (Linux)")
    seeds, rows, envs = real.shape
    width = context + 1 + ahead
    shape = (*picked.row.shape, width)

    def empty(dtype: torch.dtype, *rest: int) -> Tensor:
        return torch.empty(*shape, *rest, dtype=dtype, device=real.device)

    out = Scalars(
        empty(action.dtype, *action.shape[3:]),
        empty(torch.float32),
        empty(torch.bool),
        empty(torch.bool),
        empty(torch.int64),
        empty(torch.int64),
    )
    count, block = out.place.numel(), 128
    _windows_kernel[(triton.cdiv(count, block),)](
        picked.row,
        picked.env,
        action,
        reward,
        terminated.view(torch.uint8),
        real.view(torch.uint8),
        member,
        out.action,
        out.reward,
        out.terminated.view(torch.uint8),
        out.real.view(torch.uint8),
        out.member,
        out.place,
        rows,
        envs,
        picked.row.shape[1] * picked.row.shape[2],
        context,
        count,
        W=width,
        A=action.shape[3] if action.dim() > 3 else 1,
        BLOCK=block,
    )
    return out
