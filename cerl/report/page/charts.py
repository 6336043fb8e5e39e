"""Figures of the page without a slider: learning curves, and differences of the verdicts.

A figure is plain data in the form that plotly.js draws.
"""

import math
from collections.abc import Sequence

from cerl.report import bands
from cerl.report.curves import SCORES, Cell, Curve
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
from cerl.report.palette import BROKEN, OUTCOMES, shown
from cerl.report.sentences import TITLES
from cerl.report.verdicts import Line, Verdict
from cerl.text import visible

BUDGET = 400_000  # most values of single seeds in the learning curves of a page
ROW = 36  # pixels of a line of a chart that has a line for each task


def curve_charts(found: Sequence[Cell]) -> list[Chart]:
    """Learning curves, a chart for each environment."""
    styles = looks(found)
    size = sum(curve.returns.size for cell in found for curve in shown(cell).values())
    out = []
    for env in dict.fromkeys(cell.env for cell in found):
        traces: list[Trace] = []
        for cell in (cell for cell in found if cell.env == env):
            for score, curve in shown(cell).items():
                traces += _curve(cell, score, curve, styles[cell.name], single=size <= BUDGET)
        if not traces:
            continue
        lines = sum(trace.get("showlegend", True) for trace in traces)
        height = 380 + 20 * lines
        layout = layout_of("agent steps of one seed", "mean return", height=height)
        about = (
            "Mean over seeds, with bands of 95% intervals where there are seeds enough for one; "
            "scores of members that act are solid, all others broken. A click in a legend hides a "
            "line, two clicks leave it alone."
        )
        if size <= BUDGET:
            about += " Thin lines are single seeds, where they are too few for an interval."
        else:
            about += " There are too many runs for lines of single seeds."
        figure = {"data": traces, "layout": layout}
        out.append(
            Chart(
                f"curve-{len(out)}", "Learning curves", about, visible(env), figure, height, False
            )
        )
    return out


