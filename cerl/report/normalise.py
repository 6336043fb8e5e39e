"""Puts returns of different tasks on one scale, so that they can be averaged over tasks.

Every normalisation is a line through two returns of a task: one becomes 0, the other 1. The two are
taken as known numbers, so intervals of normalised scores do not include the uncertainty of a scale
that was estimated from the same runs (`single` and `minmax`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cerl.config import ConfigError, errors
from cerl.config.labels import differing, exists, value_of
from cerl.report import statistics
from cerl.report.curves import Cell, final
from cerl.text import few


class NoScale(ValueError):
    """A task has no scale under a normalisation; the message says why."""


class Scale(NamedTuple):
    """The line that normalises the returns of one task."""

    zero: float  # the return that becomes 0
    one: float  # the return that becomes 1

    def __call__(self, returns: np.ndarray) -> np.ndarray:
        """Normalised scores of returns [...], as float64."""
        return (np.asarray(returns, dtype=np.float64) - self.zero) / (self.one - self.zero)


def _human(cell: Cell, score: str, found: Sequence[Cell], last: int) -> Scale:
    family, _, game = cell.env.partition("/")
    known = statistics.human_random()
    if family != "atari" or game not in known:
        raise NoScale(f"{cell.env} has no reference returns of a human player")
    return Scale(*known[game])


def _single(cell: Cell, score: str, found: Sequence[Cell], last: int) -> Scale:
    own = single_agent(cell, found)
    which = "individual_mode" if score.endswith("_mode") else "individual"
    if which not in own.curves:
        raise NoScale(f"{own.name} on {cell.env} has no score {which}")
    values = final(own.curves[which], last=last)
    values = values[np.isfinite(values)]
    if not values.size or values.mean() <= 0:
        got = f"{values.mean():g}" if values.size else "no finite return"
        raise NoScale(f"the mean return of {own.name} on {cell.env} is not above 0 ({got})")
    return Scale(0.0, float(values.mean()))


def _minmax(cell: Cell, score: str, found: Sequence[Cell], last: int) -> Scale:
    each = [
        final(curve, last=last)
        for other in found
        if other.env == cell.env
        for curve in other.curves.values()
    ]
    values = np.concatenate(each)
    values = values[np.isfinite(values)]
    if not values.size or values.min() == values.max():
        raise NoScale(f"all seeds on {cell.env} have the same return, or none that is finite")
    return Scale(float(values.min()), float(values.max()))


def _thousand(cell: Cell, score: str, found: Sequence[Cell], last: int) -> Scale:
    return Scale(0.0, 1000.0)


def _none(cell: Cell, score: str, found: Sequence[Cell], last: int) -> Scale:
    return Scale(0.0, 1.0)


class Normalisation(NamedTuple):
    """What a normalisation is called, and how the scale of a task follows."""

    unit: str  # as in the column `unit` of a summary
    meaning: str  # what 0 and 1 are, as a clause
    scale: Callable[[Cell, str, Sequence[Cell], int], Scale]  # see `scale_of`


NORMALISATIONS = {
    "human": Normalisation(
        "human-normalised", "0 is a uniformly random policy and 1 a human player", _human
    ),
    "single": Normalisation(
        "single-agent-normalised",
        "0 is a return of 0 and 1 the mean return of the single agent with equal other options",
        _single,
    ),
    "minmax": Normalisation(
        "min-max-normalised",
        "0 is the lowest and 1 the highest final score of any seed of this report on the task",
        _minmax,
    ),
    "thousand": Normalisation(
        "return/1000", "1 is a return of 1000, the highest in dm_control", _thousand
    ),
    "none": Normalisation("unnormalised", "returns are as they are", _none),
}

_BY_FAMILY = {
    "atari": ("human",),
    "dmc": ("thousand",),
    # Returns of these tasks are designed to be between -1 and 1.
    "popgym": ("none",),
    "memory": ("none",),
}
_ELSE = ("single", "minmax")  # families whose returns have no common scale


def by_default(family: str) -> tuple[str, ...]:
    """The normalisations that a report uses for a family of environments: keys of
    `NORMALISATIONS`."""
    return _BY_FAMILY.get(family, _ELSE)


def known(name: str, *, command: str = "report") -> str:
    """The name itself. Raises: ConfigError of a command if there is no such normalisation."""
    if name not in NORMALISATIONS:
        raise ConfigError(
            f"{command} --normalise: no normalisation {name!r}"
            f"{errors.nearest(name, [*NORMALISATIONS])}; expected one of "
            f"{', '.join(NORMALISATIONS)}"
        )
    return name


def scale_of(cell: Cell, score: str, found: Sequence[Cell], how: str, *, last: int = 1) -> Scale:
    """The scale of one score of one setting on one task.

    Args:    cell, the setting on the task; score, a key of `curves.SCORES`; found, all cells of the
             report; how, a key of `NORMALISATIONS`; last, how many of the last evaluations of each
             seed are averaged where the scale follows from scores.
    Raises:  NoScale if the task has none.
    """
    return NORMALISATIONS[how].scale(cell, score, found, last)


def normalised(found: Sequence[Cell], how: str, *, last: int = 1) -> tuple[list[Cell], list[str]]:
    """The cells with all of their curves on the scale of a normalisation.

    Args:    found, from `curves.cells`; how and last, see `scale_of`.
    Returns: cells, without those curves that have no scale and those cells that have no curve then;
             notes that say what was left out, and why.
    """
    out, reasons = [], {}
    for cell in found:
        curves = {}
        for score, curve in cell.curves.items():
            try:
                scale = scale_of(cell, score, found, how, last=last)
            except NoScale as reason:
                reasons.setdefault(str(reason), None)
            else:
                curves[score] = curve._replace(returns=scale(curve.returns))
        if curves:
            out.append(cell._replace(curves=curves))
    unit = NORMALISATIONS[how].unit
    notes = [f"{unit} scores: some are left out: {few([*reasons], between='; ')}"]
    return out, notes if reasons else []


def single_agent(cell: Cell, found: Sequence[Cell]) -> Cell:
    """The single agent that a setting is compared with.

    Of several single agents on the environment, it is the one with the same value as the setting of
    every option in which they differ, such as the capacity of the replay.

    Args:   cell, the setting; found, all cells of the report.
    Raises: NoScale if there is no single agent, or not exactly one of that kind.
    """
    alone = [other for other in found if other.env == cell.env and other.members == 1]
    if cell.members == 1:
        return cell
    if len(alone) == 1:
        return alone[0]
    if not alone:
        raise NoScale(f"{cell.env} has no single agent")
    options = [other.options for other in alone if other.options is not None]
    if cell.options is None or len(options) < len(alone):
        raise NoScale(
            f"{cell.env} has {len(alone)} single agents, and rows do not say which options all of "
            "the settings were trained with"
        )
    own = cell.options
    keys = [key for key in differing(options) if exists(own, key)]
    same = [
        other
        for other in alone
        if other.options is not None
        and all(
            exists(other.options, key) and value_of(other.options, key) == value_of(own, key)
            for key in keys
        )
    ]
    if len(same) != 1:
        raise NoScale(
            f"{len(same)} of the {len(alone)} single agents on {cell.env} have the options of "
            f"{cell.name}; expected one"
        )
    return same[0]
