"""Scores as rliable takes them: for each method an array [runs, tasks], or [runs, tasks, steps].

A run is a seed. rliable (Agarwal et al. 2021, arXiv:2108.13264) needs the same number of runs on
every task of a method, and the same tasks for every method; what is left out for this is noted.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cerl.config import ConfigError
from cerl.exchange.scores import Method, Read, lost
from cerl.record import files
from cerl.report.curves import Cell
from cerl.report.normalise import NoScale, Scale, scale_of


class _Runs(NamedTuple):
    """The runs of one method that are exported."""

    final: np.ndarray  # [runs, tasks]
    curves: np.ndarray | None  # [runs, tasks, steps]; None: a seed has no finite curve
    seeds: dict[str, list[int]]  # by task


def export(read: Read, out: Path, *, last: int = 1, normalise: str = "none") -> list[Path]:
    """Writes scores.npz, curves.npz and rliable.json into a folder.

    `dict(numpy.load(out / "scores.npz"))` is {method: scores [runs, tasks]}, which
    `rliable.library.get_interval_estimates` takes; curves.npz has one more axis, the steps at which
    all methods have an evaluation on all tasks. rliable.json names the tasks, steps and seeds.

    Args:    read, whose notes get more sentences; out, a folder, which is made if it is missing;
             last, a score is the mean over this many last evaluations; normalise, a key of
             `report.normalise.NORMALISATIONS`.
    Returns: the files.
    Raises:  ConfigError if no method has scores on all tasks, or a task has no such scale.
    """
    tasks = sorted({cell.env for cell in read.cells})
    whole = [method for method in read.methods if set(method.tasks) == set(tasks)]
    for method in read.methods:
        if method not in whole:
            missing = ", ".join(task for task in tasks if task not in method.tasks)
            read.notes.append(f"{method.name}: no scores on {missing}; left out")
    steps = _common_steps(whole, read.notes)
    found: dict[str, _Runs] = {}
    for method in whole:
        scale = _scales(method, read.cells, normalise, last)
        if (runs := _runs(method, tasks, scale, steps, last, read.notes)) is not None:
            found[method.name] = runs
    if not found:
        raise ConfigError(
            "export --to rliable: expected a method with finite scores on all of "
            f"{', '.join(tasks)}, got none; name fewer runs"
        )
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "scores.npz"]
    _write(paths[0], {name: runs.final for name, runs in found.items()})
    curves = {name: runs.curves for name, runs in found.items() if runs.curves is not None}
    if curves and len(steps):
        paths.append(out / "curves.npz")
        _write(paths[-1], curves)
    facts: dict[str, Any] = {
        "tasks": tasks,
        "steps": [int(step) for step in steps] if curves else [],  # agent steps of one seed
        "normalisation": normalise,
        "evaluations_averaged": last,
        "methods": {
            method.name: {
                "label": method.label,
                "score": method.score,
                "seeds": found[method.name].seeds,
            }
            for method in whole
            if method.name in found
        },
        "notes": read.notes,
    }
    paths.append(out / "rliable.json")
    files.write_text(paths[-1], json.dumps(facts, indent=2) + "\n")
    return paths


def _scales(method: Method, found: Sequence[Cell], how: str, last: int) -> dict[str, Scale]:
    """The scale of each task of a method. Raises: ConfigError if a task has none."""
    try:
        return {
            task: scale_of(cell, method.score, found, how, last=last)
            for task, (cell, _) in method.tasks.items()
        }
    except NoScale as reason:
        raise ConfigError(f"export --normalise {how}: {reason}") from None


def _common_steps(methods: Sequence[Method], notes: list[str]) -> np.ndarray:
    """The steps at which all methods have evaluations on all tasks, ascending."""
    every = [curve.steps for method in methods for _, curve in method.tasks.values()]
    if not every:
        return np.empty(0, np.int64)
    common = every[0]
    for steps in every[1:]:
        common = np.intersect1d(common, steps)
    if any(len(steps) > len(common) for steps in every):
        notes.append(
            f"curves.npz: only the {len(common)} steps at which all methods have evaluations on "
            "all tasks" + ("" if len(common) else ": it is not written; export methods one by one")
        )
    return common


def _runs(
    method: Method,
    tasks: Sequence[str],
    scale: Mapping[str, Scale],
    steps: np.ndarray,
    last: int,
    notes: list[str],
) -> _Runs | None:
    """The seeds of a method that have finite scores, as many on every task; None if there are none.

    These are the seeds that all tasks have; where tasks have other ones, the lowest of each.
    """
    scores: dict[str, dict[int, float]] = {}
    curves: dict[str, dict[int, np.ndarray]] = {}
    for task in tasks:
        cell, curve = method.tasks[task]
        final = scale[task](curve.returns[-last:].mean(0))  # [S]
        finite, said = lost(final, cell.seeds, f"{method.name} on {task}")
        notes += said
        at = scale[task](curve.returns[np.isin(curve.steps, steps)])  # [steps, S]
        places = [k for k, whole in enumerate(finite) if whole]
        scores[task] = {cell.seeds[k]: float(final[k]) for k in places}
        curves[task] = {cell.seeds[k]: at[:, k] for k in places}
    common = sorted(set.intersection(*(set(own) for own in scores.values())))
    count = min(len(own) for own in scores.values())
    chosen = {
        task: common if len(common) == count else sorted(scores[task])[:count] for task in tasks
    }
    unused = {task: sorted(set(scores[task]) - set(chosen[task])) for task in tasks}
    for task, seeds in unused.items():
        if seeds:
            notes.append(
                f"{method.name} on {task}: seed {' '.join(map(str, seeds))} is left out, since "
                f"rliable needs as many runs on every task ({count})"
            )
    if not count:
        return None
    ends = [[scores[task][seed] for seed in chosen[task]] for task in tasks]  # [tasks, runs]
    along = [[curves[task][seed] for seed in chosen[task]] for task in tasks]
    whole = np.array(along).swapaxes(0, 1)  # [runs, tasks, steps]
    finite = bool(np.isfinite(whole).all())
    if not finite:
        notes.append(f"{method.name}: a score before the last is not finite; not in curves.npz")
    return _Runs(np.array(ends).T, whole if finite else None, chosen)


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz whose keys may be any text, which `numpy.savez` does not allow."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    files.write_atomically(path, lambda file: file.write(content.getvalue()))
