"""Makes the reports of all stored studies anew: `make results`, or for some of them

    python -m tests.remake [STUDY...]

docs/results/reports.yaml lists the studies, the options of their reports and the figures that are
kept. table.md and the figures are replaced, pictures that the list does not name are removed, and
the table of answers at the top of docs/results/README.md is written with numbers from the rows.
"""

import argparse
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import BeforeValidator
from rich.console import Console

from cerl.bench import lm_plots, pruning
from cerl.config import Model
from cerl.record.files import write_atomically, write_text
from cerl.report import curves, intervals, tables, verdicts
from cerl.report.curves import Cell
from cerl.report.estimate import number
from cerl.report.sentences import Verdict

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
BEGIN = "<!-- Written by `make results`, from reports.yaml and the rows. -->"
END = "<!-- End of what is written. -->"

Names = Annotated[tuple[str, ...], BeforeValidator(tuple)]


class Study(Model):
    """A stored study; the first lines of reports.yaml explain the fields."""

    figures: Names
    asks: str
    answer: str
    last: int = 1
    until: int = 0
    x: str = ""
    pooled: Names = ()
    bench: Literal["", "acp", "lm"] = ""


def studies() -> dict[str, Study]:
    """The stored studies by their folder. Raises: pydantic.ValidationError for a wrong list."""
    listed = yaml.safe_load((RESULTS / "reports.yaml").read_text())
    return {folder: Study.model_validate(entry) for folder, entry in listed.items()}


def pictures(study: Study) -> list[str]:
    """Names of the pictures that are kept in the folder of a study."""
    short = study.x.rpartition(".")[2]
    return [f"score-by-{short}.png" if name == "score" else f"{name}.png" for name in study.figures]


@contextmanager
def report(folder: str, study: Study, *, drawn: bool = True) -> Iterator[Path]:
    """The report of a study in a temporary folder. Args: drawn, whether figures are drawn."""
    with tempfile.TemporaryDirectory() as out:
        if study.bench:
            BENCHES[study.bench].draw(RESULTS / folder / "rows.parquet", Path(out))
        else:
            options = {"last": study.last, "until": study.until, "x": study.x if drawn else ""}
            tables.main(
                [RESULTS / folder],
                out,
                figures=[name for name in study.figures if name != "curves"] if drawn else (),
                console=Console(file=io.StringIO()),
                **options,
            )
        yield Path(out)


def remake(folder: str, study: Study) -> list[Path]:
    """Replaces table.md and the pictures of a study. Returns: pictures that were removed."""
    kept = [*pictures(study), *([] if study.bench else ["table.md"])]
    with report(folder, study) as made:
        for name in kept:
            content = (made / name).read_bytes()
            write_atomically(RESULTS / folder / name, lambda file, c=content: file.write(c))
    old = [path for path in (RESULTS / folder).glob("*.png") if path.name not in kept]
    for path in old:
        path.unlink()
    return old


class Numbers:
    """Numbers of a study as texts.

    Args of the constructor: study; folders of `RESULTS` with its rows.
    """

    def __init__(self, study: Study, folders: list[str]) -> None:
        rows = curves.load_rows([RESULTS / folder for folder in folders])
        if study.until:
            rows = rows.filter(pc.field("step") <= study.until)
        self.last = study.last
        self.found: list[Cell] = curves.cells(rows)[0]
        self.judged: list[Verdict] = [
            one for one in verdicts.verdicts(self.found, last=study.last) if one.when == "end"
        ]

    def filled(self, text: str) -> str:
        """A sentence with numbers in place of what stands in braces."""
        return re.sub(r"{([^}]*)}", lambda match: self.text(match[1]), text)

    def text(self, asked: str) -> str:
        """The number that reports.yaml asks for. Raises: ValueError if there is none."""
        kind, *words = asked.split("|")
        if kind in ("less", "more"):
            own = [one for one in self.judged if one.kind == words[0]]
            count, of = sum(one.count(kind) for one in own), sum(len(one.tasks) for one in own)
            if of:
                return f"{count} of {of}"
        elif kind == "mean":
            return number(float(np.nanmean(self.scores(*words))))
        elif kind == "minus":
            one, other, task = words
            found = intervals.difference([self.scores(one, task)], [self.scores(other, task)])
            return interval(found.value, found.low, found.high)
        elif own := [one for one in self.judged if one.kind == kind and words[0] == one.setting]:
            return _difference(own[0], words[1])
        elif len(own := [one for one in self.judged if one.kind == kind]) == 1:
            return _difference(own[0], words[0])
        raise ValueError(f"reports.yaml: no single number {asked!r}")

    def scores(self, method: str, task: str) -> np.ndarray:
        """Individual scores [S] of a method on a task. Raises: ValueError if there are none."""
        for cell in self.found:
            if cell.name == method and cell.env.rpartition("/")[2] == task:
                return curves.final(cell.curves["individual"], last=self.last)
        raise ValueError(f"reports.yaml: no method {method!r} on {task!r}")


