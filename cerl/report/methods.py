"""Methods of confidence intervals for statistics of few seeds; `intervals.py` chooses among them.

All methods take the tasks as given and the seeds of each as a sample, except `hierarchical`, which
takes the tasks as a sample too. They work on P studies at once, so that the points of a curve, or
the simulated studies of `cerl bench intervals`, are one call. With two groups the interval is that
of their difference. docs/statistics.md tells how the methods compare.

Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap (percentile, BCa, studentised);
Welch 1947, Biometrika 34 (t of a difference); Yuen 1974, Biometrika 61 (t of trimmed means).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from cerl.report import statistics
from cerl.report.statistics import Influence

Ends = tuple[np.ndarray, np.ndarray]  # lower and upper ends [P]; NaN where there is no interval
CHUNK = 2_000_000  # most numbers that are resampled at a time


class Statistic(NamedTuple):
    """A statistic of scores, and how much each seed moves it."""

    value: Callable[..., np.ndarray]  # of one group, or of two
    influence: Callable[..., Influence]  # strata of the first group, then those of the second
    range: tuple[float, float] = (-np.inf, np.inf)  # values that are possible
    groups: int = 1  # 2: it compares two groups itself; 1: two groups are compared by difference


STATISTICS = {
    "mean": Statistic(statistics.mean, statistics.mean_influence),
    "iqm": Statistic(statistics.iqm, statistics.iqm_influence),
    "median": Statistic(statistics.median, statistics.median_influence),
    "optimality_gap": Statistic(statistics.optimality_gap, statistics.optimality_gap_influence),
    "improvement": Statistic(
        statistics.improvement, statistics.improvement_influence, range=(0.0, 1.0), groups=2
    ),
}


class Sample(NamedTuple):
    """The scores of one group, or of two whose difference is asked for."""

    groups: tuple[list[np.ndarray], ...]  # one or two: for each task [P, ..., seeds]
    paired: bool = False  # the same seeds stand at the same places of both groups

    def value(self, statistic: Statistic) -> np.ndarray:
        """The statistic of the groups, or of the first less that of the second [P, ...]."""
        if statistic.groups == 2:
            return statistic.value(*self.groups)
        first, *second = (statistic.value(group) for group in self.groups)
        return first - second[0] if second else first

    def strata(self, statistic: Statistic) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The influence of the seeds that are drawn together, and how many seeds are averaged.

        A stratum is a task of a group, or a task of both groups where seeds are paired.

        Returns: for each stratum [P, ..., seeds] and [P, ...].
        """
        if statistic.groups == 2:
            u, kept = statistic.influence(*self.groups)
        else:
            found = [statistic.influence(group) for group in self.groups]
            u = found[0].u + [-u for other in found[1:] for u in other.u]
            kept = [n for each in found for n in each.kept]
        if self.paired:
            half = len(u) // 2
            u = [a + b for a, b in zip(u[:half], u[half:], strict=True)]
            kept = [np.minimum(a, b) for a, b in zip(kept[:half], kept[half:], strict=True)]
        return u, kept

    def part(self, rows: slice) -> "Sample":
        """Some of the P studies."""
        return Sample(tuple([task[rows] for task in group] for group in self.groups), self.paired)


def error(sample: Sample, statistic: Statistic) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of a statistic and its degrees of freedom, after Welch and Satterthwaite.

    Returns: [P, ...] each. The error is 0 where no stratum has two different scores, and NaN where
             a stratum has a single seed.
    """
    variances, freedoms = [], []
    for u, kept in zip(*sample.strata(statistic), strict=True):
        n = u.shape[-1]
        if n < 2:
            nothing = np.full(u.shape[:-1], np.nan)
            return nothing, nothing
        # Equal scores have exactly no variance if one of them is subtracted first.
        spread = (u - u[..., :1]).var(-1, ddof=1)
        h = np.maximum(kept, 2)
        variances.append(spread * ((n - 1) * h / (h - 1)))
        freedoms.append(h - 1)
    variance = np.sum(variances, axis=0)
    parts = np.sum([v**2 / f for v, f in zip(variances, freedoms, strict=True)], axis=0)
    freedom = np.divide(variance**2, parts, out=np.ones_like(variance), where=parts > 0)
    return np.sqrt(variance), freedom


class Study(NamedTuple):
    """What a method works on: P samples, the statistic that is asked for, and shared resamples."""

    sample: Sample
    statistic: Statistic
    draws: Callable[[], tuple[Sample, np.ndarray]]  # resamples [P, samples, seeds], and their value
    tail: float  # share of the values beyond either end
    samples: int
    seed: int


def t(study: Study) -> Ends:
    """Value and standard error with the quantile of Student's t; no resampling."""
    value = study.sample.value(study.statistic)
    spread, freedom = error(study.sample, study.statistic)
    half = np.where(spread > 0, special.stdtrit(freedom, 1 - study.tail) * spread, np.nan)
    least, most = study.statistic.range
    return np.maximum(value - half, least), np.minimum(value + half, most)


def percentile(study: Study) -> Ends:
    """Percentiles of the statistic over stratified resamples: what rliable computes."""
    return _percentiles(study.draws()[1], study.tail)


