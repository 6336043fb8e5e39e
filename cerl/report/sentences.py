"""A verdict: its numbers on each task and over tasks, and how they are told in sentences.

`cerl/report/verdicts.py` finds the verdicts of a report.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console

from cerl.report import intervals
from cerl.report.estimate import number
from cerl.report.intervals import Interval
from cerl.text import few, visible

DETAILS = 4  # a sentence tells the numbers of each task up to this many tasks, else their names
MOST = 3  # a summary tells each verdict of a kind up to this many, else only counts
# What the tasks of a family are called; those of all others are called tasks.
NOUNS = {"atari": "game", "minatar": "game", "mujoco": "robot"}
AGGREGATES = {"vote": "the vote of", "mean": "the mean of", "mean_mode": "the mean of modes of"}
# What the kinds of verdicts are called.
TITLES = {
    "curse": "curse gap",
    "gain": "CERL's gain",
    "left": "CERL's gap to the single agent",
    "variant": "gap of variants to the ensemble",
    "variant_left": "gap of variants to the single agent",
    "aggregation": "aggregation's gain",
    "tandem": "active minus passive",
}
# Both sides of a kind of verdict, where a summary counts those of many settings.
ALL_SIDES = {
    "curse": ("members of ensembles", "single agents"),
    "gain": ("members of CERL", "members of ensembles"),
    "left": ("members of CERL", "single agents"),
    "variant": ("members of variants", "members of ensembles"),
    "variant_left": ("members of variants", "single agents"),
    "aggregation": ("aggregates", "their own members"),
    "tandem": ("active members", "passive ones"),
}


class Line(NamedTuple):
    """The comparison on one task, or over several."""

    envs: tuple[str, ...]  # family/name of each task
    unit: str  # return; over tasks the name of the normalisation
    statistic: str  # mean or iqm
    first: int  # agent steps of one seed at the first evaluation that is used
    step: int  # and at the last
    ends: tuple[int, int]  # last evaluation of the setting and of the baseline
    seeds: tuple[int, int]  # seeds of both; over tasks the fewest of any task
    score: float  # of the setting, in the unit
    baseline: float
    difference: Interval  # in the unit
    relative: Interval  # difference / baseline; NaN where the baseline is not above 0
    normalised: Interval  # difference of normalised scores
    normalisation: str  # its name
    improvement: Interval  # probability that a seed scores more than one of the baseline
    p: float | None  # of the permutation test

    @property
    def gap(self) -> float | None:
        """The smallest difference that could have been seen, in the unit; None: no interval."""
        low, high = self.difference.low, self.difference.high
        return None if low is None or high is None else (high - low) / 2

    @property
    def outcome(self) -> str:
        """ "more", "less", "undecided", or "none" where there is no interval."""
        if self.difference.low is None:
            return "none"
        return ("undecided", "more", "less")[self.difference.sign]


class Verdict(NamedTuple):
    """One comparison of two settings, or of two scores of one setting, on all of their tasks."""

    kind: str  # a key of KINDS
    when: str  # one of ENDS
    family: str  # of the tasks
    setting: str  # label
    baseline: str  # label; that of the setting itself where its own scores are compared
    score: str  # a key of curves.SCORES
    baseline_score: str
    tasks: tuple[Line, ...]  # in alphabetical order of the environments
    over: tuple[Line, ...]  # over tasks, at the last step that all share; none for a single task
    paired: bool  # by seed
    assumed: bool  # options are assumed from presets, see roles.Pair
    confidence: float  # a probability
    method: str  # of the intervals, a key of methods.METHODS
    members: int  # N of the setting

    @property
    def overall(self) -> Line | None:
        """The comparison over tasks that `words` tells; None for a single task."""
        return self.over[0] if self.over else None

    def count(self, outcome: str) -> int:
        """The number of tasks with an outcome, see `Line.outcome`."""
        return sum(line.outcome == outcome for line in self.tasks)

    def words(self) -> str:
        """The verdict as a plain sentence."""
        return words(self)


def words(verdict: Verdict) -> str:
    """A verdict as one plain sentence, with a clause for each outcome."""
    one, other = _sides(verdict)
    lines = {name: [x for x in verdict.tasks if x.outcome == name] for name in OUTCOMES}
    clauses = []
    for outcome, own in lines.items():
        if not own:
            continue
        if len(verdict.tasks) <= DETAILS:
            told = "; ".join(_detail(verdict, line) for line in own)
        else:
            told = few([_title(line.envs[0]) for line in own])
        one_only = verdict.kind in ("aggregation", "tandem") or verdict.members == 1
        verb = "returns" if one_only else "return"
        first, later = OUTCOMES[outcome]
        share = f"{len(own)} of {_count(verdict, len(verdict.tasks))}"
        clause = later if clauses else first
        clause = clause.format(one=one, other=other, verb=verb, on=len(own) if clauses else share)
        clauses.append(f"{clause} ({told})")
    if verdict.overall is not None:
        count = _count(verdict, len(verdict.overall.envs))
        clauses.append(f"over all {count} {_over(verdict, verdict.overall)}")
    text = "; ".join(clauses)
    when = _when(verdict)
    return f"{when}, {text}." if when else f"{text[0].upper()}{text[1:]}."


# The clause of each outcome, at the start of a sentence and after another clause.
OUTCOMES = {
    "less": ("{one} {verb} less than {other} on {on}", "less on {on}"),
    "more": ("{one} {verb} more than {other} on {on}", "more on {on}"),
    "undecided": (
        "{one} and {other} cannot be told apart on {on}",
        "the two cannot be told apart on {on}",
    ),
    "none": ("there is no verdict on {one} and {other} on {on}", "no verdict on {on}"),
}


def _sides(verdict: Verdict) -> tuple[str, str]:
    """What a sentence calls the score that is judged, and what it is compared with."""
    setting, baseline = verdict.setting, verdict.baseline
    variant = setting if verdict.members == 1 else f"members of {setting}"
    return {
        "curse": (f"members of {setting}", f"the single agent {baseline}"),
        "gain": (f"members of {setting}", f"members of the ensemble {baseline}"),
        "left": (f"members of {setting}", f"the single agent {baseline}"),
        "variant": (variant, f"members of the ensemble {baseline}"),
        "variant_left": (variant, f"the single agent {baseline}"),
        "aggregation": (
            f"{AGGREGATES.get(verdict.score, 'the aggregate of')} {setting}",
            "its own members",
        ),
        "tandem": (f"the active member of {setting}", "the passive one"),
    }[verdict.kind]


def _when(verdict: Verdict) -> str:
    """The steps of a verdict as the start of a sentence; "" where they differ between tasks."""
    steps = {(line.first, line.step) for line in verdict.tasks}
    if len(steps) > 1:
        return ""
    [line] = [*verdict.tasks][:1]
    return _steps(verdict, line, cut=any(x.step < max(x.ends) for x in verdict.tasks))


def _steps(verdict: Verdict, line: Line, *, cut: bool) -> str:
    if verdict.when == "area":
        return f"On average from {line.first:,} to {line.step:,} agent steps"
    # A step that was asked for needs no reason.
    why = ", the last that both have" if cut and verdict.when == "end" else ""
    return f"At {line.step:,} agent steps{why}"


def _detail(verdict: Verdict, line: Line) -> str:
    """The numbers of one task, e.g. "Hopper-v4: -771 [-1,304, -238], -28%; p = 0.016; ..."."""
    parts = []
    if not _when(verdict):
        parts.append(_steps(verdict, line, cut=line.step < max(line.ends)).replace("At", "at", 1))
    if line.outcome == "none":
        parts.append(_why_none(verdict, line))
    else:
        parts.append(_signed(line.difference.value, line.difference.low, line.difference.high))
        if line.relative.low is not None:  # the baseline is surely not zero
            parts[-1] += f", {_percent(line.relative.value)}"
        if line.outcome == "undecided" and line.gap is not None:
            parts.append(f"a gap of {number(line.gap)} or more would have been seen")
    if line.p is not None and line.outcome != "none":
        parts.append(_p(line.p, verdict, line))
    if line.outcome != "none":
        parts.append(_seeds(verdict, line))
    return f"{_title(line.envs[0])}: {'; '.join(parts)}"


def _over(verdict: Verdict, line: Line) -> str:
    """The numbers over all tasks, e.g. "IQM +24% [+12, +35] of the single agent's score"."""
    name = {"iqm": "IQM", "mean": "mean"}[line.statistic]
    values = line.difference.value, line.difference.low, line.difference.high
    if line.unit == "single-agent-normalised":
        text = _percent(values[0])
        if line.difference.low is not None and line.difference.high is not None:
            text += f" [{100 * line.difference.low:+.0f}, {100 * line.difference.high:+.0f}]"
        text += " of the single agent's score"
    else:
        text = f"{_signed(*values)}, {line.unit}"
    if line.outcome == "none":
        text += f", without a verdict ({_why_none(verdict, line)})"
    elif line.outcome == "undecided":
        text += ", which may be chance"
    if line.p is not None and line.outcome != "none":
        text += f"; {_p(line.p, verdict, line)}"
    if line.step not in {own.step for own in verdict.tasks}:
        text += f"; at {line.step:,} agent steps, the last that all have"
    return f"{name} {text}"


def _why_none(verdict: Verdict, line: Line) -> str:
    """Why there is no interval."""
    fewest, tasks = min(line.seeds), len(line.envs)
    needed = intervals.least_seeds(verdict.method, statistic=line.statistic, tasks=tasks)
    if fewest < needed:
        found = f"{fewest} seed{'s' if fewest != 1 else ''}" if fewest else "no finite score"
        return f"{found}, at least {needed} seeds needed"
    if line.score == line.baseline:
        return "all seeds have the same score"
    return "the scores do not allow an interval"


def _p(p: float, verdict: Verdict, line: Line) -> str:
    """p of the permutation test; says where it cannot be smaller with so few seeds."""
    p += 1e-9  # halves, such as 0.0625, are rounded up
    text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    if len(line.envs) > 1:
        return text
    one, other = line.seeds
    ways = 2**one if verdict.paired else math.comb(one + other, one)
    if p > 0.05 and 2 / ways > 0.05 and p < 2.01 / ways:
        text += ", the least that so few seeds can give"
    return text


def _seeds(verdict: Verdict, line: Line) -> str:
    one, other = line.seeds
    return f"{one} seeds" if verdict.paired else f"{one} and {other} seeds"


def _percent(share: float) -> str:
    """A share as a signed percentage without decimals."""
    whole = round(100 * share)
    return f"{whole:+,}%" if whole else "0%"


def _signed(value: float, low: float | None, high: float | None) -> str:
    """A difference with its interval, with equally many decimals: "-11.6 [-16.4, -7.9]"."""
    size = max(abs(x) for x in (value, low, high) if x is not None)
    text = number(value, size=size)
    text = text if text.startswith("-") or value == 0 else f"+{text}"
    if low is None or high is None:
        return text
    return f"{text} [{number(low, size=size)}, {number(high, size=size)}]"


def _title(env: str) -> str:
    """The name of a task: "Space Invaders" for minatar/space_invaders, others as they are."""
    name = env.partition("/")[2] or env
    return name.replace("_", " ").title() if name.islower() else name


def _count(verdict: Verdict, count: int) -> str:
    """A number of tasks with their noun: "3 robots"."""
    noun = NOUNS.get(verdict.family, "task")
    return f"{count} {noun}{'s' if count != 1 else ''}"


def summary(found: Iterable[Verdict]) -> list[str]:
    """The verdicts at the end of training for the top of a report.

    Where a kind has few verdicts each is one sentence. Where it has many, as in a grid, one
    sentence counts their outcomes on all tasks. Sentences that tell a difference come before those
    in which nothing can be told apart.
    """
    kinds: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in found:
        if verdict.when == "end":
            kinds.setdefault((verdict.kind, verdict.family), []).append(verdict)
    decided, others = [], []
    for (kind, _), own in kinds.items():
        if len(own) <= MOST:
            for verdict in own:
                place = decided if _decides(verdict) else others
                place.append(f"{title_of(verdict)}: {words(verdict)}")
        else:
            place = decided if any(map(_decides, own)) else others
            place.append(f"{_capital(TITLES[kind])}: {_counted(own)}")
    return decided + others


def _decides(verdict: Verdict) -> bool:
    """Whether a verdict tells a difference, on a task or over tasks."""
    return any(line.outcome in ("less", "more") for line in (*verdict.tasks, *verdict.over[:1]))


def title_of(verdict: Verdict) -> str:
    """What one verdict is about, such as "Curse gap", or "Gap of NAME to the ensemble"."""
    told = TITLES[verdict.kind]
    if verdict.kind in ("variant", "variant_left"):
        told = told.replace("variants", verdict.setting)
    return _capital(told)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _counted(own: Sequence[Verdict]) -> str:
    """A sentence that counts the outcomes of many verdicts of one kind on tasks of one family."""
    one, other = ALL_SIDES[own[0].kind]
    counts = {name: sum(verdict.count(name) for verdict in own) for name in OUTCOMES}
    most, least = sorted(("less", "more"), key=lambda name: -counts[name])
    lines = [line for verdict in own for line in verdict.tasks]
    tasks = len({env for line in lines for env in line.envs})
    told = [line.relative for line in lines if line.outcome == most]
    sizes = sorted(abs(share.value) for share in told)
    by = ""
    if sizes and all(share.low is not None for share in told):
        by = f" by {100 * sizes[0]:.0f}% to {100 * sizes[-1]:.0f}%"
    text = (
        f"{one[0].upper()}{one[1:]} return {most} than {other}{by} in {counts[most]} of "
        f"{len(lines)} comparisons ({len(own)} settings, {_count(own[0], tasks)}) and {least} in "
        f"{counts[least] or 'none'}; in {counts['undecided']} the two cannot be told apart"
    )
    if counts["none"]:
        text += f", and in {counts['none']} there is no verdict"
    return text + "."


def caption(found: Sequence[Verdict]) -> str:
    """What the numbers of verdicts are, in a few sentences. Args: found, at least one verdict."""
    first = found[0]
    return (
        f"Differences of mean returns with {100 * first.confidence:g}% intervals over seeds "
        f"(method {first.method}), and p of permutation tests. A verdict reads the interval of the "
        "difference. Neither is corrected for the number of comparisons."
    )


def markdown(found: Sequence[Verdict]) -> str:
    """The summary and what its numbers are, as Markdown; "" if there are no verdicts."""
    listed = "".join(f"- {visible(text)}\n" for text in summary(found))
    return f"Verdicts:\n\n{listed}\n{caption(found)}\n\n" if listed else ""


def printed(found: Sequence[Verdict], console: Console) -> None:
    """Prints the summary and what its numbers are, unless there are no verdicts."""
    if told := summary(found):
        console.print("Verdicts")
        for text in told:
            console.print(f"- {text}", markup=False)
        console.print(f"{caption(found)}\n", markup=False)
