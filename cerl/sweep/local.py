"""Grids of runs on this machine, one after the other or several at a time, resumable as a whole.

All that a sweep knows of a run is read from the run's folder, so the same command goes on after
whatever ended it: finished runs are kept, those that were begun are resumed, the others are
trained, and a run that another process still trains (of a sweep that was killed, say) is waited
for. A run that fails is reported at the end and keeps no other from its turn.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cerl import training
from cerl.config import Config, ConfigError
from cerl.record import files
from cerl.record.finished import finished
from cerl.record.folder import FILE, dump, fixed_hash, load_file
from cerl.record.lock import under_way
from cerl.record.screen import Screen
from cerl.stop import SAVED, Stopped, stop_flag

TELL_EVERY = 30.0  # seconds between looks at runs side by side
POLL = 0.2  # seconds between looks at whether one has ended
TAIL = 4096  # bytes at the end of a log among which its last line is looked for

Say = Callable[..., None]


def sweep(configs: Sequence[Config], out: Path, *, jobs: int = 1) -> list[Path]:
    """Trains every config, below the folder `out`.

    Args:    jobs, runs at a time; more than one run as processes of their own, whose output is
             added to `out`/logs.
    Returns: the run folders, in order.
    Raises:  RuntimeError naming the runs that failed, after the others were trained; Stopped if it
             was told to stop.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    say = Screen().line
    cells = [
        Cell(number, config.model_copy(update={"out": str(out)}), out)
        for number, config in enumerate(configs, 1)
    ]
    failures = _one_by_one(cells, say) if jobs == 1 else _side_by_side(cells, say, jobs)
    if failures:
        lines = "\n".join(failures)
        raise RuntimeError(
            f"{len(failures)} of {len(configs)} runs failed, the others are in {out} "
            f"(cerl report {out}); the same command tries the failed ones again:\n{lines}"
        )
    return [cell.earlier()[0] for cell in cells]


class Cell(NamedTuple):
    """One run of a sweep, and what its folder says of it."""

    number: int  # from 1, in the sweep's order
    config: Config
    out: Path

    @property
    def title(self) -> str:
        """What the run is, in a few words."""
        config = self.config
        return (
            f"run {self.number}, {config.preset or 'run'} on {config.env.family}/{config.env.name}"
        )

    def earlier(self) -> list[Path]:
        """Its run folders, finished ones first, then newest first; lengths do not matter."""
        wanted, found = fixed_hash(self.config), []
        for path in self.out.glob(f"*/{FILE}"):
            try:
                same = fixed_hash(load_file(path)) == wanted
            except ConfigError:  # changed by hand, or no longer whole
                same = False
            if same:
                found.append(path.parent)

        def order(folder: Path) -> tuple[bool, float]:
            return finished(folder, steps=self.config.schedule.steps), folder.stat().st_mtime

        return sorted(found, key=order, reverse=True)

    @property
    def logs(self) -> Path:
        """Folder of what the runs print, and of their locks."""
        self.out.mkdir(parents=True, exist_ok=True)
        return files.own_folder(self.out / "logs")

    def claim(self) -> int | None:
        """A lock on the run, held as long as anybody has the file descriptor open, a child that
        inherits it included: a run has a folder of its own to lock only after seconds of start-up.

        Returns: the descriptor; None if another process trains the run, or is about to.
        """
        path = self.logs / f".{fixed_hash(self.config)[:16]}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        if any(under_way(folder) for folder in self.earlier()):
            os.close(handle)
            return None
        return handle

    def free(self) -> bool:
        """Whether nobody trains the run."""
        handle = self.claim()
        if handle is not None:
            os.close(handle)
        return handle is not None

    def longer(self, folder: Path) -> dict[str, int]:
        """What a resumed run has to change to become as long as is asked for."""
        steps = self.config.schedule.steps
        return {"schedule.steps": steps} if load_file(folder / FILE).schedule.steps < steps else {}


def _one_by_one(cells: Sequence[Cell], say: Say) -> list[str]:
    failures = []
    for cell in cells:
        say(f"{cell.title} ({len(cells)} in all)", style="bold")
        try:
            _one(cell, say)
        # Whatever ends one run, the others have their turn.
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            say(f"failed: {text}", style="bold red")
            failures.append(f"{cell.title}: {text}")
    return failures


