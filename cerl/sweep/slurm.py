"""Submits the runs of a sweep to SLURM, and leaves: nothing stays behind on the login node.

A submission is a script in OUT/slurm and one or more array jobs of it. A task of an array trains
one run, or several at the same time, by `cerl sweep-run` (`cerl/sweep/worker.py`). SLURM holds no
state that is needed: what is trained already stands in the run folders.
"""

import contextlib
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from filelock import FileLock, Timeout

from cerl import __version__
from cerl.config import ConfigError
from cerl.record import files
from cerl.record.finished import finished
from cerl.record.lock import works
from cerl.record.screen import Screen
from cerl.sweep import slurm_queue
from cerl.sweep.plan import PlannedRun
from cerl.sweep.slurm_queue import FOLDER, Job
from cerl.sweep.worker import STOP
from cerl.text import few

LOCK = ".lock"  # file in OUT/slurm, locked while jobs are submitted
PATIENCE = 120.0  # seconds to wait for that lock
ENDING = 60.0  # seconds to wait for jobs that are ending: SLURM may put them into the queue again
LEAD = 120  # seconds before a job's time is over in which its runs save, unless --sbatch says more
# The most tasks of an array where SLURM does not say it: SLURM's own default of MaxArraySize.
ARRAY = 1001
# Options of sbatch that this module sets itself, or that would make another kind of job.
_OWN = ("--array", "-a", "--wrap", "--parsable", "--wait", "-W")
# Options of sbatch that ask for GPUs.
_GPU = re.compile(r"(^|\s)(--gres(=|\s+)\S*gpu|--tres-per-\w+(=|\s+)\S*gpu|--gpus|-G)")


