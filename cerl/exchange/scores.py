"""The scores of runs as other programs take them: methods, their tasks, and notes.

Other programs know methods and not several scores of one method. So each score of a setting is a
method of its own here: that of its members is called by the setting's label, and others name the
score behind it, e.g. "bootdqn, aggregate (vote)".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cerl.record.folder import plain
from cerl.report.curves import SCORES, Cell, Curve, cells, load_rows
from cerl.text import visible

OWN = ("individual", "active")  # scores whose method is called by the label alone


class Method(NamedTuple):
    """One score of one setting, on all of its environments."""

    name: str
    label: str  # of the setting
    score: str  # key of `curves.SCORES`
    tasks: dict[str, tuple[Cell, Curve]]  # by env, in alphabetical order


class Read(NamedTuple):
    """What some paths of runs hold."""

    table: pa.Table  # as from `curves.load_rows`
    cells: list[Cell]
    methods: list[Method]
    notes: list[str]


def read(runs: Sequence[Path]) -> Read:
    """The rows of runs, and their scores by method.

    Args:   runs, see `cerl.report.curves.run_folders`.
    Raises: RowsError if rows are missing, damaged, or without an evaluation.
    """
    table = load_rows(runs)
    found, notes = cells(table)
    methods: dict[tuple[str, str], Method] = {}
    for cell in found:
        for score in SCORES:
            if score in cell.curves:
                name = cell.name if score in OWN else f"{cell.name}, {SCORES[score]}"
                fresh = Method(name, cell.name, score, {})
                method = methods.setdefault((cell.name, score), fresh)
                method.tasks[cell.env] = cell, cell.curves[score]
    return Read(table, found, [*methods.values()], notes)


def file_names(names: Sequence[str], suffix: str) -> dict[str, str]:
    """A file name of its own for each name: its letters and digits, and a number where two would
    share one on a file system that ignores case. Args: suffix, e.g. ".csv"."""
    taken: set[str] = set()
    found = {}
    for name in names:
        stem = plain(name) or "method"
        own, count = stem, 1
        while own.lower() in taken:
            count += 1
            own = f"{stem}-{count}"
        taken.add(own.lower())
        found[name] = own + suffix
    return found


def lost(values: np.ndarray, seeds: Sequence[int], where: str) -> tuple[np.ndarray, list[str]]:
    """Which seeds [S] have only finite scores, and a note on the others.

    Args: values [..., S]; seeds, S of them; where, what the note calls the method and task.
    """
    finite = np.isfinite(values.reshape(-1, len(seeds))).min(0)
    if finite.all():
        return finite, []
    text = " ".join(str(seed) for seed, whole in zip(seeds, finite, strict=True) if not whole)
    return finite, [f"{visible(where)}: seed {text} has scores that are not finite; left out"]
