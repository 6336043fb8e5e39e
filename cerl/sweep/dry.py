"""Shows what a sweep would train, and what that costs: `cerl sweep ... --dry-run`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cerl.footprint.estimate import gigabytes
from cerl.sweep.cost import Asked, Cost
from cerl.sweep.speed import SECONDS
from cerl.sweep.state import RunState
from cerl.sweep.status import percent
from cerl.text import ranges, visible

FEW = 60  # most runs that are shown one a line


class Line(NamedTuple):
    """A run that is asked for, with its cost and its state."""

    asked: Asked
    cost: Cost
    state: RunState | None  # None: its folder does not exist

    @property
    def left(self) -> float:
        """The share of the run that is still to be trained."""
        steps = self.asked.run.steps
        if self.state is None or steps < 1:
            return 1.0
        # A run that has ended may be asked to train longer.
        return max(0, steps - self.state.step) / steps

    @property
    def hours(self) -> float:
        """Hours that are still to be trained; NaN if unknown."""
        return self.left * self.cost.hours if self.left else 0.0


def dry(
    asked: Sequence[Asked],
    costs: Sequence[Cost],
    states: Sequence[RunState] = (),
    *,
    at_once: int = 1,
) -> RenderableType:
    """A table of the runs that are asked for, their costs, and what is already there, with totals.

    Many runs are shown as one line for each name.

    Args: costs of the runs, in their order; states of the runs that have folders; at_once, how many
          runs would train at the same time.
    """
    found = {one.run.folder: one for one in states}
    lines = [
        Line(one, cost, found.get(one.run.folder)) for one, cost in zip(asked, costs, strict=True)
    ]
    table = _listed(lines) if len(lines) <= FEW else _grouped(lines)
    return Group(table, Text(), *_totals(lines, at_once=at_once))


def _listed(lines: Sequence[Line]) -> Table:
    """A table with a line for each run. Seeds and steps have no column if all runs have the same;
    a sentence of `_totals` then states them."""
    runs = [line.asked.run for line in lines]
    own = {"seeds": _seeds(lines) is None, "steps": _steps(lines) is None}
    shown = [name for name, differs in own.items() if differs]
    table = _table("run", "name", "environment", *shown)
    _add_numbers(table, *_places(lines), "disk", "time", "there")
    envs = _short([run.env for run in runs])
    for line, run, env in zip(lines, runs, envs, strict=True):
        cost, varied = line.cost, {"seeds": ", ".join(ranges(run.seeds)), "steps": f"{run.steps:,}"}
        words = [
            f"{run.number:04d}",
            run.label,
            env,
            *(varied[name] for name in shown),
            *(gigabytes(getattr(cost, key)) for key in _places(lines).values()),
            gigabytes(cost.disk),
            _time(cost.hours, at_most=cost.basis == "at most"),
            _there(line),
        ]
        table.add_row(*(Text(visible(word)) for word in words))
    return table


def _grouped(lines: Sequence[Line]) -> Table:
    """A table with a line for each name: memory is that of the largest run, disk space a sum."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.asked.run.label, []).append(line)
    table = _table("name", "environments")
    _add_numbers(table, "runs", *_places(lines), "disk", "time of a run", "done")
    for label, group in groups.items():
        names = list(dict.fromkeys(line.asked.run.env for line in group))
        words = [
            label,
            names[0] if len(names) == 1 else str(len(names)),
            str(len(group)),
            *(
                gigabytes(max(getattr(line.cost, key) for line in group))
                for key in _places(lines).values()
            ),
            gigabytes(sum(line.cost.disk for line in group)),
            _times(group),
            str(sum(not line.left for line in group)),
        ]
        table.add_row(*(Text(visible(word)) for word in words))
    return table


def _seeds(lines: Sequence[Line]) -> str | None:
    """The seeds of every run as text; None if runs have different ones."""
    found = {", ".join(ranges(line.asked.run.seeds)) for line in lines}
    return found.pop() if len(found) == 1 else None


def _steps(lines: Sequence[Line]) -> int | None:
    """The length of every run in agent steps of one seed; None if runs differ in it."""
    found = {line.asked.run.steps for line in lines}
    return found.pop() if len(found) == 1 else None