class Asked(Protocol):
    """What of the command line matters here; `cerl.sweep.command.Asked` has more."""

    @property
    def title(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def jobs(self) -> int: ...
    @property
    def per_job(self) -> int: ...
    @property
    def sbatch(self) -> tuple[str, ...]: ...
    @property
    def setup(self) -> tuple[str, ...]: ...
    @property
    def prefix(self) -> tuple[str, ...]: ...


class Chunk(NamedTuple):
    """One array job of a script."""

    first: int  # of its tasks, among all tasks of the script
    count: int  # of its tasks
    at_once: int  # how many of them run at the same time; 0: no limit
    after: int | None  # number of the chunk that has to end before, None: none


def kind(asked: Asked) -> str:
    """The kind of device on which jobs train: that of --device, else cuda if the options of sbatch
    ask for a GPU, and cpu if they do not. This machine's own devices do not count.

    Raises: ConfigError if --device names one GPU by its number, which SLURM chooses.
    """
    if ":" in asked.device:
        raise ConfigError(
            f"--device {asked.device}: expected cpu or cuda with --launcher slurm, since SLURM "
            'chooses the GPU; ask for one with --sbatch "--gres=gpu:1"'
        )
    if asked.device in ("cpu", "cuda"):
        return asked.device
    return "cuda" if any(_GPU.search(options) for options in asked.sbatch) else "cpu"


def check(asked: Asked) -> None:
    """Raises: ConfigError if an option of the launcher cannot be passed to SLURM."""
    kind(asked)
    if asked.jobs and asked.per_job > asked.jobs:
        raise ConfigError(
            f"--per-job: expected at most the {asked.jobs} of --jobs, which limits the runs that "
            f"train at the same time; got {asked.per_job}"
        )
    for option, texts in (("sbatch", asked.sbatch), ("setup", asked.setup)):
        for text in texts:
            if not text.strip() or "\n" in text:
                raise ConfigError(f"--{option}: expected one line, got {text!r}")
    for text in asked.sbatch:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--sbatch {text!r}: {error}") from None
        if not words[0].startswith("-"):
            raise ConfigError(
                f'--sbatch: expected options of sbatch, e.g. --sbatch "--partition=gpu '
                f'--time=4:00:00", got {text!r}'
            )
        for word in words:
            if word.partition("=")[0] in _OWN or word.startswith("-a"):
                raise ConfigError(
                    f"--sbatch {text!r}: {word.partition('=')[0]} is set by cerl itself; --jobs N "
                    "says how many runs train at the same time, --per-job K how many in one job"
                )


def sweep(runs: Sequence[PlannedRun], out: Path, asked: Asked) -> bool:
    """Submits those runs that are neither finished nor in the queue, and says how to go on.

    Returns: whether all runs are finished.
    Raises:  ConfigError if SLURM is not installed; RuntimeError with SLURM's words if it refuses.
    """
    line = Screen().line
    left = [run for run in runs if not finished(out / run.folder, steps=run.steps)]
    if done := len(runs) - len(left):
        line(f"{done} of {len(runs)} runs are finished already")
    if not left:
        return True
    if shutil.which("sbatch") is None:
        raise ConfigError(f"--launcher slurm: {slurm_queue.missing('sbatch')}")
    with _locked(out):
        jobs = list(slurm_queue.noted(out))
        found = _settled(jobs, line)
        queued = {number for one in found for number in one.job.tasks[one.task]}
        new = [run for run in left if run.number not in queued]
        if len(new) < len(left):
            line(f"{len(left) - len(new)} runs are in SLURM's queue already")
        if new:
            alive = {one.job: 0 for one in found}
            for one in found:
                alive[one.job] += 1
            jobs = [job for job in jobs if job in alive]
            _submit(new, out, asked, jobs, alive, line)
    where = shlex.quote(str(out))
    line(f"states of the runs: cerl status {where}")
    line(f"output of jobs: {out / 'logs'}/slurm-JOB_TASK.txt; of runs: {out / 'logs'}/RUN.txt")
    line(f"cancel (runs save): cerl sweep --cancel {where}")
    line("the same command again submits what failed or was cancelled; at the end, it reports")
    return False


def _submit(
    runs: Sequence[PlannedRun],
    out: Path,
    asked: Asked,
    jobs: list[Job],
    alive: Mapping[Job, int],
    line: Callable[[str], None],
) -> None:
    """Writes a script and submits its arrays.

    Args: jobs in the queue, to which those are added; alive, how many tasks each of them has left.
    """
    tasks = _tasks(runs, asked)
    script = _fresh(files.own_folder(out / FOLDER))
    files.own_folder(out / "logs")
    files.write_text(script, text(tasks, out, asked))
    taken = sum(min(count, job.at_once or count) for job, count in alive.items())
    wait = bool(asked.jobs) and taken >= places(asked)
    free = places(asked) if wait else max(0, places(asked) - taken)
    chunks = chunked(len(tasks), most=largest_array(), at_once=free)
    ids: list[str] = []
    for chunk in chunks:
        after = [job.job for job in alive] if wait else []
        after = after if chunk.after is None else [ids[chunk.after]]
        command = [*sbatch(chunk, after=after), str(script.absolute()), str(chunk.first)]
        job, cluster = _answer(command, out, ids)
        ids.append(job)
        own = tasks[chunk.first : chunk.first + chunk.count]
        jobs.append(Job(job, cluster, script.name, chunk.first, chunk.at_once, tuple(own)))
        slurm_queue.note(out, jobs)
    of = f" as tasks of {len(tasks)} jobs" if len(tasks) < len(runs) else ""
    line(f"{len(runs)} runs submitted{of}: job{'s' * (len(ids) > 1)} {' '.join(ids)} ({script})")


def _answer(command: Sequence[str], out: Path, before: Sequence[str]) -> tuple[str, str]:
    """Submits an array. Returns: its number, and the cluster or "".

    Args:   before, numbers of the arrays that were submitted before.
    Raises: RuntimeError with SLURM's words.
    """
    done = slurm_queue.run(["env", *_without(), *command])
    job, _, cluster = done.stdout.strip().partition(";")
    if done.returncode or not job.isdecimal():
        words = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        so_far = f"submitted before that: {' '.join(before)}. " if before else ""
        raise RuntimeError(
            f"SLURM refused the job: {words}\n{so_far}The script is {command[-2]}. Once the reason "
            f"is gone, the same command submits what is left; cerl status {out} shows it"
        )
    return job, cluster


def _without() -> list[str]:
    """Words of the program `env` that remove variables which a job must not inherit: those of a job
    in which this process runs, and the GPUs of this machine."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER")
    names = [name for name in os.environ if name.startswith("SLURM_") and name not in kept]
    return [word for name in (*names, "CUDA_VISIBLE_DEVICES") for word in ("-u", name)]


def places(asked: Asked) -> int:
    """How many tasks run at the same time at most, so that no more than --jobs runs do; 0: no
    limit."""
    return max(1, asked.jobs // max(1, asked.per_job)) if asked.jobs else 0


def _tasks(runs: Sequence[PlannedRun], asked: Asked) -> list[tuple[int, ...]]:
    """The numbers of the runs of each task."""
    size, numbers = max(1, asked.per_job), [run.number for run in runs]
    return [tuple(numbers[at : at + size]) for at in range(0, len(numbers), size)]


def chunked(tasks: int, *, most: int, at_once: int) -> list[Chunk]:
    """Array jobs for a number of tasks.

    The limit of tasks that run at the same time is shared among the arrays. If there are more
    arrays than places, each array waits for an earlier one.

    Args: most, tasks that an array may have; at_once, tasks of all arrays together that may run at
          the same time, 0: no limit.
    """
    firsts = range(0, tasks, most)
    lanes = min(at_once, len(firsts)) or len(firsts)
    found = []
    for number, first in enumerate(firsts):
        lane = number % lanes
        share = at_once // lanes + (lane < at_once % lanes)
        after = number - lanes if number >= lanes else None
        found.append(Chunk(first, min(most, tasks - first), share, after))
    return found


def largest_array() -> int:
    """The most tasks that this cluster allows in an array.

    Raises: RuntimeError if it allows none.
    """
    done = slurm_queue.run(["scontrol", "show", "config"])
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    most = int(found[1]) if found else ARRAY
    if limit := re.search(r"\bmax_array_tasks=(\d+)", done.stdout):
        most = min(most, int(limit[1]))
    if most < 1:
        raise RuntimeError(
            "SLURM: this cluster allows no array jobs (MaxArraySize is 0); train with --launcher "
            "here inside a job of your own"
        )
    return most


def sbatch(chunk: Chunk, *, after: Sequence[str]) -> list[str]:
    """The command that submits an array, without the script.

    Args: after, numbers of jobs that have to end before.
    """
    limit = f"%{chunk.at_once}" if chunk.at_once else ""
    wait = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    return ["sbatch", "--parsable", f"--array=0-{chunk.count - 1}{limit}", *wait]


def text(tasks: Sequence[Sequence[int]], out: Path, asked: Asked) -> str:
    """The script of the jobs, whose argument is the number of the first task of an array.

    Args: tasks, the numbers of the runs of each task.
    """
    folder = str(out.absolute())
    log = shlex.quote(f"{folder.replace('%', '%%')}/logs/slurm-%A_%a.txt")
    name = shlex.quote(f"cerl-{asked.title or out.absolute().name}")
    size = max(1, asked.per_job)
    command = [sys.executable, "-m", "cerl", "sweep-run", folder]
    more = f"--per-job {size} --device {kind(asked)} --version {__version__}"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name} --requeue --open-mode=append",
        f"#SBATCH --output={log}",
        f"#SBATCH --signal=B:USR2@{LEAD}",
        *(f"#SBATCH {options}" for options in asked.sbatch),
        *asked.setup,
        f"runs=({' '.join(str(number) for task in tasks for number in task)})",
        f"first=$((($1 + SLURM_ARRAY_TASK_ID) * {size}))",
        f"exec {' '.join([*asked.prefix, shlex.join(command)])} {more} \\",
        f'  --runs "${{runs[@]:first:{size}}}"',
    ]
    return "\n".join(lines) + "\n"


def dry(runs: Sequence[PlannedRun], out: Path, asked: Asked) -> str:
    """What `sweep` would submit if nothing were in the queue: the script, and the commands."""
    left = [run for run in runs if not finished(out / run.folder, steps=run.steps)]
    if not left:
        return "all runs are finished: nothing is submitted"
    tasks = _tasks(left, asked)
    script = out.absolute() / FOLDER / "0001.sh"
    most = largest_array() if shutil.which("scontrol") else ARRAY
    parts = [text(tasks, out, asked)]
    for chunk in chunked(len(tasks), most=most, at_once=places(asked)):
        after = [] if chunk.after is None else [f"(job of command {chunk.after + 1})"]
        parts.append(shlex.join([*sbatch(chunk, after=after), str(script), str(chunk.first)]))
    return "\n".join(parts)


def _fresh(folder: Path) -> Path:
    """A name for a new script."""
    used = [int(path.stem) for path in folder.glob("*.sh") if path.stem.isdecimal()]
    return folder / f"{max(used, default=0) + 1:04d}.sh"


def _settled(jobs: Sequence[Job], line: Callable[[str], None]) -> list[slurm_queue.Queued]:
    """The tasks in the queue. Of a job that is ending it is not known yet whether SLURM puts it
    into the queue again, so that is waited for."""
    until, told = time.monotonic() + ENDING, False
    while True:
        found = slurm_queue.queued(jobs) if jobs else []
        ending = [one for one in found if one.state in slurm_queue.ENDING]
        if not ending or time.monotonic() > until:
            return [one for one in found if one not in ending]
        if not told:
            line(f"waiting for {len(ending)} tasks of SLURM that are ending")
        told = True
        time.sleep(1.0)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """A context in which no other process submits jobs of the sweep."""
    path = files.own_folder(out / FOLDER) / LOCK
    if not works(path):  # a file system without locks
        yield
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ConfigError(
            f"{out}: another process has been submitting its jobs for {PATIENCE:.0f} s; wait for "
            "it or end it, then repeat the command"
        ) from None
    try:
        yield
    finally:
        lock.release()


def cancel(out: Path, *, note: Callable[[str], None]) -> None:
    """Cancels the jobs of a sweep, and tells workers of other launchers to stop. Runs save.

    Raises: ConfigError if there is no sweep in the folder; RuntimeError with SLURM's words.
    """
    if not (out / "plan.json").is_file():
        raise ConfigError(f"sweep --cancel: expected the folder of a sweep, got {out}")
    # Tasks of Ray, which tells them nothing before it kills them, look for this file.
    files.write_text(out / STOP, "cerl sweep --cancel\n")
    line = Screen().line
    jobs = slurm_queue.noted(out)
    found = slurm_queue.queued(jobs) if jobs else []
    alive = {one.job: None for one in found}
    for cluster in dict.fromkeys(job.cluster for job in alive):
        where = ["-M", cluster] if cluster else []
        numbers = [job.job for job in alive if job.cluster == cluster]
        done = slurm_queue.run(["scancel", *where, *numbers])
        if done.returncode:
            raise RuntimeError(f"scancel: {done.stderr.strip() or done.returncode}")
    if alive:
        running = sum(one.state == "RUNNING" for one in found)
        line(
            f"cancelled: job{'s' * (len(alive) > 1)} {few([job.job for job in alive])} with "
            f"{len(found)} tasks, of which {running} were running: their runs save"
        )
    else:
        line("no job of this sweep is in SLURM's queue")
    stopping = "" if jobs else "tasks of Ray stop within seconds; "
    line(f"{stopping}the command that began the sweep goes on with it")
