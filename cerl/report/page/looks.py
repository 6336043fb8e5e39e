"""What all figures of the page share: colours, line styles, markers, names, axes.

Names of settings and environments are escaped, since plotly takes a few tags for markup. Numbers
are rounded to six digits: more are not seen on any screen, and would double the file.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cerl.report import roles
from cerl.report.curves import SCORES, Cell
from cerl.report.palette import ROLES, VARIANTS
from cerl.text import visible

# Colours of further settings of a role, which can be read on white and on black.
MORE = {
    "single": ("#6f8797", "#a08a6a"),
    "ensemble": ("#e69f00", "#b8860b"),
    "cerl": ("#56b4e9", "#4f7fd0"),
    "tandem": ("#5fb848", "#7aa880"),
    "other": ("#b0a000", "#7b68ee", "#a0522d"),
}
COLOURS = {
    role: (*([ROLES[role].screen] if role in ROLES else [v.screen for v in VARIANTS]), *more)
    for role, more in MORE.items()
}
SYMBOLS = (*(style.symbol for style in (*ROLES.values(), *VARIANTS)), "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
GRID = "rgba(128,128,128,0.25)"

Trace = dict[str, Any]  # as plotly.js takes it


class Chart(NamedTuple):
    """One figure of the page."""

    key: str
    group: str  # heading that it stands under
    about: str  # sentences that say how the figures of the group are read
    title: str
    figure: dict[str, Any]  # data, layout and frames
    height: int  # pixels
    wide: bool  # whether it has the whole width of the page


class Look(NamedTuple):
    colour: str
    dash: str
    symbol: str


def safe(text: str) -> str:
    return html.escape(visible(text), quote=False)


def numbers(values: Iterable[float]) -> list[float | None]:
    """Values with six digits; None where one is not finite, which JSON cannot say."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in map(float, values)]


def looks(found: Sequence[Cell]) -> dict[str, Look]:
    """The colour, line style and marker of every setting, by its name.

    The colour follows from the role of a setting, so that CERL has the same in every report;
    further settings of a role have other colours and line styles.
    """
    out: dict[str, Look] = {}
    count: dict[str, int] = {}
    for cell in found:
        if cell.name in out:
            continue
        known = roles.known(cell)
        role = "other" if known is None else known.role
        place = count[role] = count.get(role, -1) + 1
        colours = COLOURS[role]
        dash = DASHES[place // len(colours) % len(DASHES)]
        # The first setting of a role has the marker of the role; all others take turns.
        first = place == 0 and role in ROLES
        symbol = ROLES[role].symbol if first else SYMBOLS[len(out) % len(SYMBOLS)]
        out[cell.name] = Look(colours[place % len(colours)], dash, symbol)
    return out


def label_of(cell: Cell, score: str) -> str:
    """What a legend calls one score of a setting."""
    return f"{safe(cell.name)}, {SCORES[score]}"


def layout_of(x: str, y: str, *, height: int, **more: Any) -> dict[str, Any]:
    """The layout of a chart with titles of both axes; the page adds the colour of its texts."""
    axis: dict[str, Any] = {
        "gridcolor": GRID,
        "zerolinecolor": "rgba(128,128,128,0.6)",
        "automargin": True,
    }
    layout = {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 36, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "font": {"size": 11}},
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": y}},
    }
    for name, value in more.items():
        layout[name] = {**layout.get(name, {}), **value} if isinstance(value, dict) else value
    return layout
