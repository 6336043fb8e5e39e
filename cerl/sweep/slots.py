"""Places for runs that train at the same time on this machine: GPUs, and how many runs on each.

A run in a place is a process that sees only the GPU of its place (CUDA_VISIBLE_DEVICES) and uses
its share of the CPU cores (OMP_NUM_THREADS). This module asks nvidia-smi about GPUs and imports
torch only where that program is missing.
"""

import os
import subprocess
import time
from collections.abc import Mapping
from typing import NamedTuple

from cerl.device.cores import asked_threads, cores
from cerl.device.kind import NUMBER

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
# A run that started less than this many seconds ago may not have taken its memory yet.
YOUNG = 60.0
_QUERY = "uuid,name,memory.total,memory.free"
_PATIENCE = 30.0  # seconds to wait for nvidia-smi; the first call after a boot is slow


class Gpu(NamedTuple):
    """A GPU of this machine, as nvidia-smi lists it."""

    uuid: str
    name: str  # its model
    total: float  # memory in MiB
    free: float  # memory in MiB


class Place(NamedTuple):
    """Where one run trains."""

    gpu: str  # what CUDA_VISIBLE_DEVICES of its process is; "" on a CPU
    since: float  # when the place was taken, in seconds of a monotonic clock


class Slots:
    """The places for runs, and which of them are taken.

    Args of the constructor: device, of the command line: auto, cpu, cuda or cuda:N; jobs, the most
    runs at the same time, None for as many as there are places; per_gpu, the most runs on one GPU,
    None for 1, or for as many as `jobs` needs.

    Raises: ValueError if a number is below 1, or this machine does not have the device.
    """

    def __init__(self, device: str, *, jobs: int | None, per_gpu: int | None) -> None:
        for name, number in (("jobs", jobs), ("per-gpu", per_gpu)):
            if number is not None and number < 1:
                raise ValueError(f"--{name}: expected at least 1, got {number}")
        self.gpus = chosen(device)
        if not self.gpus and (per_gpu or 1) > 1:
            raise ValueError(f"--per-gpu {per_gpu}: expected a GPU, found none (device {device})")
        among = max(1, len(self.gpus))
        # Without --per-gpu, all jobs that were asked for have a place: 10 on 4 GPUs are 3 on each.
        self.per_gpu = per_gpu or -(-(jobs or among) // among)
        places = len(self.gpus) * self.per_gpu if self.gpus else jobs or 1
        self.count = min(jobs or places, places)  # runs at the same time
        self.taken: list[Place] = []
        self.numbers: dict[str, str] = {}  # of GPUs that are named by their UUID

    @property
    def here(self) -> bool:
        """Whether runs train in this process: one at a time, and there is no GPU to choose."""
        return self.count == 1 and len(self.gpus) <= 1

    def take(self, *, others: int = 0) -> Place | None:
        """Takes a free place: on the GPU with the most free memory of those with a free place.

        Args:    others, places that runs of an earlier sweep still need.
        Returns: None if there is no free place.
        """
        if len(self.taken) + others >= self.count:
            return None
        place = Place(self._gpu(), time.monotonic())
        self.taken.append(place)
        return place

    def give(self, place: Place) -> None:
        """Makes a place free again."""
        self.taken.remove(place)

    def _gpu(self) -> str:
        counts = {gpu: sum(place.gpu == gpu for place in self.taken) for gpu in self.gpus}
        free = [gpu for gpu in self.gpus if counts[gpu] < self.per_gpu]
        if len(free) < 2:
            return free[0] if free else ""
        now, known = time.monotonic(), rows(self.gpus)

        def room(gpu: str) -> tuple[float, int]:
            row = known.get(gpu)
            if row is None:
                return 0.0, -counts[gpu]
            young = sum(place.gpu == gpu and now - place.since < YOUNG for place in self.taken)
            return row.free - young * row.total / self.per_gpu, -counts[gpu]

        return max(free, key=room)

    def name_by_uuid(self) -> None:
        """Names all GPUs by their UUID instead of their number; before any place is taken.

        Raises: RuntimeError if nvidia-smi does not tell the UUIDs.
        """
        known = rows(self.gpus)
        if missing := [gpu for gpu in self.gpus if gpu not in known]:
            raise RuntimeError(
                f"expected nvidia-smi to tell the UUID of GPU {', '.join(missing)}, but it does "
                "not (if the GPUs are of several models, set CUDA_DEVICE_ORDER=PCI_BUS_ID)"
            )
        self.numbers = {known[gpu].uuid: gpu for gpu in self.gpus}
        self.gpus = list(self.numbers)

    def environment(self, place: Place, *, at_once: int) -> dict[str, str]:
        """The environment variables of a process that trains in a place.

        Args: at_once, runs that share the CPU cores.
        """
        found = {**os.environ, VISIBLE: place.gpu}
        if place.gpu in self.numbers:
            found[NUMBER] = self.numbers[place.gpu]
        if asked_threads() is None:
            found[THREADS] = str(max(1, cores() // max(1, at_once)))
        return found


def chosen(device: str) -> list[str]:
    """The GPUs that a device of the command line stands for, as entries of CUDA_VISIBLE_DEVICES.

    Args:    device, auto, cpu, cuda or cuda:N; N counts among the GPUs that this process sees.
    Returns: [] for a CPU, also if auto finds no GPU.
    Raises:  ValueError if this machine does not have the GPU.
    """
    kind, colon, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (
        colon and not (kind == "cuda" and number.isdecimal())
    ):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    if kind == "cpu":
        return []
    found = visible()
    if kind == "auto" or (found and not colon):
        return found
    if not number or int(number) >= len(found):
        raise ValueError(
            f"device: expected one of the {len(found)} visible CUDA devices, or cpu; got {device!r}"
        )
    return [found[int(number)]]


def visible() -> list[str]:
    """The GPUs that this process sees, as entries of CUDA_VISIBLE_DEVICES."""
    if os.environ.get(VISIBLE) == "":  # none, which needs no question to nvidia-smi or torch
        return []
    count = len(listed())
    if not count:
        import torch  # knows GPUs without nvidia-smi, but its import takes seconds

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            return []
    if VISIBLE not in os.environ:
        return [str(number) for number in range(count)]
    found: list[str] = []
    for entry in os.environ[VISIBLE].split(","):
        entry = entry.strip()
        # CUDA, too, ignores the rest of the list from the first entry on that names no GPU.
        if not entry or (entry.lstrip("-").isdecimal() and not 0 <= int(entry) < count):
            break
        found.append(entry)
    return found


def listed() -> list[Gpu]:
    """All GPUs of this machine in the order of their numbers; [] if nvidia-smi does not say."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(Gpu._fields):
            return []
        found.append(Gpu(words[0], words[1], _mib(words[2]), _mib(words[3])))
    return found


def _mib(text: str) -> float:
    """A number of nvidia-smi; 0 where it says `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def rows(gpus: list[str]) -> Mapping[str, Gpu]:
    """What nvidia-smi says about GPUs, by their entry of CUDA_VISIBLE_DEVICES.

    Numbers are looked up only if CUDA numbers GPUs as nvidia-smi does: if all are of one model, or
    CUDA_DEVICE_ORDER says so. GPUs that cannot be told are left out.
    """
    known = listed()
    same = len({gpu.name for gpu in known}) == 1
    same = same or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    found = {}
    for entry in gpus:
        if entry.isdecimal():
            meant = known[int(entry) :][:1] if same else []
        else:  # the UUID of a GPU, or the first part of one
            meant = [gpu for gpu in known if gpu.uuid.startswith(entry)]
        if meant:
            found[entry] = meant[0]
    return found
