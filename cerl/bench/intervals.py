"""Measures how often 95% intervals hold the true value: `cerl bench intervals`.

Studies are simulated whose true values are known, with few seeds and with scores distributed as
those of reinforcement learning are: normal, skewed, of runs that succeed or fail, of tasks that
vary differently, and drawn from stored rows. The share of studies whose interval holds the true
value is the coverage of the method. An interval that a method does not give counts as a miss.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from cerl.arguments import maybe
from cerl.bench.table import Output, Row, Rows, Table
from cerl.device.cores import cores
from cerl.record.files import write_text
from cerl.report import curves
from cerl.report.methods import STATISTICS, Sample, ends

CONFIDENCE = 0.95
POPULATION = 400_000  # scores, of all tasks of a group together, from which true values are found
SHIFT, SPREAD = (
    0.5,
    0.5,
)  # the second group's mean score and its spread, where the first has 0 and 1
WITHIN = 0.15  # spread of the runs that succeed, and of those that fail; they are 1 apart
LAST = 3  # evaluations that are averaged in scores from stored rows

Of = Literal["single", "difference", "paired"]
# Draws scores of one task, with mean 0 and standard deviation 1: (rng, shape, task, group).
Scores = Callable[[np.random.Generator, tuple[int, ...], int, int], np.ndarray]


class Case(NamedTuple):
    """The statistic, seeds and tasks for which the coverage of an interval is measured."""

    statistic: str
    of: Of
    tasks: int
    seeds: int


def normal(rng: np.random.Generator, shape: tuple[int, ...], task: int, group: int) -> np.ndarray:
    """Normal scores."""
    return rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...], task: int, group: int) -> np.ndarray:
    """Log-normal scores whose logarithms have standard deviation 0.8; skewness 3.7."""
    variance = 0.8**2
    scores = np.exp(0.8 * rng.standard_normal(shape)) - np.exp(variance / 2)
    return scores / np.sqrt((np.exp(variance) - 1) * np.exp(variance))


def bimodal(rng: np.random.Generator, shape: tuple[int, ...], task: int, group: int) -> np.ndarray:
    """Scores of runs that succeed with probability 0.7 (first group) or 0.4 (second)."""
    chance = (0.7, 0.4)[group]
    scores = (rng.random(shape) < chance) - chance + WITHIN * rng.standard_normal(shape)
    return scores / np.sqrt(chance * (1 - chance) + WITHIN**2)


def uneven(rng: np.random.Generator, shape: tuple[int, ...], task: int, group: int) -> np.ndarray:
    """Normal scores whose spread is 1/3, 1 or 3 by task, times 2/3."""
    return rng.standard_normal(shape) * (2 / 9, 2 / 3, 2)[task % 3]


def from_rows(folder: Path) -> Scores:
    """Scores drawn from the final scores of a stored study, centred.

    From every setting and score its mean over seeds is subtracted. What is left of all settings of
    an environment is the population of one task.
    """
    found, _ = curves.cells(curves.load_rows([folder]))
    by_env: dict[str, list[np.ndarray]] = {}
    for cell in found:
        for curve in cell.curves.values():
            final = curve.returns[-LAST:].mean(0)
            own = final[np.isfinite(final)]
            by_env.setdefault(cell.env, []).append(own - own.mean())
    pools = [np.concatenate(own) for own in by_env.values()]
    pools = [pool / pool.std() for pool in pools]

    def stored(
        rng: np.random.Generator, shape: tuple[int, ...], task: int, group: int
    ) -> np.ndarray:
        return rng.choice(pools[task % len(pools)], shape)

    return stored


SIMULATED: dict[str, Scores] = {
    "normal": normal,
    "skewed": skewed,
    "bimodal": bimodal,
    "uneven tasks": uneven,
}


def intervals(
    *,
    statistics: tuple[Literal["mean", "iqm", "median", "optimality_gap", "improvement"], ...] = (
        "mean",
        "iqm",
    ),
    of: tuple[Of, ...] = ("single", "difference"),
    tasks: tuple[int, ...] = (1, 3, 5, 26),
    seeds: tuple[int, ...] = (2, 3, 5, 10, 20),
    methods: tuple[Literal["t", "studentised", "bca", "percentile", "hierarchical"], ...] = (
        "t",
        "studentised",
        "bca",
        "percentile",
        "hierarchical",
    ),
    repetitions: int = 1000,
    samples: int = 400,
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("docs/results"),
    studies: tuple[str, ...] = ("mujoco", "minatar", "minatar-size"),
    page: Annotated[Path | None, maybe("FILE")] = None,
    output: Output = Output(),
) -> Rows:
    """Measures the coverage of 95% intervals in per cent, for each method.

    Args:
        statistics: the statistics whose intervals are measured
        of: one group of scores; two independent groups, or two scores of the same seeds
        tasks: numbers of tasks
        seeds: numbers of seeds of each task
        methods: the methods that are compared
        repetitions: simulated studies for each number of the table
        samples: resamples of the methods that resample
        folder: folder with stored studies; a study that it does not have is left out
        studies: stored studies whose centred scores are drawn, too
        page: file for the averages over the kinds of scores as a table in Markdown
    """
    for name, count in {"repetitions": repetitions, "samples": samples}.items():
        if count < 1:
            raise ValueError(f"--{name}: expected a number from 1 on, got {count}")
    if min(tasks) < 1 or min(seeds) < 1:
        raise ValueError(f"--tasks, --seeds: expected numbers from 1 on, got {tasks} and {seeds}")
    kinds = dict(SIMULATED)
    for name in studies:
        if (folder / name).is_dir():
            kinds[f"{name} rows"] = from_rows(folder / name)
        else:
            print(f"{folder / name}: no such folder; its scores are left out", flush=True)
    title = f"coverage of {CONFIDENCE:.0%} intervals in %, {repetitions} studies each"
    table = Table("intervals", output, device=f"cpu ({cores()} CPU cores)", title=title)
    how = {"repetitions": repetitions, "samples": samples}
    for statistic in statistics:
        for case in (Case(statistic, o, t, s) for o in of for t in tasks for s in seeds):
            if STATISTICS[statistic].groups == 2 and case.of != "difference":
                continue
            for name, scores in kinds.items():
                if name == "uneven tasks" and case.tasks == 1:
                    continue
                start = time.monotonic()
                found = coverage(case, scores, methods=methods, **how)
                row: Row = {**case._asdict(), "scores": name}
                row |= {method: round(100 * share, 1) for method, share in found.items()}
                table.add(row | {"s": round(time.monotonic() - start, 3)})
    if page is not None:
        write_text(page, markdown(table.rows, methods))
    return table.finished()


def coverage(
    case: Case,
    scores: Scores,
    *,
    methods: Sequence[str],
    repetitions: int,
    samples: int,
    seed: int = 0,
) -> dict[str, float]:
    """The share of simulated studies whose interval holds the true value, for each method.

    Args: case, what the intervals are of; scores, the kind of scores; seed of the simulation.
    """
    rng = np.random.default_rng(seed)
    sample = _study(case, scores, rng, repetitions, case.seeds)
    true = truth(case, scores, rng)
    how = {"confidence": CONFIDENCE, "samples": samples, "seed": seed}
    found = ends(sample, statistic=case.statistic, methods=methods, **how)
    slack = 1e-9
    return {
        method: float(((low <= true + slack) & (true - slack <= high)).mean())
        for method, (low, high) in found.items()
    }


def truth(case: Case, scores: Scores, rng: np.random.Generator) -> float:
    """The value that a statistic estimates: that of a very large number of seeds.

    The interquartile mean leaves out a whole number of scores, so with few seeds less than a half
    of them; its true value is that of the share that it leaves out.
    """
    seeds = POPULATION // case.tasks
    if case.statistic == "improvement":
        many = _study(case, scores, rng, 1, min(seeds, 2000))
        return float(many.value(STATISTICS["improvement"])[0])
    many = _study(case, scores, rng, 1, seeds)
    if case.statistic != "iqm":
        return float(many.value(STATISTICS[case.statistic])[0])
    runs = case.tasks * case.seeds
    share = int(0.25 * runs) / runs
    found = []
    for group in many.groups:
        pool = np.sort(np.concatenate(group, axis=-1)[0])
        cut = round(share * len(pool))
        found.append(pool[cut : len(pool) - cut].mean())
    return float(found[0] - found[1] if len(found) == 2 else found[0])


def _study(case: Case, scores: Scores, rng: np.random.Generator, count: int, seeds: int) -> Sample:
    """Scores of `count` studies. The levels of the tasks are spread over two standard deviations.

    Paired scores of a seed are correlated: the second is half the first, and half on its own.
    """
    first, second = [], []
    for task in range(case.tasks):
        level = 2 * task / max(1, case.tasks - 1)
        x = scores(rng, (count, seeds), task, 0)
        first.append(level + x)
        if case.of == "single":
            continue
        y = scores(rng, (count, seeds), task, 1)
        if case.of == "paired":
            y = x + y
        second.append(level + SHIFT + SPREAD * y)
    return Sample((first, second) if second else (first,), case.of == "paired")


def markdown(rows: Rows, methods: Sequence[str]) -> str:
    """Coverage in per cent, averaged over the kinds of scores, and the lowest of them in brackets.

    Args: rows of the benchmark; methods, the columns.
    """
    names = ["statistic", "of", "tasks", "seeds"]
    lines = ["| " + " | ".join([*names, *methods]) + " |"]
    lines.append("| --- | --- |" + " ---: |" * (2 + len(methods)))
    cases = {tuple(row[name] for name in names): None for row in rows}
    for case in cases:
        own = [row for row in rows if tuple(row[name] for name in names) == case]
        cells = [str(value) for value in case]
        for method in methods:
            shares = [row[method] for row in own]
            text = f"{np.mean(shares):.1f} ({min(shares):.1f})"
            cells.append(f"**{text}**" if np.mean(shares) >= 93 else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
