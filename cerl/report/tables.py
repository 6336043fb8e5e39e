"""Writes a report: tables of what each setting scored on each environment, verdicts, figures.

A setting is a preset with its options, and is called by its label (`cerl/config/labels.py`). The
numbers of the tables are those of `cerl/report/summary.py`.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cerl.config.errors import ConfigError, nearest
from cerl.record.files import write_atomically
from cerl.record.results import RowsError
from cerl.record.screen import PipeConsole
from cerl.report import aggregates, page, roles, sentences, settings, typeset, verdicts
from cerl.report.curves import SCORES, Cell, cells, evaluations, load_rows, run_folders
from cerl.report.estimate import estimate, folded
from cerl.report.intervals import DEFAULT
from cerl.report.methods import METHODS
from cerl.report.normalise import NORMALISATIONS
from cerl.report.summary import NAMES, summarise
from cerl.text import few, visible

# Columns that are mostly the same in all lines of a table; a printed table then has them in its
# title.
FACTS = ("seeds", "agent steps")


def table(summary: pa.Table) -> tuple[list[str], list[list[str]]]:
    """The summary as text: a line for each setting on each environment, or statistic over tasks.

    Args:    summary, from `summary.summarise`.
    Returns: headings; lines, each with one cell for each heading.
    """
    lines: dict[tuple[str, str, str], dict] = {}
    for row in summary.to_pylist():
        env = row["env"]
        if row["unit"] != "return":
            env = f"{env}, {row['unit']} {NAMES[row['statistic']]}"
        line = lines.setdefault((env, row["label"], row["config_hash"]), {**row, "scores": {}})
        line["scores"][row["score"]] = estimate(row)
        line["step"] = min(line["step"], row["step"])
        line["seeds"] = min(line["seeds"], row["seeds"])
        for name in ("seeds_lost", "seeds_diverged"):
            line[name] = max(line[name], row[name])
    used = [score for score in SCORES if any(score in line["scores"] for line in lines.values())]
    headings = ["env", "method", "N", *FACTS, *(SCORES[score] for score in used)]
    text = []
    # Lines of one statistic over tasks stand together, so that settings can be compared.
    places = {env: place for place, env in enumerate(dict.fromkeys(env for env, _, _ in lines))}
    for (env, name, _), line in sorted(lines.items(), key=lambda item: places[item[0][0]]):
        wrong = {"lost": line["seeds_lost"], "diverged": line["seeds_diverged"]}
        said = ", ".join(f"{count} {what}" for what, count in wrong.items() if count)
        seeds = f"{line['seeds']} ({said})" if said else str(line["seeds"])
        facts = [env, name, str(line["members"]), seeds, f"{line['step']:,}"]
        text.append([*facts, *(line["scores"].get(score, "") for score in used)])
    return headings, text


def caption(summary: pa.Table) -> str:
    """A sentence or two that say what the numbers of a table are."""
    rows_ = summary.to_pylist()
    evaluations = sorted({row["evaluations"] for row in rows_})
    last = " or ".join(map(str, evaluations))
    drawn = any(row["score"] == "random" for row in rows_)
    also = "; drawn member: a member drawn for each episode" if drawn else ""
    which = "the last evaluation" if evaluations == [1] else f"the last {last} evaluations"
    units = {row["unit"] for row in rows_}
    scales = [f"{n.unit}: {n.meaning}" for n in NORMALISATIONS.values() if n.unit in units]
    over = ""
    if scales:
        over = f" Over tasks, {'; '.join(scales)}. Optimality gap: how far below 1 on average."
    return (
        f"Mean return over seeds at {which} that all seeds have, {_brackets(rows_)}. Individual: "
        f"average over all members{also}. Agent steps are those of one seed.{over}"
    )


def _brackets(rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands in brackets beside the scores of a table, as a clause."""
    methods = [*dict.fromkeys(row["method"] for row in rows if row["method"])]
    told = []
    if methods:
        confidence = f"{100 * rows[0]['confidence']:g}%"
        told.append(f"with {confidence} intervals over seeds (method {' or '.join(methods)})")
    if any(row["low"] is None and row["least"] is not None for row in rows):
        told.append(
            "with the least and the greatest seed in parentheses, since an interval of so few "
            "seeds is not to be trusted (docs/statistics.md)"
        )
    return ", or ".join(told) or "without an interval"


def markdown(summary: pa.Table, notes: Sequence[str]) -> str:
    """The table, its caption and the notes, as Markdown."""
    headings, lines = table(summary)
    right = ["---", "---", *(["---:"] * (len(headings) - 2))]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [headings, right, *lines])
    listed = "".join(f"\n- {note}" for note in notes)
    return f"{text}\n\n{caption(summary)}\n" + (f"{listed}\n" if notes else "")


