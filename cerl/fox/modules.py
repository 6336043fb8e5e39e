"""FoX's attention, and a block of it with a gated MLP, as modules on rows [B, T, D]."""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cerl.fox.rows import FoxCache, Rows, empty_cache
from cerl.fox.single import Single
from cerl.fox.weights import load, of_attention, of_block
from cerl.kernels import Impl, without_autocast
from cerl.nets.fox import Fox
from cerl.nets.trunk import Block

Variant = Literal["llama", "pro"]

RATIOS = {"llama": 4.0, "pro": 3.5}  # hidden units of the MLP over width, before gating
HEAD_STEP, WIDEST_HEAD = 8, 128  # heads are 8, 16, ... 128 features wide
# Rows that a row sees where no window is given: more than any sequence has.
ALL_ROWS = 2**31 - 1


class FoxAttention(nn.Module):
    """Attention with a forget gate [B, T, D] -> [B, T, D], with its projections.

    The variant `llama` has the forget gate alone. `pro` also has an output gate, norms of q, k and
    the outputs, and a shift of k and v. There are no positions besides the gates.

    Parameters, below `net`: wide.weight [D, P], to q, k, v and forget gate; in `pro` to q, k, v,
                output gate, forget gate and the shifts of k and v; bias [H] of the forget gate;
                output.weight [D, D]; in `pro` q_scale, k_scale and o_scale [H, D / H] of the norms.
                Weights are [inputs, outputs].
    Args:       width, D; heads, H; window, rows that a row sees, its own included, None for all;
                gate_scales, shortest and longest time scale of the forget gates before training in
                steps, between which heads are log-spaced; None for biases of 0, as the authors
                have; prune, natural log of the share of a softmax that may be skipped, None to
                skip nothing; impl of the kernels, as in `cerl.kernels`.
    Raises:     ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        variant: Variant = "pro",
        window: int | None = None,
        gate_scales: tuple[float, float] | None = None,
        prune: float | None = -10.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.pro, self.window = heads, variant == "pro", window
        self.net = _attention(width, heads, variant, window, gate_scales, prune, impl)
        self._single = Single(self.net)

    def forward(
        self,
        x: Tensor,
        *,
        start: Tensor | None = None,
        seq_start: Tensor | None = None,
        cache: FoxCache | None = None,
    ) -> Tensor:
        """Attention of each row to itself and to earlier rows.

        Products have the type of x, or that of autocast. With a cache a call continues after the
        rows that the cache has read, and has no gradient. The first call with a cache reads its
        rows at once; later calls read theirs one by one.

        Args:    x [B, T, D]; start [B, T] bool, the row begins a sequence, for several packed into
                 one; seq_start [B] int, as many rows on the left are padding (values on a GPU are
                 not checked): no row sees them, and their output is 0; cache, from `self.cache`.
        Returns: [B, T, D].
        Raises:  ValueError for arguments that do not fit, or if the cache is full.
        """
        rows = Rows.of(
            x,
            name="FoxAttention",
            fox=self.net,
            window=self.window,
            start=start,
            seq_start=seq_start,
            cache=cache,
        )
        graded = torch.is_grad_enabled() and cache is None
        with without_autocast(x.device), torch.set_grad_enabled(graded):
            x = x.to(rows.dtype)[None, None]
            return self._single.run(_attend, x, rows, dtype=rows.dtype)[0, 0]

    def cache(
        self,
        batch: int,
        rows: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FoxCache:
        """An empty cache for decoding.

        Args:   batch, B; rows, as many as all calls together may have (a module with a window
                keeps the last `window` rows, and takes any number); dtype of the products and
                device, those of the parameters if not given (type: that of autocast, if on).
        Raises: ValueError without rows and window.
        """
        return empty_cache(self.net, self.window, batch, rows, dtype, device)

    def load_official(self, state: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Takes the weights of the authors' `ForgettingAttentionLayer`.

        Args:   state, its state_dict; prefix of the names in it that belong to the layer, such as
                "model.layers.0.attn."; other names are not looked at.
        Raises: ValueError where weights are missing, left over or of another shape.
        """
        leaves = of_attention(state, prefix, heads=self.heads, pro=self.pro)
        load(self.net, leaves, prefix)


class FoxBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on rows [B, T, D].

    Parameters, below `net`: those of `FoxAttention` below `mix`; mix_scale and mlp_scale [D] of
                the two norms; up.weight [D, 2 I] and down.weight [I, D] of the gated MLP.
    Args:       as of `FoxAttention`; units, I, of the MLP. If not given they are the authors': 2/3
                of `width` times 4 (`llama`) or 3.5 (`pro`), up to the next multiple of 256.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        variant: Variant = "pro",
        units: int | None = None,
        window: int | None = None,
        gate_scales: tuple[float, float] | None = None,
        prune: float | None = -10.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.pro, self.window = heads, variant == "pro", window
        mix = _attention(width, heads, variant, window, gate_scales, prune, impl)
        if units is None:
            units = -(-int(width * RATIOS[variant] * 2.0 / 3.0) // 256) * 256
        sizes = dict(seeds=1, members=1, width=width, units=units)
        self.net = Block(mix, **sizes, dtype=torch.float32)
        self._single = Single(self.net)

    def forward(
        self,
        x: Tensor,
        *,
        start: Tensor | None = None,
        seq_start: Tensor | None = None,
        cache: FoxCache | None = None,
    ) -> Tensor:
        """Features of the rows; arguments and errors as of `FoxAttention.forward`.

        Returns: [B, T, D] of the type of x.
        """
        rows = Rows.of(
            x,
            name="FoxBlock",
            fox=self._fox,
            window=self.window,
            start=start,
            seq_start=seq_start,
            cache=cache,
        )
        graded = torch.is_grad_enabled() and cache is None
        with without_autocast(x.device), torch.set_grad_enabled(graded):
            return self._single.run(_block, x[None, None], rows, dtype=rows.dtype)[0, 0]

    def cache(
        self,
        batch: int,
        rows: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FoxCache:
        """An empty cache for decoding, as `FoxAttention.cache` makes it."""
        return empty_cache(self._fox, self.window, batch, rows, dtype, device)

    def load_official(self, state: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Takes the weights of the authors' `ForgettingTransformerBlock`.

        Args and errors as of `FoxAttention.load_official`, prefix such as "model.layers.0.".
        """
        leaves = of_block(state, prefix, heads=self.heads, pro=self.pro)
        load(self.net, leaves, prefix)

    @property
    def _fox(self) -> Fox:
        return cast(Fox, self.net.mix)


def _attention(
    width: int,
    heads: int,
    variant: Variant,
    window: int | None,
    gate_scales: tuple[float, float] | None,
    prune: float | None,
    impl: Impl,
) -> Fox:
    """The attention of a population of one. Raises: ValueError for options that do not fit."""
    if variant not in RATIOS:
        raise ValueError(f"variant: expected llama or pro, got {variant!r}")
    if width < 1 or heads < 1 or width % heads:
        raise ValueError(f"width: expected a multiple of heads ({heads}), got {width}")
    head = width // heads
    if head % HEAD_STEP or head > WIDEST_HEAD:
        raise ValueError(
            "heads: a head is 8, 16, 24, ... 128 features wide; expected width "
            f"{width} over heads to be one of these, got {head} with {heads} heads"
        )
    if window is not None and window < 1:
        raise ValueError(f"window counts rows from 1 on, got {window}; None for no window")
    if gate_scales is not None and not 0.0 < gate_scales[0] <= gate_scales[1]:
        raise ValueError(
            "gate_scales: expected the shortest and the longest time scale in steps, e.g. (1, "
            f"100), got {gate_scales}"
        )
    if prune is not None and not prune < 0.0:
        raise ValueError(
            f"prune must be below 0, got {prune}; it is the natural log of the share of a softmax "
            "that may be skipped, None skips nothing"
        )
    return Fox(
        1,
        1,
        width=width,
        heads=heads,
        variant=variant,
        cache=window or ALL_ROWS,
        gate_bias=gate_scales,
        prune=prune,
        impl=impl,
    )


def _attend(fox: Fox, x: Tensor, rows: Rows) -> Tensor:
    """Attention of the rows x [1, 1, B, T, D] to those of the cache and to each other."""
    cache = rows.cache
    if cache is None:
        y, _ = fox(x, rows.start, None, None)
    elif cache.rows == 0:
        y, past = fox(x, rows.start, None, None)
        fox.refill(past, cache.tensors)
        if rows.padding is not None:
            cache.forget(rows.padding.all(1))
    else:
        parts = (part.split(1, 3) for part in (x, rows.start))
        steps = [
            fox.step(row, begins, cache.tensors, None) for row, begins in zip(*parts, strict=True)
        ]
        y = torch.cat(steps, 3)
    if cache is not None:
        cache.rows += x.shape[3]
    return y if rows.padding is None else y.masked_fill(rows.padding.unsqueeze(2), 0.0)


def _block(block: Block, x: Tensor, rows: Rows) -> Tensor:
    """A whole block on rows [1, 1, B, T, D]."""
    block.dtype = rows.dtype
    x = x + _attend(cast(Fox, block.mix), block.inputs(x, None), rows)
    return block.update(x, None)