def _one(cell: Cell, say: Say) -> None:
    """Trains a run, or goes on with it, in this process. Raises: Stopped."""
    if not cell.free():
        say(f"{cell.title}: another process trains it, which is waited for")
    with stop_flag() as stopped:
        while (lock := cell.claim()) is None:
            if stopped():
                raise Stopped
            time.sleep(POLL)
    try:
        folder = next(iter(cell.earlier()), None)
        if folder is None:
            training.train(cell.config)
        elif finished(folder, steps=cell.config.schedule.steps):
            say(f"finished before: {folder}")
        else:
            say(f"resuming {folder}")
            training.resume(folder, changes=cell.longer(folder), trusted=True)
    finally:
        os.close(lock)


class _Job(NamedTuple):
    """A run in a process of its own."""

    cell: Cell
    process: subprocess.Popen
    log: Path
    begin: int  # size of the log when the process started

    def last_line(self) -> str:
        """The error if there is one, else the line written last."""
        with self.log.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(self.begin, end - TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["starting"])[-1].strip()


def _side_by_side(cells: Sequence[Cell], say: Say, jobs: int) -> list[str]:
    waiting, running, failures = list(cells), [], []
    others: list[Cell] = []  # whose runs other processes train
    told = time.monotonic()
    with stop_flag() as stopped:
        while (waiting or running or others) and not stopped():
            while waiting and len(running) + len(others) < jobs:
                cell = waiting.pop(0)
                try:
                    if (lock := cell.claim()) is None:
                        say(f"{cell.title}: another process trains it, which is waited for")
                        others.append(cell)
                    else:
                        running += _start(cell, lock, say)
                # A run that cannot be started keeps no other from its turn.
                except Exception as error:
                    say(f"{cell.title}: failed: {error}")
                    failures.append(f"{cell.title}: {type(error).__name__}: {error}")
            time.sleep(POLL)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                failures += _ended(job, say)
            for cell in [cell for cell in others if cell.free()]:
                others.remove(cell)
                waiting.insert(0, cell)
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                for job in running:
                    say(f"{job.cell.title}: {job.last_line()}")
        if stopped():
            _stop(running, others, say)
    return failures


def _start(cell: Cell, lock: int, say: Say) -> list[_Job]:
    """Starts or resumes a run as a process, which takes the lock over; none if it is finished."""
    try:
        folder = next(iter(cell.earlier()), None)
        if folder is not None and finished(folder, steps=cell.config.schedule.steps):
            say(f"{cell.title}: finished before: {folder}")
            return []
        config = cell.config
        stem = f"{config.preset or 'run'}-{config.env.family}/{config.env.name}"
        log = cell.logs / f"{cell.number:03d}-{stem.replace('/', '-').replace(':', '-')}.txt"
        if folder is not None:
            command = ["--resume", str(folder), "--trust"]
            for key, value in cell.longer(folder).items():
                command += [f"--{key}", str(value)]
        else:
            command = [str(log.with_suffix(".yaml"))]
            dump(config, command[0])
        say(f"{cell.title}: {'starting' if folder is None else 'resuming'}; {log}")
        with files.append(log) as output:
            begin = output.seek(0, 2)
            # A session of its own: Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                [sys.executable, "-m", "cerl", "train", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
    finally:
        os.close(lock)
    return [_Job(cell, process, log, begin)]


def _ended(job: _Job, say: Say) -> list[str]:
    """Says how a run ended. Returns: what to report of it at the end, if it failed."""
    code = job.process.returncode
    how = {0: "done", SAVED: "stopped and saved"}.get(code, "failed")
    say(f"{job.cell.title}: {how}; {job.log}")
    if code == 0:
        return []
    return [f"{job.cell.title}: {how}: {job.last_line()} (exit code {code}, {job.log})"]


def _stop(running: Sequence[_Job], others: Sequence[Cell], say: Say) -> None:
    """Has all runs saved and ended. Raises: Stopped."""
    say("stopped: waiting for the runs to save; the same command goes on")
    for job in running:
        job.process.send_signal(signal.SIGTERM)
    try:
        for job in running:
            job.process.wait()
    except KeyboardInterrupt:
        for job in running:
            job.process.kill()
        raise
    for cell in others:
        say(f"{cell.title}: its own process trains on")
    raise Stopped
