"""Tables of the page: they sort by a click on a heading, and show the lines that have a text.

A cell keeps the number that it begins with, so that 1,200 [1,100, 1,300] sorts behind 900.
"""

import html
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from cerl.record.progress import duration
from cerl.report.curves import SCORES
from cerl.report.estimate import number
from cerl.report.page.runs import Run
from cerl.report.sentences import TITLES
from cerl.report.verdicts import Line, Verdict
from cerl.text import visible

_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)
_WHEN = {"end": "at the end", "step": "at a step", "area": "area under the curve"}


def grid(name: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped. Args: name, of the table within the page."""
    return _grid(name, headings, [[_cell(text) for text in line] for line in lines])


def _grid(name: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(text)}</button></th>'
        for text in headings
    )
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return (
        f'<div class="grid" id="grid-{name}"><label class="filter">Filter '
        '<input type="search" placeholder="words; every one must be in a line"></label> '
        f'<output>{len(lines)} lines</output><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div></div>"
    )


def _cell(text: str, *, value: float | None = None) -> str:
    """A cell. Args: value, the number to sort by (None: the number that the text begins with)."""
    if value is None and (found := _NUMBER.match(text)) and not text[found.end() :].strip("%"):
        value = float(found[0].replace(",", "")) if found[0].strip(",") else None
    elif value is None and (found := _NUMBER.match(text)) and text[found.end()] in " [(":
        value = float(found[0].replace(",", ""))
    kind = f' class="number" data-value="{value!r}"' if value is not None else ""
    return f"<td{kind}>{html.escape(visible(text))}</td>"


def verdicts(found: Sequence[Verdict]) -> str:
    """A table of every verdict: a line for each task, and one or two over tasks."""
    if not found:
        return ""
    headings = [
        *("verdict", "task", "setting", "score", "baseline", "when", "steps", "seeds"),
        *("difference", "unit", "relative", "normalised", "P(improvement)", "p", "outcome"),
        "smallest gap",
    ]
    lines = [_verdict(one, line) for one in found for line in (*one.tasks, *one.over)]
    return _grid("verdicts", headings, lines)


def _verdict(verdict: Verdict, line: Line) -> list[str]:
    count = len(line.envs)
    task = line.envs[0] if count == 1 else f"{verdict.family} ({count} tasks), {line.statistic}"
    known = line.outcome != "none"
    texts = [
        TITLES[verdict.kind],
        task,
        verdict.setting,
        SCORES[verdict.score],
        f"{verdict.baseline}, {SCORES[verdict.baseline_score]}",
        _WHEN[verdict.when],
    ]
    seeds = f"{line.seeds[0]}" if verdict.paired else f"{line.seeds[0]} and {line.seeds[1]}"
    out = [f"<td>{html.escape(visible(text))}</td>" for text in texts]
    out += [_cell(f"{line.step:,}", value=line.step), _cell(seeds, value=line.seeds[0])]
    out.append(_interval(line.difference))
    out.append(f"<td>{html.escape(line.unit)}</td>")
    out += [_interval(line.relative, percent=True), _interval(line.normalised)]
    out.append(_interval(line.improvement))
    out.append(_cell("" if line.p is None else f"{line.p:.3g}", value=line.p))
    out.append(f'<td class="{line.outcome}">{"no verdict" if not known else line.outcome}</td>')
    out.append(_cell(number(line.gap) if line.gap is not None else "", value=line.gap))
    return out


def _interval(found: "object", *, percent: bool = False) -> str:
    """A cell with a value and its interval, sorted by the value."""
    value, low, high = (getattr(found, name) for name in ("value", "low", "high"))
    if value is None or not math.isfinite(value):
        return _cell("")
    scale, unit = (100.0, "%") if percent else (1.0, "")
    each = [x * scale for x in (value, low, high) if x is not None]
    texts = [number(x, size=max(map(abs, each))) + unit for x in each]
    text = texts[0] + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")
    return _cell(text, value=value)


def runs(found: Sequence[Run], folder: Path) -> str:
    """A table of runs; a line unfolds to its options, command, versions and videos.

    Args: folder of the page, that links are relative to.
    """
    if not found:
        return ""
    headings = [
        *("run", "preset", "environment", "seeds", "lost or diverged", "steps", "device"),
        *("wall time", "device hours", "options and command"),
    ]
    return (
        '<p class="caption">Wall time is that of training, without pauses. Device hours are the '
        "wall time on one device; runs that share a device at the same time each count it.</p>"
    ) + _grid("runs", headings, [_run(run, folder) for run in found])


def _run(run: Run, folder: Path) -> list[str]:
    seconds = run.seconds
    hours = None if seconds is None else seconds / 3600
    lost = [f"seed {seed} has no finite score at the end" for seed in run.lost]
    lost += [f"seed {seed} diverged at step {step:,}" for seed, step in run.diverged.items()]
    return [
        _cell(run.name),
        _cell(run.preset),
        _cell(run.env),
        _cell(", ".join(map(str, run.seeds)), value=len(run.seeds)),
        _cell("; ".join(lost), value=len(lost)) if lost else "<td></td>",
        _cell(f"{run.step:,}", value=run.step),
        f"<td>{html.escape(visible(run.device))}</td>",
        _cell("" if seconds is None else duration(seconds), value=seconds),
        _cell("" if hours is None else f"{hours:.2f}", value=hours),
        f"<td>{_details(run, folder)}</td>",
    ]


def _details(run: Run, folder: Path) -> str:
    """What unfolds: every text is escaped."""
    changed = "".join(
        f"<tr><th>{_safe(option)}</th><td>{_safe(value)}</td><td>{_safe(before)}</td></tr>"
        for option, value, before in run.changed
    )
    parts = []
    if changed:
        parts.append(
            f"<table class=diff><thead><tr><th>option</th><td>this run</td>"
            f"<td>{_safe(run.against)}</td></tr></thead><tbody>{changed}</tbody></table>"
        )
    elif run.command:
        parts.append(f"<p>All options are those of {_safe(run.against)}.</p>")
    if run.command:
        parts.append(f"<pre>{_safe(run.command)}</pre>")
    if run.problem:
        parts.append(f"<p>{_safe(run.problem)}</p>")
    listed = "; ".join(f"{name} {value}" for name, value in run.versions.items())
    if listed:
        parts.append(f"<p>{_safe(listed)}</p>")
    for video in run.videos:
        where = quote(Path(os.path.relpath(video, folder)).as_posix())
        parts.append(f'<p><a href="{html.escape(where)}">{_safe(video.name)}</a></p>')
    count = len(run.changed)
    title = f"{count} option{'s' if count != 1 else ''} changed" if run.command else "what is known"
    videos = f", {len(run.videos)} videos" if run.videos else ""
    return f"<details><summary>{title}{videos}</summary>{''.join(parts)}</details>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
