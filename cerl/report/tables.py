"""Makes tables of result rows: what each preset scored on each environment, with intervals.

Intervals are over seeds: members of one seed share data and are no independent samples. Evaluations
are compared at the last step that all seeds of a preset have in common (`cerl/report/curves.py`).
The statistics are those of `cerl/report/statistics.py`.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cerl.record.files import write_atomically
from cerl.record.results import RowsError
from cerl.record.screen import PipeConsole
from cerl.report import statistics
from cerl.report.curves import SCORES, Cell, Curve, cells, load_rows, run_folders
from cerl.text import visible

# Columns that are mostly the same in all lines of a table; a printed table then has them in its
# title.
FACTS = ("seeds", "agent steps")

SUMMARY = pa.schema(
    [
        ("env", pa.string()),  # family/name, or "atari (n games)"
        ("preset", pa.string()),
        ("config_hash", pa.string()),
        ("members", pa.int64()),  # N
        ("score", pa.string()),  # a key of SCORES
        ("unit", pa.string()),  # return, human-normalised
        ("statistic", pa.string()),  # mean, median, iqm, optimality_gap
        ("step", pa.int64()),  # agent steps of one seed at the last evaluation that is used
        ("evaluations", pa.int64()),  # last evaluations of each seed, averaged before anything else
        ("seeds", pa.int64()),  # seeds that are used; over games: the fewest of any game
        ("seeds_lost", pa.int64()),  # seeds left out because their return is not finite
        ("seeds_diverged", pa.int64()),  # seeds that diverged in training; they are not left out
        ("episodes", pa.int64()),  # of all seeds and members
        ("value", pa.float64()),  # in the unit above; null if no seed is left
        ("low", pa.float64()),  # lower end of the interval; null with a single seed
        ("high", pa.float64()),
        ("confidence", pa.float64()),  # probability, such as 0.95
    ]
)


def final(curve: Curve, *, last: int) -> np.ndarray:
    """The score of every seed [S]: the average over its `last` evaluations."""
    return curve.returns[-last:].mean(0)


def summarise(
    found: Sequence[Cell], *, last: int = 1, confidence: float = 0.95, samples: int = 10_000
) -> pa.Table:
    """The final scores of all cells, and those of each preset over all of its Atari games.

    For one environment the statistic is the mean over seeds. Over Atari games it is the mean,
    median, IQM and optimality gap of human-normalised scores. Intervals are percentiles of a
    stratified bootstrap over seeds.

    Args:    found, from `curves.cells`; last, how many of the last evaluations are averaged;
             confidence of the intervals, a probability; samples of the bootstrap.
    Returns: a table with the columns of `SUMMARY`, a row for each score of each cell, then one for
             each score and statistic over games.
    Raises:  ValueError for last < 1.
    """
    if last < 1:
        raise ValueError(f"last: expected at least 1 evaluation, got {last}")
    how = {"confidence": confidence, "samples": samples}
    lines = []
    for cell in found:
        for score, curve in cell.curves.items():
            used = min(last, len(curve.steps))
            values = final(curve, last=used)
            line = {
                **_facts([cell], score, used),
                **_lost([values]),
                "env": cell.env,
                "unit": "return",
                "step": int(curve.steps[-1]),
            }
            lines.append(line | _estimate("mean", [values], **how))
    lines += _over_games(found, last, how)
    return pa.Table.from_pylist(lines, schema=SUMMARY)


def _over_games(found: Sequence[Cell], last: int, how: Mapping[str, float]) -> list[dict]:
    """Rows of `SUMMARY` over games, for every preset that was run on two Atari games or more."""
    known = statistics.human_random()
    lines: list[dict] = []
    games: dict[str, list[Cell]] = {}
    for cell in found:
        family, _, game = cell.env.partition("/")
        if family == "atari" and game in known:
            games.setdefault(cell.preset, []).append(cell)
    for own in games.values():
        for score in SCORES:
            have = [cell for cell in own if score in cell.curves]
            if len(have) < 2:
                continue
            used = min(last, *(len(cell.curves[score].steps) for cell in have))
            tasks = [
                statistics.human_normalised(
                    final(cell.curves[score], last=used), cell.env.partition("/")[2]
                )
                for cell in have
            ]
            line = {
                **_facts(have, score, used),
                **_lost(tasks),
                "env": f"atari ({len(have)} games)",
                "unit": "human-normalised",
                "step": min(int(cell.curves[score].steps[-1]) for cell in have),
            }
            for name in ("iqm", "median", "mean", "optimality_gap"):
                lines.append(line | _estimate(name, tasks, **how))
    return lines


def _facts(own: Sequence[Cell], score: str, used: int) -> dict:
    """Columns of `SUMMARY` that say what a number is of. Args: used, evaluations of each seed."""
    return {
        "preset": own[0].preset,
        "config_hash": own[0].config_hash if len(own) == 1 else None,
        "members": own[0].members,
        "score": score,
        "evaluations": used,
        "episodes": sum(int(cell.curves[score].episodes[-used:].sum()) for cell in own),
        "seeds_diverged": sum(len(cell.diverged) for cell in own),
    }


def _lost(tasks: Sequence[np.ndarray]) -> dict:
    """How many seeds have a finite score and how many have not. Args: tasks, [S] scores a task."""
    finite = [int(np.isfinite(task).sum()) for task in tasks]
    return {"seeds": min(finite), "seeds_lost": sum(task.size for task in tasks) - sum(finite)}


def _estimate(name: str, tasks: Sequence[np.ndarray], *, confidence: float, samples: float) -> dict:
    """A statistic of the finite scores and its interval, as columns of `SUMMARY`.

    Args: name of the statistic; tasks, one array [S] of scores for each task.
    """
    statistic = getattr(statistics, name)
    tasks = [task[np.isfinite(task)] for task in tasks]
    out = {"statistic": name, "confidence": confidence, "value": None, "low": None, "high": None}
    if min(len(task) for task in tasks) == 0:
        return out
    out["value"] = float(statistic(tasks))
    if max(len(task) for task in tasks) > 1:
        low, high = statistics.interval(
            statistic, tasks, samples=int(samples), confidence=confidence
        )
        out["low"], out["high"] = float(low), float(high)
    return out


def number(value: float | None, *, size: float | None = None) -> str:
    """A score as text with about three significant digits, "n/a" where there is none.

    Args: size, the number whose magnitude decides how many decimals are shown (default: the score
          itself), so that a score and its interval can have the same number of decimals.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    size = abs(value) if size is None else size
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def estimate(line: Mapping[str, float | None]) -> str:
    """The value and the interval of a row of a summary as text, with equally many decimals."""
    found = [line[name] for name in ("value", "low", "high")]
    size = max((abs(value) for value in found if value is not None), default=0.0)
    value, low, high = (number(value, size=size) for value in found)
    return value if line["low"] is None else f"{value} [{low}, {high}]"


