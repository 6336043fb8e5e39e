"""Statistics of scores over runs and tasks, with rliable's intervals and each run's influence.

Source: Agarwal et al. 2021 (arXiv:2108.13264), whose intervals are the percentiles of a statistic
whose runs are resampled within each task; `cerl/report/intervals.py` has intervals that hold for
few runs. Scores are a list with one array for each task, whose last axis is the runs of the task
(seeds, in cerl). Tasks may differ in their number of runs. All leading axes (time, resamples) must
agree and are axes of the result.
"""

import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

Tasks = Sequence[np.ndarray]  # one [..., runs of the task] for each task
Statistic = Callable[..., np.ndarray]

HUMAN_RANDOM = Path(__file__).resolve().parents[1] / "configs" / "atari_human_random.csv"


def mean(tasks: Tasks) -> np.ndarray:
    """Mean over tasks of the mean over runs [...]."""
    return np.mean([task.mean(-1) for task in tasks], axis=0)


def median(tasks: Tasks) -> np.ndarray:
    """Median over tasks of the mean over runs [...]."""
    return np.median([task.mean(-1) for task in tasks], axis=0)


def iqm(tasks: Tasks) -> np.ndarray:
    """Interquartile mean [...]: the mean of all scores but the lowest and the highest quarter.

    The scores of all tasks are pooled, so a task with more runs has more weight. A quarter is
    rounded down to a whole number of scores.
    """
    scores = np.sort(np.concatenate(tasks, axis=-1), axis=-1)
    cut = _quarter(scores.shape[-1])
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def _quarter(runs: int) -> int:
    """How many of the lowest, and of the highest, scores the interquartile mean leaves out."""
    return int(0.25 * runs)


def optimality_gap(tasks: Tasks, *, target: float = 1.0) -> np.ndarray:
    """Mean shortfall of scores below a target [...]; a score above the target counts as the target.

    Args: target, a score; 1 is human level for human-normalised scores.
    """
    return target - mean([np.minimum(task, target) for task in tasks])


class Influence(NamedTuple):
    """How much each run moves a statistic, to first order; from it follows a standard error.

    Where the statistic is the sum of u over all runs plus something that hardly varies, the
    variance of the statistic is the sum of the variances of u.
    """

    u: list[np.ndarray]  # for each task [..., runs]; only differences between runs of a task count
    kept: list[np.ndarray]  # for each task [...], how many of its runs the statistic averages


def mean_influence(tasks: Tasks) -> Influence:
    """Influence on `mean`: a run counts 1 / (tasks x runs of its task)."""
    u = [task / (len(tasks) * task.shape[-1]) for task in tasks]
    return Influence(u, _all_kept(tasks))


