"""A trained run as a policy: observations in, actions out. `cerl.load` is the way to one.

A run holds S seeds of N members each; a policy is one seed's. It plays what `cerl eval` plays: one
member, a vote of all, their mean, or a member that is drawn for every episode.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cerl import draw, envs
from cerl.agent import Agent, Network
from cerl.config import Config, evaluated
from cerl.config.options import INDIVIDUAL
from cerl.config.options import Policy as PolicyName
from cerl.data import ActInput, Carry, EnvSpec, Previous
from cerl.device.pick import pick
from cerl.device.precision import precision
from cerl.evaluate import AGGREGATES, EVAL_SALT, evaluation_keys, noise_of, without_mode
from cerl.evaluate_run import load_net
from cerl.record import trust
from cerl.record.folder import FILE, load_file
from cerl.wiring import make_agent


def load(
    run: str | os.PathLike[str],
    *,
    policy: PolicyName | None = None,
    member: int = 0,
    seed: int | None = None,
    epsilon: float = 0.0,
    device: str | None = None,
    trusted: bool = False,
) -> "Policy":
    """The policy of a run folder's newest intact checkpoint.

    Args:   policy, as in `eval.policies`: individual (one member), vote (the most frequent greedy
            action), mean (greedy in the mean Q, or the mean of the members' actions), random (a
            member drawn for every episode), individual_mode and mean_mode (agent sac: the modes of
            the members' distributions, not samples of them). None: the first aggregate (vote or
            mean) that the run evaluates, or individual where it evaluates none.
            member, from 0 to N - 1, who plays policies individual and individual_mode.
            seed, one of the run's seeds (None: the first).
            epsilon, probability of a random action.
            device, cpu, cuda or cuda:N (None: that of the run's config).
            trusted, the run may import a module even if it is somebody else's (as --trust).
    Raises: ConfigError if the folder holds no run, or a policy that the run's agent has not;
            CheckpointError if it holds no intact checkpoint; ValueError for an unknown seed, member
            or device.
    """
    folder = Path(run)
    config = load_file(folder / FILE)
    trust.check(config, folder, trusted=trusted)
    name = policy or _default(config)
    config = evaluated(config, {"policies": (name,), "epsilon": float(epsilon)})
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise ValueError(f"seed: expected one of {config.seeds}, got {seed}")
    members = config.ensemble.members
    if not 0 <= member < members:
        raise ValueError(f"member: expected 0 to {members - 1}, got {member}")
    place = pick(device or config.device)
    spec = spec_of(config, place)
    one, agent, net = of_seed(config, folder, seed=seed, spec=spec, device=place)
    return Policy(one, spec, agent, net, member=member, keys=_keys(one, place))


def of_seed(
    config: Config, folder: Path, *, seed: int, spec: EnvSpec, device: torch.device
) -> tuple[Config, Agent[Any, Any, Any], Network]:
    """The network of one seed, from the newest intact checkpoint of a run.

    Args:    config of the run, with the evaluation that the policy plays; folder of the run; spec
             of its environments.
    Returns: the config with this seed alone, and the agent and the network for it.
    Raises:  CheckpointError if the folder holds no intact checkpoint of such a network.
    """
    whole = make_agent(config, spec, torch.device("cpu")).build(keys=_keys(config, "cpu"))
    load_net(whole, folder)
    index, one = config.seeds.index(seed), config.model_copy(update={"seeds": (seed,)})
    agent = make_agent(one, spec, device)
    net = agent.build(keys=_keys(one, device))
    saved = whole.state_dict()
    for key, tensor in net.state_dict().items():
        # Parameters lead with an axis of seeds; a policy has one of them.
        values = saved[key]
        tensor.copy_(values if values.shape == tensor.shape else values[index : index + 1])
    return one, agent, net


def _default(config: Config) -> PolicyName:
    """The first aggregate that a run evaluates, else individual."""
    for name in config.eval.policies:
        if without_mode(name) in AGGREGATES:
            return name
    return "individual"


def _keys(config: Config, device: torch.device | str) -> Tensor:
    return evaluation_keys(config.seeds, torch.device(device))


def spec_of(config: Config, device: torch.device) -> EnvSpec:
    """What the environments of a run show and take, asked of one of them."""
    one = config.env.for_evaluation(1)
    env = envs.make(one, seeds=config.seeds[:1], salt=EVAL_SALT, device=device)
    try:
        return env.spec
    finally:
        env.close()


class Policy:
    """Acts for one environment or a batch of them; `load` makes it.

    `act` remembers what the network has to: earlier frames, the carry of a sequence network, the
    last action, who acts. So tell it by `reset` that an episode begins.

    Attributes: config, the run's, with this policy's seed and evaluation; spec, what an observation
                and an action are.
    """

    def __init__(
        self,
        config: Config,
        spec: EnvSpec,
        agent: Agent[Any, Any, Any],
        net: Network,
        *,
        member: int,
        keys: Tensor,
    ) -> None:
        self.config, self.spec = config, spec
        self._agent, self._net, self._keys = agent, net, keys
        (self._name,) = config.eval.policies
        kind = without_mode(self._name)
        self._aggregates: Sequence[str] = (kind,) if kind in AGGREGATES else ()
        # An aggregate's number is that after all members'; -1: drawn for every episode.
        members = config.ensemble.members
        self._who = members if self._aggregates else member if self._name in INDIVIDUAL else -1
        self._steps = torch.full((), draw.first_step(0), dtype=torch.int64, device=keys.device)
        # Sequence networks may read the last action and its reward.
        self._reads_action = getattr(config.encoder, "previous_action", False)
        self._reads_reward = getattr(config.encoder, "previous_reward", False)
        self._fresh = True  # nothing has been acted on since `reset()`
        self._begin(1)

    def reset(self, which: Any = None) -> None:
        """Tells that episodes begin with the next observation.

        Args:   which, a flag for every environment of the batch, [B] bool (None: all of them, and
                the next batch may be of another size).
        Raises: ValueError if there is another number of flags than of environments.
        """
        if which is None:
            self._fresh = True
            return
        flags = torch.as_tensor(which, dtype=torch.bool).to(self._keys.device).reshape(-1)
        if self._fresh:
            return  # nothing has been acted on
        if flags.shape[0] != self._envs:
            raise ValueError(f"reset: expected {self._envs} flags, got {flags.shape[0]}")
        self._start |= flags

    @torch.no_grad()
    def act(self, observation: Any, reward: Any = None) -> Any:
        """The action for an observation, or the actions for a batch of them.

        Args:    observation, numpy array or tensor [*spec.observation] or [B, *spec.observation],
                 as the run's environments show it (`config.env.observe` applied). reward, number or
                 [B], of the last action; needed by sequence networks with
                 `encoder.previous_reward`, ignored by others and where an episode begins.
        Returns: action [] or [B] int64, from 0 to spec.actions - 1; or where `spec.continuous`
                 [A] or [B, A] float32 in [-1, 1], to be scaled to the bounds of the environment.
                 A tensor on the observation's device if that is a tensor, else numpy.
        Raises:  ValueError for another shape or type, another number of environments than before,
                 or a reward that is missing.
        """
        given, obs = self._observed(observation)
        if self._fresh or (obs.shape[1] != self._envs and self._forgets):
            self._begin(obs.shape[1])
        elif obs.shape[1] != self._envs:
            raise ValueError(
                f"observation: expected a batch of {self._envs}, as before, got {obs.shape[1]}; "
                "call reset() first: another batch is another set of episodes"
            )
        seen = ActInput(obs, self._start, self._previous(reward), self._member)
        with precision(self.config.precision, obs.device):
            noise = noise_of(
                self.config,
                self.spec._replace(envs=self._envs),
                self._keys,
                self._steps,
                votes="vote" in self._aggregates,
                sampled=float(without_mode(self._name) == self._name),
            )
            if self._who < 0:
                drawn = (noise.member * self.config.ensemble.members).long()
                self._member.copy_(torch.where(self._start, drawn, self._member))
            decision = self._agent.act(
                self._net, seen, self._carry, noise=noise, evaluating=self._aggregates
            )
        self._action.copy_(decision.action)
        self._start.fill_(False)
        self._steps += 1
        self._fresh = False
        lone = given.dim() == len(self.spec.observation)
        action = decision.action[0, 0] if lone else decision.action[0]
        if isinstance(observation, Tensor):
            return action.to(observation.device)
        return action.cpu().numpy()[()]

    def _observed(self, observation: Any) -> tuple[Tensor, Tensor]:
        """An observation as it was given, and as networks read it, [1, B, *observation]."""
        spec = self.spec
        given = observation
        if not isinstance(given, Tensor):
            given = torch.from_numpy(np.array(observation))  # a copy: arrays may be read-only
        shape = tuple(given.shape)
        if shape != spec.observation and shape[1:] != spec.observation:
            raise ValueError(
                f"observation: expected {list(spec.observation)} or a batch of them, as "
                f"{spec.name} shows it to the agent, got {list(shape)}"
            )
        exact = spec.dtype != torch.float32  # images and flags: nothing is rounded unseen
        if given.dtype != spec.dtype and (exact or given.is_complex()):
            raise ValueError(f"observation: expected {spec.dtype}, got {given.dtype}")
        obs = given.to(self._keys.device, spec.dtype)
        return given, obs.reshape(1, -1, *spec.observation)

    def _begin(self, envs: int) -> None:
        """New episodes in so many environments."""
        device = self._keys.device
        self._envs = envs
        self._carry: Carry = self._net.carry(envs=envs, evaluating=True)
        self._start = torch.ones(1, envs, dtype=torch.bool, device=device)
        self._member = torch.full((1, envs), max(self._who, 0), device=device)
        self._action = self.spec.action(1, envs, device=device)
        # Whether every call stands by itself, so that the next batch may be of any size.
        reads = self._reads_action or self._reads_reward or self._who < 0
        self._forgets = not reads and not any(part.numel() for part in self._carry)

    def _previous(self, reward: Any) -> Previous:
        """What led to the observations, as replay stores it."""
        device = self._keys.device
        if reward is None:
            if self._reads_reward and not self._fresh:
                raise ValueError(
                    "reward: the network reads the reward of the last action; expected "
                    "act(observation, reward), got none (only the first call after reset() may)"
                )
            reward = 0.0
        values = torch.as_tensor(reward, dtype=torch.float32).to(device).reshape(1, -1)
        if values.shape[1] not in (1, self._envs):
            raise ValueError(f"reward: expected {self._envs} numbers, got {values.shape[1]}")
        if clip := self.config.replay.reward_clip:
            values = values.clamp(-clip, clip)
        action = self._action.nan_to_num(0.0, 0.0, 0.0) if self.spec.continuous else self._action
        return Previous(action, values.expand(1, self._envs))
