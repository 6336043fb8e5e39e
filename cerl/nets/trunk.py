"""The sequence network of a population: a stack of residual blocks over the rows of an episode.

A block is x + mix(norm(x)) and x + mlp(norm(x)), where `mix` is FoX's attention, softmax attention,
a recurrent unit or nothing; all kinds of one size have the same number of parameters within a few
percent, so that a comparison is one of kinds. `forward` is the call for windows, `step` that for
acting; with the window of the ring they agree row by row.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cerl.kernels import Impl, without_autocast
from cerl.kernels.pointwise import silu
from cerl.nets.acting import Duty, pick, project
from cerl.nets.fox import Fox
from cerl.nets.gru import Gru
from cerl.nets.layers import Linear, Projection, rms_norm
from cerl.nets.transformer import Transformer

EPS = 1e-6
KINDS = ("mlp", "gru", "transformer", "fox")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrunkOptions(NamedTuple):
    """Size and kind of a trunk; what a kind does not have is ignored, but counts for its size."""

    kind: str  # mlp | gru | transformer | fox
    layers: int
    width: int
    heads: int
    variant: str  # of fox: llama | pro
    ratio: float  # fox's hidden units of an MLP / width, before the 2/3 of gated units
    cache: int  # rows that a row sees, its own included: the ring of acting, the window of learning
    gate_bias: tuple[float, float] | None  # shortest and longest time scale in steps
    prune: float | None  # natural log of the share of a softmax that may be skipped
    precision: str  # fp32 | bf16: products and activations of the blocks


class Trunk(nn.Module):
    """Rows of inputs to rows of features, for every seed and member.

    The precision is that of the options, under autocast too.

    Args:   inputs: features of a row; impl, of all kernels, as in `cerl.kernels`; convs, which make
            features of images before a row comes here (`cerl.nets.tokens.tokens_of`).
    Raises: ValueError for options that do not fit together.
    """

    def __init__(
        self,
        options: TrunkOptions,
        *,
        seeds: int,
        members: int,
        inputs: int,
        impl: Impl = "auto",
        convs: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        check(options)
        self.convs = convs or nn.ModuleList()
        self.options, self.members, self.width = options, members, options.width
        self.dtype = PRECISIONS[options.precision]
        self.embed = Linear(seeds, members, inputs, options.width)
        blocks = (
            Block(options, seeds=seeds, members=members, impl=impl) for _ in range(options.layers)
        )
        self.blocks = nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.ones(seeds, members, options.width))

    def forward(
        self, x: Tensor, start: Tensor, *, context: int = 0, past: list[Any] | None = None
    ) -> Tensor:
        """Features of the rows of windows; before a window's first row is `past`, or nothing.

        Args:    x [S, M, B, W, D_in] with M = 1 (all members see the same) or N; start [S, M, B, W]
                 bool, the row begins an episode; context: as many first rows are computed without
                 gradient, for their own features and as what later rows remember; past, an entry
                 a layer, such as the states of recurrent units [S, N, B, D].
        Returns: [S, N, B, W, D] float32.
        """
        if not 0 <= context < x.shape[3]:
            raise ValueError(
                f"trunk: context must leave rows of the window to learn from, got {context} of "
                f"{x.shape[3]} rows"
            )
        if context == 0:
            return self._rows(x, start, past, None)[0]
        with torch.no_grad():
            first, past = self._rows(x[:, :, :, :context], start[..., :context], past, None)
        rest, _ = self._rows(x[:, :, :, context:], start[..., context:], past, None)
        return torch.cat([first, rest], 3)

    def carry(
        self, *, seeds: int, members: int, envs: int, device: torch.device | str
    ) -> tuple[Tensor, ...]:
        """What acting remembers, as before the first row.

        Args:    members: 1 for one stream an environment (that of the member on duty), or N.
        Returns: contiguous tensors that lead with seeds * members * envs streams, layer by layer.
        """
        parts = (
            tensor
            for block in self._mixing()
            for tensor in block.mix.carry(seeds * members * envs, self.dtype, device)
        )
        return tuple(parts)

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        start: Tensor,
        carry: tuple[Tensor, ...],
        *,
        member: Tensor | None = None,
    ) -> Tensor:
        """Features of one new row of every stream; `carry` is written in place.

        Args:    x [S, 1 or N, E, D_in]; start [S, E] bool, the stream begins anew; carry from
                 `carry`, of one member where `member` is given and of all where not; member [S, E]
                 int64, on duty.
        Returns: [S, 1, E, D] of the member on duty, or [S, N, E, D].
        """
        duty = self._duty(member)
        begins, rest = start[:, None, :, None], list(carry)
        with without_autocast(x.device):
            h = self._embed(x.unsqueeze(3), duty)
            for block in self._blocks():
                if block.mix is not None:
                    own, rest = rest[: block.carried], rest[block.carried :]
                    h = h + block.mix.step(block.inputs(h, duty), begins, own, duty)
                h = block.update(h, duty)
            return self._normed(h, duty).squeeze(3)

    @torch.no_grad()
    def refill(
        self,
        x: Tensor,
        start: Tensor,
        carry: tuple[Tensor, ...],
        *,
        member: Tensor | None = None,
    ) -> Tensor:
        """Writes the carry that steps through the last rows would leave with today's weights.

        Args:    x [S, 1 or N, E, W, D_in]; start [S, 1, E, W]; carry and member as in `step`, or no
                 carry where only the features are wanted. What came before the first row is absent.
        Returns: features of the last row, as `step`.
        """
        duty = self._duty(member)
        y, past = self._rows(x, start, None, duty)
        if carry:
            rest = list(carry)
            for block, remembered in zip(self._mixing(), past, strict=True):
                block.mix.refill(remembered, rest[: block.carried])
                rest = rest[block.carried :]
        return y[:, :, :, -1]

    def _rows(
        self, x: Tensor, start: Tensor, past: list[Any] | None, duty: Duty | None
    ) -> tuple[Tensor, list[Any]]:
        """Features of rows behind `past`, and what later rows need of all: an entry a mixing."""
        before = iter(past or [None] * len(self.blocks))
        after = []
        with without_autocast(x.device):
            h = self._embed(x, duty)
            for block in self._blocks():
                if block.mix is not None:
                    mixed, kept = block.mix(block.inputs(h, duty), start, next(before), duty)
                    h = h + mixed
                    after.append(kept)
                h = block.update(h, duty)
            return self._normed(h, duty), after

    def _embed(self, x: Tensor, duty: Duty | None) -> Tensor:
        x = x.to(self.embed.weight.dtype)
        return project(x, self.embed.weight, duty) + pick(self.embed.bias, duty)

    def _normed(self, h: Tensor, duty: Duty | None) -> Tensor:
        return rms_norm(h, pick(self.scale, duty), eps=EPS, dtype=torch.float32)

    def _blocks(self) -> "list[Block]":
        return cast("list[Block]", list(self.blocks))

    def _mixing(self) -> "list[Block]":
        return [block for block in self._blocks() if block.mix is not None]

    def _duty(self, member: Tensor | None) -> Duty | None:
        return None if member is None or self.members == 1 else Duty.of(member, self.members)


class Block(nn.Module):
    """Mixing of rows and MLP of one layer; scales of their norms [S, N, D], 1 at the start."""

    def __init__(self, options: TrunkOptions, *, seeds: int, members: int, impl: Impl) -> None:
        super().__init__()
        width, heads, units = options.width, options.heads, hidden(options)
        self.dtype = PRECISIONS[options.precision]
        self.mix: Any = None
        if options.kind == "fox":
            self.mix = Fox(
                seeds,
                members,
                width=width,
                heads=heads,
                variant=options.variant,
                cache=options.cache,
                gate_bias=options.gate_bias,
                prune=options.prune,
                impl=impl,
            )
        elif options.kind == "transformer":
            self.mix = Transformer(seeds, members, width=width, heads=heads, cache=options.cache)
        elif options.kind == "gru":
            self.mix = Gru(seeds, members, width=width, impl=impl)
        if self.mix is not None:
            self.mix_scale = nn.Parameter(torch.ones(seeds, members, width))
            self.carried = len(self.mix.carry(1, self.dtype, "meta"))
        self.mlp_scale = nn.Parameter(torch.ones(seeds, members, width))
        self.up = Projection(seeds, members, width, 2 * units)
        self.down = Projection(seeds, members, units, width)

    def inputs(self, h: Tensor, duty: Duty | None) -> Tensor:
        """What is mixed: normalised rows [S, N, B, W, D] in the type of the products."""
        return rms_norm(h, pick(self.mix_scale, duty), eps=EPS, dtype=self.dtype)

    def update(self, h: Tensor, duty: Duty | None) -> Tensor:
        """h + mlp(norm(h)), units gated by silu (Shazeer 2020, arXiv:2002.05202)."""
        x = rms_norm(h, pick(self.mlp_scale, duty), eps=EPS, dtype=self.dtype)
        gate, up = project(x, self.up.weight, duty).chunk(2, -1)
        return h + project(silu(gate) * up, self.down.weight, duty)


def hidden(options: TrunkOptions) -> int:
    """Units of the MLPs, a multiple of 16; of other kinds as many as make them fox's size."""
    fox = -(-int(options.width * options.ratio * 2.0 / 3.0) // 16) * 16
    spare = _mixing_size(options._replace(kind="fox")) - _mixing_size(options)
    return max(fox + 16 * round(spare / (3 * options.width) / 16), 16)


def parameters(options: TrunkOptions, inputs: int) -> int:
    """Parameters of one member."""
    width = options.width
    layer = _mixing_size(options) + 3 * width * hidden(options) + width
    return (inputs + 2) * width + options.layers * layer


def _mixing_size(options: TrunkOptions) -> int:
    """Parameters of a layer besides its MLP, the norm in front included."""
    d, heads = options.width, options.heads
    if options.kind == "fox":
        pro = d * d + 2 * d * heads + 3 * d if options.variant == "pro" else 0
        return 4 * d * d + (d + 1) * heads + d + pro
    return {"transformer": 4 * d * d + d, "gru": 6 * d * d + 5 * d, "mlp": 0}[options.kind]


def check(options: TrunkOptions) -> None:
    """Raises ValueError for options that no trunk has."""

    def refuse(name: str, expected: str, what: str = "") -> None:
        raise ValueError(f"trunk: {name} must be {expected}, got {getattr(options, name)!r}{what}")

    if options.kind not in KINDS:
        refuse("kind", "mlp, gru, transformer or fox")
    if options.variant not in ("llama", "pro"):
        refuse("variant", "llama or pro")
    if options.precision not in PRECISIONS:
        refuse("precision", "fp32 or bf16")
    for name in ("layers", "width", "heads", "cache"):
        if getattr(options, name) < 1:
            refuse(name, "1 or more")
    if not options.ratio > 0.0:
        refuse("ratio", "above 0")
    if options.prune is not None and not options.prune < 0.0:
        refuse("prune", "below 0, the log of a share, or None")
    if options.gate_bias is not None and not 0.0 < options.gate_bias[0] <= options.gate_bias[1]:
        refuse("gate_bias", "the shortest and the longest time scale in steps, or None")
    if options.width % options.heads:
        refuse("width", f"a multiple of heads = {options.heads}")
    head = options.width // options.heads
    if options.kind in ("transformer", "fox") and (head % 8 or head > 128):
        refuse("heads", "such that a head is 8, 16, ... 128 wide", f", heads {head} wide")