def _curve(cell: Cell, score: str, curve: Curve, look: Look, *, single: bool) -> list[Trace]:
    """Traces of one score: band, single seeds, and mean. Args: single, whether seeds are shown."""
    member = score not in BROKEN
    group = f"{cell.name} {score}"
    steps = curve.steps.tolist()
    mean, low, high = bands.band([curve.returns])
    quiet = {"legendgroup": group, "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
    traces: list[Trace] = []
    if low is not None and high is not None:
        none = {"width": 0, "color": look.colour}
        traces.append({**quiet, "x": steps, "y": numbers(low), "line": none})
        fill = _faint(look.colour)
        band = {"fill": "tonexty", "fillcolor": fill}
        traces.append({**quiet, "x": steps, "y": numbers(high), "line": none, **band})
    if single and low is None and curve.returns.shape[1] > 1:
        for k, seed in enumerate(cell.seeds):
            line = {"width": 0.7, "color": look.colour}
            trace = {
                **quiet,
                "hoverinfo": "x+y+name",
                "name": f"{label_of(cell, score)}, seed {seed}",
            }
            traces.append(
                {**trace, "x": steps, "y": numbers(curve.returns[:, k]), "line": line}
                | {"opacity": 0.45}
            )
    dash = look.dash if member else "dash" if look.dash == "solid" else "dot"
    traces.append(
        {
            "x": steps,
            "y": numbers(mean),
            "name": label_of(cell, score),
            "legendgroup": group,
            "mode": "lines+markers" if len(steps) <= 12 else "lines",
            "line": {"width": 2, "color": look.colour, "dash": dash},
            "marker": {"symbol": look.symbol, "size": 6},
            "hovertemplate": "%{y:,.4g} at %{x:,} steps",
        }
    )
    return traces


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def verdict_charts(found: Sequence[Verdict]) -> list[Chart]:
    """Differences at the end of training with their intervals, a chart for each kind of verdict."""
    out = []
    kinds: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in found:
        if verdict.when == "end":
            kinds.setdefault((verdict.kind, verdict.family), []).append(verdict)
    for (kind, family), own in kinds.items():
        lines = [(verdict, line) for verdict in own for line in (*verdict.tasks, *verdict.over[:1])]
        lines = [pair for pair in lines if math.isfinite(pair[1].normalised.value)]
        units = {line.normalisation for _, line in lines}
        if not lines or len(units) > 1:
            continue
        unit = units.pop() or "return"
        height = 130 + ROW * len(lines)
        names = [f"{_place(line)}<br>{_own_side(verdict)}" for verdict, line in lines]
        axis = {"range": [len(lines) - 0.4, -0.6], "tickfont": {"size": 11}}
        layout = layout_of(f"difference, {unit}", "", height=height, showlegend=False, yaxis=axis)
        traces = []
        for outcome in OUTCOMES:
            mine = [k for k, (_, line) in enumerate(lines) if line.outcome == outcome]
            if mine:
                traces.append(_forest([lines[k] for k in mine], [names[k] for k in mine], outcome))
        # The order of categories is that of all lines, whatever trace they are in.
        layout["yaxis"] |= {"categoryorder": "array", "categoryarray": names}
        figure = {"data": traces, "layout": layout}
        title = f"{TITLES[kind]}, {family}: {_meaning(kind)}"
        about = (
            "Difference at the end of training with the interval of the verdict: green where the "
            "first of the two returns more, red where it returns less, grey where the two cannot "
            "be told apart, an open marker where there is no interval."
        )
        out.append(Chart(f"verdict-{len(out)}", "Differences", about, title, figure, height, True))
    return out


def _meaning(kind: str) -> str:
    return {
        "curse": "member less single agent",
        "gain": "member of CERL less member of the ensemble",
        "left": "member of CERL less single agent",
        "variant": "member of the variant less member of the ensemble",
        "variant_left": "member of the variant less single agent",
        "aggregation": "aggregate less its own members",
        "tandem": "active less passive member",
    }[kind]


def _place(line: Line) -> str:
    """The task of a line, or how many tasks it is over."""
    if len(line.envs) > 1:
        return f"<b>all {len(line.envs)} tasks</b>"
    env = next(iter(line.envs))
    return safe(env.partition("/")[2] or env)


def _own_side(verdict: Verdict) -> str:
    """The setting of a verdict, and its score where two scores of one setting are compared."""
    own = safe(verdict.setting)
    return f"{own}, {SCORES[verdict.score]}" if verdict.kind == "aggregation" else own


def _forest(pairs: Sequence[tuple[Verdict, Line]], names: Sequence[str], outcome: str) -> Trace:
    """Points with intervals. Args: names, the categories of the vertical axis."""
    colour = OUTCOMES[outcome]
    found = [line.normalised for _, line in pairs]
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(x.value for x in found),
        "y": list(names),
        "name": outcome,
        "marker": {"color": colour, "size": 9},
        "customdata": [
            [
                line.seeds[0],
                "none" if line.p is None else f"{line.p:.3g}",
                f"less {safe(verdict.baseline)}, {SCORES[verdict.baseline_score]}",
            ]
            for verdict, line in pairs
        ],
        "hovertemplate": "%{y}<br>%{customdata[2]}<br>%{x:.3g}, p = %{customdata[1]}, "
        "%{customdata[0]} seeds<extra>%{fullData.name}</extra>",
    }
    if outcome == "none":
        trace["marker"]["symbol"] = "circle-open"
        return trace
    above = [x.value if x.high is None else x.high - x.value for x in found]
    below = [x.value if x.low is None else x.value - x.low for x in found]
    trace["error_x"] = {
        "type": "data",
        "symmetric": False,
        "array": numbers(above),
        "arrayminus": numbers(below),
        "color": colour,
        "thickness": 2,
    }
    return trace
