"""Draws performance profiles: for each score, the share of runs that return more.

Source: Agarwal et al. 2021 (arXiv:2108.13264), figure 4. A profile further to the right is better,
and the area between two profiles is the difference of their means.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from cerl.report import methods, statistics
from cerl.report.bands import SAMPLES, finite
from cerl.report.curves import Cell
from cerl.report.figures import canvas
from cerl.report.figures.asked import Asked, panels
from cerl.report.figures.look import bare_of, legend_of, looks, reduced, styles_of
from cerl.report.palette import AGGREGATES

THRESHOLDS = 101  # scores at which a profile is computed
# Bands of fewer tasks, or of fewer runs in all, hold the true share less often than they should
# (docs/statistics.md).
TASKS, RUNS = 3, 25
# Of more scores than MANY, the lowest and the highest OUTER percent are beyond the axis, since a
# single task may have scores far from those of all others.
MANY, OUTER = 500, 2.5
BANDS = 6  # most lines of a panel that have bands


def draw(found: Sequence[Cell], asked: Asked) -> Figure:
    """A panel for each family of tasks (see `asked.panels`), for the final scores of all runs."""
    own, look = panels(reduced(found), asked), looks(found)
    names = [name for name in look if any(line.name == name for p in own for line in p.lines)]
    used = {line.score for panel in own for line in panel.lines}
    handles = legend_of(found, look, names)
    figure, axes = canvas.sheet(len(own), handles + (styles_of(used) if len(used) > 1 else []))
    for axis, panel in zip(axes, own, strict=True):
        tasks = {k: finite(line.finals) for k, line in enumerate(panel.lines)}
        tasks = {k: each for k, each in tasks.items() if min(map(len, each))}
        if not tasks:
            canvas.blank(axis)
            continue
        values = np.concatenate([task for each in tasks.values() for task in each])
        tail = OUTER if len(values) > MANY else 0.0
        low, high = np.percentile(values, [tail, 100.0 - tail])
        edge = 0.02 * ((high - low) or 1.0)
        at = np.linspace(low - edge, high + edge, THRESHOLDS)
        for k, each in tasks.items():
            line, setting = panel.lines[k], look[panel.lines[k].name]
            style = setting.line(line.score)
            axis.plot(at, statistics.profile(each, at), markevery=(5 * k % 20, 20), **style)
            few = len(tasks) <= BANDS and line.score not in AGGREGATES
            if few and len(each) >= TASKS and sum(map(len, each)) >= RUNS:
                low, high = band(each, at, confidence=asked.confidence, method=asked.method)
                axis.fill_between(at, low, high, color=setting.colour, alpha=0.14, linewidth=0)
        canvas.head(axis, panel.title, width=0.85 * canvas.WIDTH / canvas.across(len(own)))
        canvas.label(axis, x=panel.unit, y="share of runs above")
        axis.set_ylim(-0.02, 1.02)
    canvas.inner(axes)
    canvas.remark(figure, bare_of(found))
    return canvas.dress(figure)


def band(
    tasks: Sequence[np.ndarray], at: np.ndarray, *, confidence: float, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a profile at every threshold, as that of a mean of zeros and ones.

    Args:    tasks, scores [S] of each; at [thresholds]; method, a key of `methods.METHODS`.
    Returns: both ends [thresholds] in [0, 1]; where all runs of every task are on one side of a
             threshold they are equal.
    """
    above = [(task[None] > at[:, None]).astype(np.float64) for task in tasks]
    how = {"confidence": confidence, "samples": SAMPLES, "seed": 0}
    low, high = methods.ends(methods.Sample((above,)), statistic="mean", methods=[method], **how)[
        method
    ]
    share = statistics.mean(above)
    low, high = (np.where(np.isfinite(end), end, share) for end in (low, high))
    return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)
