"""The Logger: writes metrics and scores of a run to its folder and shows them on the console.

The training loop passes tensors on the device; the Logger copies them to the host. Only the Logger,
the Evaluator and the watch for divergence wait for the device.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from cerl.config import Config
from cerl.data import EnvSpec
from cerl.evaluate import Result
from cerl.record.console import Console
from cerl.record.heartbeat import Rival
from cerl.record.progress import Clock, duration
from cerl.record.record import Moment, Record, over_episodes
from cerl.record.results import RowsError

FLUSH = 60.0  # metrics are written to the disk at least this often, in seconds


def on_host(values: Tensor) -> np.ndarray:
    """A copy of a tensor as a float64 array on the host; waits for the device."""
    return np.array(values.detach().cpu().double().numpy())


class Logger:
    """The record, console and clock of one run; a context around its training loop.

    In all methods `step` counts agent steps of one seed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Config,
        spec: EnvSpec,
        diverged: Mapping[int, int] | None = None,
        run: str = "",
        quiet: bool = False,
    ) -> None:
        """Args: folder of the run, exists; diverged {index of a seed: step from which on its rows
        are marked}, a mapping that the watch changes; run, the hash of the run's options that its
        tables contain; quiet, print notes only.

        Nothing is written before another method is called; `load_state_dict` may come first.
        """
        self.folder, self.config = folder, config
        marks = {} if diverged is None else diverged
        self.record = Record(folder, config=config, spec=spec, diverged=marks, run=run)
        self.console = Console(seeds=len(config.seeds), steps=config.schedule.steps, quiet=quiet)
        self.clock = Clock()
        self.step, self.updates = 0, 0
        self.flushed = time.monotonic()
        self.complaint = ""  # the last note about a failed write, so that it is not repeated

    def __enter__(self) -> "Logger":
        self.clock.start()
        self.flushed = time.monotonic()
        self._introduce()
        self.console.start()
        self.console.pace.add(self.step, self.updates)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.console.stop(self.step, self._scores())
        try:
            if kind is not Rival:  # that process trains the run; its rows count
                self.flush(final=kind is None)
        finally:
            self.record.boards.close()
            self._pass_on()
        if kind is None:
            marked, seeds = self.record.marked(), len(self.config.seeds)
            self.console.line(
                f"{f'done, but {marked}' if marked else 'done'}: {self.step:,} agent steps of "
                f"{seeds} seed{'s' if seeds > 1 else ''} in {duration(self.clock.seconds())}; "
                f"rows in {self.record.rows.path}; "
                f"curves: {self.record.boards.shown_by()}"
            )

    def _introduce(self) -> None:
        config, fixed, line = self.config, self.record.fixed, self.console.line
        line(
            f"{fixed['preset']} on {fixed['env']}: seeds {' '.join(map(str, config.seeds))} x "
            f"{config.ensemble.members} members, {config.schedule.steps:,} agent steps each; "
            f"folder {self.folder}"
        )
        for name, value in config.model_dump(mode="json").items():
            if isinstance(value, dict):
                text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
                line(f"  {name}: {text.strip()}")

    def note(self, text: str) -> None:
        """Prints a sentence that the user must see, even if quiet."""
        self.console.note(text)

    def progress(self, step: int, updates: int) -> None:
        """Called in every iteration; redraws the progress bar at most four times a second."""
        self.step, self.updates = step, updates
        if self.console.is_due():
            self.console.pace.add(step, updates)
            self.console.draw(step, self._scores())

    def _scores(self) -> str:
        """The latest scores (means over seeds) and the seeds that diverged, as text."""
        scores = "  ".join(f"{name} {value:.4g}" for name, value in self.record.latest.items())
        return f"{scores}  {self.record.marked()}".strip()

    def training(self, step: int, updates: int, metrics: Mapping[str, Tensor]) -> None:
        """Logs metrics and diagnostics. Args: metrics {name: [S, N] or [S]}; NaN is allowed."""
        values = {name: on_host(value) for name, value in metrics.items()}
        self.record.training(self._at(step, updates), values, rates=self.console.pace.rates())
        self._flush_if_old()

    def episodes(
        self, step: int, updates: int, real_steps: Tensor, finished: Mapping[str, Tensor]
    ) -> None:
        """Logs the training episodes since the last call.

        Args: real_steps [S], agent steps so far without reset steps; finished, as
              `Collector.take_finished` returns it.
        """
        values = {name: on_host(value) for name, value in finished.items()}
        self.record.episodes(self._at(step, updates), on_host(real_steps), values)
        self._flush_if_old()
        if self.console.bar is None and not self.console.quiet:
            self.console.pace.add(step, updates)
        self.console.headline(step, self._scores())

    def evaluation(
        self, step: int, updates: int, real_steps: Tensor, results: Mapping[str, Result]
    ) -> None:
        """Logs the scores of an evaluation and writes the result rows to the disk.

        Args: real_steps [S], agent steps of training so far without reset steps; results, by
              policy.
        """
        at, real = self._at(step, updates), on_host(real_steps)
        for policy, result in results.items():
            scores = over_episodes(on_host(result.returns), on_host(result.lengths))
            errors = {name: on_host(value) for name, value in result.errors.items()}
            diversity = on_host(result.diversity)
            self.record.evaluation(at, real, policy, scores, diversity, errors)
        self.flush(metrics=False)
        self._flush_if_old()
        latest = self.record.latest.items()
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in latest if name != "train")
        numbers = f"{numbers}  {self.record.marked()}".rstrip()
        self.console.line(f"  evaluation at {step:,} agent steps: {numbers}")

    def _at(self, step: int, updates: int) -> Moment:
        self.step, self.updates = step, updates
        return Moment(step, updates, self.clock.seconds())

    def _flush_if_old(self) -> None:
        if time.monotonic() - self.flushed > FLUSH:
            self.flush()

    def flush(self, *, metrics: bool = True, final: bool = False) -> bool:
        """Writes tables and events to the disk. A failure is noted, and the next call tries again.

        Args:    metrics, also write the table of metrics, which soon is larger than that of rows;
                 final, the run ends, so there is no next call.
        Returns: whether everything was written.
        Raises:  RowsError if a final write fails, or the folder has rows of another run.
        """
        if metrics:
            self.flushed = time.monotonic()
        complaint = self.record.flush(metrics=metrics)
        self._pass_on()
        written = not complaint
        if complaint and final:
            raise RowsError(f"{complaint}; its last rows are lost. Free some space")
        if complaint:
            complaint += "; rows stay in memory, and the run goes on"
        if complaint and complaint != self.complaint:
            self.note(complaint)
        self.complaint = complaint
        return written

    def _pass_on(self) -> None:
        """Prints what the boards have to say, e.g. that one of them failed."""
        for sentence in self.record.boards.take_notes():
            self.note(sentence)

    def state_dict(self) -> dict[str, Any]:
        """The step, the run's duration and the latest scores.

        Call `flush` before: a checkpoint must not be ahead of the tables on the disk.
        """
        return {
            "step": self.step,
            "updates": self.updates,
            "wall_seconds": self.clock.seconds(),
            "latest": dict(self.record.latest),
            "config_hash": self.record.fixed["config_hash"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the tables in the folder. Rows, metrics and events that are later than the
        state are dropped.

        Raises: RowsError if a file is damaged.
        """
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.clock.earlier, self.record.latest = float(state["wall_seconds"]), dict(state["latest"])
        # A newer version of cerl might compute another hash. All rows of a run keep the first one.
        self.record.fixed["config_hash"] = str(state["config_hash"])
        for sentence in self.record.keep_until(self.step):
            self.note(sentence)

    def fell_back(self, sentence: str) -> None:
        """Notes and records that a newer checkpoint was damaged. Args: sentence, the note."""
        self.note(sentence)
        self.record.damaged(self._at(self.step, self.updates))

    def forget(self) -> None:
        """Starts with empty tables, for a run without a checkpoint; existing files are renamed."""
        for sentence in self.record.forget():
            self.note(sentence)
