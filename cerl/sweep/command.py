"""Carries out `cerl sweep`: what is asked becomes a plan in a folder, trained runs and a report.

Nothing is written before everything that is asked has been checked.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cerl.config import Config, ConfigError, errors, preset
from cerl.config.effects import section_of
from cerl.config.form import key_of
from cerl.device.kind import Kind, kind_of
from cerl.record.folder import check_out
from cerl.record.screen import PipeConsole
from cerl.sweep import grid, planning, study
from cerl.sweep.cells import cells
from cerl.sweep.plan import PlannedRun
from cerl.sweep.planning import Planned
from cerl.sweep.status import PLAIN_WIDTH

RUNS = Path("runs")  # holds the folders of sweeps that are given none


class Asked(NamedTuple):
    """What the command line asks for; the help of `cerl sweep` explains the fields."""

    names: tuple[str, ...]  # presets, YAML files and studies
    words: tuple[str, ...]  # options of a run
    envs: tuple[str, ...] = ()
    grid: tuple[str, ...] = ()
    zip: tuple[str, ...] = ()
    device: str = ""  # "": that of the presets
    out: Path | None = None
    seeds_per_run: int = 0  # 0: as many as fit the device
    jobs: int = 0  # 0: as many as the device has places
    per_gpu: int = 0  # 0: as many as the jobs need
    mps: bool = False
    launcher: str = "here"
    per_job: int = 0  # 0: one
    sbatch: tuple[str, ...] = ()  # each some options of sbatch
    setup: tuple[str, ...] = ()  # each a line of the job's script
    prefix: tuple[str, ...] = ()  # each some words
    address: str = ""  # "": a cluster is started on this machine
    cpus: int = 0  # 0: Ray decides

    @property
    def title(self) -> str:
        """The name of the study; "" for presets, and for several studies together."""
        only = len(self.names) == 1 and study.is_study(self.names[0])
        return study.title(self.names) if only else ""

    @property
    def folder(self) -> Path:
        """The folder of the sweep: by default runs/STUDY, or runs/sweep for presets."""
        return self.out or RUNS / (self.title or "sweep")


def sweep(asked: Asked, *, note: Callable[[str], None]) -> None:
    """Trains all that is asked, and writes the report, also if some runs failed.

    Raises: ConfigError before anything is written; RuntimeError that names the runs that failed,
            after all others were trained; Stopped.
    """
    out = asked.folder
    check_out(out, option="sweep --out")
    planned = planned_for(asked, note=note)
    from cerl.sweep import local

    local.check_tasks([one.config for one in planned.asked])
    planned = planning.written(planned, out)
    from cerl.sweep.worker import STOP

    (out / STOP).unlink(missing_ok=True)  # of an earlier `cerl sweep --cancel`
    for sentence in planned.notes:
        note(sentence)
    failed: RuntimeError | None = None
    try:
        if not _launch(asked, [one.run for one in planned.asked], out):
            return
    except RuntimeError as error:
        failed = error
    try:
        _report([out / one.run.folder for one in planned.asked], out)
    except (OSError, RuntimeError, ValueError) as error:
        if failed is None:
            raise
        note(f"{out}: the report could not be written: {error}")
    if failed is not None:
        raise failed


def _launch(asked: Asked, runs: Sequence[PlannedRun], out: Path) -> bool:
    """Trains the runs, or submits them. Returns: whether all of them are finished.

    Raises: RuntimeError that names the runs that failed; Stopped.
    """
    jobs, per_gpu, device = asked.jobs or None, asked.per_gpu or None, asked.device or "auto"
    if asked.launcher == "slurm":
        from cerl.sweep import slurm

        return slurm.sweep(runs, out, asked)
    if asked.launcher == "ray":
        from cerl.sweep import on_ray

        on_ray.sweep(
            runs,
            out,
            address=asked.address or None,
            jobs=jobs,
            per_gpu=per_gpu,
            device=device,
            cpus=asked.cpus or None,
        )
    else:
        from cerl.sweep import local

        local.sweep(runs, out, jobs=jobs, per_gpu=per_gpu, mps=asked.mps, device=device)
    return True


# Options that have a meaning for these launchers only.
_OF_LAUNCHERS = {
    "per_gpu": ("here", "ray"),
    "mps": ("here",),
    **dict.fromkeys(("per_job", "sbatch", "setup", "prefix"), ("slurm",)),
    **dict.fromkeys(("address", "cpus"), ("ray",)),
}


def check_launcher(asked: Asked) -> None:
    """Raises: ConfigError if there is no such launcher, or it does not know an option."""
    names = ("here", "slurm", "ray")
    if asked.launcher not in names:
        hint = errors.nearest(asked.launcher, list(names))
        raise ConfigError(f"--launcher: expected {', '.join(names)}, got {asked.launcher!r}{hint}")
    for option, launchers in _OF_LAUNCHERS.items():
        if getattr(asked, option) and asked.launcher not in launchers:
            raise ConfigError(
                f"--{option.replace('_', '-')}: expected --launcher {' or '.join(launchers)} with "
                f"it, got --launcher {asked.launcher}"
            )
    if asked.launcher == "slurm":
        from cerl.sweep import slurm

        slurm.check(asked)


def _report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of those runs that have scores; with its page if plotly is installed."""
    if scored := [folder for folder in folders if (folder / "rows.parquet").is_file()]:
        from cerl.report import tables

        tables.main(scored, out, html=importlib.util.find_spec("plotly") is not None)


