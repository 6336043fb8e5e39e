"""The Collector: the player of training; it writes rows to replay and counts episodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import explore
from cerl.agent import Agent, Network
from cerl.config import Config
from cerl.data import Row, Step
from cerl.envs.api import VecEnv
from cerl.graph import captured
from cerl.kernels.runtime.streams import parallel
from cerl.player import Capture, Player, nothing
from cerl.replay import Replay
from cerl.state import put


class Running(NamedTuple):
    """Sums over the current, unfinished episode of every environment, [S, E] float32 each."""

    returned: Tensor  # unclipped rewards
    steps: Tensor  # agent steps
    value: Tensor  # values that the acting member predicted at the steps
    weight: Tensor  # sum of gamma^k over the steps so far: the factor of the next reward in `later`
    later: Tensor  # discounted clipped return-to-go with bonuses, summed over the steps


# Columns of `Collector.finished`: for each member that acted, sums over episodes that ended.
EPISODES = ("episodes", "returned", "steps", "value", "later")


class Collector:
    """Collects experience from S x E environments; `step()` is one agent step of each of them.

    Attributes that a checkpoint holds, beside those of the player: real_steps [S] int64, agent
    steps without the steps that only reset; running, sums over unfinished episodes; finished
    [S, N, EPISODES], sums over the episodes that ended since the last call of `take_finished`.
    """

    def __init__(
        self,
        config: Config,
        env: VecEnv,
        agent: Agent[Any, Any, Any],
        net: Network,
        replay: Replay,
        *,
        keys: Tensor,
    ) -> None:
        self.config, self.replay = config, replay
        self.exploration = config.epsilon_schedule  # made here: torch.compile cannot trace it
        self.rules = explore.rules_of(config.explore.rules)
        self.gamma = agent.table.own_gamma
        on_device, device = replay.placement == "device", keys.device
        how: Capture = "first half"
        if on_device:
            how = "whole" if env.spec.resident else "both halves"
        self.player = Player(
            config,
            env,
            agent,
            net,
            keys=keys,
            decide=self.decide,
            record=self.record,
            how=how,
            fuse=config.compile and device.type == "cuda",
        )
        self.player.begin(env.reset())
        lead, members = self.player.start.shape, config.ensemble.members
        self.value, self.bonus = (torch.zeros(lead, device=device) for _ in range(2))
        # The recurrent state before each step, if replay stores it (encoder.stored_state).
        width = config.encoder.state_size
        self.remembered = torch.zeros(*lead, width, device=device) if width else None
        self.refresh = captured(self._refill, device) if on_device else self._refill
        self.real_steps = torch.zeros(lead[0], dtype=torch.int64, device=device)
        self.running = Running(*(torch.zeros(lead, device=device) for _ in Running._fields))
        shape = (lead[0], members, len(EPISODES))
        self.finished = torch.zeros(shape, dtype=torch.float64, device=device)
        self.ids = torch.arange(members, device=device)

    def step(self, learn: Callable[[], None] = nothing) -> None:
        """One agent step of every environment; `learn` makes the updates that are then due."""
        self.player.step(learn)

    @torch.no_grad()
    def decide(self) -> None:
        """Draws the member on duty where an episode starts, and chooses everybody's actions."""
        ensemble, player = self.config.ensemble, self.player
        spec, at = player.env.spec, (player.keys, player.steps)
        eps = explore.epsilon(self.exploration, player.steps * spec.envs)
        sizes = {"envs": spec.envs, "actions": spec.actions}
        if spec.continuous:
            noise = explore.continuous_noise(*at, **sizes, eps=eps, samples=1, policies=1)
        else:
            noise = explore.noise(*at, **sizes, eps=eps, votes=False)
        drawn, start = explore.duty(ensemble, noise.member), player.start
        anew = start if ensemble.switch == "episode" else torch.ones_like(start)
        player.member.copy_(torch.where(anew, drawn, player.member))
        if self.remembered is not None:
            states = [part.view(*start.shape, -1) for part in player.carry]
            self.remembered.copy_(torch.cat(states, -1).masked_fill(start.unsqueeze(-1), 0.0))
        if self.rules:
            share = torch.as_tensor(eps, device=player.keys.device)
            moment = explore.Moment(*at, share, player.member, start, ensemble.members)
            noise = explore.ruled(self.rules, noise, moment)
        decision = player.act(noise)
        self.value.copy_(decision.value)
        self.bonus.copy_(decision.bonus)

    @torch.no_grad()
    def record(self) -> None:
        """Writes the row of this step to replay and adds it to the sums over episodes."""
        player, step, real = self.player, self.player.next, self.player.real()
        reward = player.clipped(step.reward)
        row = Row(player.last.obs, player.stored(), reward, step.terminated, real, player.member)
        parallel(
            player.keys.device,
            lambda: self._store(row, self.remembered),
            lambda: self._count(step, reward, real),
        )
        player.advance(real)

    def _store(self, row: Row, state: Tensor | None = None) -> None:
        """Adds a row to replay, unless replay.fixed says that it stays as it is."""
        if not self.config.replay.fixed:
            self.replay.add(row, state)

    def recent_rows(self) -> int:
        """The number of rows of replay that a refresh of the carry reads.

        Each layer looks back over `cache` rows, its own included, so the last of L layers needs
        L * cache rows. One more row holds the action and reward that led to the first of them.
        """
        return min(self.config.rows_of_refresh, self.replay.rows)

    @torch.no_grad()
    def _refill(self) -> None:
        """Recomputes the carry from the newest rows of replay with the current parameters."""
        player = self.player
        window = self.replay.last(self.recent_rows())
        player.net.refill(window, player.carry, player.member)

    def _count(self, step: Step, reward: Tensor, real: Tensor) -> None:
        """Updates the sums; an episode that ends is added to `finished` of its last member."""
        run = self.running
        weight = torch.where(real, run.weight * self.gamma + 1.0, 0.0)
        sums = Running(
            returned=torch.where(real, run.returned + step.reward, 0.0),
            steps=torch.where(real, run.steps + 1.0, 0.0),
            value=torch.where(real, run.value + self.value, 0.0),
            weight=weight,
            # A step's bonus counts in the return-to-go of all earlier steps, not in its own.
            later=torch.where(real, run.later + reward * weight + self.bonus * (weight - 1.0), 0.0),
        )
        for mine, new in zip(run, sums, strict=True):
            mine.copy_(new)
        done = (step.terminated | step.truncated) & real
        length = sums.steps.clamp(min=1.0)
        ended = [torch.ones_like(length), sums.returned, sums.steps, sums.value / length]
        ended.append(sums.later / length)
        mine = (self.player.member.unsqueeze(-1) == self.ids) & done.unsqueeze(-1)  # [S, E, N]
        table = torch.stack(ended, -1).unsqueeze(2)  # [S, E, 1, EPISODES]
        self.finished += torch.where(mine.unsqueeze(-1), table, 0.0).sum(1)
        self.real_steps += real.sum(1)

    def take_finished(self) -> dict[str, Tensor]:
        """Means over the training episodes since the last call, by member.

        Returns: {"episodes": [S, N], "return", "length", "value" (mean predicted value), "mc" (mean
                 discounted clipped return-to-go, with the agent's bonuses; rewards after a
                 truncation count as 0)}, float64 on the device, NaN without episodes.
        """
        sums = self.finished.clone()
        self.finished.zero_()
        count = sums[..., 0]
        names = ("return", "length", "value", "mc")
        means = {name: sums[..., k + 1] / count for k, name in enumerate(names)}
        return {"episodes": count, **means}

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs; simulators that failed in a step are left out."""
        return {
            **self.player.state_dict(),
            "running": list(self.running),
            "real_steps": self.real_steps,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores in place. Returns: True if the environments continue exactly.

        If a simulator cannot be restored, or had failed, all unfinished episodes are cut: one row
        with `real = False` is added, so the rows before it bootstrap as after a truncation. If a
        step had failed, this row takes the place of that step.
        """
        for name in ("real_steps", "finished"):
            put(getattr(self, name), state[name], what=f"collector.{name}")
        for mine, saved in zip(self.running, state["running"], strict=True):
            put(mine, saved, what="collector.running")
        player = self.player
        first = player.load_state_dict(state)
        if first is None:
            return True
        nowhere = torch.zeros_like(player.start)
        action, reward = torch.zeros_like(player.action), torch.zeros_like(player.last.reward)
        self._store(Row(player.last.obs, action, reward, nowhere, nowhere, player.member))
        for mine in self.running:
            mine.zero_()
        player.begin(first)
        return False
