"""Trains some runs of a planned sweep: the command that every launcher starts, on any machine.

`cerl sweep-run OUT --runs 4 5` needs nothing but the folder of the sweep. It may be started again
and again, also while another process trains the same runs: finished runs are left alone, those that
others train are waited for, and those whose process died are taken over.

In a job of SLURM, a signal USR2 means that the time of the job is almost over: the runs save, and
the job is put into the queue again. After any other signal the runs save and SLURM decides.
"""

import os
import platform
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cerl import __version__
from cerl.config import ConfigError
from cerl.device.cores import asked_threads
from cerl.record import failure
from cerl.record.finished import finished
from cerl.stop import Flag, Stopped, stop_flag
from cerl.sweep import plan
from cerl.sweep.job import title
from cerl.sweep.plan import PlannedRun
from cerl.sweep.side_by_side import SideBySide
from cerl.sweep.slots import THREADS, Slots
from cerl.sweep.view import View

STOP = "stop"  # file in the folder of a sweep; while it is there, workers save and stop
TRIES = 3  # how often a run is started whose process a signal kills, e.g. since memory ran out
REQUEUE_TIME = 60.0  # seconds to wait for the answer of SLURM


def work(
    out: Path, numbers: Sequence[str], *, per_job: int, device: str, version: str = ""
) -> None:
    """Trains those runs of a plan that are not finished, each as a process of its own.

    A run whose process is killed by a signal is tried again, `TRIES` times in all. A run that fails
    by an error of its own is not.

    Args:   out, the folder of the sweep; numbers of the runs in its plan; per_job, how many of them
            train at the same time; device, auto, cpu, cuda or cuda:N; version of cerl that is
            expected, "" for any.
    Raises: ConfigError if this machine does not see the folder, its version differs, or a number is
            not in the plan; RuntimeError that names the runs that failed, after all others were
            trained; Stopped if the process was told to stop, or some of its runs were.
    """
    runs = _chosen(out, numbers, version=version)
    # From here on no signal ends this process before it has told its runs.
    with stop_flag() as early:
        _work(runs, out, per_job=per_job, device=device, early=early)


def _work(runs: Sequence[PlannedRun], out: Path, *, per_job: int, device: str, early: Flag) -> None:
    """Trains runs as `work` does. Args: early, of signals that come before the training begins."""
    restarted = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    failures = [text for run in runs if restarted and (text := _final(run, out))]
    left = [run for run in runs if not (restarted and _final(run, out))]
    job, restarts = slurm_job(os.environ), os.environ.get("SLURM_RESTART_COUNT", "0")
    where = f" (job {job} of SLURM, restarts: {restarts})" if job else ""
    slots, view = Slots(device, jobs=per_job, per_gpu=None), View(left, out)
    view.line(f"{platform.node()}{where}: runs {' '.join(str(run.number) for run in left)}")
    crew = SideBySide(
        left,
        out,
        slots,
        view,
        device=device,
        variables=_threads(per_job),
        tries=TRIES,
        stop=lambda: early() or (out / STOP).exists(),
    )
    try:
        failures += crew.train()
    except Stopped:
        unfinished = [run for run in left if not finished(out / run.folder, steps=run.steps)]
        if {*early.signals, *crew.signals} == {signal.SIGUSR2} and unfinished:
            view.line(requeued(os.environ))
        raise
    told = len(crew.told)  # runs that somebody else told to stop
    if len(failures) > told:
        raise RuntimeError(
            f"{len(failures) - told} of {len(runs)} runs failed:\n" + "\n".join(failures)
        )
    if told:
        raise Stopped


def _chosen(out: Path, numbers: Sequence[str], *, version: str) -> list[PlannedRun]:
    """The runs with these numbers. Raises: ConfigError."""
    host = platform.node()
    if version and version != __version__:
        raise ConfigError(
            f"sweep-run: cerl {version} planned the sweep, and {host} has cerl {__version__}; "
            "install the same version on both, or use one installation on the shared file system"
        )
    if not numbers:
        raise ConfigError("sweep-run: expected --runs NUMBER..., got none")
    found = plan.read(out)
    if found is None:
        raise ConfigError(
            f"{out}: expected the folder of a sweep, but {host} sees no {plan.FILE} there. The "
            "folder has to be on a file system that all machines of the cluster share, under the "
            "same path; `cerl sweep --out FOLDER` chooses it"
        )
    known = {str(run.number): run for run in found.runs}
    if wrong := [number for number in numbers if number not in known]:
        raise ConfigError(
            f"sweep-run: expected numbers of runs in {out / plan.FILE} (1 to {max(known, key=int)})"
            f", got {wrong[0]!r}"
        )
    runs = [known[number] for number in dict.fromkeys(numbers)]
    for run in runs:
        if not (out / run.folder).is_dir():
            raise ConfigError(f"{out / run.folder}: expected a run folder, found none on {host}")
    return runs


def _final(run: PlannedRun, out: Path) -> str:
    """Why a run that failed is not tried again after SLURM has restarted its job; "" if it is, or
    has not failed."""
    noted = failure.read(out / run.folder)
    if noted is None or finished(out / run.folder, steps=run.steps):
        return ""
    again = noted.kind == "signal" and noted.tries < TRIES
    return "" if again else f"{title(run)}: failed: {noted.message}"


def _threads(per_job: int) -> Mapping[str, str]:
    """Variables of the environment by which runs share the CPU cores that SLURM gave the job.

    Clusters that do not bind processes to cores give all cores of a machine to every process.
    """
    cores = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if not cores.isdecimal() or asked_threads() is not None:
        return {}
    return {THREADS: str(max(1, int(cores) // per_job))}


def slurm_job(variables: Mapping[str, str]) -> str:
    """The job of SLURM that a process with these variables of the environment is in; "" if none."""
    if array := variables.get("SLURM_ARRAY_JOB_ID"):
        # SLURM_JOB_ID is another number for every task, and for one task that of the whole array.
        return f"{array}_{variables.get('SLURM_ARRAY_TASK_ID', '')}"
    return variables.get("SLURM_JOB_ID", "")


def requeued(variables: Mapping[str, str]) -> str:
    """Puts the job of this process into SLURM's queue again. Returns: a sentence on how that went.

    Args: variables of the environment of the job.
    """
    if not (job := slurm_job(variables)):
        return "not put into the queue again: this is no job of SLURM; the same command goes on"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REQUEUE_TIME)
        words = done.stderr.strip() or done.stdout.strip()
        if done.returncode == 0:
            return f"the time of the job is almost over; {job} is in the queue again"
    except (OSError, subprocess.TimeoutExpired) as error:
        words = str(error)
    return f"{' '.join(command)}: {words}; the command that began the sweep submits its runs again"
