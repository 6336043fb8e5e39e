"""The Evaluator: plays episodes without learning, with every member and with the aggregates.

A lane is one environment that plays episodes of one policy. Each lane plays a fixed number of
episodes. Taking the episodes that happen to finish first would favour short ones. The presets of
the paper use its code's budget of agent steps instead (eval.steps): a lane then plays whole
episodes until its share of the budget is spent.

Starts of episodes and noise depend on the number of the evaluation only, not on what was played
before. So a seed gets the same scores whichever seeds are evaluated beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import draw, explore
from cerl.agent import Agent, Network
from cerl.config import Config
from cerl.config.options import INDIVIDUAL
from cerl.data import EnvSpec
from cerl.envs.api import VecEnv
from cerl.explore import Noise
from cerl.player import Player
from cerl.value_error import Trace, value_errors

EVAL_SALT = 1  # keeps the seeds of simulators and noise apart from those of training
AGGREGATES = ("vote", "mean")
# Actions drawn from each member's policy to measure how diverse continuous actions are, as in the
# code of Lin et al. 2024.
SAMPLES = 10
# Agent steps between two checks on the host of whether all lanes are done, where the host has to
# wait for a GPU.
SYNC_EVERY = 64


class Result(NamedTuple):
    """The scores of one policy.

    Lanes with a budget of steps may play different numbers of episodes; NaN fills up the rest.
    """

    returns: Tensor  # [S, K, episodes] float64 on the CPU; K = N if each member plays, else 1
    lengths: Tensor  # [S, K, episodes] agent steps
    diversity: Tensor  # [S, K] mean over all steps of `Decision.diversity`
    # Of the policy `individual`: how wrong the values are that members predict for its steps,
    # {name: [S, N] float64 on the CPU}, see `cerl.value_error`. Empty for all other policies.
    errors: dict[str, Tensor] = {}


class Lanes(NamedTuple):
    """The counters of every lane, [S, lanes] each."""

    returned: Tensor  # float32, sum of rewards in the current episode
    steps: Tensor  # int64, agent steps of the current episode
    played: Tensor  # int64, episodes that ended
    counted: Tensor  # float32, agent steps of all episodes
    diversity: Tensor  # float32, diversity of the members' actions at this step
    diversities: Tensor  # float32, sum of `diversity` over all steps

    @classmethod
    def blank(cls, seeds: int, count: int, device: torch.device) -> "Lanes":
        """Counters at zero. Args: seeds, S; count, lanes of a seed."""
        whole = {"steps": torch.int64, "played": torch.int64}
        dtypes = [whole.get(name, torch.float32) for name in cls._fields]
        return cls(*(torch.zeros(seeds, count, dtype=dtype, device=device) for dtype in dtypes))


def lanes(config: Config) -> int:
    """Environments per seed that an evaluation needs."""
    return sum(_groups(config, p) * _slots(config, p) for p in config.eval.policies)


def _groups(config: Config, policy: str) -> int:
    """The number of scores that a policy gets: N if every member plays it alone, else 1."""
    return config.ensemble.members if policy in INDIVIDUAL else 1


def _slots(config: Config, policy: str) -> int:
    """The number of lanes for each score of a policy."""
    slots = config.eval.slots or config.eval.episodes
    return -(-slots // _groups(config, policy)) if config.eval.share else slots


def without_mode(policy: str) -> str:
    """The policy without its suffix: `individual_mode` -> `individual`."""
    return policy.removesuffix("_mode")


def _never() -> bool:
    return False


class Evaluator:
    """Plays episodes with the current parameters, without learning.

    It has its own environments, and nothing carries over from one evaluation to the next. Discrete
    actions are greedy, except for the share `eval.epsilon` of random ones. Continuous actions are
    sampled from the policy; the policies individual_mode and mean_mode use its mode instead.
    """

    def __init__(
        self,
        config: Config,
        env: VecEnv,
        agent: Agent[Any, Any, Any],
        net: Network,
        *,
        keys: Tensor,
    ) -> None:
        self.config = config
        seeds, device, count = len(keys), keys.device, lanes(config)
        if env.spec.envs != count:
            raise ValueError(f"evaluation needs {count} environments per seed, got {env.spec.envs}")
        members, policies = config.ensemble.members, config.eval.policies
        bases = dict.fromkeys(without_mode(policy) for policy in policies)
        aggregates = tuple(base for base in bases if base in AGGREGATES)
        fixed, sampled = [], []
        for policy in policies:
            base, mine = without_mode(policy), _slots(config, policy)
            if base == "individual":
                own = torch.arange(members, device=device).repeat_interleave(mine)
            else:
                who = -1 if base == "random" else members + aggregates.index(base)
                own = torch.full((mine,), who, device=device)
            fixed.append(own)
            # Multiplying the normal noise by 0 turns a sample into the mode of the policy.
            sampled.append(torch.full(own.shape, float(base == policy), device=device))
        # The member or aggregate that acts in each lane; -1: a member drawn for every episode.
        self.fixed = torch.cat(fixed).expand(seeds, count)
        self.sampled = torch.cat(sampled).view(1, -1, 1, 1, 1)
        slots = config.eval.slots or config.eval.episodes
        self.quota = max(config.eval.steps // slots, 1)  # agent steps of a lane, step-budget mode
        if config.eval.steps:
            # The most episodes that a lane can play, since each lasts at least one step.
            self.rounds = self.quota
        else:
            self.rounds = -(-config.eval.episodes // slots)
        self.lane = Lanes.blank(seeds, count, device)
        self.scores = torch.zeros(2, seeds, count, self.rounds + 1, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        self.gamma = agent.table.own_gamma
        # Only members predict values, and SAC's hold for sampled actions, not for modes.
        self.individual = self._lanes_of("individual")
        judged = self.individual.stop - self.individual.start
        self.trace = Trace(seeds, judged, steps=SYNC_EVERY, device=device) if judged else None
        self.player = Player(
            config,
            env,
            agent,
            net,
            keys=keys,
            decide=self.decide,
            record=self.record,
            how="whole" if env.spec.resident else "both halves",
            evaluating=aggregates,
        )

    @torch.no_grad()
    def run(self, number: int, *, stopped: Callable[[], bool] = _never) -> dict[str, Result] | None:
        """Plays until every lane has played its episodes.

        Args:    number of the evaluation, 0 to 2**31 - 1: with the same number episodes start the
                 same and draw the same noise; stopped, a function called at every step that returns
                 True to give the evaluation up.
        Returns: {policy: Result}; None if it was given up.
        Raises:  ValueError if number is out of range.
        """
        for tensor in (*self.lane, self.done):
            tensor.zero_()
        self.scores.fill_(float("nan"))
        self.player.restart(number, steps=draw.first_step(number))
        waits = self.player.env.spec.resident and self.done.device.type != "cpu"
        every = SYNC_EVERY if waits else 1
        played, history = 0, []
        while not bool(self.done):
            for _ in range(every):
                if stopped():
                    return None
                self.player.step()
            played += every
            if self.trace is not None and played % SYNC_EVERY == 0:
                history.append(self.trace.taken(SYNC_EVERY))
        if self.trace is not None:
            history.append(self.trace.taken(played % SYNC_EVERY))
        return self._results(history)

    @torch.no_grad()
    def decide(self) -> None:
        """Chooses the member that acts in every lane, and its action."""
        player = self.player
        noise = noise_of(
            self.config,
            player.env.spec,
            player.keys,
            player.steps,
            votes="vote" in (player.evaluating or ()),
            sampled=self.sampled,
        )
        drawn = (noise.member * self.config.ensemble.members).long()
        member = torch.where(player.start, drawn, player.member)
        player.member.copy_(torch.where(self.fixed < 0, member, self.fixed))
        decision = player.act(noise)
        self.lane.diversity.copy_(decision.diversity)
        if self.trace is not None:
            mine = self.individual
            self.trace.predict(decision.value[:, mine], decision.bonus[:, mine])

    @torch.no_grad()
    def record(self) -> None:
        """Counts this step for the lanes that still play, and stores the scores of episodes that
        ended."""
        lane, player, step, real = self.lane, self.player, self.player.next, self.player.real()
        open_ = lane.played < self.rounds
        if self.config.eval.steps:
            open_ &= (lane.counted < self.quota) | (lane.steps > 0)
        live = real & open_
        returned = lane.returned + torch.where(live, step.reward, 0.0)
        steps = lane.steps + live
        over = live & (step.terminated | step.truncated)
        if self.trace is not None:
            mine, reward = self.individual, player.clipped(step.reward)
            self.trace.add(player.steps, reward[:, mine], live[:, mine], over[:, mine])
        slot = torch.where(over, lane.played, self.rounds).unsqueeze(-1)
        for score, value in zip(self.scores, (returned, steps.float()), strict=True):
            score.scatter_(-1, slot, value.unsqueeze(-1))
        lane.diversities.add_(torch.where(live, lane.diversity, 0.0))
        lane.counted.add_(live)
        lane.played.add_(over)
        lane.returned.copy_(torch.where(over, 0.0, returned))
        lane.steps.copy_(torch.where(over, 0, steps))
        finished = lane.played >= self.rounds
        if self.config.eval.steps:
            finished |= (lane.counted >= self.quota) & (lane.steps == 0)
        self.done.copy_(finished.all())
        player.advance(real)

    def _lanes_of(self, policy: str) -> slice:
        """The lanes that play a policy; none if it is not evaluated."""
        at = 0
        for other in self.config.eval.policies:
            count = _groups(self.config, other) * _slots(self.config, other)
            if other == policy:
                return slice(at, at + count)
            at += count
        return slice(0, 0)

    def _results(self, history: list[Tensor]) -> dict[str, Result]:
        """The scores. Args: history, what `trace` gave, in order."""
        scores = self.scores[..., : self.rounds].double().cpu()
        diversity = (self.lane.diversities / self.lane.counted.clamp(min=1.0)).cpu()
        results, at = {}, 0
        for policy in self.config.eval.policies:
            groups, slots = _groups(self.config, policy), _slots(self.config, policy)
            part = slice(at, at + groups * slots)
            mine = scores[:, :, part].unflatten(2, (groups, slots)).flatten(3)
            # Columns in which no lane played an episode are dropped. The length tells: it is NaN
            # only if no episode was played, while a return may also be NaN.
            used = ~mine[1].isnan().flatten(0, 1).all(0)
            share = diversity[:, part].unflatten(1, (groups, slots)).mean(-1)
            results[policy] = Result(mine[0][..., used], mine[1][..., used], share)
            if policy == "individual":
                errors = value_errors(torch.cat(history), gamma=self.gamma, members=groups)
                results[policy] = results[policy]._replace(errors=errors)
            at += groups * slots
        return results


def noise_of(
    config: Config,
    spec: EnvSpec,
    keys: Tensor,
    step: Tensor,
    *,
    votes: bool,
    sampled: Tensor | float,
) -> Noise:
    """The random choices of one acting step of an evaluation, for `spec.envs` environments a seed.

    Args: keys [S]; step int64 []; votes, ties of a vote have to be broken; sampled, 0 where a
          continuous policy takes its mode for an action and 1 where a sample, broadcast to
          [S, E, K, N, A].
    """
    sizes = {"envs": spec.envs, "actions": spec.actions}
    eps = config.eval.epsilon
    if not spec.continuous:
        return explore.noise(keys, step, **sizes, eps=eps, votes=votes)
    members = config.ensemble.members
    noise = explore.continuous_noise(
        keys, step, **sizes, eps=eps, samples=SAMPLES, policies=members
    )
    return noise._replace(normal=noise.normal * sampled)


def evaluation_keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Random keys [S] int64 of evaluations; they differ from those of training."""
    return draw.seed_keys(seeds, salt=EVAL_SALT, device=device)
