"""The runs behind a report: how each was trained, with what, for how long, and what was lost.

All is read from the rows and from the files in a run folder; a file that is missing or damaged
leaves its entry empty or named as a problem, and stops nothing.
"""

import math
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cerl.config import Config, ConfigError, preset
from cerl.config.load import load, sections
from cerl.record import files, heartbeat, versions
from cerl.record.folder import FILE, load_file
from cerl.report import settings
from cerl.report.curves import evaluations
from cerl.text import visible

ASIDE = ("preset", "seeds", "out", "device", "threads", "log")  # of options that are compared
_LARGEST = 1 << 20  # most bytes of a config.yaml that is read


class Run(NamedTuple):
    """One run folder."""

    name: str  # of the folder; with those above it where two are named alike
    folder: Path
    preset: str
    env: str  # family/name
    seeds: tuple[int, ...]
    step: int  # agent steps of one seed at the last row
    lost: tuple[int, ...]  # seeds without a finite score at their last evaluation
    diverged: dict[int, int]  # seed: agent step at which its numbers were first seen not finite
    seconds: float | None  # that the run has trained; None: unknown
    device: str  # model of the device of the last session, "" if unknown
    versions: dict[str, str]  # of the last session
    against: str  # what options are compared with: the preset, or the defaults
    changed: tuple[tuple[str, str, str], ...]  # option, its value, and its value in `against`
    command: str  # that trains such a run again, "" where the options are unknown
    problem: str  # why something of this is unknown, "" otherwise
    videos: tuple[Path, ...]  # mp4 files in the folder


class _Options(NamedTuple):
    """How the options of a run differ from those of its preset."""

    against: str
    changed: tuple[tuple[str, str, str], ...]
    words: tuple[str, ...]  # of the command, without seeds


def runs_of(table: pa.Table) -> list[Run]:
    """Every run of a table of rows, by environment, preset and name.

    Args: table, from `curves.load_rows`.
    """
    facts = _by_run(table)
    names = settings.run_names(facts)
    known: dict[str, _Options] = {}  # by the text of config.yaml without its seeds
    out = []
    for file, own in facts.items():
        folder = Path(file).parent
        found, problem = _options(folder, known)
        entry = _entry(folder)
        beat = heartbeat.read(folder)
        device = str(entry.pop("device", "")) or (beat.device if beat is not None else "")
        run = Run(
            name=visible(names[file]),
            folder=folder,
            **own,
            device=device,
            versions={str(name): str(value) for name, value in entry.items() if name != "time"},
            against=found.against if found else "",
            changed=found.changed if found else (),
            command=_command(found, own["seeds"]) if found else "",
            problem=problem,
            videos=tuple(sorted(folder.glob("*.mp4"))),
        )
        out.append(run)
    return sorted(out, key=lambda run: (run.env, run.preset, run.name))


def _by_run(table: pa.Table) -> dict[str, dict[str, Any]]:
    """What the rows say of each run: fields of `Run` by the file of its rows."""
    grouped = table.group_by(["run", "seed"], use_threads=False)
    ends = grouped.aggregate([("step", "max"), ("wall_seconds", "max")])
    first = table.group_by(["run"], use_threads=False).aggregate(
        [("preset", "min"), ("env", "min")]
    )
    out: dict[str, dict[str, Any]] = {}
    for row in first.to_pylist():
        out[row["run"]] = {
            "preset": visible(row["preset_min"] or ""),
            "env": visible(row["env_min"] or ""),
            "seeds": (),
            "step": 0,
            "lost": (),
            "diverged": {},
            "seconds": None,
        }
    for row in sorted(ends.to_pylist(), key=lambda row: row["seed"]):
        own = out[row["run"]]
        own["seeds"] += (row["seed"],)
        own["step"] = max(own["step"], row["step_max"])
        seconds = row["wall_seconds_max"]
        if seconds is not None and math.isfinite(seconds):
            own["seconds"] = max(own["seconds"] or 0.0, seconds)
    marked = table.filter(pc.field("diverged")).group_by(["run", "seed"], use_threads=False)
    for row in marked.aggregate([("step", "min")]).to_pylist():
        out[row["run"]]["diverged"][row["seed"]] = row["step_min"]
    for run, seed in _unscored(evaluations(table)):
        out[run]["lost"] += (seed,)
    return out


