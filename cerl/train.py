"""The loop: collect, learn, now and then evaluate, log, save. Everything is wired only here.

The updates of an iteration are handed to `Collector.step`, which knows when the GPU is free.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cerl import carry, checkpoint, draw, envs
from cerl import config as configuration
from cerl.agent import Agent
from cerl.agents.dqn import DQN, scalar_value
from cerl.agents.quantile import quantile_value
from cerl.agents.sac import SAC
from cerl.collect import Collector
from cerl.config import Config
from cerl.data import EnvSpec
from cerl.diagnose import diagnose, staleness
from cerl.envs.api import VecEnv
from cerl.evaluate import EVAL_SALT, Evaluator, Result, evaluation_keys, lanes
from cerl.graph import captured
from cerl.held import held
from cerl.learn import Learner
from cerl.log import Logger
from cerl.replay import Replay

FINISHED = "finished"  # file of a run folder whose run came to its end


class Parts(NamedTuple):
    """A wired run."""

    device: torch.device
    agent: Agent
    env: VecEnv
    replay: Replay
    learner: Learner
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
    """Sets this process up for a config. Returns: its device."""
    device = pick_device(config.device)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    return device


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent:
    """The agent of a config. Raises: ValueError if it cannot act in such an environment."""
    if spec.continuous != (config.agent == "sac"):
        kinds = ("discrete", "continuous")
        suited = "sac" if spec.continuous else "dqn or quantile"
        preset = "of mujoco" if spec.continuous else "of minatar or gym"
        if config.env.family in ("memory", "popgym"):
            preset = "popgym/sac-fox" if spec.continuous else "popgym/fox"
        raise ValueError(
            f"agent: {config.agent} chooses {kinds[not spec.continuous]} actions, and those of "
            f"{spec.name} are {kinds[spec.continuous]}; expected agent {suited} (a preset "
            f"{preset}, say), or another env.name"
        )
    if config.agent == "sac":
        return SAC(config, spec, device=device)
    kind = {"dqn": scalar_value, "quantile": quantile_value}[config.agent](config.loss)
    return DQN(config, spec, kind=kind, device=device)


def evaluation_env(config: Config, device: torch.device) -> VecEnv:
    """Environments of the evaluation: their own seeds, one lane each, episodes cut at the limit."""
    changes: dict = {"envs": lanes(config)}
    if config.env.family == "atari":
        changes["life_loss"] = False  # scores are of whole games
    own, limit = getattr(config.env, "time_limit", None), config.eval.time_limit
    if own is not None and (own or config.env.family == "minatar"):  # 0: else the task's own limit
        changes["time_limit"] = min(own or limit, limit)
    return envs.make(
        config.env.model_copy(update=changes), seeds=config.seeds, salt=EVAL_SALT, device=device
    )


def assemble(config: Config) -> Parts:
    """Builds every part of a run; allocates replay last-but-one, after checking that it fits."""
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
        remembered=config.remembered,
    )
    learner = Learner(config, agent, net, replay, keys=keys)
    collector = Collector(config, env, agent, net, replay, keys=keys)
    eval_keys = evaluation_keys(config.seeds, device)
    evaluator = Evaluator(config, evaluation_env(config, device), agent, net, keys=eval_keys)
    return Parts(device, agent, env, replay, learner, collector, evaluator)


def updates_by(config: Config, steps: int) -> int:
    """Updates that are due once `steps` agent steps of one seed are done."""
    schedule = config.schedule
    return max(0, steps - config.replay.start) // schedule.update_every * schedule.updates


def train(config: Config) -> Path:
    """Runs a config from the start. Returns: its run folder."""
    parts = assemble(config)
    folder = configuration.new_folder(config)
    with held(folder):
        logger = _logger(config, parts, folder)
        replay = parts.replay if config.log.save_replay else None
        checkpoints = checkpoint.Checkpoints(folder, replay)
        return _loop(config, parts, folder, checkpoints, first=0, refill=0, logger=logger)


def resume(folder: Path) -> Path:
    """Goes on from the newest checkpoint of a run folder: bit for bit where the simulator can.

    Raises: ValueError if there is nothing to resume, or another process is training the run.
    """
    config = configuration.load_file(folder / "config.yaml")
    if (folder / FINISHED).is_file():
        raise ValueError(f"{folder}: the run is finished; nothing to resume (cerl report {folder})")
    with held(folder):
        return _resume(config, folder)


def _resume(config: Config, folder: Path) -> Path:
    parts = assemble(config)
    loaded = checkpoint.newest(folder, replay=config.log.save_replay)
    state = loaded.state
    logger = _logger(config, parts, folder)
    checkpoint.match(template(parts), state)
    checkpoints = checkpoint.Checkpoints(folder, parts.replay if config.log.save_replay else None)
    checkpoints.restore(loaded)
    exact = restore(parts, logger, state)
    full = config.log.save_replay and loaded.replay is not None
    refill = 0 if full else config.replay.start
    for sentence in loaded.damaged:
        logger.note(sentence)
    logger.note(
        f"resumed at agent step {state['iteration'] * parts.env.spec.envs:,}"
        + ("" if exact else "; the simulator cannot be restored: episodes under way were cut")
        + (f"; replay was not saved: {refill:,} agent steps refill it" if refill else "")
    )
    run = (config, parts, folder, checkpoints)
    return _loop(*run, first=state["iteration"], refill=refill, logger=logger)


def _logger(config: Config, parts: Parts, folder: Path) -> Logger:
    return Logger(
        folder,
        config=config,
        spec=parts.env.spec,
        seeds=config.seeds,
        steps_total=config.schedule.steps,
    )


def snapshot(parts: Parts, logger: Logger, iteration: int) -> dict:
    """Everything that a continuation needs, but rows of replay."""
    return {
        "iteration": iteration,
        "learner": parts.learner.state_dict(),
        "collector": parts.collector.state_dict(),
        "evaluator": parts.evaluator.state_dict(),
        "logger": logger.state_dict(),
    }


def template(parts: Parts) -> dict:
    """What a snapshot of these parts looks like."""
    record = {"step": 0, "updates": 0, "wall_seconds": 0.0, "config_hash": ""}
    expected = {
        "iteration": 0,
        "learner": parts.learner.state_dict(),
        "collector": parts.collector.state_dict(),
        "evaluator": parts.evaluator.state_dict(),
        "logger": {**record, "latest": checkpoint.Free(checkpoint.numbers)},
    }
    if not parts.env.spec.resident:  # whose state has fixed shapes; simulators check their own
        expected["collector"]["env"] = checkpoint.Free()
        expected["evaluator"]["env"] = checkpoint.Free()
    return expected


def restore(parts: Parts, logger: Logger, state: dict) -> bool:
    """Loads a snapshot in place. Returns: True if the environments continued exactly."""
    parts.learner.load_state_dict(state["learner"])
    parts.evaluator.load_state_dict(state["evaluator"])
    logger.load_state_dict(state["logger"])
    return parts.collector.load_state_dict(state["collector"])


@contextlib.contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """True once Ctrl-C or SIGTERM came; the second one interrupts at once."""
    hit: list[int] = []

    def handler(number: int, frame: object) -> None:
        if hit:
            raise KeyboardInterrupt
        hit.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield lambda: bool(hit)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _loop(
    config: Config,
    parts: Parts,
    folder: Path,
    checkpoints: checkpoint.Checkpoints,
    *,
    first: int,
    refill: int,
    logger: Logger,
) -> Path:
    """Training from iteration `first` to the end; one iteration is E agent steps of every seed.

    Args: refill, agent steps without updates, which fill a replay that was not saved.
    """
    learner, collector, schedule = parts.learner, parts.collector, config.schedule
    envs_per_seed = parts.env.spec.envs
    last = -(-schedule.steps // envs_per_seed)
    on_device = parts.replay.placement == "device"
    updates = [learner.update_first, learner.update]
    if on_device:
        updates = [captured(update, parts.device) for update in updates]
    sync = captured(learner.sync, parts.device)
    done, iteration = updates_by(config, first * envs_per_seed), first

    def save() -> None:
        checkpoints.save(snapshot(parts, logger, iteration))

    with contextlib.closing(checkpoints), logger, stop_flag() as stopped:
        if words := _memory(parts):
            logger.note(words)
        for iteration in range(first + 1, last + 1):
            before, steps = (iteration - 1) * envs_per_seed, iteration * envs_per_seed

            def due(every: int, *, before: int = before, steps: int = steps) -> bool:
                return steps // every > before // every

            wanted = updates_by(config, steps)
            filled = before - first * envs_per_seed >= refill
            missing = range(done + 1, wanted + 1) if filled else range(0)

            def learn(*, missing: range = missing) -> None:
                for number in missing:
                    updates[number % schedule.policy_every == 0]()

            collector.step(learn)
            if config.refresh and wanted // config.refresh > done // config.refresh:
                collector.refresh()
            done = wanted
            checkpoints.stream()
            if schedule.target_rate == 1.0 and due(schedule.target_every):
                sync()
            end = iteration == last
            if due(config.log.every) or end:
                logger.training(steps, done, _measurements(config, parts))
                logger.episodes(
                    steps, done, collector.real_steps.cpu().clone(), collector.take_finished()
                )
            if due(config.eval.every) or end:
                logger.evaluation(
                    steps, done, collector.real_steps.cpu().clone(), parts.evaluator.run()
                )
            saving = due(config.log.checkpoint_every) or end or stopped()
            if saving:
                save()
            # A signal that came after the question waits for the next iteration's checkpoint.
            if saving and stopped() and not end:
                logger.note(f"interrupted; go on with: cerl train --resume {folder}")
                raise KeyboardInterrupt
            logger.progress(steps, done)
    close(parts)
    (folder / FINISHED).write_text(f"{schedule.steps} agent steps of one seed\n")
    return folder


def _memory(parts: Parts) -> str:
    """What sequence networks remember while acting, in words; empty without."""
    config, net, seeds = parts.learner.config, parts.learner.net, len(parts.learner.keys)
    sizes = []
    for env, evaluating in ((parts.env, False), (parts.evaluator.env, True)):
        size = carry.size(config, net, seeds=seeds, envs=env.spec.envs, evaluating=evaluating)
        sizes.append(size / 2**20)
    if not any(sizes):
        return ""
    return f"caches: {sizes[0]:,.1f} MiB of acting, {sizes[1]:,.1f} MiB of evaluation"


def close(parts: Parts) -> None:
    """Frees the simulators."""
    parts.env.close()
    parts.evaluator.env.close()


def _measurements(config: Config, parts: Parts) -> dict[str, Tensor]:
    """Training metrics and diagnostics, {name: [S, N] or [S]} on the host."""
    metrics = {name: value.cpu().clone() for name, value in parts.learner.metrics.items()}
    metrics["misses"] = parts.replay.misses.cpu().clone()
    if int(parts.learner.updates) > 0:
        metrics |= diagnose(parts.agent, parts.learner)
        if config.net.encoder != "frames":
            metrics |= staleness(parts.agent, parts.collector)
    return metrics


def evaluate(
    folder: Path,
    *,
    episodes: int | None = None,
    policies: tuple[str, ...] | None = None,
    epsilon: float | None = None,
) -> dict[str, Result]:
    """Evaluates a run's newest checkpoint with other episodes, policies or epsilon if given."""
    config = configuration.load_file(folder / "config.yaml")
    changes = {"episodes": episodes, "policies": policies, "epsilon": epsilon}
    asked = {name: value for name, value in changes.items() if value is not None}
    if episodes is not None:
        asked |= {"steps": 0, "slots": 0}
    data = config.model_dump() | {"eval": config.eval.model_dump() | asked}
    config = Config.model_validate(data)
    device = prepare(config)
    keys = evaluation_keys(config.seeds, device)
    env = evaluation_env(config, device)
    agent = make_agent(config, env.spec, device)
    net = agent.build(keys=keys)
    state = checkpoint.load(folder).state
    checkpoint.put_net(net, state["learner"]["net"], what="learner.net")
    try:
        return Evaluator(config, env, agent, net, keys=keys).run()
    finally:
        env.close()
