"""Estimates how much memory a run will take, by building it once from tensors without memory.

`estimate` builds the parts of a run on torch's `meta` device and lets each take one step. So the
sizes of networks, optimisers, replay, caches, batches and activations are those of the real code.
Not included are Python and its libraries, buffers inside kernels, and the saving of a checkpoint.

Measured peaks of fourteen runs on a CPU were 0.6 to 1.6 times the estimate, most of them 0.7 to 1.2
times. Tensors that live as long as the run are counted exactly; the memory of temporary ones
depends on the heap of the C library.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import draw, envs
from cerl.agent import Agent
from cerl.collect import Collector
from cerl.config import Config, GruConfig
from cerl.config.effects import is_read, section_of
from cerl.data import EnvSpec, Step
from cerl.device.free import out_of_memory
from cerl.diagnose import diagnose
from cerl.envs.api import VecEnv
from cerl.evaluate import EVAL_SALT, Evaluator, evaluation_keys, lanes
from cerl.footprint.ledger import META, Ledger
from cerl.kernels import standing_for
from cerl.learn import Learner
from cerl.replay import Replay
from cerl.sampler import sampler_of

BEYOND = 1 << 62  # bytes; stands for sizes that do not fit into a 64-bit integer
HOST = "cpu"
HEAP = 1.75  # bytes of heap that the C library takes for each byte of temporary tensors (measured)
FEW = 8, 16  # learnt rows of the two short windows from which the size of a long one is computed
MAKE_AGENT = Callable[[Config, EnvSpec, torch.device], Agent[Any, Any, Any]]

# For each part of a run the options on which its size depends, apart from those of observations.
_SIZES = ("net.hidden", "net.channels", "agent.critics", "agent.quantiles", "ensemble.horizons")
_SEQUENCE = ("encoder.layers", "encoder.width", "encoder.ratio")
_NETWORK = ("seeds", "ensemble.members", *_SIZES, *_SEQUENCE)
_OBSERVED = ("rows", "columns", "size", "dimensions", "length", "decks")
_BATCHES = (
    *("seeds", "ensemble.members", "replay.batch", "replay.candidates", "loss.n_step"),
    *("encoder.learnt", "encoder.context", "encoder.frames", *_SIZES, *_SEQUENCE),
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "environments": ("seeds", "env.envs"),
    "networks": _NETWORK,
    "replay": ("seeds", "replay.capacity"),
    "optimiser": _NETWORK,
    "acting": ("seeds", "env.envs", "ensemble.members", "encoder.cache", *_SEQUENCE[:2]),
    "batches": _BATCHES,
    "diagnostics": _BATCHES,
    "evaluation": (
        *("seeds", "ensemble.members", "eval.episodes", "eval.slots", "eval.steps"),
        *("encoder.cache", *_SIZES, *_SEQUENCE[:2]),
    ),
}

# Measured bytes of one simulator on the host, by family; then those of any other family.
SIMULATOR = {"atari": 2_000_000, "mujoco": 1_000_000, "dmc": 12_500_000}
OTHER_SIMULATOR = 50_000


class Part(NamedTuple):
    """The memory that one part of a run takes on one device."""

    name: str  # key of OPTIONS
    place: str  # the device: cpu (host memory) or cuda:N
    size: int  # bytes


class Needs(NamedTuple):
    """The memory that a run with the options of `config` takes, part by part.

    A place is a device whose memory is used: cpu (host memory) or cuda:N.
    """

    parts: tuple[Part, ...]
    config: Config

    def total(self) -> dict[str, int]:
        """Bytes of all parts, by place."""
        totals: dict[str, int] = {}
        for part in self.parts:
            totals[part.place] = totals.get(part.place, 0) + part.size
        return totals

    def largest(self, place: str) -> Part:
        """The largest part in a place."""
        return max((p for p in self.parts if p.place == place), key=lambda part: part.size)

    def listed(self, place: str) -> str:
        """The parts in a place, largest first, e.g. `9.1 GB: replay 7.1, networks 0.6`."""
        total = self.total()[place]
        if total >= BEYOND:
            return f"more than a 64-bit number of bytes: {self.largest(place).name}"
        unit, name = _unit(total)
        parts = sorted((p for p in self.parts if p.place == place), key=lambda p: -p.size)
        shown = [(p.name, f"{p.size / unit:,.1f}") for p in parts]
        named = ", ".join(f"{name} {size}" for name, size in shown if size != "0.0")
        return f"{total / unit:,.1f} {name}: {named}"

    def culprits(self, place: str) -> str:
        """The options that make the largest part in a place large, e.g. `replay.capacity (100000)`.

        At most three with large values, the largest first, and then the number of seeds.
        """
        part, found, seeds = self.largest(place), [], ""
        shapes = [f"env.{name}" for name in _OBSERVED if hasattr(self.config.env, name)]
        for key in (*OPTIONS[part.name], *shapes):
            section, name = section_of(self.config, key)
            if section is None or not is_read(self.config, key):
                continue
            value = getattr(section, name)
            if key == "seeds":
                seeds = f"the number of seeds ({len(value)})" if len(value) > 1 else ""
            elif isinstance(value, tuple):
                found.append((max(value, default=0), f"{key} ({' '.join(map(str, value))})"))
            else:
                found.append((value or 0, f"{key} ({value})"))
        found.sort(key=lambda one: -one[0])
        # Options with values far below the largest one are unlikely to be the reason.
        least = max(2, found[0][0] ** (1 / 3))
        named = [words for value, words in found[:3] if value >= least]
        return ", ".join([*named, *filter(None, [seeds])])


def gigabytes(size: int) -> str:
    """A number of bytes as text in decimal units, e.g. 9.1 GB."""
    unit, name = _unit(size)
    return f"{size / unit:,.1f} {name}"


def _unit(size: int) -> tuple[int, str]:
    return (10**9, "GB") if size >= 10**9 else (10**6, "MB")


def estimate(
    config: Config, *, device: torch.device, agent: MAKE_AGENT, evaluating: bool = False
) -> Needs:
    """Estimates the memory of a run on `device` and on the host, without allocating it.

    Args:   agent, a function that makes the agent of a config (`cerl.wiring.make_agent`);
            evaluating, count only what `cerl eval` needs: networks and one evaluation.
    Raises: ValueError for options that do not fit together, as the run itself would.
    """
    one = None if config.env.resident else _simulator(config)

    def measured(config: Config) -> dict[str, int]:
        return _sizes(config, one, kind=device.type, agent=agent, evaluating=evaluating)

    learnt = config.rows_of_window.learnt
    slow = isinstance(config.encoder, GruConfig) and device.type == "cpu" and learnt > FEW[1]
    if slow:
        # On a CPU a GRU steps row by row, which makes long windows slow to simulate. Each row
        # takes the same memory, so two short windows give the size of a long one.
        few, more = (measured(_windows(config, rows)) for rows in FEW)
        rest = (learnt - FEW[0]) / (FEW[1] - FEW[0])
        sizes = {name: round(few[name] + rest * (more[name] - few[name])) for name in few}
    else:
        sizes = measured(config)
    parts = []
    for name in OPTIONS:
        on_host = name == "replay" and config.replay.placement == "host"
        parts.append(Part(name, HOST if on_host else place_of(device), sizes.get(name, 0)))
    count = lanes(config) + (0 if evaluating else config.env.envs)
    each = 0 if one is None else SIMULATOR.get(config.env.family, OTHER_SIMULATOR)
    parts.append(Part("environments", HOST, each * count * len(config.seeds)))
    return Needs(tuple(part for part in parts if part.size), config)


def _windows(config: Config, rows: int) -> Config:
    """The config with `rows` learnt rows in a window."""
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"learnt": rows})})


def _sizes(
    config: Config, one: EnvSpec | None, *, kind: str, agent: MAKE_AGENT, evaluating: bool
) -> dict[str, int]:
    """Bytes of every part of a run; BEYOND if a part is too large to count.

    Args: one, the spec of a simulator, None if environments are on the device; kind, cpu or cuda.
    """
    ledger = Ledger()
    try:
        with ledger, standing_for(kind):
            held = _wired(config, one, ledger, agent, fused=kind == "cuda", evaluating=evaluating)
            sizes = dict(ledger.live)
            del held  # the parts must live until their bytes were read from the ledger
    except (RuntimeError, OverflowError, TypeError) as error:
        if not _countless(error):
            raise
        return {ledger.account: BEYOND}
    if kind == "cuda":
        # Each captured graph keeps the memory of its own intermediate results. Diagnostics are not
        # captured and cannot use that memory.
        apart = ("acting", "batches", "diagnostics", "evaluation")
        sizes |= {name: ledger.peak[name] for name in apart}
    rest, at = max(ledger.highest - sum(sizes.values()), 0), ledger.highest_in
    # Temporary tensors that are allocated again and again fragment the heap of the C library, which
    # then takes more memory than they have. Those of initialising networks are allocated once.
    if kind == "cpu" and at != "networks":
        rest = int(HEAP * rest)
    sizes[at] = sizes.get(at, 0) + rest
    return {name: sizes.get(name, 0) for name in OPTIONS}


def place_of(device: torch.device) -> str:
    """The name of a device, always with its number: cpu, cuda:0, ..."""
    if device.type != "cuda" or device.index is not None:
        return str(device)
    return f"cuda:{torch.cuda.current_device()}"


def _wired(
    config: Config,
    one: EnvSpec | None,
    ledger: Ledger,
    make_agent: MAKE_AGENT,
    *,
    fused: bool,
    evaluating: bool,
) -> list[Any]:
    """Builds the parts of a run on the meta device and lets each take a step.

    Args:    one, the spec of a simulator, None if environments are on the device; fused, whether
             optimiser steps are fused kernels, which need no temporary memory; evaluating, build
             only networks and an evaluation.
    Returns: the parts, which the caller keeps alive.
    """
    keys = draw.seed_keys(config.seeds, device=META)
    ledger.account = "evaluation"
    arena = _envs(config, one, lanes(config), salt=EVAL_SALT)
    ledger.account = "networks"
    agent = make_agent(config, arena.spec, META)
    with META:
        net = agent.build(keys=keys)
    held: list[Any] = [arena, agent, net]
    if not evaluating:
        ledger.account = "environments"
        env = _envs(config, one, config.env.envs, salt=0)
        ledger.account = "replay"
        remembered, capacity = config.encoder.state_size, config.replay.capacity
        replay = Replay(
            env.spec,
            keys=keys,
            capacity=capacity,
            device=META,
            remembered=remembered,
            sampler=sampler_of(config.replay.sampler),
        )
        ledger.account = "optimiser"
        learner = Learner(config, agent, net, replay, keys=keys)
        ledger.account = "acting"
        collector = Collector(config, env, agent, net, replay, keys=keys)
        collector.step()
        ledger.account = "batches"
        if fused:
            for optimiser in (one for steps in learner.optimisers for one in steps):
                optimiser.step = _nothing
        learner.update()
        if fused:  # elsewhere diagnostics use the memory that an update used before
            ledger.account = "diagnostics"
            replay.shares = partial(_shares, len(keys))
            diagnose(agent, learner)
        held += [env, replay, learner, collector]
    ledger.account = "evaluation"
    own = evaluation_keys(config.seeds, META)
    evaluator = Evaluator(config, arena, agent, net, keys=own)
    evaluator.player.step()
    return [*held, evaluator]


def _nothing(grads: object) -> None:
    """Takes the place of an optimiser step that allocates nothing."""


def _shares(seeds: int, members: int) -> Tensor:
    """Takes the place of `Replay.shares`, whose masks are small beside the rows that they mark."""
    return torch.zeros(seeds, members, device=META)


def _envs(config: Config, one: EnvSpec | None, count: int, *, salt: int) -> VecEnv:
    """`count` environments of every seed, on the meta device."""
    if one is not None:
        return _Blank(one._replace(envs=count), len(config.seeds))
    env = config.env.model_copy(update={"envs": count})
    return envs.make(env, seeds=config.seeds, salt=salt, device=META)


def _simulator(config: Config) -> EnvSpec:
    """The spec of a config's simulators, taken from one that is made and closed again."""
    env = config.env.model_copy(update={"envs": 1})
    one = envs.make(env, seeds=config.seeds[:1], salt=0, device="cpu")
    try:
        return one.spec
    finally:
        one.close()


