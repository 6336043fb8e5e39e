"""What a user asks of figures, and the scores that several figures show: settings over tasks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cerl.report import aggregates, normalise
from cerl.report.aggregates import Aggregate
from cerl.report.curves import Cell, Curve
from cerl.report.figures.canvas import NoFigure
from cerl.report.figures.look import title_of
from cerl.report.intervals import DEFAULT
from cerl.report.palette import shown
from cerl.report.verdicts import Verdict


class Asked(NamedTuple):
    """How figures are drawn, and what they read beside the cells of a report."""

    last: int = 1  # evaluations of each seed that a final score averages
    how: str = ""  # normalisation, a key of `normalise.NORMALISATIONS`; "": by family
    mix: bool = False  # whether scores of different protocols are aggregated
    confidence: float = 0.95  # a probability
    method: str = DEFAULT  # of all intervals, a key of `methods.METHODS`
    x: str = ""  # dotted key of an option; "": none
    y: str = ""  # dotted key of a second option, for maps of two; "": the next that differs
    rows: pa.Table | None = None  # from `curves.load_rows`
    summary: pa.Table | None = None  # from `summary.summarise`, for figure score
    judged: Sequence[Verdict] = ()  # verdicts of the same cells


class Line(NamedTuple):
    """One score of one setting, on one task or on several of a family."""

    name: str  # the label of the setting
    score: str  # a key of `curves.SCORES`
    cells: list[Cell]  # on each task
    curves: list[Curve]  # of each task, on the panel's scale
    finals: list[np.ndarray]  # [S] final scores of each task


class Panel(NamedTuple):
    """Scores on one scale."""

    title: str  # a task, or "minatar (2 tasks)"
    unit: str  # such as "human-normalised score"
    several: bool  # more than one task
    lines: list[Line]


def panels(found: Sequence[Cell], asked: Asked) -> list[Panel]:
    """A panel for each family whose settings can be aggregated over tasks, and else for each task.

    Raises: NoFigure if there is no evaluation at all.
    """
    over, _ = aggregates.over_tasks(found, last=asked.last, how=asked.how, mix=asked.mix)
    first: dict[str, str] = {}
    for one in over:
        first.setdefault(one.family, one.how)
    out = []
    for family, how in first.items():
        own = [one for one in over if one.family == family and one.how == how]
        lines = [_over(one, found) for one in own if one.score in shown(one.cells[0])]
        out.append(Panel(own[0].env, f"{own[0].unit} score", True, lines))
    for env in dict.fromkeys(cell.env for cell in found):
        if env.partition("/")[0] in first:
            continue
        lines = [
            Line(cell.name, score, [cell], [curve], [normalise.final(curve, last=asked.last)])
            for cell in found
            if cell.env == env
            for score, curve in shown(cell).items()
        ]
        if lines:
            out.append(Panel(title_of(env, found), "return of an episode", False, lines))
    if not out:
        raise NoFigure("no setting has an evaluation")
    return out


def _over(one: Aggregate, found: Sequence[Cell]) -> Line:
    """A score over several tasks, with its curves at the steps that all tasks have."""
    used = [cell.curves[one.score] for cell in one.cells]
    steps = used[0].steps
    for curve in used:
        steps = np.intersect1d(steps, curve.steps)
    curves = []
    for cell, curve in zip(one.cells, used, strict=True):
        scale = normalise.scale_of(cell, one.score, found, one.how, last=one.evaluations)
        at = np.isin(curve.steps, steps)
        curves.append(Curve(steps, scale(curve.returns[at]), curve.episodes[at]))
    return Line(one.cells[0].name, one.score, one.cells, curves, one.tasks)
