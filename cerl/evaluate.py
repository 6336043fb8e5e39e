"""Returns of every member and of the aggregate.

Every lane (one environment of one policy) plays a fixed number of episodes, never the first to
finish, so short episodes are not favoured. The original's budget of agent steps stays for the paper
presets: a lane then plays whole episodes until its share of the budget is spent.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cerl import draw, explore
from cerl.agents.dqn import DQN, QNet
from cerl.checkpoint import put
from cerl.config import Config
from cerl.envs.api import VecEnv
from cerl.graph import captured
from cerl.precision import precision

AGGREGATES = ("vote", "mean")
SYNC_EVERY = 64  # steps between looks at whether every lane of device-resident environments is done


class Result(NamedTuple):
    """What one policy scored; NaN where a lane played fewer episodes than the longest row."""

    returns: Tensor  # [S, K, episodes] float64 on the CPU; K = N for `individual`, else 1
    lengths: Tensor  # [S, K, episodes] agent steps
    entropy: Tensor  # [S, K] mean entropy of the members' greedy actions, nats


def lanes(config: Config) -> int:
    """Environments per seed that an evaluation needs."""
    count = 0
    for policy in config.eval.policies:
        count += (
            config.ensemble.members * _slots(config) if policy == "individual" else _slots(config)
        )
    return count


def _slots(config: Config) -> int:
    """Lanes of one member or aggregate."""
    return config.eval.slots or config.eval.episodes


class Evaluator:
    """Plays the current parameters greedily but for `eval.epsilon`; owns its envs and noise."""

    def __init__(self, config: Config, env: VecEnv, agent: DQN, net: QNet, *, keys: Tensor) -> None:
        self.config, self.env, self.agent, self.net, self.keys = config, env, agent, net, keys
        seeds, device, count = len(keys), keys.device, lanes(config)
        if env.spec.envs != count:
            raise ValueError(f"evaluation needs {count} environments per seed, got {env.spec.envs}")
        members, slots = config.ensemble.members, _slots(config)
        self.aggregates = tuple(p for p in config.eval.policies if p in AGGREGATES)
        fixed: list[int] = []
        for policy in config.eval.policies:
            if policy == "individual":
                fixed += [k for k in range(members) for _ in range(slots)]
            elif policy == "random":
                fixed += [-1] * slots
            else:
                fixed += [members + self.aggregates.index(policy)] * slots
        self.fixed = torch.tensor(fixed, device=device).expand(seeds, count)
        self.quota = max(config.eval.steps // slots, 1)  # agent steps of a lane, step-budget mode
        if config.eval.steps:
            self.rounds = self.quota  # no episode is shorter than a step
        else:
            self.rounds = -(-config.eval.episodes // slots)
        zeros = {"returned": torch.float32, "steps": torch.int64, "played": torch.int64}
        self.lane = {k: torch.zeros(seeds, count, dtype=v, device=device) for k, v in zeros.items()}
        self.lane["entropy"] = torch.zeros(seeds, count, device=device)
        self.lane["counted"] = torch.zeros(seeds, count, device=device)
        self.scores = torch.zeros(2, seeds, count, self.rounds + 1, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        self.noise_step = torch.zeros((), dtype=torch.int64, device=device)
        self.member = torch.zeros_like(self.fixed)
        self.carry = net.encoder.carry(seeds, count, dtype=env.spec.dtype, device=device)
        self.start = torch.ones(seeds, count, dtype=torch.bool, device=device)
        self.action = torch.zeros_like(self.member)
        self.entropy = torch.zeros(seeds, count, device=device)
        self.last = env.reset().clone()
        self.next = self.last.clone()
        self.decide, self.record = self._decide, self._record
        if env.spec.resident:
            self.advance = captured(self._step, device)
        else:
            self.decide = captured(self._decide, device)
            self.record = captured(self._record, device)
            self.advance = self._step

    @torch.no_grad()
    def run(self) -> dict[str, Result]:
        """Plays until every lane has its episodes. Returns: {policy: Result}."""
        for tensor in (*self.lane.values(), self.scores, self.carry, self.done):
            tensor.zero_()
        self.scores.fill_(float("nan"))
        self.start.fill_(True)
        self.last.copy_(self.env.reset())
        every = SYNC_EVERY if self.env.spec.resident else 1
        while not bool(self.done):
            for _ in range(every):
                self.advance()
        return self._results()

    def _step(self) -> None:
        self.decide()
        self.next.copy_(self.env.step(self.action))
        self.record()

    @torch.no_grad()
    def _decide(self) -> None:
        config = self.config
        noise = explore.noise(
            self.keys,
            self.noise_step,
            envs=self.env.spec.envs,
            actions=self.env.spec.actions,
            eps=config.eval.epsilon,
            votes="vote" in self.aggregates,
        )
        drawn = (noise.member * config.ensemble.members).long()
        member = torch.where(self.start, drawn, self.member)
        self.member.copy_(torch.where(self.fixed < 0, member, self.fixed))
        with precision(config.precision, self.keys.device):
            decision = self.agent.act(
                self.net,
                self.last.obs,
                self.start,
                self.carry,
                self.member,
                noise=noise,
                evaluating=self.aggregates,
            )
        self.action.copy_(decision.action)
        self.entropy.copy_(decision.entropy)
        self.carry.copy_(decision.carry)
        self.noise_step += 1

    @torch.no_grad()
    def _record(self) -> None:
        lane, step = self.lane, self.next
        real = ~(self.last.terminated | self.last.truncated)
        open_ = lane["played"] < self.rounds
        if self.config.eval.steps:
            open_ &= (lane["counted"] < self.quota) | (lane["steps"] > 0)
        live = real & open_
        returned = lane["returned"] + torch.where(live, step.reward, 0.0)
        steps = lane["steps"] + live
        over = live & (step.terminated | step.truncated)
        slot = torch.where(over, lane["played"], self.rounds).unsqueeze(-1)
        for score, value in zip(self.scores, (returned, steps.float()), strict=True):
            score.scatter_(-1, slot, value.unsqueeze(-1))
        lane["entropy"] += torch.where(live, self.entropy, 0.0)
        lane["counted"] += live
        lane["played"] += over
        lane["returned"].copy_(torch.where(over, 0.0, returned))
        lane["steps"].copy_(torch.where(over, 0, steps))
        finished = lane["played"] >= self.rounds
        if self.config.eval.steps:
            finished |= (lane["counted"] >= self.quota) & (lane["steps"] == 0)
        self.done.copy_(finished.all())
        self.start.copy_(~real)
        self.last.copy_(step)

    def _results(self) -> dict[str, Result]:
        scores = self.scores[..., : self.rounds].double().cpu()
        entropy = (self.lane["entropy"] / self.lane["counted"].clamp(min=1.0)).cpu()
        results, at, slots = {}, 0, _slots(self.config)
        for policy in self.config.eval.policies:
            groups = self.config.ensemble.members if policy == "individual" else 1
            part = slice(at, at + groups * slots)
            mine = scores[:, :, part].unflatten(2, (groups, slots)).flatten(3)
            used = ~mine[0].isnan().flatten(0, 1).all(0)
            share = entropy[:, part].unflatten(1, (groups, slots)).mean(-1)
            results[policy] = Result(mine[0][..., used], mine[1][..., used], share)
            at += groups * slots
        return results

    def state_dict(self) -> dict:
        return {"noise_step": self.noise_step, "env": self.env.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        put(self.noise_step, state["noise_step"], what="evaluator.noise_step")
        self.env.load_state_dict(state["env"])


def evaluation_keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Keys of the evaluation's noise: never those of training."""
    return draw.seed_keys(seeds, salt=EVAL_SALT, device=device)


EVAL_SALT = 1
