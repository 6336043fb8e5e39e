"""The Record of a run: result rows, metrics, and the same numbers for TensorBoard or a tracker.

Rows and metrics are two tables on the disk (`cerl/record/results.py`); the boards that `log.track`
names get the same numbers (`cerl/record/boards.py`). The metric `value_error` is Q minus the Monte
Carlo return, so it is positive where Q is too high. What the code of Lin et al. 2024 logs as
`Overestimation` has the opposite sign. `docs/runs.md` lists all metrics.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cerl import __version__, explore
from cerl.config import Config, SacConfig
from cerl.config.options import INDIVIDUAL
from cerl.data import EnvSpec
from cerl.record import results, tags
from cerl.record.boards import Boards

Arrays = Mapping[str, np.ndarray]


class Moment(NamedTuple):
    """When something was measured."""

    step: int  # agent steps of one seed
    updates: int
    wall_seconds: float  # seconds that all sessions of the run have lasted


def over_episodes(returns: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Means and standard deviations over episodes.

    Args:    returns, lengths [S, K, episodes] float64; a length of NaN marks an episode that was
             not played.
    Returns: episodes (their number), return, return_std (divisor `episodes`), length, [S, K] each;
             NaN without episodes, and where a return is NaN.
    """
    played = ~np.isnan(lengths)
    count = played.sum(-1)
    share = np.where(count > 0, count, np.nan)

    def total(amounts: np.ndarray) -> np.ndarray:
        # A cumulative sum adds from left to right, so trailing zeros for episodes that only other
        # seeds have played do not change a bit of this seed's result. `sum` may add in any order.
        return np.where(played, amounts, 0.0).cumsum(-1)[..., -1]

    mean = total(returns) / share
    square = total((returns - mean[..., None]) ** 2) / share
    length = total(lengths) / share
    return {"episodes": count, "return": mean, "return_std": np.sqrt(square), "length": length}


def learning_rates(config: Config) -> dict[str, float]:
    """The learning rates of an update: of values, and of SAC's policies and temperatures."""
    lr, agent = config.optim.lr, config.agent
    if not isinstance(agent, SacConfig):
        return {"learning_rate": lr}
    return {
        "learning_rate": lr,
        "actor_learning_rate": agent.actor_lr or lr,
        "temperature_learning_rate": agent.temperature_lr or lr,
    }