def median_influence(tasks: Tasks) -> Influence:
    """Influence on `median`: runs of the task, or of the two tasks, in the middle.

    The standard error that follows from it takes for granted that no other task could have come to
    be in the middle.
    """
    means = np.stack([task.mean(-1) for task in tasks])
    order = np.argsort(means, axis=0, kind="stable")
    middle = {(len(tasks) - 1) // 2, len(tasks) // 2}
    u = []
    for k, task in enumerate(tasks):
        share = np.mean([order[m] == k for m in middle], axis=0)  # [...]
        u.append(task * share[..., None] / task.shape[-1])
    return Influence(u, _all_kept(tasks))


def iqm_influence(tasks: Tasks) -> Influence:
    """Influence on `iqm`: scores beyond the quartiles count as the outermost score that is kept.

    Source: Yuen 1974, The two-sample trimmed t for unequal population variances (Biometrika 61).
    """
    scores = np.sort(np.concatenate(tasks, axis=-1), axis=-1)
    runs = scores.shape[-1]
    cut = _quarter(runs)
    low, high = scores[..., cut, None], scores[..., runs - cut - 1, None]
    u = [np.clip(task, low, high) / (runs - 2 * cut) for task in tasks]
    kept = [((low <= task) & (task <= high)).sum(-1) for task in tasks]
    return Influence(u, kept)


def optimality_gap_influence(tasks: Tasks, *, target: float = 1.0) -> Influence:
    """Influence on `optimality_gap`: as on the mean of what is below the target, negative."""
    return mean_influence([-np.minimum(task, target) for task in tasks])


def _all_kept(tasks: Tasks) -> list[np.ndarray]:
    return [np.full(task.shape[:-1], task.shape[-1]) for task in tasks]


def profile(tasks: Tasks, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Performance profile: for each threshold, the share of runs whose score is above it.

    The share is taken within each task and then averaged over tasks.

    Returns: [thresholds, ...] in [0, 1].
    """
    return np.stack([mean([(task > t).astype(np.float64) for task in tasks]) for t in thresholds])


def improvement(tasks: Tasks, baseline: Tasks) -> np.ndarray:
    """Probability that a run beats a run of the baseline on a task drawn at random.

    A tie counts half.

    Args:    tasks and baseline, scores of two methods on the same tasks in the same order.
    Returns: [...] in [0, 1].
    Raises:  ValueError if the two have different numbers of tasks.
    """
    if len(tasks) != len(baseline):
        raise ValueError(
            f"improvement: expected scores of the same tasks, got {len(tasks)} and {len(baseline)}"
        )
    wins = []
    for x, y in zip(tasks, baseline, strict=True):
        a, b = x[..., :, None], y[..., None, :]
        wins.append(((a > b) + 0.5 * (a == b)).mean((-2, -1)))
    return np.mean(wins, axis=0)


def improvement_influence(tasks: Tasks, baseline: Tasks) -> Influence:
    """Influence on `improvement`: the share of the other group that a run beats, or that beats it.

    Source: Brunner and Munzel 2000, The nonparametric Behrens-Fisher problem (Biometrical J. 42).
    """
    ups, downs = [], []
    for x, y in zip(tasks, baseline, strict=True):
        a, b = x[..., :, None], y[..., None, :]
        wins = ((a > b) + 0.5 * (a == b)) / len(tasks)
        ups.append(wins.mean(-1) / x.shape[-1])
        downs.append(wins.mean(-2) / y.shape[-1])
    return Influence(ups + downs, _all_kept(tasks) + _all_kept(baseline))


def resample(tasks: Tasks, *, samples: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draws runs with replacement within each task.

    Returns: for each task [..., samples, runs of the task].
    """
    return [task[..., rng.integers(0, n, (samples, n))] for task in tasks for n in task.shape[-1:]]


def bootstrap(
    statistic: Statistic, *groups: Tasks, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """The statistic of resampled groups [..., samples]; groups are resampled independently.

    Args: groups, the scores that the statistic takes (two for `improvement`, one for the others).
    """
    return statistic(*(resample(group, samples=samples, rng=rng) for group in groups))


def interval(
    statistic: Statistic,
    *groups: Tasks,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of a statistic over stratified bootstrap samples.

    Args:    groups, the scores that the statistic takes; samples, how many resamples are drawn;
             confidence, a probability; seed of the resampling: the same rows always give the same
             interval.
    Returns: the lower and the upper end of the interval, [...] each.
    """
    how = {"samples": samples, "confidence": confidence, "seed": seed}
    return intervals([statistic], *groups, **how)[0]


def intervals(
    statistics: Sequence[Statistic], *groups: Tasks, samples: int, confidence: float, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The interval of each of several statistics of the same scores; see `interval`."""
    sizes = tuple(task.shape[-1] for group in groups for task in group)
    own = iter(draws(sizes, samples, seed))
    resampled = [[task[..., next(own)] for task in group] for group in groups]
    tail = 50.0 * (1.0 - confidence)
    found = []
    for statistic in statistics:
        values, ends = statistic(*resampled), [tail, 100.0 - tail]
        low, high = np.percentile(values, ends, axis=-1, overwrite_input=True)
        found.append((low, high))
    return found


@functools.lru_cache(maxsize=8)
def draws(sizes: tuple[int, ...], samples: int, seed: int) -> list[np.ndarray]:
    """The runs that `resample` draws from tasks with these numbers of runs, [samples, runs] each.

    A report asks for the intervals of many scores of equally many seeds.
    """
    rng = np.random.default_rng(seed)
    # With the runs of a sample far apart in memory, the mean over them takes a tenth of the time.
    return [np.asfortranarray(rng.integers(0, size, (samples, size))) for size in sizes]


@functools.cache
def human_random() -> dict[str, tuple[float, float]]:
    """(random, human) for every Atari game that has reference returns: of a uniformly random policy
    and of a human player."""
    lines = HUMAN_RANDOM.read_text(encoding="utf-8").splitlines()
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {row["game"]: (float(row["random"]), float(row["human"])) for row in table}


def human_normalised(returns: np.ndarray, game: str) -> np.ndarray:
    """Human-normalised scores, (return - random) / (human - random): 0 is random, 1 human play.

    Args:    returns [...] of the game, unclipped; game in camel case, such as SpaceInvaders.
    Raises:  ValueError for a game without reference returns.
    """
    known = human_random()
    if game not in known:
        raise ValueError(f"no human and random returns of {game!r}; known: {', '.join(known)}")
    random, human = known[game]
    return (np.asarray(returns, dtype=np.float64) - random) / (human - random)