def table(summary: pa.Table) -> tuple[list[str], list[list[str]]]:
    """The summary as text: a line for each preset on each environment, or statistic over games.

    Args:    summary, from `summarise`.
    Returns: headings; lines, each with one cell for each heading.
    """
    lines: dict[tuple[str, str, str], dict] = {}
    for row in summary.to_pylist():
        env = row["env"]
        if row["unit"] != "return":
            env = f"{env}, {row['unit']} {row['statistic'].replace('_', ' ')}"
        line = lines.setdefault((env, row["preset"], row["config_hash"]), {**row, "scores": {}})
        line["scores"][row["score"]] = estimate(row)
        line["step"] = min(line["step"], row["step"])
        line["seeds"] = min(line["seeds"], row["seeds"])
        for name in ("seeds_lost", "seeds_diverged"):
            line[name] = max(line[name], row[name])
    used = [score for score in SCORES if any(score in line["scores"] for line in lines.values())]
    headings = ["env", "preset", "N", *FACTS, *(SCORES[score] for score in used)]
    text = []
    for (env, preset, _), line in lines.items():
        wrong = {"lost": line["seeds_lost"], "diverged": line["seeds_diverged"]}
        said = ", ".join(f"{count} {what}" for what, count in wrong.items() if count)
        seeds = f"{line['seeds']} ({said})" if said else str(line["seeds"])
        facts = [env, preset, str(line["members"]), seeds, f"{line['step']:,}"]
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
    return (
        f"Mean return over seeds at {which} that all seeds have, with "
        f"{100 * rows_[0]['confidence']:g}% stratified bootstrap intervals over seeds. Individual: "
        f"average over all members{also}. Agent steps are those of one seed."
    )


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
        shown = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD)
        shown.padding, shown.pad_edge = (0, 1, 0, 0), False
        used = [k for k in used if k not in same]
        for k in used:
            heading = headings[k].replace(" (", "\n(")
            shown.add_column(heading, justify="left" if k == 1 else "right", overflow="fold")
        for line in own:
            texts = [line[k].replace(" [", "\n[") for k in used]
            shown.add_row(texts[0].removeprefix(prefix), *texts[1:])
        console.print(shown, markup=False)
    for text in (caption(summary), *(f"note: {note}" for note in notes)):
        console.print(text, markup=False)


