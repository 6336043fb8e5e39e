"""How the final score depends on one option: points and tables, for `cerl report --x OPTION`.

There is a line of points for each setting of all other options, on each environment and for the
interquartile mean over several games. Runs that do not have the option, such as a single agent for
the number of members of an ensemble, have one score that counts at all values of the option.
`cerl/report/figures/score.py` draws the points.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cerl.config import Config, ConfigError, errors, preset
from cerl.config.labels import exists, ordered, rank_of, ranked, value_of
from cerl.config.numbers import human
from cerl.report.curves import SCORES, Cell, final
from cerl.report.estimate import estimate, folded
from cerl.report.palette import shown

MEMBERS = "ensemble.members"  # an option whose value stands in all rows, also in old ones
ESTIMATE = ("value", "low", "high", "least", "greatest")  # columns of a summary
METHOD = (22, 28)  # fewest and most characters of the column of methods in a printed table


class Point(NamedTuple):
    """A final score at one value of the option."""

    panel: str  # environment, or e.g. "atari (3 games)"
    unit: str  # of `summary.SUMMARY`: return, human-normalised
    setting: str  # label of all other options
    method: str  # the label's method
    others: Mapping[str, Any]  # values of the other options by dotted key, see `_others`
    score: str  # key of SCORES
    alone: bool  # the setting is a single agent
    constant: bool  # the run does not have the option, so the score counts at all of its values
    x: Any  # value of the option; None if constant
    estimate: Mapping[str, float | None]  # by `ESTIMATE`
    seeds: tuple[float, ...] = ()  # the score of every seed; none over tasks


def key_of(option: str, found: Sequence[Cell]) -> str:
    """The dotted key of an option that differs between settings of one preset.

    Args:   option, the word of the user: the key, or what labels call the option, e.g. members;
            found, all cells of the report.
    Raises: ConfigError if there is no such option, or if it does not differ.
    """
    key = option.removeprefix("--").replace("-", "_")
    several = ordered(name for cell in found for name in cell.label.options)
    if key in several:
        return key
    short = {name: k for cell in found for k, name in cell.label.short.items() if k in several}
    if (named := short.get(key.replace("_", " "))) is not None:
        return named
    listed = (
        f"these runs differ in {', '.join(several)}"
        if several
        else "all runs of a preset have the same options"
    )
    if not any(cell.options is not None for cell in found):
        listed = "these rows do not say which options their runs had, nor is a config.yaml beside"
    if key in errors.unions(Config):
        key = f"{key}.{preset.UNIONS[key].key}"
    if key in errors.keys(Config):
        raise ConfigError(f"report --x: {key} has one value in all runs of a preset; {listed}")
    hint = errors.nearest(key, several) or errors.nearest(key, [*errors.keys(Config)])
    raise ConfigError(f"report --x: no option {option!r}{hint} ({listed})")


def points(found: Sequence[Cell], summary: pa.Table, option: str) -> list[Point]:
    """The scores that the figure and the table show, in the order of legends.

    Args: found, from `curves.cells`; summary of it; option, its dotted key.
    """
    cells = {cell.name: cell for cell in found}
    drawn = {(cell.name, score) for cell in found for score in shown(cell)}
    places = {(cell.env, cell.name): cell for cell in found}
    order = {name: rank for rank, name in enumerate(settings_of(found, option))}
    others = _others(found, option)
    rows = summary.to_pylist()
    # Over tasks, only scores of the first normalisation are drawn.
    units = {row["env"]: row["unit"] for row in reversed(rows)}
    out = []
    for row in rows:
        if row["unit"] != units[row["env"]]:
            continue
        cell = cells[row["label"]]
        wanted = "mean" if row["unit"] == "return" else "iqm"
        if row["statistic"] != wanted or (row["label"], row["score"]) not in drawn:
            continue
        if _unknown(cell, option):
            continue
        value = {name: row[name] for name in ESTIMATE}
        label = cell.label.without(option)
        names = label.text, label.method, others[cell.name]
        score = row["score"], cell.members == 1, *_x(cell, option)
        seeds = ()
        if (there := places.get((row["env"], row["label"]))) is not None:
            seeds = final(there.curves[row["score"]], last=row["evaluations"])
        seeds = tuple(float(value) for value in seeds if np.isfinite(value))
        out.append(Point(row["env"], row["unit"], *names, *score, value, seeds))
    scores = [*SCORES]
    out.sort(key=lambda p: (order[p.setting], scores.index(p.score), rank_of(p.x)))
    return out


def settings_of(found: Sequence[Cell], option: str) -> list[str]:
    """What the lines of the figure are called, in the order of the legend."""
    return ranked([cell.label.without(option) for cell in found])


def left_out(found: Sequence[Cell], option: str) -> list[str]:
    """The settings whose value of an option is unknown, so that `points` has none of them."""
    return ranked([cell.label for cell in found if _unknown(cell, option)])


def _others(found: Sequence[Cell], option: str) -> dict[str, dict[str, Any]]:
    """For each label, the values of all options but one that stand in the label of any setting.

    An option that is not in the setting's own label is left out where the setting does not have
    it, and where no label of another setting states the same value.
    """
    stated: dict[str, set[Any]] = {}
    for cell in found:
        for key, value in cell.label.options.items():
            stated.setdefault(key, set()).add(hashable(value))
    keys = [key for key in ordered(stated) if key != option]
    out: dict[str, dict[str, Any]] = {}
    for cell in found:
        own = out.setdefault(cell.name, {})
        for key in keys:
            if key in cell.label.options:
                own[key] = cell.label.options[key]
            elif cell.options is not None and not _alone(cell, key) and exists(cell.options, key):
                value = value_of(cell.options, key)
                if hashable(value) in stated[key]:
                    own[key] = value
    return out


def _alone(cell: Cell, option: str) -> bool:
    """Whether an option is one of ensembles, and the setting a single agent."""
    return option.startswith("ensemble.") and cell.members == 1


def _unknown(cell: Cell, option: str) -> bool:
    """Whether rows do not tell the value of an option; they always tell the number of members."""
    return cell.options is None and option != MEMBERS and not _alone(cell, option)


def _x(cell: Cell, option: str) -> tuple[bool, Any]:
    """Whether a setting is constant in an option, and else its value of the option."""
    if option in cell.label.options:
        return False, cell.label.options[option]
    if _alone(cell, option):
        return True, None
    if cell.options is None:
        return False, cell.members
    if not exists(cell.options, option):
        return True, None
    return False, value_of(cell.options, option)


def hashable(value: Any) -> Any:
    """A value of an option such that it can be a key: lists become tuples."""
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


def table(own: Sequence[Point], *, option: str) -> pa.Table:
    """The points as a table, for a file: a line for each point.

    Columns are the environment or games, unit, setting, method, the other options and the option
    itself by dotted key, score, and those of `ESTIMATE`. Options are texts; they are empty where a
    setting does not have the option.

    Args: own, from `points`; option, its dotted key.
    """
    keys = ordered(key for point in own for key in point.others)
    lines = [
        {
            **{"env": p.panel, "unit": p.unit, "setting": p.setting, "method": p.method},
            **{key: _written(p.others[key]) if key in p.others else "" for key in keys},
            option: "" if p.constant else _written(p.x),
            "score": p.score,
            **p.estimate,
        }
        for p in own
    ]
    names = ("env", "unit", "setting", "method", *keys, option, "score")
    fields = [*((name, pa.string()) for name in names)]
    fields += [(name, pa.float64()) for name in ESTIMATE]
    return pa.Table.from_pylist(lines, schema=pa.schema(fields))


def _written(value: Any) -> str:
    """A value of an option in a file: texts as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def printed(own: Sequence[Point], console: Console, *, option: str) -> None:
    """Prints, for each panel, a table of each score: a column for each value of the option.

    Scores that do not depend on the option stand above the tables, one on a line.

    Args: own, from `points`; option, what titles call it.
    """
    for panel in dict.fromkeys(point.panel for point in own):
        mine = [point for point in own if point.panel == panel]
        console.print(Text(f"{panel}, by {option}", "bold"))
        for p in mine:
            if p.constant:
                why = "single agent" if p.alone else f"has no {option}"
                name = p.setting if p.score == "individual" else f"{p.setting}, {SCORES[p.score]}"
                console.print(f"  {name} ({why}): {estimate(p.estimate)}", markup=False)
        for score in SCORES:
            if line := [p for p in mine if p.score == score and not p.constant]:
                console.print(f"\n{panel}, {SCORES[score]}, by {option}", markup=False)
                _print_score(line, console)


