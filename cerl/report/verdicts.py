"""Verdicts: whether members are worse than a single agent, whether CERL mends it, and how sure.

A verdict compares two groups of scores on the same tasks. It reads the interval of their difference
(`cerl/report/intervals.py`), never whether two intervals overlap: "more" or "less" if the whole
interval is on one side of zero. Otherwise the two cannot be told apart, and the verdict says how
small a gap could have been seen. Which settings are compared follows from their options
(`cerl/report/roles.py`); docs/verdicts.md explains every number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cerl.report import intervals, normalise, roles, statistics
from cerl.report.curves import Cell, Curve
from cerl.report.intervals import DEFAULT, Interval
from cerl.report.roles import Role
from cerl.report.sentences import Line, Verdict

FOR_IQM = 5  # over fewer tasks the mean is told, since IQM may leave out all seeds of a task
ENDS = ("end", "step", "area")  # what a score is: see `verdicts`

Scores = tuple[tuple[str, str], ...]  # keys of curves.SCORES of both sides; the first found counts


class Kind(NamedTuple):
    """What a verdict is about: a score of settings of one role less a score of their baseline."""

    roles: tuple[Role, ...]  # of the setting
    baseline: Role | None  # None: two scores of the same runs, paired by seed
    scores: tuple[Scores, ...]  # each makes a verdict of its own


# A member is judged by the mean over all members, or by the member that is drawn for each episode.
MEMBER = ("individual", "random")
MEMBERS = (*((a, b) for a in MEMBER for b in MEMBER), ("individual_mode", "individual_mode"))
VOTES = tuple(tuple((name, member) for member in MEMBER) for name in ("vote", "mean"))
MODES = (("mean_mode", "individual_mode"),)
TANDEM = (("active", "passive"), ("active_mode", "passive_mode"))
SEVERAL = ("ensemble", "cerl", "other")

KINDS = {
    "curse": Kind(("ensemble",), "single", (MEMBERS,)),
    "gain": Kind(("cerl",), "ensemble", (MEMBERS,)),
    "left": Kind(("cerl",), "single", (MEMBERS,)),
    "variant": Kind(("other",), "ensemble", (MEMBERS,)),
    "variant_left": Kind(("other",), "single", (MEMBERS,)),
    "aggregation": Kind(SEVERAL, None, (*VOTES, MODES)),
    "tandem": Kind(("tandem",), None, (TANDEM,)),
}


class _Match(NamedTuple):
    """Two curves of one task that a verdict compares."""

    env: str
    curve: Curve
    baseline: Curve


class _Scales(NamedTuple):
    """The normalisation of a verdict: its unit, and a scale for each task."""

    unit: str
    each: Mapping[str, normalise.Scale]  # by env


def verdicts(
    found: Sequence[Cell],
    *,
    last: int = 1,
    at: int | None = None,
    how: str = "",
    method: str = DEFAULT,
    confidence: float = 0.95,
) -> list[Verdict]:
    """All verdicts that the settings of a report allow.

    Each is given for the score at the end (mean over the `last` evaluations up to the last step
    that both sides have), for the score at a step if one is asked for, and for the area under the
    curve (mean return over the agent steps between the first and the last evaluation).

    Args:    found, from `curves.cells`; last, evaluations averaged; at, agent steps of one seed;
             how, a key of normalise.NORMALISATIONS ("": by the family of the tasks); method, a key
             of methods.METHODS, and confidence, a probability, of the intervals.
    Returns: verdicts by kind in the order of KINDS, then by setting in the order of `found`.
    Raises:  ValueError for last < 1, or an unknown method.
    """
    if last < 1:
        raise ValueError(f"last: expected at least 1 evaluation, got {last}")
    intervals.least_seeds(method)
    ways: dict = {"last": last, "at": at, "method": method, "confidence": confidence}
    out = []
    for kind, asked in KINDS.items():
        paired = asked.baseline is None
        # Matches of the same two settings on several tasks of one family make one verdict.
        groups: dict[tuple[str, str, str, str, str], list[tuple[Cell, Cell, bool]]] = {}
        for cell, baseline, assumed in _pairs(found, asked):
            for one, other in _scores(cell, baseline, asked):
                family = cell.env.partition("/")[0]
                names = family, cell.name, baseline.name, one, other
                groups.setdefault(names, []).append((cell, baseline, assumed))
        for names, own in groups.items():
            one, other = names[-2:]
            scales = _scales([baseline for _, baseline, _ in own], other, found, how, last)
            matches = [_Match(a.env, a.curves[one], b.curves[other]) for a, b, _ in own]
            for when in ENDS if at is not None else ("end", "area"):
                lines, over = _lines(matches, when, scales=scales, paired=paired, **ways)
                if lines:
                    assumed = any(marked for _, _, marked in own)
                    members = own[0][0].members
                    how_found = (lines, over, paired, assumed, confidence, method, members)
                    out.append(Verdict(kind, when, *names, *how_found))
    return out


def _lines(
    matches: Sequence[_Match], when: str, **how: Any
) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The comparison on each task where that is possible, and those over the tasks."""
    each = [(match, _line([match], when, **how)) for match in matches]
    there = [match for match, line in each if line is not None]
    over = []
    if len(there) > 1:
        names = ("mean", "iqm") if len(there) < FOR_IQM else ("iqm", "mean")
        first = _line(there, when, statistic=names[0], **how)
        # p is that of the means over tasks, whichever statistic is told.
        p = None if first is None else first.p
        over = [first, _line(there, when, statistic=names[1], p=p, **how)]
    return tuple(x for _, x in each if x is not None), tuple(x for x in over if x is not None)


