"""Times forgetting attention, ours and that of others: `cerl bench attention`."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from cerl.arguments import maybe
from cerl.bench.attention_work import (
    GATES,
    LOG_EPS,
    Calls,
    Shape,
    Work,
    decay_rate,
    gates,
    inputs,
    paired,
    threshold,
)
from cerl.bench.clock import Timer, compiled, device_name, needed_device, stopwatch
from cerl.bench.other_attention import Others, installed_fla, load_official, work_gates
from cerl.bench.table import Output, Row, Rows, Table
from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.step import Cache, forgetting_attention_step

OFTEN = ("none", "none+acp", "s70+acp", "s90+acp")  # cases of a shape that `TABLE` does not list
RUNNING = ("s70+running", "s90+running")
# The shapes that are timed if none is given, and the cases of each.
TABLE = {
    "4,4096,16,64": ("none", "s70", *OFTEN[1:], *RUNNING),
    "2,16384,16,64": OFTEN + RUNNING,
    "16,1024,8,128": ("none", "s70+acp"),
    "64,256,8,64": ("none", "s70+acp"),
    "256,64,4,32": ("none", "s70+acp"),
    "step:64,1024,8,64": ("none", "s90+acp"),
}


def attention(
    *,
    shapes: tuple[str, ...] = tuple(TABLE),
    cases: tuple[str, ...] = (),
    official: Annotated[Path | None, maybe("FOLDER")] = None,
    sdpa: bool = False,
    flex: bool = False,
    fla: bool = False,
    repeats: int = 20,
    seconds: float = 120.0,
    jobs: int = 0,
    output: Output = Output(),
) -> Rows:
    """Times forgetting attention in bf16: forward, forward and backward, and one acting step.

    Columns are milliseconds of one call: `graph` replayed in a CUDA graph, `eager` called from
    Python. Calls follow each other directly, so small inputs stay in the GPU's cache. `difference`
    is the largest difference of an output from ours, as a share of our largest value.

    Args:
        shapes: B,T,H,D of a sequence, or step:B,R,H,D of an acting step with a full cache of R keys
        cases: a gate (none, mild, s70, s90), followed by +acp for pruning, or by +running for
            pruning with the running rule, which the authors' code does not have
        official: folder with the authors' forgetting_attention.py, which is then timed too
        sdpa: also time torch's attention without a gate (flash, cuDNN), in the case none
        flex: also time torch's FlexAttention with the gate as a change of the scores, in unpruned
            cases: flex computes no gradient of the gates, flex+gate (T up to 4096) does
        fla: also time the forgetting attention of flash-linear-attention, in unpruned cases
        repeats: timings of each number, of which the median is taken
        seconds: time limit; rows that have not begun by then are left out
        jobs: processes that compile all kernels first; 0: each is compiled before it is timed
    """
    device, timer = needed_device(), stopwatch(repeats)
    works = parsed(shapes, cases)
    if official is not None:
        load_official(official)  # a folder without the file is an error before anything is timed
    others = Others(official, sdpa, flex, fla and installed_fla())
    end = time.monotonic() + seconds
    if jobs:
        # Works that differ in the gate alone use the same compiled kernels: one of each will do.
        kinds = {(work.step, work.shape, *work[3:]): work for work in works}.values()
        given = [
            (work, name, others)
            for work in kinds
            for name in implementations(work, others, device)
            if name not in ("flash", "cudnn")
        ]
        compiled(call, given, jobs=jobs, seconds=0.6 * seconds)
    table = Table("attention", output, device=device_name(device), title="attention, bf16")
    for work in works:
        impls = implementations(work, others, device)
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


def implementations(
    work: Work, others: Others, device: torch.device
) -> dict[str, Callable[[], Calls]]:
    """Functions that prepare the calls of each implementation, by name.

    Ours comes first, since `measure` compares the others with it.
    """
    ours = step_calls if work.step else sequence_calls
    made: dict[str, Callable[[], Calls]] = {"ours": lambda: ours(work, device)}
    if work.step:
        made["one query"] = lambda: one_query_calls(work, device)
    for name in others.names(work):
        made[name] = lambda name=name: others.calls(name, work, device)
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


def one_query_calls(work: Work, device: torch.device) -> Calls:
    """The call of our operator on sequences with one query and all keys; no key is appended."""
    shape = work.shape
    log_f = work_gates(work, device)
    limit = (
        torch.full((shape.batch, shape.heads), threshold(shape), device=device)
        if work.pruned
        else None
    )
    q, k, v, _ = inputs(shape, device=device)
    last = q[:, -1:].contiguous()
    call = lambda: forgetting_attention(last, k, v, log_f, threshold=limit)  # noqa: E731
    return Calls(torch.no_grad()(call), None, None)


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
    ours = wanted = None
    for name, make in impls.items():
        row: Row = {"shape": work.what, "case": work.case, "what": name}
        if time.monotonic() > end:
            print(*row.values(), "left out: no time", flush=True)
            continue
        try:
            calls = make()
            forward = timer(calls.forward)
            both = None if calls.both is None else timer(calls.both)
            output = None if calls.both is None else by_heads(calls)
        except Exception as error:  # one kernel failed on one shape; the other rows are still timed
            table.fail(row, error)
            continue
        whole = both or forward
        if name == "ours":
            ours, wanted = whole, output
        table.add(
            row
            | {
                "skipped": calls.skipped,
                "difference": difference(output, None if name == "ours" else wanted),
                "fwd graph": forward.graph,
                "fwd eager": forward.eager,
                "fwd+bwd graph": both and both.graph,
                "fwd+bwd eager": both and both.eager,
                "graph/ours": ours and whole.graph / ours.graph,
                "eager/ours": ours and whole.eager / ours.eager,
            }
        )


def by_heads(calls: Calls) -> Tensor:
    """The output of the call forward, [B, T, H, D]."""
    o = calls.forward()
    return o.transpose(1, 2) if calls.heads_first else o


def difference(o: Tensor | None, ours: Tensor | None) -> float | None:
    """Largest difference of two outputs, as a share of the largest value of ours."""
    if o is None or ours is None:
        return None
    return float((o.float() - ours.float()).abs().amax() / ours.float().abs().amax())


def call(work: Work, name: str, others: Others) -> None:
    """Calls one implementation once, so that its kernels are compiled.

    Args: name, a key of `implementations`.
    """
    calls = implementations(work, others, needed_device())[name]()
    calls.forward()
    if calls.both is not None:
        calls.both()
