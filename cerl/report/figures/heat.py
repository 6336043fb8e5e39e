"""Draws the final score and the gap to the single agent over the values of two options.

A map has a cell for each pair of values. Scores are a sequence of colours from dark to light, gaps
run from orange (less than the single agent) through white to violet (more); both can be told apart
by colour-blind readers, and every cell holds its number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cerl.config.labels import ordered, rank_of
from cerl.config.numbers import human
from cerl.report import normalise
from cerl.report.curves import Cell, final
from cerl.report.dependence import hashable
from cerl.report.estimate import number
from cerl.report.figures import canvas
from cerl.report.figures.asked import Asked
from cerl.report.figures.look import title_of
from cerl.text import few

GAP = "return less the single agent's"
COLUMNS = 4  # most methods beside each other


def options_of(found: Sequence[Cell], asked: Asked) -> tuple[str, str]:
    """The two options of a map: those asked for, else those with the most values in one method.

    Raises: NoFigure if no two options differ within one method.
    """
    counts: dict[str, int] = {}
    for method in {cell.label.method for cell in found}:
        values: dict[str, set[Any]] = {}
        for cell in found:
            if cell.label.method == method:
                for key, value in cell.label.options.items():
                    values.setdefault(key, set()).add(hashable(value))
        if sum(len(own) > 1 for own in values.values()) > 1:
            for key, own in values.items():
                counts[key] = max(counts.get(key, 0), len(own))
    keys = sorted(ordered(counts), key=lambda key: -counts[key])
    wanted = [key for key in (asked.x, asked.y) if key]
    chosen = [*dict.fromkeys([*wanted, *(key for key in keys if counts[key] > 1)])][:2]
    if len(chosen) < 2 or not set(chosen) <= set(counts):
        raise canvas.NoFigure("no two options differ between the settings of one method")
    return chosen[0], chosen[1]


def draw(found: Sequence[Cell], asked: Asked) -> Figure:
    """Two rows of maps for each task, the score of a member and its gap; a column for each method.

    Where further options differ, the first setting in the order of legends is shown.
    """
    across, down = options_of(found, asked)
    cells: dict[tuple[str, str], dict[tuple[Any, Any], Cell]] = {}
    hidden = 0  # settings whose place has another one
    for cell in found:
        own = cell.label.options
        if across in own and down in own and "individual" in cell.curves:
            place = hashable(own[down]), hashable(own[across])
            there = cells.setdefault((cell.env, cell.label.method), {})
            hidden += place in there
            there.setdefault(place, cell)
    if not cells:
        raise canvas.NoFigure(f"no setting states both {across} and {down}")
    envs = [*dict.fromkeys(env for env, _ in cells)]
    every = [*dict.fromkeys(method for _, method in cells)]
    methods = every[:COLUMNS]
    maps = {
        (e, m, w): _map(cells.get((e, m), {}), found, asked, w)
        for e in envs
        for m in methods
        for w in (False, True)
    }
    kinds = [w for w in (False, True) if any(own for (_, _, k), own in maps.items() if k == w)]
    titles = [f"{title_of(env, found)}: {GAP if w else 'return'}" for env in envs for w in kinds]
    figure, axes = canvas.grid(titles, methods, [], sharey="none", sharex=False)
    short = next(cell.label.short for cell in found)
    names = [short.get(key, key.rpartition(".")[2]) for key in (across, down)]
    for row, (env, what) in enumerate((env, what) for env in envs for what in kinds):
        values = [v for m in methods for v in maps[env, m, what].values() if np.isfinite(v)]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if what:
            high = max(abs(low), abs(high)) or 1.0
            low = -high
        for column, method in enumerate(methods):
            axis, own = axes[row, column], maps[env, method, what]
            if not own:
                canvas.blank(axis)
                continue
            _draw(axis, own, low, high, what)
            axis.set_xlabel(names[0], parse_math=False)
            axis.set_ylabel(names[1], parse_math=False)
    canvas.inner([*axes.ravel()])
    said = []
    if lost := every[COLUMNS:]:
        said.append(f"not drawn, for want of room: {few(lost)}")
    if hidden:
        what = "setting that differs" if hidden == 1 else "settings that differ"
        said.append(f"{hidden} {what} in further options: the first of each place is shown")
    canvas.remark(figure, "; ".join(said))
    return canvas.dress(figure)


def _map(
    own: dict[tuple[Any, Any], Cell], found: Sequence[Cell], asked: Asked, gap: bool
) -> dict[tuple[Any, Any], float]:
    """The number of every pair of values; without those whose gap has no single agent."""
    out = {}
    for place, cell in own.items():
        curve = cell.curves["individual"]
        value = _mean(final(curve, last=asked.last))
        if gap:
            try:
                other = normalise.single_agent(cell, found)
            except normalise.NoScale:
                continue
            if other is cell or "individual" not in other.curves:
                continue
            theirs = other.curves["individual"]
            last = min(curve.steps[-1], theirs.steps[-1])  # the last step that both have
            ends = [c.returns[c.steps <= last][-asked.last :] for c in (curve, theirs)]
            value = _mean(ends[0].mean(0)) - _mean(ends[1].mean(0))
        out[place] = value
    return out


def _mean(scores: np.ndarray) -> float:
    """Mean of the finite scores; NaN where there is none."""
    scores = scores[np.isfinite(scores)]
    return float(scores.mean()) if scores.size else float("nan")


def _draw(axis: Any, own: dict[tuple[Any, Any], float], low: float, high: float, gap: bool) -> None:
    rows, columns = (sorted({place[k] for place in own}, key=rank_of) for k in (0, 1))
    values = np.array([[own.get((r, c), np.nan) for c in columns] for r in rows])
    image = axis.imshow(
        values, vmin=low, vmax=high, cmap="PuOr" if gap else "cividis", aspect="auto"
    )
    for (r, c), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = number(value, size=max(abs(low), abs(high)))
            axis.text(
                c,
                r,
                text,
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize=canvas.SMALL,
            )
    axis.set_xticks(range(len(columns)), [human(value) for value in columns])
    axis.set_yticks(range(len(rows)), [human(value) for value in rows])
    axis.invert_yaxis()
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        text.set_parse_math(False)
