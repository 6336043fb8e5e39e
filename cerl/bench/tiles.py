"""Times block sizes of the attention kernels: `cerl bench attention-tiles`.

A kernel module takes its `Launch` (block sizes, warps, stages) from a table `CONFIGS`, or as the
argument `launch` of a function that otherwise chooses it. This benchmark replaces that choice by
each candidate in turn, times the public operator, and compares its results with those of the
module's own choice.
"""

import ast
import importlib
import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cerl.bench.attention import parsed, sequence_calls, step_calls
from cerl.bench.attention_work import Work
from cerl.bench.clock import Timer, compiled, device_name, needed_device, stopwatch
from cerl.bench.table import Output, Printed, Row, Rows, Table

# Other block sizes take sums in another order, so results in bf16 may differ by this share of the
# largest value.
TOLERANCE = 2.0**-6
# The values of each field that are combined to candidates if the option `configs` names none; other
# fields keep their default.
GRID = {
    "rows": (32, 64),
    "columns": (32, 64),
    "pairs": (1, 2, 4),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3),
}


def attention_tiles(
    *,
    key: str,
    shape: str = "4,4096,16,64",
    case: str = "none",
    module: str = "attention.long_triton",
    configs: tuple[str, ...] = (),
    repeats: int = 10,
    seconds: float = 240.0,
    jobs: int = 16,
    output: Output = Output(),
) -> Rows:
    """Times candidates for one choice of block sizes of a kernel module.

    Prints milliseconds in a CUDA graph, and the fastest ones once more at the end, with registers
    of a thread, bytes that a thread spills and shared memory of a program. The module's table is
    not changed.

    Args:
        key: an entry of CONFIGS, its parts separated by commas (forward,64,2), or the name of a
            function with an argument `launch` (backward); several that are changed together are
            joined with +
        shape: B,T,H,D of a sequence, or step:B,R,H,D of an acting step with a full cache of R keys
        case: a gate (none, mild, s70, s90), followed by +acp for pruning
        module: a module of cerl.kernels: attention.long_triton, attention.short_triton,
            attention.medium_triton, attention.medium_backward_triton, attention.step_triton
        configs: candidates, their fields separated by commas (128,64,8,3), for several keys joined
            with + too; or one JSON file with a list of lists; a grid if not given
        repeats: timings of each number, of which the median is taken
        seconds: time limit; candidates that have not begun by then are left out
        jobs: processes that compile the candidates first; 0: each is compiled before it is timed
    """
    device = needed_device()
    (work,) = parsed((shape,), (case,))
    kernels = importlib.import_module(f"cerl.kernels.{module}")
    known, keys = entries(kernels), key.split("+")
    if not set(keys) <= set(known):
        raise ValueError(f"--key: expected one of {'  '.join(known)}, or some with +; got {key!r}")
    candidates = combined_configs(configs, kernels.Launch, [known[key] for key in keys])
    end = time.monotonic() + seconds
    if jobs:
        given = [(work, module, keys, candidate) for candidate in candidates]
        compiled(call_candidate, given, jobs=jobs, seconds=0.7 * seconds)
    title = f"{module} {key}: {work.what} {work.case}"
    table = Table("attention-tiles", output, device=device_name(device), title=title)
    rows = sweep(table, work, module, keys, candidates, stopwatch(repeats), device, end=end)
    ranked = Printed("\nfastest first")
    for row in sorted(rows, key=lambda row: row["fwd+bwd"] or row["forward"])[:12]:
        ranked.add(row)
    table.compare()
    return rows


def entries(kernels: Any) -> dict[str, Any]:
    """The choices of a kernel module that can be replaced.

    Returns: by the text of the option `key`, the `Launch` in the table; None for a function that
             chooses its launch itself.
    """
    table = getattr(kernels, "CONFIGS", {})
    found = {
        ",".join(map(str, key)): launch
        for key, launch in table.items()
        if hasattr(launch, "_fields")
    }
    for name, function in vars(kernels).items():
        if not inspect.isfunction(function):
            continue
        argument = inspect.signature(function).parameters.get("launch")
        if argument is not None and argument.default is None:
            found[name] = None
    return found


def parsed_configs(texts: Sequence[str], kind: Any, default: Any) -> list[Any]:
    """Reads the candidates for one entry; the default comes first.

    Args:    texts, the option `configs`; kind, the module's `Launch`; default, the entry's own one.
    Raises:  ValueError for a candidate whose fields are not those of the kind.
    """
    if len(texts) == 1 and texts[0].endswith(".json"):
        lists = json.loads(Path(texts[0]).read_text())
    elif texts:
        lists = [list(_literals(text)) for text in texts]
    else:
        names = [name for name in kind._fields if name in GRID]
        others = {} if default is None else default._asdict()
        grid = itertools.product(*(GRID[name] for name in names))
        lists = [list((others | dict(zip(names, sizes, strict=True))).values()) for sizes in grid]
    candidates = [default]
    for values in lists:
        try:
            candidate = kind(*values)
        except TypeError as error:
            raise ValueError(
                f"--configs: expected values of {', '.join(kind._fields)}, got {values}"
            ) from error
        if candidate not in candidates:
            candidates.append(candidate)
    return candidates


