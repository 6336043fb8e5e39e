"""Runs of CleanRL: its TensorBoard events, as result rows of training episodes.

CleanRL's scripts log the return of every training episode (`charts/episodic_return`) against the
agent steps of all of their environments together (`global_step`), and no evaluations. Episodes of
two seeds end at different steps, so each row is the mean over the episodes that ended in one window
of steps. Source: https://github.com/vwxyzjn/cleanrl.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cerl.exchange.foreign import FRAMES, LogError, Run, env_name
from cerl.record import files

PROGRAM = "cleanrl"
RETURN, LENGTH = "charts/episodic_return", "charts/episodic_length"
SETTINGS = "hyperparameters/text_summary"  # a Markdown table of the script's arguments
# Arguments of CleanRL's scripts that do not change what is trained, or that rows state otherwise.
ASIDE = (
    *("seed", "exp_name", "env_id", "total_timesteps", "torch_deterministic", "cuda", "track"),
    *("wandb_project_name", "wandb_entity", "capture_video", "save_model", "upload_model"),
    *("hf_entity",),
)


class Log(NamedTuple):
    """What the events of one run say."""

    folder: Path
    env: str  # as CleanRL calls it
    script: str  # exp_name, by default the name of the script
    seed: int
    settings: dict[str, str]
    steps: np.ndarray  # [episodes] int64, agent steps at the end of every training episode
    returns: np.ndarray  # [episodes]
    lengths: np.ndarray  # [episodes], NaN where unknown
    seconds: np.ndarray  # [episodes], since the first event
    end: int  # agent steps that the run trained for


def logs(folder: Path) -> tuple[list[Log], list[str]]:
    """The logs of all runs in or below a folder, and notes on those that cannot be read."""
    found, notes = [], []
    for own in sorted({path.parent for path in folder.rglob("*.tfevents.*")}):
        try:
            log, said = _log(own, folder)
        except (LogError, OSError) as error:
            notes.append(f"{error}; left out")
            continue
        found.append(log)
        notes += said
    return found, notes


def runs(found: Sequence[Log], *, every: int = 0) -> tuple[list[Run], list[str]]:
    """Result rows of the logs, and notes.

    A window in which no episode ended has no row, and neither has one that the run did not finish.

    Args: every, agent steps of a window; 0: about a hundredth of the longest run of a script on an
          environment, rounded up to 1, 2 or 5 times a power of ten.
    """
    ends: dict[tuple[str, str], int] = {}
    for log in found:
        key = log.env, log.script
        ends[key] = max(ends.get(key, 0), log.end)
    out, notes = [], []
    for log in found:
        window = every or rounded_up(ends[log.env, log.script] / 100)
        rows = list(_rows(log, window))
        if not rows:
            notes.append(
                f"{log.folder}: no training episode ended in a whole window of {window:,} agent "
                "steps; left out"
            )
            continue
        settings = {key: value for key, value in log.settings.items() if key not in ASIDE}
        method = f"{PROGRAM} {log.script}"
        env = env_name(log.env)
        out.append(Run(log.folder, PROGRAM, method, log.script, env, 1, settings, rows))
    return out, notes


def rounded_up(number: float) -> int:
    """The least number from 1, 2, 5, 10, 20, 50, ... that is not below `number`."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= number:
                return factor * unit
        unit *= 10


