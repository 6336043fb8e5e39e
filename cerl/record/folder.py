"""The folder of a run and its config.yaml, which is sealed: only options of `CHANGEABLE` change.

Everything that a resume, a sweep or a report wants to know of a run is read from its folder.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cerl.config import Config, ConfigError, preset, validated
from cerl.config.convert import upgraded
from cerl.record import files, seal
from cerl.text import visible

FILE = "config.yaml"  # of a run folder
# Options of a run that may change when it goes on, or groups of them: no part of what it is.
CHANGEABLE = ("schedule.steps", "log", "diverged", "device", "threads", "out")
CHANGEABLE_WORDS = "schedule.steps, log.*, diverged, device, threads or out"


def load_file(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """The Config that `dump` saved.

    Args:   changes of options of `CHANGEABLE`, by dotted key; they are not written.
    Raises: ConfigError, also if the file was changed or cut since.
    """
    path = Path(path)
    tree = _changed(_sealed(path), changes or {}, path)
    return validated(upgraded(tree, where=str(path)), where=str(path))


def change(folder: Path, changes: Mapping[str, Any]) -> Config:
    """Changes options of a run in its config.yaml; for the only writer of the folder.

    Args:   changes of options of `CHANGEABLE`, by dotted key.
    Raises: ConfigError, with nothing changed.
    """
    path = folder / FILE
    tree = _changed(_sealed(path), changes, path)
    config = validated(upgraded(tree, where=str(path)), where=str(path))
    if changes:
        # The file stays one of the version that wrote it: with its options, by their names then.
        files.write_text(path, _text(tree, path, own=seal.opened(path).own))
    return config


def _changed(tree: preset.Tree, changes: Mapping[str, Any], path: Path) -> preset.Tree:
    if other := [key for key in changes if not changeable(key)]:
        raise ConfigError(unchangeable(other, path))
    return preset.merged(tree, preset.nested(changes))


def unchangeable(keys: Sequence[str], path: Path) -> str:
    """A sentence that says which options of a run cannot change, and what to do instead."""
    return (
        f"{path}: {', '.join(keys)} cannot change in a run; expected one of {CHANGEABLE_WORDS}. "
        f"To train with other options start another run: cerl train {path} --{keys[0]} ..."
    )


def changeable(key: str) -> bool:
    """Whether an option, given by its dotted key, may change in a run."""
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def fixed(run: Config | Path) -> dict[str, str]:
    """The options of a run that may not change in it, as JSON by dotted key.

    Args:   run, or its folder: then those that its file states, so that a newer cerl with more
            options finds the same.
    Raises: ConfigError if the file was changed or cut.
    """
    tree = _sealed(run / FILE) if isinstance(run, Path) else run.model_dump(mode="json")
    found = {key: json.dumps(value, sort_keys=True) for key, value in preset.leaves(tree)}
    return {key: found[key] for key in sorted(found) if not changeable(key)}


def fixed_hash(run: Config | Path) -> str:
    """SHA-256 in hex digits of `fixed`, seeds included."""
    return hashlib.sha256(json.dumps(fixed(run), sort_keys=True).encode()).hexdigest()


def check_fixed(folder: Path, made: str | Mapping[str, str], *, where: str) -> None:
    """Whether what a file of a run folder holds was made by the run of its config.yaml.

    Args:   made, what the file says that it was made by: `fixed_hash`, or `fixed` itself; where,
            the file, for the message.
    Raises: ConfigError naming options that differ, as far as `made` tells.
    """
    own = fixed(folder)
    if made == own or made == fixed_hash(folder):
        return
    what = "another config.yaml"
    if not isinstance(made, str):
        different = [key for key in sorted({*own, *made}) if own.get(key) != made.get(key)]
        what = ", ".join(f"{key} {visible(str(made.get(key, 'none')))}" for key in different[:5])
        what += f" and {len(different) - 5} more" if len(different) > 5 else ""
        what += " (config.yaml: " + ", ".join(own.get(key, "none") for key in different[:5]) + ")"
    raise ConfigError(
        f"{where}: expected what the run of {folder / FILE} made, got that of {what}; put back the "
        "config.yaml that the run had"
    )


def dump(config: Config, path: str | os.PathLike[str]) -> None:
    """Saves every resolved option as YAML, sealed; `load_file` gives the same Config back."""
    path = Path(path)
    files.write_text(path, _text(config.model_dump(mode="json"), path))


def _text(tree: preset.Tree, path: Path, *, own: bool = True) -> str:
    head = f"# Every option of a run; `cerl train {path.name}` repeats it.\n"
    return seal.sealed(head + preset.written(tree), own=own)


def _sealed(path: Path) -> preset.Tree:
    """The options in a sealed file. Raises: ConfigError."""
    return preset.options(seal.opened(path).text, where=str(path))


def new_folder(config: Config) -> Path:
    """A new run folder below `config.out`, with config.yaml in it.

    Raises: ConfigError if none can be made there.
    """
    words = re.sub(r"[^\w.+-]+", "-", f"{config.preset or 'run'}-{config.env.name}")
    # A file system takes names of 255 bytes.
    plain = words.encode()[:150].decode(errors="ignore").lstrip(".-")
    name = f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = _made(out, name)
        dump(config, folder / FILE)
        files.sync_folder(out)
    except (OSError, ValueError) as error:
        raise unwritable("--out", config.out, error) from error
    return folder


def _made(out: Path, name: str) -> Path:
    """A new folder in `out`, numbered where the name is taken. Raises: OSError."""
    for count in itertools.count(1):
        folder = out / (name if count == 1 else f"{name}-{count}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always another number")


def check_out(out: str | os.PathLike[str], *, option: str = "--out") -> None:
    """Finds out early whether a folder can be made and written to. Raises: ConfigError."""
    try:
        path = Path(out).absolute()
        while not os.path.lexists(path):
            path = path.parent
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path} is no folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{path} cannot be written to")
    except (OSError, ValueError) as error:
        raise unwritable(option, out, error) from error


def unwritable(
    option: str, out: str | os.PathLike[str], error: OSError | ValueError
) -> ConfigError:
    """A ConfigError that says why the folder of an option cannot be made or written to."""
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return ConfigError(
        f"{option}: expected a folder that can be made and written to, got {str(out)!r} ({reason})"
    )
