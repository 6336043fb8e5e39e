"""Draws the interquartile mean over tasks against agent steps, or against training time.

On a single task it is that of its seeds, and every seed is a thin line, since no method gives
intervals of it that hold (docs/statistics.md). Training time is that of a run with all of its
seeds, on the device that it had, as its rows tell it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from cerl.report.bands import band, finite
from cerl.report.curves import Cell
from cerl.report.figures import canvas
from cerl.report.figures.asked import Asked, Line, Panel, panels
from cerl.report.figures.look import (
    SETTINGS,
    Look,
    bare_of,
    legend_of,
    looks,
    reduced,
    styles_of,
)
from cerl.report.palette import AGGREGATES

Clock = Mapping[tuple[str, str, str, int], float]  # hours by env, preset, config_hash and step


def draw_steps(found: Sequence[Cell], asked: Asked) -> Figure:
    """Against agent steps of one seed; a panel for each family of tasks (see `asked.panels`)."""
    return _draw(found, panels(reduced(found), asked), None, asked)


def draw_time(found: Sequence[Cell], asked: Asked) -> Figure:
    """Against hours of training; over tasks, their mean at equal steps."""
    if asked.rows is None:
        raise canvas.NoFigure("the rows, which tell the training time, were not given")
    clock = _clock(asked)
    own = []
    for panel in panels(reduced(found), asked):
        lines = [line for line in panel.lines if np.isfinite(_hours(line, clock)).any()]
        if lines:
            own.append(panel._replace(lines=lines))
    if not own:
        raise canvas.NoFigure("no row tells how long its run had trained")
    return _draw(found, own, clock, asked)


def _draw(found: Sequence[Cell], own: Sequence[Panel], clock: Clock | None, asked: Asked) -> Figure:
    look = looks(found)
    names = [name for name in look if any(x.name == name for p in own for x in p.lines)]
    used = {line.score for panel in own for line in panel.lines}
    handles = legend_of(found, look, names)
    handles += styles_of(used) if len(used) > 1 else []
    rows = ["members", "aggregates"] if used & {*AGGREGATES} else [""]
    if len(own) == 1:
        figure, axes = canvas.grid([""], rows, handles, sharey="row")
        figure.suptitle(own[0].title, fontsize=canvas.LARGE, parse_math=False)
        axes = axes.T
    elif len(rows) == 1:
        figure, axes = canvas.sheet(len(own), handles)
        for axis, panel in zip(axes, own, strict=True):
            canvas.head(axis, panel.title, width=0.85 * canvas.WIDTH / canvas.across(len(own)))
        axes = np.array([axes])
    else:
        titles = [panel.title for panel in own]
        figure, axes = canvas.grid(rows, titles, handles, sharey="col", sharex=False)
    for k, row in enumerate(rows):
        for axis, panel in zip(axes[k], own, strict=True):
            for line in panel.lines:
                if row and (line.score in AGGREGATES) != (row == "aggregates") and not _alone(line):
                    continue
                x = line.curves[0].steps if clock is None else _hours(line, clock)
                bare = len({x.name for x in panel.lines}) > SETTINGS
                _line(axis, line, x, look[line.name], asked, bare=bare)
            if not axis.lines:
                canvas.blank(axis)
                continue
            said = "agent steps of one seed" if clock is None else "training time of a run, hours"
            canvas.label(axis, x=said, y=f"IQM of {panel.unit}")
            if clock is None:
                axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
    canvas.inner([axis for line in axes for axis in line])
    canvas.remark(figure, bare_of(found))
    return canvas.dress(figure)


def _alone(line: Line) -> bool:
    """Whether a line is of a single agent, which stands beside members and beside aggregates."""
    return line.cells[0].members == 1


def _line(axis: Any, line: Line, x: np.ndarray, look: Look, asked: Asked, *, bare: bool) -> None:
    """Draws one score; seeds that have a NaN at any step are left out.

    Args: bare, without a band, as in panels of many settings.
    """
    tasks = finite([curve.returns for curve in line.curves])
    if not min(task.shape[-1] for task in tasks):
        return
    how = {"method": asked.method, "confidence": asked.confidence}
    value, low, high = band(tasks, statistic="iqm", **how)
    axis.plot(x, value, markevery=max(len(x) // 6, 1), **look.line(line.score))
    if bare:
        return
    strength = 0.08 if line.score in AGGREGATES else 0.14
    if low is not None and high is not None:
        axis.fill_between(x, low, high, color=look.colour, alpha=strength, linewidth=0)
    elif len(tasks) == 1:
        axis.plot(x, tasks[0], color=look.colour, alpha=0.35, linewidth=0.5)


def _clock(asked: Asked) -> Clock:
    """Hours that runs had trained, mean over the runs of a setting."""
    table = asked.rows
    assert table is not None, "the caller has checked it"
    known = table.filter(pc.field("wall_seconds").is_valid())
    keys = ["env", "preset", "config_hash", "step"]
    grouped = known.group_by(keys, use_threads=False).aggregate([("wall_seconds", "mean")])
    columns = [grouped[name].to_pylist() for name in (*keys, "wall_seconds_mean")]
    return {
        key: seconds / 3600 for *key, seconds in zip(*columns, strict=True) for key in [(*key,)]
    }


def _hours(line: Line, clock: Clock) -> np.ndarray:
    """Hours at every step of a line, [T]; NaN where rows do not tell."""
    each = [
        [clock.get((c.env, c.preset, c.config_hash, int(step)), np.nan) for step in curve.steps]
        for c, curve in zip(line.cells, line.curves, strict=True)
    ]
    return np.mean(each, axis=0)
