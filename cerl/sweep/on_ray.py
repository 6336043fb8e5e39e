"""Trains the planned runs of a sweep on the nodes of a Ray cluster.

A task of Ray is one run: it starts `cerl sweep-run` on its node and waits for it
(`cerl/sweep/ray_task.py`). Ray knows nothing about the runs: as under every launcher, their state
is in their folders, so the same command continues a sweep whose nodes, or whose own process, died.
Ray kills the processes of a task without a warning, e.g. if this process dies. On Linux the runs
are told to save nevertheless (`ray_task.GUARD`); those of a dead machine go on from their last
checkpoint.
"""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cerl import __version__
from cerl.config import ConfigError
from cerl.device.cores import asked_threads
from cerl.record import failure, files
from cerl.record.finished import finished
from cerl.record.folder import FILE, load_file
from cerl.stop import SAVED, Stopped, stop_flag
from cerl.sweep import ray_cluster, ray_task
from cerl.sweep.job import title
from cerl.sweep.local import check_failures
from cerl.sweep.plan import PlannedRun
from cerl.sweep.ray_cluster import Need, imported
from cerl.sweep.slots import THREADS
from cerl.sweep.state import states
from cerl.sweep.view import View
from cerl.sweep.worker import STOP

LOOK_EVERY = 1.0  # seconds between two looks at the stop file
NODES_EVERY = 10.0  # seconds between two looks at the nodes
TELL_EVERY = 30.0  # seconds between lines on the runs that train, where there is no terminal
RETRIES = 2  # of a run that was killed, e.g. for the memory that it took
# Variables of this process that every run gets.
PASSED = ("PYTHONPATH", "XDG_STATE_HOME", "CERL_EAGER", THREADS)


def sweep(
    runs: Sequence[PlannedRun],
    out: Path,
    *,
    address: str | None = None,
    jobs: int | None = None,
    per_gpu: int | None = None,
    device: str = "auto",
    cpus: float | None = None,
) -> list[Path]:
    """Trains planned runs, whose folders exist in `out`, as far as they are not finished.

    Args:    address, `auto` for the Ray cluster that runs on this machine, or HOST:PORT of one;
             None stands for the environment variable RAY_ADDRESS, which Ray sets for the jobs of
             `ray job submit`, and without it for a cluster of this machine alone, started here;
             jobs, how many runs train at the same time: by default one on each GPU, or one on each
             node without GPUs; per_gpu, how many runs share a GPU: by default as many as `jobs`
             needs; device, auto, cpu or cuda, and for a cluster started here also cuda:N; cpus, how
             many CPUs a run takes: by default its share of those that its node has.
    Returns: the run folders, in the order of the runs.
    Raises:  RuntimeError naming the runs that failed, after all others were trained; Stopped if a
             signal or the stop file asked the sweep to stop; ValueError before anything is trained,
             if a number is below 1, there is no such cluster, no node of it has what a run needs,
             or a node does not see `out` or has another version of cerl.
    """
    out, address = out.absolute(), address or os.environ.get("RAY_ADDRESS") or None
    for name, number in (("jobs", jobs), ("per-gpu", per_gpu), ("cpus", cpus)):
        if number is not None and number < 1:
            raise ValueError(f"--{name}: expected at least 1, got {number}")
    if address is not None and ":" in device:
        raise ConfigError(
            f"device: expected auto, cpu or cuda, got {device!r}: Ray chooses the GPU of a run"
        )
    view = View(runs, out)
    waiting = [run for run in runs if not finished(out / run.folder, steps=run.steps)]
    if done := len(runs) - len(waiting):
        view.line(f"{done} of {len(runs)} runs are finished already")
    failures: list[str] = []
    if waiting:
        with ray_cluster.connected(address, device=device):
            need = _need(waiting, out, jobs=jobs, per_gpu=per_gpu, device=device, cpus=cpus)
            crew = OnRay(waiting, out, need, view, jobs=jobs, device=device)
            crew.check_nodes()
            with view:
                failures = crew.train()
    if len(runs) > 1:
        view.last()
    check_failures(failures, runs, out)
    return [out / run.folder for run in runs]


def _need(
    runs: Sequence[PlannedRun],
    out: Path,
    *,
    jobs: int | None,
    per_gpu: int | None,
    device: str,
    cpus: float | None,
) -> Need:
    """What each of the runs needs.

    Raises: ConfigError if no node has it.
    """
    nodes = ray_cluster.nodes()
    with_gpus = [node for node in nodes if node.gpus >= 1]
    kind = device.partition(":")[0]
    if kind == "auto":
        kinds = {_device_of(out / run.folder) for run in runs}
        kind = "cpu" if kinds == {"cpu"} or not with_gpus else "cuda"
    if kind == "cpu" and (per_gpu or 1) > 1:
        raise ConfigError(f"--per-gpu {per_gpu}: expected a GPU, found none (device {device})")
    if kind == "cpu":
        need = ray_cluster.need_on_cpus(nodes, jobs=jobs)
    elif with_gpus:
        need = ray_cluster.need_on_gpus(with_gpus, jobs=jobs, per_gpu=per_gpu)
    else:
        need = Need(0, 1)
    if cpus is not None:
        need = need._replace(cpus=cpus)
    if not any(need.places(node) for node in nodes):
        raise ConfigError(
            f"ray: expected a node with {need.text} for a run (device {device}); the nodes have "
            f"{ray_cluster.inventory(nodes)}. If the cluster adds nodes on demand, let it start one"
        )
    return need


