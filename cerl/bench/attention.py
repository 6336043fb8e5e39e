"""Times forgetting attention: `cerl bench attention`.

Rows of q and k have length sqrt(D), so no logit exceeds sqrt(D) in size; `threshold` is the
threshold for pruning that follows from this bound. The gates `s70` and `s90` decay so fast that 70%
and 90% of all pairs of a query and an earlier key fall below the threshold.
"""

import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.arguments import maybe
from cerl.bench.clock import Timer, compiled, device_name, needed_device, stopwatch
from cerl.bench.table import Output, Row, Rows, Table
from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.plan import Tiles
from cerl.kernels.attention.pruning import visited
from cerl.kernels.attention.step import Cache, forgetting_attention_step

LOG_EPS = -10.0  # natural log of the share of a softmax that pruning may leave out
GATES = ("none", "mild", "s70", "s90")
OFTEN = ("none", "none+acp", "s70+acp", "s90+acp")  # cases of a shape that `TABLE` does not list
RUNNING = ("s70+running", "s90+running")
# The shapes that are timed if none is given, and the cases of each.
TABLE = {
    "4,4096,16,64": OFTEN + RUNNING,
    "2,16384,16,64": OFTEN + RUNNING,
    "16,1024,8,128": ("none", "s70+acp"),
    "64,256,8,64": ("none", "s70+acp"),
    "256,64,4,32": ("none", "s70+acp"),
    "step:64,1024,8,64": ("none", "s90+acp"),
}


class Shape(NamedTuple):
    """The shape of q, k and v, which is the same for all three."""

    batch: int  # B
    length: int  # T, steps; for an acting step, the keys that the full cache holds
    heads: int  # H
    width: int  # D, numbers in a row of one head


class Work(NamedTuple):
    """The call that one line of the table times."""

    step: bool  # an acting step with a full cache; else a whole sequence
    shape: Shape
    gate: str  # one of `GATES`
    pruned: bool
    running: bool = False  # pruned by the running rule instead of a fixed threshold

    @property
    def what(self) -> str:
        return ("step:" if self.step else "") + ",".join(map(str, self.shape))

    @property
    def case(self) -> str:
        return self.gate + ("+running" if self.running else "+acp" if self.pruned else "")


def attention(
    *,
    shapes: tuple[str, ...] = tuple(TABLE),
    cases: tuple[str, ...] = (),
    official: Annotated[Path | None, maybe("FOLDER")] = None,
    sdpa: bool = False,
    repeats: int = 20,
    seconds: float = 120.0,
    jobs: int = 0,
    output: Output = Output(),
) -> Rows:
    """Times forgetting attention in bf16: forward, forward and backward, and one acting step.

    Columns are milliseconds of one call: `graph` replayed in a CUDA graph, `eager` called from
    Python. Calls follow each other directly, so small inputs stay in the GPU's cache.

    Args:
        shapes: B,T,H,D of a sequence, or step:B,R,H,D of an acting step with a full cache of R keys
        cases: a gate (none, mild, s70, s90), followed by +acp for pruning, or by +running for
            pruning with the running rule, which the authors' code does not have
        official: folder with the authors' forgetting_attention.py, which is then timed too
        sdpa: also time torch's attention without a gate (flash, cuDNN), in unpruned cases
        repeats: timings of each number, of which the median is taken
        seconds: time limit; rows that have not begun by then are left out
        jobs: processes that compile all kernels first; 0: each is compiled before it is timed
    """
    device, timer = needed_device(), stopwatch(repeats)
    works = parsed(shapes, cases)
    reference = None if official is None else load_official(official)
    end = time.monotonic() + seconds
    if jobs:
        # Works that differ in the gate alone use the same compiled kernels: one of each will do.
        kinds = {(work.step, work.shape, *work[3:]): work for work in works}.values()
        places = (None,) if official is None else (official, None)
        given = [
            (work, place) for place in places for work in kinds if place is None or not work.running
        ]
        compiled(call, given, jobs=jobs, seconds=0.6 * seconds)
    table = Table("attention", output, device=device_name(device), title="attention, bf16")
    for work in works:
        impls = implementations(work, reference, device, sdpa=sdpa)
        measure(table, work, impls, timer, end=end)
    return table.finished()


def parsed(shapes: Sequence[str], cases: Sequence[str]) -> list[Work]:
    """The works that the options `shapes` and `cases` ask for.

    Raises: ValueError for a shape or case that cannot be read.
    """
    works = []
    for text in shapes:
        step, shape = text.startswith("step:"), parsed_shape(text.removeprefix("step:"))
        for case in cases or TABLE.get(text, OFTEN):
            gate, plus, rest = case.partition("+")
            rules = ("acp",) if step else ("acp", "running")
            if gate not in GATES or (plus and rest not in rules) or (step and gate == "mild"):
                raise ValueError(
                    f"--cases: expected {', '.join(GATES)} (not mild for a step), with +acp if "
                    f"pruned, or +running (not for a step), got {case!r}"
                )
            works.append(Work(step, shape, gate, bool(plus), rest == "running"))
    return works


