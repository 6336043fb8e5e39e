"""The sequence network of a population: a stack of residual blocks over the rows of an episode.

A block is x + mix(norm(x)) followed by x + mlp(norm(x)), where `mix` is FoX's attention, softmax
attention, a recurrent unit or nothing. For one width all kinds have the same number of parameters
within a few percent, so that they can be compared. `forward` runs over windows (learning), `step`
over one new row (acting); a row gets the same features from both if they read the same rows before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from cerl.data import Carry
from cerl.kernels import Impl, without_autocast
from cerl.kernels.pointwise import silu
from cerl.nets.acting import Duty, pick, project
from cerl.nets.fox import Fox
from cerl.nets.gru import Gru
from cerl.nets.layers import Linear, Projection, rms_norm
from cerl.nets.parts import Gate, Parts

EPS = 1e-6
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Mixing(Protocol):
    """The contract of all kinds of mixing, in which a row uses earlier rows of its episode.

    `past` holds what later rows need of earlier ones; only the kind that made it reads it.
    """

    def __call__(
        self, x: Tensor, start: Tensor, past: Any, duty: Duty | None
    ) -> tuple[Tensor, Any]:
        """Mixed rows of windows, and the past for the rows after them.

        Args: x [S, N, B, W, D]; start [S, 1 or N, B, W] bool, the row begins an episode; past of
              the rows before, or None; duty, the acting members, for which N is 1 and axis B are
              the E environments, or None.
        """
        ...

    def carry(self, streams: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """The empty recurrent state for acting; every tensor leads with `streams`."""
        ...

    def step(self, x: Tensor, start: Tensor, carry: list[Tensor], duty: Duty | None) -> Tensor:
        """Mixes one new row of every stream; `carry` is written in place.

        Args:    x [S, N, E, 1, D]; start [S, 1, E, 1] bool; duty as in a call.
        Returns: [S, N, E, 1, D].
        """
        ...

    def refill(self, past: Any, carry: list[Tensor]) -> None:
        """Writes the carry that `step` would leave after the rows of `past`."""
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
    gate: Gate = "data",
    without: Sequence[str] = (),
    rotary: bool = False,
    key_heads: int = 0,
    rule: Literal["static", "running"] = "static",
    attention: Literal["own", "torch"] = "own",
) -> "Trunk":
    """A trunk from plain sizes: the only place that knows the kinds of mixing.

    Args:   kind mlp, gru, transformer or fox; heads, of attention; variant of fox, llama or pro;
            ratio, hidden units of fox's MLPs over width before gating, which leaves 2/3 of them;
            cache, rows that a row sees, its own included; gate_bias, shortest and longest time
            scale of fox's forget gates in steps; prune, natural log of the share of a softmax that
            fox may skip (None: nothing); precision fp32 or bf16, of products and activations;
            inputs, numbers of a token; impl of the kernels, as in `cerl.kernels`; convs, which
            belong to the trunk but are run by its reader, before a token comes here; gate,
            without, rotary, key_heads and rule, of fox, and attention, of blocks without gates,
            as in `Fox`.
    Raises: ValueError for an unknown kind.
    """
    lead = {"seeds": seeds, "members": members, "width": width}
    whole = Parts.of(variant, gate="data", rotary=False, without=())
    fox_size = Fox.size(width, heads=heads, key_heads=heads, parts=whole)
    make: Callable[[], nn.Module] | None
    if kind in ("fox", "transformer"):
        if kind == "transformer":
            variant, gate, without, rotary, key_heads = "llama", "none", (), True, 0
            gate_bias = prune = None
        chosen = {"gate": gate, "rotary": rotary, "without": without}
        size = Fox.size(
            width, heads=heads, key_heads=key_heads or heads, parts=Parts.of(variant, **chosen)
        )
        chosen |= {"variant": variant, "gate_bias": gate_bias, "prune": prune, "rule": rule}
        chosen |= {"key_heads": key_heads, "attention": attention, "impl": impl}
        make = partial(Fox, **lead, heads=heads, cache=cache, **chosen)
    elif kind == "gru":
        make, size = partial(Gru, **lead, impl=impl), Gru.size(width)
    elif kind == "mlp":
        make, size = None, 0
    else:
        raise ValueError(f"trunk: kind must be mlp, gru, transformer or fox, got {kind!r}")
    # The norm in front of a mixing has `width` parameters, which count as the mixing's.
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
    """Turns rows of tokens into rows of features, for every seed and member.

    Products and activations have the type `dtype`, also under autocast.
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
        """Features of the rows of windows.

        Args:    x [S, M, B, W, D_in] with M = 1 (all members see the same) or N; start [S, M, B, W]
                 bool, the row begins an episode; context, how many first rows are computed without
                 gradient, neither for their features nor through later rows; past of the rows
                 before the window, one entry a block, such as the state of a recurrent unit
                 [S, N, B, D], or None if there are none.
        Returns: [S, N, B, W, D] float32.
        Raises:  ValueError if no row is left after the context.
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
        """Number of tensors in a carry."""
        return sum(block.carried for block in self._blocks())

    def carry(self, *, seeds: int, members: int, envs: int, device: torch.device | str) -> Carry:
        """The empty recurrent state for acting, before any row.

        Args:    members: 1 for one stream an environment (that of its acting member), or N.
        Returns: contiguous tensors that lead with seeds * members * envs streams, block by block.
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

        Args:    x [S, 1 or N, E, D_in]; start [S, E] bool, the row begins an episode; carry as
                 `carry` made it, with members = 1 if `member` is given; member [S, E] int64, the
                 acting members, or None for streams of all members.
        Returns: [S, 1, E, D] of the acting members, or [S, N, E, D].
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
        """Writes the carry that `step` would leave after these rows, with the present weights.

        Rows before the first one count as absent.

        Args:    x [S, 1 or N, E, W, D_in]; start [S, 1, E, W] bool; carry as in `step`, or () if
                 only the features are wanted; member as in `step`.
        Returns: features of the last row, as `step` returns them.
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
        """Features, and the past of each block for the rows that follow (None without a mixing).

        Args: past of the rows before, one entry a block, or None; duty, the acting members or None.
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

    @torch.no_grad()
    def measured(self, x: Tensor, start: Tensor) -> list[dict[str, Tensor]]:
        """What every block of attention measures of the rows of windows (`cerl/nets/gates.py`).

        Args:    x [S, M, B, W, D_in] and start [S, M, B, W], as in `forward`.
        Returns: {name: [S, N, H]} of every block; {} where its mixing is not attention.
        """
        found = []
        with without_autocast(x.device):
            h = self._embed(x, None)
            for block in self._blocks():
                gauges: dict[str, Tensor] = {}
                if isinstance(block.mix, Fox):
                    mixed, gauges = block.mix.measured(block.inputs(h, None), start)
                    h = h + mixed
                elif block.mix is not None:
                    h = h + block.mix(block.inputs(h, None), start, None, None)[0]
                found.append(gauges)
                h = block.update(h, None)
        return found

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
    """One layer of a trunk: mixing of rows, then an MLP, each behind an RMS norm.

    The scales of the norms [S, N, D] are 1 before training. `mix` is a `Mixing`, or None.
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
        self.carried = 0  # number of tensors in the carry
        if self.mix is not None:
            self.mix_scale = nn.Parameter(torch.ones(seeds, members, width))
            self.carried = len(self.mix.carry(1, dtype, "meta"))
        self.mlp_scale = nn.Parameter(torch.ones(seeds, members, width))
        self.up = Projection(seeds, members, width, 2 * units)
        self.down = Projection(seeds, members, units, width)

    def inputs(self, h: Tensor, duty: Duty | None) -> Tensor:
        """The mixing's input: normalised rows [S, N, B, W, D] in the type of the products."""
        return rms_norm(h, pick(self.mix_scale, duty), eps=EPS, dtype=self.dtype)

    def update(self, h: Tensor, duty: Duty | None) -> Tensor:
        """h + mlp(norm(h)), units gated by silu (Shazeer 2020, arXiv:2002.05202)."""
        x = rms_norm(h, pick(self.mlp_scale, duty), eps=EPS, dtype=self.dtype)
        gate, up = project(x, self.up.weight, duty).chunk(2, -1)
        return h + project(silu(gate) * up, self.down.weight, duty)


def hidden(width: int, *, ratio: float, spare: int) -> int:
    """Hidden units of a block's gated MLP, a multiple of 16.

    Args: ratio, hidden units of fox's MLPs over width before gating, which leaves 2/3 of them as in
          LLaMA; spare, how many more parameters fox's mixing has than this kind's. The MLP gets
          that many more, so that all kinds are equally large.
    """
    fox = -(-int(width * ratio * 2.0 / 3.0) // 16) * 16
    return max(fox + 16 * round(spare / (3 * width) / 16), 16)
