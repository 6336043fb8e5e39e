"""Times block sizes of SAC's perceptron kernels: `cerl bench sac-tiles`.

The kernels choose block sizes by a table (`cerl/kernels/mlp_plan.py`). This benchmark times other
block sizes, the candidates, at the shapes of an update. A candidate counts only if its results
agree with those of the kernel's own choice.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl.bench.clock import Timer, compiled, device_name, needed_device, stopwatch
from cerl.bench.sac import Size, parsed_size
from cerl.bench.table import Output, Row, Rows, Table
from cerl.bench.tiles import difference, variants
from cerl.device.precision import precision as products
from cerl.kernels.mlp_plan import NARROW, WIDEST
from cerl.kernels.runtime.blocks import Blocks, block_size

BATCH, HIDDEN = 256, 256
# Other block sizes take sums in another order, so results may differ by this share of the largest
# value.
TOLERANCE = 1e-3


class Work(NamedTuple):
    """One launch of a perceptron kernel in an update."""

    kernel: str  # forward, hidden_gradient, weight_gradient
    what: str  # which networks, for the table
    seeds: int  # S
    critics: int  # networks of a member: C for critics, 1 for policies
    width: int  # numbers in an observation; all networks of a seed read the same ones
    more: int  # components of an action, a second input of critics; 0 for policies
    out: int  # outputs of a network
    layer: int = 0  # 1 to 3: the layer whose weight gradient is computed
    keep: int = 0  # what `forward` stores for the gradient, as `keep` of `mlp`
    own_actions: bool = False  # every member has its own actions, else a seed's networks share them

    @property
    def name(self) -> str:
        layer = f" {self.layer}" if self.layer else ""
        return f"{self.kernel}{layer}, {self.what}, S={self.seeds} obs={self.width}"


def works(size: Size) -> list[Work]:
    """The launches of an update; of those that differ only in the number of networks, one."""
    seeds, members, width, actions = size
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
    """A function that launches the kernel on random numbers with given block sizes.

    Args:    members, N; dtype of inputs and weights.
    Returns: a function of the block sizes (None: the kernel's own choice), which returns results.
    """
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
        return lambda blocks: kernels.mlp.host(x, tail, *layers, work.keep, blocks=blocks)
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


# Candidates, as the fields of `Blocks`: rows, columns, depth, warps, stages, and hidden units of a
# program (all of them if not given).
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
    """The kernel's own choice (None), then all candidates, cut to the size of the layer."""
    table = TILEWISE if work.kernel == "weight_gradient" else ROWWISE
    inputs = work.width + work.more if work.layer in (0, 1) else HIDDEN
    outputs = work.out if work.layer == 3 else HIDDEN
    found: list[Any] = [None]
    for sizes in table:
        blocks = Blocks(*sizes)
        if work.kernel == "weight_gradient":
            blocks = blocks._replace(
                columns=min(blocks.columns, block_size(outputs)),
                depth=min(blocks.depth, block_size(inputs)),
            )
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
    output: Output = Output(),
) -> Rows:
    """Times candidates for the block sizes of the perceptron kernels at the sizes of SAC's update.

    For every kernel and shape, prints microseconds in a CUDA graph of the kernel's own choice and
    of the two fastest candidates, with registers of a thread, bytes that a thread spills, and
    shared memory. The kernels' table of block sizes is not changed.

    Args:
        sizes: S,N,numbers in an observation,components of an action
        precision: tf32, fp32 or bf16
        only: time only launches whose name contains this text; empty: all
        seconds: time limit; launches that have not begun by then are left out. Compiling first may
            take half of it
        jobs: processes that compile the candidates first; 0: each is compiled before it is timed
        repeats: timings of each number, of which the median is taken
    """
    device, end = needed_device(), time.monotonic() + seconds
    found = [
        (work, size.members)
        for size in map(parsed_size, sizes)
        for work in works(size)
        if only in work.name
    ]
    if jobs:
        tasks = [
            (work, members, precision, number)
            for work, members in found
            for number in range(len(candidates(work)))
        ]
        compiled(call_candidate, tasks, jobs=jobs, seconds=0.5 * seconds)
    timer = stopwatch(repeats)
    title = f"perceptron kernels, {precision}"
    table = Table("sac-tiles", output, device=device_name(device), title=title)
    for work, members in found:
        if time.monotonic() > end:
            print(work.name, "left out: no time", flush=True)
            continue
        for row in _timed(work, members, precision, timer, device):
            table.add(row)
    return table.finished()


def call_candidate(work: Work, members: int, precision: str, number: int) -> None:
    """Launches a kernel once so that it is compiled. Args: number, an index of `candidates`."""
    device = needed_device()
    with products(precision, device):
        call = launch(work, members, device, dtype=_dtype(precision))
        call(candidates(work)[number])


def _timed(work: Work, members: int, precision: str, timer: Timer, device: torch.device) -> Rows:
    """Times one launch. Returns: rows of the own choice and of the two fastest candidates."""
    from cerl.kernels import mlp_kernels

    rows, expected = Rows(), ()
    with products(precision, device):
        call = launch(work, members, device, dtype=_dtype(precision))
        for blocks in candidates(work):
            name = "own choice" if blocks is None else ",".join(map(str, blocks))
            name = name.removesuffix(f",{WIDEST}")
            before = set(variants(mlp_kernels))
            try:
                results = call(blocks)
                expected = expected or results
                error = difference(results, expected)
                if error > TOLERANCE and precision != "bf16":
                    raise RuntimeError(f"results differ by {error:.2g} of the largest value")
                spent = 1e3 * timer(lambda blocks=blocks: call(blocks)).graph
            except Exception as error:  # a candidate may need too much shared memory, for example
                text = str(error).strip().partition("\n")[0]
                print(f"{work.name}  {name}  {type(error).__name__}: {text}", flush=True)
                continue
            row: Row = {"launch": work.name, "N": members, "blocks": name}
            new = [kernel for key, kernel in variants(mlp_kernels).items() if key not in before]
            used = [f"{k.n_regs}/{k.n_spills}/{k.metadata.shared // 1024}k" for k in new]
            rows.append(
                row | {"us": spent, "error": error, "regs/spills/shared": " ".join(used[-1:])}
            )
    if not rows:
        return rows
    return [rows[0], *sorted(rows[1:], key=lambda row: row["us"])[:2]]


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
