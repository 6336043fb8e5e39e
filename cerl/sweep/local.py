"""Trains many runs on this machine, one after the other or several at a time.

A sweep reads the state of each run from the run's folder and remembers nothing itself. So the same
command continues a sweep that was stopped or killed: finished runs are skipped, unfinished ones are
resumed, and the others are started. If another process still trains a run (the child of a sweep
that was killed, for example), the sweep waits for it. A failed run does not stop the others, and is
reported at the end.
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

from cerl import envs, training
from cerl.config import Config, ConfigError
from cerl.record import files
from cerl.record.finished import finished
from cerl.record.folder import FILE, dump, fixed_hash, load_file
from cerl.record.lock import under_way
from cerl.record.screen import Screen
from cerl.stop import SAVED, Stopped, stop_flag

TELL_EVERY = 30.0  # seconds between progress lines of runs that train at the same time
POLL = 0.2  # seconds between checks whether a run has ended
TAIL = 4096  # bytes at the end of a log that are searched for its last line

Say = Callable[..., None]  # prints a line; options as of `Screen.line`


def sweep(configs: Sequence[Config], out: Path, *, jobs: int = 1) -> list[Path]:
    """Trains a run for every config; their run folders are made in the folder `out`.

    Args:    jobs, how many runs train at the same time. With one job, runs train in this process.
             With more, each run is a process of its own, whose output is appended to a file in
             `out`/logs.
    Returns: the run folders, in the order of the configs.
    Raises:  RuntimeError naming the runs that failed, after all others were trained; Stopped if a
             signal asked the sweep to stop; ValueError if jobs is below 1 or a task does not exist,
             before anything is trained.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    say = Screen().line
    cells = [
        Cell(number, config.model_copy(update={"out": str(out)}), out)
        for number, config in enumerate(configs, 1)
    ]
    _check_names(cells)
    failures = _one_by_one(cells, say) if jobs == 1 else _side_by_side(cells, say, jobs)
    if failures:
        lines = "\n".join(failures)
        raise RuntimeError(
            f"{len(failures)} of {len(configs)} runs failed, the others are in {out} "
            f"(cerl report {out}); the same command tries the failed ones again:\n{lines}"
        )
    return [cell.earlier()[0] for cell in cells]


class Cell(NamedTuple):
    """One run of a sweep; its methods read the run's state from the disk."""

    number: int  # from 1, in the sweep's order
    config: Config
    out: Path  # folder in which run folders are made

    @property
    def title(self) -> str:
        """The run's number, preset and environment, for messages."""
        config = self.config
        return (
            f"run {self.number}, {config.preset or 'run'} on {config.env.family}/{config.env.name}"
        )

    def earlier(self) -> list[Path]:
        """Run folders in `out` with this run's options: finished ones first, then newest first.

        Options that may change on resuming, the length of the run among them, are not compared.
        """
        wanted, found = fixed_hash(self.config), []
        for path in self.out.glob(f"*/{FILE}"):
            try:
                same = fixed_hash(load_file(path)) == wanted
            except ConfigError:  # config.yaml was edited by hand or is damaged
                same = False
            if same:
                found.append(path.parent)

        def order(folder: Path) -> tuple[bool, float]:
            return finished(folder, steps=self.config.schedule.steps), folder.stat().st_mtime

        return sorted(found, key=order, reverse=True)

    @property
    def logs(self) -> Path:
        """The folder for the output of runs and for their lock files; it is created."""
        self.out.mkdir(parents=True, exist_ok=True)
        return files.own_folder(self.out / "logs")

    def claim(self) -> int | None:
        """Locks the run, so that no other sweep starts it too.

        The lock of a run folder does not suffice, because a run makes its folder only after seconds
        of start-up. This lock is held until every copy of the file descriptor is closed, including
        the copy that a child process inherits.

        Returns: the file descriptor; None if another process trains the run or is about to.
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
        """Whether no process trains the run or is about to."""
        handle = self.claim()
        if handle is not None:
            os.close(handle)
        return handle is not None

    def longer(self, folder: Path) -> dict[str, int]:
        """The option that makes an existing run as long as this config asks, by its dotted key.

        Returns: {} if the run in `folder` is as long already, or longer.
        """
        steps = self.config.schedule.steps
        return {"schedule.steps": steps} if load_file(folder / FILE).schedule.steps < steps else {}


def _check_names(cells: Sequence[Cell]) -> None:
    """Raises: ValueError with a line for each run whose task does not exist."""
    problems: list[str] = []
    for cell in cells:
        try:
            envs.check_name(cell.config.env)
        except ValueError as error:
            problems.append(f"{cell.title}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _one_by_one(cells: Sequence[Cell], say: Say) -> list[str]:
    """Trains the runs one after the other in this process. Returns: a line for each failed run."""
    failures = []
    for cell in cells:
        say(f"{cell.title} ({len(cells)} in all)", style="bold")
        try:
            _one(cell, say)
        # Any error of one run is caught, so that the remaining runs still train.
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            say(f"failed: {text}", style="bold red")
            failures.append(f"{cell.title}: {text}")
    return failures


def _one(cell: Cell, say: Say) -> None:
    """Trains or resumes a run in this process. Raises: Stopped."""
    if not cell.free():
        say(f"{cell.title}: another process trains it; waiting for that process")
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
    begin: int  # bytes that the log had when the process started; earlier sessions wrote them

    def last_line(self) -> str:
        """The last line that begins with `error:` if there is one, else the last line of all."""
        with self.log.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(self.begin, end - TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["starting"])[-1].strip()


def _side_by_side(cells: Sequence[Cell], say: Say, jobs: int) -> list[str]:
    """Trains up to `jobs` runs at a time, as processes. Returns: a line for each failed run."""
    waiting, running, failures = list(cells), [], []
    others: list[Cell] = []  # runs that processes of other sweeps train
    told = time.monotonic()
    with stop_flag() as stopped:
        while (waiting or running or others) and not stopped():
            while waiting and len(running) + len(others) < jobs:
                cell = waiting.pop(0)
                try:
                    if (lock := cell.claim()) is None:
                        say(f"{cell.title}: another process trains it; waiting for that process")
                        others.append(cell)
                    else:
                        running += _start(cell, lock, say)
                # Any error on starting one run is caught, so that the remaining runs still train.
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
    """Starts or resumes a run as a process of its own.

    Args:    lock, the file descriptor from `claim`. The process inherits it, and this function
             closes the sweep's own copy: the lock then lives as long as the process.
    Returns: the job; an empty list if the run is finished already.
    """
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
            # In a session of its own, the process gets no Ctrl-C from the terminal: it stops when
            # this process sends it SIGTERM, and only then.
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
    """Prints how a run ended. Returns: a line for the final report if the run did not succeed."""
    code = job.process.returncode
    how = {0: "done", SAVED: "stopped and saved"}.get(code, "failed")
    say(f"{job.cell.title}: {how}; {job.log}")
    if code == 0:
        return []
    return [f"{job.cell.title}: {how}: {job.last_line()} (exit code {code}, {job.log})"]


def _stop(running: Sequence[_Job], others: Sequence[Cell], say: Say) -> None:
    """Asks all runs to save and stop, and waits until they have ended. Raises: Stopped."""
    say("stopped: waiting for the runs to save; the same command continues the sweep")
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
        say(f"{cell.title}: the other process goes on training it")
    raise Stopped
