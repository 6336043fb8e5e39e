"""The loop: collect, learn, now and then evaluate, log, save.

The updates of an iteration are handed to `Collector.step`, which knows when the GPU is free.
"""

import contextlib
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cerl.config import Config, FramesConfig, evaluated
from cerl.device.estimate import estimate, explaining
from cerl.device.reservation import Reservation, check, reserved
from cerl.diagnose import diagnose, staleness
from cerl.evaluate import Evaluator, Result, evaluation_keys
from cerl.graph import captured
from cerl.record import checkpoint, trust
from cerl.record.checkpoint import CheckpointError, Checkpoints, Loaded, in_words
from cerl.record.files import read_small, sweep_temporaries, write_text
from cerl.record.folder import (
    FILE,
    change,
    check_fixed,
    check_out,
    fixed_hash,
    load_file,
    new_folder,
)
from cerl.record.lock import held
from cerl.record.log import Logger
from cerl.record.screen import Screen
from cerl.record.versions import record_versions
from cerl.stop import Stopped, stop_flag
from cerl.wiring import Parts, assemble, close, evaluation_env, make_agent, prepare

FINISHED = "finished"  # file of a run folder whose run came to its end
RETRY = 60.0  # seconds before something that could not be written is tried again


def updates_by(config: Config, steps: int) -> int:
    """Updates that are due once `steps` agent steps of one seed are done."""
    schedule = config.schedule
    return max(0, steps - config.replay.start) // schedule.update_every * schedule.updates


def train(config: Config) -> Path:
    """Runs a config from the start. Returns: its run folder.

    Raises: Stopped if it was told to stop, and saved.
    """
    check_out(config.out)
    with _reserved(config) as reservation:
        parts = assemble(config)
        folder = new_folder(config)
        with held(folder):
            record_versions(folder, parts.device)
            return Loop(config, parts, folder, reservation).run()


@contextlib.contextmanager
def _reserved(config: Config) -> Iterator[Reservation]:
    """Memory for a run. Raises: RuntimeError, before anything is allocated, if it does not fit."""
    needs = estimate(config, device=prepare(config), agent=make_agent)
    with reserved(needs) as reservation, explaining(needs):
        yield reservation


def finished(folder: Path, config: Config) -> bool:
    """Whether the run of a folder has come to its end, which `schedule.steps` may have put off."""
    try:
        content, _ = read_small(folder / FINISHED, most=200)
        steps = int(content.decode().partition(" ")[0])
    except (OSError, ValueError):
        return False
    return content.decode() == _finished_line(steps) and steps >= config.schedule.steps


def _finished_line(steps: int) -> str:
    """What `finished` says; a number with a flipped bit is not taken for another."""
    digest = hashlib.sha256(str(steps).encode()).hexdigest()[:12]
    return f"{steps} agent steps of one seed ({digest})\n"


def resume(
    folder: Path, *, changes: Mapping[str, Any] | None = None, trusted: bool = False
) -> Path:
    """Goes on from the newest intact checkpoint of a run folder, or starts the run where it has
    none: bit for bit where the simulator can.

    Args:   changes of options that may change in a run, by dotted key, which are then kept in its
            config.yaml; trusted, the run may import a module even if it is somebody else's.
    Raises: ValueError if there is nothing to resume, or another process is training the run;
            Stopped if it was told to stop, and saved.
    """
    config = load_file(folder / FILE, changes)
    trust.check(config, folder, trusted=trusted)
    with held(folder), _reserved(config) as reservation:
        if finished(folder, config):
            raise ValueError(
                f"{folder}: the run is finished; nothing to resume (cerl report {folder}). To "
                f"train it longer: cerl train --resume {folder} --schedule.steps STEPS"
            )
        sweep_temporaries(folder)
        loop = Loop(config, assemble(config), folder, reservation)
        loop.restore()
        change(folder, changes or {})
        for sentence in record_versions(folder, loop.parts.device):
            loop.logger.note(sentence)
        return loop.run()


