"""Sequence networks against the clock: `cerl bench {memory-update,memory-acting,memory-length}`.

Twins of FoX are softmax attention (transformer), a recurrent unit (gru) and no memory (mlp), of the
same size; `definition` is FoX in plain torch. Rows of replay are random and of one episode without
end, so that nothing is skipped but what pruning skips.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cerl import draw, wiring
from cerl.bench import runs
from cerl.bench.runs import Rows, device_name, microseconds, show
from cerl.config import AttentionOptions, Config, load, of_kind
from cerl.data import EnvSpec, Previous
from cerl.graph import captured
from cerl.kernels.attention import forgetting_attention
from cerl.learn import Learner
from cerl.nets import carry
from cerl.replay import Replay

ENVS, OBSERVATION, ACTIONS = 8, 8, 4
# name: (encoder.name, variant of fox that it is sized like, whether it is the definition)
NETS: dict[str, tuple[str, str, bool]] = {
    "fox-llama": ("fox", "llama", False),
    "fox-pro": ("fox", "pro", False),
    "transformer": ("transformer", "pro", False),
    "gru": ("gru", "pro", False),
    "mlp": ("mlp", "pro", False),
    "fox-llama definition": ("fox", "llama", True),
    "fox-pro definition": ("fox", "pro", True),
}
Precision = Literal["fp32", "bf16"]


def memory_update(
    *,
    nets: tuple[str, ...] = tuple(NETS),
    windows: tuple[int, ...] = (128, 512),
    members: int = 10,
    batch: int = 32,
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    precision: Precision = "bf16",
    device: str = "auto",
    calls: int = 20,
    profile: bool = False,
    out: Path | None = None,
) -> Rows:
    """One update of CERL with a sequence network, sampling included, one seed, and its attention.

    Args:
        nets: fox-llama, fox-pro, transformer, gru, mlp, fox-llama definition, fox-pro definition
        windows: rows of a window
        members: N, each with N heads
        batch: B, windows of a batch
        layers: blocks
        width: D, features of a row
        heads: attention heads
        precision: of the products inside the blocks
        device: cpu, cuda or auto
        calls: calls per timing
        profile: print the kernels that take the time (CUDA)
        out: JSON-lines file that rows are appended to
    """
    place, rows = wiring.pick_device(device), []
    sizes = {"layers": layers, "width": width, "heads": heads, "precision": precision}
    for window, name in itertools.product(windows, nets):
        learner = _learner(name, place, window=window, members=members, batch=batch, **sizes)
        update = captured(learner.update, place)
        spent = microseconds(update, place, calls=calls)
        share: object = "-"
        if NETS[name][0] == "fox" and not NETS[name][2]:
            share = _attention(learner.config, place, calls=calls) / spent
        rows.append(
            {
                "what": name,
                "W": window,
                "N": members,
                "B": batch,
                "layers": layers,
                "D": width,
                "H": heads,
                "precision": precision,
                "microseconds": spent,
                "updates/s": 1e6 / spent,
                "attention": share,
            }
        )
        if profile and place.type == "cuda":
            runs.profiled(update)
        del learner, update
    show(f"update of sequence networks on {device_name(place)}", rows, out)
    return rows


def memory_acting(
    *,
    nets: tuple[str, ...] = ("fox-llama", "fox-pro", "transformer", "gru"),
    length: int = 200,
    envs: int = 512,
    members: int = 10,
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    precision: Precision = "bf16",
    device: str = "auto",
    calls: int = 20,
    out: Path | None = None,
) -> Rows:
    """One step of acting late in a T-maze: with caches, and by reading the episode anew.

    `all` are the streams of every member, as in evaluation; `duty` those of the members on duty.

    Args:
        nets: as in memory-update
        length: of the corridor; so many rows are behind every stream
        envs: E
        members: N
        layers: blocks
        width: D, features of a row
        heads: attention heads
        precision: of the products inside the blocks
        device: cpu, cuda or auto
        calls: calls per timing
        out: JSON-lines file that rows are appended to
    """
    place, rows = wiring.pick_device(device), []
    sizes = {"layers": layers, "width": width, "heads": heads, "precision": precision}
    for name, streams in itertools.product(nets, ("duty", "all")):
        learner = _learner(name, place, window=length + 3, members=members, batch=1, **sizes)
        cached, recomputed, size = _acting(
            learner, envs=envs, rows=length + 1, evaluating=streams == "all"
        )
        fast = microseconds(captured(cached, place), place, calls=calls)
        slow = microseconds(captured(recomputed, place), place, calls=calls)
        rows.append(
            {
                "what": name,
                "streams": f"{streams} {envs * (members if streams == 'all' else 1)}",
                "rows": length + 1,
                "layers": layers,
                "D": width,
                "H": heads,
                "precision": precision,
                "cached us": fast,
                "recomputed us": slow,
                "ratio": slow / fast,
                "cache MiB": size / 2**20,
            }
        )
        del learner, cached, recomputed
    show(f"acting with sequence networks on {device_name(place)}", rows, out)
    return rows


def memory_length(
    *,
    nets: tuple[str, ...] = ("fox-llama", "fox-pro", "transformer"),
    lengths: tuple[int, ...] = (64, 256, 1024, 4096),
    prune: float = -10.0,
    scales: tuple[float, float] = (8.0, 64.0),
    members: int = 10,
    batch: int = 8,
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    precision: Precision = "bf16",
    device: str = "auto",
    calls: int = 5,
    out: Path | None = None,
) -> Rows:
    """Time and memory of an update as windows grow, with and without pruning (FoX).

    Args:
        nets: as in memory-update
        lengths: rows of a window
        prune: log of the share of a softmax that pruning may leave out
        scales: shortest and longest time scale of the gates, steps
        members: N, each with N heads
        batch: B, windows of a batch
        layers: blocks
        width: D, features of a row
        heads: attention heads
        precision: of the products inside the blocks
        device: cpu, cuda or auto
        calls: calls per timing
        out: JSON-lines file that rows are appended to
    """
    place, rows = wiring.pick_device(device), []
    sizes = {"layers": layers, "width": width, "heads": heads, "precision": precision}
    for name, window in itertools.product(nets, lengths):
        for log_eps in (0.0, prune) if NETS[name][0] == "fox" else (0.0,):
            learner = _learner(
                name,
                place,
                window=window,
                members=members,
                batch=batch,
                prune=log_eps,
                gate_scales=scales,
                **sizes,
            )
            peak = _peak(learner, place)
            spent = microseconds(captured(learner.update, place), place, calls=calls)
            rows.append(
                {
                    "what": name,
                    "W": window,
                    "N": members,
                    "B": batch,
                    "D": width,
                    "H": heads,
                    "precision": precision,
                    "gates": "-".join(f"{scale:g}" for scale in scales),
                    "pruned": bool(log_eps),
                    "microseconds": spent,
                    "rows/us": members * batch * window / spent,
                    "peak GiB": peak / 2**30,
                }
            )
            del learner
            if place.type == "cuda":
                torch.cuda.empty_cache()
    show(f"length of windows on {device_name(place)}", rows, out)
    return rows


def _learner(
    name: str, device: torch.device, *, window: int, members: int, batch: int, **sizes: Any
) -> Learner:
    """A learner on random rows of one endless episode, with windows of `window` rows."""
    if name not in NETS:
        raise ValueError(f"nets: expected some of {', '.join(NETS)}; got {name!r}")
    kind, variant, reference = NETS[name]
    capacity = ENVS * max(4 * window, 2_000)
    config = load(
        "memory/fox",
        {
            "seeds": (0,),
            "env": {"family": "gym", "envs": ENVS},
            "net": {"hidden": (sizes["width"],)},
            "ensemble": {"members": members, "heads": "cerl"},
            "encoder": _encoder(kind, variant, window=window, **sizes),
            "replay": {"capacity": capacity, "start": capacity, "batch": batch, "candidates": 8},
            "schedule": {"steps": 2 * capacity},
            "explore": {"end": 0.0},
        },
    )
    spec = EnvSpec("random", (OBSERVATION,), torch.float32, ACTIONS, ENVS, 1, True, True)
    keys = draw.seed_keys(config.seeds, device=device)
    agent = wiring.make_agent(config, spec, device)
    replay = Replay(spec, keys=keys, capacity=capacity, device=device)
    runs.fill_randomly(replay, spec, members)
    replay.terminated.fill_(False)
    replay.real.fill_(True)
    net = agent.build(keys=keys)
    if reference:
        for module in net.trunk.modules():
            if hasattr(module, "impl"):
                module.impl = "reference"
    return Learner(config, agent, net, replay, keys=keys)


def _encoder(kind: str, variant: str, *, window: int, heads: int, **sizes: Any) -> dict[str, Any]:
    """Options of a sequence network with windows of `window` rows."""
    options = {"name": kind, "learnt": window - 2, "sampling": "uniform", **sizes}
    if kind in ("fox", "transformer"):
        options |= {"heads": heads, "cache": window}
    return options | {"variant" if kind == "fox" else "sized_like": variant}


def _attention(config: Config, device: torch.device, *, calls: int) -> float:
    """Microseconds of the attention of an update alone: of two networks, one with its gradient."""
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
    """A step with full caches, the same by recomputing `rows` rows, and the bytes of the caches."""
    config, net, device = learner.config, learner.net, learner.keys.device
    agent: Any = learner.agent
    generator = torch.Generator(device).manual_seed(0)
    window = learner.replay.last(rows)
    # As many environments as asked for; their contents do not matter for the time.
    window = window._replace(
        **{
            k: v.repeat_interleave(-(-envs // ENVS), 2)[:, :, :envs]
            for k, v in window._asdict().items()
        }
    )
    members = config.ensemble.members
    member = torch.randint(0, members, (1, envs), generator=generator, device=device)
    sizes = {"seeds": 1, "envs": envs, "evaluating": evaluating}
    held = carry.new(config, net, agent.spec, **sizes)
    start = torch.zeros(1, envs, dtype=torch.bool, device=device)
    previous = Previous(window.action[:, 0, :, -1], window.reward[:, 0, :, -1])
    obs = window.obs[:, 0, :, -1]
    carry.refill(config, net, window, held, member, evaluating=evaluating)

    def cached() -> None:
        options: dict[str, Any] = {"previous": previous, "evaluating": evaluating}
        carry.step(config, net, obs, start, held, member, **options)

    def recomputed() -> None:
        carry.refill(config, net, window, (), member, evaluating=evaluating)

    with torch.no_grad():
        for _ in range(3):
            cached()
            recomputed()
    return torch.no_grad()(cached), recomputed, sum(part.nbytes for part in held)


def _peak(learner: Learner, device: torch.device) -> float:
    """Most bytes that an update holds beside what is there between updates; NaN on the CPU."""
    learner.update()
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    learner.update()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
