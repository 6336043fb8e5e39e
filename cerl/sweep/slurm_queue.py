"""The jobs that a sweep has submitted to SLURM, and which of its runs they hold in the queue.

The file `slurm/jobs.json` in the folder OUT of a sweep has the number of every job and the runs of
its tasks. Whether a run is queued is asked of SLURM itself (`squeue`), with one call for all jobs;
SLURM's accounting (`sacct`), which many clusters do not have, is not needed. This module imports no
torch.
"""

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cerl.config import ConfigError
from cerl.record import files

FOLDER = "slurm"  # in the folder of a sweep: scripts of jobs, and the file of their numbers
FILE = "jobs.json"  # in that folder
FORMAT = 1  # of that file
PATIENCE = 60.0  # seconds to wait for an answer of SLURM
SHORT = 5.0  # likewise, for those who only look
_LARGEST = 1 << 26  # bytes
# States of jobs that will not train any more, or whose processes are ending.
ENDING = ("COMPLETING", "STOPPED", "SIGNALING")


class Job(NamedTuple):
    """An array job that was submitted."""

    job: str  # its number
    cluster: str  # its name, where SLURM manages several; "" otherwise
    script: str  # name of the file in `FOLDER`
    first: int  # of its tasks, among all tasks of the script
    at_once: int  # how many of its tasks run at the same time, at most; 0: no limit
    tasks: tuple[tuple[int, ...], ...]  # numbers of the runs of each task


class Queued(NamedTuple):
    """A task of a job that is in SLURM's queue."""

    job: Job
    task: int
    state: str  # as SLURM calls it, e.g. PENDING or RUNNING
    reason: str  # why it waits, e.g. Priority; "None" if it does not


def noted(out: Path) -> tuple[Job, ...]:
    """The jobs of a sweep, oldest first; () if it submitted none. Raises: ConfigError."""
    path = out / FOLDER / FILE
    try:
        content, _ = files.read_small(path, most=_LARGEST)
        tree = json.loads(content)
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, expected {FORMAT}")
        return tuple(
            Job(
                job=str(entry["job"]),
                cluster=str(entry["cluster"]),
                script=str(entry["script"]),
                first=int(entry["first"]),
                at_once=int(entry["at_once"]),
                tasks=tuple(tuple(map(int, task)) for task in entry["tasks"]),
            )
            for entry in tree["jobs"]
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); it has the numbers of the sweep's jobs in SLURM. "
            "Cancel those that `squeue --me` shows, and delete the file"
        ) from error


def note(out: Path, jobs: Sequence[Job]) -> None:
    """Replaces the file of the jobs. Raises: OSError."""
    lines = ",\n".join(json.dumps(job._asdict()) for job in jobs)
    text = f'{{"format": {FORMAT}, "jobs": [\n{lines}\n]}}\n'
    files.write_text(files.own_folder(out / FOLDER) / FILE, text)


def queued(jobs: Iterable[Job], *, patience: float = PATIENCE) -> list[Queued]:
    """The tasks of these jobs that are in SLURM's queue, running ones included.

    Args:   patience, seconds to wait for the answer.
    Raises: RuntimeError with SLURM's words if it gives no answer.
    """
    found: list[Queued] = []
    clusters: dict[str, dict[str, Job]] = {}
    for job in jobs:
        clusters.setdefault(job.cluster, {})[job.job] = job
    for cluster, known in clusters.items():
        where = ["-M", cluster] if cluster else []
        command = ["squeue", *where, "-h", "-r", "-o", "%i|%T|%r", "-j", ",".join(known)]
        done = run(command, patience=patience)
        # Of a single job that has left the queue, SLURM says that its number is invalid.
        if done.returncode and "Invalid job id" not in done.stderr:
            raise RuntimeError(f"squeue: {done.stderr.strip() or f'exit code {done.returncode}'}")
        for line in done.stdout.splitlines() if done.returncode == 0 else []:
            name, state, reason = (line.split("|", 2) + ["", ""])[:3]
            number, _, task = name.partition("_")
            job = known.get(number)
            if job is not None and task.isdecimal() and int(task) < len(job.tasks):
                found.append(Queued(job, int(task), state, reason))
    return found


def run(command: Sequence[str], *, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Runs a program of SLURM. Raises: RuntimeError if it is missing or does not end in time."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
        )
    except FileNotFoundError:
        raise RuntimeError(missing(command[0])) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error


def missing(program: str) -> str:
    """The message for a program of SLURM that is not installed."""
    return (
        f"{program}: no such program: SLURM is not installed here, or not in PATH. Start the "
        "command on a login node of the cluster; some need `module load slurm`. On Debian and "
        "Ubuntu, `apt install slurm-client` installs it"
    )


def of_runs(out: Path) -> dict[int, Queued]:
    """The queued tasks of a sweep by the numbers of their runs, for those who only look.

    Returns: {} if nothing was submitted, SLURM is not installed here, or it does not answer.
    """
    try:
        jobs = noted(out)
        if not jobs or shutil.which("squeue") is None:
            return {}
        found = queued(jobs, patience=SHORT)
    except (ConfigError, RuntimeError):
        return {}
    return {number: one for one in found for number in one.job.tasks[one.task]}
