"""The final scores of a report as one table: a row for each score of each setting, with interval.

Intervals are over seeds: members of one seed share data and are no independent samples. Evaluations
are compared at the last step that all seeds of a setting have in common (`cerl/report/curves.py`).
The statistics are those of `cerl/report/statistics.py`, their intervals of `intervals.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cerl.report import aggregates, intervals, settings
from cerl.report.curves import Cell, final
from cerl.report.intervals import DEFAULT, SAMPLES

# What headings call the statistics over tasks.
NAMES = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap"}

SUMMARY = pa.schema(
    [
        ("env", pa.string()),  # family/name, or e.g. "atari (55 games)", "minatar (5 tasks)"
        ("preset", pa.string()),
        ("config_hash", pa.string()),
        ("members", pa.int64()),  # N
        ("score", pa.string()),  # a key of SCORES
        ("unit", pa.string()),  # return; over tasks that of `normalise.NORMALISATIONS`
        ("statistic", pa.string()),  # mean, median, iqm, optimality_gap
        ("step", pa.int64()),  # agent steps of one seed at the last evaluation that is used
        ("evaluations", pa.int64()),  # last evaluations of each seed, averaged before anything else
        ("seeds", pa.int64()),  # seeds that are used; over tasks: the fewest of any task
        ("seeds_lost", pa.int64()),  # seeds left out because their return is not finite
        ("seeds_diverged", pa.int64()),  # seeds that diverged in training; they are not left out
        ("episodes", pa.int64()),  # of all seeds and members
        ("value", pa.float64()),  # in the unit above; null if no seed is left
        ("low", pa.float64()),  # lower end of the interval; null where none can be trusted
        ("high", pa.float64()),
        ("least", pa.float64()),  # the lowest score of a seed; null over tasks and for one seed
        ("greatest", pa.float64()),  # and the highest
        ("confidence", pa.float64()),  # probability, such as 0.95
        ("method", pa.string()),  # of the interval, a key of `methods.METHODS`; null: no interval
        ("label", pa.string()),  # names the setting: preset and options that tell it apart
    ]
)


def summarise(
    found: Sequence[Cell],
    *,
    last: int = 1,
    confidence: float = 0.95,
    method: str = DEFAULT,
    samples: int = SAMPLES,
    normalise: str = "",
    mix: bool = False,
) -> pa.Table:
    """The final scores of all cells, and those of each setting over the tasks of its family.

    For one environment the statistic is the mean over seeds. Over tasks it is the mean, median, IQM
    and optimality gap of normalised scores (`cerl/report/aggregates.py`). A score has no interval
    where that would not hold the true value as often as it says (`intervals.ONE_GROUP`).

    Args:    found, from `curves.cells`; last, how many of the last evaluations are averaged;
             confidence of the intervals, a probability; method, a key of `methods.METHODS`;
             samples, resamples of a method that resamples; normalise and mix, as `how` and `mix` of
             `aggregates.over_tasks`.
    Returns: a table with the columns of `SUMMARY` and one for each option that differs between the
             cells (null where it is unknown, or differs between tasks); a row for each score of
             each cell, then one for each score and statistic over tasks.
    Raises:  ValueError for last < 1; ConfigError if there is no such normalisation.
    """
    if last < 1:
        raise ValueError(f"last: expected at least 1 evaluation, got {last}")
    how: dict = {"confidence": confidence, "method": method, "samples": samples}
    lines, own = [], []  # rows, and the cells that each of them is of
    for cell in found:
        for score, curve in cell.curves.items():
            used = min(last, len(curve.steps))
            values = final(curve, last=used)
            line = {
                **_facts([cell], score, used),
                **_lost([values]),
                "env": cell.env,
                "unit": "return",
                "step": int(curve.steps[-1]),
            }
            [estimated] = _estimates(["mean"], [values], **how)
            lines.append(line | estimated)
            own.append([cell])
    over, _ = aggregates.over_tasks(found, last=last, how=normalise, mix=mix)
    for one in over:
        line = {
            **_facts(one.cells, one.score, one.evaluations),
            **_lost(one.tasks),
            "env": one.env,
            "unit": one.unit,
            "step": one.step,
        }
        for estimated in _estimates(aggregates.STATISTICS, one.tasks, **how):
            lines.append(line | estimated)
            own.append(one.cells)
    summary = pa.Table.from_pylist(lines, schema=SUMMARY)
    for name, column in settings.option_columns([cell.options for cell in found]).items():
        value = {id(cell): v for cell, v in zip(found, column.to_pylist(), strict=True)}
        each = [{value[id(cell)] for cell in cells} for cells in own]
        values = [texts.pop() if len(texts) == 1 else None for texts in each]
        summary = summary.append_column(name, pa.array(values, column.type))
    return summary


def _facts(own: Sequence[Cell], score: str, used: int) -> dict:
    """Columns of `SUMMARY` that say what a number is of. Args: used, evaluations of each seed."""
    return {
        "preset": own[0].preset,
        "label": own[0].name,
        "config_hash": own[0].config_hash if len(own) == 1 else None,
        "members": own[0].members,
        "score": score,
        "evaluations": used,
        "episodes": sum(int(cell.curves[score].episodes[-used:].sum()) for cell in own),
        "seeds_diverged": sum(len(cell.diverged) for cell in own),
    }


def _lost(tasks: Sequence[np.ndarray]) -> dict:
    """How many seeds have a finite score and how many have not. Args: tasks, [S] scores a task."""
    finite = [int(np.isfinite(task).sum()) for task in tasks]
    return {"seeds": min(finite), "seeds_lost": sum(task.size for task in tasks) - sum(finite)}


def _estimates(names: Sequence[str], tasks: Sequence[np.ndarray], **how: Any) -> list[dict]:
    """Statistics of the finite scores and their intervals, as columns of `SUMMARY`.

    Args: names of the statistics; tasks, one array [S] of scores for each task; how, confidence,
          method and samples of `intervals.single`.
    """
    tasks = [task[np.isfinite(task)] for task in tasks]
    alone = len(tasks) == 1 and len(tasks[0]) > 1
    lines = []
    for name in names:
        found = intervals.single(tasks, statistic=name, **how)
        lines.append(
            {
                "statistic": name,
                "confidence": how["confidence"],
                "value": found.value if math.isfinite(found.value) else None,
                "low": found.low,
                "high": found.high,
                "least": float(tasks[0].min()) if alone else None,
                "greatest": float(tasks[0].max()) if alone else None,
                "method": found.method,
            }
        )
    return lines