def _scales(
    baselines: Sequence[Cell], score: str, found: Sequence[Cell], how: str, last: int
) -> _Scales | None:
    """The normalisation that is asked for, or the first one of the family that has a scale for
    every task; None if there is none.

    Args: baselines, the baseline of each task; score, that of the baseline.
    """
    family = baselines[0].env.partition("/")[0]
    for name in [how] if how else normalise.by_default(family):
        try:
            each = {
                cell.env: normalise.scale_of(cell, score, found, name, last=last)
                for cell in baselines
            }
        except normalise.NoScale:
            continue
        return _Scales(normalise.NORMALISATIONS[name].unit, each)
    return None


def _pairs(found: Sequence[Cell], kind: Kind) -> list[tuple[Cell, Cell, bool]]:
    """The settings that a kind of verdict compares, and whether their options are assumed."""
    out: list[tuple[Cell, Cell, bool]] = []
    if kind.baseline is not None:
        for role in kind.roles:
            out += roles.pairs(found, role, kind.baseline)[0]
        return out
    for cell in found:
        own = roles.known(cell)
        # Rows say themselves which score is a vote, and which member is passive.
        if own is None or own.role in kind.roles:
            out.append((cell, cell, False))
    return out


def _scores(cell: Cell, baseline: Cell, kind: Kind) -> list[tuple[str, str]]:
    """The pairs of scores to compare."""
    there = (
        [(a, b) for a, b in each if a in cell.curves and b in baseline.curves]
        for each in kind.scores
    )
    return [pairs[0] for pairs in there if pairs]


