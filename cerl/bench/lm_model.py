"""The language model of `cerl bench lm`: the trunk of cerl's sequence networks on bytes.

There is one seed and one member. Bytes come in as one-hot rows, so that the trunk's first layer is
their embedding, and the same matrix gives the logits of the next byte (tied weights).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl.bench.lm_corpus import VOCABULARY
from cerl.nets import fox as fox_room
from cerl.nets.fox import Fox
from cerl.nets.trunk import make_trunk

Kind = Literal["fox-pro", "fox-llama", "transformer", "transformer-pro", "fixed"]
Pruning = Literal["off", "static", "running"]
LOG_EPS = -10.0  # natural log of the share of a softmax that pruning may leave out
FURTHER = 4  # losses are measured up to so many times the length that is learnt
STD = 0.02  # of all matrices before training


class Size(NamedTuple):
    """The size of a model."""

    layers: int
    width: int
    heads: int


SIZES = {
    "tiny": Size(2, 32, 2),  # for tests
    "3M": Size(6, 192, 3),
    "25M": Size(8, 512, 8),
    "125M": Size(16, 768, 12),
}
# The options of `make_trunk` for each kind. A fixed gate forgets at one rate a head.
KINDS: dict[str, dict[str, Any]] = {
    "fox-pro": {"kind": "fox", "variant": "pro"},
    "fox-llama": {"kind": "fox", "variant": "llama"},
    "transformer": {"kind": "transformer", "variant": "llama"},
    "transformer-pro": {"kind": "fox", "variant": "pro", "gate": "none", "rotary": True},
    "fixed": {"kind": "fox", "variant": "pro", "gate": "fixed"},
}
FIXED_SCALES = (2.0, 4096.0)  # shortest and longest time scale of fixed gates, in bytes


class LanguageModel(nn.Module):
    """Logits of the next byte after every byte of a sequence.

    Args of the constructor: kind, one of KINDS; size; length, T, of the sequences that are learnt;
    precision of activations, fp32 or bf16.
    """

    def __init__(
        self, kind: str, size: Size, *, length: int, precision: str, seed: int = 0
    ) -> None:
        super().__init__()
        options = {"gate": "data", "rotary": False, **KINDS[kind]}
        self.trunk = make_trunk(
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            ratio=4.0,
            cache=FURTHER * length,
            gate_bias=FIXED_SCALES if kind == "fixed" else None,
            prune=None,
            precision=precision,
            seeds=1,
            members=1,
            inputs=VOCABULARY,
            **options,
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for leaf in self.parameters():
                if leaf.dim() == 4:  # a matrix; the others are scales of norms and biases
                    leaf.copy_(STD * torch.randn(leaf.shape, generator=generator))
            self.trunk.embed.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Args: tokens [B, T] int64. Returns: logits [B, T, 256] float32."""
        x = F.one_hot(tokens, VOCABULARY)[None, None].to(self.trunk.dtype)
        start = torch.zeros(1, 1, *tokens.shape, dtype=torch.bool, device=tokens.device)
        start[..., 0] = True
        features = self.trunk(x, start)[0, 0]
        weight = self.trunk.embed.weight[0, 0]
        return (features.to(self.trunk.dtype) @ weight.T.to(self.trunk.dtype)).float()

    def losses(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of every byte but the first. Args: tokens [B, T + 1]. Returns: [B, T]."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    @property
    def attentions(self) -> list[Fox]:
        """The forgetting attentions of the layers, empty for other kinds."""
        return [part for part in self.modules() if isinstance(part, Fox)]

    def prune(self, pruning: Pruning) -> None:
        """Chooses how attention is pruned from now on; without effect on kinds without gates."""
        for attention in self.attentions if self.gated else ():
            attention.prune = None if pruning == "off" else LOG_EPS
            attention.rule = "running" if pruning == "running" else "static"

    @property
    def gated(self) -> bool:
        """Whether attention has forget gates, so that it can be pruned."""
        return any(attention.parts.gate != "none" for attention in self.attentions)

    def groups(self, decay: float) -> list[dict[str, Any]]:
        """Parameter groups of AdamW: matrices decay, scales and biases do not."""
        matrices = [leaf for leaf in self.parameters() if leaf.dim() == 4]
        others = [leaf for leaf in self.parameters() if leaf.dim() != 4]
        return [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]


class Seen(NamedTuple):
    """The gates of one layer's attention, and the tiles that it skipped, in a call of the model."""

    log_f: Tensor  # [B, T, H] natural log of the gates
    skipped: Tensor  # [H] share of the tiles up to the diagonal that were not computed


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """A context that notes what each attention of a model is given, layer by layer."""
    seen: list[Seen] = []
    original = fox_room.forgetting_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options: Any) -> Tensor:
        o, skipped = original(q, k, v, log_f, **options, return_skipped=True)
        seen.append(Seen(log_f.detach(), skipped.detach().mean(0)))
        return o

    with _replaced(noting):
        yield seen


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """A context in which attention only hands on the values, to measure its share of the time."""

    def values(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options: Any) -> Tensor:
        return v + 0.0 * (q + k)

    with _replaced(values):
        yield


@contextlib.contextmanager
def with_official(module: Any, pruning: Pruning) -> Iterator[None]:
    """A context in which the authors' operator computes attention, under the same threshold.

    Args: module, from `cerl.bench.attention.load_official`; pruning, off or static.
    """

    def official(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options: Any) -> Tensor:
        limit = None
        if pruning != "off":
            bound = options["bound"]
            if isinstance(bound, str):  # measured from q and k
                limit = "auto"
            else:
                limit = LOG_EPS - math.log(k.shape[1]) - 2.0 * bound
        return module.forgetting_attention(q, k, v, log_f, adaptive_threshold=limit)

    with _replaced(official):
        yield


@contextlib.contextmanager
def _replaced(function: Any) -> Iterator[None]:
    """A context in which the sequence network `fox` calls another function for its attention."""
    original = fox_room.forgetting_attention
    fox_room.forgetting_attention = function
    try:
        yield
    finally:
        fox_room.forgetting_attention = original


def half_lives(log_f: Tensor) -> Tensor:
    """Steps back until a row has forgotten half: the least d with f_(t-d+1) ... f_t <= 1/2.

    Args:    log_f [B, T, H].
    Returns: [B, T, H] float32; infinite where the sequence begins before that.
    """
    sums = log_f.double().cumsum(1).transpose(1, 2).contiguous()  # [B, H, T], falling with time
    # At row t the weight of row j has decayed by exp(sums[t] - sums[j]). The last j for which that
    # is at most 1/2 is the last one with -sums[j] <= -sums[t] - ln 2.
    place = torch.searchsorted(-sums, -sums - math.log(2.0), right=True) - 1  # -1: there is none
    at = torch.arange(log_f.shape[1], device=log_f.device)
    steps = torch.where(place >= 0, (at - place).float(), torch.inf)
    return steps.transpose(1, 2)
