"""The calls that the benchmark of attention times: their sizes, and inputs that decay as asked.

Rows of q and k have length sqrt(D), so no logit exceeds sqrt(D) in size; `threshold` is the
threshold for pruning that follows from this bound. The gates `s70` and `s90` decay so fast that 70%
and 90% of all pairs of a query and an earlier key fall below the threshold.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels.attention.plan import Tiles
from cerl.kernels.attention.pruning import visited

LOG_EPS = -10.0  # natural log of the share of a softmax that pruning may leave out
GATES = ("none", "mild", "s70", "s90")


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
    heads_first: bool = False  # the output is [B, H, T, D] instead of [B, T, H, D]


def paired(
    attend: Callable[..., Tensor],
    x: Sequence[Tensor],
    do: Tensor,
    skipped: float,
    *,
    heads_first: bool = False,
) -> Calls:
    """The calls of an operator: forward, and forward with the gradients of all inputs.

    Args: attend, the operator; x, its inputs; do, the gradient of its output; skipped and
          heads_first as in `Calls`.
    """
    leaves = tuple(tensor.requires_grad_() for tensor in x)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, do)

    return Calls(forward, both, skipped, heads_first)


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
