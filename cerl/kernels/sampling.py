"""Drawing valid rows of a replay ring and reading their windows: definitions and dispatch.

Each slot of a batch, which is the place of one window, draws K candidate rows by hashing its
coordinates and takes the first valid one. K is fixed, because a CUDA graph cannot draw until a row
is valid. On CUDA each of the two functions is one launch (`sampling_triton.py`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.kernels import Impl, random, runs_triton


class Picked(NamedTuple):
    """The first learnt row of every window of a batch, [S, M, B]."""

    row: Tensor  # int64, time index counted from the first row ever written
    env: Tensor  # int64 in [0, E)
    hit: Tensor  # bool, one of the candidates was valid; if False, the row is not to be learnt from


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
    impl: Impl = "auto",
) -> Picked:
    """Uniformly drawn rows with `context` rows before and `ahead` rows after them in the ring.

    A candidate is valid if it is real and fits the options `owner` and `begins`.

    Args: key [S] and step [] int64, which select the random numbers; total [] int64, time indices
          ever written; real, member [S, R, E], rings; offset, owner_offset of the random streams
          (`random.hash_at`); shape (M, B, K); owner, which rows a slot may take: "any", "own" (rows
          in which the slot's member acted) or "disjoint" (rows that a hash gives to the slot's
          member); begins: only rows that begin an episode, for which the row before must be in the
          ring (context >= 1); impl as in `cerl.kernels`.
    """
    if runs_triton(impl, real.device):
        from cerl.kernels import sampling_triton

        places = (offset, owner_offset, *shape, context, ahead, owner, begins)
        return Picked(*sampling_triton.pick(key, step, total, real, member, *places))
    members, batch, candidates = shape
    seeds, rows, envs = real.shape
    count = total.clamp(max=rows)
    span = (count - context - ahead).clamp(min=1)
    draws = members * batch * candidates
    bits = random.hash_grid(key, step, offset=offset, count=draws, impl="reference")
    place = ((bits * (span * envs)) >> 32).view(seeds, members, batch, candidates)
    row = total - count + context + place // envs
    env = place % envs
    valid = learnable(
        key,
        total,
        real,
        member,
        row=row,
        env=env,
        owner_offset=owner_offset,
        context=context,
        ahead=ahead,
        owner=owner,
        begins=begins,
    )
    return first_valid(valid, row, env)[0]


def learnable(
    key: Tensor,
    total: Tensor,
    real: Tensor,
    member: Tensor,
    *,
    row: Tensor,
    env: Tensor,
    owner_offset: int,
    context: int,
    ahead: int,
    owner: str,
    begins: bool,
) -> Tensor:
    """Which candidates can be learnt from, of those whose windows lie in the ring.

    Args:    row, env int64 [S, M, B, K], candidates; the others as of `pick`.
    Returns: bool [S, M, B, K]; none before the ring holds a whole window.
    """
    _, rows, envs = real.shape
    flat = (row % rows) * envs + env
    valid = take(real, flat) & (total.clamp(max=rows) > context + ahead)
    if begins:
        valid = valid & ~take(real, ((row - 1) % rows) * envs + env)
    me = torch.arange(row.shape[1], device=key.device).view(1, -1, 1, 1)
    if owner == "own":
        valid = valid & (take(member, flat) == me)
    elif owner == "disjoint":
        bits = random.hash_at(key.view(-1, 1, 1, 1), row * envs + env, 0, offset=owner_offset)
        belongs = (bits * row.shape[1]) >> 32
        valid = valid & (belongs == me)
    return valid


def first_valid(
    valid: Tensor, row: Tensor, env: Tensor, *others: Tensor
) -> tuple[Picked, *tuple[Tensor, ...]]:
    """Of every slot's candidates [S, M, B, K] the first valid one, or the first of all.

    Returns: the picked rows; of the other numbers of the candidates those of the picked ones,
             [S, M, B].
    """
    first = valid.to(torch.uint8).argmax(-1, keepdim=True)
    taken = [x.gather(-1, first).squeeze(-1) for x in (row, env, valid, *others)]
    return Picked(*taken[:3]), *taken[3:]


def take(ring: Tensor, flat: Tensor) -> Tensor:
    """Reads a ring [S, R, E, *rest] at positions flat [S, ...] in R x E -> [S, ..., *rest]."""
    seeds, size = ring.shape[0], ring.shape[1] * ring.shape[2]
    offset = torch.arange(seeds, device=flat.device).view(-1, *([1] * (flat.dim() - 1))) * size
    picked = ring.flatten(0, 2).index_select(0, (flat + offset).flatten())
    return picked.unflatten(0, flat.shape)


class Scalars(NamedTuple):
    """All fields of windows but the observations, [S, M, B, W], and where those lie."""

    action: Tensor  # int64, or float32 [S, M, B, W, A]
    reward: Tensor  # float32
    terminated: Tensor  # bool
    real: Tensor  # bool
    member: Tensor  # int64
    place: Tensor  # int64, index of the row into a ring flattened to [S * R * E]


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
    impl: Impl = "auto",
) -> Scalars:
    """Reads all fields but the observations, W = context + 1 + ahead rows around each picked one.

    Args: action, a ring [S, R, E] int64 or [S, R, E, A] float32; reward, terminated, real, member:
          rings [S, R, E]; context, ahead: rows before and after the picked one; impl as in
          `cerl.kernels`.
    """
    if runs_triton(impl, real.device):
        from cerl.kernels import sampling_triton

        rings = action, reward, terminated, real, member
        return Scalars(*sampling_triton.windows(picked.row, picked.env, *rings, context, ahead))
    seeds, rows, envs = real.shape
    offsets = torch.arange(-context, ahead + 1, device=real.device)
    flat = ((picked.row.unsqueeze(-1) + offsets) % rows) * envs + picked.env.unsqueeze(-1)
    fields = (take(ring, flat) for ring in (action, reward, terminated, real))
    start = torch.arange(seeds, device=real.device).view(-1, 1, 1, 1) * (rows * envs)
    return Scalars(*fields, take(member, flat).long(), flat + start)
