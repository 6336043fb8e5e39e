"""What a run tells: progress, result rows, TensorBoard. The only place that prints.

Rows and metrics are the record (`cerl/record/results.py`), TensorBoard shows the same numbers
(`cerl/record/tensorboard.py`). The metric `value_error` is Q minus the Monte Carlo
return, positive where Q is too high: the opposite sign of what the original code logs as
`Overestimation`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cerl import __version__, explore
from cerl.config import Config
from cerl.data import EnvSpec
from cerl.record import results as rows
from cerl.record import tensorboard
from cerl.record.progress import Pace, clock, count
from cerl.record.screen import Screen

Array = Tensor | np.ndarray

REFRESH = 0.25  # seconds between looks of the progress bar
FLUSH = 60.0  # seconds after which metrics are written even without a checkpoint


def _numpy(values: Any) -> np.ndarray:
    """A tensor or array as float64 on the host."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double().numpy()
    return np.asarray(values, dtype=np.float64)


def over_episodes(returns: Array, lengths: Array) -> dict[str, np.ndarray]:
    """Statistics over the last axis; an episode whose length is NaN was not played.

    Args:    returns, lengths [S, K, episodes].
    Returns: episodes, return, return_std (divisor `episodes`), length, [S, K] each; NaN without
             episodes, and where a return is NaN.
    """
    values, steps = _numpy(returns), _numpy(lengths)
    played = ~np.isnan(steps)
    count = played.sum(-1)
    share = np.where(count > 0, count, np.nan)

    def total(amounts: np.ndarray) -> np.ndarray:
        # One after the other: columns that only other seeds have played then change no bit.
        return np.where(played, amounts, 0.0).cumsum(-1)[..., -1]

    mean = total(values) / share
    square = total((values - mean[..., None]) ** 2) / share
    length = total(steps) / share
    return {"episodes": count, "return": mean, "return_std": np.sqrt(square), "length": length}


