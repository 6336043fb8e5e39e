"""Trains the planned runs of a sweep on this machine, one after the other or several at a time.

A sweep reads the state of each run from the run's folder and remembers nothing itself. So the same
command continues a sweep that was stopped or killed: finished runs are skipped, unfinished ones are
resumed, and the others are started. Several sweeps may train the runs of one folder at the same
time: each run is trained by one of them, and the others wait for it at their end. A failed run does
not stop the others, and is reported at the end.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from cerl.config import Config
from cerl.record import boards, failure
from cerl.record.finished import finished
from cerl.stop import Stopped, stop_flag
from cerl.sweep import mps as multi_process
from cerl.sweep.job import Other, changes, claim, elsewhere, title
from cerl.sweep.plan import PlannedRun
from cerl.sweep.side_by_side import SideBySide
from cerl.sweep.slots import Slots
from cerl.sweep.view import View

POLL = 0.5  # seconds between checks whether another process still trains a run


def sweep(
    runs: Sequence[PlannedRun],
    out: Path,
    *,
    jobs: int | None = None,
    per_gpu: int | None = None,
    mps: bool = False,
    device: str = "auto",
) -> list[Path]:
    """Trains planned runs, whose folders exist in `out`, as far as they are not finished.

    Runs train in this process if only one trains at a time and there is at most one GPU. Otherwise
    each run is a process of its own, whose output is appended to a file in `out`/logs.

    Args:    jobs, how many runs train at the same time: by default one on each GPU, and one on a
             CPU; per_gpu, at most how many on one GPU: by default as many as `jobs` needs; mps,
             start CUDA's multi-process service for them; device, auto, cpu, cuda or cuda:N.
    Returns: the run folders, in the order of the runs.
    Raises:  RuntimeError naming the runs that failed, after all others were trained; Stopped if a
             signal asked the sweep to stop; ValueError before anything is trained, if a number is
             below 1 or this machine does not have the device.
    """
    slots, view = Slots(device, jobs=jobs, per_gpu=per_gpu), View(runs, out)
    alone = slots.here and not mps
    if alone:
        failures = _one_by_one(runs, out, view, device=device)
    else:
        with contextlib.ExitStack() as stack:
            variables = {}
            if mps:
                slots.name_by_uuid()
                variables = stack.enter_context(multi_process.service(slots.gpus))
            stack.enter_context(view)
            crew = SideBySide(runs, out, slots, view, device=device, variables=variables)
            failures = crew.train()
    if not alone or len(runs) > 1:
        view.last()
    check_failures(failures, runs, out)
    return [out / run.folder for run in runs]


def check_failures(failures: Sequence[str], runs: Sequence[PlannedRun], out: Path) -> None:
    """Raises: RuntimeError if runs of a sweep failed. Args: failures, a line for each of them."""
    if failures:
        lines = "\n".join(failures)
        raise RuntimeError(
            f"{len(failures)} of {len(runs)} runs failed, the others are in {out} "
            f"(cerl report {out}); the same command tries the failed ones again:\n{lines}"
        )


def check_tasks(configs: Sequence[Config]) -> None:
    """Checks that the tasks of all configs exist, and that the packages of their trackers are
    installed, before anything is planned or trained.

    Raises: ValueError with a line for each task that does not exist; ConfigError about a package.
    """
    from cerl import envs  # its import of torch takes seconds

    problems: dict[str, None] = {}
    for config in configs:
        boards.check(config)
        try:
            envs.check_name(config.env)
        except ValueError as error:
            task = f"{config.env.family}/{config.env.name}"
            problems[f"{config.preset or 'run'} on {task}: {error}"] = None
    if problems:
        raise ValueError("\n".join(problems))


def _one_by_one(runs: Sequence[PlannedRun], out: Path, view: View, *, device: str) -> list[str]:
    """Trains the runs one after the other in this process. Returns: a line for each failed run."""
    waiting = [run for run in runs if not finished(out / run.folder, steps=run.steps)]
    if done := len(runs) - len(waiting):
        view.line(f"{done} of {len(runs)} runs are finished already")
    failures: list[str] = []
    others: list[Other] = []
    while waiting or others:
        other = None if waiting else _freed(others, out)
        run = waiting.pop(0) if other is None else other.run
        folder, begin = out / run.folder, time.time()
        # If the other process has failed, a second try is of no use.
        why = "" if other is None else other.failure(folder)
        try:
            if not why and not _train(run, folder, view, device=device):
                view.line(f"{title(run)}: another process trains it")
                others.append(Other(run, begin))
        except Stopped:
            view.line("stopped; the same command continues the sweep")
            raise
        # Any error of one run is caught, so that the remaining runs still train.
        except Exception as error:
            why = failure.in_words(error)
            noted = failure.read(folder)
            if noted is None or noted.time < begin:  # the error came before the training began
                failure.note(folder, why)
        if why:
            view.line(f"failed: {why}", style="bold red")
            failures.append(f"{title(run)}: {why}")
    return failures


def _train(run: PlannedRun, folder: Path, view: View, *, device: str) -> bool:
    """Trains or resumes a run in this process, unless it is finished by now.

    Returns: whether the run is finished; False if another process trains it.
    Raises:  Stopped; any error of the training.
    """
    if (lock := claim(folder)) is None:
        return False
    try:
        if not finished(folder, steps=run.steps):
            from cerl import training  # imports torch, too

            view.line(title(run), style="bold")
            training.resume(folder, changes=changes(run, folder, device=device), trusted=True)
    finally:
        os.close(lock)
    return True


def _freed(others: list[Other], out: Path) -> Other:
    """Waits until the process of another sweep has ended, and takes its run from the list.

    Raises: Stopped.
    """
    with stop_flag() as stopped:
        while not stopped():
            for other in others:
                if not elsewhere(out / other.run.folder):
                    others.remove(other)
                    return other
            time.sleep(POLL)
    raise Stopped
