"""Confidence intervals of scores of few seeds, and an exact test of a difference.

An interval is given only where its coverage was measured to be near what is written beside it:
`cerl bench intervals` simulates studies whose true values are known and counts how often an
interval holds them (table in docs/statistics.md). Percentiles of the bootstrap, which rliable
computes, hold the true mean of three seeds in about 75% of studies where 95% is written; they are
an option and not the default.

Scores are a list with one array [S] for each task, one number for each seed. A score that is not a
finite number is left out, and so is its partner where seeds are paired.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from cerl.config.errors import nearest
from cerl.report.methods import METHODS, STATISTICS, Sample, ends, error
from cerl.report.statistics import Tasks

DEFAULT = "t"
# The fewest seeds of each task from which on intervals of one group by the default method hold the
# true value in 93% of simulated studies or more, by statistic and by number of tasks: an entry
# counts up to the next larger number of tasks, and None says that no number of seeds suffices.
ONE_GROUP: dict[str, dict[int, int | None]] = {
    "mean": {1: 7, 2: 2},
    "iqm": {1: None, 2: 3, 4: 2},
    "median": {1: 7, 2: 2, 3: 6, 4: 2, 5: None, 10: 2},
    "optimality_gap": {1: 7, 2: 6, 3: 9, 4: 2},
}
SAMPLES = 50_000  # resamples of a method that resamples
REGROUPINGS = 200_000  # a permutation test takes all regroupings up to this number, else a sample
DRAWN = 50_000  # regroupings in that sample


class Interval(NamedTuple):
    """A value with its interval; both ends are None where no interval can be trusted."""

    value: float  # NaN where a task has no finite score
    low: float | None
    high: float | None
    method: str | None  # a key of `METHODS`; None where there is no interval

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def single(
    a: Tasks,
    *,
    statistic: str = "mean",
    method: str = DEFAULT,
    confidence: float = 0.95,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """A statistic of one group of scores, with its interval; arguments as for `difference`."""
    how = {"confidence": confidence, "samples": samples, "seed": seed}
    return _interval((a,), False, statistic=statistic, method=method, **how)


def difference(
    a: Tasks,
    b: Tasks,
    *,
    statistic: str = "mean",
    method: str = DEFAULT,
    paired: bool = False,
    confidence: float = 0.95,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """A statistic of one group of scores less that of another, with the difference's interval.

    Args:    a and b, scores on the same tasks in the same order; statistic, a key of `STATISTICS`:
             "improvement" is no difference but the probability that a run of a beats one of b;
             method, a key of `METHODS`; paired, True where a and b are two scores of the same seeds
             in the same order (a vote and the members of one run), which are then resampled
             together; confidence, a probability; samples, how many resamples a method that
             resamples draws; seed of these draws: the same scores always give the same interval.
    Returns: the interval; without ends below `least_seeds` seeds in a task (of one group:
             `least_seeds_of_one_group`), and where no task has two different scores, so that
             nothing is known about their spread.
    Raises:  ValueError for unknown names, groups of different tasks, and paired scores of different
             lengths.
    """
    how = {"confidence": confidence, "samples": samples, "seed": seed}
    return _interval((a, b), paired, statistic=statistic, method=method, **how)


def relative(
    a: Tasks,
    b: Tasks,
    *,
    statistic: str = "mean",
    paired: bool = False,
    confidence: float = 0.95,
) -> Interval:
    """The difference as a share of the statistic of b: 0.24 is 24% more than b.

    The interval allows for the uncertainty of b; there is none where b may be zero.

    Args:    as for `difference`; statistic, "mean", "median" or "iqm".
    Returns: the interval; its value is NaN where the statistic of b is not above zero.
    Source:  Fieller 1954, Some problems in interval estimation (J. R. Stat. Soc. B 16).
    """
    if statistic not in (known := ["mean", "median", "iqm"]):
        raise ValueError(f"statistic: expected one of {', '.join(known)}, got {statistic!r}")
    _check_confidence(confidence)
    sample = _sample((a, b), paired)
    _check(sample.groups, paired, statistic, DEFAULT)
    few = _few(sample, statistic, DEFAULT)
    first, second = (Sample((group,)) for group in sample.groups)
    kind = STATISTICS[statistic]
    if _empty(sample):
        return Interval(math.nan, None, None, None)
    (top,), (base,) = first.value(kind), second.value(kind)
    if not base > 0:
        return Interval(math.nan, None, None, None)
    ratio = float(top / base)
    if few:
        return Interval(ratio - 1, None, None, None)
    (var_a,), (var_b,) = (error(group, kind)[0] ** 2 for group in (first, second))
    covariance = (var_a + var_b - error(sample, kind)[0][0] ** 2) / 2 if paired else 0.0
    scaled = [task * abs(ratio) for task in sample.groups[1]]
    freedom = error(Sample((sample.groups[0], scaled), paired), kind)[1][0]
    square = special.stdtrit(freedom, (1 + confidence) / 2) ** 2
    # The ratios r for which top - r base is within its interval around zero lie between two roots.
    lead = base**2 - square * var_b
    middle, last = top * base - square * covariance, top**2 - square * var_a
    root = middle**2 - lead * last
    if not (lead > 0 and root > 0):
        return Interval(ratio - 1, None, None, None)
    low, high = ((middle + sign * math.sqrt(root)) / lead - 1 for sign in (-1, 1))
    return Interval(ratio - 1, float(low), float(high), DEFAULT)


def along(
    a: Tasks,
    b: Tasks | None = None,
    *,
    statistic: str = "mean",
    method: str = DEFAULT,
    paired: bool = False,
    confidence: float = 0.95,
    samples: int = 2_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and intervals at every point of curves: `single` or `difference` of many at once.

    Args:    a and b, for each task [T, S]; the others as for `difference`.
    Returns: values, lower and upper ends [T]; NaN where there is none.
    Raises:  ValueError, as `difference`.
    """
    groups = tuple(
        [np.asarray(task, dtype=np.float64) for task in group]
        for group in (a, b)
        if group is not None
    )
    _check(groups, paired, statistic, method)
    _check_confidence(confidence)
    there = np.concatenate([np.isfinite(task) for group in groups for task in group], axis=-1)
    value, low, high = np.full((3, len(there)), np.nan)
    how = {"confidence": confidence, "samples": samples, "seed": seed}
    patterns, which = np.unique(there, axis=0, return_inverse=True)
    for k in range(len(patterns)):  # points that lack the same seeds are computed together
        at = np.flatnonzero(which.reshape(-1) == k)
        sample = _sample(tuple([task[at] for task in group] for group in groups), paired)
        if not _empty(sample):
            value[at] = sample.value(STATISTICS[statistic])
            if not _few(sample, statistic, method):
                found = ends(sample, statistic=statistic, methods=[method], **how)
                low[at], high[at] = found[method]
    return value, low, high


