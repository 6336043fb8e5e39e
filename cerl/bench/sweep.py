"""`cerl bench sweep`: what a sweep costs beside training, and commands on folders of many runs.

`overhead` trains the same runs by `cerl sweep` and by a loop of `cerl train` commands. The other
parts need no training: they plan a sweep of many runs, show its state, and make its report, from
rows that nobody trained (`cerl/bench/many_runs.py`).
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from cerl.bench import by_hand, many_runs
from cerl.bench.clock import device_name
from cerl.bench.table import Output, Row, Rows, Table
from cerl.device.cores import cores
from cerl.device.pick import pick
from cerl.sweep import command, planning

REPEATS = 3  # of a command whose time is measured; the median counts

Part = Literal["overhead", "plan", "status", "report"]
Result = TypeVar("Result")


def sweep(
    *,
    parts: tuple[Part, ...] = ("overhead", "plan", "status", "report"),
    cells: int = 64,
    seconds: float = 10.0,
    jobs: int = 2,
    rounds: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    presets: tuple[str, ...] = ("minatar/bootdqn", "minatar/cerl"),
    envs: tuple[str, ...] = ("minatar-5",),
    settings: int = 100,
    members: int = 5,
    seeds: int = 5,
    evaluations: int = 10,
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("."),
    output: Output = Output(),
) -> Rows:
    """Times a sweep against the same runs by hand, and planning, status and report of many runs.

    Args:
        parts: what is measured; status and report plan the runs, too
        cells: overhead: number of runs
        seconds: overhead: how long a run trains, beside the start of its process
        jobs: overhead: how many runs train at the same time
        rounds: overhead: how often the runs are trained each way; the order alternates
        device: overhead: device of the runs
        presets: other parts: presets of the runs
        envs: other parts: environments, or names of lists of them
        settings: other parts: settings of each preset; there are presets x envs x settings runs
        members: other parts: members of each ensemble, N
        seeds: other parts: seeds of each run
        evaluations: other parts: evaluations of each seed
        folder: a folder on the disk that is measured; the files written are deleted
    """
    counts = {"cells": cells, "jobs": jobs, "rounds": rounds, "settings": settings}
    counts |= {"members": members, "seeds": seeds, "evaluations": evaluations}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name}: expected a number from 1 on, got {count}")
    if not seconds > 0:
        raise ValueError(f"--seconds: expected a number above 0, got {seconds:g}")
    name = f"{device_name(pick(device))}, {cores()} CPU cores"
    table = Table("sweep", output, device=name)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as fresh:
        place = Path(fresh)
        if "overhead" in parts:
            runs = by_hand.Runs(cells, jobs, seconds, device, place)
            for row in _overhead(runs, rounds=rounds):
                table.add(row)
        if {"plan", "status", "report"} & {*parts}:
            asked = many_runs.asked(
                presets, envs, place / "runs", settings=settings, seeds=seeds, members=members
            )
            for row in _many(asked, parts, evaluations=evaluations):
                table.add(row)
    return table.finished()


def _overhead(runs: by_hand.Runs, *, rounds: int) -> Iterator[Row]:
    """The rows of the part `overhead`. Ratios are those of sweep and loop within a round."""
    steps = by_hand.calibrated(runs)
    print(f"a run has {steps:,} agent steps", flush=True)
    spent: dict[str, list[by_hand.Spent]] = {"loop": [], "sweep": [], "report": []}
    for number in range(rounds):
        for way in ("loop", "sweep") if number % 2 == 0 else ("sweep", "loop"):
            took = getattr(by_hand, way)(runs, steps, runs.folder / f"{way}-{number}")
            spent[way].append(took)
            print(f"round {number + 1} of {rounds}, {way}: {took.wall:.1f} s", flush=True)
        spent["report"].append(by_hand.report(runs.folder / f"loop-{number}"))
    head: Row = {"part": "overhead", "runs": runs.cells}
    head |= {"each run": f"{runs.seconds:g} s, {runs.jobs} at a time"}
    for measured in ("wall", "cpu"):
        each = {way: [getattr(one, measured) for one in own] for way, own in spent.items()}
        middle = {way: statistics.median(own) for way, own in each.items()}
        ratios = [
            whole / (loop + report)
            for whole, loop, report in zip(each["sweep"], each["loop"], each["report"], strict=True)
        ]
        ends = f"{min(ratios):.3f} to {max(ratios):.3f}" if rounds > 1 else ""
        told = "" if measured == "wall" else "CPU time: "
        for way, what in (("loop", "a loop of cerl train"), ("report", "cerl report after it")):
            row = {"what": f"{told}{what}", "s": middle[way], "ratio": None, "range": ""}
            yield head | row
        row = {"what": f"{told}cerl sweep, against both", "s": middle["sweep"]}
        yield head | row | {"ratio": statistics.median(ratios), "range": ends}


def _many(asked: command.Asked, parts: tuple[Part, ...], *, evaluations: int) -> Iterator[Row]:
    """The rows of the parts that need no training."""
    out = asked.folder
    planned, took = _timed(lambda: command.planned_for(asked, note=print))
    config = planned.asked[0].config
    sizes = f"N {config.ensemble.members}, {len(config.seeds)} seeds, {evaluations} evaluations"

    def row(part: Part, what: str, seconds: float) -> Row:
        head: Row = {"part": part, "runs": len(planned.asked), "each run": sizes}
        return head | {"what": what, "s": seconds, "ratio": None, "range": ""}

    again, writing = _timed(lambda: planning.written(planned, out))
    if "plan" in parts:
        yield row("plan", "cells and runs of the command", took)
        yield row("plan", "make the run folders and write plan.json", writing)
        again, took = _timed(lambda: command.planned_for(asked, note=print))
        yield row("plan", "the same command again, which reads all folders", took)
    many_runs.leave_states(again, out)
    if "status" in parts:
        yield row("status", "cerl status, the whole process", _process("status", str(out)))
    if "report" in parts:
        rows = many_runs.leave_rows(again, out, evaluations=evaluations)
        for what, took in _report(out):
            yield row("report", what.format(rows=rows), took)
        took = _process("report", str(out), "--out", str(out / "report"))
        yield row("report", "cerl report, the whole process", took)


def _report(out: Path) -> Iterator[tuple[str, float]]:
    """Times the parts of a report. Returns: pairs of a part's description and its seconds."""
    from cerl.report import curves, settings, tables
    from cerl.report.figures import curves as learning
    from cerl.report.summary import summarise

    table, reading = _timed(lambda: curves.load_rows([out]))
    yield "read {rows:,} rows", reading
    (found, notes), labels = _timed(lambda: curves.cells(table))
    yield "labels and curves", labels
    summary, summing = _timed(lambda: summarise(found))
    yield "scores and intervals", summing
    yield "reading, labels and intervals together", reading + labels + summing
    _, took = _timed(lambda: (tables.markdown(summary, notes), settings.named_rows(table)))
    yield "table as Markdown, rows with labels", took
    _, took = _timed(lambda: learning.write(found, out / "curves.png"))
    yield "figure", took


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """The result of a call and the seconds that it took."""
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def _process(*words: str) -> float:
    """Seconds that a cerl command takes as a process of its own, start included; the median.

    Raises: RuntimeError if it fails.
    """
    spent = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        by_hand.run([sys.executable, "-m", "cerl", *words], stdout=subprocess.DEVNULL)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)
