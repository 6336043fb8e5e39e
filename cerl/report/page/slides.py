"""Figures of the page over training: scores of every task at a step, and those over tasks.

A slider chooses the step; each of its positions is a frame of the figure.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cerl.report import aggregates, normalise, statistics
from cerl.report.curves import Cell, Curve
from cerl.report.page.looks import (
    Chart,
    Look,
    Trace,
    label_of,
    layout_of,
    looks,
    numbers,
    safe,
)
from cerl.report.palette import BROKEN, shown

SLIDES = 24  # most positions of a slider


def _slides(steps: Iterable[int]) -> list[int]:
    """At most SLIDES of some steps, evenly, with the first and the last."""
    each = sorted(set(steps))
    if len(each) <= SLIDES:
        return each
    chosen = np.linspace(0, len(each) - 1, SLIDES).round().astype(int)
    return [each[k] for k in dict.fromkeys(chosen.tolist())]


def _at(curve: Curve, step: int) -> np.ndarray:
    """Scores [S] at the last evaluation up to a step; NaN before the first."""
    place = int(np.searchsorted(curve.steps, step, side="right")) - 1
    return curve.returns[place] if place >= 0 else np.full(curve.returns.shape[1], np.nan)


def _slider(steps: Sequence[int]) -> dict[str, Any]:
    """The slider of a chart whose frames are named by their step."""
    moves = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}}
    moves["transition"] = {"duration": 0}
    return {
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "agent steps: "},
        "pad": {"t": 40},
        "steps": [
            {"label": f"{step:,}", "method": "animate", "args": [[str(step)], moves]}
            for step in steps
        ],
    }


def _sliding(
    key: str,
    group: str,
    about: str,
    title: str,
    frames: Sequence[list[Trace]],
    steps: Sequence[int],
    layout: dict[str, Any],
) -> Chart:
    """A chart with a step slider. Args: frames, the traces at each of the steps."""
    layout = {**layout, "sliders": [_slider(steps)]}
    named = [
        {
            "name": str(step),
            "data": [{k: t[k] for k in ("x", "y", "error_x") if k in t} for t in own],
        }
        for step, own in zip(steps, frames, strict=True)
    ]
    figure = {"data": frames[-1], "layout": layout, "frames": named}
    return Chart(key, group, about, title, figure, layout["height"], True)


def at_steps(found: Sequence[Cell]) -> list[Chart]:
    """The scores of all tasks of a family at a step, with a slider; a chart for each family."""
    out = []
    styles = looks(found)
    for family in dict.fromkeys(cell.env.partition("/")[0] for cell in found):
        own = [c for c in found if c.env.partition("/")[0] == family and shown(c)]
        steps = _slides(
            int(step) for cell in own for curve in shown(cell).values() for step in curve.steps
        )
        if not own or not steps:
            continue
        scales, unit = _scales(own, found)
        named: dict[tuple[str, str], list[Cell]] = {}
        for cell in own:
            for score in shown(cell):
                named.setdefault((cell.name, score), []).append(cell)
        each = []
        for step in steps:
            each.append(
                [
                    _points(cells, score, step, scales, styles[name], number)
                    for number, ((name, score), cells) in enumerate(named.items())
                ]
            )
        ends = [end for frame in each for trace in frame for end in _ends(trace)]
        if not ends:
            continue
        span = max(ends) - min(ends) or 1.0
        tasks = len({cell.env for cell in own})
        height = 260 + tasks * max(40, 14 * len(named)) + 12 * len(named)
        envs = [*dict.fromkeys(safe(c.env.partition("/")[2] or c.env) for c in own)]
        layout = layout_of(
            unit,
            "",
            height=height,
            xaxis={"range": [min(ends) - 0.03 * span, max(ends) + 0.03 * span]},
            yaxis={
                "tickvals": [*range(len(envs))],
                "ticktext": envs,
                "range": [len(envs) - 0.4, -0.6],
                "zeroline": False,
            },
            legend={"y": 1.0, "yanchor": "bottom"},
        )
        about = (
            "Every setting at the last evaluation up to the step of the slider. Points are means "
            "over seeds, bars reach from the least to the greatest seed."
        )
        title = f"{family}, {unit}"
        out.append(
            _sliding(f"at-{len(out)}", "Scores at a step", about, title, each, steps, layout)
        )
    return out


def _ends(trace: Trace) -> list[float]:
    """Both ends of all bars of a trace."""
    bars = trace["error_x"]
    each = zip(trace["x"], bars["arrayminus"], bars["array"], strict=True)
    return [end for x, low, high in each if x is not None for end in (x - low, x + high)]


def _scales(own: Sequence[Cell], found: Sequence[Cell]) -> tuple[dict[str, normalise.Scale], str]:
    """A scale for every environment of a family and what it is called; none where there is a
    single one, or where an environment has no scale."""
    envs = {cell.env: cell for cell in own}
    if len(envs) > 1:
        for name in normalise.by_default(own[0].env.partition("/")[0]):
            try:
                scales = {
                    env: normalise.scale_of(cell, next(iter(shown(cell))), found, name, last=1)
                    for env, cell in envs.items()
                }
            except (normalise.NoScale, ValueError):
                continue
            return scales, normalise.NORMALISATIONS[name].unit
    return {env: normalise.Scale(0.0, 1.0) for env in envs}, "return"


def _points(
    cells: Sequence[Cell],
    score: str,
    step: int,
    scales: dict[str, normalise.Scale],
    look: Look,
    number: int,
) -> Trace:
    """One score of a setting on every task at a step. Args: number, of the trace in its chart."""
    envs = [*scales]
    low, mean, high, places = [], [], [], []
    for cell in cells:
        values = scales[cell.env](_at(cell.curves[score], step))
        values = values[np.isfinite(values)]
        some = values.size > 0
        low.append(values.min() if some else math.nan)
        mean.append(values.mean() if some else math.nan)
        high.append(values.max() if some else math.nan)
        # Traces of one task stand below each other.
        places.append(envs.index(cell.env) + 0.07 * (number % 12) - 0.38)
    average = np.asarray(mean)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(mean),
        "y": numbers(places),
        "name": label_of(cells[0], score),
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 8}
        | ({} if score not in BROKEN else {"opacity": 0.55}),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": numbers(np.asarray(high) - average),
            "arrayminus": numbers(average - np.asarray(low)),
            "color": look.colour,
            "thickness": 1,
            "width": 0,
        },
        "hovertemplate": "%{x:,.4g}<extra>%{fullData.name}</extra>",
    }


def over_tasks(found: Sequence[Cell]) -> list[Chart]:
    """IQM of normalised scores against steps, and performance profiles with a step slider."""
    made, _ = aggregates.over_tasks(found)
    groups: dict[tuple[str, str], list[aggregates.Aggregate]] = {}
    for one in made:
        groups.setdefault((one.family, one.how), []).append(one)
    styles = looks(found)
    out = []
    for (family, how), own in groups.items():
        unit = own[0].unit
        lines, profiles = [], []
        steps = _slides(_common(own[0]).tolist())
        if not steps:
            continue
        every = {id(one): _scaled(one, found, how) for one in own}
        values = [x for tasks in every.values() for task in tasks for x in task.ravel()]
        finite = np.asarray([x for x in values if math.isfinite(x)])
        if not finite.size:
            continue
        thresholds = np.linspace(min(0.0, finite.min()), np.quantile(finite, 0.99), 60)
        profiles = [[] for _ in steps]
        for one in own:
            look = styles[one.cells[0].name]
            name = label_of(one.cells[0], one.score)
            member = one.score not in BROKEN
            line = {"color": look.colour, "width": 2, "dash": look.dash if member else "dot"}
            common = _common(one)
            tasks = [task[:, np.isfinite(task).all(0)] for task in every[id(one)]]
            if min(task.shape[1] for task in tasks) == 0:
                continue
            common_trace = {"type": "scatter", "mode": "lines", "name": name, "line": line}
            iqm = statistics.iqm(tasks)
            lines.append(
                {**common_trace, "x": common.tolist(), "y": numbers(iqm)}
                | {"hovertemplate": "%{y:.3f} at %{x:,} steps"}
            )
            for k, step in enumerate(steps):
                place = int(np.searchsorted(common, step, side="right")) - 1
                at = [task[max(place, 0)] for task in tasks]
                share = statistics.profile(at, thresholds)
                profiles[k].append(
                    {**common_trace, "x": numbers(thresholds), "y": numbers(share)}
                    | {"hovertemplate": "%{y:.0%} of runs above %{x:.3g}"}
                )
        if not lines:
            continue
        legend = {"y": -0.2}
        height = 400 + 20 * len(lines)
        layout = layout_of("agent steps of one seed", f"IQM, {unit}", height=height, legend=legend)
        count = f"{len(own[0].cells)} tasks"
        out.append(
            Chart(
                f"iqm-{len(out)}",
                "Over tasks",
                "The interquartile mean of the normalised scores of all tasks and seeds; and the "
                "share of tasks and seeds whose score is above a threshold, at the step of the "
                "slider.",
                f"{family} ({count}): IQM against steps",
                {"data": lines, "layout": layout},
                height,
                True,
            )
        )
        layout = layout_of(
            f"threshold, {unit}",
            "share of runs above it",
            height=height + 120,
            yaxis={"range": [0, 1.02], "tickformat": ".0%"},
            legend={"y": 1.0, "yanchor": "bottom"},
        )
        title = f"{family} ({count}): performance profile"
        about = out[-1].about
        out.append(
            _sliding(f"profile-{len(out)}", "Over tasks", about, title, profiles, steps, layout)
        )
    return out


def _common(one: aggregates.Aggregate) -> np.ndarray:
    """The steps [T] that all tasks of an aggregate have."""
    steps = one.cells[0].curves[one.score].steps
    for cell in one.cells[1:]:
        steps = np.intersect1d(steps, cell.curves[one.score].steps)
    return steps


def _scaled(one: aggregates.Aggregate, found: Sequence[Cell], how: str) -> list[np.ndarray]:
    """Normalised scores [T, S] of each task at the steps that all tasks have."""
    common = _common(one)
    out = []
    for cell in one.cells:
        curve = cell.curves[one.score]
        scale = normalise.scale_of(cell, one.score, found, how, last=one.evaluations)
        out.append(scale(curve.returns[np.isin(curve.steps, common)]))
    return out