def least_seeds(method: str = DEFAULT, *, statistic: str = "mean", tasks: int = 1) -> int:
    """The fewest seeds of each task with which a difference has an interval, and so a verdict.

    With so many seeds the measured coverage of the default method's intervals of a difference is at
    least 93%, averaged over the kinds of scores in docs/statistics.md. The other methods give an
    interval wherever they can compute one, since they have to be asked for.

    Args:    method, a key of `METHODS`; statistic, a key of `STATISTICS`; tasks, how many.
    Raises:  ValueError for unknown names.
    """
    _check_name("method", method, METHODS)
    _check_name("statistic", statistic, STATISTICS)
    if method != DEFAULT:
        return 2
    if statistic == "improvement":
        return {1: 10, 2: 4}.get(tasks, 3)
    # Of two seeds of each of two tasks the IQM averages two scores, which tell no spread.
    if statistic == "iqm" and tasks == 2:
        return 3
    # Intervals of two seeds of one task cover as they should if scores are as simulated, but no
    # test without such an assumption can find a difference there: its p is at least 1/3.
    return 3 if tasks == 1 else 2


def least_seeds_of_one_group(
    method: str = DEFAULT, *, statistic: str = "mean", tasks: int = 1
) -> int | None:
    """The fewest seeds of each task with which a score has an interval; see `ONE_GROUP`.

    A score needs more seeds than a difference, since the skewness of two groups mostly cancels.

    Args:    as for `least_seeds`, but for the statistic "improvement", which compares two groups.
    Returns: None where no number of seeds suffices.
    Raises:  ValueError for unknown names.
    """
    _check_name("method", method, METHODS)
    _check_name("statistic", statistic, ONE_GROUP)
    if method != DEFAULT:
        return 2
    return ONE_GROUP[statistic][max(count for count in ONE_GROUP[statistic] if count <= tasks)]