def _print_score(own: Sequence[Point], console: Console) -> None:
    """Prints one score of all settings on a panel, in as many tables as their columns need."""
    values = {hashable(p.x): p.x for p in own}
    columns = sorted(values, key=lambda code: rank_of(values[code]))
    texts = {(p.setting, hashable(p.x)): folded(estimate(p.estimate)) for p in own}
    names = {p.setting: _folded(p.setting) for p in own}
    width = max(METHOD[0], *(len(line) for name in names.values() for line in name.split("\n")))
    needed = max(len(line) for text in texts.values() for line in text.split("\n"))
    # Each column has two more characters: a space to its right, and the divider or an edge.
    count = max((console.width - (width + 2)) // (needed + 2), 1)
    for first in range(0, len(columns), count):
        part = columns[first : first + count]
        shown = Table(box=SIMPLE_HEAD)
        shown.padding, shown.pad_edge = (0, 1, 0, 0), False
        shown.add_column("method", width=width, overflow="fold")
        for code in part:
            shown.add_column(human(values[code]), justify="right", overflow="fold")
        for setting, name in names.items():
            shown.add_row(name, *(texts.get((setting, code), "") for code in part))
        console.print(shown, markup=False)


def _folded(setting: str) -> str:
    """A label in lines of at most METHOD[1] characters, where its options allow."""
    lines = [""]
    for part in setting.split(", "):
        longer = f"{lines[-1]}, {part}" if lines[-1] else part
        if lines[-1] and len(longer) >= METHOD[1]:
            lines[-1] += ","
            lines.append(f"  {part}")
        else:
            lines[-1] = longer
    return "\n".join(lines)
