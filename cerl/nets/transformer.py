"""Softmax attention of rows without gates, by torch, and rotary positions.

Vaswani et al. 2017 (arXiv:1706.03762), with the rotary positions of Su et al. 2021
(arXiv:2104.09864): only the distance of two rows matters, so a ring of the last R keys is enough
for episodes of any length. The encoder `transformer` is a block of `cerl/nets/fox.py` without
gates and with these positions.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

THETA = 10000.0


def attend_rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of the rows of windows. Members that see the same rows share one mask.

    Args:    q [S, N, B, rows, H, Dh]; k, v [S, N, B, keys, Hkv, Dh], H a multiple of Hkv; seen
             [S, 1 or N, B, rows, keys] bool.
    Returns: [S, N, B, rows, H, Dh].
    """
    lead, heads = q.shape[:3], q.shape[4]
    k, v = (_repeated(part, heads, 4) for part in (k, v))
    if seen.shape[1] == lead[1]:
        q, k, v = (part.flatten(0, 2).transpose(1, 2) for part in (q, k, v))
        o = attention(q, k, v, seen.flatten(0, 2).unsqueeze(1))
        return o.transpose(1, 2).unflatten(0, lead)
    # All members see the same rows: members become heads, so that they share one mask.
    q, k, v = (part.permute(0, 2, 1, 4, 3, 5).flatten(2, 3).flatten(0, 1) for part in (q, k, v))
    mask = seen[:, 0].flatten(0, 1).unsqueeze(1)
    o = attention(q, k, v, mask)  # [S * B, N * H, rows, Dh]
    o = o.unflatten(1, (lead[1], heads)).unflatten(0, (lead[0], lead[2]))
    return o.permute(0, 2, 1, 4, 3, 5)


def attend_ring(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, length: Tensor) -> Tensor:
    """Softmax attention of one query of every stream to the newest keys of its ring.

    Args:    q [G, H, Dh]; k, v [G, Hkv, R, Dh]; slot [G], where the newest key is; length [G], how
             many keys are seen, the newest one included.
    Returns: [G, H, Dh].
    """
    ring, heads = k.shape[2], q.shape[1]
    k, v = (_repeated(part, heads, 1) for part in (k, v))
    age = (slot.unsqueeze(1) - torch.arange(ring, device=q.device)) % ring
    seen = (age < length.unsqueeze(1))[:, None, None]  # [G, 1, 1, R]
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=seen).squeeze(2)


def _repeated(x: Tensor, heads: int, axis: int) -> Tensor:
    """Repeats each key head for all query heads that read it."""
    group = heads // x.shape[axis]
    return x if group == 1 else x.repeat_interleave(group, axis)


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


def rotated(at: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Turns the pairs (i, i + Dh / 2) of every head by an angle of at * THETA^(-2 i / Dh).

    Args:    at int64, [..., 1] broadcastable to the axes of rows before the last; rows
             [..., H, Dh] each, such as queries and keys.
    Returns: the rows, turned.
    """
    half = rows[0].shape[-1] // 2
    power = torch.arange(half, device=at.device, dtype=torch.float64) / half
    angle = at.unsqueeze(-1) * THETA**-power  # float64, since counts of steps grow large
    cos, sin = angle.cos().float(), angle.sin().float()
    found = []
    for x in rows:
        a, b = x.float().chunk(2, -1)
        found.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype))
    return tuple(found)


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