def _earlier(table: pa.Table, until: int) -> tuple[pa.Table, list[str]]:
    """The rows up to a step, and a note for each run that has no evaluation up to there.

    Args:    until, agent steps of one seed.
    Raises:  RowsError if no evaluation is left.
    """
    played = table.filter(pc.field("policy") != "train")
    kept = played.filter(pc.field("step") <= until)
    if played.num_rows and not kept.num_rows:
        first = min(played["step"].to_pylist())
        raise RowsError(
            f"report --until: no evaluation up to step {until:,}; the first is at {first:,}"
        )
    lost = sorted(set(played["run"].to_pylist()) - set(kept["run"].to_pylist()))
    notes = [f"{visible(run)}: no evaluation up to step {until:,}; left out" for run in lost]
    return table.filter(pc.field("step") <= until), notes


def main(
    folders: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    last: int = 1,
    until: int = 0,
    console: Console | None = None,
) -> pa.Table:
    """Prints the table; writes table.md, table.csv, summary.parquet and curves.png into `out`.

    Args:    folders, see `run_folders`; out, a folder, which is created; last, how many of the last
             evaluations are averaged; until, agent steps of one seed after which evaluations are
             left out (0: all are used); console, where to print (default: standard output).
    Returns: the summary, as from `summarise`.
    Raises:  RowsError if rows are missing, damaged, or without an evaluation.
    """
    from cerl.report import plots  # matplotlib takes a second to import

    folders, out = [Path(folder) for folder in folders], Path(out)
    console = console or PipeConsole(highlight=False)
    table, lost = load_rows(folders), []
    if until:
        table, lost = _earlier(table, until)
    found, notes = cells(table)
    notes = lost + notes
    summary = summarise(found, last=last)
    out.mkdir(parents=True, exist_ok=True)
    text = {"table.md": markdown(summary, notes), "table.csv": _csv(summary)}
    for name, content in text.items():
        write_atomically(out / name, lambda file, c=content: file.write(c.encode()))
    write_atomically(out / "summary.parquet", lambda file: pq.write_table(summary, file))
    plots.curves(found, out / "curves.png")
    # Printing comes last: if the reader of a pipe stops (`| head`), the files exist already.
    _printed(summary, notes, console)
    console.print(f"table: {out / 'table.md'}", soft_wrap=True, markup=False)
    console.print(f"plot:  {out / 'curves.png'}", soft_wrap=True, markup=False)
    runs = [file.parent for file in run_folders(folders)]
    boards = [run for run in runs if (run / "tensorboard").is_dir()]
    if boards:
        where = Path(os.path.commonpath(boards))
        if where.is_relative_to(Path.cwd()):
            where = where.relative_to(Path.cwd())
        console.print(f"tensorboard --logdir {where}", soft_wrap=True, markup=False)
    return summary
