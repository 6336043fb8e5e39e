"""The parts of a block of attention that can be left out, and the parameters that each takes."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Gate = Literal["data", "bias_only", "fixed", "none"]
PRO = ("output_gate", "output_norm", "qk_norm", "kv_shift")  # parts that only variant pro has


class Parts(NamedTuple):
    """The parts that a block of attention has beside its projections."""

    gate: Gate  # data: computed from the row; bias_only: a learnt constant; fixed: a constant
    rotary: bool  # rotary positions of queries and keys
    output_gate: bool
    output_norm: bool
    qk_norm: bool
    kv_shift: bool

    @classmethod
    def of(cls, variant: str, *, gate: Gate, rotary: bool, without: Iterable[str]) -> "Parts":
        """The parts of variant llama or pro, of which pro can do without some of `PRO`."""
        left = dict.fromkeys(PRO, variant == "pro") | dict.fromkeys(without, False)
        return cls(gate, rotary, **left)

    @property
    def learns_bias(self) -> bool:
        """Whether the forget gates have a learnt bias."""
        return self.gate in ("data", "bias_only")


def columns(parts: Parts, *, width: int, heads: int, key_heads: int) -> dict[str, int]:
    """Numbers of columns of the wide projection, by what they are, in their order."""
    keys = width // heads * key_heads
    shifts = key_heads * parts.kv_shift
    found = {
        **{"q": width, "k": keys, "v": keys, "gate": width * parts.output_gate},
        **{"forget": heads * (parts.gate == "data"), "shift_k": shifts, "shift_v": shifts},
    }
    return {name: count for name, count in found.items() if count}


def gate_biases(heads: int, scales: tuple[float, float] | None) -> Tensor:
    """Biases of the forget gates [H]: 0, or one time scale tau a head, so that f = exp(-1 / tau).

    Args: scales, shortest and longest tau in steps; the heads' tau are log-spaced between them.
    """
    if scales is None:
        return torch.zeros(heads)
    shortest, longest = (math.log(scale) for scale in scales)
    tau = torch.linspace(shortest, longest, heads, dtype=torch.float64).exp()
    return -torch.log(torch.expm1(1.0 / tau)).float()
