"""Draws the points of `cerl/report/dependence.py`: final scores against one option.

There is a column of panels for each environment, and a row for each combination of the other
options that differ, such as the capacity of the replay. A method has the same colour in all panels.
Lines are solid with filled markers for individual scores, and dashed with hollow markers for
aggregates. Scores that do not depend on the option are horizontal lines. Where there would be too
many rows, a panel has a line for each setting instead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cerl.config.labels import ordered, rank_of
from cerl.config.numbers import human
from cerl.report.curves import Cell
from cerl.report.dependence import Point, hashable
from cerl.report.figures import canvas
from cerl.report.figures.look import GREY, Look, looks, styles_of, title_of
from cerl.report.palette import AGGREGATES

WIDE = 8.0  # the axis is logarithmic if its largest value is more than this times its smallest
CLOSE = 0.07  # two ticks that are closer than this part of the axis have one text
DOT: dict[str, Any] = {"linestyle": "", "marker": ".", "markersize": 2.5}  # a single seed
ROWS = 6  # most combinations of other options that have a row of panels each
COLUMNS = 6  # most environments that have a column each; more of them are rows
APART = 0.012  # distance of two lines at one value of the option, as a part of the axis


class Scale(NamedTuple):
    """The horizontal axis of all panels."""

    places: dict[Any, float]  # of each value of the option
    logarithmic: bool

    def moved(self, value: Any, by: float) -> float:
        """The place of a value, moved to the right by a part of the axis."""
        place = self.places[hashable(value)]
        low, high = min(self.places.values()), max(self.places.values())
        if self.logarithmic:
            return place * (high / low) ** by
        return place + by * ((high - low) or 1.0)


def draw(found: Sequence[Cell], own: Sequence[Point], *, key: str) -> Figure:
    """The figure of some points. A mean of so few seeds that it has no interval has a point for
    every seed instead.

    Args: found, all cells of the report; own, from `dependence.points`; key, dotted, of the option.
    """
    if not own:
        raise canvas.NoFigure(f"no setting has a score at a value of {key}")
    names = found[0].label.short
    option = names.get(key, key.rpartition(".")[2].replace("_", " "))
    lines = rows(own)
    called = [p.method if lines else p.setting for p in own]
    look = _looks(found, key, methods=bool(lines))
    handles = _handles(own, called, lines, look)
    envs = [*dict.fromkeys(point.panel for point in own)]
    titles = {env: title_of(env, found) for env in envs}
    if lines:
        figure, panels = _grid(envs, titles, lines, handles, names)
    else:
        figure, axes = canvas.sheet(len(envs), handles)
        panels = {(env, 0): axis for env, axis in zip(envs, axes, strict=True)}
        for axis, env in zip(axes, envs, strict=True):
            axis.sharex(axes[0])
            canvas.head(axis, titles[env], width=0.85 * canvas.WIDTH / canvas.across(len(envs)))
    values = sorted({hashable(p.x): p.x for p in own if not p.constant}.values(), key=rank_of)
    across = [*dict.fromkeys(c for c, p in zip(called, own, strict=True) if not p.constant)]
    step = min(APART, 0.08 / max(len(across), 1))
    for (env, k), axis in panels.items():
        scale = _scale(axis, values)
        groups: dict[tuple[str, str], list[Point]] = {}
        for name, point in zip(called, own, strict=True):
            if point.panel == env and (not lines or within(point, lines[k])):
                groups.setdefault((name, point.score), []).append(point)
        for (name, score), line in groups.items():
            place = across.index(name) - (len(across) - 1) / 2 if name in across else 0.0
            place += 0.3 if score in AGGREGATES else 0.0
            _line(axis, line, scale, look[name].line(score), place * step)
        if not groups:
            canvas.blank(axis)
            continue
        unit = next(line[0].unit for line in groups.values())
        said = "final return" if unit == "return" else f"{unit},\nIQM over tasks"
        canvas.label(axis, x=option, y=said)
    if lines:
        canvas.inner([*panels.values()])
    return canvas.dress(figure)


def _looks(found: Sequence[Cell], key: str, *, methods: bool) -> dict[str, Look]:
    """The look of each line: of each method, or of each setting of all options but one."""
    labels = [cell.label.without(key) for cell in found]
    if methods:
        labels = [label._replace(options={}) for label in labels]
    whole = [cell._replace(label=label) for cell, label in zip(found, labels, strict=True)]
    own = looks(whole)
    return own | {label.method: own[label.text] for label in labels if methods}


def rows(own: Sequence[Point]) -> list[dict[str, Any]]:
    """The combinations of other options that have a row of panels each.

    A setting that lacks some of the options, such as a single agent where the other option is one
    of ensembles, belongs to every row that agrees with the options it has.

    Returns: values by dotted key, in the order of the values; none at all if no other option
             differs, if there would be more than `ROWS` rows, or if a row would have two settings
             of one method.
    """
    found = {tuple(sorted((k, hashable(v)) for k, v in p.others.items())): p.others for p in own}
    codes = {code: set(code) for code in found}
    widest = [code for code in codes if not any(codes[code] < other for other in codes.values())]
    if not 1 < len(widest) <= ROWS:
        return []
    keys = ordered(key for code in widest for key, _ in code)
    wanted = [dict(found[code]) for code in widest]
    wanted.sort(key=lambda row: [(key in row, rank_of(row.get(key))) for key in keys])
    settings = {p.setting: p for p in own}.values()
    for row in wanted:
        methods = [p.method for p in settings if within(p, row)]
        if len(methods) > len(set(methods)):
            return []
    return wanted


def within(point: Point, row: Mapping[str, Any]) -> bool:
    """Whether a point belongs to a row: it agrees with the row in all options that it has."""
    return all(key in row and row[key] == value for key, value in point.others.items())


def _grid(
    envs: Sequence[str],
    titles: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    handles: Sequence[Line2D],
    names: Mapping[str, str],
) -> tuple[Figure, dict[tuple[str, int], Any]]:
    """A figure with a panel for each environment and row of options. A single environment, or more
    than `COLUMNS` of them, are rows instead, and the options columns. An environment has one
    vertical axis.

    Returns: the figure; its panels by environment and index of the options.
    """
    said = [
        ", ".join(f"{names.get(k, k.rpartition('.')[2])} {human(v)}" for k, v in row.items())
        for row in lines
    ]
    told = [titles[env] for env in envs]
    turned = len(envs) > COLUMNS or (len(envs) == 1 and len(lines) <= COLUMNS)
    if turned:
        figure, axes = canvas.grid(told, said, handles, sharey="row")
        axes = axes.T
    else:
        figure, axes = canvas.grid(said, told, handles, sharey="col")
    return figure, {(env, k): axes[k, c] for c, env in enumerate(envs) for k in range(len(lines))}


def _handles(
    own: Sequence[Point],
    called: Sequence[str],
    lines: Sequence[Mapping[str, Any]],
    look: Mapping[str, Look],
) -> list[Line2D]:
    """The legend: a colour for each line, then a style for each score.

    Args: called, the name of each point's line; lines, rows of the figure; look of each line.
    """
    handles = []
    for name in dict.fromkeys(called):
        mine = [point for point, other in zip(own, called, strict=True) if other == name]
        text, line = name, look[name].line()
        if all(point.constant for point in mine):
            line["marker"] = ""
            text += " (single agent)" if all(point.alone for point in mine) else ""
        if any(sum(within(point, row) for row in lines) > 1 for point in mine):
            text += ", the same in several rows"
        handles.append(Line2D([], [], label=text, **line))
    handles += styles_of({point.score for point in own})
    if any(point.estimate["low"] is None and len(point.seeds) > 1 for point in own):
        handles.append(
            Line2D([], [], label="one seed, where too few for an interval", color=GREY, **DOT)
        )
    return handles


def _scale(axis: Any, values: Sequence[Any]) -> Scale:
    """Sets the scale and the ticks of an axis."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    places = [float(v) if numbers else float(k) for k, v in enumerate(values)]
    if not places:
        axis.set_xticks([])
        return Scale({}, False)
    far = [*places]
    logarithmic = numbers and places[0] > 0 and places[-1] > WIDE * places[0]
    if logarithmic:
        axis.set_xscale("log")
        far = [math.log(place) for place in places]
    span, last, texts = (far[-1] - far[0]) or 1.0, None, []
    for place, value in zip(far, values, strict=True):
        near = last is not None and place - last < CLOSE * span
        texts.append("" if near else human(value))
        last = last if near else place
    axis.set_xticks(places, texts)
    axis.minorticks_off()
    for text in axis.get_xticklabels():
        text.set_parse_math(False)
    return Scale({hashable(v): p for v, p in zip(values, places, strict=True)}, logarithmic)


