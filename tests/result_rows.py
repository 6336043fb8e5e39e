"""Result rows of runs that nobody trained, for tests of reports."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import cerl
from cerl.config import load
from cerl.record import results as rows

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a PNG


def row(**changes) -> dict:
    """One result row; member 0 of N = 1 unless changed."""
    whole = {
        "preset": "catch/ddqn",
        "agent": "dqn",
        "env": "catch",
        "seed": 0,
        "member": 0,
        "role": "member",
        "policy": "individual",
        "step": 100,
        "frames": 100,
        "real_steps": 100,
        "updates": 25,
        "episodes": 10,
        "return": 0.0,
        "return_std": 0.0,
        "length": 9.0,
        "wall_seconds": 1.0,
        "members": 1,
        "config_hash": "abcdef012345",
        "version": "0.1.0",
        "diverged": False,
    }
    return whole | changes


def ensemble(returns: np.ndarray, vote: np.ndarray, **changes) -> list[dict]:
    """Rows of a run: returns [T, S, N], vote [T, S]; step t is 100 (t + 1), seed s is s."""
    found = []
    for (t, s, i), value in np.ndenumerate(returns):
        own = {"step": 100 * (t + 1), "seed": s, "member": i, "return": value}
        found.append(row(members=returns.shape[2], **own) | changes)
    for (t, s), value in np.ndenumerate(vote):
        own = {"step": 100 * (t + 1), "seed": s, "member": -1, "return": value}
        own |= {"role": "aggregate", "policy": "vote", "members": returns.shape[2]}
        found.append(row(**own) | changes)
    return found


def write(folder: Path, found: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found, schema=rows.ROWS), folder / "rows.parquet")
    return folder


def trained(
    folder: Path,
    name: str,
    options: dict,
    level: float = 0.0,
    *,
    seeds: Sequence[int] = (0, 1),
    steps: Sequence[int] = (100,),
) -> Path:
    """A run folder with the rows that a run of a preset would write, and no config.yaml."""
    config = load(name, options)
    found = rows.scoring(config)
    table = rows.Rows(folder / "rows.parquet", rows.ROWS, options=found)
    same = {"preset": name, "env": rows.env_name(config), "members": config.ensemble.members}
    same |= {"config_hash": rows.hash_of(found), "version": cerl.__version__}
    policies = [("individual", i, "member") for i in range(config.ensemble.members)]
    for policy, member, role in [*policies, ("vote", -1, "aggregate")]:
        for step, seed in itertools.product(steps, seeds):
            value = {"return": level + seed + 0.1 * (member < 0)}
            own = row(seed=seed, step=step, policy=policy, member=member, role=role) | same | value
            table.append({key: [own[key]] for key in rows.ROWS.names})
    folder.mkdir(parents=True)
    table.flush()
    return folder
