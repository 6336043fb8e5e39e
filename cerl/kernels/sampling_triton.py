"""Drawing rows of a replay ring and reading their windows in Triton; `sampling.py` defines both."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerl.kernels.random_triton import FACTORS, hashed
from cerl.kernels.runtime.blocks import power_of_two
from cerl.kernels.runtime.operator import operator


@triton.jit
def _pick(
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
    """BS slots of one seed: draws K candidates for each and takes the first valid one."""
    i_seed = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BS + tl.arange(0, BS)
    k = tl.arange(0, BK)
    inside = (slot < members * batch)[:, None] & (k < K)[None, :]
    key = tl.load(p_key + i_seed)
    total = tl.load(p_total)
    count = tl.minimum(total, rows)
    span = tl.maximum(count - context - ahead, 1) * envs
    index = slot.to(tl.int64)[:, None] * K + k[None, :]
    bits = hashed(key + tl.load(p_step) * STEP + offset + index * INDEX, FIRST, SECOND)
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
        owner = hashed(key + (row * envs + env) * STEP + owner_offset, FIRST, SECOND)
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
def _windows(
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
    """Copies the fields of BLOCK rows of windows; A numbers an action."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    slot = o // W
    seed = (slot // slots).to(tl.int64)
    row = tl.load(p_row + slot, mask=mask, other=context) + (o % W) - context
    env = tl.load(p_env + slot, mask=mask, other=0)
    place = seed * rows * envs + (row % rows) * envs + env
    for a in tl.static_range(A):
        part = tl.load(p_action + place * A + a, mask=mask, other=0)
        tl.store(p_out_action + o * A + a, part, mask=mask)
    tl.store(p_out_reward + o, tl.load(p_reward + place, mask=mask, other=0.0), mask=mask)
    ended = tl.load(p_terminated + place, mask=mask, other=0)
    tl.store(p_out_terminated + o, ended, mask=mask)
    tl.store(p_out_real + o, tl.load(p_real + place, mask=mask, other=0), mask=mask)
    acted = tl.load(p_member + place, mask=mask, other=0).to(tl.int64)
    tl.store(p_out_member + o, acted, mask=mask)
    tl.store(p_out_place + o, place, mask=mask)


def _picked(
    key, step, total, real, member, offset, owner_offset, members, batch, *_
) -> tuple[Tensor, Tensor, Tensor]:
    shape = real.shape[0], members, batch
    row, env = (key.new_empty(shape) for _ in range(2))
    return row, env, key.new_empty(shape, dtype=torch.bool)


@operator("pick", shapes=_picked)
def pick(
    key: Tensor,
    step: Tensor,
    total: Tensor,
    real: Tensor,
    member: Tensor,
    offset: int,
    owner_offset: int,
    members: int,
    batch: int,
    candidates: int,
    context: int,
    ahead: int,
    owner: str,
    begins: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields that `cerl.kernels.sampling.pick` returns, in one launch."""
    seeds, rows, envs = real.shape
    row, env = (key.new_empty(seeds, members, batch) for _ in range(2))
    hit = key.new_empty(seeds, members, batch, dtype=torch.bool)
    width = power_of_two(candidates)
    block = max(1, min(32, 1024 // width))
    _pick[(triton.cdiv(members * batch, block), seeds)](
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
        **FACTORS,
        K=candidates,
        OWNER=owner,
        BEGINS=begins,
        BS=block,
        BK=width,
    )
    return row, env, hit


def _read(
    row, env, action, reward, terminated, real, member, context, ahead
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = *row.shape, context + 1 + ahead
    return (
        action.new_empty(*shape, *action.shape[3:]),
        reward.new_empty(shape),
        terminated.new_empty(shape),
        real.new_empty(shape),
        row.new_empty(shape),
        row.new_empty(shape),
    )


@operator("windows", shapes=_read)
def windows(
    row: Tensor,
    env: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    real: Tensor,
    member: Tensor,
    context: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields that `cerl.kernels.sampling.windows` returns, in one launch."""
    fields = _read(row, env, action, reward, terminated, real, member, context, ahead)
    out_action, out_reward, out_terminated, out_real, out_member, out_place = fields
    count, block = out_place.numel(), 128
    _windows[(triton.cdiv(count, block),)](
        row,
        env,
        action,
        reward,
        terminated.view(torch.uint8),
        real.view(torch.uint8),
        member,
        out_action,
        out_reward,
        out_terminated.view(torch.uint8),
        out_real.view(torch.uint8),
        out_member,
        out_place,
        real.shape[1],
        real.shape[2],
        row.shape[1] * row.shape[2],
        context,
        count,
        W=context + 1 + ahead,
        A=action.shape[3] if action.dim() > 3 else 1,
        BLOCK=block,
    )
    return fields