def _difference(verdict: Verdict, task: str) -> str:
    """A verdict's difference on a task, or over tasks: as a share of the single agent's score."""
    for line in [*verdict.tasks, *verdict.over[:1]]:
        if task == (line.envs[0].rpartition("/")[2] if len(line.envs) == 1 else "all"):
            ends = line.difference.value, line.difference.low, line.difference.high
            if line.unit == "single-agent-normalised":
                value, *others = (f"{100 * x:+.0f}" for x in ends if x is not None)
                return f"{value}% [{', '.join(others)}]"
            return interval(*ends)
    raise ValueError(f"reports.yaml: no verdict {verdict.kind!r} on {task!r}")


def draw_savings(path: Path, folder: Path) -> None:
    """The figure of `cerl bench acp`. Args: path of its rows; folder for the figure."""
    pruning.draw(pq.read_table(path).to_pylist(), folder / "acp.png")


def savings(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The largest speed-up by pruning, and where: names in braces for the answer of a benchmark."""
    places = {(row["length"], row["decay"], row["pruned"]): row for row in rows}
    found = [
        (places[length, decay, False]["both"] / row["both"], row["skipped"], length)
        for (length, decay, pruned), row in places.items()
        if pruned
    ]
    speed, skipped, length = max(found)
    return {"speed": f"{speed:.1f}", "skipped": f"{100 * skipped:.0f}%", "length": f"{length:,}"}


def language(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Speed by pruning of language models by their size, and its shares, for answers in braces.

    They are of FoX trained with pruning: `faster-25M`, by how much pruning makes training faster;
    `official-25M`, its speed as a multiple of that with the authors' kernel without pruning;
    `skipped-25M`, the share of blocks that was skipped in the end.
    """
    texts = {}
    for size in {row["size"] for row in rows}:
        own = [
            r for r in rows if (r["size"], r["kind"], r["pruning"]) == (size, "fox-pro", "static")
        ]
        speed = {row["way"]: row["value"] for row in own if row["what"] == "speed"}
        skipped = [row for row in own if row["what"] == "skipped"]
        end = max(row["tokens"] for row in skipped)
        share = fmean(row["value"] for row in skipped if row["tokens"] == end)
        texts[f"faster-{size}"] = f"{100 * (speed['static'] / speed['off'] - 1):.0f}%"
        texts[f"official-{size}"] = f"{speed['static'] / speed['official off']:.1f}"
        texts[f"skipped-{size}"] = f"{100 * share:.0f}%"
    return texts


class Bench(NamedTuple):
    """How a benchmark with rows of its own kind is drawn, and what its answer says."""

    draw: Callable[[Path, Path], object]  # (path of its rows, folder for the figures)
    numbers: Callable[[list[dict[str, Any]]], dict[str, str]]  # of its rows, by the name in braces


BENCHES = {"acp": Bench(draw_savings, savings), "lm": Bench(lm_plots.draw, language)}


def interval(value: float, low: float | None, high: float | None) -> str:
    """A difference with its sign and its interval, e.g. "-771 [-1,304, -238]"."""
    size = max(abs(x) for x in (value, low, high) if x is not None)
    text = number(value, size=size)
    text = text if text.startswith("-") else f"+{text}"
    if low is None or high is None:
        return f"{text} (no interval)"
    return f"{text} [{number(low, size=size)}, {number(high, size=size)}]"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading of Markdown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def answers(listed: dict[str, Study], page: str) -> str:
    """The table of answers as Markdown. Args: page, README.md, whose sections it links to."""
    headings = re.findall(r"^## (.*)", page, re.MULTILINE)
    lines = ["| study | question | answer | report |", "|---|---|---|---|"]
    for folder, study in listed.items():
        top = folder.partition("/")[0]
        [heading] = [text for text in headings if f"`{top}/`" in text]
        answer = study.answer
        if study.bench:
            rows = pq.read_table(RESULTS / folder / "rows.parquet").to_pylist()
            answer = answer.format(**BENCHES[study.bench].numbers(rows))
        elif "{" in answer:
            answer = Numbers(study, [*(study.pooled or [folder])]).filled(answer)
        asks = study.asks.replace("|", "\\|")
        made = f"[figure]({folder}/{pictures(study)[-1]})"
        if not study.bench:
            made = f"[table]({folder}/table.md), {made}"
        lines.append(f"| [{folder}](#{anchor(heading)}) | {asks} | {answer} | {made} |")
    return "\n".join(lines)


def with_answers(page: str, table: str) -> str:
    """The page with another table of answers. Raises: ValueError if it has no place for it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.remake")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="folders; default: all")
    names, listed = parser.parse_args().studies, studies()
    if unknown := [name for name in names if name not in listed]:
        parser.error(f"expected studies of reports.yaml, got {', '.join(unknown)}")
    for folder in names or listed:
        removed = remake(folder, listed[folder])
        print(f"{folder}: {', '.join(pictures(listed[folder]))}", flush=True)
        for path in removed:
            print(f"{folder}: removed {path.name}, which reports.yaml does not name")
    page = RESULTS / "README.md"
    text = page.read_text()
    write_text(page, with_answers(text, answers(listed, text)))


if __name__ == "__main__":
    main()