def _unscored(played: pa.Table) -> list[tuple[str, int]]:
    """(run, seed) of seeds without a finite return at the last evaluation of their run."""
    last = played.group_by(["run"], use_threads=False).aggregate([("step", "max")])
    ends = dict(zip(last["run"].to_pylist(), last["step_max"].to_pylist(), strict=True))
    finite = pc.fill_null(pc.is_finite(played["return"]), False)  # pyright: ignore
    scored = played.append_column("finite", pc.cast(finite, pa.int64()))
    grouped = scored.group_by(["run", "seed", "step"], use_threads=False)
    found = grouped.aggregate([("finite", "max")]).to_pylist()
    whole = {(row["run"], row["seed"]) for row in found}
    good = {
        (row["run"], row["seed"])
        for row in found
        if row["finite_max"] and row["step"] == ends[row["run"]]
    }
    return sorted(whole - good)


def _options(folder: Path, known: dict[str, _Options]) -> tuple[_Options | None, str]:
    """How the options of a run differ from its preset's, or None and the reason.

    Args: known, which is filled: runs whose files differ in their seeds alone are read once.
    """
    path = folder / FILE
    try:
        content, _ = files.read_small(path, most=_LARGEST)
    except FileNotFoundError:
        return None, "no config.yaml beside the rows, so its options are unknown"
    except OSError as error:
        return None, f"config.yaml: {error.strerror or error}"
    text = content.decode(errors="replace")
    key = re.sub(r"^#.*\n|^seeds:.*\n(?:- .*\n)*|^out:.*\n", "", text, flags=re.MULTILINE)
    if key not in known:
        try:
            known[key] = _compared(load_file(path))
        except (ConfigError, OSError) as error:
            return None, str(error)
    return known[key], ""


def _compared(config: Config) -> _Options:
    """The options of a run that differ from those of its preset, or from the defaults."""
    tree = config.model_dump(mode="json")
    against, base = f"preset {config.preset}", None
    if config.preset:
        try:
            base = _base(config.preset)
        except (ConfigError, OSError):
            against = f"the defaults, since there is no preset {config.preset}"
    if base is None:
        against = against if config.preset else "the defaults"
        kinds = {section: preset.at(tree, section) for section in preset.UNIONS}
        named = {f"{k}.{preset.UNIONS[k].key}": v[preset.UNIONS[k].key] for k, v in kinds.items()}
        base = sections(preset.nested(named), where="the defaults")
    mine, other = (dict(preset.leaves(x)) for x in (tree, base.model_dump(mode="json")))
    changed = []
    for option, value in mine.items():
        aside = any(option == name or option.startswith(f"{name}.") for name in ASIDE)
        if not aside and (option not in other or other[option] != value):
            before = preset.as_word(other[option]) if option in other else "not there"
            changed.append((option, preset.as_word(value), before))
    words = [config.preset or FILE]
    for option, value in ((name, mine[name]) for name, _, _ in changed):
        words += [f"--{option}", *_words(option, value)]
    return _Options(against, tuple(changed), tuple(words))


@cache
def _base(name: str) -> Config:
    return load(name)


def _words(option: str, value: Any) -> list[str]:
    """The value of an option as words of the command line; a list has a word for each entry."""
    if option == "env.kwargs":
        return [f"{key}={preset.as_word(part)}" for key, part in value]
    if isinstance(value, list | tuple):
        return [preset.as_word(part) for part in value]
    return [preset.as_word(value)]


def _command(found: _Options, seeds: Sequence[int]) -> str:
    words = ["cerl", "train", *found.words, "--seeds", *map(str, seeds)]
    return shlex.join(words)


def _entry(folder: Path) -> dict[str, Any]:
    """The newest entry of versions.yaml; empty if there is none that can be read."""
    try:
        entries = versions.read(folder / versions.FILE)
    except (ConfigError, OSError):
        return {}
    return dict(entries[-1]) if entries else {}
