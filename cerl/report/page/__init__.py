"""One self-contained HTML page of a report: verdicts, figures, tables and the runs behind them.

The page opens without a network: plotly's JavaScript is inside the file once. Every text that comes
from a run is data and is escaped, in HTML as well as in figures, where plotly would take a few tags
for markup.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from cerl.record.files import write_text
from cerl.report import sentences
from cerl.report.curves import Cell
from cerl.report.page import charts, grids, slides
from cerl.report.page.looks import Chart
from cerl.report.page.runs import Run
from cerl.report.verdicts import Verdict
from cerl.text import visible

FILE = "report.html"


class Scores(NamedTuple):
    """The table of final scores as text."""

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]  # each with one cell for each heading
    caption: str  # what its numbers are


class Parts(NamedTuple):
    """What a page is made of."""

    found: Sequence[Cell]  # from `curves.cells`
    scores: Scores | None  # from `tables.table` and `tables.caption`; None: no scores yet
    notes: Sequence[str]  # sentences for the reader
    verdicts: Sequence[Verdict]  # from `verdicts.verdicts`
    runs: Sequence[Run]  # from `page.runs.runs_of`


class Refresh(NamedTuple):
    """How an open page learns that there is a newer one."""

    seconds: int  # between two questions
    version: str  # of this page; the address `version` beside it answers that of the newest


def write(
    found: Sequence[Cell],
    scores: Scores | None,
    notes: Sequence[str],
    verdicts: Sequence[Verdict],
    path: Path,
    runs: Sequence[Run],
    *,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the page of a report; an older file of that name is replaced atomically.

    Args:   found, scores, notes, verdicts and runs, as in `Parts`; path of the HTML file;
            pictures, PNG files by title that stand in the page as they are.
    Raises: ImportError if plotly is missing; OSError if a file cannot be read or written.
    """
    script = library()
    parts = Parts(found, scores, notes, verdicts, runs)
    write_text(path, content(parts, script, folder=path.parent, pictures=pictures))


def content(
    parts: Parts,
    script: str,
    *,
    folder: Path,
    pictures: Mapping[str, bytes] | None = None,
    first: str = "",
    refresh: Refresh | None = None,
) -> str:
    """The page as HTML text.

    Args: script, JavaScript of plotly, or "" where the page loads it from plotly.min.js beside it;
          folder, that links to videos are relative to; pictures, as for `write`; first, HTML that
          stands above everything else; refresh, None for a page that stays as it is.
    """
    drawn = charts.verdict_charts(parts.verdicts)
    drawn += slides.over_tasks(parts.found)
    drawn += slides.at_steps(parts.found)
    drawn += charts.curve_charts(parts.found)
    sections = [
        ("Now", first),
        ("Verdicts", _verdicts(parts.verdicts) if parts.found else ""),
        ("Figures", _figures(drawn) + _pictures(pictures or {})),
        ("Scores", "" if parts.scores is None else _scores(parts.scores)),
        ("Verdicts in numbers", grids.verdicts(parts.verdicts)),
        ("Runs", grids.runs(parts.runs, folder)),
        ("Notes", _list(parts.notes)),
    ]
    sections = [(title, inner) for title, inner in sections if inner]
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{inner}</section>'
        for title, inner in sections
    )
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in sections)
    plotly = f"<script>{script}</script>" if script else '<script src="plotly.min.js"></script>'
    data = _json({chart.key: chart.figure for chart in drawn})
    again = ""
    if refresh is not None:
        again = f' data-refresh="{refresh.seconds}" data-version="{html.escape(refresh.version)}"'
    title = html.escape(_title(parts.found))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Without this a browser asks for a picture of the page, which a server does not have.
        '<link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_own('page.css')}</style></head>"
        f"<body{again}><header><h1>{title}</h1><nav>{links}</nav></header><main>{body}</main>"
        f'<script type="application/json" id="figure-data">{data}</script>'
        f"{plotly}<script>{_own('page.js')}</script></body></html>\n"
    )


def library() -> str:
    """JavaScript of plotly. Raises: ImportError if plotly is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "report --html: the page needs plotly, which is not installed; install it with "
            "`pip install 'cerl[page]'`"
        ) from error
    return get_plotlyjs()


def _own(name: str) -> str:
    return (resources.files(__name__) / name).read_text(encoding="utf-8")


def _json(tree: Any) -> str:
    """A tree as JSON that can stand inside a script element, whatever texts it has."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _title(found: Sequence[Cell]) -> str:
    """What the page is about: its environments, or how many there are of each family."""
    envs = [*dict.fromkeys(cell.env for cell in found)]
    if not envs:
        return "cerl report"
    if len(envs) <= 3:
        return f"cerl report: {', '.join(envs)}"
    families = [env.partition("/")[0] for env in envs]
    parts = (f"{name} ({families.count(name)} tasks)" for name in dict.fromkeys(families))
    return f"cerl report: {', '.join(parts)}"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _verdicts(found: Sequence[Verdict]) -> str:
    told = sentences.summary(found)
    if not told:
        return (
            "<p>No verdict: no two settings of these runs can be compared as single agent and "
            "ensemble, as ensemble and CERL, or as member and aggregate.</p>"
        )
    return f"{_list(told)}<p class=caption>{html.escape(sentences.caption(found))}</p>"


def _list(texts: Sequence[str]) -> str:
    lines = "".join(f"<li>{html.escape(visible(text))}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""


def _figures(drawn: Sequence[Chart]) -> str:
    """A place for each chart, which the script of the page fills when it comes into view."""
    groups: dict[str, list[Chart]] = {}
    for chart in drawn:
        groups.setdefault(chart.group, []).append(chart)
    parts = []
    for group, own in groups.items():
        places = "".join(
            f'<figure><h4>{html.escape(chart.title)}</h4><div class="chart" '
            f'data-figure="{chart.key}" style="min-height:{chart.height}px" role="img" '
            f'aria-label="{html.escape(chart.title)}"></div></figure>'
            for chart in own
        )
        wide = " wide" if own[0].wide else ""
        about = html.escape(own[0].about)
        parts.append(
            f'<h3>{html.escape(group)}</h3><p class="caption">{about}</p>'
            f'<div class="charts{wide}">{places}</div>'
        )
    return "".join(parts)


def _pictures(files: Mapping[str, bytes]) -> str:
    parts = []
    for title, content in files.items():
        code = base64.b64encode(content).decode()
        name = html.escape(title)
        source = f"data:image/png;base64,{code}"
        parts.append(f'<figure><h4>{name}</h4><img src="{source}" alt="{name}"></figure>')
    if not parts:
        return ""
    return f'<h3>More figures</h3><div class="charts wide">{"".join(parts)}</div>'


def _scores(scores: Scores) -> str:
    caption = f'<p class="caption">{html.escape(scores.caption)}</p>'
    return caption + grids.grid("scores", scores.headings, scores.lines)
