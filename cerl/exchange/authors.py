"""Logs of the code of Lin et al. 2024 (arXiv:2405.04342), as result rows.

Its continuous part writes `SEED_stats.json` and `SEED.txt` for each seed of a run into one folder,
its discrete part `stats.json` for its only seed, both beside `config.json`. All hold evaluations:
- the aggregate (`avg`: mean of sampled actions; `Vote`): policy mean or vote;
- the individual score, of a member drawn for each episode (`random`, `Random`): policy random, or
  individual where there is one member only;
- in a tandem, the active and the passive member.
Source: https://github.com/zhixuan-lin/ensemble-rl-continuous and .../ensemble-rl-discrete.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cerl.exchange.foreign import FRAMES, LogError, Run, env_name
from cerl.record import files
from cerl.text import visible

PROGRAM = "authors"
LARGEST = 1 << 28  # bytes of a log
ITERATION = 250_000  # agent steps of an iteration of the discrete part, where config.json is silent
# Settings that do not change what is trained, or that rows state otherwise.
ASIDE = (
    *("seed", "env_name", "save_dir", "exp", "tags", "notes", "tqdm", "max_steps", "base_dir"),
    *("log_interval", "save_video", "save_checkpoint", "checkpoint_interval"),
    *("resume_checkpoint", "wandb", "wandb_project", "resume", "gin_files", "gin_bindings"),
    *("log_dir", "logtostderr", "alsologtostderr", "verbosity", "v"),
)
# How scores are called in both parts: (policy, role, member) of result rows, key.
CONTINUOUS = {
    ("random", "random", -1): "random/return",
    ("mean", "aggregate", -1): "avg/return",
    ("individual", "active", 0): "active/return",
    ("individual", "passive", 1): "passive/return",
}
DISCRETE = {
    ("random", "random", -1): "Eval/Random",
    ("vote", "aggregate", -1): "Eval/Vote",
    ("individual", "active", 0): "Eval/Active",
    ("individual", "passive", 1): "Eval/Passive",
}


def runs(folder: Path, *, env: str = "") -> tuple[list[Run], list[str]]:
    """The runs in or below a folder, and notes on logs that cannot be read.

    Args: env, the environment where config.json does not say it, as the column `env` of rows.
    """
    found, notes = [], []
    stats = re.compile(r"(\d+_)?stats\.json|\d+\.txt")
    paths = sorted(path for path in folder.rglob("*") if stats.fullmatch(path.name))
    for own in dict.fromkeys(path.parent for path in paths):
        if "archive" in own.relative_to(folder).as_posix():
            continue  # the discrete part moves the logs of an earlier run there
        logs = [path for path in paths if path.parent == own]
        try:
            run, said = _run(own, logs, env)
        except (LogError, OSError) as error:
            notes.append(f"{error}; left out")
            continue
        found.append(run)
        notes += said
    return found, notes


def _run(folder: Path, logs: Sequence[Path], env: str) -> tuple[Run, list[str]]:
    """One run. Args: logs, its files; env, see `runs`."""
    notes: list[str] = []
    path = folder / "config.json"
    config = _read(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise LogError(f"{path}: expected a JSON object, got {type(config).__name__}")
    discrete = any(log.name == "stats.json" for log in logs)
    name = env or _env(config, discrete=discrete)
    if not name:
        raise LogError(
            f"{path}: {'no name of an environment' if config else 'no such file'}, and the logs do "
            "not say which environment they are of; pass --env, e.g. --env atari/Pong"
        )
    read: list[tuple[int, list[dict[str, Any]], Path]] = []
    for log in logs:
        if log.suffix == ".txt" and log.with_name(f"{log.stem}_stats.json") in logs:
            continue  # the other file has the same scores, and more
        try:
            entries = _text(log) if log.suffix == ".txt" else _entries(log)
            read.append((_seed(log, config), entries, log))
        except (LogError, OSError) as error:
            notes.append(f"{error}; left out")
    if not read:
        raise LogError(f"{folder}: no log that can be read ({'; '.join(notes)})")
    members, tandem, kind, agent = _kind(config, [e for _, own, _ in read for e in own], discrete)
    rows: list[dict[str, Any]] = []
    for seed, entries, log in read:
        if log.suffix == ".txt" and not config:
            notes.append(f"{log}: no config.json says whose returns these are; left out")
            continue
        make = _discrete if discrete else _continuous
        own = list(make(entries, config, members, tandem))
        if not own:
            notes.append(f"{log}: no evaluation in it; left out")
        rows += [{"seed": seed, **row} for row in own]
    if not rows:
        raise LogError(f"{folder}: no evaluations in its logs ({'; '.join(notes)})")
    settings = {key: value for key, value in sorted(config.items()) if key not in ASIDE}
    for key, values in settings.items():
        if isinstance(values, dict):
            settings[key] = {k: v for k, v in values.items() if k != "game_name"}
    return Run(folder, PROGRAM, f"{PROGRAM} {kind}", agent, name, members, settings, rows), notes


def _read(path: Path) -> Any:
    """The content of a JSON file. Raises: LogError if it is damaged."""
    content, _ = files.read_small(path, most=LARGEST)
    try:
        return json.loads(content)
    except ValueError as error:
        raise LogError(f"{path}: damaged, not readable as JSON ({error})") from error


def _entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a log: what was logged at one step or iteration each."""
    found = _read(path)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise LogError(f"{path}: expected a JSON list of objects, one for each evaluation")
    return found


