"""Draws learning curves into a PNG: one panel for each environment, one colour for each preset.

Lines are solid for the individual score or the active member, dashed for aggregates, dotted for the
passive member. Bands are bootstrap intervals over seeds. The colours are those of Okabe and Ito,
which colour-blind readers can tell apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from cerl.record.files import write_atomically
from cerl.report import statistics
from cerl.report.curves import Cell, Curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("", "o", "s", "^")  # of presets 1 to 8, 9 to 16, ..., since eight colours repeat

# Line style and legend text of each score.
STYLES: dict[str, tuple[Any, str]] = {
    "individual": ("-", "individual (mean over members)"),
    "random": ((0, (8, 2)), "individual (drawn member)"),
    "vote": ("--", "aggregate (vote)"),
    "mean": ("-.", "aggregate (mean)"),
    "active": ("-", "active"),
    "passive": (":", "passive"),
    "individual_mode": ((0, (1, 1)), "individual, modes"),
    "mean_mode": ((0, (3, 1, 1, 1)), "aggregate (mean), modes"),
    "active_mode": ((0, (1, 1)), "active, modes"),
    "passive_mode": ((0, (1, 3)), "passive, modes"),
}
SAMPLES = 2_000  # bootstrap samples of a band


def shown(cell: Cell) -> dict[str, Curve]:
    """The curves of a cell that are drawn, by score.

    Left out are aggregates where there is a single member (they repeat its score) and in a tandem,
    whose two members are compared with each other; and the drawn member where all members are
    averaged anyway.
    """
    plain = cell.members > 1 and "active" not in cell.curves
    hidden = set() if plain else {"vote", "mean", "mean_mode"}
    if "individual" in cell.curves:
        hidden.add("random")
    return {score: curve for score, curve in cell.curves.items() if score not in hidden}


def curves(cells: Sequence[Cell], path: Path, *, confidence: float = 0.95) -> None:
    """Draws the learning curves of all cells into a PNG; a file of that name is replaced.

    Args: path of the PNG; confidence of the bands, a probability.
    """
    envs = sorted({cell.env for cell in cells})
    presets = list(dict.fromkeys(cell.preset for cell in cells))
    columns = 2 if len(envs) in (2, 4) else min(len(envs), 3)
    lines = -(-len(envs) // columns)
    handles = _handles(cells, presets)
    width = max(5.4 * columns, 7.0)
    legend = min(int(width / 2.6), len(handles))  # columns
    height = 3.9 * lines + 0.24 * -(-len(handles) // legend) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # pyright: ignore
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, env in zip(panels, envs, strict=False):
        own = [cell for cell in cells if cell.env == env]
        for cell in own:
            _draw(panel, cell, presets.index(cell.preset), confidence)
        _label(panel, env, own)
    for panel in panels[len(envs) :]:
        panel.set_axis_off()
    look = {"frameon": False, "fontsize": 9, "handlelength": 2.8}
    box = figure.legend(handles=handles, loc="outside lower center", ncols=legend, **look)
    for text in box.get_texts():
        text.set_parse_math(False)  # a dollar in a preset's name is a dollar
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=140))


def _look(number: int) -> dict[str, Any]:
    marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4}


def _draw(panel: Any, cell: Cell, number: int, confidence: float) -> None:
    for score, curve in shown(cell).items():
        look = _look(number) | {"linestyle": STYLES[score][0], "linewidth": 1.8}
        if len(curve.steps) == 1 and not look["marker"]:
            look["marker"] = "o"
        value, low, high = band(curve, confidence=confidence)
        panel.plot(curve.steps, value, markevery=max(len(curve.steps) // 8, 1), **look)
        if low is not None:
            strength = 0.07 if score in ("vote", "mean", "mean_mode") else 0.16
            colour = look["color"]
            panel.fill_between(curve.steps, low, high, color=colour, alpha=strength, linewidth=0)


def band(
    curve: Curve, *, confidence: float
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Mean over seeds and its bootstrap interval, without seeds that have a NaN at any step.

    Returns: mean [T], and the interval's lower and upper end [T]; None for both ends where fewer
             than two seeds remain.
    """
    returns = curve.returns[:, np.isfinite(curve.returns).all(0)]
    if returns.shape[1] == 0:
        return np.full(len(curve.steps), np.nan), None, None
    if returns.shape[1] == 1:
        return returns[:, 0], None, None
    low, high = statistics.interval(
        statistics.mean, [returns], samples=SAMPLES, confidence=confidence
    )
    return returns.mean(1), low, high


def _label(panel: Any, env: str, own: Sequence[Cell]) -> None:
    counts = sorted({len(cell.seeds) for cell in own})
    seeds = "1 seed" if counts == [1] else f"{'-'.join(map(str, counts))} seeds"
    panel.set_title(f"{env} ({seeds})", fontsize=11, parse_math=False)
    panel.set_xlabel("agent steps of one seed")
    panel.set_ylabel("return")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _handles(cells: Sequence[Cell], presets: Sequence[str]) -> list[Line2D]:
    """Lines of the legend: a colour for each preset, then a style for each score that is shown."""
    used = {score for cell in cells for score in shown(cell)}
    styles = [style for score, style in STYLES.items() if score in used]
    look = {"color": "#555555", "linewidth": 1.8}
    return [
        *(Line2D([], [], label=name, linewidth=2.5, **_look(k)) for k, name in enumerate(presets)),
        *(Line2D([], [], linestyle=line, label=label, **look) for line, label in styles),
    ]
