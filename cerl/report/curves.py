"""Turns result rows into learning curves: every score of one setting on one environment, by seed.

A setting is a preset with its options (`cerl/config/labels.py`). A curve has one value for each
seed and evaluation: the `individual` score of a seed is the average over all of its members. A
curve holds only the steps at which every seed of the setting has an evaluation. Notes for the
reader of a report say what was left out, and why.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cerl.config.labels import Label, ranked
from cerl.record import results
from cerl.record.results import RowsError
from cerl.report import settings
from cerl.report.settings import Group, Options
from cerl.text import FEW, few, visible

READERS = 4  # threads that read files of rows
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
    """One score of one setting on one environment, at the T steps that all of its seeds have."""

    steps: np.ndarray  # [T] int64, agent steps of one seed
    returns: np.ndarray  # [T, S] float64; NaN where the run recorded no finite number
    episodes: np.ndarray  # [T, S] int64, episodes of all members together


def final(curve: Curve, *, last: int) -> np.ndarray:
    """The score of every seed [S]: the average over its `last` evaluations."""
    return curve.returns[-last:].mean(0)


class Cell(NamedTuple):
    """All curves of one setting on one environment; a report has one cell for each such pair."""

    env: str  # family/name
    preset: str
    label: Label  # names the setting; the same in all environments
    options: Options | None  # `results.scoring` of its runs; None: unknown
    config_hash: str  # of the options that training depends on
    members: int  # N
    seeds: tuple[int, ...]  # S seeds, ascending; the last axis of a curve
    diverged: dict[int, int]  # seed: agent step at which its numbers were first seen not finite
    curves: dict[str, Curve]  # by key of SCORES

    @property
    def name(self) -> str:
        """The label as text."""
        return self.label.text


class Points(NamedTuple):
    """Scores of P points: each is one score of one seed at one evaluation."""

    score: np.ndarray  # [P] int64, which of SCORES
    seed: np.ndarray  # [P] int64
    step: np.ndarray  # [P] int64, agent steps of one seed
    value: np.ndarray  # [P] float64, mean return over the members; NaN where none was recorded
    episodes: np.ndarray  # [P] int64, of all members together

    def where(self, chosen: np.ndarray) -> "Points":
        """Some of the points. Args: chosen, [P] bool, or indices."""
        return Points(*(column[chosen] for column in self))


class Note(NamedTuple):
    """What the reader of a report has to know about one setting on one environment."""

    kind: str  # what it is about, as the end of "4 more settings ..."
    text: str


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
    Returns: a table of `results.ROWS` with more columns: `run`, the file that a row is from, and
             one for each option that differs between the runs, under its dotted key. The hash of a
             run whose options are known is the one that this version of cerl computes, so runs of
             all versions that train alike have the same.
    Raises:  RowsError if a path has no result rows or a file is damaged.
    """
    files = run_folders(paths)
    with ThreadPoolExecutor(READERS) as pool:
        found = [*pool.map(_rows, files)]
    known = {results.hash_of(options): options for _, options, _ in found if options is not None}
    together = [str(file) for file, (_, _, alone) in zip(files, found, strict=True) if not alone]
    # Arrow calls a function for each chunk of a column, so a thousand small ones are slow.
    table = pa.concat_tables([table for table, _, _ in found]).combine_chunks()
    return settings.with_options(table, known, together)


def _rows(file: Path) -> tuple[pa.Table, Options | None, bool]:
    """The rows of one file, the options of its run, and whether its seeds were evaluated alone; see
    `load_rows`."""
    table = results.read(file, results.ROWS)
    alone = settings.seeds_alone(file, table)
    if (options := settings.trained_with(file, table)) is not None:
        at = table.schema.get_field_index("config_hash")
        code = pa.repeat(results.hash_of(options), table.num_rows)
        table = table.set_column(at, "config_hash", code)
    table = table.append_column("run", pa.repeat(str(file), table.num_rows))
    return table.replace_schema_metadata(), options, alone


# Columns of rows that curves are made of.
_USED = ["seed", "role", "policy", "step", "return", "episodes", "members", "diverged", "run"]
_USED += ["version"]


