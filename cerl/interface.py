"""The interface from Python (docs/python.md): `cerl.train`, `cerl.resume` and `cerl.load`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cerl import config as options
from cerl import training
from cerl.config import Config
from cerl.policy import load as load
from cerl.terminal import note


def train(config: Config | str, overrides: Mapping[str, Any] | None = None) -> Path:
    """Trains a population from the start.

    Args:    config, or the name of a preset or path of a YAML file; then overrides are options that
             differ from it, nested or with dotted keys: {"seeds": [0, 1], "schedule.steps": 2_000}.
             An option of the preset that they make idle returns to its default, with a note on
             stderr.
    Returns: the run folder, a new one in the folder `out` of the config.
    Raises:  ConfigError if the options cannot be read or contradict each other; RuntimeError if the
             run does not fit into memory; Stopped (a KeyboardInterrupt) if it was told to stop, and
             saved.
    """
    if isinstance(config, str):
        return training.train(options.load(config, overrides, note=note))
    if overrides:
        raise ValueError("overrides: expected with the name of a preset, got them with a Config")
    return training.train(config)


def resume(
    run: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> Path:
    """Resumes a run from the newest intact checkpoint in its folder and trains it to its end.

    Without any checkpoint it starts anew. A resumed run equals an uninterrupted one to the bit, if
    the state of its simulators can be saved.

    Args:    run, its folder; changes, new values of those options that may change in a run, by
             dotted key: {"schedule.steps": 2_000} trains a finished run longer; trusted, the run
             may import a module even if it is somebody else's (as --trust).
    Returns: the run folder.
    Raises:  ValueError if nothing is left to do, or another process trains the run; otherwise as
             `train`.
    """
    return training.resume(Path(run), changes=changes, trusted=trusted)
