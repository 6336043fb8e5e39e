"""Draws learning curves: one panel for each environment, one colour for each setting.

Members and aggregates have rows of panels of their own, so that a panel has one line for each
setting; the single agent is in both. Many environments have one panel each instead, with dashed
lines for aggregates. More settings than a panel can hold have a row of panels for each method,
where that leaves few lines in each panel. Bands are intervals over seeds
(`cerl/report/bands.py`); of settings with too few seeds for one, every seed is a thin line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from cerl.config.labels import ranked
from cerl.report.bands import Band, band
from cerl.report.curves import Cell, Curve
from cerl.report.figures import canvas
from cerl.report.figures.look import (
    GREY,
    SETTINGS,
    Look,
    bare_of,
    looks,
    parts,
    reduced,
    styles_of,
    text_of_options,
    title_of,
)
from cerl.report.intervals import DEFAULT
from cerl.report.palette import AGGREGATES, shown

ROWS, COLUMNS = 6, 6  # most methods and environments that have panels of their own
LINES = 12  # most settings of a panel of one method
BAND, SEED = 0.16, 0.35  # opacity of a band, and of the line of a single seed
MEMBERS, VOTES = "members", "aggregates"  # titles of rows of panels


class Area(NamedTuple):
    """A band between two curves."""

    steps: np.ndarray  # [T], agent steps of one seed
    low: np.ndarray  # [T]
    high: np.ndarray  # [T]
    colour: Any  # red, green, blue, opacity


class Seeds(NamedTuple):
    """The seeds of a curve that has no band."""

    steps: np.ndarray  # [T], agent steps of one seed
    returns: np.ndarray  # [T, S]
    colour: Any  # red, green, blue, opacity


def draw(found: Sequence[Cell], *, confidence: float = 0.95, method: str = DEFAULT) -> Figure:
    """The learning curves of all cells. A setting has the same colour in all panels.

    Args: confidence of the bands, a probability; method, a key of `methods.METHODS`.
    """
    cells = [cell for cell in reduced(found) if shown(cell)]
    if not cells:
        raise canvas.NoFigure("no setting has an evaluation")
    envs = sorted({cell.env for cell in cells})
    titles = {env: _title(env, [cell for cell in cells if cell.env == env]) for env in envs}
    look, methods = looks(found), methods_apart(cells)
    how = {"confidence": confidence, "method": method}
    bands = {id(curve): band([curve.returns], **how) for c in cells for curve in shown(c).values()}
    handles = _handles(cells, look, methods) + _explained(cells, bands, confidence)
    kinds = [MEMBERS, VOTES] if _has_aggregates(cells) and not methods else []
    if methods or (kinds and len(envs) <= canvas.ACROSS):
        rows = methods or kinds
        turned = len(envs) == 1 and not methods
        across = [titles[env] for env in envs]
        if turned:
            figure, axes = canvas.grid([""], rows, handles, sharey="row")
            figure.suptitle(titles[envs[0]], fontsize=canvas.LARGE, parse_math=False)
            axes = axes.T
        else:
            figure, axes = canvas.grid(rows, across, handles, sharey="col")
        panels = {(r, env): axes[k, c] for k, r in enumerate(rows) for c, env in enumerate(envs)}
    else:
        figure, axes = canvas.sheet(len(envs), handles)
        panels = {("", env): axis for env, axis in zip(envs, axes, strict=True)}
        for env, axis in zip(envs, axes, strict=True):
            canvas.head(axis, titles[env], width=0.85 * canvas.WIDTH / canvas.across(len(envs)))
    for (row, env), panel in panels.items():
        own = [c for c in cells if c.env == env and (not methods or c.label.method == row)]
        areas: list[Area] = []
        alone: list[Seeds] = []
        for cell in own:
            found_areas, found_seeds = _draw(
                panel, cell, look[cell.name], _scores(cell, row), bands
            )
            areas += found_areas
            alone += found_seeds
        if not panel.lines:
            canvas.blank(panel)
            continue
        _fill(panel, areas)
        _thin(panel, alone)
        canvas.label(panel, x="agent steps of one seed", y="return of an episode")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlim(left=0)
    canvas.inner([*panels.values()])
    canvas.remark(figure, bare_of(found))
    return canvas.dress(figure)


def write(found: Sequence[Cell], path: Path, *, confidence: float = 0.95) -> None:
    """Draws the learning curves of all cells into a file; a file of that name is replaced."""
    canvas.save(draw(found, confidence=confidence), path)


def notes(cells: Sequence[Cell]) -> list[str]:
    """What the reader of the learning curves has to know."""
    found = []
    if said := bare_of(cells):
        found.append(f"learning curves: {said}; the table has them")
    own = looks(cells)
    if len(set(own.values())) < len(own):
        found.append(
            f"figures: {len(own)} settings share {len(set(own.values()))} colours with markers, in "
            "the order of the legend; report fewer runs to tell all of them apart"
        )
    return found


def methods_apart(cells: Sequence[Cell]) -> list[str]:
    """The methods that have a row of panels each: none if one panel can hold all settings, or if
    there would be too many panels, or lines in one of them."""
    labels = {cell.name: cell.label for cell in cells}.values()
    methods = [*dict.fromkeys(label.method for label in labels)]
    most = max([label.method for label in labels].count(method) for method in methods)
    small = len({cell.env for cell in cells}) <= COLUMNS and most <= LINES
    return methods if len(labels) > SETTINGS and 1 < len(methods) <= ROWS and small else []


def _has_aggregates(cells: Sequence[Cell]) -> bool:
    return any(set(shown(cell)) & {*AGGREGATES} for cell in cells)


def _scores(cell: Cell, row: str) -> dict[str, Curve]:
    """The scores of a cell that a panel shows. Args: row, title of the panel's row."""
    own = shown(cell)
    if row == MEMBERS:
        return {score: curve for score, curve in own.items() if score not in AGGREGATES}
    if row == VOTES and cell.members > 1:
        return {score: curve for score, curve in own.items() if score in AGGREGATES}
    return own


