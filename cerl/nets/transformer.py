"""Softmax attention with rotary positions, as a block of the trunk; the baseline of FoX.

Vaswani et al. 2017 (arXiv:1706.03762), with the rotary positions of Su et al. 2021
(arXiv:2104.09864): only the distance of two rows matters, so a ring of the last R keys is enough
for episodes of any length.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl.nets.acting import Duty, project
from cerl.nets.layers import Projection

THETA = 10000.0


class Past(NamedTuple):
    """Keys and values of earlier rows, which later rows attend to."""

    k: Tensor  # [S, N, B, W, H, Dh], rotated by the index of their row
    v: Tensor  # [S, N, B, W, H, Dh]
    start: Tensor  # [S, 1 or N, B, W]


class Transformer(nn.Module):
    """Softmax attention of every member, with heads of width Dh = D / H.

    Parameters: wide [S, N, D, 3 D], the projections to q, k and v; output [S, N, D, D].
    Args:       cache, R, the rows that a row sees, its own included.
    """

    def __init__(self, seeds: int, members: int, *, width: int, heads: int, cache: int) -> None:
        super().__init__()
        self.width, self.heads, self.cache = width, heads, cache
        self.wide = Projection(seeds, members, width, 3 * width)
        self.output = Projection(seeds, members, width, width)

    @staticmethod
    def size(width: int) -> int:
        """Number of parameters of one member."""
        return 4 * width * width

    def forward(
        self, x: Tensor, start: Tensor, past: Past | None, duty: Duty | None
    ) -> tuple[Tensor, Past]:
        """Attention of each row to itself and earlier rows, including the rows of `past`.

        Args:    x [S, N, B, W, D]; start [S, 1 or N, B, W] bool, the row begins an episode; past of
                 the rows before, or None; duty, the acting members, for which N is 1 and axis B are
                 the E environments, or None.
        Returns: [S, N, B, W, D], and the past for the rows after these.
        """
        offset = 0 if past is None else past.k.shape[3]
        q, k, v = self._inputs(x, duty)
        at = torch.arange(offset, offset + x.shape[3], device=x.device).unsqueeze(1)
        q, k = rotated(q, at), rotated(k, at)
        if past is not None:
            k, v = torch.cat([past.k, k], 3), torch.cat([past.v, v], 3)
            start = torch.cat([past.start, start], 3)
        seen = visible(start, x.shape[3], self.cache)  # [S, 1 or N, B, W, keys]
        o = self._attend(q, k, v, seen)
        return project(o.flatten(4), self.output.weight, duty), Past(k, v, start)

    def carry(self, streams: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """An empty carry of G streams, as four tensors.

        Returns: rings of rotated keys and of values [G, H, R, Dh]; rows of the episode so far [G]
                 int64, which modulo R is the place of the next key in the ring; keys that the last
                 row saw [G] int32.
        """
        shape = (streams, self.heads, self.cache, self.width // self.heads)
        rings = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        counts = (torch.zeros(streams, dtype=t, device=device) for t in (torch.int64, torch.int32))
        return [*rings, *counts]

    def step(self, x: Tensor, start: Tensor, carry: list[Tensor], duty: Duty | None) -> Tensor:
        """Attention of one new row of every stream to the rows in its ring.

        Args:    x [S, N, E, 1, D]; start [S, 1, E, 1] bool, the row begins an episode; carry as
                 `carry` made it, written in place; duty as in `forward`.
        Returns: [S, N, E, 1, D].
        """
        lead = x.shape[:3]
        ring_k, ring_v, count, length = carry
        begins = start.expand(*lead, 1).flatten()  # [G]
        count.masked_fill_(begins, 0)
        length.masked_fill_(begins, 0).add_(1).clamp_(max=self.cache)
        at = count.view(*lead, 1, 1)
        q, k, v = self._inputs(x, duty)
        q, k = rotated(q, at), rotated(k, at)
        slot = count % self.cache
        rows = slot.view(-1, 1, 1, 1).expand(-1, self.heads, 1, q.shape[5])
        for ring, new in ((ring_k, k), (ring_v, v)):
            ring.scatter_(2, rows, new.flatten(0, 2).transpose(1, 2))
        age = (slot.unsqueeze(1) - torch.arange(self.cache, device=x.device)) % self.cache
        seen = (age < length.unsqueeze(1))[:, None, None]  # [G, 1, 1, R]
        count.add_(1)
        o = F.scaled_dot_product_attention(
            q.flatten(0, 2).transpose(1, 2), ring_k, ring_v, attn_mask=seen
        )
        return project(o.transpose(1, 2).unflatten(0, lead).flatten(4), self.output.weight, duty)

    def refill(self, past: Past, carry: list[Tensor]) -> None:
        """Writes the carry that `step` would leave after the rows of `past` and none before.

        The count of rows goes on across episodes here, which changes no distance between rows.
        """
        rows = past.k.shape[3]
        kept = min(rows, self.cache)
        turn = (rows - kept) % self.cache
        for ring, all_rows in zip(carry[:2], (past.k, past.v), strict=True):
            last = all_rows[:, :, :, rows - kept :].flatten(0, 2).transpose(1, 2)
            ring[:, :, :kept] = last.roll(turn, 2)
        begins = past.start.expand(*past.k.shape[:3], -1).flatten(0, 2)  # [G, W]
        first = (begins * torch.arange(rows, device=begins.device)).amax(1)
        carry[2].fill_(rows)
        carry[3].copy_((rows - first).clamp(max=self.cache))

    def _inputs(self, x: Tensor, duty: Duty | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [S, N, B, W, H, Dh] of rows x [S, N, B, W, D]."""
        y = project(x, self.wide.weight, duty).unflatten(-1, (3, self.heads, -1))
        q, k, v = y.unbind(4)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """q, k, v [S, N, B, rows, H, Dh], seen [S, 1 or N, B, rows, keys] -> as q."""
        lead = q.shape[:3]
        if seen.shape[1] == lead[1]:
            q, k, v = (part.flatten(0, 2).transpose(1, 2) for part in (q, k, v))
            o = attention(q, k, v, seen.flatten(0, 2).unsqueeze(1))
            return o.transpose(1, 2).unflatten(0, lead)
        # All members see the same rows: members become heads, so that they share one mask.
        q, k, v = (part.permute(0, 2, 1, 4, 3, 5).flatten(2, 3).flatten(0, 1) for part in (q, k, v))
        mask = seen[:, 0].flatten(0, 1).unsqueeze(1)
        o = attention(q, k, v, mask)  # [S * B, N * H, rows, Dh]
        o = o.unflatten(1, (lead[1], self.heads)).unflatten(0, (lead[0], lead[2]))
        return o.permute(0, 2, 1, 4, 3, 5)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k' / sqrt(Dh)) v over the keys seen; repeating a run gives the same bits.

    With a mask on a GPU torch uses memory-efficient attention. In its own gradient, blocks of keys
    add their terms to a query's gradient in the order in which they finish, which differs from run
    to run; ours fixes the order. torch.compile cannot trace ours and gets torch's.

    Args:    q [B, H, rows, Dh]; k, v [B, H, keys, Dh]; seen [B, 1, rows, keys] bool, True for at
             least one key of every row.
    Returns: [B, H, rows, Dh].
    """
    own = q.is_cuda and q.shape[-1] % 8 == 0 and not torch.compiler.is_compiling()
    # For `meta` tensors torch would choose a path that stores all scores, which no GPU run does.
    if q.is_meta or (own and any(part.requires_grad for part in (q, k, v))):
        return cast(Tensor, _OneOrder.apply(q, k, v, seen))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class _OneOrder(torch.autograd.Function):
    """Memory-efficient attention whose gradient adds the terms of a query's keys in one order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        rows, keys = seen.shape[2:]
        # The kernel wants consecutive rows of the bias a multiple of 8 elements apart.
        bias = q.new_zeros(*seen.shape[:2], rows, -(-keys // 8) * 8)[..., :keys]
        bias = bias.masked_fill_(~seen, -torch.inf).expand(-1, q.shape[1], -1, -1)
        o, *about = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
        ctx.save_for_backward(q, k, v, bias, o, *about)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, o, logsumexp, seed, offset = ctx.saved_tensors
        grad, q, k, v, o = (part.transpose(1, 2) for part in (grads[0], q, k, v, o))
        found = torch.ops.aten._efficient_attention_backward(
            grad, q, k, v, bias, o, None, None, q.shape[1], k.shape[1], logsumexp, 0.0, seed,
            offset, 0, False, num_splits_key=1,
        )  # fmt: skip
        return *(part.transpose(1, 2) for part in found[:3]), None


def rotated(x: Tensor, at: Tensor) -> Tensor:
    """Turns the pairs (i, i + Dh / 2) of every head by an angle of at * THETA^(-2 i / Dh).

    Args: x [..., H, Dh]; at int64, [..., 1] broadcastable to the axes of x before the last.
    """
    half = x.shape[-1] // 2
    power = torch.arange(half, device=x.device, dtype=torch.float64) / half
    angle = at.unsqueeze(-1) * THETA**-power  # float64, since counts of steps grow large
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def visible(start: Tensor, queries: int, window: int) -> Tensor:
    """Which keys each of the last `queries` rows sees.

    A row sees the keys of its own episode up to its own key, and of these at most `window`.

    Args:    start [S, M, B, keys] bool.
    Returns: [S, M, B, queries, keys] bool.
    """
    keys = start.shape[3]
    episode = start.cumsum(3)
    j = torch.arange(keys, device=start.device)
    distance = j[keys - queries :].unsqueeze(1) - j
    near = (distance >= 0) & (distance < window)
    return near & (episode[..., keys - queries :].unsqueeze(4) == episode.unsqueeze(3))