class Record:
    """The tables and boards of one run. `flush` writes them to the disk.

    All arrays are on the host, [S, N] or [S]. `latest` maps each policy to its newest mean return
    over the seeds; it is part of checkpoints. Nothing is written before another method is called;
    `keep_until` may come first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Config,
        spec: EnvSpec,
        diverged: Mapping[int, int],
        run: str,
    ) -> None:
        """Args: folder of the run, exists; diverged {index of a seed: step from which on its rows
        are marked}, a mapping that the watch changes; run, the hash of the run's options that its
        tables contain.
        """
        self.config, self.spec, self.diverged = config, spec, diverged
        self.seeds = np.asarray(config.seeds, dtype=np.int64)
        self.tandem = config.ensemble.duty == "tandem"
        options = results.scoring(config)
        self.rows = results.Rows(
            folder / "rows.parquet",
            results.ROWS,
            run=run,
            options=options,
            origin=config.origin,
        )
        self.metrics = results.Rows(folder / "metrics.parquet", results.METRICS, run=run)
        self.each = config.log.members == "each"
        self.boards = Boards(folder, config)
        self.latest: dict[str, float] = {}
        self.fixed = {
            "preset": config.preset or "(file)",
            "agent": config.agent.name,
            "env": results.env_name(config),
            "members": config.ensemble.members,
            "config_hash": results.hash_of(options),
            "version": __version__,
        }

    def training(self, at: Moment, metrics: Arrays, *, rates: tuple[float, float]) -> None:
        """Appends metrics and diagnostics.

        Args: metrics {name: [S, N] or [S]}; rates, agent steps of one seed and updates per second;
              NaN: unknown.
        """
        self._measure(at, metrics)
        step = torch.tensor(at.step, dtype=torch.int64)
        charts = {
            "charts/epsilon": float(explore.epsilon(self.config.epsilon_schedule, step)),
            **{f"charts/{name}": rate for name, rate in learning_rates(self.config).items()},
        }
        speeds = zip(("charts/SPS", "charts/updates_per_second"), rates, strict=True)
        charts |= {tag: rate for tag, rate in speeds if math.isfinite(rate)}
        for s in self._kept(at):
            scalars = tags.training_scalars(metrics, s, each=self.each) | charts
            if s in self.diverged:
                scalars["charts/diverged"] = 1.0
            self.boards.write(s, at.step, scalars)

    def episodes(self, at: Moment, real_steps: np.ndarray, finished: Arrays) -> None:
        """Appends the training episodes of every member that acted. Members without an episode get
        no row.

        Args: real_steps [S], agent steps so far without reset steps; finished {name: [S, N]}, the
              number "episodes" and means over them: "return", "length", "value" (the acting
              member's largest Q), "mc" (discounted clipped return-to-go).
        """
        values = {**finished, "value_error": finished["value"] - finished["mc"]}
        played, kept = values["episodes"], self._kept(at)
        s, member = np.nonzero(played)
        self._score(
            at,
            real_steps,
            seed=s,
            member=member,
            policy="train",
            role=[self._role(int(i)) for i in member],
            scores={name: values[name][s, member] for name in ("episodes", "return", "length")},
        )
        extra = {f"train_{name}": values[name] for name in ("value", "mc")}
        extra["value_error"] = values["value_error"]
        self._measure(at, extra, skip=played == 0)
        for index in kept:
            scalars = tags.episode_scalars(values, index, each=self.each)
            self.boards.write(index, at.step, scalars)
        if played[kept].sum() > 0:
            finite = np.where(np.isfinite(values["return"]), played, 0)
            self.latest["train"] = tags.weighted(values["return"][kept], finite[kept])

    def evaluation(
        self,
        at: Moment,
        real_steps: np.ndarray,
        policy: str,
        scores: Arrays,
        diversity: np.ndarray,
        errors: Arrays,
    ) -> None:
        """Appends the scores of one policy.

        Args: real_steps [S], agent steps of training so far without reset steps; scores as
              `over_episodes` returns them; diversity [S, K] of the members' actions; errors of the
              values that members predict, `cerl.evaluate.Result.errors`.
        """
        s, k = (index.ravel() for index in np.indices(scores["return"].shape))
        each = policy in INDIVIDUAL
        whole = "random" if policy == "random" else "aggregate"
        self._score(
            at,
            real_steps,
            seed=s,
            member=k if each else np.full_like(k, -1),
            policy=policy,
            role=[self._role(int(i)) if each else whole for i in k],
            scores={name: values.ravel() for name, values in scores.items()},
        )
        name = "action_variance" if self.spec.continuous else "vote_entropy"
        self._measure(at, {f"{name}_{policy}": diversity if each else diversity[:, 0]})
        self._measure(at, {f"{name}_{policy}": values for name, values in errors.items()})
        shown = {name: scores[name] for name in tags.SCORES} | {name: diversity, **errors}
        for index in self._kept(at):
            scalars = tags.evaluation_scalars(
                policy, shown, index, tandem=self.tandem, each=self.each
            )
            self.boards.write(index, at.step, scalars)
        returns = scores["return"][self._kept(at)]
        if each and self.tandem:
            for member, role in enumerate(("active", "passive")):
                role += policy.removeprefix("individual")
                self.latest[role] = tags.mean(returns[:, member])
        else:
            self.latest[policy] = tags.mean(returns)

    def damaged(self, at: Moment) -> None:
        """Records in the metrics that a newer checkpoint was damaged."""
        self._measure(at, {"checkpoints_damaged": np.ones(len(self.seeds))})

    def _role(self, member: int) -> str:
        return ("active", "passive")[member] if self.tandem else "member"

    def _kept(self, at: Moment) -> list[int]:
        """Indices of the seeds that are recorded at this step: all, except that with `diverged:
        cut` a seed ends when it diverges."""
        cut = self.config.diverged == "cut"
        ends = {s: step for s, step in self.diverged.items() if cut}
        return [s for s in range(len(self.seeds)) if at.step <= ends.get(s, at.step)]

    def marked(self) -> str:
        """Which seeds diverged, and when, as text; "" if none did."""
        own: dict[int, list[str]] = {}
        for s, step in sorted(self.diverged.items()):
            own.setdefault(step, []).append(str(self.seeds[s]))
        return " and ".join(
            f"seed{'s'[: len(seeds) - 1]} {' '.join(seeds)} diverged at {step:,} agent steps"
            for step, seeds in sorted(own.items())
        )

    def _score(
        self,
        at: Moment,
        real_steps: np.ndarray,
        *,
        seed: np.ndarray,
        member: np.ndarray,
        policy: str,
        role: list[str],
        scores: Arrays,
    ) -> None:
        """Appends result rows.

        Args: real_steps [S]; seed, member, role and every array of scores have one entry for each
              row; seed is an index in [0, S).
        """
        kept = np.flatnonzero(np.isin(seed, self._kept(at)))
        seed, member, role = seed[kept], member[kept], [role[k] for k in kept.tolist()]
        scores = {name: values[kept] for name, values in scores.items()}
        size = len(seed)
        real = real_steps.astype(np.int64)[seed]
        columns: dict[str, Any] = {k: [v] * size for k, v in self.fixed.items()}
        columns |= {
            "seed": self.seeds[seed],
            "member": member.astype(np.int64),
            "role": role,
            "policy": [policy] * size,
            "step": [at.step] * size,
            "frames": real * self.spec.frames,
            "real_steps": real,
            "updates": [at.updates] * size,
            "episodes": scores["episodes"].astype(np.int64),
            "return": scores["return"],
            "return_std": scores.get("return_std", [None] * size),
            "length": scores["length"],
            "wall_seconds": [at.wall_seconds] * size,
            "diverged": np.isin(seed, list(self.diverged)),
        }
        self.rows.append({name: columns[name] for name in results.ROWS.names})

    def _measure(self, at: Moment, values: Arrays, skip: np.ndarray | None = None) -> None:
        """Appends metrics. Args: values {name: [S, N] or [S]}; skip [S, N] bool, True: no value."""
        for name, value in values.items():
            index = np.indices(value.shape).reshape(value.ndim, -1)
            if skip is not None:
                index = index[:, ~skip.ravel()]
            index = index[:, np.isin(index[0], self._kept(at))]
            count = index.shape[1]
            columns = {
                "step": [at.step] * count,
                "seed": self.seeds[index[0]],
                "member": index[1] if value.ndim == 2 else np.full(count, -1),
                "name": [name] * count,
                "value": value[tuple(index)],
            }
            self.metrics.append(columns)

    def flush(self, *, metrics: bool = True) -> str:
        """Writes the tables and events to the disk.

        Args:    metrics, also write the table of metrics.
        Returns: an error message if a table could not be written, else "". Its rows stay in memory.
        Raises:  RowsError if the folder has rows of another run.
        """
        complaint = ""
        for table in (self.rows, self.metrics) if metrics else (self.rows,):
            try:
                table.flush()
            except OSError as error:
                complaint = f"{table.path}: could not be written ({error.strerror or error})"
        self.boards.flush()
        return complaint

    def forget(self) -> list[str]:
        """Starts with empty tables; existing files are renamed. Returns: a sentence on each."""
        said: list[str] = []
        self.boards.begin_after(-1)
        for table in (self.rows, self.metrics):
            if table.path.is_file() and not table.path.is_symlink():
                aside = table.path.with_name(f"dropped-{time.time_ns()}-{table.path.name}")
                table.path.rename(aside)
                said.append(f"the existing {table.path.name} was renamed to {aside.name}")
            table.keep_until(-1)
        return said

    def keep_until(self, step: int) -> list[str]:
        """Continues the tables in the folder, without rows and events later than `step`.

        Returns: a sentence on each table whose file is missing.
        Raises:  RowsError if a file is damaged.
        """
        said: list[str] = []
        self.boards.begin_after(step)
        for table in (self.rows, self.metrics):
            if not table.path.is_file():
                said.append(f"{table.path} is missing; its content before step {step:,} is lost")
            table.keep_until(step)
        return said
