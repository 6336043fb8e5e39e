"""SAC against the clock: `cerl bench sac`, whole updates; `cerl bench sac-tiles`, block sizes.

An update samples its batch from a full replay on the device, and is replayed as one CUDA graph.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl.bench import runs
from cerl.bench.attention import needed_device
from cerl.bench.clock import Report, Rows, compiled, stopwatch
from cerl.config import load
from cerl.data import EnvSpec
from cerl.device.pick import pick
from cerl.device.precision import precision as products
from cerl.graph import captured
from cerl.kernels.mlp import WIDEST

BATCH, HIDDEN = 256, 256
# Milliseconds of the authors' JAX step of CERL, batch on the device and sampling left out.
OFFICIAL = {(1, 10, 17, 6): 1.142, (10, 10, 17, 6): 1.608, (10, 10, 376, 17): 2.875}
# Results of other block sizes may differ by this share of the largest: sums in another order.
TOLERANCE = 1e-3


def sac(
    *,
    sizes: tuple[str, ...] = ("1,10,17,6", "10,10,17,6", "10,10,376,17"),
    preset: str = "mujoco/cerl",
    precisions: tuple[str, ...] = ("tf32", "bf16"),
    capacity: int = 200_000,
    compile: bool = False,
    parts: bool = False,
    profile: bool = False,
    device: str = "auto",
    calls: int = 200,
    out: Path | None = None,
) -> Rows:
    """One update of SAC's ensembles, sampling from a full device replay included, in milliseconds.

    Args:
        sizes: S,N,numbers of an observation,components of an action
        preset: whose networks, heads, batch and optimisers are timed
        precisions: of matrix products on a GPU: tf32, bf16, fp32
        capacity: rows of the replay, per seed
        compile: fuse the losses with torch.compile
        parts: time sampling, gradients and optimisers of each stage apart too
        profile: print the time and the number of every kernel of an update (CUDA)
        device: cpu, cuda or auto
        calls: updates per timing
        out: JSON-lines file that rows are appended to
    """
    place = pick(device)
    with Report(f"{preset} update on {runs.device_name(place)}", out) as report:
        for size in sizes:
            seeds, members, observation, actions = _numbers(size)
            for precision in precisions:
                changes = {
                    "precision": precision,
                    "compile": compile,
                    "seeds": tuple(range(seeds)),
                    "ensemble": {"members": members},
                    "replay": {"capacity": capacity},
                }
                config = load(preset, changes)
                spec = EnvSpec("random", (observation,), torch.float32, actions, 1, 1, True, False)
                spec = spec._replace(envs=config.env.envs, continuous=True)
                learner = runs.filled_learner(config, spec, place)
                steps = {"update": captured(learner.update, place)}
                if parts:
                    steps |= runs.update_parts(learner, place)
                for name, step in steps.items():
                    row: dict[str, Any] = {"S": seeds, "N": members, "obs": observation}
                    row |= {"act": actions, "B": config.replay.batch, "products": precision}
                    row |= {"compiled": str(compile), "part": name}
                    spent = runs.microseconds(step, place, calls=calls) / 1e3
                    theirs = name == "update" and config.ensemble.heads == "cerl"
                    theirs = theirs and config.replay.batch == BATCH
                    official = OFFICIAL.get((seeds, members, observation, actions))
                    row |= {"ms": spent, "official JAX": official if theirs else None}
                    report.add(row)
                if profile and place.type == "cuda":
                    _profile(steps["update"])
                del learner, steps, step
    return report.rows


def _numbers(size: str) -> tuple[int, int, int, int]:
    numbers = [int(part) for part in size.split(",") if part.strip().isdigit()]
    if len(numbers) != 4 or min(numbers) < 1 or size.count(",") != 3:
        raise ValueError(f"--sizes: expected S,N,observation,actions like 10,10,17,6, got {size!r}")
    seeds, members, observation, actions = numbers
    return seeds, members, observation, actions


def _profile(step: Callable[[], None], *, replays: int = 20) -> None:
    """Prints the kernels of a replayed update, those that take the most time first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(replays):
            step()
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    print("  us an update   launches  kernel")
    for event in events:
        spent, count = event.self_device_time_total / replays, event.count / replays
        print(f"  {spent:12.1f}  {count:9.1f}  {event.key[:110]}")
    total = sum(event.self_device_time_total for event in events) / replays
    print(f"  {total:12.1f}  {sum(e.count for e in events) / replays:9.1f}  all", flush=True)


class Work(NamedTuple):
    """One launch of a perceptron kernel in an update."""

    kernel: str  # forward, hidden_gradient, weight_gradient
    what: str
    seeds: int
    critics: int  # networks of a member: 1 for policies
    width: int  # numbers of the observation, shared by a seed's networks
    more: int  # components of the action
    out: int
    layer: int = 0  # whose weight gradient
    keep: int = 0  # what `forward` leaves, as in `mlp`
    own_actions: bool = False  # of every member, else shared by the seed's networks

    @property
    def name(self) -> str:
        layer = f" {self.layer}" if self.layer else ""
        return f"{self.kernel}{layer}, {self.what}, S={self.seeds} obs={self.width}"