def _short(envs: Sequence[str]) -> list[str]:
    """Environments without their family, if all are of one."""
    families = {env.partition("/")[0] for env in envs}
    return [env.partition("/")[2] or env for env in envs] if len(families) == 1 else list(envs)


def _add_numbers(table: Table, *names: str) -> None:
    """Adds columns to the right of the words. Where a terminal is narrow, words are folded and
    numbers stay whole."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _totals(lines: Sequence[Line], *, at_once: int) -> list[Text]:
    """Sentences on all runs together, and on what is unknown."""
    done = sum(not line.left for line in lines)
    partly = sum(0 < line.left < 1 for line in lines)
    seeds = sum(len(line.asked.run.seeds) for line in lines)
    disk = gigabytes(sum(line.cost.disk for line in lines))
    each = [f"seeds {same}"] if (same := _seeds(lines)) else []
    each += [f"{steps:,} agent steps"] if (steps := _steps(lines)) else []
    of_each = f" (each with {' and '.join(each)})" if each else ""
    texts = [
        f"{_runs(len(lines))} with {seeds:,} seed{'s' * (seeds != 1)} in all{of_each}: {done} "
        f"done, {partly} begun, {len(lines) - done - partly} new; {disk} on disk at the end"
    ]
    known = [line.hours for line in lines if not math.isnan(line.hours)]
    unknown = len(lines) - len(known)
    if len(known) > done or not unknown:
        total = sum(known)
        text = f"time still needed: {_time(total)} one after the other"
        if at_once > 1:
            # The whole lasts at least as long as its longest run.
            text += f", {_time(max(total / at_once, *known, 0.0))} if {at_once} runs at the same "
            text += "time do not slow each other down"
        if any(line.cost.basis == "at most" for line in lines):
            text += "; <=: the costliest run of the preset was measured"
        if unknown:
            text += f"; without {_runs(unknown)} whose speed is unknown"
        texts.append(text)
    if unknown:
        texts.append(
            f"the time of {_runs(unknown)} is unknown (-): no run in this folder is like them; "
            f"--calibrate trains one run of each preset for {SECONDS:.0f} seconds to measure it"
        )
    return [Text(text) for text in texts]


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"


def _table(*columns: str) -> Table:
    """A table without frame, whose first columns hold words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column == "name"
        table.add_column(column, no_wrap=not name, min_width=16 if name else None)
    return table


def _places(lines: Sequence[Line]) -> dict[str, str]:
    """The kinds of memory that some run takes: headings, and the fields of `Cost`."""
    places = {"GPU memory": "gpu", "memory": "host"}
    return {
        name: key for name, key in places.items() if any(getattr(line.cost, key) for line in lines)
    }


def _times(lines: Sequence[Line]) -> str:
    """The shortest and longest time of runs as text, once if they read alike; - if unknown."""
    known = [line.cost for line in lines if not math.isnan(line.cost.hours)]
    if not known:
        return "-"
    at_most = any(cost.basis == "at most" for cost in known)
    hours = [cost.hours for cost in known]
    ends = dict.fromkeys(_time(value) for value in (min(hours), max(hours)))
    return ("<= " if at_most else "") + " - ".join(ends)


def _there(line: Line) -> str:
    """What of a run is trained already."""
    if line.state is None:
        return "new"
    if not line.left:
        return "done"
    state = "to go on" if line.state.state == "done" else line.state.state
    return f"{state}, {percent(1 - line.left)}"


def _time(hours: float, *, at_most: bool = False) -> str:
    """Hours in a unit that suits them, e.g. 12 min; - if unknown."""
    if math.isnan(hours):
        return "-"
    head = "<= " if at_most else ""
    for unit, size, most in (("s", 3600, 90), ("min", 60, 90), ("h", 1, 72)):
        if hours * size < most:
            digits = 1 if unit == "h" and hours < 10 else 0
            return f"{head}{hours * size:,.{digits}f} {unit}"
    return f"{head}{hours / 24:,.1f} days"
