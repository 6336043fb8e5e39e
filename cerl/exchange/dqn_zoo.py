"""Scores as the CSV files of DQN Zoo: one file a method, one line an evaluation of a seed.

Columns are those of its `run_atari.py`, with the name of the environment, the seed and an index
before them. What runs do not record stays empty: frame rates, the exploration rate and the value.
Source: https://github.com/google-deepmind/dqn_zoo (`dqn_zoo_plots.ipynb` reads such files).
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cerl.exchange.scores import Method, Read, file_names
from cerl.record import files
from cerl.report import settings, statistics
from cerl.report.curves import evaluations

COLUMNS = (
    *("", "environment_name", "seed", "iteration", "frame"),
    *("eval_episode_return", "train_episode_return", "eval_num_episodes", "train_num_episodes"),
    *("eval_frame_rate", "train_frame_rate", "train_exploration_epsilon", "train_state_value"),
    *("normalized_return", "capped_normalized_return", "human_gap"),
)
Place = tuple[str, str, int]  # label, env, seed
# Steps, returns and episodes of the training rows of a seed, ascending by step.
Training = dict[Place, tuple[np.ndarray, np.ndarray, np.ndarray]]


def export(read: Read, out: Path) -> list[Path]:
    """Writes a CSV file for every method into a folder, which is made if it is missing.

    Returns: the files.
    """
    frames, training = _by_place(read)
    out.mkdir(parents=True, exist_ok=True)
    names = file_names([method.name for method in read.methods], ".csv")
    paths = []
    for method in read.methods:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(COLUMNS)
        lines = _lines(method, frames, training)
        writer.writerows([k, *line] for k, line in enumerate(lines))
        paths.append(out / names[method.name])
        files.write_text(paths[-1], buffer.getvalue())
    return paths


def environment_name(env: str) -> str:
    """What DQN Zoo calls an environment, e.g. beam_rider for atari/BeamRider."""
    family, _, name = env.rpartition("/")
    if family != "atari":
        return name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _by_place(read: Read) -> tuple[dict[tuple[Place, int], int], Training]:
    """The frames that a seed has played at each evaluation, {(place, step): frames}, and its
    training episodes."""
    named = settings.named_rows(read.table)
    columns = ["label", "env", "seed", "step", "frames", "policy", "role", "return", "episodes"]
    named = named.select([*columns, "version"])
    grouped = evaluations(named).group_by(["label", "env", "seed", "step"], use_threads=False)
    frames = {
        ((row["label"], row["env"], row["seed"]), row["step"]): row["frames_max"]
        for row in grouped.aggregate([("frames", "max")]).to_pylist()
    }
    # The passive member of a tandem plays no training episode.
    trained = named.filter((pc.field("policy") == "train") & (pc.field("role") != "passive"))
    rows: dict[Place, list[tuple[int, float, int]]] = {}
    for row in trained.sort_by("step").to_pylist():
        if np.isfinite(row["return"] if row["return"] is not None else np.nan):
            place = row["label"], row["env"], row["seed"]
            rows.setdefault(place, []).append((row["step"], row["return"], row["episodes"]))
    training = {}
    for place, own in rows.items():
        steps, returns, episodes = map(np.array, zip(*own, strict=True))
        training[place] = steps, returns, episodes
    return frames, training


def _lines(
    method: Method, frames: dict[tuple[Place, int], int], training: Training
) -> Iterator[list[Any]]:
    """The lines of a method's file, without the index."""
    human = statistics.human_random()
    for env, (cell, curve) in method.tasks.items():
        game = env.removeprefix("atari/")
        for k, seed in enumerate(cell.seeds):
            place, before = (cell.name, env, seed), 0
            for t, step in enumerate(map(int, curve.steps)):
                value, episodes = float(curve.returns[t, k]), int(curve.episodes[t, k])
                if (place, step) not in frames or not episodes:
                    continue  # the seed was not evaluated at this step
                trained, count = _between(training.get(place), before, step)
                normalised: list[Any] = ["", "", ""]
                if game != env and game in human:
                    score = float(statistics.human_normalised(np.array(value), game))
                    capped = min(1.0, score)
                    normalised = [score, capped, 1.0 - capped]
                facts = [environment_name(env), seed, t + 1, frames[place, step]]
                rates = ["", "", "", ""]
                yield [*facts, value, trained, episodes, count, *rates, *normalised]
                before = step


def _between(own: tuple[np.ndarray, ...] | None, start: int, end: int) -> tuple[Any, Any]:
    """Mean return and number of the training episodes after one step and up to another; empty
    texts where there are none."""
    if own is None:
        return "", ""
    steps, returns, episodes = own
    chosen = slice(*np.searchsorted(steps, [start, end], side="right"))
    count = int(episodes[chosen].sum())
    return (
        (float(np.average(returns[chosen], weights=episodes[chosen])), count) if count else ("", 0)
    )
