"""The state of every run of a sweep, read from its run folders alone.

Nothing is asked of the processes that train, and nothing is written, so the state can be read from
another machine on a shared file system, and without permission to write. Only whether a run waits
in the queue of SLURM is asked of SLURM, if the sweep has submitted jobs. This module imports
neither torch nor matplotlib, and reads a thousand run folders in less than a second.
"""

import hashlib
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from cerl.config import ConfigError, labels, preset
from cerl.record import failure, files, heartbeat
from cerl.record.finished import FILE as FINISHED
from cerl.record.finished import finished
from cerl.record.folder import FILE, changeable
from cerl.record.lock import trained
from cerl.sweep import plan, slurm_queue
from cerl.sweep.plan import PlannedRun
from cerl.text import few, visible

State = Literal["done", "running", "queued", "waiting", "stopped", "failed"]
_APART = ("done", "running")  # states that do not depend on SLURM's queue
_LARGEST = 1 << 20  # most bytes of a config.yaml that is read
_CHECKPOINT = re.compile(r"checkpoint-\d+\.pt")


class RunState(NamedTuple):
    """The state of one run."""

    run: PlannedRun  # its number is 0 if it is in no plan
    state: State
    step: int  # agent steps of one seed so far
    steps: int  # those of the whole run
    left: float  # seconds until the run ends, NaN if unknown
    device: str  # on which it trains or trained last, "" if unknown
    host: str  # name of the machine of that device
    error: str  # why it failed or stands still, "" otherwise; it may have several lines
    rate: float = math.nan  # agent steps of one seed per second, when last measured
    out: str = ""  # the folder that the run folder is in


def states(out: Path) -> list[RunState]:
    """The states of all runs of a folder: planned ones by number, then the others by name.

    Args:   out, the folder of a sweep or of `cerl train --out`, or a single run folder.
    Raises: ConfigError if there is no run, or if its plan is damaged.
    """
    if not out.is_dir():
        raise ConfigError(f"{out}: expected a folder with runs, got no folder")
    planned = plan.read(out)
    runs = [] if planned is None else [*planned.runs]
    runs += _unplanned(out, {run.folder for run in runs}, alone=planned is None)
    if not runs:
        raise ConfigError(
            f"{out}: expected a folder with runs (of `cerl sweep --out` or `cerl train --out`), "
            f"or a run folder; there is no run in it{_below(out)}"
        )
    now, host = time.time(), platform.node()
    found = [_state(run, out, now=now, host=host) for run in runs]
    queued = slurm_queue.of_runs(out) if any(one.state not in _APART for one in found) else {}
    return [_in_queue(one, queued.get(one.run.number)) for one in found]


def _in_queue(one: RunState, task: slurm_queue.Queued | None) -> RunState:
    """The state of a run that does not train, if it is in SLURM's queue: with SLURM's reason."""
    if task is None or one.state in _APART or task.state in slurm_queue.ENDING:
        return one
    why = f"{task.state.lower()} in SLURM, job {task.job.job}_{task.task}"
    if task.state == "RUNNING":
        why = f"job {task.job.job}_{task.task} of SLURM runs, and the run starts up or waits there"
    elif task.reason not in ("", "None"):
        why += f" ({task.reason})"
    return one._replace(state="queued", error=why)


def _below(out: Path) -> str:
    """Which folders of sweeps are in a folder, for an error message; "" if there are none."""
    names = sorted(name for name in os.listdir(out) if (out / name / plan.FILE).is_file())
    if not names:
        return ""
    shown = few([visible(name) for name in names])
    return f", but it has folders of sweeps: {shown}; e.g. cerl status {out / names[0]}"


def _unplanned(out: Path, known: set[str], *, alone: bool) -> list[PlannedRun]:
    """The run folders in `out` that no plan names; `out` itself if it is one and `alone` is set."""
    if alone and (out / FILE).is_file():
        out = out.absolute()
        names, out = [out.name], out.parent
    else:
        names = sorted(
            name
            for name in os.listdir(out)
            if name not in known and os.path.isfile(os.path.join(out, name, FILE))
        )
    found: list[PlannedRun] = []
    options: dict[tuple[str, str, str], str] = {}  # texts of YAML by preset, environment and cell
    for name in names:
        run, text = _read(out / name)
        found.append(run)
        options.setdefault((run.preset, run.env, run.cell), text)
    # Runs of one preset and environment are only told apart by their options.
    settings = [
        labels.Setting(title, env, dict(preset.leaves(_parsed(text))) if text else None)
        for (title, env, _), text in options.items()
    ]
    texts = dict(zip(options, (label.text for label in labels.labelled(settings)), strict=True))
    return [run._replace(label=texts[run.preset, run.env, run.cell]) for run in found]


