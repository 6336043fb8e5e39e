"""The cost of runs before they are trained: memory, disk space and hours.

Memory is estimated as a run estimates its own (`cerl/footprint/estimate.py`), disk space from that,
and hours from runs in the same folder, or from a few seconds of training (`cerl/sweep/speed.py`).
"""

import functools
import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.parquet as pq
import torch
import yaml

from cerl import envs
from cerl.config import Config, ConfigError, UniformConfig, preset
from cerl.data import EnvSpec
from cerl.device import free
from cerl.device.kind import kind_of
from cerl.footprint.estimate import HOST, estimate
from cerl.footprint.reservation import SHARE
from cerl.record import files
from cerl.record.checkpoint import KEEP
from cerl.record.folder import FILE, changeable, load_file
from cerl.schedule import Schedule
from cerl.sweep.plan import PlannedRun
from cerl.sweep.speed import Speed, measured
from cerl.sweep.state import RunState, states
from cerl.wiring import make_agent

# Options on which neither the memory of a run nor its speed depends, beside those that may change
# in a run: names, and numbers that training only multiplies with or compares to.
_NEITHER = (
    *("preset", "explore", "loss.gamma", "optim.lr", "optim.eps", "optim.clip_norm"),
    *("optim.beta1", "optim.beta2", "schedule.target_every", "eval.epsilon", "env.threads"),
    *("agent.huber_delta", "ensemble.active_probability", "env.sticky", "env.ramping"),
)
# Options on which the speed of a run depends, but not its memory.
_MEMORY_ONLY = ("eval.every", "eval.time_limit", "replay.start")
# Bytes of GPU memory that each process takes beside its tensors: for the CUDA context and the
# libraries of matrix products and convolutions.
CONTEXT = 600_000_000
# A checkpoint has the parameters, the target network and the optimiser's state: with Adam four
# numbers for a parameter, of which the part `optimiser` of the estimate has three.
_CHECKPOINT = 4 / 3
# By how much rows of replay shrink when they are compressed (measured): frames of few colours, and
# the continuous observations of all other families.
_FRAMES = {"atari": 90, "minatar": 35, "catch": 25, "memory": 40}
_NUMBERS = 1.2
# Measured bytes on the disk of a result row, a metric, a scalar of TensorBoard, and a table
# without rows. Metrics of a member in one line of the log, and scalars of a seed.
_ROW, _METRIC, _SCALAR, _EMPTY = 16, 5, 32, 10_000
_METRICS, _SCALARS = 18, 30
# What building an environment or a network may raise.
FAULTS = (ImportError, OSError, RuntimeError, ValueError)
_SAMPLES = 3  # most earlier runs of one cell whose tables are read


class Asked(Protocol):
    """A run that is asked for."""

    @property
    def run(self) -> PlannedRun: ...
    @property
    def config(self) -> Config: ...


class Cost(NamedTuple):
    """What one run takes. Bytes are those of its whole process, all seeds together."""

    gpu: int  # bytes of GPU memory; 0 on a CPU
    host: int  # bytes of host memory for what grows with the options, without Python and libraries
    disk: int  # bytes of its folder at the end
    hours: float  # of the whole run, NaN if unknown
    basis: (
        str  # of the hours: "" (unknown), "earlier runs", "measured", "at most" (see `estimates`)
    )


