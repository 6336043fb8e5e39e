"""Keys and values that rows of attention leave for later rows: in windows, and in rings for acting.

A ring holds the last R keys of a stream; a stream is what one network sees of one environment, and
G counts them all. With forget gates a ring is a `Cache` of the operator, which also holds sums of
the gates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.kernels import Impl
from cerl.kernels.attention.pruning import decayed_sums
from cerl.kernels.attention.step import Cache, forgetting_attention_step
from cerl.nets.transformer import attend_ring


class Past(NamedTuple):
    """Keys, values and gates of earlier rows, which later rows attend to; G = S * N * B streams."""

    k: Tensor  # [G, W, Hkv, Dh] after shift, norm and rotation
    v: Tensor  # [G, W, Hkv, Dh] after the shift
    log_f: Tensor | None  # [G, W, H]; None without gates
    start: Tensor  # [S, 1 or N, B, W]
    # k and v [G, Hkv, Dh] of the last row, before the shift; None in a block that shifts nothing.
    raw: tuple[Tensor, Tensor] | None

    def begins(self) -> Tensor:
        """`start` of every stream, [G, W]."""
        members = len(self.k) // (self.start.shape[0] * self.start.shape[2])
        return self.start.expand(-1, members, -1, -1).flatten(0, 2)


class Ring(NamedTuple):
    """The last keys of G streams in a block without gates, where no decayed sums are needed."""

    k: Tensor  # [G, Hkv, R, Dh]
    v: Tensor  # [G, Hkv, R, Dh]
    count: Tensor  # [G] int64 rows of the episode so far, modulo R the place of the next key
    length: Tensor  # [G] int32 keys that the last row saw


class FoxCarry(NamedTuple):
    """The memory that acting keeps of G streams in a block with gates."""

    cache: Cache
    raw: tuple[Tensor, Tensor] | None  # as in `Past`
    count: Tensor | None  # [G] int64 rows of the episode so far; None without rotary positions

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "FoxCarry":
        """Names the tensors of a carry. Args: tensors, as `Fox.carry` lists them."""
        ring = len(Cache._fields)
        cache, rest = Cache(*tensors[:ring]), tensors[ring:]
        raw = (rest[0], rest[1]) if len(rest) > 1 else None
        return cls(cache, raw, rest[-1] if len(rest) % 2 else None)


def ring_step(q: Tensor, k: Tensor, v: Tensor, ring: Ring, start: Tensor) -> Tensor:
    """Appends a key to the ring of a block without gates and attends with one query, in torch.

    Args:    q [G, H, Dh]; k, v [G, Hkv, Dh]; ring, whose count is the place of the new key; start
             [G] bool, the row begins an episode.
    Returns: [G, H, Dh].
    """
    slot = ring.count % ring.k.shape[2]
    ring.length.masked_fill_(start, 0).add_(1).clamp_(max=ring.k.shape[2])
    rows = slot.view(-1, 1, 1, 1).expand(-1, k.shape[1], 1, k.shape[2])
    for held, new in ((ring.k, k), (ring.v, v)):
        held.scatter_(2, rows, new.unsqueeze(2))
    return attend_ring(q, ring.k, ring.v, slot, ring.length)


def own_ring_step(
    q: Tensor, k: Tensor, v: Tensor, ring: Ring, start: Tensor, *, impl: Impl
) -> Tensor:
    """The same by our operator, whose gates are 1; arguments as of `ring_step`."""
    (streams, heads), (key_heads, size) = q.shape[:2], ring.k.shape[1:3]

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(streams, *sizes, device=q.device)

    slot = (ring.count % size).int().unsqueeze(1).repeat(1, key_heads)
    length = ring.length.unsqueeze(1).repeat(1, heads)
    cache = Cache(ring.k, ring.v, zeros(heads, 2, size), zeros(key_heads), slot, length)
    o = forgetting_attention_step(
        q, k, v, zeros(heads), cache, start=start, log_eps=None, impl=impl
    )
    ring.length.copy_(cache.length[:, 0])
    return o


def refill(held: Cache | Ring, past: Past) -> None:
    """Writes the ring that steps would leave after the rows of `past` and none before."""
    size, rows = held.k.shape[2], past.k.shape[1]
    kept = min(rows, size)
    begins = past.begins()
    at = torch.arange(rows, device=past.k.device)
    first = (begins * at).amax(1, keepdim=True)  # [G, 1]
    length = (rows - first).clamp(max=size)
    # A ring without gates has the key of row t in slot t modulo R; one with gates starts a lap.
    turn = (rows - kept) % size if isinstance(held, Ring) else 0
    for ring, every in ((held.k, past.k), (held.v, past.v)):
        ring[:, :, :kept] = every[:, rows - kept :].transpose(1, 2).roll(turn, 2)
    if isinstance(held, Ring):
        held.count.fill_(rows)
        held.length.copy_(length[:, 0])
        return
    assert past.log_f is not None, "a cache holds sums of gates"
    sums, _ = decayed_sums(past.log_f[:, rows - kept :], begins[:, rows - kept :])
    high = sums.float()
    held.decay[:, :, 0, :kept] = high
    held.decay[:, :, 1, :kept] = (sums - high.double()).float()
    norm = past.k.float().norm(dim=3).masked_fill((at < first).unsqueeze(2), 0.0)
    held.norm.copy_(norm.amax(1))
    held.position.fill_(kept % size)
    held.length.copy_(length.expand_as(held.length))
