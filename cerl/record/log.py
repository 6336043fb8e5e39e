"""The Logger: what a run tells, kept in its folder and shown on the console.

Training hands it tensors as they are; it copies them to the host, and with the Evaluator it is the
only one that waits for a device.
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
from cerl.record.progress import Clock, duration
from cerl.record.record import Moment, Record, over_episodes
from cerl.record.results import RowsError

FLUSH = 60.0  # seconds after which metrics are written even without a checkpoint


def on_host(values: Tensor) -> np.ndarray:
    """A copy as float64 on the host; waits for the device."""
    return np.array(values.detach().cpu().double().numpy())


class Logger:
    """Record, console and clock of one run; used as a context around its loop.

    Steps are agent steps of one seed.
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
        """Args: folder of the run, exists; diverged {index of a seed: step from which on it is
        marked}, which may change; run, the hash of its options that stands in its tables; quiet,
        prints notes only.

        Nothing is written before the first call, so `load_state_dict` may follow.
        """
        self.folder, self.config = folder, config
        marks = {} if diverged is None else diverged
        self.record = Record(folder, config=config, spec=spec, diverged=marks, run=run)
        self.console = Console(seeds=len(config.seeds), steps=config.schedule.steps, quiet=quiet)
        self.clock = Clock()
        self.step, self.updates = 0, 0
        self.flushed = time.monotonic()
        self.complaint = ""  # what was said of a write that failed

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
            self.flush(final=kind is None)
        finally:
            self.record.board.close()
        if kind is None:
            marked = self.record.marked()
            self.console.line(
                f"{f'done, but {marked}' if marked else 'done'}: {self.step:,} agent steps of "
                f"{len(self.config.seeds)} seeds in {duration(self.clock.seconds())}; rows in "
                f"{self.record.rows.path}; curves: tensorboard --logdir {self.record.board.folder}"
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
        """Prints a sentence that the user must see, quiet or not."""
        self.console.note(text)

    def progress(self, step: int, updates: int) -> None:
        """Called every iteration; looks at the clock, and redraws four times a second."""
        self.step, self.updates = step, updates
        if self.console.is_due():
            self.console.pace.add(step, updates)
            self.console.draw(step, self._scores())

    def _scores(self) -> str:
        """The latest scores, means over seeds, in words."""
        scores = "  ".join(f"{name} {value:.4g}" for name, value in self.record.latest.items())
        return f"{scores}  {self.record.marked()}".strip()

    def training(self, step: int, updates: int, metrics: Mapping[str, Tensor]) -> None:
        """Metrics and diagnostics at a step. Args: metrics {name: [S, N] or [S]}, NaN allowed."""
        values = {name: on_host(value) for name, value in metrics.items()}
        self.record.training(self._at(step, updates), values, rate=self.console.pace.rates()[0])
        self._flush_if_old()

    def episodes(
        self, step: int, updates: int, real_steps: Tensor, finished: Mapping[str, Tensor]
    ) -> None:
        """Training episodes since the last call, as `Collector.take_finished` gives them.

        Args: real_steps [S] so far.
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
        """Scores of every evaluated policy; writes the rows to disk.

        Args: real_steps [S] of training so far.
        """
        at, real = self._at(step, updates), on_host(real_steps)
        for policy, result in results.items():
            scores = over_episodes(on_host(result.returns), on_host(result.lengths))
            self.record.evaluation(
                at, real, policy, scores, on_host(result.diversity), drawn="random" in results
            )
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
        """Writes rows, and metrics too unless told not to: their table soon is the larger one.

        A full disk is noted and tried again at the next flush.
        Returns: whether all rows that it was to write are on the disk.
        Raises: RowsError if this is the last chance, or the folder holds another run's rows.
        """
        if metrics:
            self.flushed = time.monotonic()
        complaint, board = self.record.flush(metrics=metrics), self.record.board
        written = not complaint
        if complaint and final:
            raise RowsError(f"{complaint}; its last rows are lost. Free some space")
        if written and board.error is not None:
            reason = board.error.strerror or board.error
            complaint = f"{board.folder}: no more TensorBoard events ({reason}); rows go on"
        if complaint and complaint != self.complaint:
            self.note(f"{complaint}; rows stay in memory, and the run goes on")
        self.complaint = complaint
        return written

    def state_dict(self) -> dict[str, Any]:
        """The step, time and latest numbers of the record.

        Flush it first: a checkpoint must not hold a later step than the tables on the disk.
        """
        return {
            "step": self.step,
            "updates": self.updates,
            "wall_seconds": self.clock.seconds(),
            "latest": dict(self.record.latest),
            "config_hash": self.record.fixed["config_hash"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the folder's record: rows, metrics and events later than the state are dropped.

        Raises: RowsError if a file is damaged.
        """
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.clock.earlier, self.record.latest = float(state["wall_seconds"]), dict(state["latest"])
        # A newer cerl may know more options; the rows of one run stay one configuration.
        self.record.fixed["config_hash"] = str(state["config_hash"])
        for sentence in self.record.keep_until(self.step):
            self.note(sentence)

    def fell_back(self, sentence: str) -> None:
        """Says and records that a newer checkpoint could not be used."""
        self.note(sentence)
        self.record.damaged(self._at(self.step, self.updates))

    def forget(self) -> None:
        """Starts the record anew, for a run without a checkpoint; what it has is kept aside."""
        for sentence in self.record.forget():
            self.note(sentence)
