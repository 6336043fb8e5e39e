"""Resolved configs of stored studies whose rows do not state their options: `configs.json`.

Rows of version 0.1 only hold a hash of the options of their run. A file `configs.json` in the run's
folder, or at most two folders above, lists the config of every run, as that version resolved it. A
config only counts if its hash, computed as that version did, is the one in the rows.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cerl.config import ConfigError
from cerl.config.convert import upgraded
from cerl.config.load import validated
from cerl.record import results

FILE = "configs.json"
ABOVE = 2  # how many folders above that of the run may hold the file
# Options that version 0.1 left out of its hash; later also `diverged` and the length of the run.
_ASIDE = ("preset", "seeds", "device", "threads", "out", "log")


class Stored(NamedTuple):
    """What `configs.json` says of a run."""

    options: dict[str, Any]  # `results.scoring` of its config, as this version calls them
    seeds_alone: bool  # evaluations of a seed did not depend on the seeds beside it


def find(file: Path, config_hash: str) -> Stored | None:
    """What the `configs.json` of a run says.

    Args:    file of the rows; config_hash, as in its rows.
    Returns: None if there is none, or if it does not have the run or cannot be read.
    """
    folders = file.parent, *file.parent.parents[:ABOVE]
    for path in (folder / FILE for folder in folders):
        try:
            if path.is_file():
                return _read(path, path.stat().st_mtime_ns).get(config_hash)
        except OSError:
            continue
    return None


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> dict[str, Stored]:
    """{config_hash of version 0.1: what is stored}, without entries that are not as they should be.

    Args: changed, when the file was, so that a changed file is read again.
    """
    found = {}
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for run in runs:
            known, tree = run["config_hash"], run["config"]
            if known in hashes(tree):
                whole = upgraded(_completed(tree), where=str(path))
                config = validated(whole, where=str(path))
                found[known] = Stored(results.scoring(config), bool(run["seeds_alone"]))
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found


def _completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the first days of version 0.1, which had no sequence networks, with what later
    ones say of its networks; later configs as they are."""
    return {
        **tree,
        "sequence": tree.get("sequence", {}),
        "net": {"encoder": "frames"} | tree["net"],
    }


def hashes(tree: Mapping[str, Any]) -> tuple[str, str]:
    """The two hashes that version 0.1 may have computed of a resolved config, with and without the
    length of the run. Args: tree, every option of the config."""
    whole = {key: value for key, value in tree.items() if key not in _ASIDE}
    later = {key: value for key, value in whole.items() if key != "diverged"}
    later["schedule"] = {k: v for k, v in tree["schedule"].items() if k != "steps"}
    texts = (json.dumps(part, sort_keys=True) for part in (whole, later))
    first, second = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts)
    return first, second
