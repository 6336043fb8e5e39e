"""The same runs by `cerl sweep` and by a loop over `cerl train`, for `cerl bench sweep`.

The runs are of Catch, whose environment and agent are small, and differ in their learning rate. So
nearly all of the time goes into the start of processes and into training, and all runs take equally
long.
"""

import itertools
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cerl.device.cores import cores

PRESET = "catch/ddqn"
FIRST = 6_000  # agent steps of the runs that are trained to measure the speed
RATE = "optim.lr"  # option in which the runs differ


class Spent(NamedTuple):
    """The time that some processes have taken."""

    wall: float  # seconds on the clock
    cpu: float  # seconds that CPU cores computed for them; what else the machine does counts less


class Runs(NamedTuple):
    """The runs that are trained both ways."""

    cells: int  # number of runs
    jobs: int  # that train at the same time
    seconds: float  # that a run should train
    device: str
    folder: Path  # for run folders

    def options(self, steps: int) -> list[str]:
        """The words that all commands have. Args: steps, agent steps of a run."""
        return ["--schedule.steps", str(steps), "--device", self.device, "--seeds", "0"]

    def rates(self) -> list[str]:
        """The learning rate of each run."""
        return [f"{1e-3 * (1 + number / 1000):.6f}" for number in range(self.cells)]


def calibrated(runs: Runs) -> int:
    """Agent steps that a run trains in `Runs.seconds` while others train beside it.

    Raises: RuntimeError if training fails.
    """
    few = runs._replace(cells=runs.jobs)
    out = runs.folder / "calibration"
    loop(few, FIRST, out)
    speeds = []
    for file in out.glob("*/rows.parquet"):
        found = pq.read_table(file, columns=["step", "wall_seconds"]).to_pylist()
        first, last = found[0], found[-1]
        spent = last["wall_seconds"] - first["wall_seconds"]
        speeds.append((last["step"] - first["step"]) / spent)
    return max(100, 100 * round(runs.seconds * sum(speeds) / len(speeds) / 100))


def loop(runs: Runs, steps: int, out: Path) -> Spent:
    """Trains all runs with a `cerl train` command each, `jobs` at a time.

    Every process gets its share of the CPU cores, as in a sweep.

    Raises: RuntimeError if a run fails.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for rate in runs.rates():
        waiting.put(rate)
    at_once = min(runs.jobs, runs.cells)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // at_once))}

    def work(_: int) -> None:
        while True:
            try:
                rate = waiting.get_nowait()
            except queue.Empty:
                return
            words = ["train", PRESET, f"--{RATE}", rate, *runs.options(steps), "--out", str(out)]
            with (runs.folder / f"log-{out.name}-{rate}.txt").open("w") as log:
                command = [sys.executable, "-m", "cerl", *words]
                run(command, env=environment, stdout=log, stderr=log)

    begin = _now()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, range(at_once)))
    return _since(begin)


def sweep(runs: Runs, steps: int, out: Path) -> Spent:
    """Trains all runs with one `cerl sweep` command, which also plans them and writes the report.

    Raises: RuntimeError if it fails.
    """
    words = ["sweep", PRESET, "--grid", f"{RATE}={','.join(runs.rates())}", *runs.options(steps)]
    words += ["--jobs", str(runs.jobs), "--out", str(out)]
    begin = _now()
    with (runs.folder / f"log-{out.name}.txt").open("w") as log:
        run([sys.executable, "-m", "cerl", *words], stdout=log, stderr=log)
    return _since(begin)


def report(out: Path) -> Spent:
    """Writes the report of runs that were trained by hand. Raises: RuntimeError if it fails."""
    begin = _now()
    run([sys.executable, "-m", "cerl", "report", str(out)], stdout=subprocess.DEVNULL)
    return _since(begin)


def _now() -> Spent:
    """The clock, and the CPU time of all processes that this one has started and that have ended,
    and of theirs."""
    used = os.times()
    return Spent(time.perf_counter(), used.children_user + used.children_system)


def _since(begin: Spent) -> Spent:
    now = _now()
    return Spent(now.wall - begin.wall, now.cpu - begin.cpu)


def run(command: Sequence[str], **options: Any) -> None:
    """Runs a process. Args: options, of `subprocess.run`. Raises: RuntimeError if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    if done.returncode:
        words = " ".join(itertools.islice(command, 8))
        log = getattr(options.get("stdout"), "name", "")
        last = Path(log).read_text(errors="replace")[-1000:] if log else ""
        raise RuntimeError(f"exit code {done.returncode} of: {words} ...\n{last}".strip())