class Logger:
    """Rows, TensorBoard and progress of one run; used as a context around its loop.

    Steps are agent steps of one seed. What it is given is on the host already; nothing here waits
    for a device.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Config,
        spec: EnvSpec,
        seeds: Sequence[int],
        steps_total: int,
        diverged: Mapping[int, int] | None = None,
        run: str = "",
        quiet: bool = False,
    ) -> None:
        """Args: folder of the run, exists; steps_total, the run's length; diverged {index of a
              seed: step from which on it is marked}, which may change; run, the hash of its options
              that stands in its tables; quiet, prints notes only.

        Nothing is written before the first call, so `load_state_dict` may follow.
        """
        self.folder, self.config, self.spec = Path(folder), config, spec
        self.seeds, self.members, self.quiet = tuple(seeds), config.ensemble.members, quiet
        self.diverged: Mapping[int, int] = {} if diverged is None else diverged
        self.rows = rows.Rows(self.folder / "rows.parquet", rows.ROWS, run=run)
        self.metrics = rows.Rows(self.folder / "metrics.parquet", rows.METRICS, run=run)
        self.board = tensorboard.Board(self.folder / "tensorboard", self.seeds)
        self.pace = Pace(steps_total)
        self.screen = Screen()
        self.console = self.screen.console
        self.live: Live | None = None
        self.step, self.updates, self.spent = 0, 0, 0.0  # spent: seconds of earlier sessions
        self.began = self.flushed = time.monotonic()
        self.refreshed = 0.0
        self.latest: dict[str, float] = {}  # headline numbers, means over seeds
        self.complaint = ""
        self.fixed = {
            "preset": config.preset or "(file)",
            "agent": config.agent.name,
            "env": rows.env_name(config),
            "members": self.members,
            "config_hash": rows.config_hash(config),
            "version": __version__,
        }

    def __enter__(self) -> "Logger":
        self.began = self.flushed = time.monotonic()
        if not self.quiet:
            self._introduce()
            if self.console.is_terminal:
                self.live = Live(console=self.console, auto_refresh=False)
                with self.screen.spared():
                    self.live.start()
        self.pace.add(self.step, self.updates)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self._show()
            with self.screen.spared():
                self.live.stop()
            self.live = None
        try:
            self.flush(final=kind is None)
        finally:
            self.board.close()
        if kind is None and not self.quiet:
            done = f"done, but {self._marked()}" if self.diverged else "done"
            self._line(
                f"{done}: {self.step:,} agent steps of {len(self.seeds)} seeds in "
                f"{clock(self.wall_seconds)}; rows in {self.rows.path}; curves: tensorboard "
                f"--logdir {self.board.folder}"
            )

    @property
    def wall_seconds(self) -> float:
        """Seconds that all sessions of this run have lasted."""
        return self.spent + time.monotonic() - self.began

    def _introduce(self) -> None:
        c, fixed = self.config, self.fixed
        self._line(
            f"{fixed['preset']} on {fixed['env']}: seeds {' '.join(map(str, self.seeds))} x "
            f"{self.members} members, {self.pace.total:,} agent steps each; folder {self.folder}"
        )
        for name, value in c.model_dump(mode="json").items():
            if isinstance(value, dict):
                text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
                self._line(f"  {name}: {text.strip()}")

    def _line(self, text: str) -> None:
        self.screen.line(text)

    def note(self, text: str) -> None:
        """Prints a sentence that the user must see, quiet or not."""
        self._line(text)

    def progress(self, step: int, updates: int) -> None:
        """Called every iteration; looks at the clock, and redraws four times a second."""
        self.step, self.updates = step, updates
        now = time.monotonic()
        if now - self.refreshed >= REFRESH:
            self.refreshed = now
            self.pace.add(step, updates)
            self._show()

    def _show(self) -> None:
        if self.live is not None:
            where, scores = self.headline()
            grid = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=self.pace.total, completed=self.step, width=10)
            grid.add_row(bar, Text(where, no_wrap=True, overflow="ellipsis"))
            with self.screen.spared():
                self.live.update(Group(grid, Text(scores)), refresh=True)

    def headline(self) -> tuple[str, str]:
        """Where the run is and its pace; its latest scores (means over seeds)."""
        steps, updates = self.pace.rates()
        seeds = f" x {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        scores = "  ".join(f"{name} {value:.4g}" for name, value in self.latest.items())
        scores = f"{scores}  {self._marked()}".strip()
        return (
            f"{self.step:,}/{self.pace.total:,} steps  ETA {clock(self.pace.left())}  "
            f"{count(steps)} steps/s{seeds}  {count(updates)} updates/s"
        ), scores

    def training(self, step: int, updates: int, metrics: Mapping[str, Array]) -> None:
        """Metrics and diagnostics at a step. Args: metrics {name: [S, N] or [S]}, NaN allowed."""
        self._at(step, updates)
        values = {name: _numpy(value) for name, value in metrics.items()}
        self._measure(values)
        at = torch.tensor(step, dtype=torch.int64)
        epsilon = float(explore.epsilon(self.config.epsilon_schedule, at))
        rate = self.pace.rates()[0]
        for s in self._kept():
            scalars = tensorboard.training_scalars(values, s) | {"charts/epsilon": epsilon}
            if s in self.diverged:
                scalars["charts/diverged"] = 1.0
            if math.isfinite(rate):
                scalars |= {"charts/SPS": rate, "Train/AverageStepsPerSecond": rate}
            self.board.write(s, step, scalars)
        self._flush_if_old()

    def episodes(
        self, step: int, updates: int, real_steps: Array, finished: Mapping[str, Array]
    ) -> None:
        """Training episodes since the last call, by the member that acted.

        Args: real_steps [S] so far; finished {name: [S, N]}, the count "episodes" and means over
              them: "return", "length", "value" (the acting member's largest Q), "mc" (discounted
              clipped return-to-go). Members without an episode get no row.
        """
        self._at(step, updates)
        values = {name: _numpy(value) for name, value in finished.items()}
        if "value" in values and "mc" in values:
            values["value_error"] = values["value"] - values["mc"]
        played = values["episodes"]
        s, member = np.nonzero(played)
        kept = self._kept()
        self._score(
            real_steps,
            seed=s,
            member=member,
            policy="train",
            role=[self._role(int(i)) for i in member],
            scores={name: values[name][s, member] for name in ("episodes", "return", "length")},
        )
        extra = {f"train_{name}": values[name] for name in ("value", "mc") if name in values}
        extra |= {name: values[name] for name in ("value_error",) if name in values}
        self._measure(extra, skip=played == 0)
        for index in kept:
            self.board.write(index, step, tensorboard.episode_scalars(values, index))
        if played[kept].sum() > 0:
            finite = np.where(np.isfinite(values["return"]), played, 0)
            self.latest["train"] = tensorboard.weighted(values["return"][kept], finite[kept])
        self._flush_if_old()
        if self.live is None and not self.quiet:
            self.pace.add(step, updates)
            self._line("  ".join(self.headline()).rstrip())

    def evaluation(
        self, step: int, updates: int, real_steps: Array, results: Mapping[str, Sequence[Array]]
    ) -> None:
        """Scores of every evaluated policy; writes the rows to disk.

        Args: real_steps [S] of training so far; results {policy: (returns [S, K, episodes],
              lengths [S, K, episodes] in agent steps[, diversity of the members' actions [S, K]])}
              with K = N for `individual`, else 1. An episode whose length is NaN was not played.
        """
        self._at(step, updates)
        tandem = self.config.ensemble.duty == "tandem"
        for policy, (returns, lengths, *diversity) in results.items():
            scores = over_episodes(returns, lengths)
            s, k = (i.ravel() for i in np.indices(scores["return"].shape))
            each = policy in rows.INDIVIDUAL
            own = "random" if policy == "random" else "aggregate"
            self._score(
                real_steps,
                seed=s,
                member=k if each else np.full_like(k, -1),
                policy=policy,
                role=[self._role(int(i)) if each else own for i in k],
                scores={name: values.ravel() for name, values in scores.items()},
            )
            if diversity:
                name = "action_variance" if self.spec.continuous else "vote_entropy"
                values = _numpy(diversity[0])
                scores["variance" if self.spec.continuous else "entropy"] = values
                self._measure({f"{name}_{policy}": values if each else values[:, 0]})
            for index in self._kept():
                drawn = "random" in results
                scalars = tensorboard.evaluation_scalars(
                    policy, scores, index, tandem=tandem, drawn=drawn
                )
                self.board.write(index, step, scalars)
            self._remember(policy, scores["return"][self._kept()])
        self.flush(metrics=False)
        self._flush_if_old()
        if not self.quiet:
            numbers = "  ".join(f"{k} {v:.4g}" for k, v in self.latest.items() if k != "train")
            numbers = f"{numbers}  {self._marked()}".rstrip()
            self._line(f"  evaluation at {step:,} agent steps: {numbers}")

    def _remember(self, policy: str, returns: np.ndarray) -> None:
        if policy in rows.INDIVIDUAL and self.config.ensemble.duty == "tandem":
            for member, name in enumerate(("active", "passive")):
                name += policy.removeprefix("individual")
                self.latest[name] = tensorboard.mean(returns[:, member])
        else:
            self.latest[policy] = tensorboard.mean(returns)

    def _role(self, member: int) -> str:
        if self.config.ensemble.duty == "tandem":
            return ("active", "passive")[member]
        return "member"

    def _kept(self) -> list[int]:
        """Indices of the seeds that are recorded at this step."""
        cut = self.config.diverged == "cut"
        ends = {s: step for s, step in self.diverged.items() if cut}
        return [s for s in range(len(self.seeds)) if self.step <= ends.get(s, self.step)]

    def _marked(self) -> str:
        """Which seeds diverged, and when; empty if none did."""
        own: dict[int, list[str]] = {}
        for s, step in sorted(self.diverged.items()):
            own.setdefault(step, []).append(str(self.seeds[s]))
        return " and ".join(
            f"seed{'s'[: len(seeds) - 1]} {' '.join(seeds)} diverged at {step:,} agent steps"
            for step, seeds in sorted(own.items())
        )

    def _at(self, step: int, updates: int) -> None:
        self.step, self.updates = step, updates

    def _score(
        self,
        real_steps: Array,
        *,
        seed: np.ndarray,
        member: np.ndarray,
        policy: str,
        role: list[str],
        scores: Mapping[str, np.ndarray],
    ) -> None:
        """Appends result rows. Args: seed, indices in 0..S; member, role, scores: one a row."""
        at = np.flatnonzero(np.isin(seed, self._kept()))
        seed, member, role = seed[at], member[at], [role[k] for k in at.tolist()]
        scores = {name: values[at] for name, values in scores.items()}
        size = len(seed)
        real = _numpy(real_steps).astype(np.int64)[seed]
        columns: dict[str, Any] = {k: [v] * size for k, v in self.fixed.items()}
        columns |= {
            "seed": np.asarray(self.seeds, dtype=np.int64)[seed],
            "member": member.astype(np.int64),
            "role": role,
            "policy": [policy] * size,
            "step": [self.step] * size,
            "frames": real * self.spec.frames,
            "real_steps": real,
            "updates": [self.updates] * size,
            "episodes": scores["episodes"].astype(np.int64),
            "return": scores["return"],
            "return_std": scores.get("return_std", [None] * size),
            "length": scores["length"],
            "wall_seconds": [self.wall_seconds] * size,
            "diverged": np.isin(seed, list(self.diverged)),
        }
        self.rows.append({name: columns[name] for name in rows.ROWS.names})

    def _measure(self, values: Mapping[str, np.ndarray], skip: np.ndarray | None = None) -> None:
        """Appends metrics {name: [S, N] or [S]}; skip [S, N] bool, what was not measured."""
        for name, value in values.items():
            index = np.indices(value.shape).reshape(value.ndim, -1)
            if skip is not None:
                index = index[:, ~skip.ravel()]
            index = index[:, np.isin(index[0], self._kept())]
            count = index.shape[1]
            member = index[1] if value.ndim == 2 else np.full(count, -1)
            columns = {
                "step": [self.step] * count,
                "seed": np.asarray(self.seeds, dtype=np.int64)[index[0]],
                "member": member,
                "name": [name] * count,
                "value": value[tuple(index)],
            }
            self.metrics.append(columns)

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
        complaint = ""
        for table in (self.rows, self.metrics) if metrics else (self.rows,):
            try:
                table.flush()
            except OSError as error:
                complaint = f"{table.path}: could not be written ({error.strerror or error})"
        written = not complaint
        self.board.flush()
        if not complaint and self.board.error is not None:
            reason = self.board.error.strerror or self.board.error
            complaint = f"{self.board.folder}: no more TensorBoard events ({reason}); rows go on"
            final = False
        if complaint and final:
            raise rows.RowsError(f"{complaint}; its last rows are lost. Free some space")
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
            "wall_seconds": self.wall_seconds,
            "latest": dict(self.latest),
            "config_hash": self.fixed["config_hash"],
        }

    def fell_back(self, sentence: str) -> None:
        """Says and records that a newer checkpoint could not be used."""
        self.note(sentence)
        self._measure({"checkpoints_damaged": np.ones(len(self.seeds))})

    def forget(self) -> None:
        """Starts the record anew, for a run without a checkpoint; what it has is kept aside."""
        self.board.after = -1
        for table in (self.rows, self.metrics):
            if table.path.is_file() and not table.path.is_symlink():
                aside = table.path.with_name(f"dropped-{time.time_ns()}-{table.path.name}")
                table.path.rename(aside)
                self.note(f"{table.path.name} of before is kept aside as {aside.name}")
            table.keep_until(-1)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the folder's record: rows, metrics and events later than the state are dropped.

        Raises: RowsError if a file is damaged.
        """
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.spent, self.latest = float(state["wall_seconds"]), dict(state["latest"])
        self.board.after = self.step
        # A newer cerl may know more options; the rows of one run stay one configuration.
        self.fixed["config_hash"] = str(state["config_hash"])
        for table in (self.rows, self.metrics):
            if not table.path.is_file():
                self.note(f"{table.path} is gone, and with it all before step {self.step:,}")
            table.keep_until(self.step)
