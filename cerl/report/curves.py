"""Turns result rows into learning curves: every score of one preset on one environment, by seed.

A curve has one value for each seed and evaluation: the `individual` score of a seed is the average
over all of its members. A curve holds only the steps at which every seed of the preset has an
evaluation. Notes for the reader of a report say what was left out, and why.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cerl.config import ConfigError
from cerl.record import results
from cerl.record.folder import FILE, fixed_hash, load_file
from cerl.record.results import RowsError
from cerl.text import visible

# The scores that a cell may have, in the order of a table's columns: name in the rows, heading.
SCORES = {
    "individual": "individual",
    "random": "drawn member",
    "vote": "aggregate (vote)",
    "mean": "aggregate (mean)",
    "active": "active",
    "passive": "passive",
    "individual_mode": "individual, modes",
    "mean_mode": "aggregate (mean), modes",
    "active_mode": "active, modes",
    "passive_mode": "passive, modes",
}


class Curve(NamedTuple):
    """One score of one preset on one environment, at the T steps that all of its seeds have."""

    steps: np.ndarray  # [T] int64, agent steps of one seed
    returns: np.ndarray  # [T, S] float64; NaN where the run recorded no finite number
    episodes: np.ndarray  # [T, S] int64, episodes of all members together


class Cell(NamedTuple):
    """All curves of one preset on one environment; a report has one cell for each such pair."""

    env: str  # family/name
    preset: str  # as shown: with its hash where one preset was run with several configurations
    config_hash: str  # of the options that training depends on
    members: int  # N
    seeds: tuple[int, ...]  # S seeds, ascending; the last axis of a curve
    diverged: dict[int, int]  # seed: agent step at which its numbers were first seen not finite
    curves: dict[str, Curve]  # by key of SCORES


def run_folders(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The parquet files of result rows that some paths stand for.

    Args:    paths, each a parquet file, a run folder, or a folder with runs anywhere below it.
    Returns: files without duplicates, in the order of the paths.
    Raises:  RowsError naming a path without result rows.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        own = path / "rows.parquet"
        if path.is_file() or own.is_file():
            found.append(path if path.is_file() else own)
            continue
        below = sorted(path.rglob("rows.parquet")) if path.is_dir() else []
        if not below:
            what = "no rows.parquet in or below it" if path.is_dir() else "no such file or folder"
            raise RowsError(f"{path}: expected a run folder or a folder of runs; {what}")
        found += below
    if not found:
        raise RowsError("report: expected at least one run folder, got none")
    return list(dict.fromkeys(file.resolve() for file in found))


def load_rows(paths: Iterable[str | os.PathLike[str]]) -> pa.Table:
    """The result rows of some runs in one table.

    Args:    paths, see `run_folders`.
    Returns: a table of `results.ROWS` with one more column, `run`: the file that a row is from.
    Raises:  RowsError if a path has no result rows or a file is damaged.
    """
    tables = []
    for file in run_folders(paths):
        table = results.read(file, results.ROWS)
        if code := _hash_today(file.parent, made_by=results.made_by(table)):
            codes = pa.array([code] * table.num_rows, pa.string())
            at = table.schema.get_field_index("config_hash")
            table = table.set_column(at, "config_hash", codes)
        run = pa.array([str(file)] * table.num_rows, pa.string())
        tables.append(table.append_column("run", run))
    return pa.concat_tables(tables)


def _hash_today(folder: Path, *, made_by: str | None) -> str:
    """The hash of a run's options, computed from its config.yaml by this version of cerl.

    Rows hold the hash that the version of cerl that trained the run computed. One computed anew is
    the same for all versions that train alike, so a report takes such runs as one configuration.

    Args:    made_by, the identity of the run that the rows say they belong to.
    Returns: the hash; empty where the rows belong to another run or the config cannot be read, and
             the caller then keeps the hash that stands in the rows.
    """
    path = folder / FILE
    try:
        if not path.is_file() or made_by != fixed_hash(folder):
            return ""
        return results.config_hash(load_file(path))
    except (ConfigError, OSError):
        return ""


def cells(table: pa.Table) -> tuple[list[Cell], list[str]]:
    """Curves of every preset on every environment, and notes for the reader of the report.

    A seed that diverged is not left out: its scores count, and it has NaN at evaluations after the
    run ended it (option `diverged: cut`).

    Args:    table, from `load_rows`.
    Returns: cells, by environment in alphabetical order and then as presets come in the rows; notes
             on what was left out or cannot be compared, one sentence each.
    Raises:  RowsError if no evaluation is among the rows.
    """
    marks = _marks(table)
    table = table.filter(pc.field("policy") != "train")
    if table.num_rows == 0:
        raise RowsError(
            "no evaluation among the rows: the runs ended before their first one, which comes "
            "after eval.every agent steps; train longer, or evaluate more often"
        )
    notes: list[str] = []
    points = _points(table)
    chosen = _newest(points, notes)
    points = [point for point in points if chosen[_configured(point)] == point["run"]]
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for point in points:
        groups.setdefault((point["env"], point["preset"], point["config_hash"]), []).append(point)
    hashes: dict[tuple[str, str], int] = {}
    for env, preset, _ in groups:
        hashes[env, preset] = hashes.get((env, preset), 0) + 1
    for (env, preset), count in hashes.items():
        if count > 1:
            notes.append(
                f"{preset} on {env} was run with {count} different configurations; each has lines "
                "of its own, under the first digits of its config_hash"
            )
    out = []
    for (env, preset, code), own in groups.items():
        name = f"{preset} [{code[:6]}]" if hashes[env, preset] > 1 else preset
        diverged = {
            seed: step
            for (*group, seed, run), step in marks.items()
            if tuple(group) == (env, preset, code)
            and run == chosen.get((env, preset, code, seed), run)
        }
        out.append(_cell(env, name, code, own, diverged, notes))
    for env in sorted({cell.env for cell in out}):
        own = [cell for cell in out if cell.env == env and cell.curves]
        ends = {c.preset: max(int(x.steps[-1]) for x in c.curves.values()) for c in own}
        if len(set(ends.values())) > 1:
            text = ", ".join(f"{preset} at {step:,}" for preset, step in ends.items())
            notes.append(f"{env}: presets ended at different steps ({text}); each has its own")
    return sorted(out, key=lambda cell: cell.env), notes


_KEYS = ["env", "preset", "config_hash", "members", "seed", "run", "score", "step"]


def _points(table: pa.Table) -> list[dict]:
    """One dict for each score, seed and step; `individual` is the mean over the seed's members."""
    policy, role = table["policy"], table["role"]
    tandem = pc.is_in(role, pa.array(["active", "passive"]))  # pyright: ignore
    mode = pc.if_else(pc.ends_with(policy, "_mode"), "_mode", "")  # pyright: ignore
    role = pc.binary_join_element_wise(role, mode, "")  # pyright: ignore
    score = pc.if_else(tandem, role, policy)  # pyright: ignore
    grouped = table.append_column("score", score).group_by(_KEYS, use_threads=False)
    points = grouped.aggregate([("return", "mean"), ("episodes", "sum")]).to_pylist()
    for point in points:
        # Names come from files that anybody may have written; control characters must not reach
        # the terminal by way of tables, notes and plots.
        point |= {name: visible(point[name] or "") for name in ("env", "preset", "run")}
    return [point for point in points if point["score"] in SCORES]


