"""The Collector: steps the environments with the members on duty and writes rows to replay.

It owns what lives between two steps of experience: the last Step, the carry of the acting network,
the member on duty of every environment, and running returns that the log reads. One call is one
CUDA graph where the environments are device-resident; elsewhere two, and between them the updates
run on the GPU while the simulators run on the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import explore
from cerl.agent import Agent
from cerl.config import Config, FramesConfig
from cerl.data import Previous, Row, Step
from cerl.device.precision import precision
from cerl.envs.api import VecEnv
from cerl.graph import captured, fused
from cerl.kernels.runtime.streams import parallel
from cerl.nets import carry
from cerl.record.checkpoint import put
from cerl.replay import Replay


class Running(NamedTuple):
    """Sums over the episode under way, [S, E] float32 each."""

    returned: Tensor  # unclipped rewards
    steps: Tensor
    value: Tensor  # what the acting member expected, at every step
    weight: Tensor  # sum of gamma^k over the steps so far: how often a reward now counts in them
    later: Tensor  # discounted clipped return-to-go with bonuses, summed over the steps


# What `finished` sums over the episodes that ended, by acting member.
FINISHED = ("episodes", "returned", "steps", "value", "later")


def _nothing() -> None:
    """No updates are due."""


class Collector:
    """Steps S x E environments; `step()` is one agent step of every one of them.

    `step(learn)` also makes the updates that are due once it is done: behind it where environments
    live on the device; elsewhere beside the simulators, whose time they hide, so that batches do
    not hold the very row that is being made. Actions are those of the newest parameters either way.
    """

    def __init__(
        self, config: Config, env: VecEnv, agent: Agent, net: Any, replay: Replay, *, keys: Tensor
    ) -> None:
        self.config, self.env, self.agent, self.net = config, env, agent, net
        self.replay, self.keys = replay, keys
        self.exploration = config.epsilon_schedule  # made here: torch.compile cannot trace it
        self.remembers = not isinstance(config.encoder, FramesConfig)
        on_device = replay.placement == "device"
        seeds, envs, device = len(keys), env.spec.envs, keys.device
        first = env.reset()
        self.last, self.next = first.clone(), first.clone()
        self.action = env.spec.action(seeds, envs, device=device)
        self.value = torch.zeros(seeds, envs, device=device)
        self.bonus = torch.zeros(seeds, envs, device=device)
        width = config.encoder.state_size
        self.before = torch.zeros(seeds, envs, width, device=device) if width else None
        self.carry = carry.new(config, net, env.spec, seeds=seeds, envs=envs, evaluating=False)
        # That a refresh looks back on: every layer sees keys made of as many rows before them.
        self.rows = min(config.rows_of_refresh, replay.rows)
        self.refresh = captured(self.refresh, device) if on_device else self.refresh
        self.start = torch.ones(seeds, envs, dtype=torch.bool, device=device)
        self.member = torch.zeros(seeds, envs, dtype=torch.int64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # loop iterations
        self.real_steps = torch.zeros(seeds, dtype=torch.int64, device=device)
        self.running = Running(*(torch.zeros(seeds, envs, device=device) for _ in Running._fields))
        shape = (seeds, config.ensemble.members, len(FINISHED))
        self.finished = torch.zeros(shape, dtype=torch.float64, device=device)
        self.ids = torch.arange(config.ensemble.members, device=device)
        fuse = config.compile and device.type == "cuda"
        self._deciding = fused(self._decide) if fuse else self._decide
        self._recording = fused(self._record) if fuse else self._record
        self.sent = None if env.spec.resident else torch.empty_like(self.action, device="cpu")
        self.arrived: torch.cuda.Event | None = None
        # True from the moment when simulators failed in a step, see `step`.
        self.lost = False
        if self.sent is not None and device.type == "cuda":
            self.sent, self.arrived = self.sent.pin_memory(), torch.cuda.Event()
        if env.spec.resident and on_device:
            self._whole = captured(self._whole, device)
        else:
            self.decide = captured(self.decide, device)
            self.record = captured(self.record, device) if on_device else self.record

    def step(self, learn: Callable[[], None] = _nothing) -> None:
        """One agent step of every environment, and `learn`, which makes the updates then due.

        Whatever simulators on the host raise is passed on. Some of them may have taken the step
        and others not, and its updates are made; so the step counts, as one that lost its
        simulators: `lost` is then True, and a state that is saved now goes on with new episodes
        everywhere (`load_state_dict`). Going on without loading it is not possible.
        """
        if self.sent is None:
            self._whole()
            learn()
            return
        self.decide()
        if self.arrived is not None:
            self.arrived.record()
        learn()
        if self.arrived is not None:
            self.arrived.synchronize()
        try:
            step = self.env.step(self.sent)
        except BaseException:
            self.lost = True
            self.steps += 1
            raise
        self.next.copy_(step)
        self.record()

    def _whole(self) -> None:
        self.decide()
        self.next.copy_(self.env.step(self.action))
        self.record()

    def decide(self) -> None:
        """First third of a step: draws members where episodes start, and their actions."""
        with precision(self.config.precision, self.keys.device):
            self._deciding()
        if self.sent is not None:
            self.sent.copy_(self.action, non_blocking=True)

    def record(self) -> None:
        """Last third of a step: writes the row of the step taken and counts it."""
        self._recording()

    @torch.no_grad()
    def _decide(self) -> None:
        config, spec = self.config, self.env.spec
        eps = explore.epsilon(self.exploration, self.steps * spec.envs)
        sizes = {"envs": spec.envs, "actions": spec.actions}
        if spec.continuous:
            noise = explore.continuous_noise(
                self.keys, self.steps, **sizes, eps=eps, samples=1, policies=1
            )
        else:
            noise = explore.noise(self.keys, self.steps, **sizes, eps=eps, votes=False)
        drawn = explore.duty(config.ensemble, noise.member)
        anew = self.start if config.ensemble.switch == "episode" else torch.ones_like(self.start)
        self.member.copy_(torch.where(anew, drawn, self.member))
        if self.before is not None:
            states = [part.view(*self.start.shape, -1) for part in self.carry]
            self.before.copy_(torch.cat(states, -1).masked_fill(self.start.unsqueeze(-1), 0.0))
        decision = self.agent.act(
            self.net,
            self.last.obs,
            self.start,
            self.carry,
            self.member,
            noise=noise,
            previous=self.previous() if self.remembers else None,
        )
        self.action.copy_(decision.action)
        self.value.copy_(decision.value)
        self.bonus.copy_(decision.bonus)

    def previous(self) -> Previous:
        """What led to the last step, as its rows in replay say it."""
        return Previous(self._stored(self.action), self._clipped(self.last.reward))

    def _stored(self, action: Tensor) -> Tensor:
        # What a diverged policy asks for is not learnt from by the members that share it.
        return action.nan_to_num(0.0, 0.0, 0.0) if self.env.spec.continuous else action

    def _clipped(self, reward: Tensor) -> Tensor:
        clip = self.config.replay.reward_clip
        return reward.clamp(-clip, clip) if clip else reward

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes what acting remembers from the last rows of replay and today's parameters."""
        window = self.replay.last(self.rows)
        carry.refill(self.config, self.net, window, self.carry, self.member)

    @torch.no_grad()
    def _record(self) -> None:
        last, step = self.last, self.next
        real = ~(last.terminated | last.truncated)
        reward, action = self._clipped(step.reward), self._stored(self.action)
        row = Row(last.obs, action, reward, step.terminated, real, self.member)
        parallel(
            self.keys.device,
            lambda: self.replay.add(row, self.before),
            lambda: self._count(step, reward, self.value, real),
        )
        self.start.copy_(~real)
        last.copy_(step)
        self.steps += 1

    def _count(self, step: Step, reward: Tensor, value: Tensor, real: Tensor) -> None:
        """Running sums; episodes that ended move into `finished` of the member that acted last."""
        run, gamma = self.running, self.config.loss.gamma
        weight = torch.where(real, run.weight * gamma + 1.0, 0.0)
        sums = Running(
            returned=torch.where(real, run.returned + step.reward, 0.0),
            steps=torch.where(real, run.steps + 1.0, 0.0),
            value=torch.where(real, run.value + value, 0.0),
            weight=weight,
            # A bonus counts in the returns of the steps before its own.
            later=torch.where(real, run.later + reward * weight + self.bonus * (weight - 1.0), 0.0),
        )
        for mine, new in zip(run, sums, strict=True):
            mine.copy_(new)
        done = (step.terminated | step.truncated) & real
        length = sums.steps.clamp(min=1.0)
        ended = [torch.ones_like(length), sums.returned, sums.steps, sums.value / length]
        ended.append(sums.later / length)
        mine = (self.member.unsqueeze(-1) == self.ids) & done.unsqueeze(-1)  # [S, E, N]
        table = torch.stack(ended, -1).unsqueeze(2)  # [S, E, 1, F]
        self.finished += torch.where(mine.unsqueeze(-1), table, 0.0).sum(1)
        self.real_steps += real.sum(1)

    def take_finished(self) -> dict[str, Tensor]:
        """Means over the training episodes since the last call, by member; syncs.

        Returns: {"episodes": [S, N], "return", "length", "value" (mean expected return), "mc" (mean
                 discounted clipped return-to-go, with the agent's bonuses; a truncated episode's
                 tail counts as 0)}, NaN without episodes.
        """
        sums = self.finished.cpu().clone()  # .cpu() is an alias on the CPU
        self.finished.zero_()
        count = sums[..., 0]
        names = ("return", "length", "value", "mc")
        means = {name: sums[..., k + 1] / count for k, name in enumerate(names)}
        return {"episodes": count, **means}

    def state_dict(self) -> dict:
        """All that a continuation needs; simulators that failed in a step are left out."""
        return {
            "last": list(self.last),
            "running": list(self.running),
            "carry": list(self.carry),
            "lost": self.lost,
            **{name: getattr(self, name) for name in _TENSORS},
            "env": {} if self.lost else self.env.state_dict(),
        }

    def load_state_dict(self, state: dict) -> bool:
        """Restores in place. Returns: True if the environments continued exactly.

        Where a simulator cannot be restored, or failed, the episodes under way are cut: one row
        that is not real follows, so their last rows bootstrap as truncated ones do. After a failure
        it is the row of the step that failed.
        """
        for name in _TENSORS:
            put(getattr(self, name), state[name], what=f"collector.{name}")
        for name in ("last", "running", "carry"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                put(mine, saved, what=f"collector.{name}")
        self.lost = False
        if state["lost"]:
            # Simulators that stopped in the middle of a step are no state to go on from. Steps
            # only grow, so these seeds of the simulators are new.
            fresh = self.env.restart(int(self.steps))
        else:
            fresh = self.env.load_state_dict(state["env"])
        if fresh is None:
            return True
        done = self.last.terminated | self.last.truncated
        cut = Row(
            self.last.obs,
            torch.zeros_like(self.action),
            torch.zeros_like(self.last.reward),
            torch.zeros_like(done),
            torch.zeros_like(done),
            self.member,
        )
        self.replay.add(cut)
        self.last.copy_(fresh)
        for mine in self.running:
            mine.zero_()
        self.start.fill_(True)
        return False


_TENSORS = ("action", "start", "member", "steps", "real_steps", "finished")
