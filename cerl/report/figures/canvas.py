"""Sheets of panels for figures at a paper's column width, and files of them.

A figure is 5.5 inches wide and its smallest text has 7 points. A figure that needs more room is
wider, and its text larger in proportion, so that it can be printed 5.5 inches wide.
"""

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cerl.config.errors import ConfigError, nearest
from cerl.record.files import write_atomically
from cerl.report.figures.look import GREY

WIDTH = 5.5  # inches of a paper's text column
SMALL, LARGE = 7.0, 8.0  # points of ticks and legends, of titles
LETTER = 0.056  # inches that a letter of 7 points is wide
LETTERS = 24  # most letters of a line beside a vertical axis
ACROSS = 4  # most panels beside each other in a figure of WIDTH
DPI = 200  # dots per inch of PNG
MANY = 12  # most panels of a sheet with three beside each other
FORMATS = ("png", "pdf", "svg")


class NoFigure(ValueError):
    """There is nothing for a figure to show; the message says why."""


def sheet(count: int, handles: Sequence[Line2D], *, height: float = 1.75) -> tuple[Figure, list]:
    """A figure with panels in rows of three, or of four if they are many, and a legend below.

    Args:    count of the panels; handles of the legend; height of a panel in inches.
    Returns: the figure; its panels.
    """
    columns = across(count)
    lines = -(-count // columns)
    height = min(height, 1.3) if columns == ACROSS else height
    if count == 1:
        height = max(height, 2.6)
    figure = _figure(WIDTH, height * lines, handles)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, [*panels[:count]]


def across(count: int) -> int:
    """How many panels of a sheet are beside each other. Args: count of all panels."""
    return 2 if count in (2, 4) else min(count, 3) if count <= MANY else ACROSS


def grid(
    down: Sequence[str],
    beside: Sequence[str],
    handles: Sequence[Line2D],
    *,
    sharey: str,
    sharex: bool = True,
    height: float = 1.4,
) -> tuple[Figure, Any]:
    """A figure with rows and columns of panels, and a legend below them.

    Args:    down, titles of the rows; beside, titles of the columns; handles of the legend; sharey,
             which panels share their vertical axis: those of a "row", of a "col", or "none";
             sharex, whether all share their horizontal one; height of a panel in inches.
    Returns: the figure; its panels [rows, columns].
    """
    scale = max(len(beside) / ACROSS, 1.0)
    height = max(height, 2.4) if len(down) == 1 else height
    figure = _figure(WIDTH * scale, height * len(down), handles)
    share: dict[str, Any] = {"sharex": sharex, "sharey": sharey}
    axes = figure.subplots(len(down), len(beside), squeeze=False, **share)
    for axis, title in zip(axes[0], beside, strict=True):
        head(axis, title, width=0.85 * WIDTH / min(len(beside), ACROSS))
    look = {"rotation": 270, "ha": "left", "va": "center", "parse_math": False}
    for axis, title in zip(axes[:, -1], down, strict=True):
        size = LARGE * scale
        said = folded(title, width=height)
        axis.text(1.03, 0.5, said, transform=axis.transAxes, fontsize=size, **look)
    return figure, axes


def _figure(width: float, height: float, handles: Sequence[Line2D]) -> Figure:
    """An empty figure with a legend below. Args: height of all panels, in inches."""
    scale = width / WIDTH
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    fitting = int(width / (scale * (0.5 + LETTER * longest)))
    columns = max(1, min(fitting, len(handles)))
    lines = -(-len(handles) // columns)
    figure = Figure(figsize=(width, height + scale * (0.15 * lines + 0.3)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04)  # pyright: ignore
    if handles:
        look = {"frameon": False, "fontsize": SMALL * scale, "handlelength": 2.6}
        look |= {"columnspacing": 1.2, "labelspacing": 0.3}
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, **look)
    return figure


def head(axis: Any, title: str, *, width: float = 1.8) -> None:
    """Gives a panel its title. Args: width of the panel in inches."""
    axis.set_title(folded(title, width=width), parse_math=False)


def folded(text: str, *, width: float) -> str:
    """A title in lines that fit a width in inches; parts in parentheses stay together."""
    most = max(int(width / (LETTER * LARGE / SMALL)), 12)
    lines = [""]
    for part in re.findall(r"\([^)]*\)\S*\s?|[^/\s]*/|[^/\s]+\s?|\s", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)


def label(axis: Any, *, x: str, y: str) -> None:
    """Names the axes of a panel, and draws its grid."""
    axis.set_xlabel(x, parse_math=False)
    axis.set_ylabel("\n".join(textwrap.wrap(y, LETTERS)), parse_math=False)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def blank(axis: Any) -> None:
    """Leaves out a panel that has nothing to show; the titles of its row and column stay."""
    axis.set_axis_off()


def inner(panels: Sequence[Any]) -> None:
    """Leaves names of axes to the panels at the lower and left edge, where those say the same."""
    places = [axis.get_subplotspec() for axis in panels]
    there = [axis.axison for axis in panels]
    left: dict[int, str] = {}
    lowest: dict[int, int] = {}
    for axis, place, used in zip(panels, places, there, strict=True):
        if used:
            left.setdefault(place.rowspan.start, axis.get_ylabel())
            column = place.colspan.start
            lowest[column] = max(lowest.get(column, 0), place.rowspan.start)
    first = {
        row: min(
            p.colspan.start
            for p, u in zip(places, there, strict=True)
            if u and p.rowspan.start == row
        )
        for row in left
    }
    for axis, place, used in zip(panels, places, there, strict=True):
        row, column = place.rowspan.start, place.colspan.start
        if not used:
            continue
        if row != lowest[column]:
            axis.set_xlabel("")
        else:  # panels below may be blank, and share this one's axis
            axis.tick_params(labelbottom=True)
        if column != first[row] and axis.get_ylabel() == left[row]:
            axis.set_ylabel("")


def dress(figure: Figure) -> Figure:
    """Gives all texts of a figure their size, and takes them as they are: a dollar in a name is a
    dollar. Every figure is dressed once, when it is finished."""
    scale = figure.get_figwidth() / WIDTH
    for axis in figure.axes:
        axis.tick_params(labelsize=SMALL * scale, length=2.5, width=0.6, pad=2)
        axis.title.set_fontsize(LARGE * scale)
        for name in (axis.xaxis.label, axis.yaxis.label):
            name.set_fontsize(SMALL * scale)
        for name in (axis.xaxis, axis.yaxis):
            name.labelpad = 2
            name.offsetText.set_fontsize(SMALL * scale)
        for spine in axis.spines.values():
            spine.set_linewidth(0.6)
    own = [text for box in figure.legends for text in box.get_texts()]
    for axis in figure.axes:
        own += [axis.title, *axis.texts]
    for text in [*own, *figure.texts]:
        text.set_parse_math(False)
        text.set_fontsize(max(text.get_fontsize(), SMALL * scale))
    return figure


def remark(figure: Figure, text: str) -> None:
    """Says below the panels what a figure leaves out; `remark_of` reads it for the report's notes.

    Args: text, a clause; "": nothing is left out.
    """
    if not text:
        return
    figure.set_label(text)
    scale = figure.get_figwidth() / WIDTH
    lines = textwrap.wrap(text, int(0.9 * WIDTH / LETTER))
    figure.set_figheight(figure.get_figheight() + 0.15 * scale * len(lines))
    if not figure.legends:
        said = "\n".join(lines)
        figure.supxlabel(said, fontsize=SMALL * scale, color=GREY, parse_math=False)
        return
    # The layout leaves room for the title of a legend, but for no other text below the panels.
    [legend] = figure.legends
    legend.set_title("\n".join(lines))
    legend.get_title().set(color=GREY, parse_math=False, fontsize=SMALL * scale)


def remark_of(figure: Figure) -> str:
    """What a figure leaves out; "" if nothing."""
    return str(figure.get_label() or "")


def nothing(axis: Any, text: str) -> None:
    """Writes into a panel why it shows nothing."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=GREY, fontsize=SMALL)


def format_of(name: str) -> str:
    """A file format in small letters. Raises: ConfigError if figures have no such format."""
    known = name.lower().removeprefix(".")
    if known not in FORMATS:
        raise ConfigError(
            f"report --format: no format {name!r}{nearest(known, [*FORMATS])}; expected one of "
            f"{', '.join(FORMATS)}"
        )
    return known


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, PDF or SVG, by the end of the path; an older file is replaced."""
    content = encoded(figure, path.suffix)
    write_atomically(path, lambda file: file.write(content))


def encoded(figure: Figure, kind: str) -> bytes:
    """A figure as a file of a format of `FORMATS`.

    The same figure always makes the same bytes: files hold no date.
    """
    kind = format_of(kind)
    figure.set_dpi(DPI)  # the layout depends on it
    # To save a figure that has a layout engine, matplotlib finds the layout twice and draws twice.
    # The second time changes no pixel.
    if figure.get_layout_engine() is not None:
        figure.get_layout_engine().execute(figure)  # pyright: ignore
        figure.set_layout_engine("none")
    told: dict[str, Any] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    # Text stays text, so that it can be searched and edited.
    rules: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "cerl"}
    content = io.BytesIO()
    with rc_context(rules):
        figure.savefig(content, format=kind, dpi=DPI, metadata=told[kind])
    return content.getvalue()
