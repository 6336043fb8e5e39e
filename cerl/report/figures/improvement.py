"""Draws for every verdict the probability that a seed of the setting scores more than one of its
baseline, with its interval; at one half neither is better.

Source: Agarwal et al. 2021 (arXiv:2108.13264), figure 6.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from cerl.report import roles, verdicts
from cerl.report.curves import SCORES, Cell
from cerl.report.figures import canvas
from cerl.report.figures.asked import Asked
from cerl.report.figures.look import GREY, looks, title_of
from cerl.report.sentences import TITLES
from cerl.report.verdicts import KINDS, Line, Verdict

ROWS = 40  # most rows that tell tasks; with more, a verdict has its row over tasks alone
MOST = 60  # most rows at all


def draw(found: Sequence[Cell], asked: Asked) -> Figure:
    """A row for every verdict at the end of training: over tasks, and for each task."""
    judged = asked.judged or verdicts.verdicts(
        found,
        last=asked.last,
        how=asked.how,
        confidence=asked.confidence,
        method=asked.method,
    )
    judged = [verdict for verdict in judged if verdict.when == "end"]
    rows = [(verdict, line) for verdict in judged for line in (*verdict.over[:1], *verdict.tasks)]
    if not rows:
        raise canvas.NoFigure("no setting has a baseline to compare it with")
    brief = len(rows) > ROWS
    left_out = hidden = 0
    if brief:
        whole = len(rows)
        rows = [(v, line) for v, line in rows if len(line.envs) > 1 or not v.over]
        hidden = whole - len(rows)
        left_out = max(len(rows) - MOST, 0)
        rows = rows[:MOST]
    look = looks(found)
    handles = [
        Line2D([], [], color=GREY, marker=m, markersize=4, linewidth=1.0, label=text)
        for m, text in (("o", "a task"), ("D", "over tasks"))
        if any((len(line.envs) > 1) == (m == "D") for _, line in rows)
    ]
    if any(line.improvement.low is None for _, line in rows):
        hollow = {"marker": "o", "markerfacecolor": "white", "markersize": 4, "linestyle": ""}
        text = "hollow: no interval for so few seeds"
        handles.append(Line2D([], [], color=GREY, label=text, **hollow))
    places, titles, place = [], [], 0.0
    last: tuple[str, str] | None = None
    for verdict, _ in rows:
        head = TITLES[verdict.kind], _roles(verdict) if brief else _compared(verdict)
        if head != last:
            place += 1.2 if last is None else 2.0
            titles.append((place - 1.0, ": ".join(head)))
            last = head
        else:
            place += 1.0
        places.append(place)
    figure, [axis] = canvas.sheet(1, handles, height=0.5 + 0.14 * (place + 1))
    for at, (verdict, line) in zip(places, rows, strict=True):
        _row(axis, at, line, look[verdict.setting].colour)
    names = [_task(verdict, line, found) for verdict, line in rows]
    if brief:
        several = len({verdict.family for verdict, _ in rows}) > 1
        alone = any(len(line.envs) == 1 for _, line in rows)
        where = [f", {name}" if several or alone else "" for name in names]
        names = [f"{v.setting}{place}" for (v, _), place in zip(rows, where, strict=True)]
    axis.set_yticks(places, names)
    for tick in axis.get_yticklabels():
        tick.set_parse_math(False)
    for at, text in titles:
        # Titles begin at the left edge of the figure, where the names of their rows do.
        where = blended_transform_factory(figure.transFigure, axis.transData)
        title = axis.text(0.01, at, text, transform=where, va="center", fontstyle="italic")
        title.set_in_layout(False)
        title.set_fontsize(canvas.SMALL)
    axis.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axis.set_ylim(place + 0.8, -0.8)
    axis.set_xlim(-0.02, 1.02)
    canvas.label(axis, x="probability that a seed scores more than the baseline", y="")
    said = []
    if hidden:
        said.append(f"{hidden} comparisons on single tasks are not drawn")
    if left_out:
        said.append(f"{left_out} more comparisons are not drawn")
    if said:
        said.append("the table of verdicts has them")
    canvas.remark(figure, "; ".join(said))
    axis.grid(visible=False, axis="y")
    return canvas.dress(figure)


def _compared(verdict: Verdict) -> str:
    """The two sides of a verdict, as text."""
    one, other = SCORES[verdict.score], SCORES[verdict.baseline_score]
    if verdict.setting == verdict.baseline:
        return f"{verdict.setting}, {one} against {other}"
    if verdict.score == verdict.baseline_score:
        return f"{verdict.setting} against {verdict.baseline}"
    return f"{verdict.setting}, {one}, against {verdict.baseline}, {other}"


def _roles(verdict: Verdict) -> str:
    """What a kind of verdict compares, as text."""
    kind = KINDS[verdict.kind]
    if kind.baseline is None:
        return f"{SCORES[verdict.score]} against {SCORES[verdict.baseline_score]}"
    one, other = roles.NAMES[kind.roles[0]][0], roles.NAMES[kind.baseline][0]
    return f"{one} against the {other} with equal other options"


def _task(verdict: Verdict, line: Line, found: Sequence[Cell]) -> str:
    if len(line.envs) > 1:
        return f"{verdict.family} ({len(line.envs)} tasks)"
    return title_of(next(iter(line.envs)), found)


def _row(axis: Any, at: float, line: Line, colour: str) -> None:
    own = line.improvement
    if own.low is not None and own.high is not None:
        axis.plot([own.low, own.high], [at, at], color=colour, linewidth=1.2)
    marker = "D" if len(line.envs) > 1 else "o"
    # A value without an interval, for want of seeds, is hollow.
    face = colour if own.low is not None else "white"
    axis.plot([own.value], [at], marker=marker, color=colour, markerfacecolor=face, markersize=4)
