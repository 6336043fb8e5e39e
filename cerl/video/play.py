"""Plays a run's policies for a video, one after the other agent step, and judges what they see."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cerl.agent import Agent, Network
from cerl.config import Config, evaluated
from cerl.config.options import Policy as PolicyName
from cerl.data import ActInput, Previous
from cerl.device.precision import precision
from cerl.evaluate import AGGREGATES, evaluation_keys, without_mode
from cerl.nets.fox import Fox
from cerl.nets.rings import FoxCarry
from cerl.nets.trunk import Block, Trunk
from cerl.policy import Policy
from cerl.video.scene import Scene


class Seat(NamedTuple):
    """Who plays in a panel."""

    title: str
    policy: PolicyName
    member: int  # of individual policies; 0 for aggregates


class Moment(NamedTuple):
    """A panel at one observation of its episode."""

    obs: np.ndarray  # [*observation], as the agent sees it
    episode: int  # counted from 1
    step: int  # agent steps since the episode began
    returned: float  # sum of the episode's rewards so far
    over: bool  # the observation is the last of its episode
    value: float  # the largest of `values`; NaN at a terminal observation, as are `values`
    values: np.ndarray  # [A] or [1], of this member, or the mean of all members where they decide
    action: int  # the action taken; -1 where actions are continuous
    duty: np.ndarray  # [N] bool, the members whose choice was followed
    gates: np.ndarray  # [H] forget gates of the first layer, the mean of those on duty; or [0]


class Cast(NamedTuple):
    """The network of one seed and what its policies are made of."""

    config: Config  # with this seed alone
    agent: Agent[Any, Any, Any]
    net: Network

    def policy(self, seat: Seat, scene: Scene) -> Policy:
        """The policy of a seat, at the beginning of an evaluation."""
        config = evaluated(self.config, {"policies": (seat.policy,)})
        keys = evaluation_keys(config.seeds, self.device)
        return Policy(config, scene.spec, self.agent, self.net, member=seat.member, keys=keys)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device


class Judge:
    """Asks every member for its values of what a policy sees, and for its forget gates.

    It has a carry of its own, in which every member is an environment that sees the same.
    """

    def __init__(self, cast: Cast, scene: Scene) -> None:
        self._cast, self._clip = cast, cast.config.replay.reward_clip
        members, device = cast.config.ensemble.members, cast.device
        self._carry = cast.net.carry(envs=members, evaluating=False)
        self._start = torch.ones(1, members, dtype=torch.bool, device=device)
        self._member = torch.arange(members, device=device).view(1, -1)
        self._action = scene.spec.action(1, members, device=device)
        trunks = [part for part in _modules(cast.net) if isinstance(part, Trunk)]
        first = trunks[0].blocks[0] if trunks else None
        mix = first.mix if isinstance(first, Block) else None
        self._gated = isinstance(mix, Fox) and mix.parts.gate != "none"
        self._carried = first.carried if isinstance(first, Block) else 0

    @torch.no_grad()
    def values(self, obs: Tensor, reward: float) -> np.ndarray:
        """Values of all actions by every member [N, A]; SAC: of its policy's mode [N, 1].

        Args: obs [*observation]; reward of the last action.
        """
        members = self._member.shape[1]
        reward = max(-self._clip, min(self._clip, reward)) if self._clip else reward
        rewards = torch.full(self._start.shape, reward, device=obs.device)
        previous = Previous(self._action.nan_to_num(), rewards)
        everyone = obs.expand(1, members, *obs.shape)
        seen = ActInput(everyone, self._start, previous, self._member)
        with precision(self._cast.config.precision, obs.device):
            found = self._cast.agent.judge(self._cast.net, seen, self._carry)
        self._began = bool(self._start.all())
        self._start.fill_(False)
        return found[0].float().cpu().numpy()

    def gates(self) -> np.ndarray:
        """The members' forget gates at the last observation, first layer [N, H].

        [N, 0] without gates, and NaN where an episode begins: a first row has nothing to forget.
        """
        members = self._member.shape[1]
        if not self._gated:
            return np.zeros((members, 0))
        cache = FoxCarry.of(list(self._carry[: self._carried])).cache
        heads = cache.decay.shape[1]
        if self._began:
            return np.full((members, heads), np.nan)
        # The cache keeps sums of log gates, so the newest gate is the difference of two sums. Where
        # a lap round the ring begins, the sums begin anew.
        at = (cache.position[:, :1].long() - 1) % cache.decay.shape[3]  # [G, 1]
        sums = cache.decay.double().sum(2)  # [G, H, R]
        slot = at.unsqueeze(1).expand(-1, heads, 1)
        before = sums.gather(2, (slot - 1).clamp(min=0)).masked_fill(slot == 0, 0.0)
        gates = (sums.gather(2, slot) - before)[..., 0].exp()  # [G, H]
        # Streams are those of the acting members [N], or of all members in all environments.
        streams = torch.arange(members, device=gates.device)
        if len(gates) > members:
            streams = streams * (members + 1)
        return gates[streams].cpu().numpy()

    def took(self, action: Tensor) -> None:
        """Tells the action taken, [] or [A]."""
        self._action.copy_(action.expand_as(self._action))

    def reset(self) -> None:
        """Tells that an episode begins with the next observation."""
        self._start.fill_(True)
        self._action.zero_()


def _modules(net: Any) -> Iterator[Any]:
    return iter(net.modules())


def moments(cast: Cast, seat: Seat, scene: Scene, *, episodes: int) -> Iterator[Moment]:
    """Plays whole episodes, the same ones in every call.

    When it yields a moment, the scene stands at that moment's observation.
    """
    policy, judge = cast.policy(seat, scene), Judge(cast, scene)
    step = scene.restart()
    episode, steps, returned = 1, 0, 0.0
    while True:
        obs, reward = step.obs[0, 0], float(step.reward)
        returned += reward
        over = bool(step.terminated) or bool(step.truncated)
        action = policy.act(obs, reward)
        values = judge.values(obs, reward)  # [N, A]
        shown = _moment(seat, action, values, judge.gates(), continuous=scene.spec.continuous)
        if bool(step.terminated):
            # A terminal observation has no value: nothing follows it.
            shown = shown._replace(value=math.nan, values=np.full_like(shown.values, math.nan))
        yield shown._replace(
            obs=obs.cpu().numpy(), episode=episode, step=steps, returned=returned, over=over
        )
        if over and episode == episodes:
            return
        judge.took(action)
        step = scene.step(action)
        steps += 1
        if over:
            episode, steps, returned = episode + 1, 0, 0.0
            policy.reset()
            judge.reset()


def _moment(
    seat: Seat, action: Tensor, values: np.ndarray, gates: np.ndarray, *, continuous: bool
) -> Moment:
    """The part of a moment that the members decide. Args: values [N, A]; gates [N, H]."""
    members = len(values)
    together = without_mode(seat.policy) in AGGREGATES
    duty = np.arange(members) == seat.member
    taken = -1 if continuous else int(action)
    if together:
        greedy = values.argmax(1)
        duty = np.ones(members, bool)
        if without_mode(seat.policy) == "vote":
            duty = greedy == taken
    own = values.mean(0) if together else values[seat.member]
    some = duty if duty.any() else np.ones(members, bool)
    return Moment(
        obs=np.zeros(0),
        episode=0,
        step=0,
        returned=math.nan,
        over=False,
        value=float(own.max()),
        values=own,
        action=taken,
        duty=duty,
        gates=gates[some].mean(0),
    )
