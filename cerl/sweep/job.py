"""A run as a process of its own: who may train it, how it is started, and how it ended."""

import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cerl.record import failure, files, heartbeat
from cerl.record.finished import finished
from cerl.record.folder import FILE, load_file
from cerl.record.lock import NO_LOCKS, clock, locked, trained, under_way
from cerl.stop import SAVED
from cerl.sweep.plan import PlannedRun
from cerl.sweep.slots import Place

CLAIM = ".claim"  # file in a run folder, locked by whoever starts the run and by the run itself
TAIL = 4096  # bytes at the end of a log that are searched for its last line


def title(run: PlannedRun) -> str:
    """The run's number, name and environment, for messages."""
    return f"run {run.number}, {run.label} on {run.env}"


def changes(run: PlannedRun, folder: Path, *, device: str) -> dict[str, Any]:
    """The options of a run folder that change when the run is trained now, by dotted key.

    Args:    device that was asked for: auto keeps that of the folder, but leaves out the number of
             a GPU, which counts only in the process that once was told it.
    Returns: a larger schedule.steps, if the plan asks for a longer run; another device.
    Raises:  ConfigError if config.yaml is damaged.
    """
    config, found = load_file(folder / FILE), {}
    if config.schedule.steps < run.steps:
        found["schedule.steps"] = run.steps
    kind = config.device.partition(":")[0]
    wanted = kind if device == "auto" else device
    if wanted != config.device:
        found["device"] = wanted
    return found


def claim(folder: Path) -> int | None:
    """Claims a run for a process that is about to train it.

    The lock of a run folder does not suffice: a process takes it only after seconds of start-up, in
    which another sweep could start the run too. The claim is held until every copy of the file
    descriptor is closed, including the copy that a child process inherits. Where the file system
    has no locks, nothing is claimed, and only heartbeats tell who trains.

    Returns: the file descriptor; None if another process trains the run or is about to.
    """
    handle = os.open(folder / CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise
    if _trained(folder):
        os.close(handle)
        return None
    return handle


def elsewhere(folder: Path) -> bool:
    """Whether another process trains the run of a folder or is about to, on this machine or on
    another one."""
    return locked(folder / CLAIM) or _trained(folder)


def _trained(folder: Path) -> bool:
    beat = heartbeat.read(folder)
    if beat is None or beat.over:
        return under_way(folder)
    return trained(folder, beat, now=clock(folder / CLAIM), host=platform.node())


def needs_place(folder: Path) -> bool:
    """Whether a run is trained on this machine by a process whose sweep has ended, so that it takes
    the place of one that this sweep could start."""
    beat = heartbeat.read(folder)
    here = beat is not None and beat.orphan and beat.host == platform.node()
    return here and under_way(folder)


class Other(NamedTuple):
    """A run that a process of another sweep trains."""

    run: PlannedRun
    since: float  # when this sweep found that out, in seconds since 1970 (Unix time)

    def failure(self, folder: Path) -> str:
        """Why the other process failed after that; "" if it did not. Args: folder of the run."""
        noted = failure.read(folder)
        return noted.message if noted is not None and noted.time >= self.since else ""


class Job(NamedTuple):
    """A run in a process of its own."""

    run: PlannedRun
    folder: Path
    place: Place
    process: subprocess.Popen
    log: Path
    begin: int  # bytes that the log had when the process started; earlier sessions wrote them
    started: float  # in seconds since 1970 (Unix time)

    def last_line(self) -> str:
        """The last line that begins with `error:` if there is one, else the last line of all."""
        with self.log.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(self.begin, end - TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["starting"])[-1].strip()


def start(
    run: PlannedRun,
    folder: Path,
    place: Place,
    *,
    device: str,
    environment: Mapping[str, str],
    lock: int,
) -> Job:
    """Starts or resumes a run as a process of its own.

    Args:   folder of the run; place where it trains; device, as of `changes`; environment, all
            variables of the process; lock, the file descriptor from `claim`, which the process
            inherits.
    Raises: ConfigError if config.yaml is damaged; OSError if the process cannot be started.
    """
    command = [sys.executable, "-m", "cerl", "train", "--resume", str(folder), "--trust"]
    for key, value in changes(run, folder, device=device).items():
        command += [f"--{key}", str(value)]
    log = files.own_folder(folder.parent / "logs") / f"{folder.name}.txt"
    with files.append(log) as output:
        begin = output.seek(0, 2)
        # In a session of its own, the process gets no Ctrl-C from the terminal: it stops when this
        # process sends it SIGTERM, and only then.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            pass_fds=[lock],
        )
    return Job(run, folder, place, process, log, begin, time.time())


def ended(job: Job) -> tuple[str, str]:
    """How the process of a job ended, and notes its failure in the run folder if it has not done so
    itself.

    Returns: "done", "stopped and saved", "stopped" while nothing was to be saved, "failed", or
             "elsewhere" if another process trains the run; and why a run has failed, or "".
    """
    code = job.process.returncode
    if code == 0:
        return "done", ""
    if code == SAVED:
        return "stopped and saved", f"told to stop by a signal (exit code {code})"
    # Another process may have begun to train the run while this one started up.
    if elsewhere(job.folder):
        return "elsewhere", ""
    if finished(job.folder, steps=job.run.steps):
        return "done", ""
    if code == -signal.SIGTERM:  # while it started up, or at its very end after it had saved
        return "stopped", "told to stop by a signal, before it trained or after it had saved"
    noted = failure.read(job.folder)
    if code < 0:
        why = f"killed by signal {-code} ({signal.strsignal(-code) or 'unknown'})"
        failure.note(job.folder, why, signal=-code)
    elif noted is not None and noted.time >= job.started:
        why = noted.message
    else:
        why = job.last_line().removeprefix("error: ")
        failure.note(job.folder, why)
    return "failed", why
