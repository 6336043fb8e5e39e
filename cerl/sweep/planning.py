"""Plans the runs of a sweep: which run folders train which cells and seeds.

A run folder in the sweep's folder OUT that is in no plan (e.g. of `cerl train --out OUT`, or of a
sweep that was killed while it planned) is adopted if it trains what is asked for.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from cerl.config import Config, ConfigError, preset
from cerl.config.effects import section_of
from cerl.config.labels import Setting, labelled
from cerl.record import files, folder
from cerl.record.finished import finished
from cerl.record.lock import works
from cerl.record.results import config_hash, env_name, scoring
from cerl.sweep import plan
from cerl.sweep.cells import Cell
from cerl.sweep.plan import Plan, PlannedRun
from cerl.text import few, ranges, visible

LOCK = ".plan.lock"  # file in the folder of a sweep, locked while the plan is written
PATIENCE = 120.0  # seconds to wait for that lock
THREADS = 16  # that make run folders
_SHOWN = 5  # most ranges of seeds in the name of a folder
# Options of a sweep that may change beside those of `folder.CHANGEABLE`: they add runs.
_ADDED = ("seeds", "env.name")
# Options that may change in a run and that the launcher changes, or that only name where it began.
_LEFT_TO_LAUNCHER = ("schedule.steps", "device", "out")

SeedsPerRun = int | Callable[[Config], int]
State = Literal["new", "planned", "adopted"]


class Asked(NamedTuple):
    """A run that is asked for now."""

    run: PlannedRun
    config: Config  # of the run, with its seeds; longer than that of its folder if asked to be
    state: State  # new: its folder does not exist; adopted: its folder was in no plan


class Request(NamedTuple):
    """The arguments of `made`."""

    cells: tuple[Cell, ...]
    study: str
    options: dict[str, Any]
    seeds_per_run: SeedsPerRun


class Planned(NamedTuple):
    """A plan that `written` puts into a folder."""

    plan: Plan
    asked: tuple[Asked, ...]  # in the order of the cells
    notes: tuple[str, ...]  # sentences for the user
    request: Request
    seen: tuple[bytes, frozenset[str]]  # plan.json and run folders that it was made from


def made(
    cells: Sequence[Cell],
    out: Path,
    *,
    study: str,
    options: Mapping[str, Any],
    seeds_per_run: SeedsPerRun,
) -> Planned:
    """Plans runs for all cells and seeds; writes nothing.

    Seeds that a run in `out` covers already are asked of that run. The others get new runs.

    Args:    study, its name, "" if the presets were given by name; options of every run by dotted
             key; seeds_per_run, most seeds of a new run, or a function of the cell's config.
    Raises:  ConfigError if `out` is no folder for this sweep, or belongs to another study.
    """
    request = Request(tuple(cells), study, _plain(options), seeds_per_run)
    return _made(request, out)


def written(planned: Planned, out: Path) -> Planned:
    """Makes the folders of new runs, and replaces plan.json.

    Folders come first. If the process is killed in between, the same sweep adopts them. If another
    process has changed `out` since the plan was made, the plan is made anew.

    Returns: the plan as it was written; all asked runs have folders.
    Raises:  ConfigError as `made`, and if `out` cannot be written to.
    """
    folder.check_out(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _clear(out)
            if planned.seen != _seen(out):
                planned = _made(planned.request, out)
            new = [asked for asked in planned.asked if asked.state == "new"]
            # Most of the time goes into waiting for the disk, which takes files of several threads
            # together: a thousand folders take half a second with 16 threads, 7 s with one.
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda a: folder.appear(out / a.run.folder, a.config), new))
            text = plan.text(planned.plan)
            if text.encode() != planned.seen[0]:
                files.write_text(out / plan.FILE, text)
    except OSError as error:
        raise folder.unwritable("--out", out, error) from error
    return planned


def _clear(out: Path) -> None:
    """Deletes what processes left that were killed while they wrote the plan; under the lock."""
    for left in out.glob(f".[0-9][0-9][0-9][0-9]*-*{files.TEMPORARY}"):
        shutil.rmtree(left)
    for left in out.glob(f".{plan.FILE}.*{files.TEMPORARY}"):
        left.unlink()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    if not works(out / LOCK):  # a file system without locks
        yield
        return
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ConfigError(
            f"{out}: another process has been writing the plan for {PATIENCE:.0f} s; wait for it "
            "or end it, then repeat the command"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they come back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(dict(options)))


def _seen(out: Path) -> tuple[bytes, frozenset[str]]:
    """What decides about a plan: the content of plan.json, and the names of run folders.

    Raises: ConfigError if `out` is a run folder or no folder, or cannot be read.
    """
    try:
        if (out / folder.FILE).exists():
            raise ConfigError(
                f"--out: {out} is the folder of a single run (it has a {folder.FILE}); expected a "
                f"folder for the runs of a sweep, e.g. {out.parent / 'sweep'}"
            )
        if not os.path.lexists(out):
            return b"", frozenset()
        # Names of folders that are being made begin with a dot.
        names = [name for name in os.listdir(out) if not name.startswith(".")]
        return plan.content(out), frozenset(
            name for name in names if (out / name / folder.FILE).exists()
        )
    except OSError as error:
        raise folder.unwritable("--out", out, error) from error


def _made(request: Request, out: Path) -> Planned:
    """The plan of `made`."""
    seen = _seen(out)
    before = plan.parsed(seen[0], out / plan.FILE) if seen[0] else None
    options = _checked(request, before, out)
    making = _Making(request, before.runs if before else (), out, names=seen[1])
    for cell in request.cells:
        making.cover(cell)
    making.name()
    runs = making.runs
    return Planned(
        plan=Plan(request.study, options, tuple(runs[number] for number in sorted(runs))),
        asked=tuple(making.asked.values()),
        notes=tuple(making.notes()),
        request=request,
        seen=seen,
    )


def _checked(request: Request, before: Plan | None, out: Path) -> dict[str, Any]:
    """The options of the new plan, without those that may change.

    Raises: ConfigError if `before`, the plan so far, is one of another study.
    """
    axes = {key for cell in request.cells for key in cell.varied}
    axes |= {key for run in (before.runs if before else ()) for key in run.varied}

    def kept(options: Mapping[str, Any]) -> dict[str, Any]:
        aside = axes.union(_ADDED)
        return {k: v for k, v in options.items() if k not in aside and not folder.changeable(k)}

    now = kept(request.options)
    if before is None:
        return now
    advice = "choose another folder with --out, or repeat the command that made this one"
    if before.study != request.study:
        names = [repr(name) if name else "of presets" for name in (before.study, request.study)]
        raise ConfigError(f"{out}: holds the study {names[0]}, got the study {names[1]}; {advice}")
    then = kept(before.options)
    if other := [key for key in sorted({*now, *then}) if now.get(key) != then.get(key)]:
        lines = [f"{key} {_word(now, key)} (its runs: {_word(then, key)})" for key in other]
        raise ConfigError(
            f"{out}: holds runs with other options than asked for: {', '.join(lines)}; {advice}. "
            f"To train with both, make the option an axis: --grid {other[0]}=A,B"
        )
    return now


def _word(options: Mapping[str, Any], key: str) -> str:
    return visible(preset.as_word(options[key])) if key in options else "as the presets say"


class _Making:
    """A plan while it is made.

    Attributes: runs, by number; a new run has no folder and no label until `name` is called;
                configs, those of runs that have a folder, by number; asked, by number, in order.
    """

    def __init__(
        self, request: Request, runs: Sequence[PlannedRun], out: Path, *, names: frozenset[str]
    ) -> None:
        self.request, self.out = request, out
        self.runs = {run.number: run for run in runs}
        self.configs: dict[int, Config] = {}
        self.asked: dict[int, Asked] = {}
        self.by_cell: dict[str, list[int]] = {}  # numbers of runs that have folders, or lost them
        self.loose: dict[str, list[tuple[str, Config]]] = {}  # folders in no plan, by cell
        self.damaged: list[str] = []
        self.lost: list[PlannedRun] = []  # asked runs whose folders are gone
        self.kept: dict[str, list[str]] = {}  # given options that asked runs have otherwise
        self.last = max([*self.runs, *(_number(name) for name in names)], default=0)
        found = dict(self._folders(names))
        for run in runs:
            config = found.pop(run.folder, None)
            if config is not None:
                steps = max(run.steps, config.schedule.steps)
                self._add(_planned(run, config)._replace(steps=steps), config)
            elif run.folder in names or not _vacant(out / run.folder):
                self.damaged.append(run.folder)
            else:
                self.by_cell.setdefault(run.cell, []).append(run.number)
        self.damaged = sorted(set(self.damaged))
        for name, config in found.items():
            self.loose.setdefault(config_hash(config), []).append((name, config))

    def _folders(self, names: frozenset[str]) -> Iterator[tuple[str, Config]]:
        """The run folders in `out` that can be read, and their configs."""
        for name in sorted(names):
            try:
                yield name, folder.load_file(self.out / name / folder.FILE)
            except ConfigError:
                self.damaged.append(name)

    def _add(self, run: PlannedRun, config: Config) -> None:
        """Adds a run whose folder exists, or changes it."""
        self.runs[run.number], self.configs[run.number] = run, config
        numbers = self.by_cell.setdefault(run.cell, [])
        if run.number not in numbers:
            numbers.append(run.number)

    def cover(self, cell: Cell) -> None:
        """Finds or adds runs for all seeds of a cell, and asks for them."""
        key, left = config_hash(cell.config), list(cell.config.seeds)

        def covers(seeds: Sequence[int]) -> bool:
            rest = [seed for seed in left if seed not in seeds]
            covered = len(rest) < len(left)
            left[:] = rest
            return covered

        numbers = self.by_cell.get(key, [])
        for number in [number for number in numbers if number in self.configs]:
            if covers(self.runs[number].seeds):
                self._ask(number, cell, "planned")
        for name, config in sorted(self.loose.get(key, []), key=self._best, reverse=True):
            if covers(config.seeds):
                number = _number(name)
                if number < 1 or number in self.runs:
                    number = self._next()
                blank = PlannedRun(number, name, "", "", "", (), 0, key, {})
                self._add(_planned(blank, config), config)
                self._ask(number, cell, "adopted")
        for number in [number for number in numbers if number not in self.configs]:
            if covers(self.runs[number].seeds):
                self.lost.append(self.runs[number])
                self._start(self.runs[number], cell)
        for seeds in self._parts(left, cell.config):
            self._start(PlannedRun(self._next(), "", "", "", "", seeds, 0, key, {}), cell)

    def _best(self, found: tuple[str, Config]) -> tuple[bool, float]:
        """The order of folders that train the same: finished ones, then those used last."""
        path, steps = self.out / found[0], found[1].schedule.steps
        return finished(path, steps=steps), path.stat().st_mtime

    def _next(self) -> int:
        self.last += 1
        return self.last

    def _parts(self, seeds: Sequence[int], config: Config) -> list[tuple[int, ...]]:
        """Seeds divided among as few runs as possible, which are about equally large."""
        if len(seeds) < 2:
            return [tuple(seeds)] if seeds else []
        most = self.request.seeds_per_run
        most = most(config) if callable(most) else most
        if most < 1:
            raise ConfigError(f"--seeds-per-run: expected at least 1, got {most}")
        count = -(-len(seeds) // most)
        bounds = [len(seeds) * part // count for part in range(count + 1)]
        return [tuple(seeds[a:b]) for a, b in itertools.pairwise(bounds)]

    def _ask(self, number: int, cell: Cell, state: State) -> None:
        """Asks for a run that has a folder, unless an equal cell has asked for it already."""
        if number in self.asked:
            return
        config, asked = self.configs[number], cell.config
        for key in self.request.options:
            if folder.changeable(key) and key not in _LEFT_TO_LAUNCHER:
                old, new = (getattr(*section_of(one, key), None) for one in (config, asked))
                if old != new:
                    self.kept.setdefault(key, []).append(self.runs[number].folder)
        if asked.schedule.steps > config.schedule.steps:
            schedule = config.schedule.model_copy(update={"steps": asked.schedule.steps})
            config = config.model_copy(update={"schedule": schedule})
        steps, varied = config.schedule.steps, _plain(cell.varied)
        self._add(self.runs[number]._replace(steps=steps, varied=varied), config)
        self.asked[number] = Asked(self.runs[number], config, state)

    def _start(self, run: PlannedRun, cell: Cell) -> None:
        """Asks for a run that has no folder."""
        config = cell.config.model_copy(update={"seeds": run.seeds, "out": str(self.out)})
        run = _planned(run._replace(varied=_plain(cell.varied)), config)
        self._add(run, config)
        self.asked[run.number] = Asked(run, config, "new")

    def name(self) -> None:
        """Gives labels to all runs that can be read, and names to the folders of new runs."""
        settings = [
            Setting(config.preset, env_name(config), scoring(config))
            for config in self.configs.values()
        ]
        split = {key for key, numbers in self.by_cell.items() if len(numbers) > 1}
        for number, label in zip(self.configs, labelled(settings), strict=True):
            run = self.runs[number]._replace(label=label.text)
            if not run.folder:
                name = _name(run, self.configs[number], split=run.cell in split)
                run = run._replace(folder=name)
            self.runs[number] = run
            if number in self.asked:
                self.asked[number] = self.asked[number]._replace(run=run)

    def notes(self) -> Iterator[str]:
        """Sentences about what the user would not expect."""
        if self.damaged:
            yield (
                f"left out, because config.yaml is missing, damaged or edited: "
                f"{_some(self.damaged)}; nothing in these folders is changed"
            )
        adopted = [a.run.folder for a in self.asked.values() if a.state == "adopted"]
        if adopted:
            yield f"in no plan, but train what is asked, so they are used: {_some(adopted)}"
        lost = [run.folder for run in self.lost]
        if lost:
            yield f"planned earlier, but their folders are gone: {_some(lost)}; they start anew"
        for key, names in self.kept.items():
            yield (
                f"{key} only counts for new runs; `cerl train --resume RUN --{key} ...` changes it "
                f"in {_some(names)}"
            )


def _planned(run: PlannedRun, config: Config) -> PlannedRun:
    """A run with what its config says."""
    return run._replace(
        preset=config.preset,
        env=env_name(config),
        seeds=config.seeds,
        steps=config.schedule.steps,
        cell=config_hash(config),
    )


def _number(name: str) -> int:
    """The number that the name of a run folder begins with; 0 if there is none."""
    found = re.match(r"(\d{4,6})-", name)
    return int(found[1]) if found else 0


def _vacant(path: Path) -> bool:
    """Whether a run folder can be made there: nothing is there, or an empty folder."""
    return not os.path.lexists(path) or (path.is_dir() and not os.listdir(path))


def _name(run: PlannedRun, config: Config, *, split: bool) -> str:
    """The name of the folder of a new run. Args: split, whether its cell has several runs."""
    label = re.sub(r"(?<=\d),(?=\d)", "", run.label)  # 1,234 becomes 1234
    words = folder.plain(f"{label}-{config.env.title}") or "run"
    seeds = f"-seeds-{seeds_in_words(run.seeds)}" if split else ""
    return f"{run.number:04d}-{words}{seeds}"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Seeds with ranges for consecutive ones, e.g. 0..4-7; more than five parts are shortened."""
    words = ranges(seeds, least=2)
    if len(words) > _SHOWN:
        words = [*words[: _SHOWN - 1], f"to-{words[-1]}"]
    return "-".join(words)


def _some(names: Sequence[str]) -> str:
    """The first names of a list of folders, and how many others there are."""
    return few([visible(name) for name in names])
