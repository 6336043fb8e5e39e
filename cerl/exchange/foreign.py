"""Result rows of runs that other programs trained, so that reports show their curves beside ours.

Such a run has no options: other programs call theirs otherwise. Runs of one program whose own
settings differ have different hashes, so a report gives each a line of its own. Its rows have the
name of the program in the column `version`, 0 updates where it does not log them, and no value
(null) for other columns that it does not log.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cerl.config import ConfigError
from cerl.record import files, results
from cerl.record.folder import plain
from cerl.record.results import IMPORTED
from cerl.report.statistics import human_random

SOURCE = "source.json"  # in an imported run: where its rows are from, and the program's settings
_RUN = "imported"  # in place of the hash of a run's config.yaml, in the metadata of its rows
FRAMES = 4  # emulator frames of an agent step, in the Atari games of both programs
ROBOTS = (
    *("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum"),
    *("InvertedPendulum", "Pusher", "Reacher", "Swimmer", "Walker2d"),
)


class LogError(RuntimeError):
    """A log that cannot be read; the message says which, and why."""


class Run(NamedTuple):
    """A run of another program: all seeds that it has in one folder."""

    source: Path  # the folder or file that was read
    program: str  # e.g. cleanrl
    method: str  # what reports call it, e.g. "cleanrl dqn_atari"
    agent: str  # as in result rows, or the name of the program's file where that is unknown
    env: str  # as in result rows
    members: int  # N
    settings: Mapping[str, Any]  # of the program, without the seed and without names of folders
    rows: Sequence[Mapping[str, Any]]  # columns that differ between the rows


def env_name(name: str) -> str:
    """The column `env` for an environment, from its name in gymnasium, gym or EnvPool.

    Two names of one Atari game are one environment here, though games may differ in sticky actions
    and in what ends an episode.
    """
    bare = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", name.removeprefix("ALE/"))
    if name.startswith("MinAtar/"):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", bare.removeprefix("MinAtar/"))
        return f"minatar/{words.lower()}"
    if name.startswith("dm_control/"):
        return f"dmc/{bare.removeprefix('dm_control/')}"
    if bare in human_random():
        return f"atari/{bare}"
    if bare in ROBOTS:
        return f"mujoco/{name}"
    return f"gym/{name}"


def folder_names(runs: Sequence[Run], top: Path) -> list[str]:
    """A name for the folder of each run, from its place below the folder `top` that was read."""
    found: list[str] = []
    for run in runs:
        inside = run.source.relative_to(top).as_posix() if run.source != top else top.resolve().name
        stem = plain(inside) or "run"
        name, count = stem, 1
        while name in found:
            count += 1
            name = f"{stem}-{count}"
        found.append(name)
    return found


def write(run: Run, folder: Path) -> None:
    """Writes rows.parquet and source.json into a run folder, which is made if it is missing.

    Raises: ConfigError if it holds rows that were not imported; OSError.
    """
    path = folder / "rows.parquet"
    if path.exists() and results.made_by(results.read(path, results.ROWS)) != _RUN:
        raise ConfigError(f"{path}: rows of a run of cerl; expected another folder as --out")
    same = {
        "preset": run.method,
        "agent": run.agent,
        "env": run.env,
        "members": run.members,
        "config_hash": results.hash_of({"program": run.program, **run.settings}),
        "version": IMPORTED + run.program,
        "updates": 0,
        "return_std": None,
        "length": None,
        "wall_seconds": None,
        "diverged": False,
    }
    table = pa.Table.from_pylist([{**same, **row} for row in run.rows], schema=results.ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    rows = results.Rows(path, results.ROWS, run=_RUN)
    rows.pending, rows.owned = [table], True
    rows.flush()
    about = {"program": run.program, "source": run.source.name, "settings": dict(run.settings)}
    files.write_text(folder / SOURCE, json.dumps(about, indent=2, sort_keys=True) + "\n")
