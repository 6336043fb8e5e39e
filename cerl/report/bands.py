"""A score along steps with its interval: the lines and bands of all figures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cerl.report import intervals
from cerl.report.intervals import DEFAULT

SAMPLES = 2_000  # resamples of a band by a method that resamples


class Band(NamedTuple):
    """A statistic at T steps, and both ends of its interval."""

    value: np.ndarray  # [T]; NaN where no seed is left
    low: np.ndarray | None  # [T]; None where no interval of so few seeds can be trusted
    high: np.ndarray | None  # [T]; None together with the lower end


def finite(tasks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Scores [..., S] of each task without the seeds that have a NaN anywhere."""
    return [task[..., np.isfinite(task).reshape(-1, task.shape[-1]).all(0)] for task in tasks]


def band(
    tasks: Sequence[np.ndarray],
    *,
    statistic: str = "mean",
    method: str = DEFAULT,
    confidence: float = 0.95,
) -> Band:
    """A statistic of seeds along steps with its interval, without seeds that have a NaN anywhere.

    Args:   tasks, scores [T, S] of each task; statistic, a key of `intervals.ONE_GROUP`; method, a
            key of `methods.METHODS`; confidence, a probability.
    Raises: ValueError for unknown names.
    """
    tasks = finite(tasks)
    steps = len(tasks[0])
    if min(task.shape[-1] for task in tasks) == 0:
        return Band(np.full(steps, np.nan), None, None)
    how = {"statistic": statistic, "method": method, "confidence": confidence}
    value, low, high = intervals.along(tasks, **how, samples=SAMPLES)
    # Where all seeds have one score there is no interval, and a band has no width.
    equal = ~(np.isfinite(low) & np.isfinite(high))
    if equal.all():
        return Band(value, None, None)
    return Band(value, np.where(equal, value, low), np.where(equal, value, high))
