"""Trains runs as processes, several at a time, and waits for those that others train."""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cerl.record import failure
from cerl.record.finished import finished
from cerl.stop import Stopped, stop_flag
from cerl.sweep.job import Job, Other, claim, elsewhere, ended, needs_place, start, title
from cerl.sweep.plan import PlannedRun
from cerl.sweep.slots import Place, Slots
from cerl.sweep.view import View

TELL_EVERY = 30.0  # seconds between lines on the runs that train, where there is no terminal
LOOK_EVERY = 1.0  # seconds between checks of the runs that other processes train


class SideBySide:
    """The runs of a sweep that trains them as processes.

    Args of the constructor: runs, whose folders are in `out`; slots, the places for their
    processes; view, shows the progress; device, that was asked for; variables of the environment
    that all processes get; tries, how often a run is started at most whose process a signal kills;
    stop, asked every second, returns True if all runs shall save and stop.

    Attributes: signals, the numbers of those that this process got; told, titles of the runs that
    somebody else told to stop.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        out: Path,
        slots: Slots,
        view: View,
        *,
        device: str,
        variables: Mapping[str, str],
        tries: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.out, self.slots, self.view = out, slots, view
        # The process of a place sees one GPU, whose number is 0 there, so no number is passed on.
        self.device, self.variables = device.partition(":")[0], variables
        self.waiting = [run for run in runs if not self._finished(run)]
        if done := len(runs) - len(self.waiting):
            view.line(f"{done} of {len(runs)} runs are finished already")
        self.at_once = min(slots.count, len(self.waiting))  # runs that share the CPU cores
        self.running: list[Job] = []
        self.others: list[Other] = []
        self.gone: queue.SimpleQueue[Job] = queue.SimpleQueue()  # jobs whose process has ended
        self.failures: list[str] = []
        self.tries, self.stop = tries, stop
        self.before: dict[int, int] = {}  # tries that had failed before, by the number of the run
        self.signals: list[int] = []
        self.told: list[str] = []

    def train(self) -> list[str]:
        """Trains all runs. Returns: a line for each failed run. Raises: Stopped."""
        looked = told = time.monotonic()
        with stop_flag() as flag:
            self.signals = flag.signals

            def stopped() -> bool:
                return flag() or self.stop()

            while (self.waiting or self.running or self.others) and not stopped():
                self._fill()
                # No process is polled: a thread for each one reports its end.
                with contextlib.suppress(queue.Empty):
                    self._end(self.gone.get(timeout=LOOK_EVERY))
                now = time.monotonic()
                if now - looked >= LOOK_EVERY:
                    looked = now
                    self._look()
                    self.view.draw()
                if now - told >= TELL_EVERY and self.view.live is None:
                    told = now
                    for job in self.running:
                        self.view.line(f"{title(job.run)}: {job.last_line()}")
            if stopped():
                self._stop()
        return self.failures

    def _finished(self, run: PlannedRun) -> bool:
        return finished(self.out / run.folder, steps=run.steps)

    def _fill(self) -> None:
        """Starts runs as long as there is a free place."""
        others = self._others_here()
        while self.waiting and (place := self.slots.take(others=others)) is not None:
            run, job = self.waiting.pop(0), None
            try:
                job = self._start(run, place)
            # Any error on starting one run is caught, so that the remaining runs still train.
            except Exception as error:
                failure.note(self.out / run.folder, failure.in_words(error))
                self._fail(run, "failed", failure.in_words(error))
            if job is None:
                self.slots.give(place)
                others = self._others_here()

    def _others_here(self) -> int:
        """Places that runs of a sweep that has ended still take."""
        return sum(needs_place(self.out / other.run.folder) for other in self.others)

    def _start(self, run: PlannedRun, place: Place) -> Job | None:
        """Starts a run in a place. Returns: None if it needs none."""
        folder = self.out / run.folder
        if (lock := claim(folder)) is None:
            self.view.line(f"{title(run)}: another process trains it")
            self.others.append(Other(run, time.time()))
            return None
        try:
            if self._finished(run):
                self.view.line(f"{title(run)}: done by another process")
                return None
            if run.number not in self.before:
                noted = failure.read(folder)
                self.before[run.number] = 0 if noted is None else noted.tries
            environment = {**self.slots.environment(place, at_once=self.at_once), **self.variables}
            job = start(run, folder, place, device=self.device, environment=environment, lock=lock)
        finally:
            os.close(lock)  # the process of the run has its own copy
        where = f" on GPU {place.gpu}" if place.gpu else ""
        how = "resuming" if any(folder.glob("checkpoint-*.pt")) else "starting"
        self.view.line(f"{title(run)}: {how}{where}; {job.log}")
        self.running.append(job)

        def wait() -> None:
            job.process.wait()
            self.gone.put(job)

        threading.Thread(target=wait, name=f"wait for {folder.name}", daemon=True).start()
        return job

    def _end(self, job: Job) -> None:
        """Takes a job whose process has ended from the running ones, and tells how it ended."""
        self.running.remove(job)
        self.slots.give(job.place)
        how, why = ended(job)
        if how == "elsewhere":
            self.view.line(f"{title(job.run)}: another process trains it")
            self.others.append(Other(job.run, time.time()))
        elif how == "done":
            self.view.line(f"{title(job.run)}: done; {job.log}")
        elif how == "failed" and self._again(job):
            self.view.line(f"{title(job.run)}: {why} ({job.log}); it is tried again")
            self.waiting.insert(0, job.run)
        else:
            if how != "failed":
                self.told.append(title(job.run))
            self._fail(job.run, how, f"{why} ({job.log})")

    def _again(self, job: Job) -> bool:
        """Whether a run whose process has failed is tried again: if a signal killed it, e.g. since
        memory ran out, and not too often."""
        noted = failure.read(job.folder)
        if noted is None or job.process.returncode >= 0:
            return False
        return noted.tries - self.before.get(job.run.number, 0) < self.tries

    def _fail(self, run: PlannedRun, how: str, why: str) -> None:
        text = f"{title(run)}: {how}: {why}"
        self.view.line(text, style="bold red" if how == "failed" else "")
        self.failures.append(text)

    def _look(self) -> None:
        """Looks which runs other processes do not train any more."""
        for other in list(self.others):
            folder = self.out / other.run.folder
            if elsewhere(folder):
                continue
            self.others.remove(other)
            if why := other.failure(folder):
                self._fail(other.run, "failed", why)
            else:  # it is finished, or its process ended early and this sweep takes it over
                self.waiting.insert(0, other.run)

    def _stop(self) -> None:
        """Asks all runs to save and stop, and waits until they have ended. Raises: Stopped."""
        line = self.view.line
        line("stopped: waiting for the runs to save; the same command continues the sweep")
        for job in self.running:
            job.process.send_signal(signal.SIGTERM)
        left = list(self.running)
        try:
            while left:
                with contextlib.suppress(queue.Empty):
                    job = self.gone.get(timeout=LOOK_EVERY)
                    left.remove(job)
                    line(f"{title(job.run)}: ended with exit code {job.process.returncode}")
                self.view.draw()
        except KeyboardInterrupt:
            for job in left:
                job.process.kill()
            raise
        for other in self.others:
            line(f"{title(other.run)}: the other process goes on training it")
        raise Stopped
