"""A ring of rows on the device: add one time index of every environment, sample windows.

Why rows: a stored next observation would double the memory, and a stack, an n-step return or a
sequence is only more rows. Why one write head: seeds stay in lockstep. Which rows are drawn is up
to a sampler (`cerl/sampler.py`); a slot for which it finds none gets weight 0 and is counted in
`misses`.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cerl.data import EnvSpec, Row, Window
from cerl.kernels.sampling import Picked, windows
from cerl.sampler import MakeSampler, Ring, Sampler, Sampling, Uniform
from cerl.state import put


class Replay:
    """R x E rows per seed; a row is a valid start if it is real and its window is in the ring.

    Args of the constructor: keys [S]; spec; capacity rows per seed; placement "device" or "host"
    (pinned memory: slower, sampled outside CUDA graphs); remembered: numbers of the state that
    acting was in before a row, stored beside it; sampler, makes the one that draws rows.
    """

    def __init__(
        self,
        spec: EnvSpec,
        *,
        keys: Tensor,
        capacity: int,
        device: torch.device,
        placement: Literal["device", "host"] = "device",
        remembered: int = 0,
        sampler: MakeSampler = Uniform,
    ) -> None:
        seeds, envs = len(keys), spec.envs
        self.keys, self.envs, self.device, self.placement = keys, envs, device, placement
        self.rows = capacity // envs
        if self.rows < 2:
            raise ValueError(
                f"replay.capacity: {capacity} rows hold fewer than 2 steps of {envs} envs"
            )
        home = torch.device("cpu") if placement == "host" else device
        lead = (seeds, self.rows, envs)
        action = spec.action(device="cpu")
        pin = placement == "host" and device.type == "cuda"

        def ring(dtype: torch.dtype, *rest: int) -> Tensor:
            return torch.zeros(*lead, *rest, dtype=dtype, device=home, pin_memory=pin)

        self.obs = ring(spec.dtype, *spec.observation)
        self.action, self.reward = ring(action.dtype, *action.shape), ring(torch.float32)
        self.terminated, self.real = ring(torch.bool), ring(torch.bool)
        self.member = ring(torch.int16)
        self.state = ring(torch.float32, remembered) if remembered else None
        self.total = torch.zeros((), dtype=torch.int64, device=home)  # time indices ever written
        self.misses = torch.zeros(seeds, dtype=torch.int64, device=device)
        self.sampler: Sampler = sampler(Ring(keys.to(home), self.total, self.real, self.member))
        self.checked = False  # whether a row has been seen to fit

    def _fields(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in Row._fields}

    def rings(self) -> dict[str, Tensor]:
        """Everything that is stored by row, [S, R, E, ...] each; row t lies at t % R."""
        return {**self._fields(), **({} if self.state is None else {"state": self.state})}

    def add(self, row: Row, state: Tensor | None = None) -> None:
        """Writes one time index of all environments, over the oldest one once the ring is full.

        Args:   state [S, E, K] before the row, where such are stored; zero if not given.
        Raises: ValueError on the first call if the row does not fit the ring.
        """
        if not self.checked:
            self._check(row)
            self.checked = True
        at = (self.total % self.rows).view(1)
        for name, ring in self._fields().items():
            value = getattr(row, name).to(device=ring.device, dtype=ring.dtype)
            ring.index_copy_(1, at, value.unsqueeze(1))
        if self.state is not None:
            state = torch.zeros_like(self.state[:, 0]) if state is None else state
            self.state.index_copy_(1, at, state.to(self.state.device).unsqueeze(1))
        self.total += 1
        self.sampler.added(at)

    def _check(self, row: Row) -> None:
        """A wrong shape would be broadcast, a wrong type converted: both change what is learnt."""
        for name, ring in self._fields().items():
            value, shape = getattr(row, name), (ring.shape[0], *ring.shape[2:])
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"replay.add: expected {name} of shape {list(shape)}, [S, E, ...] of the seeds "
                    f"and environments that replay was made for, got {list(value.shape)}"
                )
            integers = not (value.is_floating_point() or value.dtype == torch.bool)
            if value.dtype != ring.dtype and not (name == "member" and integers):
                raise ValueError(
                    f"replay.add: expected {name} of {ring.dtype}, got {value.dtype}; "
                    "convert it where it is made"
                )

    def sample(self, sampling: Sampling, *, step: Tensor) -> Window:
        """Windows of context + 1 + ahead rows, [S, M, B, W]. Args: step int64 [], counts draws."""
        home = self.total.device
        sizes: dict[str, Any] = {"context": sampling.context, "ahead": sampling.ahead}
        row, env, found, weight = self.sampler.pick(sampling, step=step.to(home))
        picked = Picked(row, env, found)
        fields = (self.action, self.reward, self.terminated, self.real, self.member)
        scalars = windows(picked, *fields, **sizes)
        obs = self.obs.flatten(0, 2).index_select(0, scalars.place.flatten())
        self.misses += (~found).flatten(1).sum(1).to(self.device)
        second = scalars.place[..., 1]
        state = torch.zeros(*second.shape, 0, device=home)
        if self.state is not None:
            state = self.state.flatten(0, 2).index_select(0, second.flatten())
            state = state.unflatten(0, second.shape)
        window = Window(
            obs=obs.unflatten(0, scalars.place.shape),
            action=scalars.action,
            reward=scalars.reward,
            terminated=scalars.terminated,
            real=scalars.real,
            member=scalars.member,
            row=torch.add(env, row, alpha=self.envs),
            weight=weight,
            state=state,
        )
        return Window(*(x.to(self.device) for x in window))

    def last(self, count: int) -> Window:
        """The last `count` rows of every environment, [S, 1, E, count], without states; no sync.

        Rows that were never written are not real and come before all others.
        """
        age = torch.arange(count - 1, -1, -1, device=self.total.device)
        row = self.total - 1 - age
        at = row % self.rows
        fields = {k: v.index_select(1, at).transpose(1, 2) for k, v in self._fields().items()}
        fields["real"] = fields["real"] & (row >= 0)
        fields = {name: field.unsqueeze(1).to(self.device) for name, field in fields.items()}
        fields["member"] = fields["member"].long()
        env = torch.arange(self.envs, device=self.device).view(1, 1, -1)
        first = row[0].to(self.device) * self.envs + env
        weight = torch.ones(len(self.keys), 1, self.envs, device=self.device)
        none = weight.new_zeros(*weight.shape, 0)
        return Window(**fields, row=first.expand_as(weight), weight=weight, state=none)

    def shares(self, members: int) -> Tensor:
        """Share of the real rows in the ring that each member generated [S, N]; syncs nothing."""
        written = torch.arange(self.rows, device=self.total.device) < self.total
        real = self.real & written.view(1, -1, 1)
        counts = torch.stack([(real & (self.member == k)).sum((1, 2)) for k in range(members)], 1)
        return (counts / real.sum((1, 2)).clamp(min=1).unsqueeze(1)).to(self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole ring, in memory; checkpoints hold it in pieces (`cerl/record/pieces.py`)."""
        return {**self.rings(), "total": self.total, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, mine in self.state_dict().items():
            put(mine, state[name], what=f"replay.{name}")

    def load_sampler(self, state: dict[str, Tensor]) -> None:
        """Restores the sampler in place; without rows there is nothing that its state is about."""
        if not int(self.total):
            self.sampler.forget()
            return
        for name, mine in self.sampler.state_dict().items():
            put(mine, state[name], what=f"sampler.{name}")


def fill_randomly(replay: Replay, spec: EnvSpec, members: int) -> None:
    """Fills every row of a replay with random numbers, in episodes of 100 rows, to measure speeds.

    Args: spec of the environments that would have made the rows; members, N, who acted.
    """
    generator = torch.Generator(replay.obs.device).manual_seed(0)
    if spec.dtype.is_floating_point:
        replay.obs.normal_(generator=generator)
    else:
        for block in replay.obs.view(-1).view(torch.uint8).split(1 << 28):
            high = 2 if spec.dtype == torch.bool else 256
            block.random_(0, high, generator=generator)
    if spec.continuous:
        replay.action.uniform_(-1, 1, generator=generator)
    else:
        replay.action.random_(0, spec.actions, generator=generator)
    replay.member.random_(0, members, generator=generator)
    replay.reward.uniform_(-1, 1, generator=generator)
    ends = torch.arange(replay.rows, device=replay.real.device).view(1, -1, 1) % 100
    replay.terminated.copy_((ends == 98).expand_as(replay.terminated))
    replay.real.copy_((ends != 99).expand_as(replay.real))
    replay.total.fill_(replay.rows)
    replay.sampler.added(torch.arange(replay.rows, device=replay.real.device))