def smallest_gap(a: Tasks, b: Tasks, **how: object) -> float | None:
    """The smallest difference that could have been seen: half the width of its interval.

    Args:    as for `difference`.
    Returns: in the unit of the scores; None where there is no interval.
    """
    found = difference(a, b, **how)  # pyright: ignore[reportArgumentType]
    if found.low is None or found.high is None:
        return None
    return (found.high - found.low) / 2


def permutation_p(a: Tasks, b: Tasks, *, paired: bool = False, seed: int = 0) -> float | None:
    """p of a two-sided permutation test: how often chance alone gives a difference this large.

    The difference is that of the means over tasks. Within each task, seeds are dealt to the two
    groups in all possible ways; paired scores are swapped within their seed. Where there are more
    than `REGROUPINGS` ways, `DRAWN` of them are drawn at random. Three seeds against three of one
    task give no p below 0.1, and five pairs none below 0.0625.

    Args:    a and b, scores on the same tasks in the same order; paired, see `difference`; seed of
             the draws.
    Returns: a probability; None where a task has no finite score left in one of the groups.
    Raises:  ValueError, as `difference`.
    """
    sample = _sample((a, b), paired)
    _check(sample.groups, paired, "mean", DEFAULT)
    if _empty(sample):
        return None
    tasks = [(x[0], y[0]) for x, y in zip(*sample.groups, strict=True)]
    deals = _swaps if paired else _deals
    ways = math.prod(
        2 ** len(x) if paired else math.comb(len(x) + len(y), len(x)) for x, y in tasks
    )
    exact = ways <= REGROUPINGS
    rng = np.random.default_rng(seed)
    total: np.ndarray = np.zeros(1 if exact else DRAWN)
    for x, y in tasks:
        own = deals(x, y, rng) / len(tasks)
        if exact:
            total = np.add.outer(total, own).reshape(-1)
        else:
            drawn = len(own) == DRAWN  # already a sample of the ways
            total = total + (own if drawn else own[rng.integers(0, len(own), DRAWN)])
    seen = sum(x.mean() - y.mean() for x, y in tasks) / len(tasks)
    # Regroupings that are equal but for rounding count as equally large.
    slack = 1e-12 * max(float(np.abs(task).max()) for pair in tasks for task in pair)
    tails = [(total >= seen - slack).sum(), (total <= seen + slack).sum()]
    more = 0 if exact else 1  # the groups as they are belong to a sample of regroupings too
    return min(1.0, 2 * float(min(tails) + more) / (len(total) + more))