def evaluations(table: pa.Table) -> pa.Table:
    """The rows of a table that hold evaluations, without those of training episodes.

    Imported runs of programs that make no evaluations have rows of training episodes alone. These
    are kept, as policy individual, so that such a run has a curve; `cells` notes it.

    Args: table, from `load_rows`, or some of its columns.
    """
    policy = pc.if_else(_kept(table), "individual", table["policy"])  # pyright: ignore
    table = table.set_column(table.schema.get_field_index("policy"), "policy", policy)
    return table.filter(pc.field("policy") != "train")


def _kept(table: pa.Table) -> pa.ChunkedArray:
    """Which rows of training episodes stand for evaluations; see `evaluations`."""
    trained = pc.equal(table["policy"], "train")  # pyright: ignore
    imported = pc.starts_with(table["version"], results.IMPORTED)  # pyright: ignore
    return pc.and_(trained, imported)  # pyright: ignore


def _unevaluated(table: pa.Table) -> list[int]:
    """The groups whose rows of training episodes stand for evaluations, ascending."""
    return sorted(set(table.filter(_kept(table))["group"].to_pylist()))


def cells(table: pa.Table) -> tuple[list[Cell], list[str]]:
    """Curves of every setting on every environment, and notes for the reader of the report.

    A seed that diverged is not left out: its scores count, and it has NaN at evaluations after the
    run ended it (option `diverged: cut`).

    Args:    table, from `load_rows`.
    Returns: cells, by environment in alphabetical order and then as legends list settings
             (`labels.ranked`); notes on what was left out or cannot be compared, one sentence each.
    Raises:  RowsError if no evaluation is among the rows.
    """
    known = settings.options_by_hash(table)
    groups, group_of_row = settings.groups(table)
    labels, general = settings.names(groups, known)
    general += settings.evaluated_together(table)
    table = table.select(_USED).append_column("group", group_of_row)
    marks = _marks(table)
    table, unevaluated = evaluations(table), _unevaluated(table)
    trained = [
        Note(
            "programs made no evaluations",
            f"{labels[k].text} on {groups[k].env}: returns of training episodes, with exploration; "
            "its program made no evaluations",
        )
        for k in unevaluated
    ]
    if table.num_rows == 0:
        raise RowsError(
            "no evaluation among the rows: the runs ended before their first one, which comes "
            "after eval.every agent steps; train longer, or evaluate more often"
        )
    table, chosen, notes = _newest(table, groups, labels)
    notes += trained
    notes += [Note("forks", text) for text in settings.forks(groups, labels, known).values()]
    members = dict(zip(table["group"].to_pylist(), table["members"].to_pylist(), strict=True))
    group_of_point, points = _points(table)
    order = np.argsort(group_of_point, kind="stable")
    bounds = np.searchsorted(group_of_point[order], np.arange(len(groups) + 1))
    out = []
    for k, (group, label) in enumerate(zip(groups, labels, strict=True)):
        own = points.where(order[bounds[k] : bounds[k + 1]])
        if not own.step.size:
            continue
        found = {
            seed: step
            for (seed, run), step in marks.get(k, {}).items()
            if run == chosen.get((k, seed), run)
        }
        curves, seeds, said = _curves(own, found, f"{label.text} on {group.env}")
        notes += said
        options = known.get(group.config_hash)
        facts = (group.env, group.preset, label, options, group.config_hash, members[k])
        out.append(Cell(*facts, seeds, found, curves))
    for env in sorted({cell.env for cell in out}):
        own = [cell for cell in out if cell.env == env and cell.curves]
        ends = {c.name: max(int(x.steps[-1]) for x in c.curves.values()) for c in own}
        if len(set(ends.values())) > 1:
            text = f"{env}: methods ended at different steps ({_by_step(ends)}); each has its own"
            notes.append(Note("", text))
    places = {name: place for place, name in enumerate(ranked([cell.label for cell in out]))}
    return sorted(out, key=lambda cell: (cell.env, places[cell.name])), general + _told(notes)


