"""Samplers: which rows of replay a batch is made of, and how much each of them weighs.

A sampler looks at the ring of replay and owns whatever else it goes by; replay reads the windows
around the rows it picks. All of it runs inside a CUDA graph: state changes in place, no decision
waits for the host. Sampling in a graph cannot redraw, so a sampler draws a few candidates for every
slot of a batch and takes the first that can be learnt from.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cerl import draw
from cerl.config import OwnSamplerConfig, PrioritisedConfig, SamplerConfig
from cerl.data import Window
from cerl.kernels import random
from cerl.kernels.sampling import first_valid, learnable, pick
from cerl.own_code import imported_callable

Batches = Literal["shared", "independent", "own", "disjoint"]


class Sampling(NamedTuple):
    """Which windows are asked for, around the rows drawn, which are the first learnt ones."""

    batch: int  # B
    context: int  # rows before the row drawn
    ahead: int  # rows after it
    begins: bool  # the row drawn begins an episode; context is then 1 or more
    members: int  # M batches per seed; 1: one that the ensemble shares
    batches: Batches  # own: rows that the member acted in; disjoint: rows that a hash gives it
    probability: float  # share of steps in which that restriction (and one batch each) holds
    candidates: int  # rows drawn for each slot; with `begins` far more than an episode has rows


class Ring(NamedTuple):
    """What a sampler sees of replay; the tensors change in place."""

    keys: Tensor  # [S] int64
    total: Tensor  # [] int64, time indices ever written; index t lies at t % R
    real: Tensor  # [S, R, E] bool
    member: Tensor  # [S, R, E] int16


class Drawn(NamedTuple):
    """The rows of a batch, [S, M, B]."""

    row: Tensor  # int64 absolute time index
    env: Tensor  # int64
    hit: Tensor  # bool, one of the candidates can be learnt from
    weight: Tensor  # float32 in (0, 1], factor of the row's loss; 0 where nothing was found


class Sampler(Protocol):
    """Draws rows of a ring; each seed by its own key and state alone."""

    def added(self, at: Tensor) -> None:
        """Hears of rows that were written. Args: at [K] int64, their places in R."""
        ...

    def pick(self, sampling: Sampling, *, step: Tensor) -> Drawn:
        """The rows of a batch. Args: step int64 [], counts draws."""
        ...

    def update(self, window: Window, errors: Tensor) -> None:
        """Hears how wrong the values of a batch were, where the options ask for that.

        Args: errors [S, M, B], absolute temporal-difference error of the first learnt row of every
              window, units of the value; it may not be finite.
        """
        ...

    def forget(self) -> None:
        """Takes the state of an empty ring."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: tensors that are restored in place."""
        ...


MakeSampler = Callable[[Ring], Sampler]


def sampler_of(options: SamplerConfig) -> MakeSampler:
    """What makes the sampler of a run for the ring of its replay."""
    if isinstance(options, PrioritisedConfig):
        return partial(Prioritised, options=options)
    if isinstance(options, OwnSamplerConfig):
        return imported_callable(options.by, key="replay.sampler.by")
    return Uniform


class Uniform:
    """Every row that can be learnt from is as likely as any other; no state."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def added(self, at: Tensor) -> None:
        """Nothing changes."""

    def pick(self, sampling: Sampling, *, step: Tensor) -> Drawn:
        """Rows of weight 1."""
        return mixed(partial(self._pick, sampling, step), sampling, keys=self.ring.keys, step=step)

    def _pick(
        self, sampling: Sampling, step: Tensor, *, purpose: int, members: int, owner: str
    ) -> Drawn:
        keys, total, real, member = self.ring
        picked = pick(
            keys,
            step,
            total,
            real,
            member,
            offset=draw.purpose_offset(purpose),
            owner_offset=draw.purpose_offset(draw.OWNER),
            shape=(members, sampling.batch, sampling.candidates),
            context=sampling.context,
            ahead=sampling.ahead,
            owner=owner,
            begins=sampling.begins,
        )
        return Drawn(*picked, weight=picked.hit.float())

    def update(self, window: Window, errors: Tensor) -> None:
        """Nothing changes."""

    def forget(self) -> None:
        """There is no state."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def mixed(
    pick_one: Callable[..., Drawn], sampling: Sampling, *, keys: Tensor, step: Tensor
) -> Drawn:
    """Batches as asked for, or in a share `1 - sampling.probability` of the steps one for all.

    Args: pick_one(purpose=, members=, owner=), the rows of that many batches; purpose says which
          random numbers to draw them by, owner "any", "own" or "disjoint" whose rows to take.
    """
    batches, members = sampling.batches, sampling.members
    owner = batches if batches in ("own", "disjoint") else "any"
    drawn = pick_one(purpose=draw.SAMPLE, members=members, owner=owner)
    if members == 1 or sampling.probability == 1.0:
        return drawn
    one = pick_one(purpose=draw.SHARED, members=1, owner="any")
    shared = draw.uniform(keys, draw.BATCHES, step, (1, 1)) >= sampling.probability
    return Drawn(*(torch.where(shared, a, b) for a, b in zip(one, drawn, strict=True)))


# Priorities are whole numbers of units, so that their sums are exact: every device then draws the
# same rows, whatever the order in which it adds.
UNIT = 2**24  # a priority of 1
LARGEST = 2**38  # priorities are cut here, at 16,384
MOST_ROWS = 2**24  # of a seed, whose priorities then add up in 64 bits
BLOCK = 256  # rows whose priorities are added first