def _csv(summary: pa.Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(summary.column_names)
    writer.writerows(list(row.values()) for row in summary.to_pylist())
    return buffer.getvalue()


def _printed(summary: pa.Table, notes: Sequence[str], console: Console) -> None:
    """Prints one table for each environment, with intervals below values to fit 80 columns."""
    headings, lines = table(summary)
    families = {line[1].partition("/")[0] for line in lines if "/" in line[1]}
    prefix = f"{families.pop()}/" if len(families) == 1 else ""
    for env in dict.fromkeys(line[0] for line in lines):
        own = [line for line in lines if line[0] == env]
        used = [k for k in range(1, len(headings)) if any(line[k] for line in own)]
        # Columns of `FACTS` that hold the same in all lines go into the title.
        same = [k for k in used if headings[k] in FACTS and len({line[k] for line in own}) == 1]
        title = ", ".join([env, *(f"{own[0][k]} {headings[k]}" for k in same)])
        title = title.replace(f"{env}, 1 seeds", f"{env}, 1 seed")
        # A title of the table itself would be folded at the width of the table.
        console.print(Text(title, "bold"))
        shown = Table(box=SIMPLE_HEAD)
        shown.padding, shown.pad_edge = (0, 1, 0, 0), False
        used = [k for k in used if k not in same]
        for k in used:
            heading = headings[k].replace(" (", "\n(")
            shown.add_column(heading, justify="left" if k == 1 else "right", overflow="fold")
        for line in own:
            texts = [folded(line[k]) if headings[k] in SCORES.values() else line[k] for k in used]
            shown.add_row(texts[0].removeprefix(prefix), *texts[1:])
        console.print(shown, markup=False)
    for text in (caption(summary), *(f"note: {note}" for note in notes)):
        console.print(text, markup=False)


def _earlier(table: pa.Table, until: int) -> tuple[pa.Table, list[str]]:
    """The rows up to a step, and a note on the runs that have no evaluation up to there.

    Args:    until, agent steps of one seed.
    Raises:  RowsError if no evaluation is left.
    """
    played = evaluations(table)
    kept = played.filter(pc.field("step") <= until)
    if played.num_rows and not kept.num_rows:
        first = min(played["step"].to_pylist())
        raise RowsError(
            f"report --until: no evaluation up to step {until:,}; the first is at {first:,}"
        )
    lost = sorted(set(played["run"].to_pylist()) - set(kept["run"].to_pylist()))
    notes = []
    if lost:
        which = few([visible(run) for run in lost])
        notes = [f"no evaluation up to step {until:,}, so left out: {which}"]
    return table.filter(pc.field("step") <= until), notes


def _page(
    found: Sequence[Cell],
    rows: pa.Table,
    summary: pa.Table,
    notes: Sequence[str],
    judged: Sequence[verdicts.Verdict],
    out: Path,
    pictures: Mapping[str, bytes],
) -> None:
    """Writes the page of the report. Raises: ImportError if plotly is missing."""
    from cerl.report.page.runs import runs_of

    headings, lines = table(summary)
    scores = page.Scores(headings, lines, caption(summary))
    page.write(found, scores, notes, judged, out / page.FILE, runs_of(rows), pictures=pictures)


def main(
    folders: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    last: int = 1,
    until: int = 0,
    x: str = "",
    normalise: str = "",
    mix: bool = False,
    at: int | None = None,
    figures: Sequence[str] = (),
    formats: Sequence[str] = ("png",),
    latex: bool = False,
    html: bool = False,
    method: str = DEFAULT,
    console: Console | None = None,
) -> pa.Table:
    """Prints verdicts and the table; writes table.md, table.csv, verdicts.csv, summary.parquet,
    verdicts.parquet, results.parquet and curves.png into `out`.

    Args:    folders, see `run_folders`; out, a folder, which is created; last, how many of the last
             evaluations are averaged; until, agent steps of one seed after which evaluations are
             left out (0: all are used); x, dotted key of an option: score-by-OPTION.png, a
             CSV beside it and tables show how scores depend on it ("": none); normalise, the name
             of the normalisation of scores over tasks ("": that of each family); mix, to aggregate
             over tasks that were run under different protocols; at, agent steps of one seed at
             which there are verdicts too; figures, names of more figures (`figures.catalogue`;
             "all": all that apply); formats of all figures, of png, pdf and svg; latex, whether to
             write results.tex and hyperparameters.tex; html, whether to write report.html; method
             of all intervals, a key of `methods.METHODS`; console, where to print (default:
             standard output).
    Returns: the summary, as from `summary.summarise`.
    Raises:  RowsError if rows are missing, damaged, or without an evaluation; ConfigError if the
             option x does not differ between runs of one preset, or if there is no such
             normalisation, figure, format or method.
    """
    # matplotlib takes a second to import
    from cerl.report import dependence
    from cerl.report.figures import asked, canvas, catalogue
    from cerl.report.figures import curves as learning
    from cerl.report.figures import score as against

    if method not in METHODS:
        raise ConfigError(
            f"report --intervals: no method {method!r}{nearest(method, [*METHODS])}; expected one "
            f"of {', '.join(METHODS)}"
        )
    formats = [canvas.format_of(kind) for kind in formats]
    wanted = [catalogue.known(name) for name in figures if name != "all"]
    folders, out = [Path(folder) for folder in folders], Path(out)
    console = console or PipeConsole(highlight=False)
    table, lost = load_rows(folders), []
    if until:
        table, lost = _earlier(table, until)
    found, notes = cells(table)
    notes = lost + notes
    short = ""  # what the figure calls the option x
    if x:
        x = dependence.key_of(x, found)
        short = next(cell.label.short[x] for cell in found if x in cell.label.options)
        if missing := dependence.left_out(found, x):
            notes.append(
                f"by {short}: rows do not say which {x} some runs had, so these are left out "
                f"there: {few(missing, between=' / ')}"
            )
    notes += learning.notes(found)
    over: dict = {"normalise": normalise, "mix": mix}
    summary = summarise(found, last=last, method=method, **over)
    notes += aggregates.over_tasks(found, last=last, how=normalise, mix=mix)[1]
    judged = verdicts.verdicts(found, last=last, at=at, how=normalise, method=method)
    notes += roles.notes(found)
    out.mkdir(parents=True, exist_ok=True)
    judgements = verdicts.table(judged)
    text = {"table.md": sentences.markdown(judged) + markdown(summary, notes)}
    text |= {"table.csv": _csv(summary), "verdicts.csv": _csv(judgements)}
    for name, content in text.items():
        write_atomically(out / name, lambda file, c=content: file.write(c.encode()))
    whole = {"summary.parquet": summary, "results.parquet": settings.named_rows(table)}
    whole["verdicts.parquet"] = judgements
    for name, content in whole.items():
        write_atomically(out / name, lambda file, c=content: pq.write_table(c, file))
    sheets = {"curves": learning.draw(found, method=method)}
    scores = []
    if x:
        scores = dependence.points(found, summary, x)
        name = f"score-by-{short.replace(' ', '-')}"
        content = _csv(dependence.table(scores, option=x)).encode()
        write_atomically(out / f"{name}.csv", lambda file: file.write(content))
        sheets[name] = against.draw(found, scores, key=x)
    told = {"rows": table, "summary": summary, "judged": judged}
    how = asked.Asked(last=last, how=normalise, mix=mix, x=x, method=method, **told)
    if figures:
        more, said = catalogue.drawn(found, how, () if "all" in figures else wanted)
        sheets |= {name: own for name, own in more.items() if name not in ("curves", "score")}
        notes += said
    drawn = [out / f"{name}.{kind}" for name in sheets for kind in formats]
    for path in drawn:
        canvas.save(sheets[path.stem], path)
    if latex:
        for name, typed in typeset.tables(found, summary).items():
            write_atomically(out / name, lambda file, c=typed: file.write(c.encode()))
    if html:
        ready = {
            ("score" if name.startswith("score-by") else name): s for name, s in sheets.items()
        }
        pictures = catalogue.pictures(found, how, ready)
        _page(found, table, summary, notes, judged, out, pictures)
    # Printing comes last: if the reader of a pipe stops (`| head`), the files exist already.
    sentences.printed(judged, console)
    _printed(summary, notes, console)
    if x:
        dependence.printed(scores, console, option=short)
    console.print(f"table: {out / 'table.md'}", soft_wrap=True, markup=False)
    for path in drawn:
        console.print(f"plot:  {path}", soft_wrap=True, markup=False)
    if html:
        console.print(f"page:  {out / page.FILE}", soft_wrap=True, markup=False)
    runs = [file.parent for file in run_folders(folders)]
    boards = [run for run in runs if (run / "tensorboard").is_dir()]
    if boards:
        where = Path(os.path.commonpath(boards))
        if where.is_relative_to(Path.cwd()):
            where = where.relative_to(Path.cwd())
        console.print(f"tensorboard --logdir {where}", soft_wrap=True, markup=False)
    return summary