def estimates(
    asked: Sequence[Asked],
    out: Path,
    *,
    device: str = "auto",
    calibrate: bool = False,
    note: Callable[[str], None] | None = None,
) -> list[Cost]:
    """The costs of runs, in their order.

    Hours come from runs in `out` on the same kind of device that have the same options of those
    that matter for speed, at first in the same environment and else in any of the family. With
    `calibrate`, for each preset the run that needs most memory of those without hours is trained
    for some seconds. Its speed is that of the others too, which take at most as long ("at most").

    A run whose environment cannot be made, e.g. because its package is missing, has no costs, and a
    note says why.

    Args: device, of the command line: auto, cpu, cuda or cuda:N; note is called with sentences for
          the user.
    """
    kind, note = kind_of(device), note or (lambda _: None)
    memory = shared_memory(kind)
    paces = _paces(out, memory, kind=kind) if out.is_dir() else {}
    found = []
    failed: dict[str, None] = {}
    for one in asked:
        try:
            parts = memory.of(one.config)
        except FAULTS as error:
            failed[f"{one.run.env}: its costs are unknown: {error}"] = None
            found.append(Cost(0, 0, 0, math.nan, ""))
            continue
        hours, basis = _by_earlier(one.config, paces, memory)
        found.append(
            Cost(
                sum(size for (_, place), size in parts.items() if place != HOST)
                + (CONTEXT if kind == "cuda" else 0),
                sum(size for (_, place), size in parts.items() if place == HOST),
                disk(one.config, parts),
                hours,
                basis,
            )
        )
    for sentence in failed:
        note(sentence)
    return _calibrated(asked, found, device=device, note=note) if calibrate else found


# Bytes by part of a run (a key of `cerl.footprint.estimate.OPTIONS`) and place (cpu or cuda:N).
Parts = Mapping[tuple[str, str], int]


class Memory:
    """Estimates of memory for one kind of device; configs that need the same share one.

    Two configs need the same if all options are equal that can matter for memory. Simulators on the
    host matter by the shapes of their observations and actions only, so most environments of such a
    family share one estimate. So do configs that differ in replay.capacity: the replay of the
    sampler `uniform` grows in proportion to it, and no other part does.
    """

    def __init__(self, kind: str) -> None:
        self.device = torch.device("cpu" if kind == "cpu" else "cuda:0")
        self.specs: dict[str, EnvSpec] = {}
        self.known: dict[Any, tuple[Parts, int]] = {}  # with the capacity that they hold for

    def of(self, config: Config) -> Parts:
        """Bytes by part and place. Raises: ValueError as `estimate`."""
        uniform, capacity = isinstance(config.replay.sampler, UniformConfig), config.replay.capacity
        key = self.key(config, besides=(*_MEMORY_ONLY, *(["replay.capacity"] if uniform else [])))
        if key not in self.known:
            needs = estimate(config, device=self.device, agent=make_agent)
            parts = {(part.name, part.place): part.size for part in needs.parts}
            self.known[key] = parts, capacity
        parts, known = self.known[key]
        if known == capacity:
            return parts
        return {
            (name, place): round(size * capacity / known) if name == "replay" else size
            for (name, place), size in parts.items()
        }

    def key(self, config: Config, *, besides: Sequence[str] = _MEMORY_ONLY) -> Any:
        """A key that configs with equal needs share. Args: besides, options that do not matter."""
        tree = _that_matter(config, besides)
        if config.env.resident:
            return tree
        env = {key: value for key, value in config.env.model_dump(mode="json").items()}
        name = json.dumps(env | {"envs": 1}, sort_keys=True)
        if name not in self.specs:
            one = envs.make(
                config.env.model_copy(update={"envs": 1}), seeds=(0,), salt=0, device="cpu"
            )
            self.specs[name] = one.spec._replace(name="")
            one.close()
        rest = tuple(pair for pair in tree if pair[0] != "env.name")
        return rest, self.specs[name]


@functools.cache
def shared_memory(kind: str) -> Memory:
    """The estimates of this process for a kind of device, since each takes some 0.05 seconds."""
    return Memory(kind)