def _line(axis: Any, line: Sequence[Point], scale: Scale, look: Mapping, by: float) -> None:
    """Draws one score of one method or setting: a line with intervals, or a horizontal band.

    Args: by, how far it is moved to the right, as a part of the axis.
    """
    nothing = float("nan")
    value, low, high = (
        [nothing if p.estimate[name] is None else p.estimate[name] for p in line]
        for name in ("value", "low", "high")
    )
    hollow, colour = "markerfacecolor" in look, look["color"]
    if line[0].constant:
        axis.axhline(value[0], **{k: look[k] for k in ("color", "linestyle", "linewidth")})
        if line[0].estimate["low"] is not None:
            axis.axhspan(low[0], high[0], color=colour, alpha=0.05 if hollow else 0.12, linewidth=0)
        elif not hollow and len(line[0].seeds) > 1:
            edge = [0.02] * len(line[0].seeds)  # of the panel's width
            axis.plot(
                edge, line[0].seeds, color=colour, transform=axis.get_yaxis_transform(), **DOT
            )
        return
    x = [scale.moved(p.x, by) for p in line]
    axis.plot(x, value, zorder=3, **look)
    axis.vlines(x, low, high, color=colour, linewidth=0.9, alpha=0.6 if hollow else 1.0)
    if hollow:
        return
    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    for place, point in zip(x, line, strict=True):
        if point.estimate["low"] is None and len(point.seeds) > 1:
            axis.plot([place] * len(point.seeds), point.seeds, color=colour, **DOT)
