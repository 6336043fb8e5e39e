"""The parts of a run, and how they are put together: the only place that knows them all."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from cerl import draw, envs
from cerl.agent import Agent
from cerl.agents.dqn import DQN
from cerl.agents.sac import SAC
from cerl.agents.values import value_kind
from cerl.collect import Collector
from cerl.config import Config, SacConfig
from cerl.data import EnvSpec
from cerl.device.pick import prepare
from cerl.divergence import Watch
from cerl.envs.api import VecEnv
from cerl.evaluate import EVAL_SALT, Evaluator, evaluation_keys, lanes
from cerl.footprint.estimate import estimate, explaining
from cerl.footprint.reservation import Reservation, reserved
from cerl.learn import Learner
from cerl.replay import Replay
from cerl.sampler import sampler_of


class Parts(NamedTuple):
    """A wired run."""

    device: torch.device
    agent: Agent[Any, Any, Any]
    env: VecEnv
    replay: Replay
    learner: Learner
    watch: Watch
    collector: Collector
    evaluator: Evaluator


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent[Any, Any, Any]:
    """The agent of a config. Raises: ValueError if it cannot act in such an environment."""
    agent = config.agent
    if spec.continuous != isinstance(agent, SacConfig):
        kinds = ("discrete", "continuous")
        suited = "sac" if spec.continuous else "dqn or quantile"
        raise ValueError(
            f"agent.name: {agent.name} chooses {kinds[not spec.continuous]} actions, and those of "
            f"{spec.name} are {kinds[spec.continuous]}; expected agent {suited} (a preset "
            f"{config.env.examples[kinds[spec.continuous]]}, say), or another env.name"
        )
    if isinstance(agent, SacConfig):
        return SAC(config, spec, device=device)
    return DQN(config, spec, kind=value_kind(agent), device=device)


def evaluation_env(config: Config, device: torch.device) -> VecEnv:
    """Environments of the evaluation: their own seeds, one lane each, episodes cut at the limit."""
    return envs.make(
        config.env.for_evaluation(lanes(config)),
        seeds=config.seeds,
        salt=EVAL_SALT,
        device=device,
        longest=config.eval.time_limit,
    )


@contextlib.contextmanager
def reserved_for(config: Config) -> Iterator[Reservation]:
    """Memory for a run. Raises: RuntimeError, before anything is allocated, if it does not fit."""
    needs = estimate(config, device=prepare(config), agent=make_agent)
    with reserved(needs) as reservation, explaining(needs):
        yield reservation


def assemble(config: Config) -> Parts:
    """Builds every part of a run."""
    device = prepare(config)
    keys = draw.seed_keys(config.seeds, device=device)
    env = envs.make(config.env, seeds=config.seeds, salt=0, device=device)
    agent = make_agent(config, env.spec, device)
    net = agent.build(keys=keys)
    replay = Replay(
        env.spec,
        keys=keys,
        capacity=config.replay.capacity,
        device=device,
        placement=config.replay.placement,
        remembered=config.encoder.state_size,
        sampler=sampler_of(config.replay.sampler),
    )
    learner = Learner(config, agent, net, replay, keys=keys)
    collector = Collector(config, env, agent, net, replay, keys=keys)
    eval_keys = evaluation_keys(config.seeds, device)
    evaluator = Evaluator(config, evaluation_env(config, device), agent, net, keys=eval_keys)
    watch = Watch(config, learner)
    return Parts(device, agent, env, replay, learner, watch, collector, evaluator)


def close(parts: Parts) -> None:
    """Frees the simulators."""
    parts.env.close()
    parts.evaluator.player.env.close()