def _text(path: Path) -> list[dict[str, Any]]:
    """The entries of a `SEED.txt`: lines of a step and a return, that of the aggregate or, in a
    tandem, of the active member."""
    content, _ = files.read_small(path, most=LARGEST)
    found = []
    for k, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        try:
            step, value = line.split()
            found.append({"step": int(step), "return": float(value)})
        except ValueError as error:
            raise LogError(
                f"{path}, line {k}: expected a step and a return, got {visible(line[:60])!r}"
            ) from error
    return found


def _seed(log: Path, config: Mapping[str, Any]) -> int:
    """The seed of a log: from its name, or that of config.json."""
    if match := re.match(r"(\d+)(_stats)?\.", log.name):
        return int(match[1])
    seed = str(config.get("seed", 0))
    if not seed.isdigit():
        raise LogError(f"{log}: expected a seed in config.json, got {visible(seed)}")
    return int(seed)


def _setting(config: Mapping[str, Any], section: str, name: str, default: Any) -> Any:
    """A setting of the discrete part, whose config.json has a section for each class or function,
    under its dotted path with dashes."""
    for key, values in config.items():
        if key.rpartition("-")[2] == section and isinstance(values, dict) and name in values:
            return values[name]
    return default


def _env(config: Mapping[str, Any], *, discrete: bool) -> str:
    """The environment of a run as the column `env`; "" if it is unknown."""
    if discrete:
        game = _setting(config, "create_atari_environment", "game_name", "")
        return f"atari/{game}" if game else ""
    name = str(config.get("env_name") or "")
    if not name:
        return ""
    # What is not called like a task of gym, e.g. Hopper-v4, is a task of dm_control there.
    return env_name(name) if re.search(r"-v\d+$", name) else f"dmc/{name}"


def _kind(
    config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], discrete: bool
) -> tuple[int, bool, str, str]:
    """The number of members, whether they are a tandem, what to call the method, and the agent."""
    keys = {key for entry in entries for key in entry}
    told = [re.search(r"(?:random/return|ByAgent/AverageReturns)_(\d+)$", key) for key in keys]
    seen = 1 + max((int(match[1]) for match in told if match), default=0)
    tandem = any(key.lower().startswith(("active/", "eval/active")) for key in keys)
    if discrete:
        section = "JaxBootDQNAgent"
        agent = str(_setting(config, "create_agent_custom", "agent_name", "boot_dqn"))
        agent = "quantile" if "quantile" in agent else "dqn"
        section = "JaxBootQuantileAgent" if agent == "quantile" else section
        members = int(_setting(config, section, "ensemble_size", seen))
        cerl = _setting(config, section, "aux_loss", "none") == "final"
        names = {"dqn": ("ddqn", "bootdqn"), "quantile": ("quantile", "bootquantile")}[agent]
    else:
        agent, names = "sac", ("sac", "ensemble")
        members = int(config.get("n") or seen)
        cerl, tandem = bool(config.get("cel")), tandem or bool(config.get("tandem"))
    members = 2 if tandem else members
    kind = "tandem" if tandem else "cerl" if cerl else names[members > 1]
    return members, tandem, kind, agent


def _places(
    table: Mapping[tuple[str, str, int], str], members: int, tandem: bool
) -> dict[tuple[str, str, int], str]:
    """Which scores a run has, as `CONTINUOUS` and `DISCRETE`. With one member there are copies."""
    if members == 1:
        return {("individual", "member", 0): table["random", "random", -1]}
    return {place: key for place, key in table.items() if tandem == (place[0] == "individual")}


def _continuous(
    entries: Sequence[Mapping[str, Any]], config: Mapping[str, Any], members: int, tandem: bool
) -> Iterator[dict[str, Any]]:
    """Rows of the continuous part."""
    places = _places(CONTINUOUS, members, tandem)
    episodes = int(config.get("eval_episodes") or 30)
    # `return` is the score of the aggregate, or that of the only or the active member.
    whole = ("individual", "active", 0) if tandem else ("mean", "aggregate", -1)
    whole = whole if members > 1 else ("individual", "member", 0)
    for entry in entries:
        for (policy, role, member), key in places.items():
            value = entry.get(key)
            if value is None and (policy, role, member) == whole:
                value = entry.get("return")
            if isinstance(value, int | float) and isinstance(entry.get("step"), int):
                step = {"step": entry["step"], "frames": entry["step"]}
                step["real_steps"] = entry["step"]
                who = {"policy": policy, "role": role, "member": member}
                yield {**who, **step, "return": float(value), "episodes": episodes}


def _discrete(
    entries: Sequence[Mapping[str, Any]], config: Mapping[str, Any], members: int, tandem: bool
) -> Iterator[dict[str, Any]]:
    """Rows of the discrete part, whose iterations count from 1 and are of so many agent steps each
    (and at most an episode more)."""
    places = _places(DISCRETE, members, tandem)
    length = int(_setting(config, "Runner", "training_steps", ITERATION))
    for entry in entries:
        for (policy, role, member), key in places.items():
            value, number = entry.get(f"{key}/AverageReturns"), entry.get("iteration")
            if isinstance(value, int | float) and isinstance(number, int) and number > 0:
                step = number * length
                who = {"policy": policy, "role": role, "member": member}
                clock = {"step": step, "frames": FRAMES * step, "real_steps": step}
                episodes = int(entry.get(f"{key}/NumEpisodes") or 1)
                yield {**who, **clock, "return": float(value), "episodes": episodes}
