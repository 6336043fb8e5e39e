"""Draws how far members are from a single agent, against the share of data that they made.

A member of an ensemble of N makes 1/N of the rows that it learns from. With batches of its own in a
share q of updates it is q + (1 - q)/N of the rows learnt; the passive member of a tandem makes
1 - p, where p is the probability that the active one acts (Lin et al. 2024, arXiv:2405.04342,
figures 2 and 5). A tandem's gap is that to its active member.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cerl.config.labels import value_of
from cerl.report import intervals, normalise, roles
from cerl.report.curves import Cell, final
from cerl.report.figures import canvas
from cerl.report.figures.asked import Asked
from cerl.report.figures.look import GREY, legend_of, looks, title_of
from cerl.report.intervals import Interval
from cerl.report.settings import Options

# Distance of two points with the same share, and most of all of them, as parts of the axis.
NUDGE, SPREAD = 0.04, 0.09


class Gap(NamedTuple):
    """The difference of members of one setting on one task to the single agent."""

    cell: Cell
    share: float  # of own rows, in [0, 1]
    gap: Interval  # return


def share_of(options: Options) -> float:
    """The share of the rows that a member learns from which it made itself; a tandem's is that of
    the passive member.

    Args: options, differences from the defaults.
    """
    members = int(value_of(options, "ensemble.members"))
    if members > 1 and value_of(options, "ensemble.duty") == "tandem":
        return 1.0 - float(value_of(options, "ensemble.active_probability"))
    own = 0.0
    if value_of(options, "loss.batches") in ("own", "disjoint"):
        own = float(value_of(options, "loss.batches_probability"))
    return own + (1.0 - own) / members


def gaps(found: Sequence[Cell], asked: Asked) -> list[Gap]:
    """The gap of every setting of several members that has a single agent beside it."""
    out = []
    for cell in found:
        known = roles.known(cell)
        if known is None or cell.members == 1:
            continue
        paired = known.role == "tandem"
        if value_of(known.options, "ensemble.duty") == "first":
            continue  # the members that never act have a share of their own, 0
        try:
            other = cell if paired else normalise.single_agent(cell, found)
        except normalise.NoScale:
            continue
        names = ("passive", "active") if paired else ("individual", "individual")
        if names[0] not in cell.curves or names[1] not in other.curves:
            continue
        one, two = cell.curves[names[0]], other.curves[names[1]]
        # Both sides are read at the last step that they share.
        last = min(one.steps[-1], two.steps[-1])
        scores = []
        for curve in (one, two):
            at = curve.steps <= last
            kept = curve._replace(steps=curve.steps[at], returns=curve.returns[at])
            if not kept.steps.size:
                break
            scores.append([final(kept, last=asked.last)])
        if len(scores) < 2:
            continue
        how = {"paired": paired, "confidence": asked.confidence, "method": asked.method}
        gap = intervals.difference(*scores, **how)
        out.append(Gap(cell, share_of(known.options), gap))
    return out


def draw(found: Sequence[Cell], asked: Asked) -> Figure:
    """A panel for each task, a point with its interval for each setting; zero is the single agent,
    whose share is 1."""
    own = gaps(found, asked)
    if not own:
        raise canvas.NoFigure("no setting of several members has a single agent or active member")
    look = looks(found)
    names = [name for name in look if any(gap.cell.name == name for gap in own)]
    handles = legend_of(found, look, names, linestyle="")
    handles.append(
        Line2D([], [], color=GREY, linestyle="--", label="single agent; a tandem's active member")
    )
    widest = max(gap.share for gap in own) or 1.0
    envs = [*dict.fromkeys(gap.cell.env for gap in own)]
    figure, axes = canvas.sheet(len(envs), handles)
    for axis, env in zip(axes, envs, strict=True):
        axis.axhline(0.0, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
        mine = [gap for gap in own if gap.cell.env == env]
        for gap in mine:
            same = [other for other in mine if abs(other.share - gap.share) < 1e-6]
            apart = widest * min(NUDGE, SPREAD / len(same))
            moved = (same.index(gap) - (len(same) - 1) / 2) * apart
            _point(axis, gap, gap.share + moved, look[gap.cell.name].line())
        canvas.head(
            axis, title_of(env, found), width=0.85 * canvas.WIDTH / canvas.across(len(envs))
        )
        canvas.label(axis, x="own data in batches, share", y="return less the single agent's")
        axis.set_xlim(-0.05 * widest, 1.1 * widest)
    canvas.inner(axes)
    return canvas.dress(figure)


def _point(axis: Any, gap: Gap, x: float, look: dict[str, Any]) -> None:
    if gap.gap.low is not None:
        axis.vlines([x], [gap.gap.low], [gap.gap.high], color=look["color"], linewidth=0.9)
    axis.plot([x], [gap.gap.value], **look | {"linestyle": ""})
