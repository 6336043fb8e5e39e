"""Returns of every member and of the aggregate.

Every lane (one environment of one policy) plays a fixed number of episodes, never the first to
finish, so short episodes are not favoured. The original's budget of agent steps stays for the paper
presets: a lane then plays whole episodes until its share of the budget is spent.

What a lane plays is counted from the number of the evaluation, never from what was played before,
so a seed scores the same whichever seeds play beside it, and however long those take.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import draw, explore
from cerl.agent import Agent
from cerl.config import Config, FramesConfig
from cerl.data import Previous, Step
from cerl.device.precision import precision
from cerl.envs.api import VecEnv
from cerl.explore import Noise
from cerl.graph import captured
from cerl.nets import carry
from cerl.record.results import INDIVIDUAL

AGGREGATES = ("vote", "mean")
SAMPLES = 10  # actions of a member behind the diversity of continuous ones (Lin et al. 2024's code)
SYNC_EVERY = 64  # steps between looks at whether every lane of device-resident environments is done


class Result(NamedTuple):
    """What one policy scored; NaN where a lane played fewer episodes than the longest row."""

    returns: Tensor  # [S, K, episodes] float64 on the CPU; K = N if each member plays, else 1
    lengths: Tensor  # [S, K, episodes] agent steps
    diversity: Tensor  # [S, K] mean over the steps of what the agent calls diversity


def lanes(config: Config) -> int:
    """Environments per seed that an evaluation needs."""
    return sum(_groups(config, p) * _slots(config, p) for p in config.eval.policies)


def _groups(config: Config, policy: str) -> int:
    """Members that play a policy each on their own, or 1."""
    return config.ensemble.members if policy in INDIVIDUAL else 1


def _slots(config: Config, policy: str) -> int:
    """Lanes of one member or aggregate."""
    slots = config.eval.slots or config.eval.episodes
    return -(-slots // _groups(config, policy)) if config.eval.share else slots


def _base(policy: str) -> str:
    """Whose actions a policy takes, their modes or not."""
    return policy.removesuffix("_mode")


def _never() -> bool:
    return False


class Evaluator:
    """Plays the current parameters without learning; owns its envs, and remembers nothing between
    two evaluations.

    Actions are greedy but for `eval.epsilon`; continuous ones are sampled, or modes where the
    policy says so.
    """

    def __init__(
        self, config: Config, env: VecEnv, agent: Agent, net: Any, *, keys: Tensor
    ) -> None:
        self.config, self.env, self.agent, self.net, self.keys = config, env, agent, net, keys
        seeds, device, count = len(keys), keys.device, lanes(config)
        if env.spec.envs != count:
            raise ValueError(f"evaluation needs {count} environments per seed, got {env.spec.envs}")
        members, policies = config.ensemble.members, config.eval.policies
        bases = dict.fromkeys(_base(policy) for policy in policies)
        self.aggregates = tuple(base for base in bases if base in AGGREGATES)
        fixed, sampled = [], []
        for policy in policies:
            base, mine = _base(policy), _slots(config, policy)
            if base == "individual":
                own = torch.arange(members, device=device).repeat_interleave(mine)
            else:
                who = -1 if base == "random" else members + self.aggregates.index(base)
                own = torch.full((mine,), who, device=device)
            fixed.append(own)
            # A policy's mode is its sample without noise.
            sampled.append(torch.full(own.shape, float(base == policy), device=device))
        self.fixed = torch.cat(fixed).expand(seeds, count)
        self.sampled = torch.cat(sampled).view(1, -1, 1, 1, 1)
        slots = config.eval.slots or config.eval.episodes
        self.quota = max(config.eval.steps // slots, 1)  # agent steps of a lane, step-budget mode
        if config.eval.steps:
            self.rounds = self.quota  # no episode is shorter than a step
        else:
            self.rounds = -(-config.eval.episodes // slots)
        zeros = {"returned": torch.float32, "steps": torch.int64, "played": torch.int64}
        self.lane = {k: torch.zeros(seeds, count, dtype=v, device=device) for k, v in zeros.items()}
        self.lane["diversity"] = torch.zeros(seeds, count, device=device)
        self.lane["counted"] = torch.zeros(seeds, count, device=device)
        self.scores = torch.zeros(2, seeds, count, self.rounds + 1, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        self.noise_step = torch.zeros((), dtype=torch.int64, device=device)
        self.member = torch.zeros_like(self.fixed)
        self.carry = carry.new(config, net, env.spec, seeds=seeds, envs=count, evaluating=True)
        self.start = torch.ones(seeds, count, dtype=torch.bool, device=device)
        self.action = env.spec.action(seeds, count, device=device)
        self.diversity = torch.zeros(seeds, count, device=device)
        self.last, self.next = (
            Step(
                torch.zeros(
                    seeds, count, *env.spec.observation, dtype=env.spec.dtype, device=device
                ),
                torch.zeros(seeds, count, device=device),
                *(torch.zeros(seeds, count, dtype=torch.bool, device=device) for _ in range(2)),
            )
            for _ in range(2)
        )
        self.decide, self.record = self._decide, self._record
        if env.spec.resident:
            self.advance = captured(self._step, device)
        else:
            self.decide = captured(self._decide, device)
            self.record = captured(self._record, device)
            self.advance = self._step

    @torch.no_grad()
    def run(self, number: int, *, stopped: Callable[[], bool] = _never) -> dict[str, Result] | None:
        """Plays until every lane has its episodes.

        Args:    number of the evaluation, 0 to 2**31 - 1: the same one plays the same episodes with
                 the same noise; stopped, asked at every step whether to give up.
        Returns: {policy: Result}; None where `stopped` said so.
        """
        for tensor in (*self.lane.values(), *self.carry, self.done, self.action, self.member):
            tensor.zero_()
        self.scores.fill_(float("nan"))
        self.start.fill_(True)
        self.noise_step.fill_(draw.first_step(number))
        self.last.copy_(self.env.restart(number))
        every = SYNC_EVERY if self.env.spec.resident else 1
        while not bool(self.done):
            for _ in range(every):
                if stopped():
                    return None
                self.advance()
        return self._results()

    def _step(self) -> None:
        self.decide()
        self.next.copy_(self.env.step(self.action))
        self.record()

    @torch.no_grad()
    def _decide(self) -> None:
        config = self.config
        noise = self._noise()
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
                previous=self._previous(),
                evaluating=self.aggregates,
            )
        self.action.copy_(decision.action)
        self.diversity.copy_(decision.diversity)
        self.noise_step += 1

    def _previous(self) -> Previous | None:
        """What led to the last step, as training would store it."""
        clip, reward = self.config.replay.reward_clip, self.last.reward
        if isinstance(self.config.encoder, FramesConfig):
            return None
        return Previous(self.action, reward.clamp(-clip, clip) if clip else reward)

    def _noise(self) -> Noise:
        spec, config = self.env.spec, self.config
        sizes = {"envs": spec.envs, "actions": spec.actions}
        at = (self.keys, self.noise_step)
        eps = config.eval.epsilon
        if not spec.continuous:
            return explore.noise(*at, **sizes, eps=eps, votes="vote" in self.aggregates)
        members = config.ensemble.members
        noise = explore.continuous_noise(*at, **sizes, eps=eps, samples=SAMPLES, policies=members)
        return noise._replace(normal=noise.normal * self.sampled)

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
        lane["diversity"] += torch.where(live, self.diversity, 0.0)
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
        diversity = (self.lane["diversity"] / self.lane["counted"].clamp(min=1.0)).cpu()
        results, at = {}, 0
        for policy in self.config.eval.policies:
            groups, slots = _groups(self.config, policy), _slots(self.config, policy)
            part = slice(at, at + groups * slots)
            mine = scores[:, :, part].unflatten(2, (groups, slots)).flatten(3)
            # Of an episode that was played the length is a number; the return may be NaN.
            used = ~mine[1].isnan().flatten(0, 1).all(0)
            share = diversity[:, part].unflatten(1, (groups, slots)).mean(-1)
            results[policy] = Result(mine[0][..., used], mine[1][..., used], share)
            at += groups * slots
        return results


def evaluation_keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Keys of the evaluation's noise: never those of training."""
    return draw.seed_keys(seeds, salt=EVAL_SALT, device=device)


EVAL_SALT = 1
