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
from cerl.agent import Agent, Network
from cerl.config import Config
from cerl.config.options import INDIVIDUAL
from cerl.data import EnvSpec
from cerl.envs.api import VecEnv
from cerl.explore import Noise
from cerl.player import Player

EVAL_SALT = 1  # keeps the seeds of simulators and noise apart from those of training
AGGREGATES = ("vote", "mean")
SAMPLES = 10  # actions of a member behind the diversity of continuous ones (Lin et al. 2024's code)
SYNC_EVERY = 64  # steps between looks at whether every lane of device-resident environments is done


class Result(NamedTuple):
    """What one policy scored; NaN where a lane played fewer episodes than the longest row."""

    returns: Tensor  # [S, K, episodes] float64 on the CPU; K = N if each member plays, else 1
    lengths: Tensor  # [S, K, episodes] agent steps
    diversity: Tensor  # [S, K] mean over the steps of what the agent calls diversity


class Lanes(NamedTuple):
    """What every lane has played, [S, lanes] each."""

    returned: Tensor  # float32, rewards of the episode under way
    steps: Tensor  # int64, agent steps of the episode under way
    played: Tensor  # int64, episodes that ended
    counted: Tensor  # float32, agent steps of all episodes
    diversity: Tensor  # float32, of the members' actions at this step
    diversities: Tensor  # float32, sum over all steps

    @classmethod
    def blank(cls, seeds: int, count: int, device: torch.device) -> "Lanes":
        """Lanes that have played nothing."""
        whole = {"steps": torch.int64, "played": torch.int64}
        dtypes = [whole.get(name, torch.float32) for name in cls._fields]
        return cls(*(torch.zeros(seeds, count, dtype=dtype, device=device) for dtype in dtypes))


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


def without_mode(policy: str) -> str:
    """The policy without its suffix: `individual_mode` -> `individual`."""
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
            # A policy's mode is its sample without noise.
            sampled.append(torch.full(own.shape, float(base == policy), device=device))
        # Who acts in a lane; -1: a member that is drawn for every episode.
        self.fixed = torch.cat(fixed).expand(seeds, count)
        self.sampled = torch.cat(sampled).view(1, -1, 1, 1, 1)
        slots = config.eval.slots or config.eval.episodes
        self.quota = max(config.eval.steps // slots, 1)  # agent steps of a lane, step-budget mode
        if config.eval.steps:
            self.rounds = self.quota  # no episode is shorter than a step
        else:
            self.rounds = -(-config.eval.episodes // slots)
        self.lane = Lanes.blank(seeds, count, device)
        self.scores = torch.zeros(2, seeds, count, self.rounds + 1, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
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
        """Plays until every lane has its episodes.

        Args:    number of the evaluation, 0 to 2**31 - 1: the same one plays the same episodes with
                 the same noise; stopped, asked at every step whether to give up.
        Returns: {policy: Result}; None where `stopped` said so.
        """
        for tensor in (*self.lane, self.done):
            tensor.zero_()
        self.scores.fill_(float("nan"))
        self.player.restart(number, steps=draw.first_step(number))
        every = SYNC_EVERY if self.player.env.spec.resident else 1
        while not bool(self.done):
            for _ in range(every):
                if stopped():
                    return None
                self.player.step()
        return self._results()

    @torch.no_grad()
    def decide(self) -> None:
        """Chooses who acts in every lane, and the actions."""
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
        self.lane.diversity.copy_(player.act(noise).diversity)

    @torch.no_grad()
    def record(self) -> None:
        """Adds the step taken to the lanes that still play; episodes that end become scores."""
        lane, player, step, real = self.lane, self.player, self.player.next, self.player.real()
        open_ = lane.played < self.rounds
        if self.config.eval.steps:
            open_ &= (lane.counted < self.quota) | (lane.steps > 0)
        live = real & open_
        returned = lane.returned + torch.where(live, step.reward, 0.0)
        steps = lane.steps + live
        over = live & (step.terminated | step.truncated)
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

    def _results(self) -> dict[str, Result]:
        scores = self.scores[..., : self.rounds].double().cpu()
        diversity = (self.lane.diversities / self.lane.counted.clamp(min=1.0)).cpu()
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
    """Keys of the evaluation's noise: never those of training."""
    return draw.seed_keys(seeds, salt=EVAL_SALT, device=device)
