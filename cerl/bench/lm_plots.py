"""The figure of `cerl bench lm`: six panels on what attention does in trained language models."""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from cerl.report.figures import canvas
from cerl.report.figures.look import ROLES, VARIANTS

COLOURS = [colour for colour, _ in (*ROLES.values(), *VARIANTS)]
STYLES: dict[str, Any] = {"off": "-", "static": "--", "running": ":"}


class Model(NamedTuple):
    """A model of a file of rows."""

    size: str
    kind: str
    pruning: str
    length: int


def draw(path: Path, folder: Path) -> list[Path]:
    """Draws lm-SIZE-LENGTH.png for every size and length of a file of rows.

    Returns: the files.
    """
    rows: dict[Model, list[dict[str, Any]]] = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        rows[Model(row["size"], row["kind"], row["pruning"], row["length"])].append(row)
    made = []
    for size, length in sorted({(model.size, model.length) for model in rows}):
        own = {model: found for model, found in rows.items() if model[::3] == (size, length)}
        made.append(folder / f"lm-{size}-{length}.png")
        _sheet(own, length, made[-1])
    return made


def _sheet(models: dict[Model, list[dict[str, Any]]], length: int, path: Path) -> None:
    kinds = list(dict.fromkeys(model.kind for model in models))
    colours = dict(zip(kinds, COLOURS, strict=False))
    handles = [
        Line2D(
            [],
            [],
            color=colours[model.kind],
            linestyle=STYLES[model.pruning],
            label=f"{model.kind}, pruning {model.pruning}",
        )
        for model in models
    ]
    figure, panels = canvas.sheet(6, handles)
    for model, rows in models.items():
        look = {"color": colours[model.kind], "linestyle": STYLES[model.pruning], "linewidth": 1.2}
        for axis, what in ((panels[0], "held-out"), (panels[3], "by position")):
            at, unit = ("tokens", 1e-6) if what == "held-out" else ("at", 1.0)
            points = [(unit * row[at], row["value"]) for row in rows if row["what"] == what]
            if points:
                axis.plot(*zip(*points, strict=True), **look)
        means = [(1e-6 * tokens, share) for tokens, share in _means(rows, "skipped", "tokens")]
        if means:
            panels[1].plot(*zip(*means, strict=True), **look)
        final = [r for r in rows if r["what"] == "half-life" and r["tokens"] == rows[-1]["tokens"]]
        if final:
            lives = sorted(min(row["value"], 4.0 * length) for row in final)
            panels[4].plot([i / max(len(lives) - 1, 1) for i in range(len(lives))], lives, **look)
        keys = _means(rows, "pass key", "at")
        if keys:
            panels[5].plot(*zip(*keys, strict=True), marker="o", markersize=2.5, **look)
    _speeds(panels[2], models, colours)
    titles = {
        0: ("Loss of held-out text", "million bytes learnt", "nats a byte"),
        1: ("Skipped, mean of heads", "million bytes learnt", "share of tiles"),
        2: ("Speed of training", "against unpruned", ""),
        3: ("Loss by position", "position (bytes)", "nats a byte"),
        4: ("Half-lives of gates", "heads, sorted (share)", "bytes"),
        5: ("Hidden numbers found", "length of text (bytes)", "share"),
    }
    for number, (title, x, y) in titles.items():
        canvas.head(panels[number], title)
        canvas.label(panels[number], x=x, y=y)
    panels[3].axvline(length, color="0.6", linewidth=0.8)
    panels[3].set_xscale("log", base=2)
    panels[5].set_xscale("log", base=2)
    panels[4].set_yscale("log", base=2)
    panels[4].yaxis.set_major_formatter(ScalarFormatter())
    for number in (1, 5):  # shares
        panels[number].set_ylim(-0.02, 1.02)
    canvas.save(canvas.dress(figure), path)


def _means(rows: list[dict[str, Any]], what: str, by: str) -> list[tuple[int, float]]:
    """Means of the rows of a kind over all that have the same value of a column."""
    groups: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["what"] == what:
            groups[row[by]].append(row["value"])
    return [(at, statistics.fmean(values)) for at, values in sorted(groups.items())]


def _speeds(axis: Any, models: dict[Model, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    """Bars of the speed of each way to compute attention, on the models that were pruned most."""
    bars = list(_bars(models))[::-1]
    for place, (kind, _, ratio) in enumerate(bars):
        axis.barh(place, ratio, color=colours[kind], height=0.8)
    axis.set_yticks(range(len(bars)), [way for _, way, _ in bars])
    axis.axvline(1.0, color="0.6", linewidth=0.8)


def _bars(models: dict[Model, list[dict[str, Any]]]) -> Iterator[tuple[str, str, float]]:
    """(kind, way, speed against unpruned attention), of one model of each kind."""
    last = {model.kind: rows for model, rows in models.items()}  # the last pruning of each kind
    for kind, rows in last.items():
        speeds = {row["way"]: row["value"] for row in rows if row["what"] == "speed"}
        for way, speed in speeds.items():
            if way != "off" and "off" in speeds:
                yield kind, way, speed / speeds["off"]
