"""Makes run folders, and reads and writes their config.yaml.

That file is sealed: its last line is a hash of the rest, so that edits are noticed. Only the
options of `CHANGEABLE` can change in an existing run. Resume, sweep and report learn everything
about a run from its folder.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cerl.config import Config, ConfigError, preset, validated
from cerl.config.convert import upgraded
from cerl.record import files, seal
from cerl.text import few, visible

FILE = "config.yaml"  # of a run folder
# Options, or groups of options, that may change when a run is resumed.
CHANGEABLE = ("schedule.steps", "log", "diverged", "device", "threads", "out")
CHANGEABLE_WORDS = "schedule.steps, log.*, diverged, device, threads or out"


def load_file(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """The Config in a sealed config.yaml.

    Args:   path of the file; changes, new values of options of `CHANGEABLE` by dotted key, which
            are applied but not written to the file.
    Raises: ConfigError, also if the file was edited or is incomplete.
    """
    path = Path(path)
    tree = _changed(_sealed(path), changes or {}, path)
    return validated(upgraded(tree, where=str(path)), where=str(path))


def change(folder: Path, changes: Mapping[str, Any]) -> Config:
    """Changes options of a run in its config.yaml; only for the writer of the folder.

    Args:    changes, new values of options of `CHANGEABLE` by dotted key.
    Returns: the new Config.
    Raises:  ConfigError; nothing is written then.
    """
    path = folder / FILE
    tree = _changed(_sealed(path), changes, path)
    config = validated(upgraded(tree, where=str(path)), where=str(path))
    if changes:
        # A file of version 0.1 keeps the option names of that version, since hashes in the
        # checkpoints and tables of the run depend on them.
        files.write_text(path, _text(tree, path, own=seal.opened(path).own))
    return config


def _changed(tree: preset.Tree, changes: Mapping[str, Any], path: Path) -> preset.Tree:
    if other := [key for key in changes if not changeable(key)]:
        raise ConfigError(unchangeable(other, path))
    return preset.merged(tree, preset.nested(changes))


def unchangeable(keys: Sequence[str], path: Path) -> str:
    """The error message for options that cannot change in a run. Args: path of its config.yaml."""
    return (
        f"{path}: {', '.join(keys)} cannot change in a run; expected one of {CHANGEABLE_WORDS}. "
        f"To train with other options start another run: cerl train {path} --{keys[0]} ..."
    )


def changeable(key: str) -> bool:
    """Whether an option, given by its dotted key, may change in a run."""
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def fixed(run: Config | Path) -> dict[str, str]:
    """The options of a run that cannot change, as JSON texts by dotted key.

    Args:   run, a Config, or a run folder: then only options that are in its config.yaml count, so
            that a newer version of cerl with more options gets the same result.
    Raises: ConfigError if the file was edited or is incomplete.
    """
    tree = _sealed(run / FILE) if isinstance(run, Path) else run.model_dump(mode="json")
    found = {key: json.dumps(value, sort_keys=True) for key, value in preset.leaves(tree)}
    return {key: found[key] for key in sorted(found) if not changeable(key)}


def fixed_hash(run: Config | Path) -> str:
    """SHA-256 (hex digits) of `fixed`: identifies the configuration of a run, with its seeds."""
    return hashlib.sha256(json.dumps(fixed(run), sort_keys=True).encode()).hexdigest()


def check_fixed(folder: Path, made: str | Mapping[str, str], *, where: str) -> None:
    """Checks that a file in a run folder was made with the folder's config.yaml.

    Args:   made, the configuration that the file says it was made with: `fixed_hash` of it, or
            `fixed` itself; where, what error messages call the file.
    Raises: ConfigError if it was made with another one; names the options that differ if `made`
            has them.
    """
    own = fixed(folder)
    if made == own or made == fixed_hash(folder):
        return
    what = "another config.yaml"
    if not isinstance(made, str):
        different = [key for key in sorted({*own, *made}) if own.get(key) != made.get(key)]
        what = few([f"{key} {visible(str(made.get(key, 'none')))}" for key in different])
        what += " (config.yaml: " + ", ".join(own.get(key, "none") for key in different[:5]) + ")"
    raise ConfigError(
        f"{where}: expected a file made with {folder / FILE}, but it was made with {what}; put "
        "back the config.yaml that the run had"
    )


def dump(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes all options as a sealed YAML file; `load_file` reads the same Config back."""
    path = Path(path)
    files.write_text(path, _text(config.model_dump(mode="json"), path))


def _text(tree: preset.Tree, path: Path, *, own: bool = True) -> str:
    head = f"# Every option of a run; `cerl train {path.name}` repeats it.\n"
    return seal.sealed(head + preset.written(tree), own=own)


def _sealed(path: Path) -> preset.Tree:
    """The options in a sealed file. Raises: ConfigError."""
    return preset.options(seal.opened(path).text, where=str(path))


def new_folder(config: Config) -> Path:
    """Makes a new run folder in `config.out` and writes config.yaml into it.

    Raises: ConfigError if it cannot be made.
    """
    words = plain(f"{config.preset or 'run'}-{config.env.name}")
    name = f"{words}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = _made(out, name)
        dump(config, folder / FILE)
        files.sync_folder(out)
    except (OSError, ValueError) as error:
        raise unwritable("--out", config.out, error) from error
    return folder


def plain(words: str) -> str:
    """Words as a part of the name of a folder: letters, digits and `_.+-`, at most 150 bytes.

    File systems take names of up to 255 bytes, so there is room for a time and a number.
    """
    return re.sub(r"[^\w.+-]+", "-", words).encode()[:150].decode(errors="ignore").strip(".-")


def appear(folder: Path, config: Config) -> None:
    """Makes a run folder that holds only config.yaml; `cerl train --resume` starts its run.

    The folder is made under a temporary name and renamed, so nobody sees it without config.yaml.

    Raises: OSError, also if a folder of that name exists and is not empty.
    """
    fresh = files.temporary(folder)
    fresh.mkdir()
    try:
        dump(config, fresh / FILE)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _made(out: Path, name: str) -> Path:
    """Makes a new folder in `out`; appends a number if the name is taken. Raises: OSError."""
    for count in itertools.count(1):
        folder = out / (name if count == 1 else f"{name}-{count}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always another number")


def check_out(out: str | os.PathLike[str], *, option: str = "--out") -> None:
    """Checks early that a folder can be made and written to.

    Args:   option that names the folder, for the error message.
    Raises: ConfigError.
    """
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