def _draw(
    panel: Any,
    cell: Cell,
    look: Look,
    scores: Mapping[str, Curve],
    bands: Mapping[int, Band],
) -> tuple[list[Area], list[Seeds]]:
    """Draws lines of a cell. Args: bands by id of a curve.

    Returns: their bands, which `_fill` draws, and the seeds of those without, for `_thin`.
    """
    areas, alone = [], []
    for score, curve in scores.items():
        mean, low, high = bands[id(curve)]
        many = max(len(curve.steps) // 6, 1)
        panel.plot(curve.steps, mean, markevery=many, **look.line(score))
        if low is not None and high is not None:
            areas.append(Area(curve.steps, low, high, to_rgba(look.colour, BAND)))
        elif curve.returns.shape[1] > 1:
            alone.append(Seeds(curve.steps, curve.returns, to_rgba(look.colour, SEED)))
    return areas, alone


def _fill(panel: Any, areas: Sequence[Area]) -> None:
    """Draws bands below the lines of a panel, all in one object of matplotlib: with an object for
    each, as of `fill_between`, a figure of a thousand cells takes twice as long."""
    for x, low, high, _ in areas:
        panel.update_datalim([(x[0], low.min()), (x[-1], high.max())])
    outlines = [
        np.stack([np.append(x, x[::-1]), np.append(low, high[::-1])], axis=1)
        for x, low, high, _ in areas
    ]
    bands = PolyCollection(outlines, facecolors=[area.colour for area in areas], linewidths=0)
    panel.add_collection(bands, autolim=False)
    panel.autoscale_view()


def _explained(cells: Sequence[Cell], bands: Mapping[int, Band], confidence: float) -> list[Line2D]:
    """Lines of the legend that say what bands and thin lines are. Args: bands by id of a curve."""
    curves = [curve for cell in cells for curve in shown(cell).values()]
    sure = [bands[id(curve)].low is not None for curve in curves]
    alone = [curve.returns.shape[1] > 1 for curve in curves]
    wide: dict[str, Any] = {"color": to_rgba(GREY, 2 * BAND), "linewidth": 6.0}
    thin: dict[str, Any] = {"color": to_rgba(GREY, 2 * SEED), "linewidth": 0.5}
    out = []
    if any(sure):
        out.append(Line2D([], [], label=f"{100 * confidence:g}% interval", **wide))
    if any(many and not has for many, has in zip(alone, sure, strict=True)):
        out.append(Line2D([], [], label="one seed, where too few for an interval", **thin))
    return out


def _thin(panel: Any, alone: Sequence[Seeds]) -> None:
    """Draws every seed as a thin line below the others, all in one object of matplotlib."""
    lines, colours = [], []
    for steps, returns, colour in alone:
        seeds = [np.stack([steps, seed], axis=1) for seed in returns.T]
        panel.update_datalim(np.concatenate(seeds))  # which leaves out what is not finite
        lines += seeds
        colours += [colour] * len(seeds)
    panel.add_collection(LineCollection(lines, colors=colours, linewidths=0.5), autolim=False)
    panel.autoscale_view()


def _title(env: str, own: Sequence[Cell]) -> str:
    counts = sorted({len(cell.seeds) for cell in own})
    seeds = "1 seed" if counts == [1] else f"{'-'.join(map(str, counts))} seeds"
    return f"{title_of(env, own)} ({seeds})"


def _handles(
    cells: Sequence[Cell], look: Mapping[str, Look], methods: Sequence[str]
) -> list[Line2D]:
    """Lines of the legend: one for each setting, then a style for each score that is shown.

    Where methods have rows of panels, the legend explains shades and markers in grey, since these
    tell options apart alike in all rows.
    """
    named = {cell.name: cell for cell in cells}
    own: dict[str, Look] = {}
    for name in ranked([cell.label for cell in cells]):
        # In rows of methods, the legend tells options, which look alike in all rows.
        text = text_of_options(named[name]) if methods else name
        own.setdefault(text, look[name]._replace(colour=GREY) if methods else look[name])
    told = parts(cells) if methods else []
    lines = [Line2D([], [], label=name, **found.line()) for name, found in own.items()]
    if told:
        lines = [Line2D([], [], label=text, **Look(c, m, 0).line()) for text, c, m in told]
    used = {score for cell in cells for score in shown(cell)}
    return lines + styles_of(used if len(used) > 1 else ())
