"""Times updates, training steps, environments and replay: `cerl bench {update,train,env,replay}`.

On a GPU, each part is captured and replayed as a CUDA graph where training does so.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cerl import draw, wiring
from cerl.bench.clock import Timing, device_name, microseconds, profiled
from cerl.bench.table import Output, Rows, Table
from cerl.config import Config, MinAtarEnv, SacConfig, load
from cerl.data import EnvSpec, Row
from cerl.device.pick import pick
from cerl.diagnose import measurements
from cerl.envs import make
from cerl.envs.api import VecEnv
from cerl.graph import captured
from cerl.learn import Learner
from cerl.replay import Replay, fill_randomly
from cerl.sampler import Sampling, sampler_of


def filled_learner(config: Config, spec: EnvSpec, device: torch.device) -> Learner:
    """A learner whose replay is full of random rows, so that it works as in the middle of a run.

    Args: spec of the environments whose rows replay would hold; device of networks and replay.
    """
    keys = draw.seed_keys(config.seeds, device=device)
    agent = wiring.make_agent(config, spec, device)
    replay = Replay(
        spec,
        keys=keys,
        capacity=config.replay.capacity,
        device=device,
        placement=config.replay.placement,
        sampler=sampler_of(config.replay.sampler),
    )
    fill_randomly(replay, spec, config.ensemble.members)
    return Learner(config, agent, agent.build(keys=keys), replay, keys=keys)


def first_seeds(count: int) -> tuple[int, ...]:
    """The seeds 0, 1, ...; `count` of them. Raises: ValueError for less than one."""
    if count < 1:
        raise ValueError(f"--seeds: expected a number of seeds from 1 on, got {count}")
    return tuple(range(count))


def update(
    *,
    presets: tuple[str, ...] = ("atari/paper-ddqn", "atari/paper-cerl"),
    seeds: int = 1,
    capacity: int = 1_000_000,
    observation: int = 17,
    actions: int = 6,
    precision: Literal["tf32", "fp32", "bf16"] = "tf32",
    compile: bool = False,
    profile: bool = False,
    timing: Timing = Timing(calls=50),
    output: Output = Output(),
) -> Rows:
    """Times one update with sampling from a full replay on the device, and its parts.

    Args:
        presets: presets whose agent, batch and optimiser are timed
        seeds: number of seeds, S
        capacity: rows of the replay, per seed
        observation: numbers in an observation (agent sac; other agents see 84 x 84 frames)
        actions: components of an action (agent sac; other agents have 18 actions)
        precision: precision of matrix products on a GPU
        compile: fuse the loss with torch.compile
        profile: print the kernels of an update with their times (CUDA)
    """
    place = pick(timing.device)
    table = Table("update", output, device=device_name(place))
    for preset in presets:
        changes = {
            "precision": precision,
            "compile": compile,
            "seeds": first_seeds(seeds),
            "replay": {"capacity": capacity},
        }
        config = load(preset, changes)
        envs = config.env.envs
        spec = EnvSpec("random", (84, 84), torch.uint8, 18, envs, 4, True, False)
        if isinstance(config.agent, SacConfig):
            spec = EnvSpec("random", (observation,), torch.float32, actions, envs, 1, True, False)
            spec = spec._replace(continuous=True)
        learner = filled_learner(config, spec, place)
        parts = {"update": captured(learner.update, place)} | update_parts(learner, place)
        for name, step in parts.items():
            table.add(
                {
                    "what": preset,
                    "part": name,
                    "S": seeds,
                    "N": config.ensemble.members,
                    "B": config.replay.batch,
                    "precision": precision,
                    "compiled": compile,
                    "microseconds": microseconds(step, place, calls=timing.calls),
                }
            )
        if profile:
            profiled(parts["update"], place)
        del learner, parts
    return table.finished()


def update_parts(learner: Learner, place: torch.device) -> dict[str, Callable[[], None]]:
    """The parts of an update as separate calls: sampling, gradients and optimisers, by name."""
    parts = {"sample": captured(lambda: _drop(learner.sample()), place)}
    for stage in range(len(learner.stages)):
        parts |= _stage_parts(learner, stage, place)
    return parts


def _stage_parts(
    learner: Learner, stage: int, place: torch.device
) -> dict[str, Callable[[], None]]:
    """Gradients and optimisers of one stage of an update (SAC has several), as separate calls."""
    window = learner.sample()
    dice = learner.agent.dice(learner.keys, learner.updates)
    grads, _ = learner.grads(window, stage=stage, dice=dice)

    def step() -> None:
        rest = grads
        for optimiser in learner.optimisers[stage]:
            optimiser.step(rest[: len(optimiser.leaves)])
            rest = rest[len(optimiser.leaves) :]

    which = f" of stage {stage + 1}" if len(learner.stages) > 1 else ""
    return {
        f"loss and gradients{which}": captured(
            lambda: _drop(learner.grads(window, stage=stage, dice=dice)), place
        ),
        f"optimiser{which}": captured(step, place),
    }


GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def env(
    *,
    games: tuple[str, ...] = GAMES,
    counts: tuple[int, ...] = (10, 1024, 8192, 65536),
    timing: Timing = Timing(calls=200),
    output: Output = Output(),
) -> Rows:
    """Times steps of the MinAtar games on the device: random actions, observations included.

    Args:
        games: MinAtar games
        counts: numbers of games that step together, E
    """
    place = pick(timing.device)
    table = Table("env", output, device=device_name(place), title="MinAtar")
    for game in games:
        for count in counts:
            config = MinAtarEnv.model_validate({"name": game, "envs": count})
            games_ = make(config, seeds=(0,), salt=0, device=place)
            games_.reset()
            key = draw.seed_keys((0,), device=place)
            counter = torch.zeros((), dtype=torch.int64, device=place)

            def step(games_: VecEnv = games_, key: Tensor = key, counter: Tensor = counter) -> None:
                actions = games_.spec.actions
                u = draw.randint(key, draw.ACTION, counter, (games_.spec.envs,), high=actions)
                games_.step(u)
                counter.add_(1)

            spent = microseconds(captured(step, place), place, calls=timing.calls)
            table.add(
                {
                    "what": game,
                    "games": count,
                    "microseconds a step": spent,
                    "million steps a second": count / spent,
                }
            )
    return table.finished()


def replay(
    *,
    capacity: int = 1_000_000,
    batch: int = 32,
    timing: Timing = Timing(calls=200),
    output: Output = Output(),
) -> Rows:
    """Times inserting into and sampling from a full replay of 84 x 84 frames, in stacks of 4.

    Args:
        capacity: rows of the replay; each holds one frame
        batch: windows in a sample
    """
    place = pick(timing.device)
    spec = EnvSpec("random", (84, 84), torch.uint8, 18, 1, 4, True, False)
    before = torch.cuda.memory_allocated(place) if place.type == "cuda" else 0
    ring = Replay(spec, keys=draw.seed_keys((0,), device=place), capacity=capacity, device=place)
    held = torch.cuda.memory_allocated(place) - before if place.type == "cuda" else 0
    fill_randomly(ring, spec, 1)
    zeros = torch.zeros(1, 1, dtype=torch.int64, device=place)
    flags = zeros.bool()
    frame = torch.zeros(1, 1, 84, 84, dtype=torch.uint8, device=place)
    row = Row(frame, zeros, zeros.float(), flags, ~flags, zeros)
    counter = torch.zeros((), dtype=torch.int64, device=place)

    sampling = Sampling(
        batch=batch,
        context=3,
        ahead=1,
        begins=False,
        members=1,
        batches="shared",
        probability=1.0,
        candidates=8,
    )

    def sample() -> None:
        ring.sample(sampling, step=counter)
        counter.add_(1)

    table = Table("replay", output, device=device_name(place))
    for name, step in {"insert": lambda: ring.add(row), "sample": sample}.items():
        spent = microseconds(captured(step, place), place, calls=timing.calls)
        table.add(
            {"what": name, "rows": capacity, "B": batch, "GB": held / 1e9, "microseconds": spent}
        )
    return table.finished()


def train(
    *,
    presets: tuple[str, ...] = ("minatar/bootdqn", "minatar/cerl"),
    seeds: int = 10,
    envs: tuple[int, ...] = (1, 8),
    compile: bool = False,
    profile: bool = False,
    timing: Timing = Timing(calls=200),
    output: Output = Output(),
) -> Rows:
    """Times the parts of a training step (act, env, insert, update) and the whole loop.

    Also times the diagnostics that are made whenever a run logs, and their share of training.

    Args:
        presets: presets whose training is timed
        seeds: number of seeds, S
        envs: environments per seed, E; every number given has rows of its own in the table
        compile: fuse the loss with torch.compile
        profile: print the kernels of one iteration with their times (CUDA)
    """
    name = device_name(pick(timing.device))
    table = Table("train", output, device=name, title="training")
    for preset in presets:
        for count in envs:
            changes = {
                "device": timing.device,
                "compile": compile,
                "seeds": first_seeds(seeds),
                "env": {"envs": count},
                "eval": {"episodes": 1},
            }
            config = load(preset, changes)
            _time_training(table, config, preset, calls=timing.calls, profile=profile)
    return table.finished()


def _time_training(table: Table, config: Config, preset: str, *, calls: int, profile: bool) -> None:
    """Adds a row for every part of a training step, and one for the whole."""
    parts = wiring.assemble(config)
    collector, learner, place = parts.collector, parts.learner, parts.device
    fill_randomly(parts.replay, parts.env.spec, config.ensemble.members)
    action = torch.zeros_like(collector.player.action)
    update = captured(learner.update, place)
    every, envs = config.schedule.update_every, parts.env.spec.envs
    steps = 0

    def learn() -> None:
        for _ in range((steps + envs) // every - steps // every):
            update()

    def iteration() -> None:
        nonlocal steps
        collector.step(learn)
        steps += envs

    def env_step() -> None:
        parts.env.step(action)

    halves = collector.player.halves
    # With environments on the host, the collector has captured these parts itself.
    resident = parts.env.spec.resident
    pieces: dict[str, Callable[[], None]] = {
        "act": captured(halves.decide, place) if resident else halves.decide,
        "env": captured(env_step, place) if resident else env_step,
        "insert and count": captured(halves.record, place) if resident else halves.record,
        "collect (the three)": collector.step,
        "sample": captured(lambda: _drop(learner.sample()), place),
        "update": update,
        "iteration": iteration,
        "diagnostics": lambda: _drop(measurements(learner, collector)),
    }
    whole_step = 0.0
    for name, step in pieces.items():
        logs = name == "diagnostics"  # they are made once in log.every agent steps
        spent = microseconds(step, place, calls=max(1, calls // 50) if logs else calls)
        whole = name == "iteration"
        whole_step = spent if whole else whole_step
        between = whole_step * config.log.every / envs  # training from one log to the next
        table.add(
            {
                "what": preset,
                "part": name,
                "S": len(config.seeds),
                "N": config.ensemble.members,
                "E": envs,
                "microseconds": spent,
                "agent steps a second, all seeds": envs * len(config.seeds) * 1e6 / spent
                if whole
                else None,
                "updates a second": envs / every * 1e6 / spent if whole else None,
                "% of training": 100 * spent / (spent + between) if logs else None,
            }
        )
    if profile:
        for name in ("collect (the three)", "update"):
            print(f"{preset}, E = {envs}, {name}")
            profiled(pieces[name], place)
    wiring.close(parts)


def _drop(_: object) -> None:
    """Drops the result of a part, since a captured function returns nothing."""
