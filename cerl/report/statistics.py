"""Statistics of scores over runs and tasks, with stratified bootstrap intervals.

Agarwal et al. 2021 (arXiv:2108.13264): runs are resampled within each task, intervals are the
percentiles of the resampled statistic. Scores are a list with one array for each task, runs on the
last axis; tasks may differ in their number of runs; leading axes (time, resamples) pass through.
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
    """Interquartile mean [...]: of all scores together, without the lowest and highest quarter.

    A task weighs by its number of runs. A quarter is rounded down to whole scores.
    """
    scores = np.sort(np.concatenate(tasks, axis=-1), axis=-1)
    cut = int(0.25 * scores.shape[-1])
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def optimality_gap(tasks: Tasks, *, target: float = 1.0) -> np.ndarray:
    """How far scores stay below a target on average [...]; what lies above it does not count."""
    return target - mean([np.minimum(task, target) for task in tasks])


def profile(tasks: Tasks, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Performance profile: share of runs whose score is above each threshold.

    Returns: [thresholds, ...].
    """
    return np.stack([mean([(task > t).astype(np.float64) for task in tasks]) for t in thresholds])


def improvement(tasks: Tasks, baseline: Tasks) -> np.ndarray:
    """Probability that a run of one beats a run of the other on a random task; ties count half.

    Raises: ValueError if they are not about the same number of tasks.
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
    """Runs drawn with replacement within each task: [..., samples, runs of the task] each."""
    return [task[..., rng.integers(0, n, (samples, n))] for task in tasks for n in task.shape[-1:]]


def bootstrap(
    statistic: Statistic, *groups: Tasks, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """The statistic of resampled groups [..., samples]; groups are resampled independently."""
    return statistic(*(resample(group, samples=samples, rng=rng) for group in groups))


def interval(
    statistic: Statistic,
    *groups: Tasks,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of a statistic over stratified bootstrap samples.

    Args:    groups as the statistic takes them; seed of the resampling, so a report repeats itself.
    Returns: low, high [...].
    """
    rng = np.random.default_rng(seed)
    values = bootstrap(statistic, *groups, samples=samples, rng=rng)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail], axis=-1)
    return low, high


def human_random() -> dict[str, tuple[float, float]]:
    """Returns of a random policy and of a human for every Atari game that has them."""
    lines = HUMAN_RANDOM.read_text(encoding="utf-8").splitlines()
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {row["game"]: (float(row["random"]), float(row["human"])) for row in table}


def human_normalised(returns: np.ndarray, game: str) -> np.ndarray:
    """(return - random) / (human - random). Raises: ValueError for a game without references."""
    known = human_random()
    if game not in known:
        raise ValueError(f"no human and random returns of {game!r}; known: {', '.join(known)}")
    random, human = known[game]
    return (np.asarray(returns, dtype=np.float64) - random) / (human - random)
