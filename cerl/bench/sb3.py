"""`cerl bench sb3`: one agent on one CPU thread, beside Stable-Baselines3 with the same sizes.

Both programs run in this process, by turns, with the same PyTorch. What counts is the CPU time of
the process, so other programs on the machine matter little. Stable-Baselines3 is not a dependency
of cerl; a folder of its own is enough, since what it needs is installed with cerl:

    pip install --no-deps --target sb3 stable-baselines3==2.9.2
    cerl bench sb3 --path sb3
"""

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch

from cerl import wiring
from cerl.arguments import maybe
from cerl.bench.clock import device_name
from cerl.bench.runs import filled_learner
from cerl.bench.table import Output, Rows, Table
from cerl.config import load
from cerl.data import EnvSpec
from cerl.graph import captured
from cerl.replay import fill_randomly

CPU = torch.device("cpu")
CAPACITY = 20_000  # rows of both replays
INSTALL = "pip install --no-deps --target sb3 stable-baselines3==2.9.2"

Call = Callable[[int], object]  # makes so many updates, or so many agent steps with their updates
Work = Literal["update", "loop"]


@dataclass(frozen=True)
class Task:
    """An agent of both programs with the same networks, batch and optimiser."""

    preset: str
    theirs: str  # the class of Stable-Baselines3
    name: str  # of the gymnasium task of the loop
    changes: Mapping[str, Any]  # of the preset
    options: Mapping[str, Any]  # of the class
    observation: int  # numbers in an observation of the timed update
    actions: int  # components of an action, or number of discrete ones


TASKS = {
    "sac": Task(
        "gym/pendulum",
        "SAC",
        "Pendulum-v1",
        {
            **{"net.hidden": (256, 256), "loss.gamma": 0.99, "optim.lr": 3e-4},
            **{"replay.batch": 256, "schedule.target_rate": 0.005, "agent.log_std": "clip"},
            **{"agent.log_std_min": -20.0, "agent.log_std_max": 2.0},
        },
        {"policy_kwargs": {"net_arch": [256, 256]}, "batch_size": 256},
        17,
        6,
    ),
    "dqn": Task(
        "gym/cartpole",
        "DQN",
        "CartPole-v1",
        {
            **{"net.hidden": (64, 64), "optim.lr": 1e-4, "optim.clip_norm": 10.0},
            **{"replay.batch": 32, "agent.double": False, "agent.loss": "huber"},
            **{"schedule.update_every": 1, "schedule.target_every": 10_000},
        },
        {
            **{"policy_kwargs": {"net_arch": [64, 64]}, "batch_size": 32},
            **{"train_freq": 1, "gradient_steps": 1},
        },
        4,
        2,
    ),
}


class Pair(NamedTuple):
    """The same work by both programs."""

    ours: Call
    theirs: Call


class Random(gymnasium.Env):
    """Random observations of the size of a task; any action does."""

    def __init__(self, task: Task, *, continuous: bool) -> None:
        spaces, size = gymnasium.spaces, (task.observation,)
        self.observation_space = spaces.Box(-np.inf, np.inf, size, np.float32)
        self.action_space = spaces.Discrete(task.actions)
        if continuous:
            self.action_space = spaces.Box(-1.0, 1.0, (task.actions,), np.float32)
        self.random, self.steps = np.random.default_rng(0), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self._seen(), 0.5, False, self.steps % 100 == 0, {}

    def _seen(self) -> np.ndarray:
        return self.random.standard_normal(self.observation_space.shape, dtype=np.float32)


