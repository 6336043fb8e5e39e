"""The plan of a sweep, `plan.json` in the sweep's folder OUT: its runs, their numbers and names.

A plan only names things. What a run trains stands in the config.yaml of its folder, and the folder
decides where the two disagree, so a lost plan can be made anew from the run folders. Plans are made
and written by `cerl/sweep/planning.py`.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from cerl.config import ConfigError
from cerl.record import files
from cerl.text import visible

FILE = "plan.json"  # in the folder of a sweep
FORMAT = 1  # of that file
_LARGEST = 1 << 26  # most bytes of a plan
# Types of the entries of a run in the file.
_KINDS: dict[str, type] = {
    **dict.fromkeys(("folder", "preset", "env", "label", "cell"), str),
    **dict.fromkeys(("number", "steps"), int),
    "seeds": list,
    "varied": dict,
}


class PlannedRun(NamedTuple):
    """A run of a sweep."""

    number: int  # from 1; never given to another run of the same folder OUT
    folder: str  # name of the run folder inside OUT
    preset: str
    env: str  # family/name, as in result rows
    label: str  # what tells the run's setting from others of the sweep
    seeds: tuple[int, ...]
    steps: int  # length, agent steps of one seed
    cell: str  # `cerl.record.results.config_hash`
    varied: dict[str, Any]  # the options of the sweep's axes, by dotted key


class Plan(NamedTuple):
    """All runs of a sweep's folder, those asked for earlier included, by number."""

    study: str  # "" if the presets were given by name
    options: dict[str, Any]  # of every run, by dotted key; those that may change are left out
    runs: tuple[PlannedRun, ...]


def read(out: Path) -> Plan | None:
    """The plan in a folder; None if there is none.

    Raises: ConfigError if it is damaged or was written by a newer version.
    """
    found = content(out)
    return parsed(found, out / FILE) if found else None


def content(out: Path) -> bytes:
    """The content of plan.json; empty if there is no such file. Raises: ConfigError."""
    path = out / FILE
    if not os.path.lexists(path):
        return b""
    try:
        return files.read_small(path, most=_LARGEST)[0] or b" "
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def parsed(found: bytes, path: Path) -> Plan:
    """The plan in the content of plan.json.

    Args:   path of the file, for error messages.
    Raises: ConfigError if it is damaged or was written by a newer version.
    """
    try:
        tree = json.loads(found)
        if isinstance(form := tree["format"], int) and form > FORMAT:
            raise ConfigError(
                f"{path}: expected format {FORMAT}, got {form}: a newer version of cerl wrote it; "
                "use that version, or another folder"
            )
        runs = tuple(_run(entry) for entry in tree["runs"])
        for name in ("number", "folder"):
            for value, count in Counter(getattr(run, name) for run in runs).items():
                if count > 1:
                    raise ValueError(f"{count} runs have the {name} {value}")
        return Plan(_typed(tree, "study", str), dict(_typed(tree, "options", dict)), runs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"no key {error}" if isinstance(error, KeyError) else visible(str(error))
        raise ConfigError(
            f"{path}: damaged ({what}); delete it: the next `cerl sweep` into this folder makes it "
            "anew from the run folders"
        ) from error


def _run(entry: Any) -> PlannedRun:
    """A run of a plan. Raises: ValueError, KeyError or TypeError if it is damaged."""
    found = {name: _typed(entry, name, kind) for name, kind in _KINDS.items()}
    name, seeds = found["folder"], tuple(found["seeds"])
    if name in ("", ".", "..") or "/" in name or os.sep in name or "\0" in name:
        raise ValueError(f"expected the name of a folder, got {name!r}")
    if not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{name}: expected whole numbers as seeds, got {list(seeds)}")
    return PlannedRun(**{**found, "seeds": seeds})


def _typed(tree: Any, name: str, kind: type) -> Any:
    """An entry of a mapping. Raises: ValueError or KeyError if it is missing or of another type."""
    value = tree[name]
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def text(plan: Plan) -> str:
    """The content of plan.json: JSON with a line for each run."""
    head = {"format": FORMAT, "study": plan.study, "options": plan.options}
    lines = ",\n".join(json.dumps(run._asdict()) for run in plan.runs)
    return f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n'
