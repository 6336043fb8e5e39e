"""The self-test of `cerl doctor`: a tiny run and, on a GPU, a kernel and a captured update.

Each function raises AssertionError with a sentence if what it computes is wrong; any other error is
one of the machine or of the installation.
"""

import contextlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from cerl import training, wiring
from cerl.config import Config, load
from cerl.graph import captured
from cerl.kernels.attention import forgetting_attention
from cerl.record import checkpoint

STEPS = 600  # agent steps of the run; it is stopped and resumed at half of them
OPTIONS: Mapping[str, Any] = {
    "seeds": (0, 1),
    "ensemble.members": 2,
    "replay.capacity": 500,
    "replay.start": 100,
    "log.every": STEPS // 2,
    "eval.every": STEPS // 2,
    "eval.episodes": 2,
}
TIMES = ("wall_seconds",)  # columns of the rows that differ from run to run


def tiny(folder: Path, *, device: str, steps: int = STEPS) -> Config:
    """The config of a small run of CERL on Catch in a folder."""
    options = {**OPTIONS, "out": str(folder), "device": device, "schedule.steps": steps}
    return load("catch/cerl", options)


def check_run(device: str) -> str:
    """Trains a run twice, once with a stop and a resume half-way, and compares every bit.

    Returns: a sentence on what agrees. Raises: AssertionError if the runs differ.
    """
    # A folder of the system for temporary files, so that the test leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix="cerl-doctor-") as made:
        with contextlib.redirect_stdout(io.StringIO()):
            whole = training.train(tiny(Path(made), device=device))
            resumed = training.train(tiny(Path(made), device=device, steps=STEPS // 2))
            training.resume(resumed, changes={"schedule.steps": STEPS})
        differ = differences(whole, resumed)
    assert not differ, (
        f"a resumed run differs from an uninterrupted one in {', '.join(differ)}: results of runs "
        "that were stopped cannot be trusted on this machine; please report it with this output"
    )
    return f"trained {STEPS} agent steps of 2 seeds; stopped and resumed they are equal to the bit"


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders of the same config: scores, metrics or the learner."""
    found = []
    for name in ("rows.parquet", "metrics.parquet"):
        tables = [pq.read_table(folder / name) for folder in (one, other)]
        for table in tables:
            assert table.num_rows, f"{name} has no rows"
        kept = [column for column in tables[0].column_names if column not in TIMES]
        # Bytes are compared, since NaN is not equal to itself.
        columns = [[table[c].to_numpy() for c in kept] for table in tables]
        if not all(map(_equal, *columns)):
            found.append(name)
    states = [checkpoint.newest(folder, replay=True).state for folder in (one, other)]
    if not _same(states[0]["learner"], states[1]["learner"]):
        found.append("the parameters")
    return found


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and (
        one.tobytes() == other.tobytes() if one.dtype != object else list(one) == list(other)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of tensors, mappings, sequences and numbers agree in every bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def check_attention(device: str) -> str:
    """Compares the attention kernel with its definition in float64, on a GPU.

    Returns: a sentence with the largest error. Raises: AssertionError if it is more than twice that
             of plain torch in the same type.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 64, generator=generator) for _ in range(3))
    q, k, v = (x.to(device, torch.float16) for x in (q, k, v))
    log_f = -torch.rand(2, 300, 4, generator=generator).to(device) / 10
    exact = forgetting_attention(q.double(), k.double(), v.double(), log_f, impl="reference")
    plain = forgetting_attention(q, k, v, log_f, impl="reference")
    ours = forgetting_attention(q, k, v, log_f, impl="triton")
    error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, plain))
    allowed = 2 * allowed + 1e-5 * float(exact.abs().max())
    assert error <= allowed, (
        f"the attention kernel is wrong by {error:.2g} where {allowed:.2g} is allowed; check that "
        "torch, triton and the driver fit together"
    )
    return f"the attention kernel agrees with its definition (largest error {error:.2g})"


def check_update(device: str) -> str:
    """Makes updates as a CUDA graph and without one, and compares every bit of the parameters.

    Returns: a sentence on what agrees. Raises: AssertionError if they differ.
    """
    states = []
    for graph in (False, True):
        config = tiny(Path("unused"), device=device)
        parts = wiring.assemble(config)
        try:
            for _ in range(100):
                parts.collector.step(lambda: None)
            update = parts.learner.update
            update = captured(update, parts.device) if graph else update
            for _ in range(6):
                update()
            states.append([x.detach().cpu() for x in parts.learner.net.parameters()])
        finally:
            wiring.close(parts)
    assert _same(*states), (
        "an update that is captured as a CUDA graph differs from the same update without one; "
        "check that torch, triton and the driver fit together"
    )
    return "updates captured as a CUDA graph equal those without one, to the bit"