def works(seeds: int, members: int, width: int, actions: int) -> list[Work]:
    """The launches of an update that differ in more than the number of networks."""
    from cerl.kernels.mlp_triton import NARROW

    sizes = (seeds, 2, width, actions)
    return [
        Work("forward", "critics", *sizes, members, keep=2),
        Work("forward", "critics of policies", *sizes, 1, keep=1, own_actions=True),
        Work("forward", "policies", seeds, 1, width, 0, 2 * actions, keep=2),
        Work("hidden_gradient", "critics", *sizes, members, keep=2),
        Work("hidden_gradient", "critics of policies", *sizes, 1, keep=1, own_actions=True),
        *(
            Work("weight_gradient", "critics", *sizes, members, layer=layer, keep=2)
            for layer in ((2, 3) if width + actions <= NARROW else (1, 2, 3))
        ),
    ]


Launch = Callable[[Any], Sequence[Tensor]]


def launch(work: Work, members: int, device: torch.device, *, dtype: torch.dtype) -> Launch:
    """The kernel on random numbers, for a choice of block sizes (None: its own)."""
    from cerl.kernels import mlp_triton as kernels

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    seeds, nets = work.seeds, work.seeds * members * work.critics
    fan_in, tails = work.width + work.more, seeds * members if work.own_actions else seeds
    x, tail = normal(seeds, BATCH, work.width), normal(tails, BATCH, work.more)
    shapes = ((fan_in, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, work.out))
    w1, w2, w3 = (normal(nets, *shape, scale=shape[0] ** -0.5) for shape in shapes)
    b1, b2, b3 = (torch.zeros(nets, shape[1], device=device) for shape in shapes)
    if work.kernel == "forward":
        layers = (w1, b1, w2, b2, w3, b3)
        return lambda blocks: kernels.forward(x, tail, *layers, keep=work.keep, blocks=blocks)
    a1, a2 = (normal(nets, BATCH, HIDDEN).relu() for _ in range(2))
    if work.keep == 1:
        a1, a2 = (a1 > 0).to(torch.uint8), (a2 > 0).to(torch.uint8)
    grad = normal(nets, BATCH, work.out)
    if work.kernel == "hidden_gradient":
        down, hidden = (grad, w1, w2, w3, a1, a2, x, tail), work.keep == 2
        columns = (0, 0) if hidden else (work.width, fan_in)

        def backward(blocks: Any) -> Sequence[Tensor]:
            made, inner = kernels.hidden_gradient(
                *down, hidden=hidden, columns=columns, blocks=blocks
            )
            return made.below, made.above, made.first.sum(0), inner

        return backward
    below, above = normal(nets, BATCH, HIDDEN), normal(nets, BATCH, HIDDEN)
    sums = torch.zeros(nets, 1, HIDDEN, device=device)
    made = kernels.Hidden(below, above, sums, sums, sums[:0])
    chosen: dict[int, Callable[[], Sequence[Tensor]]] = {
        1: lambda: kernels.first_gradient(made, x, tail)[:1],
        2: lambda: (kernels.multiply(a1.mT, above),),
        3: lambda: kernels.weight_gradient(grad, a2)[:1],
    }
    layers = {1: (below, x, tail), 2: (above, a1), 3: (grad, a2)}
    return lambda blocks: (
        kernels.weight_gradient(*layers[work.layer], blocks=blocks)[:1]
        if blocks
        else chosen[work.layer]()
    )


# Rows, columns, depth, warps, stages, units of a program (all): see `mlp_triton.Blocks`.
ROWWISE = (
    *((32, 32, 32, 4, 2), (32, 32, 32, 4, 3), (32, 64, 32, 4, 2), (32, 16, 32, 4, 3)),
    *((32, 32, 32, 8, 2), (16, 32, 32, 4, 2), (64, 16, 32, 4, 3), (128, 16, 32, 8, 3)),
    *((32, 32, 32, 4, 2, 128), (32, 32, 32, 4, 3, 128), (64, 32, 32, 4, 2, 128)),
    *((64, 32, 32, 4, 3, 128), (64, 16, 32, 4, 3, 128), (64, 64, 32, 4, 2, 128)),
    *((64, 32, 32, 8, 2, 128), (128, 32, 32, 8, 2, 128), (128, 32, 32, 8, 3, 128)),
    *((64, 32, 32, 4, 2, 64), (64, 32, 32, 4, 3, 64), (128, 32, 32, 4, 2, 64)),
    *((128, 32, 32, 4, 3, 64), (128, 16, 32, 4, 3, 64), (128, 32, 32, 8, 3, 64)),
)
TILEWISE = ((32, 64, 64, 2, 3), (32, 64, 32, 2, 3), (32, 128, 64, 4, 3), (32, 128, 32, 4, 3))


