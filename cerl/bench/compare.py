"""Decides whether a benchmark got slower: against stored rows, or between two source trees.

Absolute times drift with temperature, clock rates and drivers. So a difference of a few percent can
be seen only where the two versions run alternately on one machine: `cerl bench compare`.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from cerl.arguments import maybe, word
from cerl.bench import BENCHMARKS, Slower
from cerl.bench.rows import Place, Printed, Row, Rows, check_tolerance, place
from cerl.bench.stored import measurements, partner, read, told

# The benchmarks that `cerl bench compare OLD NEW` runs if none is named: those to look at before a
# release, for one GPU.
GUARDED = (
    "update",
    "sac",
    "train",
    "train --presets mujoco/cerl --envs 1",
    "env --counts 10 1024 8192",
    "replay",
    "memory-update",
    "memory-acting",
    "attention --shapes 4,4096,16,64 16,1024,8,128 64,256,8,64 256,64,4,32 step:64,1024,8,64",
)
# 97.5% quantile of Student's t for 1, 2, ... degrees of freedom; the last one stands for all more.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class Turn(NamedTuple):
    """One measurement under the two source trees, a number for each round."""

    old: list[float]
    new: list[float]

    def ratio(self) -> tuple[float, float, float]:
        """Geometric mean of new / old, and the lower and upper end of its 95% interval.

        The ratio is taken within each round, so that a drift from round to round cancels. The
        interval is Student's t on the logarithms of the ratios.
        """
        logs = [math.log(new / old) for old, new in zip(self.old, self.new, strict=True)]
        mean = statistics.fmean(logs)
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        half = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1] * error
        return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


@dataclass(frozen=True)
class Plan:
    """Run a benchmark under two source trees alternately, and compare.

    The order is old new, new old, old new, ..., and every run is a process of its own. For every
    measurement, the mean ratio new / old is printed with its 95% interval. "SLOWER" (then the exit
    code is 1): the whole interval lies above 1 + tolerance. "unsure": a part of the interval does;
    more rounds make it smaller. All other options are handed to the benchmark:
    `cerl bench compare ../old . update --presets minatar/cerl --calls 100`.

    A source tree is a folder with cerl/, and with cerl/agents, cerl/envs and cerl/configs as links
    or folders. It needs neither git nor an installation.
    """

    old: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OLD")]
    """source tree to compare with"""
    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """source tree that may have become slower"""
    name: Annotated[
        tyro.conf.Positional[str], word("compare", "NAME"), tyro.conf.arg(help_behavior_hint="")
    ] = ""
    """benchmark; if none is given, those of GUARDED in cerl/bench/compare.py"""
    rounds: int = 5
    """how often each tree runs; more make the interval smaller"""
    tolerance: float = 0.02
    """share by which a measurement may be larger: 0.02 allows 2%"""
    out: Annotated[Path | None, maybe("FILE")] = None
    """file to which every measured row is appended, with the keys `tree` and `round`"""


def compare(plan: Plan, options: Sequence[str]) -> None:
    """Runs a plan.

    Args:    options, words of the command line for the benchmark.
    Raises:  Slower; ValueError for a plan that cannot be run; RuntimeError if a benchmark fails.
    """
    if plan.rounds < 2:
        raise ValueError(f"--rounds: expected a number from 2 on, got {plan.rounds}")
    check_tolerance(plan.tolerance)
    if plan.name and plan.name not in BENCHMARKS.keys() - {"compare"}:
        raise ValueError(f"compare: no benchmark {plan.name!r}; `cerl bench` lists them")
    if options and not plan.name:
        raise ValueError(f"compare: {options[0]!r} is an option of which benchmark? Name it first")
    trees = {"old": plan.old, "new": plan.new}
    for name, tree in trees.items():
        _check(tree, name)
    lines = [[plan.name, *options]] if plan.name else [line.split() for line in GUARDED]
    slower: list[str] = []
    failed: list[str] = []
    for words in lines:
        try:
            slower += _compared(trees, words, plan)
        except RuntimeError as error:
            if len(lines) == 1:
                raise
            failed.append(str(error))  # the remaining benchmarks still run
            print(error, flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} benchmarks failed, the first: {failed[0]}")
    if slower:
        raise Slower(f"{len(slower)} measurements, the first {slower[0]}")


def _compared(trees: dict[str, Path], words: Sequence[str], plan: Plan) -> list[str]:
    """Runs a benchmark under both trees alternately and prints the ratios.

    Args:    trees, "old" and "new"; words, the benchmark's name and options.
    Returns: a text for each measurement that is slower.
    """
    rounds: dict[str, list[Rows]] = {"old": [], "new": []}
    title = f"cerl bench {shlex.join(words)}: {plan.new} against {plan.old}"
    for number in range(plan.rounds):
        for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
            begin = time.monotonic()
            rows = _measured(trees[name], words)
            rounds[name].append(rows)
            spent = time.monotonic() - begin
            print(f"round {number + 1} of {plan.rounds}, {name}: {spent:.0f} s", flush=True)
            if plan.out is not None:
                with plan.out.open("a") as file:
                    marked = (row | {"tree": name, "round": number} for row in rows)
                    file.writelines(json.dumps(row) + "\n" for row in marked)
    printed, lines, slower, most = Printed(title), Rows(), [], 1.0 + plan.tolerance
    for there, name, turn in _turns(rounds["old"], rounds["new"]):
        ratio, low, high = turn.ratio()
        verdict = "SLOWER" if low > most else "unsure" if high > most else ""
        if verdict == "SLOWER":
            slower.append(f"{told(there)}, {name}: {ratio:.3f}")
        middle = {"old": statistics.median(turn.old), "new": statistics.median(turn.new)}
        ratios: Row = {"ratio": f"{ratio:.3f}", "95% interval": f"{low:.3f} to {high:.3f}"}
        lines.append(dict(there) | {"measured": name} | middle | ratios | {"verdict": verdict})
    printed.add_all(lines)
    if any(turn for turn in rounds["new"]) and not lines:
        raise ValueError("compare: the two trees measure nothing in common")
    return slower


def _turns(old: list[Rows], new: list[Rows]) -> Iterable[tuple[Place, str, Turn]]:
    """Every measurement that all rounds of both trees have: where, name of the column, numbers."""
    for row in new[0]:
        there = [partner(row, rows) for rows in (*old, *new)]
        found = [measurements(other) for other in there if other is not None]
        if len(found) < len(there):
            print(f"{told(place(row))}: not measured by both", flush=True)
            continue
        for name in measurements(row):
            values = [each[name] for each in found if name in each]
            if len(values) == len(found):
                yield place(row), name, Turn(values[: len(old)], values[len(old) :])


def _check(tree: Path, name: str) -> None:
    """Raises: ValueError if Python, run with the tree first, imports cerl from somewhere else."""
    probe = "import cerl, os; print(os.path.dirname(os.path.realpath(cerl.__file__)))"
    done = _python(tree, "-c", probe)
    if done.returncode or Path(done.stdout.strip()) != (tree / "cerl").resolve():
        raise ValueError(f"compare: expected {name} to be a source tree with cerl/, got {tree}")


def _measured(tree: Path, words: Sequence[str]) -> Rows:
    """Runs a benchmark under a tree. Returns: its rows. Raises: RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        done = _python(tree, "-m", "cerl", "bench", *words, "--out", str(out))
        if done.returncode or not out.is_file():
            last = (done.stderr or done.stdout).strip()[-2000:]
            raise RuntimeError(f"cerl bench {shlex.join(words)} failed under {tree}:\n{last}")
        return read(out)


def python_path(tree: Path) -> str:
    """A PYTHONPATH that begins with a tree and keeps the folders that hold its dependencies.

    Folders of today's PYTHONPATH with another copy of cerl are left out.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [folder for folder in given if folder and not (Path(folder) / "cerl").is_dir()]
    return os.pathsep.join([str(tree.resolve()), *others])


def _python(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a tree first in its search path.

    -P: without it, Python would search the current folder first.
    """
    environment = os.environ | {"PYTHONPATH": python_path(tree)}
    line = [sys.executable, "-P", *words]
    return subprocess.run(line, capture_output=True, text=True, env=environment)