def sb3(
    *,
    agents: tuple[Literal["sac", "dqn"], ...] = ("sac", "dqn"),
    works: tuple[Work, ...] = ("update", "loop"),
    rounds: int = 9,
    seconds: float = 1.0,
    path: Annotated[Path | None, maybe("FOLDER")] = None,
    output: Output = Output(),
) -> Rows:
    """Times one agent on one CPU thread against Stable-Baselines3, by turns in one process.

    Args:
        agents: sac, two critics and a policy of 2 x 256, B = 256; dqn, 2 x 64, B = 32
        works: update, with sampling, on random rows (sac: 17 numbers and 6 actions, dqn: 4 and 2);
            loop, agent steps with an update each, on Pendulum-v1 and CartPole-v1
        rounds: how often each program is timed; medians count
        seconds: how long a timing lasts, roughly
        path: folder that holds Stable-Baselines3, if it is not installed
    """
    if rounds < 1 or not seconds > 0:
        raise ValueError(
            f"expected --rounds from 1 on and --seconds above 0, got {rounds} and {seconds:g}"
        )
    library = _library(path)
    table = Table("sb3", output, device=f"{device_name(CPU)}, one thread")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for agent in agents:
            for work in works:
                pair = (_update if work == "update" else _loop)(TASKS[agent], library)
                spent = by_turns(pair, rounds=rounds, seconds=seconds)
                for program, each in zip(("cerl", "stable-baselines3"), spent, strict=True):
                    ratios = [b / a for a, b in zip(*spent, strict=True)]
                    mine = statistics.median(each)
                    table.add(
                        {
                            "what": agent,
                            "work": work,
                            "program": program,
                            "microseconds": mine,
                            "updates a second": 1e6 / mine,
                            "ratio": statistics.median(ratios) if program == "cerl" else 1.0,
                        }
                    )
    finally:
        torch.set_num_threads(threads)
    return table.finished()


def by_turns(pair: Pair, *, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """CPU microseconds of a unit of work in every round: of ours, and of theirs."""
    counts = []
    for call in pair:
        call(20)
        counts.append(max(1, int(seconds * 1e6 / _spent(call, 20))))
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for k in (0, 1) if number % 2 else (1, 0):
            spent[k].append(_spent(pair[k], counts[k]))
    return spent


def _spent(call: Call, count: int) -> float:
    begin = time.process_time()
    call(count)
    return (time.process_time() - begin) * 1e6 / count


def _library(path: Path | None) -> Any:
    """Stable-Baselines3. Raises: ImportError with the command that installs it."""
    if path is not None:
        sys.path.append(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("stable_baselines3")
    except ImportError as error:
        raise ImportError(
            f"Stable-Baselines3 cannot be imported ({error}); install it with\n    {INSTALL}\n"
            "and give the folder with --path sb3"
        ) from error
    finally:
        if path is not None:
            sys.path.remove(str(path))


def _model(task: Task, library: Any, env: Any) -> Any:
    """A model of Stable-Baselines3 that has made its first updates."""
    kind = getattr(library, task.theirs)
    options = {"buffer_size": CAPACITY, "learning_starts": 500, "device": "cpu", **task.options}
    model = kind("MlpPolicy", env, seed=0, verbose=0, **options)
    model.learn(600)
    return model


def _update(task: Task, library: Any) -> Pair:
    """An update with sampling, on random rows."""
    config = load(task.preset, {**task.changes, "seeds": (0,), "replay.capacity": CAPACITY})
    continuous = task.theirs == "SAC"
    size, actions = (task.observation,), task.actions
    spec = EnvSpec("random", size, torch.float32, actions, 1, 1, True, False, continuous)
    learner = filled_learner(config, spec, CPU)
    update = captured(learner.update, CPU)
    model = _model(task, library, Random(task, continuous=continuous))

    def ours(count: int) -> None:
        for _ in range(count):
            update()

    return Pair(ours, lambda count: model.train(count, model.batch_size))


def _loop(task: Task, library: Any) -> Pair:
    """Agent steps with an update each, logging and evaluations aside."""
    changes = {**task.changes, "seeds": (0,), "replay.capacity": CAPACITY, "device": "cpu"}
    parts = wiring.assemble(load(task.preset, {**changes, "threads": 1, "eval.episodes": 1}))
    fill_randomly(parts.replay, parts.env.spec, 1)
    update = captured(parts.learner.update, CPU)
    model = _model(task, library, task.name)

    def ours(count: int) -> None:
        for _ in range(count):
            parts.collector.step(update)

    def theirs(count: int) -> None:
        model.learn(count, reset_num_timesteps=False, log_interval=1 << 30)

    return Pair(ours, theirs)