def _told(notes: Sequence[Note]) -> list[str]:
    """The text of notes; of each kind the first few, and a sentence that counts the others."""
    kinds: dict[str, list[str]] = {}
    for note in notes:
        kinds.setdefault(note.kind, []).append(note.text)
    out = []
    for kind, texts in kinds.items():
        most = FEW if kind else len(texts)
        out += texts[:most]
        if count := len(texts[most:]):
            which = "1 more setting" if count == 1 else f"{count} more settings"
            out.append(f"{which} on an environment: {kind}")
    return out


def _by_step(ends: Mapping[str, int]) -> str:
    """Names by the step at which they ended, the latest first: "at 300: a; at 200: b and 2 more".

    Names, which may have commas, are separated by slashes. All are told if they are few. Else each
    step has one name, and the most frequent step only their number.
    """
    groups: dict[int, list[str]] = {}
    for name in sorted(ends, key=lambda name: -ends[name]):
        groups.setdefault(ends[name], []).append(name)
    largest = max(groups, key=lambda step: len(groups[step]))
    parts = []
    for step, names in groups.items():
        if len(ends) <= FEW:
            said = " / ".join(names)
        elif step == largest and len(names) > 1:
            said = f"{len(names)} methods"
        else:
            said = few(names, most=1)
        parts.append(f"at {step:,}: {said}")
    if len(parts) > FEW:
        parts[FEW - 1 : -1] = [f"at {len(parts) - FEW} steps between: others"]
    return "; ".join(parts)


def _points(table: pa.Table) -> tuple[np.ndarray, Points]:
    """The group [P] of each point, and the points; `individual` is the mean over the members."""
    policy, role = table["policy"], table["role"]
    tandem = pc.is_in(role, pa.array(["active", "passive"]))  # pyright: ignore
    mode = pc.if_else(pc.ends_with(policy, "_mode"), "_mode", "")  # pyright: ignore
    role = pc.binary_join_element_wise(role, mode, "")  # pyright: ignore
    score = pc.if_else(tandem, role, policy)  # pyright: ignore
    score = pc.index_in(score, value_set=pa.array([*SCORES]))  # pyright: ignore
    table = table.append_column("score", score.cast(pa.int64())).filter(pc.field("score") >= 0)
    grouped = table.group_by(["group", "score", "seed", "step"], use_threads=False)
    found = grouped.aggregate([("return", "mean"), ("episodes", "sum")])
    columns = ("score", "seed", "step", "return_mean", "episodes_sum")
    group, *values = (found[name].to_numpy() for name in ("group", *columns))
    return group, Points(*values)


def _marks(table: pa.Table) -> dict[int, dict[tuple[int, str], int]]:
    """The first step whose row is marked `diverged`: {group: {(seed, run): step}}."""
    marked = table.filter(pc.field("diverged"))
    first = marked.group_by(["group", "seed", "run"], use_threads=False)
    marks: dict[int, dict[tuple[int, str], int]] = {}
    for row in first.aggregate([("step", "min")]).to_pylist():
        marks.setdefault(row["group"], {})[row["seed"], row["run"]] = row["step_min"]
    return marks


def _newest(
    table: pa.Table, groups: Sequence[Group], labels: Sequence[Label]
) -> tuple[pa.Table, dict[tuple[int, int], str], list[Note]]:
    """Chooses, for each seed of a group, the run with the latest evaluation.

    Returns: the rows of the chosen runs; {(group, seed): run}; a note for each group with seeds
             that were run more than once.
    """
    ends = table.group_by(["group", "seed", "run"], use_threads=False)
    last: dict[tuple[int, int], dict[str, int]] = {}
    for row in ends.aggregate([("step", "max")]).to_pylist():
        last.setdefault((row["group"], row["seed"]), {})[row["run"]] = row["step_max"]
    chosen = {key: max(runs, key=lambda run: (runs[run], run)) for key, runs in last.items()}
    several = {key: runs for key, runs in last.items() if len(runs) > 1}
    notes = []
    for k in dict.fromkeys(k for k, _ in several):
        own = {seed: runs for (group, seed), runs in several.items() if group == k}
        left = {run for seed, runs in own.items() for run in set(runs) - {chosen[k, seed]}}
        seeds = f"seed {[*own][0]}" if len(own) == 1 else f"seeds {few(sorted(own))}"
        counts = sorted({len(runs) for runs in own.values()})
        text = (
            f"{seeds} of {labels[k].text} on {groups[k].env} {'was' if len(own) == 1 else 'were'} "
            f"run {' or '.join(map(str, counts))} times with one configuration; of each seed the "
            f"run that got furthest counts, not {few([visible(run) for run in sorted(left)])}"
        )
        notes.append(Note("seeds were run several times with one configuration", text))
    if several:
        rows = zip(*(table[name].to_pylist() for name in ("group", "seed", "run")), strict=True)
        table = table.filter(pa.array([chosen[k, seed] == run for k, seed, run in rows]))
    return table, chosen, notes


