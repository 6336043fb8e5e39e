"""The sequence network of a population: a stack of residual blocks over the rows of an episode.

A block is x + mix(norm(x)) and x + mlp(norm(x)), where `mix` is FoX's attention, softmax attention,
a recurrent unit or nothing; all kinds of one size have the same number of parameters within a few
percent, so that a comparison is one of kinds. `forward` is the call for windows, `step` that for
acting; with the window of the ring they agree row by row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cerl.data import Carry
from cerl.kernels import Impl, without_autocast
from cerl.kernels.pointwise import silu
from cerl.nets.acting import Duty, pick, project
from cerl.nets.fox import Fox
from cerl.nets.gru import Gru
from cerl.nets.layers import Linear, Projection, rms_norm
from cerl.nets.transformer import Transformer

EPS = 1e-6
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Mixing(Protocol):
    """What the kinds of mixing share: every row of an episode sees the rows before it.

    `past` is what later rows need of earlier ones; only the kind that made it looks inside.
    """

    def __call__(
        self, x: Tensor, start: Tensor, past: Any, duty: Duty | None
    ) -> tuple[Tensor, Any]:
        """Mixed rows of windows, and the past of the rows after them.

        Args: x [S, N, B, W, D]; start [S, 1 or N, B, W], the row begins an episode; past of the
              rows before, or None; duty, whose weights each of B environments takes (N is then 1).
        """
        ...

    def carry(self, streams: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """What acting remembers of no rows; every tensor leads with `streams`."""
        ...

    def step(self, x: Tensor, start: Tensor, carry: list[Tensor], duty: Duty | None) -> Tensor:
        """One row [S, N, E, 1, D] of every stream, start [S, 1, E, 1]; carry in place."""
        ...

    def refill(self, past: Any, carry: list[Tensor]) -> None:
        """Writes the carry that steps through the rows of `past` would leave."""
        ...


def make_trunk(
    *,
    kind: str,
    layers: int,
    width: int,
    heads: int,
    variant: str,
    ratio: float,
    cache: int,
    gate_bias: tuple[float, float] | None,
    prune: float | None,
    precision: str,
    seeds: int,
    members: int,
    inputs: int,
    impl: Impl = "auto",
    convs: nn.ModuleList | None = None,
) -> "Trunk":
    """A trunk from plain sizes: the only place that knows the kinds of mixing.

    Args:   kind mlp, gru, transformer or fox; heads, of attention; variant of fox, llama or pro;
            ratio, hidden units of fox's MLPs over width, of which gated units get 2/3; cache, rows
            that a row sees, its own included; gate_bias, shortest and longest time scale of fox's
            gates in steps; prune, natural log of the share of a softmax that may be skipped;
            precision fp32 or bf16, of products and activations; inputs, features of a row; impl, of
            all kernels, as in `cerl.kernels`; convs, which make features of images before a row
            comes here.
    Raises: ValueError for an unknown kind.
    """
    lead = {"seeds": seeds, "members": members, "width": width}
    fox_size = Fox.size(width, heads=heads, variant=variant)
    make: Callable[[], nn.Module] | None
    if kind == "fox":
        options = {"variant": variant, "gate_bias": gate_bias, "prune": prune, "impl": impl}
        make, size = partial(Fox, **lead, heads=heads, cache=cache, **options), fox_size
    elif kind == "transformer":
        make, size = partial(Transformer, **lead, heads=heads, cache=cache), Transformer.size(width)
    elif kind == "gru":
        make, size = partial(Gru, **lead, impl=impl), Gru.size(width)
    elif kind == "mlp":
        make, size = None, 0
    else:
        raise ValueError(f"trunk: kind must be mlp, gru, transformer or fox, got {kind!r}")
    # Each mixing has a norm in front, which counts for its size.
    spare = fox_size + width - (size + width if make else 0)
    blocks = [
        Block(
            make and make(),
            seeds=seeds,
            members=members,
            width=width,
            units=hidden(width, ratio=ratio, spare=spare),
            dtype=PRECISIONS[precision],
        )
        for _ in range(layers)
    ]
    return Trunk(
        blocks,
        seeds=seeds,
        members=members,
        inputs=inputs,
        width=width,
        dtype=PRECISIONS[precision],
        convs=convs,
    )


class Trunk(nn.Module):
    """Rows of inputs to rows of features, for every seed and member.

    Products and activations have the type `dtype` of its blocks, under autocast too.
    """

    def __init__(
        self,
        blocks: "Sequence[Block]",
        *,
        seeds: int,
        members: int,
        inputs: int,
        width: int,
        dtype: torch.dtype,
        convs: nn.ModuleList | None,
    ) -> None:
        super().__init__()
        self.convs = convs or nn.ModuleList()
        self.members, self.width, self.dtype = members, width, dtype
        self.embed = Linear(seeds, members, inputs, width)
        self.blocks = nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.ones(seeds, members, width))

    def forward(
        self, x: Tensor, start: Tensor, *, context: int = 0, past: list[Any] | None = None
    ) -> Tensor:
        """Features of the rows of windows; before a window's first row is `past`, or nothing.

        Args:    x [S, M, B, W, D_in] with M = 1 (all members see the same) or N; start [S, M, B, W]
                 bool, the row begins an episode; context: as many first rows are computed without
                 gradient, for their own features and as what later rows remember; past, an entry
                 a block, such as the states of recurrent units [S, N, B, D].
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

    @property
    def carried(self) -> int:
        """Tensors of a carry."""
        return sum(block.carried for block in self._blocks())

    def carry(self, *, seeds: int, members: int, envs: int, device: torch.device | str) -> Carry:
        """What acting remembers, as before the first row.

        Args:    members: 1 for one stream an environment (that of the member on duty), or N.
        Returns: contiguous tensors that lead with seeds * members * envs streams, layer by layer.
        """
        parts = (
            tensor
            for block in self._blocks()
            if block.mix is not None
            for tensor in block.mix.carry(seeds * members * envs, self.dtype, device)
        )
        return tuple(parts)

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        start: Tensor,
        carry: Carry,
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
        carry: Carry,
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
            for block, remembered in zip(self._blocks(), past, strict=True):
                if block.mix is not None:
                    block.mix.refill(remembered, rest[: block.carried])
                    rest = rest[block.carried :]
        return y[:, :, :, -1]

    def _rows(
        self, x: Tensor, start: Tensor, past: list[Any] | None, duty: Duty | None
    ) -> tuple[Tensor, list[Any]]:
        """Features, and each block's past for the rows that follow (None where it mixes nothing).

        Args: past, that of the rows before, an entry a block, or None.
        """
        before = past or [None] * len(self.blocks)
        after = []
        with without_autocast(x.device):
            h = self._embed(x, duty)
            for block, known in zip(self._blocks(), before, strict=True):
                kept = None
                if block.mix is not None:
                    mixed, kept = block.mix(block.inputs(h, duty), start, known, duty)
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

    def _duty(self, member: Tensor | None) -> Duty | None:
        return None if member is None or self.members == 1 else Duty.of(member, self.members)