def _deals(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Differences of means after dealing the scores anew: in all ways, or `DRAWN` of them."""
    scores, n = np.concatenate([x, y]), len(x)
    if math.comb(len(scores), n) <= REGROUPINGS:
        first = scores[_choices(len(scores), n)].sum(-1)
    else:
        first = rng.permuted(np.tile(scores, (DRAWN, 1)), axis=-1)[:, :n].sum(-1)
    return first / n - (scores.sum() - first) / len(y)


def _swaps(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean differences after swapping the scores of some seeds: all ways, or `DRAWN` of them."""
    if 2 ** len(x) <= REGROUPINGS:
        signs = np.array([*itertools.product((1.0, -1.0), repeat=len(x))])
    else:
        signs = rng.choice((1.0, -1.0), (DRAWN, len(x)))
    return signs @ (x - y) / len(x)


@functools.lru_cache(maxsize=16)
def _choices(runs: int, chosen: int) -> np.ndarray:
    """All ways to choose some of several runs [ways, chosen]."""
    return np.array([*itertools.combinations(range(runs), chosen)])


def _interval(
    groups: Sequence[Tasks],
    paired: bool,
    *,
    statistic: str,
    method: str,
    confidence: float,
    samples: int,
    seed: int,
) -> Interval:
    """See `difference`."""
    sample = _sample(groups, paired)
    _check(sample.groups, paired, statistic, method)
    _check_confidence(confidence)
    if _empty(sample):
        return Interval(math.nan, None, None, None)
    value = float(sample.value(STATISTICS[statistic])[0])
    if _few(sample, statistic, method):
        return Interval(value, None, None, None)
    how = {"confidence": confidence, "samples": samples, "seed": seed}
    (low,), (high,) = ends(sample, statistic=statistic, methods=[method], **how)[method]
    if not (math.isfinite(low) and math.isfinite(high)):
        return Interval(value, None, None, None)
    return Interval(value, float(low), float(high), method)


def _sample(groups: Sequence[Tasks], paired: bool) -> Sample:
    """The finite scores [P, S] of groups whose arrays are [S] or [P, S].

    The P studies of a task lack the same scores.
    """
    whole = [[np.atleast_2d(np.asarray(task, dtype=np.float64)) for task in g] for g in groups]
    there = [[np.isfinite(task[0]) for task in group] for group in whole]
    if paired:
        _check(tuple(whole), paired, "mean", DEFAULT)
        both = [x & y for x, y in zip(*there, strict=True)]
        there = [both, both]
    kept = (
        [task[:, own] for task, own in zip(group, seeds, strict=True)]
        for group, seeds in zip(whole, there, strict=True)
    )
    return Sample(tuple(kept), paired)


def _empty(sample: Sample) -> bool:
    return any(task.shape[-1] == 0 for group in sample.groups for task in group)


def _few(sample: Sample, statistic: str, method: str) -> bool:
    tasks = len(sample.groups[0])
    fewest = min(task.shape[-1] for group in sample.groups for task in group)
    if len(sample.groups) == 1:
        needed = least_seeds_of_one_group(method, statistic=statistic, tasks=tasks)
        return needed is None or fewest < needed
    return fewest < least_seeds(method, statistic=statistic, tasks=tasks)


def _check_name(what: str, name: str, known: dict) -> None:
    if name not in known:
        hint = nearest(name, list(known))
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name!r}{hint}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a probability such as 0.95, got {confidence:g}")


def _check(groups: Sequence[Tasks], paired: bool, statistic: str, method: str) -> None:
    _check_name("statistic", statistic, STATISTICS)
    _check_name("method", method, METHODS)
    if len(groups) < STATISTICS[statistic].groups:
        raise ValueError(f"{statistic}: expected two groups of scores, got one")
    if not all(len(group) for group in groups):
        raise ValueError("scores: expected at least one task, got none")
    if len(groups) == 2 and len(groups[0]) != len(groups[1]):
        raise ValueError(
            "scores: expected two groups on the same tasks, got "
            f"{len(groups[0])} and {len(groups[1])} tasks"
        )
    if paired:
        for k, (x, y) in enumerate(zip(*groups, strict=True)):
            if np.shape(x)[-1] != np.shape(y)[-1]:
                raise ValueError(
                    f"scores of task {k}: expected equally many seeds in both groups, since they "
                    f"are paired, got {np.shape(x)[-1]} and {np.shape(y)[-1]}"
                )