def _read(folder: Path) -> tuple[PlannedRun, str]:
    """A run that is in no plan, without its label, and the options that identify its cell as YAML.

    Only the sections that are needed are parsed, and neither the seal nor the options are checked,
    since that takes far longer. If the file cannot be read, the run has 0 steps and no options.
    """
    try:
        content, _ = files.read_small(folder / FILE, most=_LARGEST)
        text = re.sub(r"^#.*\n", "", content.decode(), flags=re.MULTILINE)
        # Sections begin with a name at the start of a line.
        sections = {
            part.partition(":")[0]: part
            for part in re.split(r"^(?=\w+:)", text, flags=re.MULTILINE)
            if part.strip()
        }
        tree = _parsed("".join(sections[name] for name in ("preset", "seeds", "env", "schedule")))
        family, name = str(tree["env"]["family"]), str(tree["env"]["name"])
        seeds, steps = tuple(map(int, tree["seeds"])), int(tree["schedule"]["steps"])
        title = str(tree["preset"] or "run")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return PlannedRun(0, folder.name, folder.name, "-", folder.name, (), 0, "", {}), ""
    # The number of steps, that of threads of environments, and the folder that a fork comes from do
    # not tell cells apart.
    names = ("schedule", "steps"), ("env", "threads"), ("origin", "run"), ("origin", "checkpoint")
    for section, option in names:
        if section in sections:  # versions before forks have no `origin`
            pattern = rf"^  {option}: .*\n"
            sections[section] = re.sub(pattern, "", sections[section], flags=re.MULTILINE)
    aside = [name for name in sections if changeable(name) or name in ("preset", "seeds")]
    same = "".join(part for section, part in sections.items() if section not in aside)
    env = name if name == family else f"{family}/{name}"
    cell = hashlib.sha256(same.encode()).hexdigest()[:12]
    return PlannedRun(0, folder.name, title, env, title, seeds, steps, cell, {}), same


def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _state(run: PlannedRun, out: Path, *, now: float, host: str) -> RunState:
    """The state of a run. Args: now, seconds since 1970; host, the name of this machine."""
    folder = out / run.folder
    if not run.number and not folder.is_dir():
        folder, out = out, out.parent  # `out` is the run folder itself
    try:
        names = set(os.listdir(folder))
    except OSError:
        names = set()
    beat = heartbeat.read(folder) if heartbeat.FILE in names else None
    device, trained_on = ("", "") if beat is None else (beat.device, beat.host)
    rate = math.nan if beat is None else beat.steps_per_second or math.nan

    def state(name: State, step: int, error: str = "") -> RunState:
        left = max(0, run.steps - step) / rate if name == "running" and rate > 0 else math.nan
        left = 0.0 if name == "done" else left
        return RunState(run, name, step, run.steps, left, device, trained_on, error, rate, str(out))

    if not run.number and not run.steps:
        return state("failed", 0, f"{folder / FILE}: cannot be read, so its steps are unknown")
    if FINISHED in names and finished(folder, steps=run.steps):
        return state("done", run.steps)
    step = min(run.steps, beat.step if beat is not None else _recorded(folder, names))
    if trained(folder, beat, now=now, host=host):
        return state("running", step)
    failed = failure.read(folder) if failure.FILE in names else None
    if failed is not None:
        return state("failed", step, failed.message.strip() or failed.kind)
    if FINISHED in names:  # it is finished, but the plan asks for more steps
        return state("waiting", step)
    if beat is not None and not beat.over:
        ago = max(0.0, now - beat.updated)
        return state("stopped", step, f"no sign of life for {_ago(ago)} on {beat.host}")
    if beat is not None or step or any(map(_CHECKPOINT.fullmatch, names)):
        return state("stopped", step)
    return state("waiting", step)


def _recorded(folder: Path, names: set[str]) -> int:
    """The last agent step in the tables of a run without heartbeats, which version 0.1 trained."""
    last = 0
    for name in ("metrics.parquet", "rows.parquet"):
        if name not in names:
            continue
        import pyarrow.parquet as pq  # imported here, since few commands need it and it is slow

        try:
            with files.read(folder / name) as file:
                facts = pq.ParquetFile(file).metadata
                at = facts.schema.to_arrow_schema().get_field_index("step")
                for group in range(facts.num_row_groups):
                    found = facts.row_group(group).column(at).statistics
                    if found is not None and found.has_min_max:
                        last = max(last, int(found.max))
        except (OSError, ValueError, IndexError):
            continue
    return last


def _ago(seconds: float) -> str:
    """A span of time in one unit, e.g. 12 min."""
    for unit, most, size in (("s", 120, 1), ("min", 7200, 60), ("h", 172_800, 3600)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
