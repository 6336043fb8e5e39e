"""All figures that a report can draw, by name; `write` makes files of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from cerl.config.errors import ConfigError, nearest
from cerl.report import dependence
from cerl.report.curves import Cell
from cerl.report.figures import (
    canvas,
    curves,
    diagnostics,
    heat,
    improvement,
    own_data,
    profile,
    progress,
    score,
)
from cerl.report.figures.asked import Asked
from cerl.report.figures.canvas import NoFigure


class Entry(NamedTuple):
    """A figure of the catalogue."""

    draw: Callable[[Sequence[Cell], Asked], Figure]  # raises NoFigure where nothing is to show
    shows: str  # one line, for help and for the heading of a page
    needs: str  # what runs it needs, as a clause


def _curves(found: Sequence[Cell], asked: Asked) -> Figure:
    return curves.draw(found, confidence=asked.confidence, method=asked.method)


def _score(found: Sequence[Cell], asked: Asked) -> Figure:
    if not asked.x:
        raise NoFigure("no option was asked for (--x OPTION)")
    if asked.summary is None:
        raise NoFigure("the summary of the scores was not given")
    points = dependence.points(found, asked.summary, asked.x)
    return score.draw(found, points, key=asked.x)


FIGURES: dict[str, Entry] = {
    "curves": Entry(_curves, "return against agent steps, on each task", "any runs"),
    "profile": Entry(profile.draw, "share of runs that return more than a score", "any runs"),
    "iqm": Entry(
        progress.draw_steps, "interquartile mean over tasks against agent steps", "any runs"
    ),
    "iqm-time": Entry(
        progress.draw_time,
        "interquartile mean over tasks against hours of training",
        "rows that tell the training time",
    ),
    "improvement": Entry(
        improvement.draw,
        "probability that a seed scores more than one of its baseline",
        "settings with a baseline, such as an ensemble and a single agent",
    ),
    "score": Entry(_score, "final score against an option", "an option that differs (--x)"),
    "own-data": Entry(
        own_data.draw,
        "gap to the single agent against the share of own data",
        "settings of several members and a single agent, or a tandem",
    ),
    "map": Entry(
        heat.draw,
        "score, and gap to the single agent, over two options",
        "two options that differ within a method",
    ),
    "diagnostics": Entry(
        diagnostics.draw, "what is measured beside scores, over training", "metrics.parquet"
    ),
}


# Figures that the page shows as pictures. It draws the others itself, so that one can hover there.
PICTURES = tuple(name for name in FIGURES if name not in ("curves", "profile", "iqm"))


def known(name: str) -> str:
    """The name itself. Raises: ConfigError if there is no such figure."""
    if name not in FIGURES:
        raise ConfigError(
            f"report --figure: no figure {name!r}{nearest(name, [*FIGURES])}; expected one of "
            f"{', '.join(FIGURES)}"
        )
    return name


def drawn(
    found: Sequence[Cell], asked: Asked, names: Sequence[str] = ()
) -> tuple[dict[str, Figure], list[str]]:
    """Figures by name.

    Args:    found, all cells of the report; names of the figures (none: all that apply).
    Returns: figures in the order of `names`, or of `FIGURES`; notes on what a figure leaves
             out, and on each of `names` that has nothing to show.
    Raises:  ConfigError for an unknown name.
    """
    figures, notes = {}, []
    for name in names or FIGURES:
        entry = FIGURES[known(name)]
        try:
            figures[name] = entry.draw(found, asked)
            if left_out := canvas.remark_of(figures[name]):
                notes.append(f"figure {name}: {left_out}")
        except NoFigure as reason:
            if names:
                notes.append(f"figure {name} is not drawn: {reason} (it needs {entry.needs})")
    return figures, notes


def pictures(found: Sequence[Cell], asked: Asked, ready: Mapping[str, Figure]) -> dict[str, bytes]:
    """PNG files of those of `PICTURES` that have something to show, by a title.

    Args: ready, figures by name that are drawn already.
    """
    out = {}
    for name in PICTURES:
        figure = ready.get(name)
        if figure is None:
            try:
                figure = FIGURES[name].draw(found, asked)
            except NoFigure:
                continue
        shows = FIGURES[name].shows
        out[f"{name}: {shows}"] = canvas.encoded(figure, "png")
    return out


def write(
    found: Sequence[Cell],
    asked: Asked,
    out: Path,
    *,
    names: Sequence[str] = (),
    formats: Sequence[str] = ("png",),
) -> tuple[list[Path], list[str]]:
    """Draws figures into files `NAME.png`; a file of that name is replaced.

    Args:    names, see `drawn`; out, an existing folder; formats, of `canvas.FORMATS`.
    Returns: the files; notes, see `drawn`.
    Raises:  ConfigError for an unknown name or format.
    """
    kinds = [canvas.format_of(kind) for kind in formats]
    figures, notes = drawn(found, asked, names)
    files = []
    for name, figure in figures.items():
        for kind in kinds:
            files.append(out / f"{name}.{kind}")
            canvas.save(figure, files[-1])
    return files, notes
