"""Forks a run: makes a run that goes on from a checkpoint of another one, under other options.

The new folder holds a config.yaml that names the other run, and a checkpoint with its state and its
rows of replay, changed where the options ask for other members or another ring. `cerl train
--resume` does the rest, so a fork is a run like any other. The other run is only read.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cerl.config import Config, ConfigError, OriginConfig
from cerl.config.forks import forked
from cerl.config.numbers import human
from cerl.fork import members, rows
from cerl.record import archive, checkpoint, files, results, trust, versions
from cerl.record.checkpoint import Loaded, step_kept
from cerl.record.folder import (
    FILE,
    check_fixed,
    check_out,
    dump,
    fixed_hash,
    load_file,
    plain,
    unwritable,
)
from cerl.state import CheckpointError, Free, kind, match
from cerl.text import few, visible


class Found(NamedTuple):
    """A checkpoint in a run folder."""

    step: int  # agent steps of one seed that the run had done
    file: Path


def fork(
    source: Path,
    *,
    at: int,
    changes: Mapping[str, Any] | None = None,
    picked: Sequence[int] | None = None,
    trusted: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Makes the folder of a fork; `cerl.training.resume` trains it.

    Args:    source, folder of a run; at, agent steps of one seed after which to fork it; changes,
             new values of options by dotted key (`cerl.config.forks.FORKABLE`); picked, members of
             the run that stay, None: as many as ensemble.members says; trusted, also another user's
             run may import modules; note is called with what the user should know.
    Returns: the new folder, in `out` of the options.
    Raises:  ConfigError, CheckpointError or OSError; there is no new folder then.
    """
    parent = load_file(source / FILE)
    trust.check(parent, source, trusted=trusted)
    try:
        return _forked(source, parent, at, changes or {}, picked, note)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: the run has deleted it meanwhile, since there are newer ones; keep "
            f"such checkpoints: cerl train --resume {source} --log.keep STEPS"
        ) from error


def _forked(
    source: Path,
    parent: Config,
    at: int,
    changes: Mapping[str, Any],
    picked: Sequence[int] | None,
    note: Callable[[str], None],
) -> Path:
    loaded = at_step(source, parent, at)
    parts = ("learner", "watch", "collector", "logger")
    known = {
        key: loaded.state[key] for key in ("iteration", "config", *parts) if key in loaded.state
    }
    match({"iteration": 0, "config": "", **dict.fromkeys(parts, Free(_tree))}, known)
    check_fixed(source, loaded.state["config"], where=str(loaded.file))
    origin = OriginConfig(
        run=source.resolve().name,
        forked_at=loaded.state["iteration"] * parent.env.envs,
        options=results.config_hash(parent),
        checkpoint=_digest(loaded.file),
    )
    config, chosen, sentences = forked(parent, changes, origin=origin, members=picked)
    for sentence in sentences:
        note(sentence)
    check_out(config.out)
    return _made(source, parent, config, loaded, chosen)


def _tree(value: Any) -> str | None:
    return None if isinstance(value, dict) else f"expected a dict, got {kind(value)}"


