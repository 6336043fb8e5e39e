"""Forgetting attention against the clock: `cerl bench attention`.

Rows of q and k have length sqrt(D), so no logit is larger than sqrt(D), and `threshold` is what
pruning may use then. The gates s70 and s90 decay so fast that 70% and 90% of the pairs of a query
and an earlier key fall below it.
"""

import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.bench.clock import Timer, compiled, device_name, needed_device, stopwatch
from cerl.bench.table import Output, Row, Rows, Table
from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.plan import Tiles
from cerl.kernels.attention.pruning import visited
from cerl.kernels.attention.step import Cache, forgetting_attention_step

LOG_EPS = -10.0  # log of the share of a softmax that pruning may drop
GATES = ("none", "mild", "s70", "s90")
OFTEN = ("none", "none+acp", "s70+acp", "s90+acp")
RUNNING = ("s70+running", "s90+running")
# Shapes of the table and their cases.
TABLE = {
    "4,4096,16,64": OFTEN + RUNNING,
    "2,16384,16,64": OFTEN + RUNNING,
    "16,1024,8,128": ("none", "s70+acp"),
    "64,256,8,64": ("none", "s70+acp"),
    "256,64,4,32": ("none", "s70+acp"),
    "step:64,1024,8,64": ("none", "s90+acp"),
}


class Shape(NamedTuple):
    """Of q, k and v alike: B, T, H, D; of a step T is what the full cache holds."""

    batch: int
    length: int
    heads: int
    width: int


class Work(NamedTuple):
    """One line of the table: a sequence, or a step after a sequence, under a gate."""

    step: bool
    shape: Shape
    gate: str
    pruned: bool
    running: bool = False  # pruned by the running rule

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
    official: Path | None = None,
    sdpa: bool = False,
    repeats: int = 20,
    seconds: float = 120.0,
    jobs: int = 0,
    output: Output = Output(),
) -> Rows:
    """Forward, forward and backward, and one acting step of forgetting attention, in bf16.

    Milliseconds of one call: `graph` replayed in a CUDA graph, `eager` as called. Calls follow each
    other, so small inputs are found in the cache of the GPU.

    Args:
        shapes: B,T,H,D of a sequence, or step:B,R,H,D of a step with a full cache of R
        cases: a gate (none, mild, s70, s90), with +acp if pruned, +running if by the running
            rule, which has no official counterpart; the usual ones if not given
        official: folder with the authors' forgetting_attention.py, timed in the same run
        sdpa: also time torch's attention without a gate (flash, cuDNN), in unpruned cases
        repeats: timings of each number, of which the median is taken
        seconds: rows that begin later than this are left out
        jobs: processes that compile all kernels first; 0 compiles each before it is timed
    """
    device, timer = needed_device(), stopwatch(repeats)
    works = parsed(shapes, cases)
    reference = None if official is None else load_official(official)
    end = time.monotonic() + seconds
    if jobs:
        # The gate decides nothing that is compiled.
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
    """All rows of the table that are asked for.

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
    """B,T,H,D. Raises: ValueError."""
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
    """Natural log; what a bound of sqrt(D) on the logits allows."""
    return LOG_EPS - math.log(shape.length) - 2.0 * math.sqrt(shape.width)


def decay_rate(gate: str, shape: Shape) -> float:
    """Mean of -log f per step of the gates none, s70 and s90."""
    if gate == "none":
        return 0.0
    share = {"s70": 0.7, "s90": 0.9}[gate]
    # The pairs that are at least w steps apart are (1 - w / T)^2 of all.
    return -threshold(shape) / (shape.length * (1.0 - math.sqrt(share)))


def gates(gate: str, shape: Shape, *, device: torch.device, seed: int = 1) -> Tensor:
    """log_f [B, T, H] float32: uniform between 0.5 and 1.5 times the rate; mild: about -0.005."""
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(shape[:3], device=device, generator=generator)
    if gate == "mild":
        return F.logsigmoid(4.0 + 4.0 * u)
    return -decay_rate(gate, shape) * (0.5 + u)


class Calls(NamedTuple):
    """What is timed of one implementation, and the share of tiles that it skips."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[Tensor, ...]] | None
    skipped: float | None


def implementations(
    work: Work, reference: Any, device: torch.device, *, sdpa: bool = False
) -> dict[str, Callable[[], Calls]]:
    """Name to what makes its calls; ours first, which the others are compared with."""
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
    """Our operator on a whole sequence."""
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
    """Forward alone, and with the gradients of x."""
    leaves = tuple(tensor.requires_grad_() for tensor in x)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, do)

    return Calls(forward, both, skipped)


def official_calls(reference: Any, work: Work, device: torch.device) -> Calls:
    """The authors' operator on the same inputs, under the same threshold."""
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
    """Share of the tiles up to the diagonal whose largest decay is below a threshold."""
    length = log_f.shape[1]
    kept, causal = (
        visited(log_f, queries=length, tiles=tiles, threshold=given).sum()
        for given in (limit, None)
    )
    return 1.0 - float(kept) / float(causal)


def step_calls(work: Work, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> Calls:
    """Our step, append included, with a full cache; its gates do not vary."""
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
    """One query of the authors' operator against all keys; nothing is appended."""
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
    """Causal attention of torch, without a gate, heads first as it wants them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kinds[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    tensors = inputs(work.shape, device=device)
    q, k, v, do = (x.transpose(1, 2).contiguous() for x in tensors)
    return paired(attend, (q, k, v), do, 0.0)


def load_official(folder: Path) -> types.ModuleType:
    """The authors' kernel from its one file, which needs nothing but torch, triton and einops.

    Raises: ValueError if the file is not there.
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
    # Of einops it takes rearrange alone, and only to swap time and heads.
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
    """One row for each implementation, until `end` of the monotonic clock."""
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
        except Exception as error:  # of one kernel on one shape; the others are still of use
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
    """Calls one implementation once, which compiles its kernels."""
    device = needed_device()
    reference = None if official is None else load_official(official)
    name = "ours" if reference is None else "official"
    calls = implementations(work, reference, device)[name]()
    calls.forward()
    if calls.both is not None:
        calls.both()
