"""Aggregates over the tasks of a family: which settings, tasks and scores belong in one number.

A setting that was run on two tasks of a family or more has its interquartile mean, median, mean and
optimality gap over them (Agarwal et al. 2021, arXiv:2108.13264), on the scales of
`cerl/report/normalise.py`. All settings of a family are aggregated over the same tasks, and only if
they were run under one protocol: the same agent steps, evaluations and rules of the environments.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cerl.config.effects import RAMPED
from cerl.config.labels import exists, ordered, rank_of, value_of
from cerl.config.numbers import human
from cerl.report.curves import SCORES, Cell, final
from cerl.report.normalise import NORMALISATIONS, NoScale, by_default, known, scale_of
from cerl.text import few

STATISTICS = ("iqm", "median", "mean", "optimality_gap")  # functions of `statistics`

# Options that are the rules of the game and of its evaluation, and do not follow from the task.
PROTOCOL = (
    *("env.sticky", "env.ramping", "env.full_actions", "env.frame_skip", "env.repeat"),
    *("env.noop_max", "env.fire_reset", "env.life_loss", "env.pixels", "env.size"),
    *("env.observe.keep", "env.observe.indices", "env.observe.noise", "env.observe.dropout"),
    *("env.observe.flicker", "eval.episodes", "eval.steps", "eval.epsilon"),
)
STEPS = "agent steps"  # what notes call the last step at which all seeds have an evaluation


class Aggregate(NamedTuple):
    """One score of one setting over several tasks, on one scale."""

    family: str
    how: str  # the normalisation, a key of `normalise.NORMALISATIONS`
    score: str  # a key of `curves.SCORES`
    cells: list[Cell]  # the setting on each task
    tasks: list[np.ndarray]  # normalised final scores [S] of each task; NaN where none was recorded
    evaluations: int  # last evaluations of each seed that are averaged

    @property
    def env(self) -> str:
        """What the tasks are called together, such as "minatar (5 tasks)"."""
        return f"{self.family} ({len(self.cells)} {_word(self.family)})"

    @property
    def unit(self) -> str:
        """The normalisation in words, such as "human-normalised"."""
        return NORMALISATIONS[self.how].unit

    @property
    def step(self) -> int:
        """Agent steps of one seed at the last evaluation; the fewest of any task."""
        return min(int(cell.curves[self.score].steps[-1]) for cell in self.cells)


def over_tasks(
    found: Sequence[Cell], *, last: int = 1, how: str = "", mix: bool = False
) -> tuple[list[Aggregate], list[str]]:
    """Every score of every setting over the tasks of its family.

    A setting on a single task has no aggregate. The other settings of a family are aggregated over
    the tasks that all of them have, if these are two or more; else those with the most tasks are,
    and the others are left out.

    Args:    found, from `curves.cells`; last, how many of the last evaluations are averaged; how, a
             key of `normalise.NORMALISATIONS` ("": by family, see `normalise.by_default`); mix, to
             aggregate scores of different protocols nevertheless.
    Returns: aggregates by family, normalisation and setting, then by score; notes on what was left
             out, and why.
    Raises:  ConfigError if there is no such normalisation.
    """
    if how:
        known(how)
    out, notes = [], []
    for family in dict.fromkeys(_family(cell) for cell in found):
        own, said = _same_tasks([c for c in found if _family(c) == family and c.curves], family)
        notes += said
        if not own:
            continue
        cells = [cell for setting in own.values() for cell in setting]
        if differences := protocols(cells):
            notes.append(_mixture(differences, family, mix=mix))
            if not mix:
                continue
        named = (how,) if how else by_default(family)
        for name in named:
            # Relative to themselves, all single agents are equal.
            if name == "single" and all(cell.members == 1 for cell in cells):
                continue
            made, said = _scaled(own, found, name, last=last)
            out += made
            notes += said
    return out, notes


def _family(cell: Cell) -> str:
    return cell.env.partition("/")[0]


def _word(family: str) -> str:
    return "games" if family == "atari" else "tasks"


def _same_tasks(found: Sequence[Cell], family: str) -> tuple[dict[str, list[Cell]], list[str]]:
    """The settings of a family that are aggregated, on the same tasks.

    Returns: {label: cells}, none if no setting has two tasks; notes on what is left out.
    """
    settings: dict[str, list[Cell]] = {}
    for cell in found:
        settings.setdefault(cell.name, []).append(cell)
    several = {name: own for name, own in settings.items() if len(own) > 1}
    if not several:
        return {}, []
    notes = []
    tasks = {name: {cell.env for cell in own} for name, own in several.items()}
    common = set.intersection(*tasks.values())
    if len(common) < 2:
        most = max(tasks.values(), key=len)
        missing = [name for name, own in tasks.items() if not most <= own]
        notes.append(
            f"over {_word(family)} of {family}: fewer than two {_word(family)} are common to all "
            f"settings, so these are left out there: {few(missing, between=' / ')}"
        )
        several = {name: own for name, own in several.items() if name not in missing}
        common = most
    every = {env for own in several.values() for env in (cell.env for cell in own)}
    if lost := sorted(every - common):
        lacking = [name for name in several if tasks[name] != every]
        notes.append(
            f"over {_word(family)} of {family}: only the {len(common)} that all settings have are "
            f"aggregated, not {few(lost)} (missing in {few(lacking, between=' / ')})"
        )
    return {n: [c for c in own if c.env in common] for n, own in several.items()}, notes


def _scaled(
    settings: Mapping[str, Sequence[Cell]], found: Sequence[Cell], how: str, *, last: int
) -> tuple[list[Aggregate], list[str]]:
    """The aggregates of some settings of one family on one scale, and what has no scale.

    Args: settings, {label: cells}; found, all cells of the report.
    """
    out, reasons = [], {}
    for own in settings.values():
        for score in SCORES:
            have = [cell for cell in own if score in cell.curves]
            if len(have) < len(own):
                continue
            used = min(last, *(len(cell.curves[score].steps) for cell in have))
            try:
                scales = [scale_of(cell, score, found, how, last=used) for cell in have]
            except NoScale as reason:
                reasons.setdefault(str(reason), None)
                continue
            pairs = zip(scales, have, strict=True)
            tasks = [scale(final(cell.curves[score], last=used)) for scale, cell in pairs]
            out.append(Aggregate(_family(own[0]), how, score, [*have], tasks, used))
    notes = []
    if reasons:
        family = _family(next(iter(settings.values()))[0])
        notes.append(
            f"over {_word(family)} of {family}, {NORMALISATIONS[how].unit}: "
            f"{'some' if out else 'all'} scores are left out, because "
            f"{few([*reasons], between='; ')}"
        )
    return out, notes


def protocols(found: Sequence[Cell]) -> dict[str, dict[Any, list[str]]]:
    """What differs between the protocols under which some cells were run.

    An option that stands in the label of a setting differs on purpose and is not counted. Rows that
    do not say the options of their run only tell how many agent steps it had.

    Returns: for each thing that differs, `STEPS` or the dotted key of an option, the values and
             which settings have each: {what: {value: [label or "label on env"]}}.
    """
    values: dict[str, dict[Any, list[Cell]]] = {}
    for cell in found:
        for what, value in _protocol(cell):
            code = tuple(value) if isinstance(value, list) else value
            values.setdefault(what, {}).setdefault(code, []).append(cell)
    out = {}
    for what in [STEPS, *ordered(set(values) - {STEPS})]:
        if len(values.get(what, {})) > 1:
            each = values[what]
            out[what] = {value: _who(each[value], each) for value in sorted(each, key=rank_of)}
    return out


def _protocol(cell: Cell) -> Iterator[tuple[str, Any]]:
    """The protocol of a cell, as far as its rows tell: what, and its value."""
    if cell.curves:
        yield STEPS, max(int(curve.steps[-1]) for curve in cell.curves.values())
    if cell.options is None:
        return
    for key in PROTOCOL:
        # Games that do not ramp never read the option, so it says nothing of their protocol.
        unread = key == "env.ramping" and cell.options.get("env.name", "breakout") not in RAMPED
        if key not in cell.label.options and not unread and exists(cell.options, key):
            yield key, value_of(cell.options, key)


def _who(own: Sequence[Cell], values: Mapping[Any, Sequence[Cell]]) -> list[str]:
    """The settings that have one value; with the environment if they have others elsewhere."""
    count: dict[str, int] = {}
    for cells in values.values():
        for name in {cell.name for cell in cells}:
            count[name] = count.get(name, 0) + 1
    names = (c.name if count[c.name] == 1 else f"{c.name} on {c.env}" for c in own)
    return [*dict.fromkeys(names)]


def _mixture(
    differences: Mapping[str, Mapping[Any, Sequence[str]]], family: str, *, mix: bool
) -> str:
    """A note on scores of different protocols. Args: differences, from `protocols`."""
    said = [
        f"{what}: "
        + "; ".join(f"{_value(v)} ({few(who, most=2, between=' / ')})" for v, who in own.items())
        for what, own in differences.items()
    ]
    where = f"over {_word(family)} of {family}"
    if mix:
        return f"{where}: these scores mix protocols, as asked. {'. '.join(said)}"
    until = ""
    if STEPS in differences:
        until = f"; --until {min(differences[STEPS]):_} compares all at an equal step"
    return (
        f"{where}: no aggregates, because the runs had different protocols. {'. '.join(said)} "
        f"(--mix aggregates them nevertheless{until})"
    )


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else human(value)
