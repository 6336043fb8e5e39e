"""Builds the parts of a run (environments, agent, replay, learner, ...) and connects them.

This is the only module that imports all of them.
"""

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
from cerl.diagnose import measures_of
from cerl.divergence import Watch
from cerl.envs.api import VecEnv
from cerl.evaluate import EVAL_SALT, Evaluator, evaluation_keys, lanes
from cerl.footprint.estimate import estimate, explaining
from cerl.footprint.reservation import Reservation, reserved
from cerl.learn import Learner
from cerl.replay import Replay
from cerl.sampler import sampler_of


class Parts(NamedTuple):
    """The parts of a run."""

    device: torch.device
    agent: Agent[Any, Any, Any]
    env: VecEnv
    replay: Replay
    learner: Learner
    watch: Watch
    collector: Collector
    evaluator: Evaluator


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent[Any, Any, Any]:
    """The agent of a config. Raises: ValueError if its actions are not those of the environment."""
    agent = config.agent
    if spec.continuous != isinstance(agent, SacConfig):
        kinds = ("discrete", "continuous")
        suited = "sac" if spec.continuous else "dqn or quantile"
        raise ValueError(
            f"agent.name: {agent.name} chooses {kinds[not spec.continuous]} actions, but "
            f"{spec.name} takes {kinds[spec.continuous]} ones; expected agent {suited} (for example"
            f" a preset {config.env.examples[kinds[spec.continuous]]}), or another env.name"
        )
    if isinstance(agent, SacConfig):
        return SAC(config, spec, device=device)
    return DQN(config, spec, kind=value_kind(agent), device=device)


def evaluation_env(config: Config, device: torch.device) -> VecEnv:
    """The environments of an evaluation, one for each lane, with seeds of their own; episodes are
    cut after eval.time_limit agent steps."""
    return envs.make(
        config.env.for_evaluation(lanes(config)),
        seeds=config.seeds,
        salt=EVAL_SALT,
        device=device,
        longest=config.eval.time_limit,
    )


@contextlib.contextmanager
def reserved_for(config: Config) -> Iterator[Reservation]:
    """Reserves the memory that a run needs, as a context around the run.

    Raises: RuntimeError if it does not fit, before anything is allocated.
    """
    needs = estimate(config, device=prepare(config), agent=make_agent)
    with reserved(needs) as reservation, explaining(needs):
        yield reservation


def assemble(config: Config) -> Parts:
    """Builds all parts of a run, with a freshly initialised network and an empty replay."""
    device = prepare(config)
    measures_of(config.log.measures)  # so that a wrong name is told before the training
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
    """Closes the simulators of training and evaluation."""
    parts.env.close()
    parts.evaluator.player.env.close()