def _that_matter(config: Config, besides: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The options of a config that can matter for memory or speed, and the number of its seeds."""

    def aside(key: str) -> bool:
        names = (*_NEITHER, *besides)
        return any(key == name or key.startswith(f"{name}.") for name in names)

    tree = config.model_dump(mode="json")
    tree["seeds"] = len(config.seeds)
    # A run logs often enough to slow it down, and its log may change while it goes on.
    tree["every"] = config.log.every if "eval.every" not in besides else 0
    return tuple(
        (key, json.dumps(value))
        for key, value in preset.leaves(tree)
        if not changeable(key) and not aside(key)
    )


def disk(config: Config, parts: Parts) -> int:
    """Bytes of the folder of a run at its end.

    Two checkpoints, each of 4/3 of the optimiser's state with the target network, plus the state of
    acting; the rows of replay that both need, compressed, if log.save_replay is set; tables, and
    scalars of TensorBoard, by the number of evaluations and of lines of the log.

    Measured folders of runs of Catch, MinAtar and the point mass were within 30% of it.

    Args: parts, the estimate of the run's memory.
    """
    sizes: dict[str, int] = {}
    for (name, _), size in parts.items():
        sizes[name] = sizes.get(name, 0) + size
    stay = Schedule.of(config, envs=config.env.envs).kept
    state = _CHECKPOINT * sizes.get("optimiser", 0) + sizes.get("acting", 0)
    steps, capacity = config.schedule.steps, max(1, config.replay.capacity)
    rows = 0.0
    if config.log.save_replay:
        # Rows of the older checkpoint are kept too, as far as the newer one has overwritten them.
        kept = capacity + (KEEP - 1) * min(config.log.checkpoint_every, capacity)
        kept += stay * capacity
        rows = sizes.get("replay", 0) * min(steps, kept) / capacity
        rows /= _FRAMES.get(config.env.family, _NUMBERS)
    evaluations = -(-steps // config.eval.every)
    lines = -(-steps // config.log.every)
    members, seeds = config.ensemble.members, len(config.seeds)
    scores = seeds * (evaluations * (members + len(config.eval.policies)) + lines * members)
    metrics = seeds * lines * members * _METRICS
    scalars = seeds * (lines * _SCALARS + evaluations * len(config.eval.policies) * 5)
    if config.log.members == "each":
        scalars += scores + metrics
    tables = _EMPTY + scores * _ROW + metrics * _METRIC + scalars * _SCALAR
    return round((KEEP + stay) * state + rows + tables)


def fitting_seeds(config: Config, *, device: str = "auto", share: int = 1) -> int:
    """The most seeds of a config that fit into memory side by side; 1 if not even that many do.

    All of them if the memory cannot be estimated, since the run itself will tell why.

    Args: device, of the command line: auto, cpu, cuda or cuda:N; share, how many runs train on the
          device at the same time, each with an equal part of its memory.
    """
    kind = kind_of(device)
    memory, room = shared_memory(kind), _room(device)

    def fits(count: int) -> bool:
        parts = memory.of(config.model_copy(update={"seeds": config.seeds[:count]}))
        for place, size in room.items():
            need = sum(value for (_, where), value in parts.items() if (where == HOST) == place)
            context = 0 if place or kind == "cpu" else CONTEXT
            if need + context > SHARE * size / share:
                return False
        return True

    low, high = 1, len(config.seeds)
    try:
        if fits(high):
            return high
    except FAULTS:
        return high
    while high - low > 1:  # `low` seeds fit or are one, `high` seeds do not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _room(device: str) -> dict[bool, float]:
    """Bytes of memory: of the host that are available (key True), and of a GPU in all (False).

    Memory of which nothing is known is left out.
    """
    limits = [limit.free for limit in free.free_bytes(torch.device("cpu"))]
    room: dict[bool, float] = {True: min(limits)} if limits else {}
    if kind_of(device) == "cuda":
        room[False] = gpu_memory(device)
    return room


@functools.cache
def gpu_memory(device: str) -> float:
    """Bytes of memory of the GPU that a device stands for; the smallest of those it may stand for.

    nvidia-smi is asked, since torch would take memory of the GPU to answer; torch is asked where
    that program is missing.
    """
    number = device.partition(":")[2]
    try:
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        sizes = [float(line) * 2**20 for line in done.stdout.split("\n") if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        count = torch.cuda.device_count()
        sizes = [float(torch.cuda.get_device_properties(i).total_memory) for i in range(count)]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(word.strip().isdecimal() for word in seen):
        sizes = [sizes[int(word)] for word in seen if int(word) < len(sizes)]
    if number.isdecimal():
        sizes = sizes[int(number) : int(number) + 1]
    return min(sizes, default=math.inf)


def _paces(out: Path, memory: Memory, *, kind: str) -> dict[Any, list[float]]:
    """Seconds for an agent step of one seed of the runs in a folder, evaluations included.

    Returns: lists of them by `_speed_keys`.
    """
    try:
        found = states(out)
    except ConfigError:
        return {}
    taken: dict[Any, int] = {}
    paces: dict[Any, list[float]] = {}
    for one in found:
        like = (one.run.cell or one.run.folder, len(one.run.seeds))
        if one.step == 0 or taken.get(like, 0) >= _SAMPLES:
            continue
        folder = Path(one.out) / one.run.folder
        seconds = _seconds_a_step(folder, one)
        if math.isnan(seconds) or _trained_on(folder, one) != kind:
            continue
        try:
            config = load_file(folder / FILE)
        except ConfigError:
            continue
        taken[like] = taken.get(like, 0) + 1
        for key in _speed_keys(config, memory):
            paces.setdefault(key, []).append(seconds)
    return paces


def _seconds_a_step(folder: Path, one: RunState) -> float:
    """Seconds that a run took for an agent step; NaN if nothing tells."""
    try:
        with files.read(folder / "rows.parquet") as file:
            table = pq.read_table(file, columns=["step", "wall_seconds"])
        last = table.num_rows - 1
        step, seconds = (table.column(name)[last].as_py() for name in table.column_names)
        if last >= 0 and step > 0 and seconds > 0:
            return seconds / step
    except (OSError, ValueError, IndexError, KeyError):
        pass
    return 1 / one.rate if one.rate > 0 else math.nan


def _trained_on(folder: Path, one: RunState) -> str:
    """The kind of device, cpu or cuda, that a run was last trained on; "" if unknown."""
    device = one.device
    if not device:
        try:
            content, _ = files.read_small(folder / "versions.yaml", most=1 << 22)
            entries = yaml.safe_load(content)
            last = entries[-1] if isinstance(entries, list) else entries
            device = str(last["device"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return ""
    return "cpu" if device == "cpu" else "cuda"


def _speed_keys(config: Config, memory: Memory) -> list[Any]:
    """Keys that runs share which train equally fast: in one environment, and in one family."""
    exact = memory.key(config, besides=())
    rest = tuple(pair for pair in _that_matter(config, ()) if pair[0] != "env.name")
    return [(exact, config.env.name), rest]


def _by_earlier(
    config: Config, paces: Mapping[Any, list[float]], memory: Memory
) -> tuple[float, str]:
    """Hours of a run by those of earlier ones, and their basis."""
    for key in _speed_keys(config, memory):
        if known := paces.get(key):
            return config.schedule.steps * sum(known) / len(known) / 3600, "earlier runs"
    return math.nan, ""


def _calibrated(
    asked: Sequence[Asked], costs: Sequence[Cost], *, device: str, note: Callable[[str], None]
) -> list[Cost]:
    """The costs, with hours from measurements where there were none."""
    unknown: dict[str, list[int]] = {}
    for index, (one, cost) in enumerate(zip(asked, costs, strict=True)):
        if math.isnan(cost.hours):
            unknown.setdefault(one.config.preset, []).append(index)
    found = list(costs)
    for name, indices in unknown.items():
        most = max(indices, key=lambda index: costs[index].gpu + costs[index].host)
        try:
            speed: Speed = measured(asked[most].config, device=device)
        except RuntimeError as error:
            note(f"{name}: its speed could not be measured: {error}")
            continue
        for index in indices:
            basis = "measured" if index == most else "at most"
            hours = speed.hours(asked[index].config)
            found[index] = costs[index]._replace(hours=hours, basis=basis)
    return found