def _curves(
    points: Points, diverged: dict[int, int], where: str
) -> tuple[dict[str, Curve], tuple[int, ...], list[Note]]:
    """The curves of one setting on one environment.

    Args:    points, of this cell alone; diverged, first agent step at which each diverged seed was
             marked; where, what notes call the cell.
    Returns: curves by key of SCORES; seeds, ascending; what a reader has to know.
    """
    notes = []
    played = {int(seed) for seed in np.unique(points.seed)}
    seeds = tuple(sorted(played | set(diverged)))
    # The seeds that did not diverge decide which steps count. A diverged seed may have ended early,
    # and would otherwise shorten the curves of all others.
    sound = sorted(played - set(diverged)) or sorted(played)
    ends = {seed: int(points.step[points.seed == seed].max()) for seed in sound}
    if len(set(ends.values())) > 1:
        steps = sorted(set(ends.values()), reverse=True)
        own = {step: [seed for seed in sound if ends[seed] == step] for step in steps}
        said = few([f"at {step:,}: seed {few(who)}" for step, who in own.items()], between="; ")
        text = (
            f"{where}: seeds got to different steps ({said}); they are compared at the "
            "last step that all of them have"
        )
        notes.append(Note("seeds got to different steps", text))
    curves = {}
    needed = np.isin(seeds, sound)  # [S]
    for k in np.unique(points.score):
        score = [*SCORES][k]
        own = points.where(points.score == k)
        steps, row = np.unique(own.step, return_inverse=True)
        column = np.searchsorted(seeds, own.seed)
        returns = np.full((len(steps), len(seeds)), np.nan)
        episodes = np.zeros((len(steps), len(seeds)), dtype=np.int64)
        there = np.zeros((len(steps), len(seeds)), dtype=bool)
        returns[row, column], episodes[row, column] = own.value, own.episodes
        there[row, column] = True
        kept = there[:, needed].all(1)
        if kept.any():
            curves[score] = Curve(steps[kept], returns[kept], episodes[kept])
        else:
            text = f"{where}: {score} has no step that all seeds share; left out"
            notes.append(Note(f"{score} has no step that all seeds share", text))
    return curves, seeds, notes + _losses(curves, seeds, diverged, where)


def _losses(
    curves: dict[str, Curve], seeds: tuple[int, ...], diverged: dict[int, int], where: str
) -> list[Note]:
    """Notes on seeds that diverged or whose scores are no finite numbers."""
    notes, lost, ended = [], [], []
    for k, seed in enumerate(seeds):
        own = curves.values()
        if any((c.episodes[:, k] == 0).any() for c in own) and seed in diverged:
            ended.append(seed)
        elif any(not np.isfinite(c.returns[:, k]).all() for c in own):
            lost.append(seed)
    if lost:
        text = (
            f"{where}: a return of seed {few(lost)} is not a finite number; "
            "such scores do not count, and the table says how many seeds do"
        )
        notes.append(Note("returns of some seeds are not finite numbers", text))
    if diverged:
        said = few([f"seed {seed} at {step:,}" for seed, step in sorted(diverged.items())])
        text = (
            f"{where}: {len(diverged)} of {len(seeds)} seeds diverged (agent steps: {said}); what "
            "they scored counts as it is"
        )
        if ended:
            text += f", and there are no scores to the end of seed {few(ended)}"
        notes.append(Note("some seeds diverged", text))
    return notes