def at_step(source: Path, parent: Config, at: int) -> Loaded:
    """The checkpoint of a run after so many agent steps; every byte of it is checked.

    With E environments it is that of the first iteration that reached the step.

    Raises: CheckpointError that says which checkpoints there are, if there is none, or no intact
            one.
    """
    envs = parent.env.envs
    wanted = -(-at // envs) * envs
    found, damaged = checkpoints(source, envs)
    own = [one.file for one in reversed(found) if one.step == wanted]
    for file in own:
        try:
            return checkpoint.load(file)
        except CheckpointError as error:
            damaged.append(str(error))
    steps = sorted({f"{one.step:,}" for one in found}, key=lambda text: (len(text), text))
    said = f"{source}: no checkpoint at agent step {at:,}" if not own else damaged.pop()
    there = f"there are checkpoints at {few(steps, most=20)}" if steps else "it has no checkpoint"
    more = f"; damaged: {'; '.join(damaged)}" if damaged else ""
    raise CheckpointError(
        f"{said}; {there}{more}. Only the newest two stay, and those of log.keep: cerl train "
        f"--resume {source} --log.keep STEPS keeps later ones"
    )


def checkpoints(source: Path, envs: int) -> tuple[list[Found], list[str]]:
    """The checkpoints of a run folder, oldest first, and a sentence on each that cannot be opened.

    Args: envs, E of the run.
    """
    found, damaged = [], []
    for file in checkpoint.files(source):
        step = step_kept(file)
        if not step:  # one of the newest two, whose name does not tell
            try:
                state, _ = archive.content(file, torch.device("cpu"))
            except CheckpointError as error:
                damaged.append(f"{file.name} is {error}")
                continue
            iteration = state.get("iteration")
            step = iteration * envs if type(iteration) is int else 0
        if step:
            found.append(Found(step, file))
    return found, damaged


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with files.read(file) as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _made(
    source: Path, parent: Config, config: Config, loaded: Loaded, picked: Sequence[int]
) -> Path:
    """Makes the folder under a temporary name and renames it, so that nobody sees half of it."""
    out = Path(config.out)
    words = plain(f"{config.preset or 'run'}-{config.env.name}-at-{human(config.origin.forked_at)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        fresh = files.temporary(out / words)
        fresh.mkdir()
    except OSError as error:
        raise unwritable("--out", out, error) from error
    try:
        _fill(fresh, source, parent, config, loaded, picked)
        folder = _named(fresh, out, f"{words}-{time.strftime('%Y%m%d-%H%M%S')}")
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    files.sync_folder(out)
    return folder


def _named(fresh: Path, out: Path, name: str) -> Path:
    """Gives a folder its name, with a number if that is taken."""
    for count in range(1, 10_000):
        folder = out / (name if count == 1 else f"{name}-{count}")
        if not os.path.lexists(folder):
            return fresh.rename(folder)
    raise FileExistsError(f"{out / name}: there are 9,999 folders of this name")


def _fill(
    folder: Path,
    source: Path,
    parent: Config,
    config: Config,
    loaded: Loaded,
    picked: Sequence[int],
) -> None:
    """Writes config.yaml, the first checkpoint with its rows, and empty tables."""
    dump(config, folder / FILE)
    identity, envs, count = fixed_hash(folder), parent.env.envs, parent.ensemble.members
    state = members.moved(loaded.state, parent, picked)
    held = loaded.replay
    if held is not None:
        to = rows.ring(held, rows=config.replay.capacity // envs)
        if "sampler" in state:
            sampler = rows.priorities(state["sampler"], held, to, envs=envs)
            state = {**state, "sampler": sampler}
        held = rows.taken(source, folder, held, to, picked=picked, count=count)
    # Scores of this step are owed, and rows that a stopped start has written of it do not count.
    scoring = results.scoring(config)
    code = results.hash_of(scoring)
    step = state["iteration"] * envs
    logger = {**state["logger"], "config_hash": code, "step": step - 1, "latest": {}}
    state = {**state, "config": identity, "recorded": False, "logger": logger}
    # Empty tables, so that nobody misses the rows of earlier steps, which the other run has.
    scores = {"options": scoring, "origin": config.origin}
    results.Rows(folder / "rows.parquet", results.ROWS, run=identity, **scores).flush()
    results.Rows(folder / "metrics.parquet", results.METRICS, run=identity).flush()
    _sessions(source, folder)
    checkpoint.save(folder, state, replay=held)


def _sessions(source: Path, folder: Path) -> None:
    """Copies the sessions of the run into versions.yaml, since the state depends on their versions;
    none if the file cannot be read."""
    try:
        entries = versions.read(source / versions.FILE)
    except (OSError, ConfigError):
        return
    name = visible(source.resolve().name)
    versions.write(folder, [{"run": name} | entry for entry in entries])