def _weights(
    when: str, steps: np.ndarray, *, last: int, at: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The evaluations that a score averages, and their weights, which sum to 1.

    Args:    when, one of ENDS; steps [T], those that may be used.
    Returns: steps [U] and weights [U]; none where no step is early enough.
    """
    if when == "area":  # trapezoids between evaluations
        if len(steps) < 2:
            return steps, np.ones(len(steps))
        half = np.diff(steps) / (2 * (steps[-1] - steps[0]))
        return steps, np.append(half, 0.0) + np.append(0.0, half)
    if when == "step":
        steps = steps[steps <= at]
    steps = steps[-last:]
    return steps, np.full(len(steps), 1 / max(len(steps), 1))


def _line(
    matches: Sequence[_Match],
    when: str,
    *,
    statistic: str = "mean",
    p: float | None = None,
    last: int,
    at: int | None,
    scales: _Scales | None,
    paired: bool,
    method: str,
    confidence: float,
) -> Line | None:
    """The comparison on one task, or over several at steps that all of them share.

    Args:    statistic, mean or iqm; p of the permutation test if it is known already; others as for
             `verdicts`.
    Returns: None where no step is shared, and where several tasks have no common normalisation.
    """
    several = len(matches) > 1
    if several and scales is None:
        return None
    steps = matches[0].curve.steps
    for match in matches:
        steps = np.intersect1d(np.intersect1d(steps, match.curve.steps), match.baseline.steps)
    used, weights = _weights(when, steps, last=last, at=at)
    if not used.size:
        return None

    def scores(curve: Curve) -> np.ndarray:
        return weights @ curve.returns[np.isin(curve.steps, used)]  # [S]

    raw = [[scores(m.curve) for m in matches], [scores(m.baseline) for m in matches]]
    scaled = raw
    if scales is not None:
        envs = [match.env for match in matches]
        scaled = [
            [scales.each[env](values) for env, values in zip(envs, group, strict=True)]
            for group in raw
        ]
    own = scaled if several else raw
    finite = [[task[np.isfinite(task)] for task in group] for group in own]
    how: dict = {"paired": paired, "confidence": confidence}
    difference = intervals.difference(*own, statistic=statistic, method=method, **how)
    normalised = difference
    if scales is not None and not several:
        scale = scales.each[matches[0].env]
        normalised = _scaled(difference, scale.one - scale.zero)
    return Line(
        envs=tuple(match.env for match in matches),
        unit=scales.unit if several and scales is not None else "return",
        statistic=statistic,
        first=int(used[0]),
        step=int(used[-1]),
        ends=(
            min(int(match.curve.steps[-1]) for match in matches),
            min(int(match.baseline.steps[-1]) for match in matches),
        ),
        seeds=(min(map(len, finite[0])), min(map(len, finite[1]))),
        score=_value(statistic, finite[0]),
        baseline=_value(statistic, finite[1]),
        difference=difference,
        relative=intervals.relative(*own, statistic=statistic, **how),
        normalised=normalised,
        normalisation=scales.unit if scales is not None else "",
        improvement=_share(
            intervals.difference(*own, statistic="improvement", method=method, **how)
        ),
        p=intervals.permutation_p(*own, paired=paired) if p is None else p,
    )


def _scaled(found: Interval, unit: float) -> Interval:
    """A difference of returns as one of normalised scores. Args: unit, the return that is 1."""
    ends = [None if x is None else x / unit for x in (found.low, found.high)]
    low, high = ends if unit > 0 else ends[::-1]
    return found._replace(value=found.value / unit, low=low, high=high)


def _share(found: Interval) -> Interval:
    """The interval of a probability, without what is below 0 or above 1."""
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))


def _value(statistic: str, tasks: Sequence[np.ndarray]) -> float:
    """A statistic of finite scores; NaN where a task has none."""
    return float(getattr(statistics, statistic)(tasks)) if min(map(len, tasks)) else math.nan


TABLE = pa.schema(
    [
        ("kind", pa.string()),  # a key of KINDS
        ("when", pa.string()),  # end, step, area
        ("setting", pa.string()),  # label
        ("score", pa.string()),  # a key of curves.SCORES
        ("baseline", pa.string()),  # label
        ("baseline_score", pa.string()),
        ("env", pa.string()),  # family/name, or "FAMILY (n tasks)"
        ("unit", pa.string()),  # return; over tasks the normalisation
        ("statistic", pa.string()),  # mean or iqm, of seeds
        ("first_step", pa.int64()),  # agent steps of one seed at the first evaluation used
        ("step", pa.int64()),  # and at the last
        ("seeds", pa.int64()),  # of the setting; over tasks the fewest of any task
        ("baseline_seeds", pa.int64()),
        ("paired", pa.bool_()),  # two scores of the same seeds
        ("value", pa.float64()),  # of the setting, in the unit
        ("baseline_value", pa.float64()),
        *((f"difference{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((f"relative{end}", pa.float64()) for end in ("", "_low", "_high")),
        ("normalisation", pa.string()),
        *((f"normalised{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((f"improvement{end}", pa.float64()) for end in ("", "_low", "_high")),
        ("p", pa.float64()),  # permutation test of the difference of means
        ("smallest_gap", pa.float64()),  # that could have been seen, in the unit
        ("outcome", pa.string()),  # more, less, undecided, none
        ("method", pa.string()),  # of the intervals; null where there is none
        ("confidence", pa.float64()),
        ("assumed", pa.bool_()),  # options are assumed from presets of that name
    ]
)


def table(found: Sequence[Verdict]) -> pa.Table:
    """Verdicts as a table with the columns of `TABLE`: a row for each task, then one over tasks."""
    rows = [_row(verdict, line) for verdict in found for line in (*verdict.tasks, *verdict.over)]
    return pa.Table.from_pylist(rows, schema=TABLE)


def _row(verdict: Verdict, line: Line) -> dict:
    count = len(line.envs)
    row = {
        **{name: getattr(verdict, name) for name in TABLE.names if name in Verdict._fields},
        **{name: getattr(line, name) for name in TABLE.names if name in Line._fields},
        "env": line.envs[0] if count == 1 else f"{verdict.family} ({count} tasks)",
        "first_step": line.first,
        "seeds": line.seeds[0],
        "baseline_seeds": line.seeds[1],
        "value": line.score,
        "baseline_value": line.baseline,
        "score": verdict.score,
        "baseline": verdict.baseline,
        "method": line.difference.method,
        "smallest_gap": line.gap,
        "outcome": line.outcome,
    }
    for name in ("difference", "relative", "normalised", "improvement"):
        found: Interval = getattr(line, name)
        value = found.value if math.isfinite(found.value) else None
        row |= {name: value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row
