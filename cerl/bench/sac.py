"""Times whole updates of ensembles of SAC: `cerl bench sac`.

An update samples its batch from a full replay on the device, and is replayed as one CUDA graph.
"""

from typing import NamedTuple

import torch

from cerl.bench import runs
from cerl.bench.clock import Timing, device_name, microseconds, profiled
from cerl.bench.table import Output, Row, Rows, Table
from cerl.config import load
from cerl.data import EnvSpec
from cerl.device.pick import pick
from cerl.graph import captured

# Milliseconds that one update of CERL takes in the JAX code of Lin et al. 2024 on an H200, with the
# batch on the device already (sampling is not included). Keys are as in `Size`.
OFFICIAL = {(1, 10, 17, 6): 1.142, (10, 10, 17, 6): 1.608, (10, 10, 376, 17): 2.875}
OFFICIAL_BATCH = 256


class Size(NamedTuple):
    """The size of an ensemble and of its environment."""

    seeds: int  # S
    members: int  # N
    observation: int  # numbers in an observation
    actions: int  # components of an action


def parsed_size(text: str) -> Size:
    """Reads a size from text like 10,10,17,6. Raises: ValueError where it cannot be read."""
    numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(numbers) != 4 or min(numbers) < 1 or text.count(",") != 3:
        raise ValueError(f"--sizes: expected S,N,observation,actions like 10,10,17,6, got {text!r}")
    return Size(*numbers)


def sac(
    *,
    sizes: tuple[str, ...] = ("1,10,17,6", "10,10,17,6", "10,10,376,17"),
    preset: str = "mujoco/cerl",
    precisions: tuple[str, ...] = ("tf32", "bf16"),
    capacity: int = 200_000,
    compile: bool = False,
    parts: bool = False,
    profile: bool = False,
    timing: Timing = Timing(calls=200),
    output: Output = Output(),
) -> Rows:
    """Times one update of ensembles of SAC, with sampling from a full replay, in milliseconds.

    Args:
        sizes: S,N,numbers in an observation,components of an action
        preset: preset whose networks, heads, batch and optimisers are timed
        precisions: precisions of matrix products on a GPU: tf32, bf16, fp32
        capacity: rows of the replay, per seed
        compile: fuse the losses with torch.compile
        parts: also time sampling, gradients and optimisers of each stage separately
        profile: print the time and the launches of every kernel of an update (CUDA)
    """
    place = pick(timing.device)
    table = Table("sac", output, device=device_name(place), title=f"{preset} update")
    for size in map(parsed_size, sizes):
        for precision in precisions:
            changes = {
                "precision": precision,
                "compile": compile,
                "seeds": tuple(range(size.seeds)),
                "ensemble": {"members": size.members},
                "replay": {"capacity": capacity},
            }
            config = load(preset, changes)
            spec = EnvSpec(
                "random", (size.observation,), torch.float32, size.actions, 1, 1, True, False
            )
            spec = spec._replace(envs=config.env.envs, continuous=True)
            learner = runs.filled_learner(config, spec, place)
            steps = {"update": captured(learner.update, place)}
            if parts:
                steps |= runs.update_parts(learner, place)
            comparable = config.ensemble.heads == "cerl" and config.replay.batch == OFFICIAL_BATCH
            for name, step in steps.items():
                row: Row = {
                    "what": preset,
                    "S": size.seeds,
                    "N": size.members,
                    "obs": size.observation,
                    "act": size.actions,
                    "B": config.replay.batch,
                    "products": precision,
                    "compiled": str(compile),
                    "part": name,
                    "ms": microseconds(step, place, calls=timing.calls) / 1e3,
                }
                official = OFFICIAL.get(size) if name == "update" and comparable else None
                table.add(row | {"official JAX": official})
            if profile:
                profiled(steps["update"], place)
            del learner, steps, step
    return table.finished()