def dry_run(asked: Asked, *, calibrate: bool, note: Callable[[str], None]) -> None:
    """Prints which runs a sweep would train, what they need, and what is there already."""
    planned = planned_for(asked, note=note)
    from cerl.sweep import cost, dry, local
    from cerl.sweep.state import states

    local.check_tasks([one.config for one in planned.asked])
    for sentence in planned.notes:
        note(sentence)
    out = asked.folder
    device = _kind(asked) if asked.launcher == "slurm" else asked.device or "auto"
    costs = cost.estimates(planned.asked, out, device=device, calibrate=calibrate, note=note)
    there = any(one.state != "new" for one in planned.asked)
    found = states(out) if there else ()
    here = asked.launcher == "here"
    at_once = places(asked).count if here else asked.jobs or len(planned.asked)
    table = dry.dry(planned.asked, costs, found, at_once=at_once)
    # Without a terminal rich would take 80 columns, which are few for tables.
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    PipeConsole(highlight=False, width=width).print(table)
    if asked.launcher == "slurm":
        from cerl.sweep import slurm

        print(slurm.dry([one.run for one in planned.asked], out, asked))


def planned_for(asked: Asked, *, note: Callable[[str], None]) -> Planned:
    """The plan of what is asked; nothing is written. Raises: ConfigError."""
    if asked.mps and not places(asked).gpus:
        raise ConfigError("--mps: expected a GPU, found none: the service is one of CUDA")
    studies = study.asked(asked.names, _kind(asked))
    axes = [*grid.read(asked.grid, option="--grid"), *grid.zipped(asked.zip)]
    words = [*asked.words, *(["--device", asked.device] if asked.device else [])]
    found = cells(studies, words=words, envs=asked.envs, grid=axes, note=note)
    # Options that hold for every run: those of the studies, and those of the command line.
    options: dict[str, Any] = {}
    for one in studies:
        options |= dict(preset.leaves(preset.nested(one.options)))
    for key in filter(None, map(key_of, words)):
        section, name = section_of(found[0].config, key)
        options[key] = getattr(section, name)
    return planning.made(
        found,
        asked.folder,
        study=asked.title,
        options=options,
        seeds_per_run=asked.seeds_per_run or (lambda config: _fitting(config, asked)),
    )


def _kind(asked: Asked) -> Kind:
    """The kind of device that runs train on."""
    if asked.launcher == "slurm":
        from cerl.sweep import slurm

        return "cuda" if slurm.kind(asked) == "cuda" else "cpu"
    return kind_of(asked.device or "auto")


def _fitting(config: Config, asked: Asked) -> int:
    """How many seeds of a cell fit the device side by side, if all its places are taken; all of
    them if the runs train on other machines, whose memory is not known here."""
    if asked.launcher != "here":
        return len(config.seeds)
    from cerl.sweep import cost

    device = asked.device or "auto"
    return cost.fitting_seeds(config, device=device, share=places(asked).per_gpu)


def places(asked: Asked) -> Any:
    """The places for runs on this machine."""
    from cerl.sweep.slots import Slots

    return Slots(asked.device or "auto", jobs=asked.jobs or None, per_gpu=asked.per_gpu or None)