class _Blank:
    """Takes the place of simulators on the host; all observations are tensors without memory."""

    note = ""

    def __init__(self, spec: EnvSpec, seeds: int) -> None:
        self.spec, self.seeds = spec, seeds

    def reset(self) -> Step:
        lead = (self.seeds, self.spec.envs)
        obs = torch.zeros(*lead, *self.spec.observation, dtype=self.spec.dtype, device=META)
        flags = (torch.zeros(lead, dtype=torch.bool, device=META) for _ in range(2))
        return Step(obs, torch.zeros(lead, device=META), *flags)

    def restart(self, number: int) -> Step:
        return self.reset()

    def step(self, action: Tensor) -> Step:
        return self.reset()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None

    def close(self) -> None:
        return None


def _countless(error: Exception) -> bool:
    """Whether an error means that the size of a tensor does not fit into an integer."""
    text = str(error).lower()
    return isinstance(error, OverflowError) or "overflow" in text or out_of_memory(error)


def refusal(needs: Needs, place: str, *, free: int, reserved: int = 0) -> str:
    """The error message for a run that does not fit into the memory of a place.

    Args: free, bytes that are left for this run; reserved, free bytes that other runs have reserved
          (not included in `free`).
    """
    others = f" ({gigabytes(reserved)} more are reserved by other runs)" if reserved else ""
    return (
        f"memory: the run needs {needs.listed(place)}; {gigabytes(free)} are free on {place}"
        f"{others}. {_advice(needs, place)}"
    )


