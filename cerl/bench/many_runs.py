"""The folder of a sweep of many runs that nobody trained, for `cerl bench sweep`.

The runs are planned and their folders are made by the code of `cerl sweep`. This module adds what
the runs would have left there: rows, heartbeats, marks of finished runs, and errors.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from cerl import __version__
from cerl.config import Config
from cerl.record import failure, finished, heartbeat
from cerl.record.folder import fixed_hash
from cerl.record.results import ROWS, Rows, env_name, hash_of, scoring
from cerl.sweep import command
from cerl.sweep.planning import Planned

AXES = ("replay.capacity", "optim.lr")  # options in which the settings differ
WIDTH = 10  # most values of the first axis
# Of ten planned runs, seven are done, one has failed, one is running elsewhere, and one waits.
STATES = ("done",) * 7 + ("failed", "running", "waiting")


def asked(
    presets: Sequence[str],
    envs: Sequence[str],
    out: Path,
    *,
    settings: int,
    seeds: int,
    members: int,
) -> command.Asked:
    """The request that the command line of such a sweep would make.

    Args: envs, environments or names of lists; settings, how many grid points each preset has;
          seeds, of each run; members, of each ensemble.
    """
    width = max(k for k in range(1, min(WIDTH, settings) + 1) if settings % k == 0)
    values = (
        [str(100_000 * (1 + k)) for k in range(width)],
        [f"{1 + k}e-5" for k in range(settings // width)],
    )
    grid = [f"{axis}={','.join(own)}" for axis, own in zip(AXES, values, strict=True)]
    return command.Asked(
        names=tuple(presets),
        words=("--ensemble.members", str(members), "--seeds", *map(str, range(seeds))),
        envs=tuple(envs),
        grid=tuple(grid),
        out=out,
        seeds_per_run=seeds,
    )


def leave_states(planned: Planned, out: Path) -> None:
    """Writes into the run folders what runs in different states leave there, in turn `STATES`."""
    now = time.time()
    for number, one in enumerate(planned.asked):
        folder, steps = out / one.run.folder, one.run.steps
        state = STATES[number % len(STATES)]
        if state == "waiting":
            continue
        done = steps if state == "done" else steps // 2
        ago = 0.0 if state == "running" else 5_000.0
        beat = heartbeat.Beat(
            host="another-machine",
            pid=1,
            device="cuda:1 NVIDIA H200",
            step=done,
            steps=steps,
            steps_per_second=100.0,
            updated=now - ago,
            started=now - 9_000.0,
            over=state != "running",
        )
        (folder / heartbeat.FILE).write_text(json.dumps(beat._asdict()))
        os.utime(folder / heartbeat.FILE, (now - ago, now - ago))
        if state == "done":
            finished.mark(folder, steps)
        if state == "failed":
            failure.note(folder, f"memory: expected {number} GB, got less")


def leave_rows(
    planned: Planned, out: Path, *, evaluations: int, note: Callable[[str], None] = print
) -> int:
    """Writes rows.parquet into all run folders. Returns: how many rows there are in all.

    Args: evaluations of each seed; note is called with a sentence while this goes on.
    """

    def leave(number: int) -> int:
        one = planned.asked[number]
        return leave_rows_of(one.config, out / one.run.folder, evaluations, number)

    note(f"writing the rows of {len(planned.asked)} runs")
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(leave, range(len(planned.asked))))


def leave_rows_of(config: Config, folder: Path, evaluations: int, number: int) -> int:
    """Writes the rows of one run: all members, and a row for each aggregate policy. Returns: how
    many there are.

    Args: folder of the run; evaluations of each seed; number, which the random returns follow from.
    """
    options, members = scoring(config), config.ensemble.members
    kinds = [("individual", "member", k) for k in range(members)]
    kinds += [
        (policy, "random" if policy == "random" else "aggregate", -1)
        for policy in config.eval.policies
        if policy != "individual"
    ]
    # Rows are ordered by evaluation, then by kind, then by seed, as those of a run.
    kind, seed = np.arange(len(kinds)), np.array(config.seeds)
    grids = np.meshgrid(np.arange(1, evaluations + 1), kind, seed, indexing="ij")
    evaluation, kind, seed = (grid.ravel() for grid in grids)
    count, step = len(kind), evaluation * config.eval.every
    rng = np.random.default_rng(number)
    tandem = config.ensemble.duty == "tandem"
    policy, role, member = (np.array(column)[kind] for column in zip(*kinds, strict=True))
    columns = {
        "preset": pa.repeat(config.preset, count),
        "agent": pa.repeat("dqn", count),
        "env": pa.repeat(env_name(config), count),
        "seed": seed,
        "member": member,
        "role": np.where(member < 0, role, np.where(member == 0, "active", "passive"))
        if tandem
        else role,
        "policy": policy,
        "step": step,
        "frames": step,
        "real_steps": step,
        "updates": step // 4,
        "episodes": np.full(count, 10),
        "return": number % 7 + np.log(step) + rng.normal(size=count),
        "return_std": rng.random(count),
        "length": 100 * rng.random(count),
        "wall_seconds": step / 1_000,
        "members": np.full(count, members),
        "config_hash": pa.repeat(hash_of(options), count),
        "version": pa.repeat(__version__, count),
        "diverged": np.zeros(count, dtype=bool),
    }
    rows = Rows(folder / "rows.parquet", ROWS, run=fixed_hash(folder), options=options)
    rows.append(columns)
    rows.flush()
    return count