class Prioritised:
    """Rows are drawn in proportion to p = (|error| + eps) ** alpha (Schaul et al. 2016).

    A row's error is that of the update that last learnt from it, in a window whose first learnt row
    it was; a new row has the largest priority that its seed has ever had, at first 1, and so has a
    row whose error is not finite. Weights are p ** -beta over the largest weight of the batch, to
    which the number of rows and the sum of priorities contribute nothing.

    Differs from the paper: rows of a batch are drawn independently, not one of each stratum, since
    a stratum may hold nothing that can be learnt from; beta does not grow.
    Source: Schaul et al. 2016 (arXiv:1511.05952), section 3.3 and equation 1.
    """

    def __init__(self, ring: Ring, *, options: PrioritisedConfig) -> None:
        self.ring, self.options = ring, options
        seeds, rows, envs = ring.real.shape
        if rows * envs > MOST_ROWS:
            raise ValueError(
                f"replay.capacity: sampler prioritised adds up to {MOST_ROWS:,} priorities of a "
                f"seed, got {rows * envs:,} rows"
            )
        blocks, device = -(-rows * envs // BLOCK), ring.real.device
        # [S, blocks, BLOCK] int64; row (t, e) lies at (t % R) * E + e; 0 where none can be learnt.
        self.units = torch.zeros(seeds, blocks, BLOCK, dtype=torch.int64, device=device)
        self.largest = torch.full((seeds,), UNIT, dtype=torch.int64, device=device)  # so far

    def added(self, at: Tensor) -> None:
        """New rows have the largest priority, rows that are not real have none."""
        envs = self.ring.real.shape[2]
        real = self.ring.real.index_select(1, at).flatten(1)  # [S, K * E]
        places = (at.unsqueeze(1) * envs + torch.arange(envs, device=at.device)).flatten()
        self.units.flatten(1).index_copy_(1, places, torch.where(real, self.largest[:, None], 0))

    def pick(self, sampling: Sampling, *, step: Tensor) -> Drawn:
        """Rows in proportion to their priorities, of those that can be learnt from."""
        return mixed(partial(self._pick, sampling, step), sampling, keys=self.ring.keys, step=step)

    def _pick(
        self, sampling: Sampling, step: Tensor, *, purpose: int, members: int, owner: str
    ) -> Drawn:
        keys, total, real, member = self.ring
        _, rows, envs = real.shape
        shape = (members, sampling.batch, sampling.candidates)
        flat = self._places(step, purpose=purpose, count=prod(shape))  # [S, M * B * K]
        units = self.units.flatten(1).gather(1, flat).unflatten(1, shape)
        flat, last = flat.unflatten(1, shape), total - 1
        row, env = last - (last - flat // envs) % rows, flat % envs
        valid = learnable(
            keys,
            total,
            real,
            member,
            row=row,
            env=env,
            owner_offset=draw.purpose_offset(draw.OWNER),
            context=sampling.context,
            ahead=sampling.ahead,
            owner=owner,
            begins=sampling.begins,
        )
        oldest = total - total.clamp(max=rows)
        inside = (row - sampling.context >= oldest) & (row + sampling.ahead <= last)
        picked, units = first_valid(valid & inside & (units > 0), row, env, units)
        priority = torch.where(picked.hit, units, LARGEST).double()  # in units, which cancel out
        weight = (priority.amin(-1, keepdim=True) / priority) ** self.options.beta
        return Drawn(*picked, weight=torch.where(picked.hit, weight.float(), 0.0))

    def _places(self, step: Tensor, *, purpose: int, count: int) -> Tensor:
        """Places in R x E, each in proportion to its priority, [S, count] int64.

        A place is looked up in two levels: the block that holds the drawn share of the sum of all
        priorities, then the row inside it.
        """
        keys, (seeds, rows, envs), device = self.ring.keys, self.ring.real.shape, self.units.device
        sums = self.units.sum(-1)  # [S, blocks]
        ends = sums.cumsum(-1)
        whole = ends[:, -1:]
        bits = random.hash_grid(keys, step, offset=draw.purpose_offset(purpose), count=count)
        # Of double precision, since the sum has up to 62 bits.
        share = (bits.double() * 2.0**-32 * whole.double()).long()
        share = share.minimum(whole - 1).clamp(min=0)
        block = torch.searchsorted(ends, share, right=True).clamp(max=ends.shape[1] - 1)
        before = (ends - sums).gather(1, block)
        first = torch.arange(seeds, device=device).unsqueeze(1) * ends.shape[1]
        inside = self.units.flatten(0, 1).index_select(0, (block + first).flatten()).cumsum(-1)
        rest = (share - before).view(-1, 1)
        place = torch.searchsorted(inside, rest, right=True).view_as(block)
        return (block * BLOCK + place).clamp(max=rows * envs - 1)

    @torch.no_grad()
    def update(self, window: Window, errors: Tensor) -> None:
        """Rows of a batch get the priorities of their errors; of a row's several ones the largest.

        The result does not depend on the order in which a device writes.
        """
        options, device = self.options, self.units.device
        hit, row = (x.to(device).flatten(1) for x in (window.weight > 0, window.row))
        size = self.ring.real.shape[1] * self.ring.real.shape[2]
        priority = (errors.to(device).flatten(1).double() + options.eps) ** options.alpha * UNIT
        finite = priority.isfinite()
        units = torch.where(finite, priority, 0.0).clamp(1, LARGEST).long()
        units = torch.where(finite, units, self.largest[:, None])
        units = torch.where(hit, units, 0)
        flat = self.units.flatten(1)
        flat.scatter_reduce_(1, row % size, torch.where(hit, 0, LARGEST), "amin")
        flat.scatter_reduce_(1, row % size, units, "amax")
        self.largest.copy_(self.largest.maximum(units.amax(1)))

    def forget(self) -> None:
        """No row has a priority."""
        self.units.zero_()
        self.largest.fill_(UNIT)

    def state_dict(self) -> dict[str, Tensor]:
        return {"units": self.units, "largest": self.largest}