def combined_configs(
    texts: Sequence[str], kind: Any, defaults: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """Reads candidates for several entries that are changed together; the defaults come first.

    Args:    texts, the option `configs`; kind, the module's `Launch`; defaults of the entries.
    Returns: tuples with a launch for each entry.
    Raises:  ValueError for a candidate with another number of parts, or of other fields.
    """
    if len(defaults) == 1:
        return [(candidate,) for candidate in parsed_configs(texts, kind, defaults[0])]
    candidates = [tuple(defaults)]
    for text in texts:
        parts = text.split("+")
        if len(parts) != len(defaults):
            raise ValueError(f"--configs: expected {len(defaults)} parts with +, got {text!r}")
        pairs = zip(parts, defaults, strict=True)
        candidates.append(tuple(parsed_configs((part,), kind, given)[-1] for part, given in pairs))
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
    table: Table,
    work: Work,
    module: str,
    keys: Sequence[str],
    candidates: Sequence[tuple[Any, ...]],
    timer: Timer,
    device: torch.device,
    *,
    end: float,
) -> Rows:
    """Times all candidates and adds a row for each that runs and agrees with the first one.

    Args:    keys, the entries that a candidate replaces; end, `time.monotonic()` after which
             candidates are left out.
    Returns: the rows.
    """
    kernels = importlib.import_module(f"cerl.kernels.{module}")
    expected: Sequence[Tensor] = ()
    for candidate in candidates:
        texts = (",".join(map(str, launch or ["own choice"])) for launch in candidate)
        row: Row = {
            "kernel": module,
            "key": "+".join(keys),
            "shape": work.what,
            "case": work.case,
            "config": "+".join(texts),
        }
        if time.monotonic() > end:
            print(*row.values(), "left out: no time", flush=True)
            continue
        before = set(variants(*_modules()))
        try:
            with _all_replaced(kernels, keys, candidate):
                calls = (step_calls if work.step else sequence_calls)(work, device)
                results = _results(calls.forward, calls.both)
                expected = expected or results
                error = difference(results, expected)
                if error > TOLERANCE:
                    raise RuntimeError(
                        f"results differ by {error:.3g} of the largest value from the first ones"
                    )
                forward = timer(calls.forward).graph
                both = None if calls.both is None else timer(calls.both).graph
        except Exception as error:  # a candidate may need too much shared memory, for example
            table.fail(row, error)
            continue
        added = [known for name, known in variants(*_modules()).items() if name not in before]
        row |= {"forward": forward, "fwd+bwd": both, "error": error}
        row |= {"registers": "", "spills": "", "shared": ""} | _resources(added)
        table.add(row)
    return table.rows


@contextmanager
def replaced(kernels: Any, key: str, launch: Any) -> Iterator[None]:
    """Replaces the choice of one of the `entries` within the `with` block."""
    table = getattr(kernels, "CONFIGS", {})
    entry = next((entry for entry in table if ",".join(map(str, entry)) == key), None)
    if entry is None:
        table, entry = vars(kernels), key
        launch = partial(table[key], launch=launch)
    before = table[entry]
    table[entry] = launch
    try:
        yield
    finally:
        table[entry] = before


@contextmanager
def _all_replaced(kernels: Any, keys: Sequence[str], launches: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for key, launch in zip(keys, launches, strict=True):
            stack.enter_context(replaced(kernels, key, launch))
        yield


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any tensor, as a share of the largest wanted value in that tensor.

    NaN counts as infinite. Masks (tensors of bytes) and empty tensors are not compared.
    """
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        if result.numel() and result.dtype != torch.uint8:
            scale = wanted.double().abs().amax().clamp(min=1e-30)
            error = (result.double() - wanted.double()).abs().amax() / scale
            worst = max(worst, float(error.nan_to_num(torch.inf)))
    return worst


def _results(forward: Callable[[], Any], both: Callable[[], Any] | None) -> list[Tensor]:
    return [forward().clone(), *(() if both is None else both())]


def _modules() -> list[Any]:
    return [m for name, m in sys.modules.items() if name.startswith("cerl.kernels.attention")]


def variants(*modules: Any) -> dict[int, Any]:
    """All kernels that are compiled so far in some modules, by their `id`.

    Triton keeps them in `device_caches` of each kernel function.
    """
    found = {}
    for function in [function for module in modules for function in vars(module).values()]:
        for cached in getattr(function, "device_caches", {}).values():
            found |= {id(kernel): kernel for kernel in cached[0].values()}
    return found


def _resources(kernels: Sequence[Any]) -> dict[str, str]:
    """Registers, spilled bytes and shared memory of kernels, as text in the kernels' order."""
    return {
        "registers": "+".join(str(kernel.n_regs) for kernel in kernels),
        "spills": "+".join(str(kernel.n_spills) for kernel in kernels),
        "shared": "+".join(str(kernel.metadata.shared) for kernel in kernels),
    }


def call_candidate(
    work: Work, module: str, keys: Sequence[str], candidate: tuple[Any, ...]
) -> None:
    """Calls the operator once with a candidate, so that its kernels are compiled."""
    kernels = importlib.import_module(f"cerl.kernels.{module}")
    with _all_replaced(kernels, keys, candidate):
        calls = (step_calls if work.step else sequence_calls)(work, needed_device())
        _results(calls.forward, calls.both)
