"""Shows the state of every run of a sweep: `cerl status OUT`, and the live view of a sweep.

The states are read from the run folders alone (`cerl/sweep/state.py`). This module imports neither
torch nor matplotlib, so that it answers at once.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cerl.record.progress import duration
from cerl.sweep.state import RunState as RunState
from cerl.sweep.state import State
from cerl.sweep.state import states as states
from cerl.text import ranges, visible

FEW = 40  # most runs, or groups of runs, that are shown one a line
ALIKE = 6  # most runs that are named where several failed with the same words
ERROR_WIDTH = 12  # characters of an error that the table shows at least
PLAIN_WIDTH = 160  # characters of a line where the output is no terminal
STYLES: dict[State, str] = {
    "done": "green",
    "running": "bold cyan",
    "queued": "blue",
    "waiting": "",
    "stopped": "yellow",
    "failed": "bold red",
}


def main(outs: Sequence[Path], *, every: bool = False, as_json: bool = False) -> None:
    """Prints the states of the runs of one or several folders.

    Args:   every, show each run even if there are many; as_json, print `plain` instead of tables.
    Raises: ConfigError if one of the folders has no run.
    """
    found = [one for out in outs for one in states(out)]
    if as_json:
        print(json.dumps(plain(found), indent=1))
        return
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(highlight=False, width=width)
    console.print(shown(found, width=console.width, every=every))


def shown(states: Sequence[RunState], *, width: int, every: bool = False) -> RenderableType:
    """A line with totals, a table of the runs, and the errors of failed ones.

    Many runs are counted by name and environment; those that train or failed are then shown one by
    one.

    Args: width of the terminal in characters; every, show each run even if there are many.
    """
    parts: list[RenderableType] = [summary(states)]
    # Runs of several folders may have the same numbers, so they are named with their folders.
    several = len({one.out for one in states}) > 1
    listed, rest = list(states), 0
    if len(states) > FEW and not every:
        parts += [_counted(states), Text()]
        telling = [one for name in ("running", "failed") for one in states if one.state == name]
        listed, rest = telling[:FEW], len(telling[FEW:])
    if listed:
        parts.append(_listed(listed, width=width, several=several))
    if rest:
        parts.append(Text(f"and {rest} more that train or failed; --all shows each run"))
    return Group(*parts, *_errors(states, several=several))


def summary(states: Sequence[RunState]) -> Text:
    """One line: how many runs are in which state, the share of steps that are done, the time left.

    E.g. `225 runs: 120 done, 4 running, 101 waiting; 53.1% of all agent steps; 12:03:11 left`.
    """
    line = Text(f"{len(states)} run{'s' if len(states) != 1 else ''}: ")
    for index, (name, number) in enumerate(counts(states).items()):
        line.append(", " if index else "").append(f"{number} {name}", style=STYLES[name])
    line.append(f"; {percent(_share(states))} of all agent steps")
    if any(one.state == "running" for one in states):
        line.append(f"; {_time(left(states))} left")
    return line


def _counted(states: Sequence[RunState]) -> Table:
    """A table of how many runs of each name and environment are in each state; without a line for
    each environment if there were too many lines."""
    pairs = {(one.run.label, one.run.env): None for one in states}
    if by_env := len(pairs) <= FEW:
        groups = {key: [one for one in states if _pair(one) == key] for key in pairs}
    else:
        members: dict[str, list[RunState]] = {}
        for one in states:
            members.setdefault(one.run.label, []).append(one)
        groups = {(label, _environments(found)): found for label, found in members.items()}
    present = list(counts(states))
    table = _table("name", "environment" if by_env else "environments")
    for name in ("runs", *present, "steps done", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for (label, env), found in groups.items():
        numbers = counts(found)
        cells = [Text(str(numbers.get(name, "")), style=STYLES[name]) for name in present]
        ends = _time(left(found)) if "running" in numbers else "-"
        share = percent(_share(found))
        words = (Text(visible(text)) for text in (label, env, str(len(found))))
        table.add_row(*words, *cells, share, ends)
    return table


def _pair(one: RunState) -> tuple[str, str]:
    return one.run.label, one.run.env


def _environments(states: Sequence[RunState]) -> str:
    """The environment of runs, or how many they have."""
    names = list(dict.fromkeys(one.run.env for one in states))
    return names[0] if len(names) == 1 else str(len(names))


def _listed(states: Sequence[RunState], *, width: int, several: bool) -> Table:
    """A table with a line for each run. Args: several, whether they are of several folders."""
    table = _table("run", "name", "environment")
    table.add_column("seeds", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("steps done", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    placed = any(one.device for one in states)
    if placed:
        table.add_column("device", no_wrap=True)
    noted = any(one.error for one in states) and width >= 80
    if noted:
        # Only in a table of full width does this column get what the others leave; otherwise a long
        # error would take their place.
        table.expand = True
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1, min_width=ERROR_WIDTH)
    for one in states:
        cells: list[str | Text] = [
            visible(_number(one, several=several)),
            visible(one.run.label),
            visible(one.run.env),
            ", ".join(ranges(one.run.seeds)),
            Text(one.state, style=STYLES[one.state]),
            percent(_share([one])),
            _time(one.left) if one.state != "done" else "",
        ]
        if placed:
            cells.append(visible(_place(one)))
        if noted:
            cells.append(visible(_last_line(one.error)))
        # A Text is shown as it is; in a str rich would take words in brackets for styles.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table


def _errors(states: Sequence[RunState], *, several: bool) -> list[Text]:
    """The whole errors of failed runs; runs that failed with the same words share one."""
    failed: dict[str, list[RunState]] = {}
    for one in states:
        if one.state == "failed":
            failed.setdefault(one.error.strip(), []).append(one)
    texts = []
    for error, runs in failed.items():
        names = ", ".join(_number(one, several=several) for one in runs[:ALIKE])
        more = f" and {len(runs) - ALIKE} more" if len(runs) > ALIKE else ""
        head = Text(visible(f"\nfailed: {names}{more}", lines=True), style=STYLES["failed"])
        texts += [head, Text(visible(error, lines=True))]
    return texts


def _table(*columns: str) -> Table:
    """A table without frame, whose first columns hold words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _number(one: RunState, *, several: bool) -> str:
    """What a run is called in a table: its number in the plan, else the name of its folder."""
    name = f"{one.run.number:04d}" if one.run.number else one.run.folder
    return f"{one.out}/{name}" if several else name


