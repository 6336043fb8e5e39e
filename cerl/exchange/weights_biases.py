"""Scores as runs of Weights & Biases, written to a folder without a network: `wandb sync` uploads
them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cerl.exchange.scores import Read
from cerl.report import settings

MISSING = (
    "export --to wandb: expected the package wandb, which is not installed; run `pip install wandb`"
)


def export(read: Read, out: Path, *, project: str = "cerl") -> list[Path]:
    """Writes an offline run of wandb for each seed of each setting and environment.

    A run has the options that its setting states as its config, the label as its group, and a curve
    for each score, e.g. eval/individual, against agent steps. Nothing is sent.

    Args:    out, a folder, which is made if it is missing; project, the name of wandb's project.
    Returns: the folders of wandb's runs.
    Raises:  ImportError naming the pip command if wandb is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(MISSING) from error
    out.mkdir(parents=True, exist_ok=True)
    known = settings.options_by_hash(read.table)
    paths = []
    for cell in read.cells:
        options = known.get(cell.config_hash)
        facts = {"preset": cell.preset, "label": cell.name, "env": cell.env}
        facts |= {"members": cell.members, "config_hash": cell.config_hash}
        for k, seed in enumerate(cell.seeds):
            run = wandb.init(
                project=project,
                name=f"{cell.name} {cell.env} seed {seed}",
                group=cell.name,
                job_type=cell.env,
                dir=str(out),
                mode="offline",
                config={**facts, "seed": seed, **_nested(options or {})},
                reinit=True,
            )
            points: dict[int, dict[str, float]] = {}
            for score, curve in cell.curves.items():
                for step, value, count in zip(
                    curve.steps, curve.returns[:, k], curve.episodes[:, k], strict=True
                ):
                    if count and np.isfinite(value):
                        points.setdefault(int(step), {})[f"eval/{score}"] = float(value)
            for step in sorted(points):
                run.log(points[step] | {"agent_steps": step}, step=step)
            folder = Path(run.dir).parent
            run.finish()
            paths.append(folder)
    return paths


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted key as nested dicts, which wandb shows as a tree."""
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *groups, name = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return tree