class Block(nn.Module):
    """Mixing of rows and MLP of one layer; scales of their norms [S, N, D], 1 at the start.

    `mix` is a `Mixing`, or None.
    """

    def __init__(
        self,
        mix: nn.Module | None,
        *,
        seeds: int,
        members: int,
        width: int,
        units: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.mix = cast("Mixing | None", mix)
        self.carried = 0  # tensors of the carry
        if self.mix is not None:
            self.mix_scale = nn.Parameter(torch.ones(seeds, members, width))
            self.carried = len(self.mix.carry(1, dtype, "meta"))
        self.mlp_scale = nn.Parameter(torch.ones(seeds, members, width))
        self.up = Projection(seeds, members, width, 2 * units)
        self.down = Projection(seeds, members, units, width)

    def inputs(self, h: Tensor, duty: Duty | None) -> Tensor:
        """Normalised rows [S, N, B, W, D] for the mixing, in the type of the products."""
        return rms_norm(h, pick(self.mix_scale, duty), eps=EPS, dtype=self.dtype)

    def update(self, h: Tensor, duty: Duty | None) -> Tensor:
        """h + mlp(norm(h)), units gated by silu (Shazeer 2020, arXiv:2002.05202)."""
        x = rms_norm(h, pick(self.mlp_scale, duty), eps=EPS, dtype=self.dtype)
        gate, up = project(x, self.up.weight, duty).chunk(2, -1)
        return h + project(silu(gate) * up, self.down.weight, duty)


def hidden(width: int, *, ratio: float, spare: int) -> int:
    """Units of the MLPs, a multiple of 16.

    Args: ratio, of fox's units to the width before the 2/3 of gated units; spare, parameters that
          fox's mixing has more than this kind's, which the MLP gets instead.
    """
    fox = -(-int(width * ratio * 2.0 / 3.0) // 16) * 16
    return max(fox + 16 * round(spare / (3 * width) / 16), 16)