def _place(one: RunState) -> str:
    """The device and machine of a run, e.g. cuda:1@node7; the model of the device is left out."""
    return f"{one.device.partition(' ')[0]}@{one.host}" if one.device else ""


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def _share(states: Sequence[RunState]) -> float:
    """The share of the agent steps of runs that are done; NaN if it is unknown how many there are.

    Steps are counted once for each seed.
    """
    whole = sum(one.steps * len(one.run.seeds) for one in states)
    return sum(one.step * len(one.run.seeds) for one in states) / whole if whole else math.nan


def percent(share: float) -> str:
    """A share as text, rounded down: 100% means that nothing is missing."""
    return "-" if math.isnan(share) else f"{math.floor(1000 * share) / 10:g}%"


def _time(seconds: float) -> str:
    """Seconds as hours:minutes:seconds; - if they are unknown."""
    return duration(seconds) if math.isfinite(seconds) else "-"


def counts(states: Sequence[RunState]) -> dict[State, int]:
    """How many runs are in each state that some run is in, in the order of `State`."""
    numbers = {name: sum(one.state == name for one in states) for name in get_args(State)}
    return {name: number for name, number in numbers.items() if number}


def left(states: Sequence[RunState]) -> float:
    """Seconds until all runs have ended, if as many go on training at a time as train now.

    The remaining seconds of all runs that have not ended or failed are divided by the number of
    running ones. A run whose own speed is unknown is taken to be as fast as the mean of the runs
    with the same cell and number of seeds, else of the same cell, else of the same preset, else of
    all.

    Returns: NaN if nothing trains, or if no speed is known.
    """
    running = [one for one in states if one.state == "running"]
    ahead = [one for one in states if one.state in ("running", "queued", "waiting", "stopped")]
    if not running:
        return math.nan if ahead else 0.0
    speeds = _speeds(states)
    seconds = [max(0, one.steps - one.step) / speeds(one) for one in ahead]
    # The whole lasts at least as long as its longest run.
    return max(sum(seconds) / len(running), *seconds)


def _speeds(states: Sequence[RunState]) -> Callable[[RunState], float]:
    """A function that returns the speed of a run, in agent steps per second, or a guess of it."""
    known: dict[Any, list[float]] = {}
    for one in states:
        if one.rate > 0:
            for key in _likeness(one):
                known.setdefault(key, []).append(one.rate)
    means = {key: sum(rates) / len(rates) for key, rates in known.items()}

    def speed(one: RunState) -> float:
        if one.state == "running" and one.rate > 0:
            return one.rate
        return next((means[key] for key in _likeness(one) if key in means), math.nan)

    return speed


def _likeness(one: RunState) -> Iterator[Any]:
    """Keys of the groups of runs that are about as fast as a run, the most similar ones first."""
    run = one.run
    if run.cell:
        yield "cell", run.cell, len(run.seeds)
        yield "cell", run.cell
    yield "preset", run.preset
    yield "all"


def plain(states: Sequence[RunState]) -> dict[str, Any]:
    """The states as plain data for JSON; unknown numbers are None."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    runs = [
        one.run._asdict()
        | {"out": one.out, "state": one.state, "step": one.step, "steps": one.steps}
        | {"left_seconds": number(one.left), "steps_per_second": number(one.rate)}
        | {"device": one.device, "host": one.host, "error": one.error}
        for one in states
    ]
    return {"counts": counts(states), "left_seconds": number(left(states)), "runs": runs}
