"""Block sizes of attention kernels against the clock: `cerl bench attention-tiles`.

A kernel module holds a table `CONFIGS` of named tuples (block sizes, warps, stages). One of its
entries is replaced by each candidate in turn; the public operator is timed and its results are
compared with those of the entry as it stands.
"""

import ast
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cerl import bench
from cerl.bench_attention import (
    Report,
    Rows,
    Timer,
    Work,
    compiled,
    needed_device,
    parsed,
    sequence_calls,
    step_calls,
    stopwatch,
)

# Results may differ by this share of the largest value: bf16 sums in another order.
TOLERANCE = 2.0**-6
GRID = {"rows": (32, 64, 128), "columns": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)}


def attention_tiles(
    *,
    key: str,
    shape: str = "4,4096,16,64",
    case: str = "none",
    module: str = "attention_triton",
    configs: tuple[str, ...] = (),
    repeats: int = 10,
    seconds: float = 240.0,
    jobs: int = 16,
    out: Path | None = None,
) -> Rows:
    """Times the candidates for one entry of a kernel module's table of configurations.

    Prints milliseconds in a CUDA graph, the fastest first, with registers of a thread, bytes that
    it spills and shared memory of a program. Nothing is written back to the table.

    Args:
        key: entry of CONFIGS, its parts separated by commas: forward,64,2
        shape: B,T,H,D of a sequence, or step:B,R,H,D
        case: a gate (none, mild, s70, s90), with +acp if pruned
        module: of cerl.kernels, with a table CONFIGS
        configs: candidates, their fields separated by commas: 128,64,8,3; or one JSON file with a
            list of lists. Not given: a grid, for entries of rows, columns, warps and stages
        repeats: timings of each number, of which the median is taken
        seconds: candidates that begin later than this are left out
        jobs: processes that compile the candidates first; 0 compiles each before it is timed
        out: JSON-lines file that every row is appended to as soon as it is measured
    """
    device = needed_device()
    (work,) = parsed((shape,), (case,))
    table = importlib.import_module(f"cerl.kernels.{module}").CONFIGS
    entry = parsed_key(key, table)
    candidates = parsed_configs(configs, table[entry])
    end = time.monotonic() + seconds
    if jobs:
        given = [(work, module, entry, candidate) for candidate in candidates]
        compiled(_compile, given, jobs=jobs, seconds=0.7 * seconds)
    title = f"{module} {key}: {work.what} {work.case} on {bench.device_name(device)}"
    with Report(title, out) as report:
        rows = sweep(report, work, module, entry, candidates, stopwatch(repeats), device, end=end)
    print("\nfastest first")
    with Report(title, None) as report:
        for row in sorted(rows, key=lambda row: row["fwd+bwd"] or row["forward"])[:12]:
            report.add(row)
    return rows


def parsed_key(text: str, table: dict[Any, Any]) -> Any:
    """The key of a table that a text like forward,64,2 means. Raises: ValueError."""
    for key in table:
        parts = key if isinstance(key, tuple) else (key,)
        if ",".join(map(str, parts)) == text:
            return key
    known = "  ".join(",".join(map(str, key)) for key in table)
    raise ValueError(f"--key: expected one of {known}; got {text!r}")


def parsed_configs(texts: Sequence[str], default: Any) -> list[Any]:
    """Candidates of the default's type, the default first.

    Raises: ValueError for a candidate with other fields.
    """
    if len(texts) == 1 and texts[0].endswith(".json"):
        lists = json.loads(Path(texts[0]).read_text())
    elif texts:
        lists = [list(_literals(text)) for text in texts]
    elif set(GRID) <= set(default._fields):
        lists = list(itertools.product(*(GRID[name] for name in default._fields[:4])))
    else:
        raise ValueError(f"--configs: expected values of {', '.join(default._fields)}, got none")
    candidates = [default]
    for values in lists:
        try:
            candidate = type(default)(*values)
        except TypeError as error:
            raise ValueError(
                f"--configs: expected values of {', '.join(default._fields)}, got {values}"
            ) from error
        if candidate not in candidates:
            candidates.append(candidate)
    return candidates


def _literals(text: str) -> Iterator[int | None]:
    for part in text.split(","):
        try:
            yield ast.literal_eval(part.strip())
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"--configs: expected numbers like 128,64,8,3, got {text!r}"
            ) from error


def sweep(
    report: Report,
    work: Work,
    module: str,
    key: Any,
    candidates: Sequence[Any],
    timer: Timer,
    device: torch.device,
    *,
    end: float,
) -> Rows:
    """Rows of all candidates that run and agree with the first one."""
    kernels = importlib.import_module(f"cerl.kernels.{module}")
    expected: Sequence[Tensor] = ()
    for candidate in candidates:
        row: dict[str, Any] = {"config": ",".join(map(str, candidate))}
        if time.monotonic() > end:
            print(*row.values(), "left out: no time", flush=True)
            continue
        before = set(_variants(kernels))
        try:
            with replaced(kernels.CONFIGS, key, candidate):
                calls = (step_calls if work.step else sequence_calls)(work, device)
                results = _results(calls.forward, calls.both)
                expected = expected or results
                error = difference(results, expected)
                if error > TOLERANCE:
                    raise RuntimeError(
                        f"results differ from those of {candidates[0]} by {error:.3g} of the "
                        "largest value"
                    )
                forward = timer(calls.forward).graph
                both = None if calls.both is None else timer(calls.both).graph
        except Exception as error:  # too much shared memory, say; the other candidates go on
            report.fail(row, error)
            continue
        variants = [known for name, known in _variants(kernels).items() if name not in before]
        row |= {"forward": forward, "fwd+bwd": both, "error": error}
        row |= {"registers": "", "spills": "", "shared": ""} | _resources(variants)
        report.add(row)
    return report.rows


@contextmanager
def replaced(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    """An entry of a table is another one for a while."""
    before = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = before


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest value of its tensor; NaN counts as infinite."""
    errors = []
    for result, wanted in zip(results, expected, strict=True):
        scale = wanted.double().abs().amax().clamp(min=1e-30)
        errors.append(
            ((result.double() - wanted.double()).abs().amax() / scale).nan_to_num(torch.inf)
        )
    return float(torch.stack(errors).amax())


def _results(forward: Callable[[], Any], both: Callable[[], Any] | None) -> list[Tensor]:
    return [forward().clone(), *(() if both is None else both())]


def _variants(kernels: Any) -> dict[int, Any]:
    """All compiled kernels of a module; Triton keeps them in each function by device."""
    found = {}
    for function in vars(kernels).values():
        for cached in getattr(function, "device_caches", {}).values():
            found |= {id(kernel): kernel for kernel in cached[0].values()}
    return found


def _resources(variants: Sequence[Any]) -> dict[str, str]:
    """Of the kernels that a candidate added, as text in the order of their compilation."""
    return {
        "registers": "+".join(str(kernel.n_regs) for kernel in variants),
        "spills": "+".join(str(kernel.n_spills) for kernel in variants),
        "shared": "+".join(str(kernel.metadata.shared) for kernel in variants),
    }


def _compile(work: Work, module: str, key: Any, candidate: Any) -> None:
    kernels = importlib.import_module(f"cerl.kernels.{module}")
    with replaced(kernels.CONFIGS, key, candidate):
        calls = (step_calls if work.step else sequence_calls)(work, needed_device())
        _results(calls.forward, calls.both)
    torch.cuda.synchronize()