def _configured(point: dict) -> tuple[str, str, str, int]:
    """What a seed was trained as: environment, preset, hash of the options, seed."""
    return point["env"], point["preset"], point["config_hash"], point["seed"]


def _marks(table: pa.Table) -> dict[tuple[str, str, str, int, str], int]:
    """The first step whose row is marked `diverged`, for every seed of every run that has one."""
    keys = ["env", "preset", "config_hash", "seed", "run"]
    marked = table.filter(pc.field("diverged"))
    first = marked.group_by(keys, use_threads=False).aggregate([("step", "min")])
    return {(*_configured(row), row["run"]): row["step_min"] for row in first.to_pylist()}


def _newest(points: list[dict], notes: list[str]) -> dict[tuple[str, str, str, int], str]:
    """Chooses, for each seed of a configuration, the run with the latest evaluation.

    Adds a note for each seed that was run more than once.
    """
    last: dict[tuple, dict[str, int]] = {}
    for p in points:
        runs = last.setdefault(_configured(p), {})
        runs[p["run"]] = max(runs.get(p["run"], 0), p["step"])
    chosen = {key: max(runs, key=lambda run: (runs[run], run)) for key, runs in last.items()}
    for key, runs in last.items():
        if len(runs) > 1:
            env, preset, _, seed = key
            left = ", ".join(sorted(set(runs) - {chosen[key]}))
            notes.append(
                f"seed {seed} of {preset} on {env} was run {len(runs)} times with one "
                f"configuration; the run that got furthest counts, not {left}"
            )
    return chosen