class Loop:
    """Training up to the last iteration; one iteration is E agent steps of every seed.

    Attributes that a checkpoint holds: iteration, those done; made, updates that were due in them;
    filled, agent steps of one seed from which on updates are made; recorded, whether the metrics
    and scores that are due at this iteration are in the log.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        folder: Path,
        reservation: Reservation | None = None,
    ) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.reservation = reservation
        schedule, device = config.schedule, parts.device
        self.iteration, self.made, self.filled, self.recorded = 0, 0, 0, True
        self.envs = parts.env.spec.envs
        self.last = -(-schedule.steps // self.envs)
        self.identity = fixed_hash(folder)
        self.logger = Logger(
            folder,
            config=config,
            spec=parts.env.spec,
            seeds=config.seeds,
            steps_total=schedule.steps,
            diverged=parts.watch.diverged,
            run=self.identity,
        )
        self.checkpoints = Checkpoints(folder, parts.replay if config.log.save_replay else None)
        self.updates, self.sync = self._updates(), captured(parts.learner.sync, device)
        self.whole = True  # False in the midst of an iteration
        self.owed = False  # whether a checkpoint was due and could not be written
        self.saved: tuple[int, bool] | None = None  # iteration and `recorded` of the last save
        self.saved_at, self.tried_at, self.complaint = time.monotonic(), -math.inf, ""

    def _updates(self) -> list[Callable[[], None]]:
        """An update of which only the first stage is due, and one of all."""
        learner, replay = self.parts.learner, self.parts.replay
        updates = [learner.update_first, learner.update]
        if replay.placement == "host":  # whose rows cannot be sampled in a graph
            return updates
        return [captured(update, self.parts.device) for update in updates]

    def run(self) -> Path:
        """Trains from where it stands.

        Returns: the run folder.
        Raises:  Stopped if it was told to stop, and saved.
        """
        with self.logger, stop_flag() as stopped:
            try:
                self._introduce()
                if self.iteration == 0:
                    self.save()
                self._train(stopped)
                self.save(must=True)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._rescue(error)
                raise
            finally:
                self.checkpoints.close()
                close(self.parts)
            if self.iteration < self.last or not self.recorded:
                self.logger.note(
                    f"stopped and saved; go on with: cerl train --resume {self.folder}"
                )
                raise Stopped
        write_text(self.folder / FINISHED, _finished_line(self.steps))
        return self.folder

    @property
    def steps(self) -> int:
        """Agent steps of one seed that are done, at most those asked for."""
        return min(self.iteration * self.envs, self.config.schedule.steps)

    def _train(self, stopped: Callable[[], bool]) -> None:
        config, logger = self.config, self.logger
        if not self.recorded:
            self._record(stopped)
        while self.iteration < self.last and not stopped():
            self._iterate()
            if not self.recorded:
                self._record(stopped)
            if not self.recorded:  # told to stop: nothing of this step is in the log
                return
            self._stream()
            minutes = config.log.checkpoint_minutes
            late = minutes and time.monotonic() - self.saved_at > 60 * minutes
            if late or self.owed or self._due(config.log.checkpoint_every):
                self.save()
            logger.progress(self.iteration * self.envs, self.made)

    def _iterate(self) -> None:
        """One agent step of every environment, and the updates that are then due."""
        config, collector = self.config, self.parts.collector
        before = self.iteration * self.envs
        wanted = updates_by(config, before + self.envs)
        every = config.encoder.updates_between_refreshes
        refresh = every and wanted // every > self.made // every
        missing = range(self.made + 1, wanted + 1) if before >= self.filled else range(0)

        def learn() -> None:
            for number in missing:
                self.updates[number % config.agent.policy_every == 0]()
            self.made = wanted

        self.whole = False
        collector.step(learn)
        if refresh:
            collector.refresh()
        self._counted()
        self.whole = True

    def _counted(self) -> None:
        """An iteration is over; what is due in it comes next."""
        self.iteration += 1
        self.recorded = not self._due(self.config.log.every) and not self._due(
            self.config.eval.every
        )
        schedule = self.config.schedule
        if schedule.target_rate == 1.0 and self._passed(schedule.target_every):
            self.sync()

    def _passed(self, every: int) -> bool:
        """Whether the last iteration passed a multiple of so many agent steps of one seed."""
        steps = self.iteration * self.envs
        return steps // every > (steps - self.envs) // every

    def _due(self, every: int) -> bool:
        """`_passed`, or whether the last iteration is the run's last."""
        return self.iteration == self.last or self._passed(every)

    def _record(self, stopped: Callable[[], bool]) -> None:
        """Metrics, episodes and scores that are due go to the log, all of them or none.

        Told to stop, the evaluation is given up, and made on resuming.
        """
        config, parts, logger = self.config, self.parts, self.logger
        steps, evaluator = self.iteration * self.envs, parts.evaluator
        metrics = _measurements(config, parts) if self._due(config.log.every) else {}
        if self.reservation is not None and parts.device.type == "cuda":
            self.reservation.write()  # graphs have taken memory since, which nobody else can tell
        if found := parts.watch.look(steps, metrics):
            logger.note("\n".join(found))
            self.updates = self._updates()
        scores = None
        if self._due(config.eval.every):
            scores = evaluator.run(self.iteration, stopped=stopped)
            if scores is None:
                return
        real_steps = parts.collector.real_steps.cpu().clone()
        if metrics:
            logger.training(steps, self.made, metrics)
            logger.episodes(steps, self.made, real_steps, parts.collector.take_finished())
        if scores is not None:
            logger.evaluation(steps, self.made, real_steps, scores)
        self.recorded = True

    def _stream(self) -> None:
        """Hands new rows of replay to the disk; what it does not take now is tried again later."""
        if time.monotonic() - self.tried_at > RETRY:
            self._written(self.checkpoints.stream)

    def save(self, *, must: bool = False) -> None:
        """Writes a checkpoint, unless the last one is of this very state.

        Args:   must, raise CheckpointError where it cannot be written (else that is noted, and
                tried again a minute later).
        """
        if self.saved == (self.iteration, self.recorded):
            return
        self.owed = True
        if not must and time.monotonic() - self.tried_at <= RETRY:
            return

        def write() -> None:
            # A checkpoint never leads the record: rows that are lost would not be made again.
            if not self.logger.flush():
                raise CheckpointError(
                    f"{self.folder}: no checkpoint was saved, since the rows up to it could not be "
                    "written either; free some space"
                )
            self.checkpoints.save(self._snapshot())

        if must:
            write()
        elif not self._written(write):
            return
        self.saved, self.saved_at = (self.iteration, self.recorded), time.monotonic()
        self.owed, self.complaint = False, ""

    def _written(self, write: Callable[[], object]) -> bool:
        """Whether a write to the disk succeeded; a failure is said once."""
        try:
            write()
        except CheckpointError as error:
            self.tried_at = time.monotonic()
            if str(error) != self.complaint:
                self.logger.note(f"{error}; the run goes on and tries again")
            self.complaint = str(error)
            return False
        return True

    def _rescue(self, error: BaseException) -> None:
        """Saves what an error leaves whole, before the error ends the run."""
        if isinstance(error, CheckpointError):
            return
        if self.parts.collector.lost:  # the step counts, as one that lost its simulators
            self._counted()
        elif not self.whole:
            self.logger.note(
                "nothing was saved: the error came in the midst of a step or an update, and parts "
                "of the run may be ahead of others; go on from the last checkpoint with: cerl "
                f"train --resume {self.folder}"
            )
            return
        try:
            self.save(must=True)
        # Whatever goes wrong here, the first error is the one to be told.
        except Exception as second:
            self.logger.note(f"nothing could be saved: {second}")
        else:
            self.logger.note(f"saved; go on with: cerl train --resume {self.folder}")

    def _snapshot(self) -> dict:
        """Everything that a continuation needs, replay aside."""
        parts = self.parts
        return {
            "iteration": self.iteration,
            "made": self.made,
            "filled": self.filled,
            "recorded": self.recorded,
            "config": self.identity,
            "learner": parts.learner.state_dict(),
            "watch": parts.watch.state_dict(),
            "collector": parts.collector.state_dict(),
            "logger": self.logger.state_dict(),
        }

    def _template(self) -> dict:
        """What a checkpoint of this run looks like, to compare one with that is loaded."""
        expected = self._snapshot()
        expected["logger"]["latest"] = checkpoint.Free(checkpoint.numbers)
        if not self.parts.env.spec.resident:  # such are checked by themselves
            expected["collector"]["env"] = checkpoint.Free()
        return expected

    def restore(self) -> None:
        """Loads the newest intact checkpoint in place; without any the run starts anew."""
        config, parts, logger = self.config, self.parts, self.logger
        if not checkpoint.files(self.folder):
            logger.forget()
            logger.note(f"{self.folder}: no checkpoint yet; the run starts from its beginning")
            return
        loaded = checkpoint.newest(self.folder, replay=config.log.save_replay)
        exact = self.load(loaded)
        steps = self.iteration * self.envs
        for sentence in loaded.damaged:
            logger.fell_back(sentence)
        note = f"resumed at agent step {steps:,}"
        if not exact:
            note += "; the simulator cannot be restored: episodes under way were cut"
        if parts.env.note:
            note += f" ({parts.env.note})"
        self.filled = loaded.state["filled"]
        if steps and not (config.log.save_replay and loaded.replay and loaded.replay.total):
            self.filled = steps + config.replay.start
            note += f"; replay was not saved: {config.replay.start:,} agent steps refill it"
        logger.note(note)

    def load(self, loaded: Loaded) -> bool:
        """Takes over a checkpoint in place; one that is of something else changes nothing.

        Returns: whether the environments continue exactly.
        Raises:  CheckpointError, ConfigError or ValueError if it does not belong to this run.
        """
        parts, state = self.parts, loaded.state
        checkpoint.match(self._template(), state)
        check_fixed(self.folder, state["config"], where=str(loaded.file))
        if not 0 <= state["iteration"] <= self.last:
            raise ValueError(
                f"schedule.steps: expected at least the {state['iteration'] * self.envs:,} agent "
                f"steps that {self.folder} has trained already, got "
                f"{self.config.schedule.steps:,}"
            )
        self.checkpoints.restore(loaded)
        parts.learner.load_state_dict(state["learner"])
        parts.watch.load_state_dict(state["watch"])
        self.logger.load_state_dict(state["logger"])
        exact = parts.collector.load_state_dict(state["collector"])
        self.iteration, self.made = state["iteration"], state["made"]
        self.recorded, self.saved = state["recorded"], (self.iteration, state["recorded"])
        return exact

    def _introduce(self) -> None:
        """Says what the run needs of memory and disk."""
        if self.reservation is not None:
            self.logger.note(self.reservation.words)
            self.reservation.write()
        if self.config.compile and self.parts.device.type == "cpu":
            self.logger.note("compile: without effect on a CPU; it fuses what a GPU runs")
        every = -(-self.config.log.checkpoint_every // self.envs)
        needs = self.checkpoints.needs(self._snapshot(), every=every, iterations=self.last)
        free = shutil.disk_usage(self.folder).free + self.checkpoints.taken()
        words = f"checkpoints: up to {in_words(needs)} on disk, {in_words(free)} free"
        self.logger.note(words + ("" if needs < free else ": NOT ENOUGH; free some space"))


def _measurements(config: Config, parts: Parts) -> dict[str, Tensor]:
    """Training metrics and diagnostics, {name: [S, N] or [S]} on the host."""
    metrics = {name: value.cpu().clone() for name, value in parts.learner.metrics.items()}
    metrics["misses"] = parts.replay.misses.cpu().clone()
    if int(parts.learner.updates) > 0:
        metrics |= diagnose(parts.agent, parts.learner)
        if not isinstance(config.encoder, FramesConfig):
            metrics |= staleness(parts.agent, parts.collector)
    return metrics


def evaluate(
    folder: Path,
    *,
    episodes: int | None = None,
    policies: tuple[str, ...] | None = None,
    epsilon: float | None = None,
    trusted: bool = False,
) -> dict[str, Result]:
    """Evaluates a run's newest checkpoint with other episodes, policies or epsilon if given.

    Args: trusted, the run may import a module even if it is somebody else's.
    """
    config = load_file(folder / FILE)
    trust.check(config, folder, trusted=trusted)
    changes = {"episodes": episodes, "policies": policies, "epsilon": epsilon}
    asked = {name: value for name, value in changes.items() if value is not None}
    config = evaluated(config, asked)
    device = prepare(config)
    check(estimate(config, device=device, agent=make_agent, evaluating=True))
    keys = evaluation_keys(config.seeds, device)
    env = evaluation_env(config, device)
    agent = make_agent(config, env.spec, device)
    net = agent.build(keys=keys)
    loaded = checkpoint.load(folder)
    for sentence in loaded.damaged:
        Screen().line(sentence)
    state = loaded.state
    own = {"config": "", "learner": {"net": dict(net.state_dict())}}
    asked_for = {key: state[key] for key in own if key in state}
    if isinstance(asked_for.get("learner"), dict):
        asked_for["learner"] = {k: v for k, v in asked_for["learner"].items() if k == "net"}
    checkpoint.match(own, asked_for)
    check_fixed(folder, state["config"], where=str(loaded.file))
    checkpoint.put_net(net, state["learner"]["net"], what="learner.net")
    try:
        results = Evaluator(config, env, agent, net, keys=keys).run(0)
        assert results is not None, "nothing told the evaluation to stop"
        return results
    finally:
        env.close()
