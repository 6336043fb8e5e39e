"""The rows of one call of a plain module: their marks, and the cache that they go to."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from cerl.kernels import autocast_dtype
from cerl.kernels.attention.official import check_starts
from cerl.nets.fox import Fox
from cerl.nets.rings import FoxCarry


@dataclass
class FoxCache:
    """Keys, values and gates of the rows that a module has read, for decoding; written in place.

    Made by `FoxAttention.cache` or `FoxBlock.cache`, one for each layer.
    """

    tensors: list[Tensor]  # as of `cerl.nets.rings.FoxCarry`
    size: int  # rows that it holds
    rows: int = 0  # rows that were read so far, counted by the host

    def forget(self, sequences: Tensor) -> None:
        """Empties the cache of some sequences. Args: sequences [B] bool."""
        held = FoxCarry.of(self.tensors)
        held.cache.length.masked_fill_(sequences.unsqueeze(1), 0)
        for raw in held.raw or ():
            raw.masked_fill_(sequences[:, None, None], 0.0)


@dataclass
class Rows:
    """The rows of one call: their marks, the cache they go to, and the type of the products."""

    start: Tensor  # [1, 1, B, T] bool
    padding: Tensor | None  # [B, T] bool
    cache: FoxCache | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        x: Tensor,
        *,
        name: str,
        fox: Fox,
        window: int | None,
        start: Tensor | None,
        seq_start: Tensor | None,
        cache: FoxCache | None,
    ) -> "Rows":
        """Checks the arguments of a call.

        Args:   name of the class that was called, for messages; fox, its attention; window, rows
                that a row sees, or None for all; the others as in `FoxAttention.forward`.
        Raises: ValueError for arguments that do not fit.
        """
        name = f"{name}:"
        if x.dim() != 3 or x.shape[2] != fox.width or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"{name} expected x [B, T, D] of floats with D = {fox.width}, got "
                f"{list(x.shape)} of {x.dtype}"
            )
        batch, length, _ = x.shape
        if start is not None and (start.shape != (batch, length) or start.dtype != torch.bool):
            raise ValueError(
                f"{name} expected start [B, T] = {[batch, length]} of torch.bool, got "
                f"{list(start.shape)} of {start.dtype}"
            )
        dtype = autocast_dtype(x.device) or x.dtype
        if cache is not None:
            _check_cache(name, cache, fox, window, x, dtype)
        begins = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
        begins = begins if start is None else begins | start
        padding = None
        if seq_start is not None:
            if cache is not None and cache.rows:
                raise ValueError(
                    f"{name} seq_start counts padding before the first row, and this cache has "
                    f"read {cache.rows} rows; pass it with the first call only"
                )
            check_starts(seq_start, batch, length, name=name)
            at, first = torch.arange(length, device=x.device), seq_start.to(x.device).unsqueeze(1)
            begins, padding = begins | (at == first), at < first
        return cls(begins[None, None], padding, cache, dtype)


def empty_cache(
    fox: Fox,
    window: int | None,
    batch: int,
    rows: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> FoxCache:
    """The cache of a module with the attention `fox`, as `FoxAttention.cache` describes it."""
    size = window or rows
    if size is None or size < 1 or batch < 1:
        raise ValueError(
            f"cache: expected the sequences of a batch and their rows, both from 1 on, got {batch} "
            f"and {rows}; rows may be left out only by a module with a window"
        )
    weight = fox.output.weight
    place = torch.device(weight.device if device is None else device)
    kind = dtype or autocast_dtype(place) or weight.dtype
    if kind not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"cache: a cache holds float32, float16 or bfloat16, got {kind}")
    # A carry has as many rows as its module sees, which without a window are too many to keep.
    sized = copy.copy(fox)
    sized.cache = size
    return FoxCache(sized.carry(batch, kind, place), size)


def _check_cache(
    name: str, cache: FoxCache, fox: Fox, window: int | None, x: Tensor, dtype: torch.dtype
) -> None:
    batch, length, _ = x.shape
    keys = cache.tensors[0]  # [B, H, size, D / H]
    if keys.shape[:2] != (batch, fox.heads) or keys.dtype != dtype or keys.device != x.device:
        raise ValueError(
            f"{name} this cache holds {list(keys.shape)} of {keys.dtype} on {keys.device}; "
            f"expected [{batch}, {fox.heads}, ...] of {dtype} on {x.device}; make it with "
            "`cache` of this module"
        )
    if window is None and cache.rows + length > cache.size:
        raise ValueError(
            f"{name} this cache has place for {cache.size} rows, has read {cache.rows} and was "
            f"given {length} more; make a larger one"
        )