def _device_of(folder: Path) -> str:
    """The kind of device that a run folder asks for; auto if its config.yaml cannot be read."""
    try:
        return load_file(folder / FILE).device.partition(":")[0]
    except (OSError, ValueError):
        return "auto"


class Flight(NamedTuple):
    """A run that Ray was given."""

    run: PlannedRun
    reference: Any  # Ray's, to the result of the task
    noted: failure.Failure | None  # the failure of the last try before
    log: Path


class OnRay:
    """The runs of a sweep that trains them on a cluster to which this process is connected.

    Args of the constructor: runs, not finished, whose folders are in `out`, an absolute path; need
    of each run; view, shows the progress; jobs, at most how many runs at the same time; device,
    that was asked for.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        out: Path,
        need: Need,
        view: View,
        *,
        jobs: int | None,
        device: str,
    ) -> None:
        from ray import cloudpickle

        ray = imported()
        self.out, self.need, self.view, self.jobs = out, need, view, jobs
        # A run sees one GPU, whose number is 0 there, so no number is passed on.
        self.device = device.partition(":")[0]
        self.waiting, self.flights = list(runs), list[Flight]()
        self.kills: Counter[int] = Counter()  # how often each run was killed, by its number
        self.failures: list[str] = []
        self.unfit = ""  # why a node that joined later cannot train runs
        self.stop_file = out / STOP
        self.places = 1
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        if asked_threads() is None:
            passed[THREADS] = str(max(1, int(need.cpus)))
        self.common = {"out": str(out), "version": __version__, "environment": passed}
        cloudpickle.register_pickle_by_value(ray_task)
        # Ray itself retries nothing, so that a lost node can be told from a killed process. Its
        # worker processes take one task after the other: none of them uses a GPU itself.
        self.task = ray.remote(max_retries=0, max_calls=0)(ray_task.train)

    def check_nodes(self) -> None:
        """Asks every node that has places whether it can train the runs.

        Raises: ConfigError that says why a node cannot.
        """
        from ray import exceptions
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = imported()
        check = ray.remote(num_cpus=0, max_retries=0)(ray_task.check)
        asked = {
            node: check.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote(folder=self.waiting[0].folder, **self.common)
            for node in ray_cluster.nodes()
            if self.need.places(node)
        }
        problems = []
        for node, reference in asked.items():
            try:
                why = ray.get(reference)
            except exceptions.RayError as error:
                why = f"it cannot carry out a task: {_first_line(error)}"
            if why:
                problems.append(f"node {node.name} of the Ray cluster: {why}")
        if problems:
            raise ConfigError("\n".join(problems))
        self._count_places()
        self.view.line(
            f"Ray: nodes {len(asked)}, places for runs {self.places}, each with {self.need.text}"
        )

    def train(self) -> list[str]:
        """Trains all runs. Returns: a line for each failed run.

        Raises: Stopped; RuntimeError if a node that joined later cannot train runs, after all those
                that trained then have ended.
        """
        self.stop_file.unlink(missing_ok=True)  # that of an earlier stop
        files.own_folder(self.out / "logs")
        looked = told = time.monotonic()
        with stop_flag() as stopped:
            while self.waiting or self.flights:
                if stopped() or self.stop_file.exists():
                    self._stop()
                self._fill()
                for flight in self._landed():
                    self._end(flight)
                self.view.draw()
                now = time.monotonic()
                if now - looked >= NODES_EVERY:
                    looked = now
                    self._count_places()
                if now - told >= TELL_EVERY and self.view.live is None:
                    told = now
                    self._tell()
        if self.unfit:
            raise RuntimeError(
                "\n".join(
                    [
                        f"{self.unfit}\nNo run was started after that; the same command continues "
                        "the sweep",
                        *self.failures,
                    ]
                )
            )
        return self.failures

    def _count_places(self) -> None:
        """Counts the places of the nodes that live now."""
        self.places = sum(map(self.need.places, ray_cluster.nodes()))
        if not self.places:
            self.view.line(f"no node with {self.need.text} is left; waiting for one")

    def _fill(self) -> None:
        """Gives Ray as many runs as there are places."""
        most = max(1, min(self.places, self.jobs or self.places))
        while self.waiting and len(self.flights) < most:
            run = self.waiting.pop(0)
            folder, log = self.out / run.folder, self.out / "logs" / f"{run.folder}.ray.txt"
            noted = failure.read(folder)
            task = self.task.options(
                num_cpus=self.need.cpus, num_gpus=self.need.gpus, name=run.folder
            )
            reference = task.remote(
                words(run, self.out, device=self.device),
                folder=run.folder,
                log=str(log),
                stop=str(self.stop_file),
                directory=os.getcwd(),
                **self.common,
            )
            how = "resumes" if any(folder.glob("checkpoint-*.pt")) else "starts"
            self.view.line(f"{title(run)}: {how} once its place is free; {log}")
            self.flights.append(Flight(run, reference, noted, log))

    def _landed(self) -> list[Flight]:
        """Waits for the end of a task, at most LOOK_EVERY seconds. Returns: those that ended."""
        ray = imported()
        ready, _ = ray.wait([flight.reference for flight in self.flights], timeout=LOOK_EVERY)
        landed = [flight for flight in self.flights if flight.reference in ready]
        self.flights = [flight for flight in self.flights if flight not in landed]
        return landed

    def _end(self, flight: Flight) -> None:
        """Tells how a task has ended, and puts its run back if it has to go on."""
        from ray import exceptions

        ray = imported()

        run = flight.run
        try:
            host, code, last = ray.get(flight.reference)
        except exceptions.NodeDiedError:
            self._again(run, "its node is lost")
        except exceptions.RayTaskError as error:
            self._fail(run, "failed", str(error).strip().splitlines()[-1])
        except exceptions.RayError as error:
            # Its process of Ray was killed: by the system, or by Ray, since memory ran out.
            self._killed(run, _first_line(error), number=signal.SIGKILL)
        else:
            if code == ray_task.UNFIT:
                self.unfit = f"node {host} of the Ray cluster: {last}"
                self.view.line(f"{self.unfit}; no further run is started", style="bold red")
                self.waiting.clear()
            elif code == 0:
                self.view.line(f"{title(run)}: done on {host}; {flight.log}")
            elif code == SAVED:
                self._again(run, f"it was told to stop on {host}, and has saved")
            elif code < 0:
                name = signal.strsignal(-code) or "unknown"
                self._killed(run, f"killed by signal {-code} ({name}) on {host}", number=-code)
            else:
                self._failed(flight, host, last.removeprefix("error: "))

    def _again(self, run: PlannedRun, why: str) -> None:
        self.view.line(f"{title(run)}: {why}; it goes on from its last checkpoint")
        self.waiting.insert(0, run)

    def _killed(self, run: PlannedRun, why: str, *, number: int) -> None:
        self.kills[run.number] += 1
        if self.kills[run.number] <= RETRIES:
            self._again(run, why)
        else:
            failure.note(self.out / run.folder, why, signal=number)
            self._fail(run, "failed", f"{why}, {self.kills[run.number]} times")

    def _failed(self, flight: Flight, host: str, last: str) -> None:
        """Tells why a run has failed by its own fault, as its folder or the last line says."""
        folder = self.out / flight.run.folder
        noted = failure.read(folder)
        if noted is None or noted == flight.noted:
            failure.note(folder, last)
        else:
            last = noted.message
        self._fail(flight.run, "failed", f"{last} (on {host}; {flight.log})")

    def _fail(self, run: PlannedRun, how: str, why: str) -> None:
        text = f"{title(run)}: {how}: {why}"
        self.view.line(text, style="bold red")
        self.failures.append(text)

    def _tell(self) -> None:
        """Prints how far each run is that Ray was given."""
        numbers = {flight.run.number for flight in self.flights}
        with contextlib.suppress(OSError, ValueError):
            for state in states(self.out):
                if state.run.number in numbers:
                    where = f" on {state.host}" if state.state == "running" else ""
                    self.view.line(
                        f"{title(state.run)}: {state.state}{where}, "
                        f"{state.step:,} of {state.steps:,} steps"
                    )

    def _stop(self) -> None:
        """Asks all runs to save and stop, and waits until they have ended. Raises: Stopped."""
        from ray import exceptions

        ray = imported()

        self.view.line(
            "stopped: waiting for the runs to save; the same command continues the sweep"
        )
        try:
            with contextlib.suppress(OSError):  # e.g. the disk is full
                files.write_text(
                    self.stop_file, "Runs of this sweep stop while this file exists.\n"
                )
            # This ends tasks that wait for a place, and those that do not see the file.
            for flight in self.flights:
                ray.cancel(flight.reference)
            while self.flights:
                for flight in self._landed():
                    try:
                        host, code, _ = ray.get(flight.reference)
                        how = f"ended with exit code {code} on {host}"
                    except exceptions.TaskCancelledError:
                        how = "was waiting for a place"
                    except exceptions.RayError as error:
                        how = f"ended: {_first_line(error)}"
                    self.view.line(f"{title(flight.run)}: {how}")
                self.view.draw()
        except KeyboardInterrupt:
            for flight in self.flights:
                ray.cancel(flight.reference, force=True)
            raise
        finally:
            self.stop_file.unlink(missing_ok=True)
        raise Stopped


def words(run: PlannedRun, out: Path, *, device: str) -> list[str]:
    """The arguments of Python with which a node trains a run."""
    return [
        *("-m", "cerl", "sweep-run", str(out), "--runs", str(run.number)),
        *("--device", device, "--version", __version__),
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
