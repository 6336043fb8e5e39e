"""Measures what adaptive computation pruning (ACP) saves and costs: `cerl bench acp`.

For several sequence lengths and mean decays of the gates, it measures the time of forgetting
attention with and without pruning, the share of tiles that are skipped, and the largest difference
between the two outputs. Source of ACP: arXiv:2504.06949.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from cerl.bench.attention_work import LOG_EPS, Shape, inputs, paired, threshold
from cerl.bench.clock import Timer, compiled, device_name, needed_device, stopwatch, untimed
from cerl.bench.table import Output, Row, Table
from cerl.kernels.attention import forgetting_attention
from cerl.record.files import write_atomically
from cerl.report.figures import canvas
from cerl.report.figures.look import ROLES, VARIANTS

COLOURS = [colour for colour, _ in (*ROLES.values(), *VARIANTS)]

SCHEMA = pa.schema(
    [
        ("batch", pa.int64()),
        ("length", pa.int64()),  # T, steps
        ("heads", pa.int64()),
        ("width", pa.int64()),  # D
        ("decay", pa.float64()),  # mean -log f per step, nats
        ("pruned", pa.bool_()),
        ("threshold", pa.float64()),  # natural log; null: not pruned
        ("skipped", pa.float64()),  # share of the tiles up to the diagonal that are skipped
        ("forward", pa.float64()),  # ms in a CUDA graph, forward alone
        ("both", pa.float64()),  # ms in a CUDA graph, forward and backward
        ("error", pa.float64()),  # largest |o - unpruned o| in `dtype`; null: not pruned
        ("error_fp32", pa.float64()),  # the same with inputs and outputs in float32
        ("allowed", pa.float64()),  # bound on the error by the threshold, rounding not included
        ("dtype", pa.string()),  # of the inputs that are timed
        ("device", pa.string()),
    ]
)
DECAYS = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)


def acp(
    *,
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    lengths: tuple[int, ...] = (1024, 4096, 16384),
    decays: tuple[float, ...] = DECAYS,
    positions: int = 32768,
    heads: int = 16,
    width: int = 64,
    repeats: int = 10,
    seconds: float = 120.0,
    jobs: int = 0,
    output: Output = Output(),
) -> list[Row]:
    """Times attention with and without pruning for several mean decays of the gates, in bf16.

    log f is uniform between 0.5 and 1.5 times its mean. Writes rows.parquet and acp.png; files of
    an earlier run are replaced.

    Args:
        folder: the folder that the two files are written into
        lengths: lengths of a sequence, T, in steps
        decays: means of -log f per step, in nats
        positions: steps in a batch, B x T, the same for every length
        heads: number of heads, H
        width: numbers in a row of one head, D
        repeats: timings of each number, of which the median is taken
        seconds: time limit; points that have not begun by then are left out
        jobs: processes that compile the kernels of every length first; 0: each is compiled when it
            is needed
    """
    device = needed_device()
    wrong = [length for length in lengths if length < 1 or positions % length]
    if wrong:
        raise ValueError(f"--lengths: expected divisors of {positions} positions, got {wrong}")
    if not all(decay > 0.0 for decay in decays):
        raise ValueError(f"--decays: expected means above 0, got {decays}")
    shapes = [Shape(positions // length, length, heads, width) for length in lengths]
    end = time.monotonic() + seconds
    if jobs:
        given = [(shape, decays[0], untimed, device) for shape in shapes]
        compiled(study, given, jobs=jobs, seconds=0.6 * seconds)
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("acp", output, device=device_name(device), title="pruning, bf16")
    rows: list[Row] = []
    for decay in decays:
        for shape in shapes:
            if time.monotonic() > end:
                print(f"T {shape.length}, decay {decay:g} left out: no time", flush=True)
                continue
            rows += study(shape, decay, stopwatch(repeats), device)
            for row in rows[-2:]:
                table.add(row | {"decay": f"{decay:g}"})
            save(rows, folder / "rows.parquet")
    if rows:
        draw(rows, folder / "acp.png")
    table.finished()
    return rows


def study(
    shape: Shape,
    decay: float,
    timer: Timer,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Row]:
    """Measures one length and one mean decay. Returns: the rows without and with pruning.

    Args: decay, mean of -log f per step, nats; dtype of the inputs.
    """
    q, k, v, do = inputs(shape, device=device, dtype=dtype)
    log_f = gates(shape, decay, device)
    limit = threshold(shape)
    error = output_error(q, k, v, log_f, limit)
    error_fp32 = output_error(q.float(), k.float(), v.float(), log_f, limit)
    # With e = exp(LOG_EPS): pruning leaves out weights that sum to at most e, and the other weights
    # of the softmax grow by as much together. So an output moves by at most 2 e max|v|.
    allowed = 2.0 * math.exp(LOG_EPS) * float(v.abs().amax())
    rows = []
    for pruned in (False, True):
        attend = partial(forgetting_attention, threshold=_limit(shape, device) if pruned else None)
        with torch.no_grad():
            _, skipped = attend(q, k, v, log_f, return_skipped=True)
        calls = paired(attend, (q, k, v, log_f), do, float(skipped.mean()))
        both = calls.both
        assert both is not None, "a whole sequence has a backward pass"
        values = [
            *shape, decay, pruned, limit if pruned else None, calls.skipped,
            timer(calls.forward).graph, timer(both).graph,
            error if pruned else None, error_fp32 if pruned else None,
            allowed if pruned else None, str(dtype).removeprefix("torch."),
            device_name(device),
        ]  # fmt: skip
        rows.append(dict(zip(SCHEMA.names, values, strict=True)))
    return rows


def gates(shape: Shape, decay: float, device: torch.device) -> Tensor:
    """log_f [B, T, H] float32, uniform between 0.5 and 1.5 times -decay."""
    generator = torch.Generator(device).manual_seed(1)
    return -decay * (0.5 + torch.rand(shape[:3], device=device, generator=generator))


def _limit(shape: Shape, device: torch.device) -> Tensor:
    return torch.full((shape.batch, shape.heads), threshold(shape), device=device)


def output_error(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, limit: float) -> float:
    """Largest difference of pruned and unpruned outputs."""
    with torch.no_grad():
        pruned = forgetting_attention(q, k, v, log_f, threshold=limit)
        whole = forgetting_attention(q, k, v, log_f)
    return float((pruned.float() - whole.float()).abs().amax())


def save(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows measured so far; replaces the file."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plots skipped tiles and times against the decay, with a colour for each length; and errors,
    unless there is none."""
    lengths = sorted({row["length"] for row in rows})
    looks = {
        length: {"color": COLOURS[i % len(COLOURS)], "marker": "os^Dv"[i % 5], "markersize": 3.5}
        for i, length in enumerate(lengths)
    }
    exact = not any(row["error"] or row["error_fp32"] for row in rows if row["pruned"])
    grey = {"color": canvas.GREY, "linewidth": 1.3}
    handles = [
        *(Line2D([], [], label=f"T = {length:,}", **look) for length, look in looks.items()),
        Line2D([], [], label="pruning on", **grey),
        Line2D([], [], label="pruning off", linestyle="--", **grey),
    ]
    if not exact:
        handles += [
            Line2D([], [], label="difference in bf16", linestyle="-.", **grey),
            Line2D([], [], label="allowed, before rounding", linestyle=":", **grey),
        ]
    figure, panels = canvas.sheet(3 if exact else 4, handles, height=2.0)
    labels = [
        ("tiles that pruning skips", "share of causal tiles (%)"),
        ("forward", "time (ms)"),
        ("forward and backward", "time (ms)"),
        ("largest difference (float32)", "difference, in units of v"),
    ]
    for panel, (title, unit) in zip(panels, labels, strict=False):
        canvas.head(panel, title)
        canvas.label(panel, x="mean -log f (nats a step)", y=unit)
        panel.set_xscale("log")
    for length, look in looks.items():
        on, off = (
            [row for row in rows if row["length"] == length and row["pruned"] == pruned]
            for pruned in (True, False)
        )
        _curve(panels[0], on, "skipped", 100.0, look)
        for panel, name in zip(panels[1:3], ("forward", "both"), strict=True):
            _curve(panel, on, name, 1.0, look)
            _curve(panel, off, name, 1.0, look | {"linestyle": "--", "marker": ""})
        if not exact:
            _curve(panels[3], on, "error_fp32", 1.0, look)
            _curve(panels[3], on, "error", 1.0, look | {"linestyle": "-."})
    for panel in panels[1:3]:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    if not exact:
        panels[3].axhline(
            min(row["allowed"] for row in rows if row["pruned"]), linestyle=":", **grey
        )
        panels[3].set_yscale("symlog", linthresh=1e-8)  # an error may be zero
        panels[3].set_ylim(bottom=0.0)
    panels[0].set_ylim(0, 100)
    canvas.save(canvas.dress(figure), path)


def _curve(panel: Any, rows: Sequence[Row], name: str, unit: float, look: dict[str, Any]) -> None:
    points = sorted((row["decay"], unit * row[name]) for row in rows)
    if points:
        panel.plot(*zip(*points, strict=True), linewidth=1.3, **look)
