"""Benchmarks as commands: `cerl bench {update,env,replay,train}`; each prints one table.

Times are of CUDA-graph replays between device events (wall time on the CPU), medians over repeats, with
the device, precision and shapes in the table. Compare ratios within one run, not runs.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cerl import draw, train as training
from cerl.config import Config, load
from cerl.data import EnvSpec, Row
from cerl.envs import make
from cerl.graph import captured
from cerl.learn import Learner
from cerl.replay import Replay

Rows = list[dict[str, object]]


def microseconds(step: Callable[[], None], device: torch.device, *, calls: int, repeats: int = 5) -> float:
    """Median time of one call, after warm-up (and capture)."""
    for _ in range(6):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            for _ in range(calls):
                step()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) * 1e3 / calls)
        else:
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            times.append((time.perf_counter() - begin) * 1e6 / calls)
    return statistics.median(times)


def show(title: str, rows: Rows, out: Path | None) -> None:
    """Prints rows as a table; writes them as JSON lines if asked."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right" if name not in ("what", "variant") else "left")
    for row in rows:
        cells = [f"{v:,.1f}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*cells)
    Console(width=140).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            for row in rows:
                file.write(json.dumps({"table": title, **row}) + "\n")


def device_name(device: torch.device) -> str:
    """What the table says about the machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def filled_learner(config: Config, spec: EnvSpec, device: torch.device) -> Learner:
    """A learner on a full replay of random rows (episodes of 100 rows), as in the middle of a run."""
    keys = draw.seed_keys(config.seeds, device=device)
    agent = training.make_agent(config, spec, device)
    replay = Replay(spec, keys=keys, capacity=config.replay.capacity, device=device)
    fill_randomly(replay, spec, config.ensemble.members)
    return Learner(config, agent, agent.build(keys=keys), replay, keys=keys)


def fill_randomly(replay: Replay, spec: EnvSpec, members: int) -> None:
    """Every row random, as if written over once."""
    generator = torch.Generator(replay.obs.device).manual_seed(0)
    for block in replay.obs.view(-1).view(torch.uint8).split(1 << 28):
        high = 2 if spec.dtype == torch.bool else 256
        block.random_(0, high, generator=generator)
    replay.action.random_(0, spec.actions, generator=generator)
    replay.member.random_(0, members, generator=generator)
    replay.reward.uniform_(-1, 1, generator=generator)
    ends = torch.arange(replay.rows, device=replay.real.device).view(1, -1, 1) % 100
    replay.terminated.copy_((ends == 98).expand_as(replay.terminated))
    replay.real.copy_((ends != 99).expand_as(replay.real))
    replay.total.fill_(replay.rows)


def _atari(preset: str, *, capacity: int, precision: str, compile: bool, members: int) -> Config:
    changes = {"precision": precision, "compile": compile, "replay": {"capacity": capacity}}
    return load(preset, {**changes, "ensemble": {"members": members}})


def update(
    *,
    presets: tuple[str, ...] = ("atari/paper-ddqn", "atari/paper-cerl"),
    seeds: int = 1,
    capacity: int = 1_000_000,
    precision: Literal["tf32", "fp32", "bf16"] = "tf32",
    compile: bool = False,
    device: str = "auto",
    calls: int = 50,
    profile: bool = False,
    out: Path | None = None,
) -> Rows:
    """One update with sampling from a full device replay, and its parts.

    Args:
        presets: whose agent, batch and optimiser are timed
        seeds: S
        capacity: rows of the replay, per seed
        precision: of matrix products on a GPU
        compile: fuse the loss with torch.compile
        device: cpu, cuda or auto
        calls: calls per timing
        profile: print the kernels that take the time (CUDA)
        out: JSON-lines file that rows are appended to
    """
    place = training.pick_device(device)
    rows: Rows = []
    for preset in presets:
        changes = {
            "precision": precision,
            "compile": compile,
            "seeds": tuple(range(seeds)),
            "replay": {"capacity": capacity},
        }
        config = load(preset, changes)
        spec = EnvSpec("random", (84, 84), torch.uint8, 18, config.env.envs, 4, True, False)
        learner = filled_learner(config, spec, place)
        window = learner.sample()
        grads, _ = learner.grads(window)
        parts = {
            "update": captured(learner.update, place),
            "sample": captured(lambda learner=learner: _drop(learner.sample()), place),
            "loss and gradients": captured(
                lambda learner=learner, window=window: _drop(learner.grads(window)), place
            ),
            "optimiser": captured(lambda learner=learner, g=grads: learner.optimiser.step(g), place),
        }
        for name, step in parts.items():
            rows.append(
                {
                    "what": preset,
                    "part": name,
                    "S": seeds,
                    "N": config.ensemble.members,
                    "B": config.replay.batch,
                    "precision": precision,
                    "compiled": compile,
                    "microseconds": microseconds(step, place, calls=calls),
                }
            )
        if profile and place.type == "cuda":
            _profile(parts["update"])
        del learner, window, grads, parts
    show(f"update on {device_name(place)}", rows, out)
    return rows


def _drop(_: object) -> None:
    """Ends a captured part that returns something."""


def _profile(step: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))