def _rows(log: Log, window: int) -> Iterator[dict[str, Any]]:
    """A row for each window of agent steps in which an episode ended."""
    frames = FRAMES if env_name(log.env).startswith("atari/") else 1
    # The last event comes some steps before the end of a run, so a window counts as finished if the
    # run got through nine tenths of it.
    last = int(log.end / window + 0.1)
    windows = -(-log.steps // window)  # window k holds the steps after (k - 1) window, to k window
    for k in np.unique(windows[(windows >= 1) & (windows <= last)]):
        own = windows == k
        returns, lengths = log.returns[own], log.lengths[own]
        step = int(k) * window
        yield {
            "seed": log.seed,
            "member": 0,
            "role": "member",
            "policy": "train",
            "step": step,
            "frames": frames * step,
            "real_steps": step,
            "episodes": int(own.sum()),
            "return": float(returns.mean()),
            "return_std": float(returns.std()),
            "length": None if np.isnan(lengths).any() else float(lengths.mean()),
            "wall_seconds": float(log.seconds[own].max()),
        }


def _log(folder: Path, top: Path) -> tuple[Log, list[str]]:
    """The log of one run. Args: folder, with its events; top, the folder that was asked for."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore

    values: dict[str, list[tuple[int, float, float]]] = {RETURN: [], LENGTH: []}
    settings: dict[str, str] = {}
    notes, first, end = [], None, 0
    for path in sorted(folder.glob("*.tfevents.*")):
        events, damage = _records(path)
        if damage:
            notes.append(f"{path}: {damage}; what comes before counts")
        for record in events:
            try:
                event = Event.FromString(record)
            except Exception as error:  # protobuf's own class, which depends on its back end
                notes.append(f"{path}: an event cannot be read ({type(error).__name__}); left out")
                continue
            first = event.wall_time if first is None else min(first, event.wall_time)
            for value in event.summary.value:
                end = max(end, event.step)
                if value.tag in values:
                    number = value.simple_value
                    if value.HasField("tensor"):
                        number = next(iter(value.tensor.float_val), float("nan"))
                    values[value.tag].append((event.step, number, event.wall_time))
                elif value.tag == SETTINGS and value.tensor.string_val:
                    text = value.tensor.string_val[0].decode(errors="replace")
                    settings = dict(re.findall(r"^\|(\w+)\|(.*)\|$", text, re.MULTILINE))
                    settings.pop("param", None)
    if not values[RETURN]:
        raise LogError(f"{folder}: no {RETURN} among its events, which CleanRL's scripts log")
    env, script, seed = _named(folder, top, settings)
    ordered = sorted(values[RETURN], key=lambda entry: entry[0])
    steps, returns, times = map(np.array, zip(*ordered, strict=True))
    lengths = np.full(len(steps), np.nan)
    if len(values[LENGTH]) == len(steps):
        lengths = np.array([entry[1] for entry in sorted(values[LENGTH], key=lambda e: e[0])])
    seconds = times - (first or 0.0)
    total = settings.get("total_timesteps", "")
    # Nothing need be logged after the last episode that ended, so a run that got to within an
    # episode of its planned steps has trained for all of them.
    if total.isdigit() and int(total) - end <= int(np.diff(steps, prepend=0).max()):
        end = max(end, int(total))
    return Log(folder, env, script, seed, settings, steps, returns, lengths, seconds, end), notes


def _named(folder: Path, top: Path, settings: dict[str, str]) -> tuple[str, str, int]:
    """The environment, script and seed of a run: from its arguments, else from the name of its
    folder, ENV__SCRIPT__SEED__TIME. A slash in ENV, as in ALE/Pong-v5, is a folder above it."""
    inside = folder.relative_to(top) if folder != top else Path(folder.name)
    env, script, seed, *_ = [*inside.as_posix().split("__"), "", "", ""][:4]
    env = settings.get("env_id") or env
    script = settings.get("exp_name") or script
    seed = settings.get("seed") or seed
    if not (env and script and re.fullmatch(r"\d+", seed)):
        raise LogError(
            f"{folder}: expected events with CleanRL's arguments, or a folder called "
            "ENV__SCRIPT__SEED__TIME; got neither"
        )
    return env, script, int(seed)


def _records(path: Path) -> tuple[list[bytes], str]:
    """The records of a file of events up to the first damaged one, and what is wrong with that.

    A record is its length (8 bytes), a checksum of that, the content, and a checksum of that.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with files.read(path) as file:
        content = file.read()
    found, place = [], 0
    while place < len(content):
        head = content[place : place + 12]
        if len(head) < 12:
            return found, "its last record is cut off"
        length, check = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != check:
            return found, f"damaged at byte {place:,}: a checksum does not agree"
        own = content[place + 12 : place + 16 + length]
        if len(own) < length + 4:
            return found, "its last record is cut off"
        if masked_crc32c(own[:length]) != struct.unpack("<I", own[length:])[0]:
            return found, f"damaged at byte {place:,}: a checksum does not agree"
        found.append(own[:length])
        place += 16 + length
    return found, ""
