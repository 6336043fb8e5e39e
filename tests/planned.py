"""Planned runs for tests of sweeps: folders that hold a config.yaml and nothing else."""

from collections.abc import Sequence
from pathlib import Path

from cerl.config import Config
from cerl.record.folder import dump
from cerl.sweep.plan import PlannedRun


def planned(configs: Sequence[Config], out: Path) -> list[PlannedRun]:
    """Makes the run folders of configs in `out`, as a sweep does. Returns: the runs."""
    runs = []
    for number, config in enumerate(configs, 1):
        name = config.preset.rpartition("/")[2] or "run"
        run = PlannedRun(
            number=number,
            folder=f"{number:04d}-{name}",
            preset=config.preset,
            env=f"{config.env.family}/{config.env.name}",
            label=name,
            seeds=config.seeds,
            steps=config.schedule.steps,
            cell=str(number),
            varied={},
        )
        folder = out / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            dump(config.model_copy(update={"out": str(out)}), folder / "config.yaml")
        runs.append(run)
    return runs
