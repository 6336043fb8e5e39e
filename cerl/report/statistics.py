"""Statistics of scores over runs and tasks, with stratified bootstrap intervals.

Source: Agarwal et al. 2021 (arXiv:2108.13264). Runs are resampled within each task, and an interval
is the percentiles of the resampled statistic. Scores are a list with one array for each task, whose
last axis is the runs of the task (seeds, in cerl). Tasks may differ in their number of runs. All
leading axes (time, resamples) must agree and are axes of the result.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

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
    cut = int(0.25 * scores.shape[-1])
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def optimality_gap(tasks: Tasks, *, target: float = 1.0) -> np.ndarray:
    """Mean shortfall of scores below a target [...]; a score above the target counts as the target.

    Args: target, a score; 1 is human level for human-normalised scores.
    """
    return target - mean([np.minimum(task, target) for task in tasks])


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
    rng = np.random.default_rng(seed)
    values = bootstrap(statistic, *groups, samples=samples, rng=rng)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail], axis=-1)
    return low, high


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
