"""The population's perceptron against loops over networks, and its kernels against float64.

Without a CUDA device the kernels run in Triton's interpreter (conftest.py asks for it), in float32.
An error may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cerl.kernels import mlp as mlp_module
from cerl.kernels.mlp import mlp
from cerl.precision import precision

pytest.importorskip("triton")
# Torch says so when the first matrix product of a process is one of a backward pass.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "tail", "w1", "w2", "w3", "b1", "b2", "b3")


class Shape(NamedTuple):
    """Networks, axes of x and of tail, rows, sizes of x, tail and layers."""

    lead: tuple[int, ...]
    x: tuple[int, ...]
    tail: tuple[int, ...]
    rows: int
    sizes: tuple[int, int, int, int, int]  # in, more (0: no tail), hidden, hidden, out


SMALL = {
    "shared by critics": Shape((2, 3, 2), (2, 3, 1), (), 63, (23, 0, 64, 64, 10)),
    "shared by members": Shape((2, 3, 2), (2, 1, 1), (), 33, (17, 0, 64, 32, 12)),
    "own inputs": Shape((3,), (3,), (), 1, (17, 0, 64, 64, 1)),
    "shared across, not along": Shape((2, 3), (1, 3), (), 5, (4, 0, 16, 16, 2)),
    "tail of members, observations of seeds": Shape(
        (2, 3, 2), (2, 1, 1), (2, 3, 1), 33, (17, 6, 64, 64, 10)
    ),
    "observations of members, tail of seeds": Shape(
        (2, 3, 2), (2, 3, 1), (2, 1, 1), 20, (7, 3, 16, 64, 1)
    ),
    "odd hidden sizes": Shape((2, 2), (2, 2), (2, 1), 40, (5, 2, 24, 50, 3)),
    "wide": Shape((2,), (1,), (2,), 17, (376, 17, 64, 48, 17)),
    "full size": Shape((2,), (1,), (2,), 256, (17, 6, 256, 256, 10)),
}
LARGE = {
    "critics, obs 17": Shape((10, 10, 2), (10, 1, 1), (10, 1, 1), 256, (17, 6, 256, 256, 10)),
    "critics of actors, obs 17": Shape((10, 10, 2), (10, 10, 1), (), 256, (23, 0, 256, 256, 1)),
    "actors, obs 17": Shape((10, 10), (10, 1), (), 256, (17, 0, 256, 256, 12)),
    "critics, obs 376": Shape((10, 10, 2), (10, 1, 1), (10, 10, 1), 256, (376, 17, 256, 256, 10)),
    "actors, obs 376": Shape((10, 10), (10, 1), (), 256, (376, 0, 256, 256, 34)),
    "one network": Shape((1, 1, 2), (1, 1, 1), (1, 1, 1), 256, (17, 6, 256, 256, 1)),
    "acting": Shape((10, 10), (10, 1), (), 1, (17, 0, 256, 256, 12)),
}
SUBSETS = {
    "all": NAMES,
    "inputs": ("x", "tail"),
    "x": ("x",),
    "tail": ("tail",),
    "parameters": NAMES[2:],
    "one bias": ("b2",),
}


def leaves(shape: Shape, *, dtype: torch.dtype, wanted=NAMES) -> dict[str, Tensor]:
    """Random inputs and layers, the same numbers in every precision; `wanted` require gradients."""
    generator = torch.Generator().manual_seed(5)
    width, more, *outs = shape.sizes
    sizes = {"x": (*shape.x, shape.rows, width)}
    if more:
        sizes["tail"] = (*shape.tail, shape.rows, more)
    fan_in, scales = width + more, {}
    for k, out in enumerate(outs, 1):
        sizes[f"w{k}"], sizes[f"b{k}"] = (*shape.lead, fan_in, out), (*shape.lead, out)
        scales[f"w{k}"], scales[f"b{k}"] = (2 / fan_in) ** 0.5, 0.3
        fan_in = out
    return {
        name: (torch.randn(sizes[name], generator=generator) * scales.get(name, 1.0))
        .to(DEVICE, dtype)
        .requires_grad_(name in wanted)
        for name in NAMES
        if name in sizes
    }


def call(t: dict[str, Tensor], **options: Any) -> Tensor:
    weights, biases = ([t[f"{kind}{k}"] for k in (1, 2, 3)] for kind in "wb")
    return mlp(t["x"], weights, biases, tail=t.get("tail"), **options)


def by_loops(t: dict[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
    """The output, and how near a row comes to a kink of its network [*lead, rows]."""
    outputs, nearest = [], []
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape.lead)).view(
        -1, len(shape.lead)
    ):
        net = tuple(index.tolist())
        rows = [
            t[name][tuple(min(i, n - 1) for i, n in zip(net, t[name].shape, strict=False))]
            for name in ("x", "tail")
            if name in t
        ]
        a, near = torch.cat(rows, -1), []
        for k in (1, 2):
            a = a @ t[f"w{k}"][net] + t[f"b{k}"][net]
            near.append(a.abs().amin(-1))
            a = a.clamp(min=0)
        outputs.append(a @ t["w3"][net] + t["b3"][net])
        nearest.append(torch.minimum(*near))
    return (
        torch.stack(outputs).view(*shape.lead, *outputs[0].shape),
        torch.stack(nearest).view(*shape.lead, -1),
    )