def _advice(needs: Needs, place: str) -> str:
    """The part of an error message that says which options to make smaller."""
    part = needs.largest(place).name
    culprits = needs.culprits(place)
    text = f"Most goes to {part}"
    if culprits:
        text += f", which grows with {culprits}: make one of them smaller"
    if part == "replay" and place != HOST:
        text += ", or set replay.placement to host (pinned memory)"
    return text


def explained(error: BaseException, needs: Needs | None) -> RuntimeError | None:
    """Translates an out-of-memory error into one that names options; None for other errors.

    Args: needs, the estimate for the run, None if there is none.
    """
    if not out_of_memory(error):
        return None
    if needs is None or not needs.parts:
        return RuntimeError(
            "memory: an allocation did not succeed; use fewer seeds, members or environments, "
            "or a smaller replay.capacity or replay.batch"
        )
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    places = needs.total()
    place = next((name for name in places if (name != HOST) == on_gpu), next(iter(places)))
    return RuntimeError(
        f"memory: an allocation did not succeed on {place}. The run was expected to need "
        f"{needs.listed(place)}; something else took the rest, or the estimate fell short. "
        f"{_advice(needs, place)}"
    )


@contextlib.contextmanager
def explaining(needs: Needs | None) -> Iterator[None]:
    """A context that raises RuntimeError, with advice on options, if memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = explained(error, needs)
        if told is None:
            raise
        raise told from error
