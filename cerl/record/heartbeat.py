"""heartbeat.json: how far the process is that trains a run, for `cerl status` and for sweeps.

A thread replaces the file every few seconds, so anyone who can read the run folder can see whether
the run is being trained, also from another machine. The file says nothing that resuming needs.

Where a file system has no locks that reach other machines, two processes may begin to train one
run. Each then finds heartbeats of the other one in the file: the later one stops, and writes
nothing more into the folder (`Rival`).
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cerl.record import files

FILE = "heartbeat.json"
EVERY = 5.0  # seconds between two heartbeats
SPAN = 60.0  # seconds over which the speed is measured
_LARGEST = 10_000  # bytes


class Beat(NamedTuple):
    """One heartbeat."""

    host: str  # name of the machine
    pid: int  # number of the process there
    device: str  # `cpu` or e.g. `cuda:1 NVIDIA H200`; "" while the run starts up
    step: int  # agent steps of one seed so far
    steps: int  # agent steps of one seed in the whole run
    steps_per_second: float | None  # agent steps of one seed; None if it is not known yet
    updated: float  # when the heartbeat was written, in seconds since 1970 (Unix time)
    started: float  # when the process began to train the run, likewise
    over: bool = False  # whether the process has stopped training the run since
    orphan: bool = False  # whether the process that started this one has ended

    @property
    def process(self) -> tuple[float, str, int]:
        """What tells the process from others; the one that began first has the smallest."""
        return self.started, self.host, self.pid


class Rival(RuntimeError):
    """Raised in a process that trains a run which another process has begun to train before."""


def read(folder: Path) -> Beat | None:
    """The newest heartbeat in a run folder; None if there is none that can be read."""
    try:
        content, _ = files.read_small(folder / FILE, most=_LARGEST)
        found = json.loads(content)
        rate = found.get("steps_per_second")
        return Beat(
            host=str(found["host"]),
            pid=int(found["pid"]),
            device=str(found["device"]),
            step=int(found["step"]),
            steps=int(found["steps"]),
            steps_per_second=None if rate is None else float(rate),
            updated=float(found["updated"]),
            started=float(found["started"]),
            over=bool(found.get("over", False)),
            orphan=bool(found.get("orphan", False)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


class Pulse:
    """Writes the heartbeats of one process that trains a run.

    Args of the constructor: folder of the run; steps, agent steps of one seed in the whole run.

    Attributes: rival, the heartbeat of another process that began to train the same run before this
    one; None as long as none was found. From then on no heartbeat is written.
    """

    def __init__(self, folder: Path, *, steps: int) -> None:
        earlier = read(folder)
        self.folder, self.steps, self.device = folder, steps, ""
        self.started, self.parent = time.time(), os.getppid()
        self.rival: Beat | None = None
        self.beats = 0  # that this process has written
        # Until the run has loaded its checkpoint, the step of the process before is shown.
        before = 0 if earlier is None else earlier.step
        self.step: Callable[[], int] = lambda: before
        # Pairs (seconds of a monotonic clock, step); the speed is that between the first and last.
        self.samples: deque[tuple[float, int]] = deque(maxlen=1 + round(SPAN / EVERY))

    def follow(self, step: Callable[[], int], *, device: str) -> None:
        """From now on writes the steps of a run that trains.

        Args: step, returns the agent steps of one seed so far; it is called in another thread;
              device, as in `Beat`.
        """
        self.samples.append((time.monotonic(), step()))
        self.step, self.device = step, device

    def beat(self, *, over: bool = False) -> None:
        """Writes a heartbeat, unless a rival is there; a failure is ignored.

        Args: over, as in `Beat`.
        """
        self._look()
        if self.rival is not None:
            return
        step = self.step()
        if self.samples:
            self.samples.append((time.monotonic(), step))
        found = Beat(
            host=platform.node(),
            pid=os.getpid(),
            device=self.device,
            step=step,
            steps=self.steps,
            steps_per_second=self._rate(),
            updated=time.time(),
            started=self.started,
            over=over,
            orphan=os.getppid() != self.parent,
        )
        with contextlib.suppress(OSError):
            _replace(self.folder / FILE, found._asdict())
            self.beats += 1

    def _look(self) -> None:
        """Notes a rival, if there is one: whatever is in the file after the first heartbeat of this
        process, and is not by it, was written by another process since."""
        found = read(self.folder) if self.beats and self.rival is None else None
        if found is not None and not found.over:
            own = self.started, platform.node(), os.getpid()
            # Both processes compare the same two, so exactly one of them stops.
            if found.process < own:
                self.rival = found

    def check(self) -> None:
        """Raises: Rival if another process trains the run too, and began before this one."""
        if (rival := self.rival) is not None:
            raise Rival(
                f"{self.folder}: process {rival.pid} on {rival.host} trains this run too, and "
                "began before this one. So this process stops and writes nothing more into the "
                "folder; what it trained since its last checkpoint is given up. The locks of this "
                "file system do not reach the other machine: start a run on one machine only"
            )

    def _rate(self) -> float | None:
        """Agent steps of one seed per second over the last minute; None if it is not known."""
        if len(self.samples) < 2:
            return None
        (first, begin), (last, end) = self.samples[0], self.samples[-1]
        return (end - begin) / (last - first) if end > begin and last > first else None


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file. Unlike `files.write_text` it does not wait for the disk: after a power
    cut nobody needs an old heartbeat. Raises: OSError."""
    fresh = files.temporary(path)
    try:
        with files.create(fresh) as file:
            file.write(json.dumps(content).encode())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def beating(folder: Path, *, steps: int) -> Iterator[Pulse]:
    """A context in which a thread writes a heartbeat every `EVERY` seconds.

    The first heartbeat is written at the start of the context and the last one at its end, which
    stays in the folder.

    Args: as of `Pulse`.
    """
    pulse, over = Pulse(folder, steps=steps), threading.Event()

    def go_on() -> None:
        while not over.wait(EVERY):
            pulse.beat()

    pulse.beat()
    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield pulse
    finally:
        over.set()
        thread.join()
        pulse.beat(over=True)