def parsed_shape(text: str) -> Shape:
    """Reads a shape from text like 4,4096,16,64. Raises: ValueError where it cannot be read."""
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(
            f"--shapes: expected four sizes B,T,H,D from 1 on, like 4,4096,16,64, got {text!r}"
        )
    return Shape(*map(int, sizes))


def inputs(
    shape: Shape, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (rows of length sqrt(D)), v and the gradient of the output, [B, T, H, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, do = (torch.randn(shape, device=device, generator=generator) for _ in range(4))
    q, k = (math.sqrt(shape.width) * F.normalize(x, dim=3) for x in (q, k))
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    return q, k, v, do


def threshold(shape: Shape) -> float:
    """The threshold on D_ij (natural log) that is safe if no logit exceeds sqrt(D) in size.

    Source: docs/attention.md, "Pruning".
    """
    return LOG_EPS - math.log(shape.length) - 2.0 * math.sqrt(shape.width)


def decay_rate(gate: str, shape: Shape) -> float:
    """Mean of -log f per step, in nats, of the gates none, s70 and s90."""
    if gate == "none":
        return 0.0
    share = {"s70": 0.7, "s90": 0.9}[gate]
    # A share (1 - w / T)^2 of all pairs is at least w steps apart. The rate is chosen so that the
    # decay over w steps is the threshold, for the w that makes this share the wanted one.
    return -threshold(shape) / (shape.length * (1.0 - math.sqrt(share)))


def gates(gate: str, shape: Shape, *, device: torch.device, seed: int = 1) -> Tensor:
    """Random gates log_f [B, T, H] float32.

    Uniform between 0.5 and 1.5 times the negative `decay_rate`; for the gate mild about -0.005.
    """
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(shape[:3], device=device, generator=generator)
    if gate == "mild":
        return F.logsigmoid(4.0 + 4.0 * u)
    return -decay_rate(gate, shape) * (0.5 + u)


class Calls(NamedTuple):
    """The calls of one implementation that are timed."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[Tensor, ...]] | None  # forward and backward; None: an acting step
    skipped: float | None  # share of the tiles up to the diagonal that pruning skips


def implementations(
    work: Work, reference: Any, device: torch.device, *, sdpa: bool = False
) -> dict[str, Callable[[], Calls]]:
    """Functions that prepare the calls of each implementation, by name.

    Ours comes first, since `measure` compares the others with it.

    Args: reference, the module of the authors' code or None; sdpa, include torch's attention.
    """
    made: dict[str, Callable[[], Calls]] = {}
    if work.step:
        made["ours"] = lambda: step_calls(work, device)
    else:
        made["ours"] = lambda: sequence_calls(work, device)
    if reference is not None and not work.running:
        make = official_step_calls if work.step else official_calls
        made["official"] = lambda: make(reference, work, device)
    if sdpa and not work.step and not work.pruned:
        for name in ("flash", "cudnn"):
            made[name] = lambda name=name: sdpa_calls(name, work, device)
    return made


def sequence_calls(
    work: Work, device: torch.device, *, dtype: torch.dtype = torch.bfloat16
) -> Calls:
    """The calls of our operator on a whole sequence."""
    shape = work.shape
    log_f = gates(work.gate, shape, device=device)
    options: dict[str, Any] = {}
    if work.running:
        options = dict(bound=math.sqrt(shape.width), log_eps=LOG_EPS, rule="running")
    elif work.pruned:
        limit = torch.full((shape.batch, shape.heads), threshold(shape), device=device)
        options = dict(threshold=limit)

    def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        return forgetting_attention(q, k, v, log_f, **options)

    q, k, v, do = inputs(shape, device=device, dtype=dtype)
    with torch.no_grad():
        _, skipped = forgetting_attention(q, k, v, log_f, **options, return_skipped=True)
    return paired(attend, (q, k, v, log_f), do, float(skipped.mean()))


def paired(attend: Callable[..., Tensor], x: Sequence[Tensor], do: Tensor, skipped: float) -> Calls:
    """The calls of an operator: forward, and forward with the gradients of all inputs.

    Args: attend, the operator; x, its inputs; do, the gradient of its output.
    """
    leaves = tuple(tensor.requires_grad_() for tensor in x)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, do)

    return Calls(forward, both, skipped)


def official_calls(reference: Any, work: Work, device: torch.device) -> Calls:
    """The calls of the authors' operator on the same inputs, under the same threshold."""
    shape = work.shape
    log_f = gates(work.gate, shape, device=device)
    limit = torch.full((shape.heads,), threshold(shape), device=device) if work.pruned else None

    def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        return reference.forgetting_attention(q, k, v, log_f, adaptive_threshold=limit)

    q, k, v, do = inputs(shape, device=device)
    skipped = 0.0
    if work.pruned:
        batch, length, heads, width = shape
        sizes = reference.get_fwd_config(batch, heads, length, length, width, True)
        skipped = skipped_share(log_f, Tiles(*sizes[:2]), threshold(shape))
    return paired(attend, (q, k, v, log_f), do, skipped)


def skipped_share(log_f: Tensor, tiles: Tiles, limit: float) -> float:
    """Share of the tiles up to the diagonal in which even the largest D_ij is below a threshold.

    Args: log_f [B, T, H]; limit, the threshold.
    """
    length = log_f.shape[1]
    kept, causal = (
        visited(log_f, queries=length, tiles=tiles, threshold=given).sum()
        for given in (limit, None)
    )
    return 1.0 - float(kept) / float(causal)


def step_calls(work: Work, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> Calls:
    """The call of our acting step with a full cache, which includes appending the new key.

    The gate is the same number at every step.
    """
    batch, ring, heads, width = work.shape
    one = Shape(batch, 1, heads, width)
    q, k, v, _ = (x[:, 0] for x in inputs(one, device=device, dtype=dtype))
    log_f = torch.full((batch, heads), -decay_rate(work.gate, work.shape), device=device)
    start = torch.zeros(batch, dtype=torch.bool, device=device)
    sizes = dict(batch=batch, heads=heads, key_heads=heads, ring=ring, width=width)
    cache = Cache.new(**sizes, dtype=dtype, device=device)
    log_eps = LOG_EPS if work.pruned else None

    def step() -> Tensor:
        return forgetting_attention_step(q, k, v, log_f, cache, start=start, log_eps=log_eps)

    for _ in range(ring):
        step()
    return Calls(step, None, None)


def official_step_calls(reference: Any, work: Work, device: torch.device) -> Calls:
    """The call of the authors' operator with one query and all keys; no key is appended."""
    shape = work.shape
    log_f = torch.full(shape[:3], -decay_rate(work.gate, shape), device=device)
    limit = torch.full((shape.heads,), threshold(shape), device=device) if work.pruned else None
    q, k, v, _ = inputs(shape, device=device)
    last = q[:, -1:].contiguous()

    def step() -> Tensor:
        with torch.no_grad():
            return reference.forgetting_attention(last, k, v, log_f, adaptive_threshold=limit)

    return Calls(step, None, None)


def sdpa_calls(name: str, work: Work, device: torch.device) -> Calls:
    """The calls of torch's causal attention, which has no gate. Args: name, flash or cudnn."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kinds[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    tensors = inputs(work.shape, device=device)
    q, k, v, do = (x.transpose(1, 2).contiguous() for x in tensors)
    return paired(attend, (q, k, v), do, 0.0)


def load_official(folder: Path) -> types.ModuleType:
    """Imports the authors' forgetting_attention.py from a folder.

    The file needs only torch, triton and einops. einops need not be installed: one function of it
    is replaced here.

    Raises: ValueError if the folder does not have the file.
    """
    places = [folder / below for below in ("", "src/forgetting_transformer/ops")]
    found = [place / "forgetting_attention.py" for place in places]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"--official: expected a folder with forgetting_attention.py, got {folder}; give the "
            "root of the forgetting-transformer repository, or the folder of that file"
        )
    spec = importlib.util.spec_from_file_location("official_forgetting_attention", path)
    assert spec is not None and spec.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(spec)
    # The file uses one function of einops, `rearrange`, and only to swap time and heads.
    missing = importlib.util.find_spec("einops") is None
    if missing:
        sys.modules["einops"] = types.ModuleType("einops")
        vars(sys.modules["einops"])["rearrange"] = lambda x, pattern: x.transpose(1, 2)
    try:
        spec.loader.exec_module(module)
    finally:
        if missing:
            del sys.modules["einops"]
    return module


def measure(
    table: Table,
    work: Work,
    impls: dict[str, Callable[[], Calls]],
    timer: Timer,
    *,
    end: float = math.inf,
) -> None:
    """Times the implementations and adds a row for each.

    Args: impls, from `implementations`; end, `time.monotonic()` after which rows are left out.
    """
    ours = None
    for name, make in impls.items():
        row: Row = {"shape": work.what, "case": work.case, "what": name}
        if time.monotonic() > end:
            print(*row.values(), "left out: no time", flush=True)
            continue
        try:
            calls = make()
            forward = timer(calls.forward)
            both = None if calls.both is None else timer(calls.both)
        except Exception as error:  # one kernel failed on one shape; the other rows are still timed
            table.fail(row, error)
            continue
        whole = both or forward
        ours = whole if name == "ours" else ours
        table.add(
            row
            | {
                "skipped": calls.skipped,
                "fwd graph": forward.graph,
                "fwd eager": forward.eager,
                "fwd+bwd graph": both and both.graph,
                "fwd+bwd eager": both and both.eager,
                "graph/ours": ours and whole.graph / ours.graph,
                "eager/ours": ours and whole.eager / ours.eager,
            }
        )


def call(work: Work, official: Path | None) -> None:
    """Calls one implementation once, so that its kernels are compiled.

    Args: official, folder of the authors' file; None: our implementation.
    """
    device = needed_device()
    reference = None if official is None else load_official(official)
    name = "ours" if reference is None else "official"
    calls = implementations(work, reference, device)[name]()
    calls.forward()
    if calls.both is not None:
        calls.both()