def _cell(
    env: str,
    name: str,
    code: str,
    points: list[dict],
    diverged: dict[int, int],
    notes: list[str],
) -> Cell:
    """The curves of one preset on one environment; adds to the notes what a reader has to know.

    Args:    name, the preset as shown; code, its hash; points, from `_points`, of this cell alone;
             diverged, first agent step at which each diverged seed was marked.
    """
    played = {p["seed"] for p in points}
    seeds = tuple(sorted(played | set(diverged)))
    # The seeds that did not diverge decide which steps count. A diverged seed may have ended early,
    # and would otherwise shorten the curves of all others.
    sound = sorted(played - set(diverged)) or sorted(played)
    ends = {seed: max(p["step"] for p in points if p["seed"] == seed) for seed in sound}
    if len(set(ends.values())) > 1:
        text = ", ".join(f"seed {seed} at {step:,}" for seed, step in ends.items())
        notes.append(
            f"{name} on {env}: seeds got to different steps ({text}); they are compared at the "
            "last step that all of them have"
        )
    curves = {}
    for score in SCORES:
        own = {(p["step"], p["seed"]): p for p in points if p["score"] == score}
        steps = sorted({step for step, _ in own})
        steps = [step for step in steps if all((step, seed) in own for seed in sound)]
        if steps:
            none = {"return_mean": None, "episodes_sum": 0}
            grid = [[own.get((step, seed), none) for seed in seeds] for step in steps]
            curves[score] = Curve(
                np.array(steps, dtype=np.int64),
                np.array([[_number(p["return_mean"]) for p in line] for line in grid]),
                np.array([[p["episodes_sum"] for p in line] for line in grid], dtype=np.int64),
            )
        elif own:
            notes.append(f"{name} on {env}: {score} has no step that all seeds share; left out")
    lost, ended = [], []
    for k, seed in enumerate(seeds):
        own = curves.values()
        if any((c.episodes[:, k] == 0).any() for c in own) and seed in diverged:
            ended.append(seed)
        elif any(not np.isfinite(c.returns[:, k]).all() for c in own):
            lost.append(seed)
    if lost:
        notes.append(
            f"{name} on {env}: a return of seed {' '.join(map(str, lost))} is not a finite number; "
            "such scores do not count, and the table says how many seeds do"
        )
    if diverged:
        text = ", ".join(f"seed {seed} at {step:,}" for seed, step in sorted(diverged.items()))
        note = (
            f"{name} on {env}: {len(diverged)} of {len(seeds)} seeds diverged ({text} agent "
            "steps); what they scored counts as it is"
        )
        if ended:
            note += f", and there are no scores to the end of seed {' '.join(map(str, ended))}"
        notes.append(note)
    return Cell(env, name, code, points[0]["members"], seeds, diverged, curves)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