def bca(study: Study) -> Ends:
    """Bias-corrected and accelerated bootstrap: percentiles moved for bias and skewness."""
    value = study.sample.value(study.statistic)
    found = np.sort(study.draws()[1], axis=-1)  # [P, samples]
    # Resamples that differ from the value only by rounding are neither below nor above it.
    slack = 1e-12 * np.abs(found).max(-1, keepdims=True)
    below, above = found < value[:, None] - slack, found > value[:, None] + slack
    last = found.shape[-1] - 1
    edge = 0.5 / (last + 1)
    bias = special.ndtri(np.clip((1 + below.mean(-1) - above.mean(-1)) / 2, edge, 1 - edge))
    squares, cubes = np.zeros(len(value)), np.zeros(len(value))
    for u in study.sample.strata(study.statistic)[0]:
        own = u - u.mean(-1, keepdims=True)
        squares, cubes = squares + (own**2).sum(-1), cubes + (own**3).sum(-1)
    speed = np.divide(cubes, 6 * squares**1.5, out=np.zeros(len(value)), where=squares > 0)
    ends = []
    for z in special.ndtri([study.tail, 1 - study.tail]):
        share = special.ndtr(bias + (bias + z) / (1 - speed * (bias + z)))
        ends.append(found[np.arange(len(found)), np.rint(share * last).astype(np.int64)])
    return ends[0], ends[1]


def studentised(study: Study) -> Ends:
    """Bootstrap of (value - true value) / standard error, also called bootstrap-t.

    There is no interval where so many resamples consist of equal scores that an end is infinite.
    """
    value = study.sample.value(study.statistic)
    spread = error(study.sample, study.statistic)[0]
    drawn, values = study.draws()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (values - value[:, None]) / error(drawn, study.statistic)[0]
        few, many = _percentiles(
            np.nan_to_num(ratio, nan=0.0, posinf=np.inf, neginf=-np.inf), study.tail
        )
        low, high = value - many * spread, value - few * spread
    fine = np.isfinite(low) & np.isfinite(high) & (spread > 0)
    return np.where(fine, low, np.nan), np.where(fine, high, np.nan)


def hierarchical(study: Study) -> Ends:
    """Percentiles of a bootstrap of tasks and of the seeds of each: for other tasks of the kind."""
    sample, samples = study.sample, study.samples
    rng = np.random.default_rng(study.seed)
    tasks = len(sample.groups[0])
    chosen = rng.integers(0, tasks, (tasks, samples))
    groups, places = [], []
    for group in sample.groups:
        sizes = np.array([task.shape[-1] for task in group])
        wide = np.zeros((len(group[0]), tasks, sizes.max()))
        for k, task in enumerate(group):
            wide[:, k, : sizes[k]] = task
        if not (sample.paired and places):
            places = [rng.random((samples, size)) for size in sizes]
        drawn = []
        for task, place in zip(chosen, places, strict=True):
            seeds = (place * sizes[task][:, None]).astype(np.int64)
            drawn.append(wide[:, task[:, None], seeds])
        groups.append(drawn)
    return _percentiles(Sample(tuple(groups), sample.paired).value(study.statistic), study.tail)


METHODS: dict[str, Callable[[Study], Ends]] = {
    "t": t,
    "studentised": studentised,
    "bca": bca,
    "percentile": percentile,
    "hierarchical": hierarchical,
}


def ends(
    sample: Sample,
    *,
    statistic: str,
    methods: Sequence[str],
    confidence: float,
    samples: int,
    seed: int,
) -> dict[str, Ends]:
    """The intervals of P studies by several methods, which share their resamples.

    Args:    sample, whose arrays are [P, seeds]; statistic, a key of `STATISTICS`; methods, keys of
             `METHODS`; confidence, a probability; samples, how many resamples a method with
             resampling draws; seed of these draws: the same scores always give the same interval.
    Returns: lower and upper ends [P] for each method; NaN where there is no interval.
    """
    runs = sum(task.shape[-1] for group in sample.groups for task in group)
    step = max(1, CHUNK // (samples * runs))
    kind, tail = STATISTICS[statistic], (1 - confidence) / 2
    parts: dict[str, list[Ends]] = {method: [] for method in methods}
    for at in range(0, len(sample.groups[0][0]), step):
        own = sample.part(slice(at, at + step))
        draws = functools.cache(functools.partial(_drawn, own, kind, samples=samples, seed=seed))
        study = Study(own, kind, draws, tail, samples, seed)
        for method in methods:
            parts[method].append(METHODS[method](study))
    joined = {
        name: [np.concatenate(e) for e in zip(*own, strict=True)] for name, own in parts.items()
    }
    return {name: (low, high) for name, (low, high) in joined.items()}


def _drawn(sample: Sample, statistic: Statistic, **how: int) -> tuple[Sample, np.ndarray]:
    drawn = resampled(sample, **how)
    return drawn, drawn.value(statistic)


def resampled(sample: Sample, *, samples: int, seed: int) -> Sample:
    """The same groups with seeds drawn with replacement within each stratum [P, samples, seeds]."""
    sizes = [tuple(task.shape[-1] for task in group) for group in sample.groups]
    if sample.paired:
        draws: list[Sequence[np.ndarray]] = [statistics.draws(sizes[0], samples, seed)] * 2
    else:
        every: Iterator[np.ndarray] = iter(statistics.draws(sum(sizes, ()), samples, seed))
        draws = [[next(every) for _ in group] for group in sizes]
    groups = (
        [task[:, drawn] for task, drawn in zip(group, own, strict=True)]
        for group, own in zip(sample.groups, draws, strict=True)
    )
    return Sample(tuple(groups), sample.paired)


def _percentiles(values: np.ndarray, tail: float) -> Ends:
    """Two quantiles of [P, samples] along the samples. Infinite values are sorted, not averaged."""
    method = "linear" if np.isfinite(values).all() else "nearest"
    low, high = np.quantile(values, [tail, 1 - tail], axis=-1, method=method)
    return low, high
