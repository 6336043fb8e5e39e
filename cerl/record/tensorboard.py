"""TensorBoard events: their files, one sub-folder for each seed, and the tags of all numbers.

Tags are those of CleanRL (charts/, losses/) and of the code of Lin et al. 2024 (Eval/, Train/,
Agent/). Two things differ from that code:
- Its `Overestimation` is the Monte Carlo return minus Q, which is positive where Q is too *low*.
  Here `value_error` is Q minus the Monte Carlo return, positive where Q is too high.
- Its `Eval/Random` is estimated by drawing a member for each episode. Here it is the mean over all
  members, unless the policy `random` is evaluated too.
"""

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cerl.record.files import create, own_folder

Scalars = dict[str, float]

# Names of metrics here, and their names in the code of Lin et al. 2024, under Agent/ and Train/.
AGENT = {"loss": "loss", "q_data": "q_values_data", "q_pi": "q_values_pi", "mico_loss": "mico_loss"}
TRAIN = {"return": "AverageReturns", "value": "AverageQValues", "mc": "AverageMCReturns"}


class Events:
    """Writes a new event file. Unlike TensorBoard's own writer it has no thread, so that on a full
    disk the caller gets the error, instead of a traceback on the screen."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads files in the order of their names, so the time comes first.
        seconds, fraction = divmod(time.time_ns(), 10**9)
        when = f"{seconds:010d}.{fraction:09d}"
        name = f"events.out.tfevents.{when}.{platform.node()}.{os.getpid()}"
        self.file = create(folder / name)
        self.records = RecordWriter(self.file)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: Any) -> None:
        self.records.write(event.SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Board:
    """The TensorBoard events of a run, in one sub-folder for each seed.

    After an OSError (`error`) nothing more is written.
    """

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self.folder, self.seeds = folder, tuple(seeds)
        self.writers: list[Any] = []
        self.after: int | None = None  # tell TensorBoard to drop events later than this step
        self.error: OSError | None = None

    def write(self, seed: int, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one seed as one event.

        Args: seed, its index in [0, S); step, agent steps of one seed; scalars {tag: value}; NaN is
              allowed.
        """
        # Imported here, since the import takes a second, which `cerl list` need not wait for.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

        if self.error is not None:
            return
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            if not self.writers:
                self.writers = [self._open(s) for s in self.seeds]
            self.writers[seed].add_event(event)
        except OSError as error:
            self.error = error

    def _open(self, seed: int) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore

        writer = Events(own_folder(own_folder(self.folder) / f"seed_{seed}"))
        if self.after is not None:
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(wall_time=time.time(), step=self.after + 1, session_log=start))
        return writer

    def flush(self) -> None:
        for writer in self.writers if self.error is None else ():
            try:
                writer.flush()
            except OSError as error:
                self.error = error

    def close(self) -> None:
        for writer in self.writers:
            try:
                writer.close()
            except OSError as error:
                self.error = self.error or error
        self.writers = []


def mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def weighted(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean of the values whose weight is above 0; NaN if there are none."""
    used = weights > 0
    total = weights[used].sum()
    return float((values[used] * weights[used]).sum() / total) if used.any() else math.nan


def training_scalars(metrics: Mapping[str, np.ndarray], seed: int) -> Scalars:
    """The metrics of one seed by tag. Args: metrics {name: [S, N] or [S]}; seed, its index."""
    out: Scalars = {}
    for name, values in metrics.items():
        own = values[seed]
        if own.ndim == 0:
            out[f"Train/{name}"] = float(own)
            continue
        tag = f"Agent/{AGENT[name]}" if name in AGENT else f"Diagnostics/{name}"
        out |= {f"{tag}_{i}": float(value) for i, value in enumerate(own)}
    if "loss" in metrics:
        out["losses/td_loss"] = mean(metrics["loss"][seed])
    if "q_data" in metrics:
        out["losses/q_values"] = mean(metrics["q_data"][seed])
    return out


def episode_scalars(finished: Mapping[str, np.ndarray], seed: int) -> Scalars:
    """The training episodes of one seed by tag.

    Args: finished {episodes, return, length, value, mc: [S, N]}; seed, its index.
    """
    count = finished["episodes"][seed]
    out = {"Train/NumEpisodes": float(count.sum())}
    if count.sum() > 0:
        out["charts/episodic_return"] = weighted(finished["return"][seed], count)
        out["charts/episodic_length"] = weighted(finished["length"][seed], count)
        out["Train/AverageReturns"] = out["charts/episodic_return"]
    for i in np.flatnonzero(count):
        out[f"Train/ByAgent/NumEpisodes_{i}"] = float(count[i])
        for name, tag in TRAIN.items():
            if name in finished:
                out[f"Train/ByAgent/{tag}_{i}"] = float(finished[name][seed, i])
        if "value_error" in finished:
            out[f"Train/ByAgent/value_error_{i}"] = float(finished["value_error"][seed, i])
    return out


def evaluation_scalars(
    policy: str, scores: Mapping[str, np.ndarray], seed: int, *, tandem: bool, drawn: bool
) -> Scalars:
    """The scores of one seed and policy by tag.

    Args: scores {episodes, return, and entropy or variance if present: [S, K]}; seed, its index;
          tandem, whether member 0 is the active and member 1 the passive one; drawn, whether the
          policy `random` is evaluated too, which then uses the tag Eval/Random. Policies that play
          modes have tags of their own, e.g. Eval/RandomMode.
    """
    own = {name: values[seed] for name, values in scores.items()}
    base, _, mode = policy.partition("_")
    mode = mode.capitalize()
    if base != "individual":
        group = base.capitalize() + mode
        return _group(group, {name: values[0] for name, values in own.items()})
    out: Scalars = {}
    for i in range(len(own["return"])):
        one = {name: values[i] for name, values in own.items()}
        out |= {f"{tag}_{i}": value for tag, value in _group("ByAgent" + mode, one).items()}
        if tandem:
            out |= _group(("Active", "Passive")[i] + mode, one)
    if not tandem and (mode or not drawn):
        every = {name: values.mean() for name, values in own.items()}
        out |= _group("Random" + mode, every | {"episodes": own["episodes"].sum()})
    return out


def _group(name: str, scores: Mapping[str, Any]) -> Scalars:
    tags = {"return": "AverageReturns", "episodes": "NumEpisodes"}
    tags |= {"entropy": "Entropy", "variance": "ActionVariance"}
    return {f"Eval/{name}/{tags[k]}": float(v) for k, v in scores.items() if k in tags}
