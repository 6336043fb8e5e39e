"""A Run: its parts, its folder and its progress; saves checkpoints there and restores them."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cerl.config import Config, forks
from cerl.device.pick import described
from cerl.footprint.reservation import Reservation
from cerl.graph import captured
from cerl.record import checkpoint
from cerl.record.checkpoint import Checkpoints, Loaded, in_words
from cerl.record.folder import check_fixed, fixed_hash
from cerl.record.heartbeat import Pulse, Rival
from cerl.record.log import Logger
from cerl.record.saver import Saver
from cerl.record.versions import FILE as VERSIONS
from cerl.schedule import Schedule
from cerl.state import CheckpointError, Free, match, numbers
from cerl.stop import Stopped, stop_flag
from cerl.text import few, visible
from cerl.wiring import Parts, close


class Run:
    """The state of a run, and what its training loop calls.

    Attributes that a checkpoint holds: iteration, how many are done; filled, agent steps of one
    seed before which no updates are made (a resumed run may have to refill its replay first);
    recorded, whether the metrics and scores that are due at this iteration are in the log.

    `whole` is False in the middle of an iteration: some parts of the run may then have advanced and
    others not, so no checkpoint can be saved.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        folder: Path,
        reservation: Reservation | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.reservation, self.pulse = reservation, pulse
        self.schedule = Schedule.of(config, envs=parts.env.spec.envs)
        self.iteration, self.filled, self.recorded, self.whole = 0, 0, True, True
        self.identity = fixed_hash(folder)
        self.logger = Logger(
            folder,
            config=config,
            spec=parts.env.spec,
            diverged=parts.watch.diverged,
            run=self.identity,
        )
        replay = parts.replay if config.log.save_replay else None
        self.saver = Saver(Checkpoints(folder, replay), self.logger)
        self.sync = captured(parts.learner.sync, parts.device)
        self.capture_updates()

    def capture_updates(self) -> None:
        """Captures `update` and `update_first` (only the first stage of an update) as CUDA graphs.

        Called again after seeds were frozen, since a graph repeats exactly what it captured.
        """
        learner = self.parts.learner
        self.update, self.update_first = learner.update, learner.update_first
        # A graph cannot sample rows that are in host memory.
        if self.parts.replay.placement == "device":
            self.update = captured(learner.update, self.parts.device)
            self.update_first = captured(learner.update_first, self.parts.device)

    @property
    def updates(self) -> int:
        """Number of updates that were due so far."""
        return self.schedule.updates_by(self.iteration * self.schedule.envs)

    @property
    def steps(self) -> int:
        """Agent steps of one seed so far; with E > 1 up to E - 1 more than schedule.steps."""
        return self.iteration * self.schedule.envs

    @property
    def over(self) -> bool:
        """Whether the run has done its last iteration and logged the last scores."""
        return self.iteration >= self.schedule.last and self.recorded

    def count(self) -> None:
        """Ends an iteration: counts it, copies the online network to the target network if that is
        due (hard update), and notes whether the log is due."""
        self.iteration += 1
        config, schedule, number = self.config, self.schedule, self.iteration
        copied = config.schedule.target_rate == 1.0
        if copied and schedule.passes(number, config.schedule.target_every):
            self.sync()
        due = (schedule.due(number, every) for every in (config.log.every, config.eval.every))
        self.recorded, self.whole = not any(due), True

    def learn(self, updates: range) -> None:
        """Makes the updates with these numbers; on some only the first stage is due."""
        for number in updates:
            if self.schedule.all_stages(number):
                self.update()
            else:
                self.update_first()

    @contextlib.contextmanager
    def session(self) -> Iterator[Callable[[], bool]]:
        """A context around the training loop. If an error ends the loop, it tries to save the run.

        Yields: a function that returns True once the run was told to stop.
        Raises: Stopped at the end, if the run was told to stop and has saved; Rival, also by the
                function, if another process trains the run too; any error of the loop.
        """
        if self.pulse is not None:
            self.pulse.follow(lambda: self.steps, device=described(self.parts.device))
        with self.logger, stop_flag() as stopped:
            try:
                self.introduce()

                def told() -> bool:
                    self.check_alone()
                    return stopped()

                yield told
            except (KeyboardInterrupt, Rival):
                raise
            except BaseException as error:
                self.rescue(error)
                raise
            finally:
                self.saver.checkpoints.close()
                close(self.parts)
            if not self.over:
                self.logger.note(
                    f"stopped and saved; go on with: cerl train --resume {self.folder}"
                )
                raise Stopped

    def introduce(self) -> None:
        """Prints how much memory and disk space the run needs."""
        note, config, checkpoints = self.logger.note, self.config, self.saver.checkpoints
        if self.reservation is not None:
            note(self.reservation.words)
            self.reservation.write()
        if config.compile and self.parts.device.type == "cpu":
            note("compile: without effect on a CPU; it fuses what a GPU runs")
        if missed := self.missed():
            note(
                f"log.keep: the run is past agent step {few(missed)}, so no checkpoint stays there"
            )
        every = -(-config.log.checkpoint_every // self.schedule.envs)
        needs = checkpoints.needs(
            self.snapshot(),
            every=every,
            iterations=self.schedule.last,
            stay=self.schedule.kept,
        )
        free = shutil.disk_usage(self.folder).free + checkpoints.taken()
        words = f"checkpoints: up to {in_words(needs)} on disk, {in_words(free)} free"
        note(words + ("" if needs < free else ": NOT ENOUGH; free some space"))

    def missed(self) -> list[str]:
        """Agent steps of log.keep that the run is past, without a checkpoint that was kept."""
        own, envs = self.config, self.schedule.envs
        there = {checkpoint.step_kept(file) for file in checkpoint.files(self.folder)}
        return [
            f"{step:,}"
            for step in own.log.keep
            # A fork may have the steps of its parent among its options.
            if own.origin.forked_at < step <= self.steps and -(-step // envs) * envs not in there
        ]

    def save(self, *, must: bool = False) -> None:
        """Writes a checkpoint of the run; it is kept for good if log.keep or log.keep_every say so.

        Args:   must, raise if it cannot be written.
        Raises: Rival.
        """
        self.check_alone()
        # While scores of this iteration are owed, resuming still has to log them.
        kept = self.recorded and self.iteration > 0 and self.schedule.keeps(self.iteration)
        name = self.iteration, self.recorded
        self.saver.save(self.snapshot, name=name, must=must, kept_at=self.steps if kept else 0)

    def save_if_due(self) -> None:
        """Writes a checkpoint if one is due after this iteration."""
        log, schedule, number = self.config.log, self.schedule, self.iteration
        due = schedule.due(number, log.checkpoint_every) or schedule.keeps(number)
        if self.saver.late(log.checkpoint_minutes) or due:
            self.save()

    def check_alone(self) -> None:
        """Raises: Rival if another process trains the run too, and began before this one."""
        if self.pulse is not None:
            self.pulse.check()

    def rescue(self, error: BaseException) -> None:
        """Saves the run, if it can, before an error ends it."""
        if isinstance(error, CheckpointError):
            return
        # After a failed simulator the step is counted and can be saved, see `Player.step`.
        if self.parts.collector.player.lost:
            self.count()
        elif not self.whole:
            self.logger.note(
                "nothing was saved: the error came in the middle of a step or an update, so the "
                "state of the run may be inconsistent; go on from the last checkpoint with: cerl "
                f"train --resume {self.folder}"
            )
            return
        try:
            self.save(must=True)
        # The caller raises the first error, so an error while saving is only noted.
        except Exception as second:
            self.logger.note(f"nothing could be saved: {second}")
        else:
            self.logger.note(f"saved; go on with: cerl train --resume {self.folder}")

    def snapshot(self) -> dict[str, Any]:
        """Everything that resuming needs, except the rows of replay."""
        parts = self.parts
        found = {
            "iteration": self.iteration,
            "made": self.updates,
            "filled": self.filled,
            "recorded": self.recorded,
            "config": self.identity,
            "learner": parts.learner.state_dict(),
            "watch": parts.watch.state_dict(),
            "collector": parts.collector.state_dict(),
            "logger": self.logger.state_dict(),
        }
        if sampler := parts.replay.sampler.state_dict():
            found["sampler"] = sampler
        return found

    def template(self) -> dict[str, Any]:
        """The structure that a checkpoint of this run must have, see `cerl.state.match`."""
        expected = self.snapshot()
        expected["logger"]["latest"] = Free(numbers)
        if not self.parts.env.spec.resident:  # simulators check their own state when they load it
            expected["collector"]["env"] = Free()
        return expected

    def restore(self) -> None:
        """Loads the newest intact checkpoint in place. If there is none, the run starts from its
        beginning.

        Raises: CheckpointError, ConfigError or ValueError if no checkpoint can be used.
        """
        config, parts, logger = self.config, self.parts, self.logger
        if not checkpoint.files(self.folder):
            forks.refuse_unmade(config)
            logger.forget()
            # The folder of a run that was only planned so far has no versions of a session.
            if (self.folder / VERSIONS).exists():
                logger.note(f"{self.folder}: no checkpoint yet; the run starts from its beginning")
            return
        loaded = checkpoint.newest(self.folder, replay=config.log.save_replay)
        exact = self.load(loaded)
        for sentence in loaded.damaged:
            logger.fell_back(sentence)
        note = f"resumed at agent step {self.steps:,}"
        if self.iteration == self.schedule.forked and not self.recorded:
            note = f"forked from {visible(config.origin.run)} at agent step {self.steps:,}"
        if not exact:
            note += "; the simulator cannot be restored: episodes under way were cut"
        if parts.env.note:
            note += f" ({parts.env.note})"
        self.filled = loaded.state["filled"]
        if self.steps and not (config.log.save_replay and loaded.replay and loaded.replay.total):
            self.filled = self.steps + config.replay.start
            note += f"; replay was not saved: {config.replay.start:,} agent steps refill it"
        logger.note(note)

    def load(self, loaded: Loaded) -> bool:
        """Loads a checkpoint in place, after checking that it belongs to this run.

        Returns: whether the environments continue exactly.
        Raises:  CheckpointError, ConfigError or ValueError if it does not belong to this run.
        """
        parts, state = self.parts, loaded.state
        match(self.template(), state)
        check_fixed(self.folder, state["config"], where=str(loaded.file))
        if not 0 <= state["iteration"] <= self.schedule.last:
            raise ValueError(
                f"schedule.steps: expected at least the "
                f"{state['iteration'] * self.schedule.envs:,} agent steps that {self.folder} has "
                f"trained already, got {self.config.schedule.steps:,}"
            )
        self.saver.checkpoints.restore(loaded)
        parts.replay.load_sampler(state.get("sampler", {}))
        parts.learner.load_state_dict(state["learner"])
        parts.watch.load_state_dict(state["watch"])
        self.logger.load_state_dict(state["logger"])
        exact = parts.collector.load_state_dict(state["collector"])
        self.iteration, self.recorded = state["iteration"], state["recorded"]
        self.saver.saved = (self.iteration, self.recorded)
        return exact