def candidates(work: Work) -> list[Any]:
    """The kernel's own choice (None), then every other one that fits the layer."""
    from cerl.kernels.mlp_triton import Blocks, power

    table = TILEWISE if work.kernel == "weight_gradient" else ROWWISE
    inputs = work.width + work.more if work.layer in (0, 1) else HIDDEN
    outputs = work.out if work.layer == 3 else HIDDEN
    found: list[Any] = [None]
    for sizes in table:
        blocks = Blocks(*sizes)
        if work.kernel == "weight_gradient":
            columns, depth = min(blocks.columns, power(outputs)), min(blocks.depth, power(inputs))
            blocks = blocks._replace(columns=columns, depth=depth)
        if blocks not in found:
            found.append(blocks)
    return found


def sac_tiles(
    *,
    sizes: tuple[str, ...] = ("10,10,17,6", "10,10,376,17", "1,10,17,6"),
    precision: str = "tf32",
    only: str = "",
    seconds: float = 60.0,
    jobs: int = 16,
    repeats: int = 5,
    out: Path | None = None,
) -> Rows:
    """Times candidates for the block sizes of the perceptron kernels at the sizes of SAC's update.

    Prints microseconds in a CUDA graph of the own choice and of the two fastest candidates for
    every kernel and shape, with registers of a thread, bytes that it spills and shared memory.
    Nothing is written back.

    Args:
        sizes: S,N,numbers of an observation,components of an action
        precision: tf32, fp32 or bf16
        only: text that the names of the launches to be timed hold; all where empty
        seconds: launches that begin later than this are left out; half of it may go to compiling
        jobs: processes that compile the candidates first; 0 compiles each before it is timed
        repeats: timings of each number, of which the median is taken
        out: JSON-lines file that every row is appended to
    """
    device, end = needed_device(), time.monotonic() + seconds
    found = [
        (work, members)
        for seeds, members, width, actions in map(_numbers, sizes)
        for work in works(seeds, members, width, actions)
        if only in work.name
    ]
    if jobs:
        tasks = [
            (work, members, precision, part)
            for work, members in found
            for part in range(0, len(candidates(work)), 4)
        ]
        compiled(_compile, tasks, jobs=jobs, seconds=0.5 * seconds)
    timer = stopwatch(repeats)
    with Report(f"perceptron kernels, {precision}, {runs.device_name(device)}", out) as report:
        for work, members in found:
            if time.monotonic() > end:
                print(work.name, "left out: no time", flush=True)
                continue
            for row in _timed(work, members, precision, timer, device):
                report.add(row)
    return report.rows


def _timed(work: Work, members: int, precision: str, timer: Any, device: torch.device) -> Rows:
    """Rows of one launch: the own choice, then the fastest candidates that agree with it."""
    rows, expected = Rows(), ()
    with products(precision, device):
        call = launch(work, members, device, dtype=_dtype(precision))
        for blocks in candidates(work):
            name = "own choice" if blocks is None else ",".join(map(str, blocks))
            name = name.removesuffix(f",{WIDEST}")
            before = set(_variants())
            try:
                results = call(blocks)
                expected = expected or results
                error = _difference(results, expected)
                if error > TOLERANCE and precision != "bf16":
                    raise RuntimeError(f"results differ by {error:.2g} of the largest value")
                spent = 1e3 * timer(lambda blocks=blocks: call(blocks)).graph
            except Exception as error:  # too much shared memory, say; the other candidates go on
                text = str(error).strip().partition("\n")[0]
                print(f"{work.name}  {name}  {type(error).__name__}: {text}", flush=True)
                continue
            row: dict[str, Any] = {"launch": f"{work.name:48}", "blocks": f"{name:16}"}
            new = [kernel for key, kernel in _variants().items() if key not in before]
            used = [f"{k.n_regs}/{k.n_spills}/{k.metadata.shared // 1024}k" for k in new]
            rows.append(row | {"us": spent, "error": error, "regs/spills/shared": used[-1:] or ""})
    if not rows:
        return rows
    return [rows[0], *sorted(rows[1:], key=lambda row: row["us"])[:2]]


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference as a share of the largest value of its tensor."""
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        if result.numel() and result.dtype != torch.uint8:
            scale = wanted.float().abs().amax().clamp(min=1e-30)
            difference = (result.float() - wanted.float()).abs().amax() / scale
            worst = max(worst, float(difference.nan_to_num(torch.inf)))
    return worst


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _variants() -> dict[int, Any]:
    """Compiled perceptron kernels; Triton keeps them in each function by device."""
    from cerl.kernels import mlp_triton

    caches = [getattr(function, "device_caches", {}) for function in vars(mlp_triton).values()]
    kernels = [k for cache in caches for cached in cache.values() for k in cached[0].values()]
    return {id(kernel): kernel for kernel in kernels}


def _compile(work: Work, members: int, precision: str, part: int) -> None:
    device = needed_device()
    with products(precision, device):
        call = launch(work, members, device, dtype=_dtype(precision))
        for blocks in candidates(work)[part : part + 4]:
            try:
                call(blocks)
            except Exception as error:  # told again where it is timed
                print(f"{work.name} {blocks}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()
