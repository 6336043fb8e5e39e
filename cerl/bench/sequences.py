"""Times sequence networks: `cerl bench {memory-update,memory-acting,memory-length}`.

FoX is compared with softmax attention (transformer, by our kernel or by torch), a recurrent unit
(gru) and no memory (mlp), in networks with as many parameters; `transformer-pro` has all of FoX Pro
but its gates, and `definition` is FoX in plain torch. Replay holds random rows of
one endless episode: attention then sees whole windows, and only pruning skips work.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cerl import draw, wiring
from cerl.bench.clock import Timing, device_name, microseconds, profiled
from cerl.bench.table import Output, Row, Rows, Table
from cerl.config import AttentionOptions, Config, load, of_kind
from cerl.config.errors import section_models
from cerl.data import ActInput, EnvSpec, Previous
from cerl.device.pick import pick
from cerl.graph import captured
from cerl.kernels.attention import forgetting_attention
from cerl.learn import Learner
from cerl.replay import Replay, fill_randomly

ENVS, OBSERVATION, ACTIONS = 8, 8, 4


class Net(NamedTuple):
    """A network that is timed."""

    kind: str  # `encoder.name`
    variant: str = "pro"  # the variant of FoX whose number of parameters it has
    reference: bool = False  # attention by the definition in plain torch instead of the kernels
    options: dict[str, Any] = {}  # further options of the encoder


NETS: dict[str, Net] = {
    "fox-llama": Net("fox", "llama"),
    "fox-pro": Net("fox"),
    "transformer": Net("transformer"),
    "transformer torch": Net("transformer", options={"attention": "torch"}),
    "transformer-pro": Net("fox", options={"gate": "none", "gate_scales": (), "rotary": True}),
    "gru": Net("gru"),
    "mlp": Net("mlp"),
    "fox-llama definition": Net("fox", "llama", True),
    "fox-pro definition": Net("fox", reference=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of an ensemble of sequence networks."""

    members: int = 10
    """members of the ensemble, N; each has N value heads (CERL)"""
    layers: int = 2
    """blocks of a network"""
    width: int = 128
    """features of a row, D"""
    heads: int = 4
    """attention heads, H"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """precision of the matrix products inside the blocks"""

    def columns(self) -> Row:
        """The columns of a table that tell the sizes."""
        return {
            "N": self.members,
            "layers": self.layers,
            "D": self.width,
            "H": self.heads,
            "precision": self.precision,
        }


def memory_update(
    *,
    nets: tuple[str, ...] = tuple(NETS),
    windows: tuple[int, ...] = (128, 512),
    batch: int = 32,
    sizes: Sizes = Sizes(),
    profile: bool = False,
    timing: Timing = Timing(calls=20),
    output: Output = Output(),
) -> Rows:
    """Times one update of CERL with a sequence network, sampling included, for one seed.

    The column `attention` is the share of this time that the attention of FoX takes.

    Args:
        nets: fox-llama, fox-pro, transformer, transformer torch, transformer-pro, gru, mlp,
            fox-llama definition, fox-pro definition
        windows: lengths of a window, W, in rows
        batch: windows in a batch, B
        profile: print the kernels of an update with their times (CUDA)
    """
    place = pick(timing.device)
    title = "update of sequence networks"
    table = Table("memory-update", output, device=device_name(place), title=title)
    for window, name in itertools.product(windows, nets):
        learner = _learner(name, place, sizes, window=window, batch=batch)
        update = captured(learner.update, place)
        spent = microseconds(update, place, calls=timing.calls)
        share = None
        if NETS[name].kind == "fox" and not NETS[name].reference:
            share = _attention(learner.config, place, calls=timing.calls) / spent
        row: Row = {"what": name, "W": window, "B": batch} | sizes.columns()
        table.add(row | {"microseconds": spent, "updates/s": 1e6 / spent, "attention": share})
        if profile:
            profiled(update, place)
        del learner, update
    return table.finished()


def memory_acting(
    *,
    nets: tuple[str, ...] = ("fox-llama", "fox-pro", "transformer", "gru"),
    length: int = 200,
    envs: int = 512,
    sizes: Sizes = Sizes(),
    timing: Timing = Timing(calls=20),
    output: Output = Output(),
) -> Rows:
    """Times one step of acting late in a T-maze: with caches, and by recomputing the episode.

    A stream is the sequence of rows that one member sees in one environment. `all` times the
    streams of every member in every environment, as in evaluation. `duty` times one stream for each
    environment, that of the member on duty (the one that acts there), as in training.

    Args:
        nets: as in memory-update
        length: cells of the corridor; every stream holds as many rows, and one more
        envs: environments, E
    """
    place = pick(timing.device)
    title = "acting with sequence networks"
    table = Table("memory-acting", output, device=device_name(place), title=title)
    for name, streams in itertools.product(nets, ("duty", "all")):
        learner = _learner(name, place, sizes, window=length + 3, batch=1)
        cached, recomputed, size = _acting(
            learner, envs=envs, rows=length + 1, evaluating=streams == "all"
        )
        fast = microseconds(captured(cached, place), place, calls=timing.calls)
        slow = microseconds(captured(recomputed, place), place, calls=timing.calls)
        count = envs * (sizes.members if streams == "all" else 1)
        row: Row = {"what": name, "streams": f"{streams} {count}", "rows": length + 1}
        row |= sizes.columns() | {"cached us": fast, "recomputed us": slow}
        table.add(row | {"ratio": slow / fast, "cache MiB": size / 2**20})
        del learner, cached, recomputed
    return table.finished()


def memory_length(
    *,
    nets: tuple[str, ...] = ("fox-llama", "fox-pro", "transformer"),
    lengths: tuple[int, ...] = (64, 256, 1024, 4096),
    prune: float = -10.0,
    rule: Literal["static", "running"] = "static",
    scales: tuple[float, float] = (8.0, 64.0),
    batch: int = 8,
    sizes: Sizes = Sizes(),
    timing: Timing = Timing(calls=5),
    output: Output = Output(),
) -> Rows:
    """Times an update, and measures its memory, for windows of several lengths.

    FoX is measured with and without pruning.

    Args:
        nets: as in memory-update
        lengths: lengths of a window, W, in rows
        prune: natural log of the share of a softmax that pruning may leave out
        rule: of pruning, static or running
        scales: shortest and longest time scale of the gates, in steps
        batch: windows in a batch, B
    """
    place = pick(timing.device)
    title = "length of windows"
    table = Table("memory-length", output, device=device_name(place), title=title)
    for name, window, log_eps in _lengths(nets, lengths, prune):
        options = {"prune": log_eps, "gate_scales": scales}
        options |= {"rule": rule} if log_eps else {}
        learner = _learner(name, place, sizes, window=window, batch=batch, **options)
        peak = _peak(learner, place)
        spent = microseconds(captured(learner.update, place), place, calls=timing.calls)
        row: Row = {"what": name, "W": window, "B": batch} | sizes.columns()
        row |= {"gates": "-".join(f"{scale:g}" for scale in scales), "pruned": bool(log_eps)}
        row |= {"microseconds": spent, "rows/us": sizes.members * batch * window / spent}
        table.add(row | {"peak GiB": peak / 2**30})
        del learner
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return table.finished()


def _lengths(
    nets: tuple[str, ...], lengths: tuple[int, ...], prune: float
) -> Iterator[tuple[str, int, float]]:
    """The cases of `memory_length`: name of the network, rows of a window, and `prune` (0: off)."""
    for name, window in itertools.product(nets, lengths):
        yield name, window, 0.0
        if name in NETS and NETS[name].kind == "fox" and "gate" not in NETS[name].options:
            yield name, window, prune


def _learner(
    name: str, device: torch.device, sizes: Sizes, *, window: int, batch: int, **more: Any
) -> Learner:
    """A learner with a sequence network, on random rows of one endless episode.

    Args:    name, a key of `NETS`; window, rows of a window; batch, windows in a batch; more,
             further options of the encoder.
    Raises:  ValueError for an unknown name.
    """
    if name not in NETS:
        raise ValueError(f"nets: expected some of {', '.join(NETS)}; got {name!r}")
    net = NETS[name]
    capacity = ENVS * max(4 * window, 2_000)
    config = load(
        "memory/fox",
        {
            "seeds": (0,),
            "env": {"family": "gym", "envs": ENVS},
            "net": {"hidden": (sizes.width,)},
            "ensemble": {"members": sizes.members, "heads": "cerl"},
            "encoder": _encoder(net, sizes, window=window, **more),
            "replay": {"capacity": capacity, "start": capacity, "batch": batch, "candidates": 8},
            "schedule": {"steps": 2 * capacity},
            "explore": {"end": 0.0},
        },
    )
    spec = EnvSpec("random", (OBSERVATION,), torch.float32, ACTIONS, ENVS, 1, True, True)
    keys = draw.seed_keys(config.seeds, device=device)
    agent = wiring.make_agent(config, spec, device)
    replay = Replay(spec, keys=keys, capacity=capacity, device=device)
    fill_randomly(replay, spec, sizes.members)
    replay.terminated.fill_(False)
    replay.real.fill_(True)
    built = agent.build(keys=keys)
    if net.reference:
        for module in built.trunk.modules():
            if hasattr(module, "impl"):
                module.impl = "reference"
    return Learner(config, agent, built, replay, keys=keys)


def _encoder(net: Net, sizes: Sizes, *, window: int, **more: Any) -> dict[str, Any]:
    """Options of the section `encoder`; those that the kind does not have are left out.

    Args: window, rows of a window; more, further options, which those of the network override.
    """
    options = {
        **{"layers": sizes.layers, "width": sizes.width, "precision": sizes.precision},
        **{"heads": sizes.heads, "variant": net.variant, "sized_like": net.variant},
        **{"learnt": window - 2, "sampling": "uniform", "cache": window},
        **{"prune": 0.0, **more, **net.options},
    }
    known = section_models(Config, "encoder")[net.kind].model_fields
    return {"name": net.kind} | {name: value for name, value in options.items() if name in known}


def _attention(config: Config, device: torch.device, *, calls: int) -> float:
    """Microseconds that attention takes in an update, measured alone.

    In each layer the target network attends forward, the online network forward and backward.
    """
    q = of_kind(config.encoder, AttentionOptions)
    rows = config.ensemble.members * config.replay.batch
    dtype = torch.bfloat16 if q.precision == "bf16" else torch.float32
    shape = (rows, config.rows_of_window.total, q.heads)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    inputs = [normal(*shape, q.width // q.heads).to(dtype).requires_grad_() for _ in range(3)]
    inputs.append(torch.nn.functional.logsigmoid(normal(*shape) + 4.0).requires_grad_())
    start = torch.zeros(rows, config.rows_of_window.total, dtype=torch.bool, device=device)
    options: dict[str, Any] = {"start": start, "window": config.rows_looked_back_on}

    def step() -> None:
        for _ in range(q.layers):
            with torch.no_grad():
                forgetting_attention(*inputs, **options)
            o = forgetting_attention(*inputs, **options)
            torch.autograd.grad(o, inputs, torch.ones_like(o))

    return microseconds(captured(step, device), device, calls=calls)


def _acting(
    learner: Learner, *, envs: int, rows: int, evaluating: bool
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Prepares the two ways to act: with full caches, and by recomputing `rows` rows.

    Args:    evaluating, whether there is a stream for every member, not only the one on duty.
    Returns: a function for each way, and the bytes of the caches.
    """
    net, device = learner.net, learner.keys.device
    generator = torch.Generator(device).manual_seed(0)
    window = learner.replay.last(rows)
    # Repeat the replay's environments until there are `envs` of them. What the rows hold does not
    # change the time of a step.
    window = window._replace(
        **{
            k: v.repeat_interleave(-(-envs // ENVS), 2)[:, :, :envs]
            for k, v in window._asdict().items()
        }
    )
    members = learner.config.ensemble.members
    member = torch.randint(0, members, (1, envs), generator=generator, device=device)
    held = net.carry(envs=envs, evaluating=evaluating)
    start = torch.zeros(1, envs, dtype=torch.bool, device=device)
    previous = Previous(window.action[:, 0, :, -1], window.reward[:, 0, :, -1])
    seen = ActInput(window.obs[:, 0, :, -1], start, previous, member)
    net.refill(window, held, member, evaluating=evaluating)

    def cached() -> None:
        net.step(seen, held, evaluating=evaluating)

    def recomputed() -> None:
        net.refill(window, (), member, evaluating=evaluating)

    with torch.no_grad():
        for _ in range(3):
            cached()
            recomputed()
    return torch.no_grad()(cached), recomputed, sum(part.nbytes for part in held)


def _peak(learner: Learner, device: torch.device) -> float:
    """Most bytes that an update allocates on the GPU at a time; NaN on the CPU."""
    learner.update()
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    learner.update()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
