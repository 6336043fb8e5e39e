"""The parts of a run, and how they are put together: the only place that knows them all."""

import os
from typing import NamedTuple

import torch

from cerl import draw, envs
from cerl.agent import Agent
from cerl.agents.dqn import DQN
from cerl.agents.quantile import value_kind
from cerl.agents.sac import SAC
from cerl.collect import Collector
from cerl.config import Config, SacConfig
from cerl.data import EnvSpec
from cerl.divergence import Watch
from cerl.envs.api import VecEnv
from cerl.evaluate import EVAL_SALT, Evaluator, evaluation_keys, lanes
from cerl.learn import Learner
from cerl.replay import Replay

THREADS_A_CORE, FEW_THREADS = 4, 64  # many more than cores cannot be started, or crash


class Parts(NamedTuple):
    """A wired run."""

    device: torch.device
    agent: Agent
    env: VecEnv
    replay: Replay
    learner: Learner
    watch: Watch
    collector: Collector
    evaluator: Evaluator


def pick_device(name: str) -> torch.device:
    """The device of a config, made the current one where it has a number (kernels launch there).

    Raises: ValueError if it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(
            f"device: {name!r} asked for, but {count} CUDA devices are visible; use cpu"
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def prepare(config: Config) -> torch.device:
    """Sets this process up for a config. Returns: its device.

    Raises: ValueError for a device or a number of threads that this machine does not have.
    """
    device = pick_device(config.device)
    cores = os.cpu_count() or 1
    most = max(THREADS_A_CORE * cores, FEW_THREADS)
    for key, threads in (("", config.threads), ("env.", getattr(config.env, "threads", 0))):
        if threads > most:
            raise ValueError(
                f"{key}threads: expected at most {most} on this machine of {cores} cores, got "
                f"{threads}; 0 is one for each core"
            )
    torch.set_num_threads(config.threads or cores)
    return device


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent:
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
    parts.evaluator.env.close()
