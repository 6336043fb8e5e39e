"""What forgetting attention computes, in plain torch.

    decay from key j to query i:  D_ij = log_f_(j+1) + ... + log_f_i
    score of query i and key j:   s_ij = scale * q_i . k_j + D_ij
    output of query i:            o_i = sum over j of softmax_j(s_ij) v_j

over the keys j <= i that i sees: those of its episode, of its window, and of the tiles that pruning
visits. Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949).
"""

import math

import torch
from torch import Tensor

from cerl.kernels import without_autocast
from cerl.kernels.attention.plan import Tiles
from cerl.kernels.attention.pruning import (
    decayed_sums,
    nearer_tiles,
    skipped_share,
    visited_tiles,
)
from cerl.kernels.runtime.operator import once


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    start: Tensor | None = None,
    threshold: Tensor | None = None,
    room: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forgetting attention, pruned by the static rule and, with `room`, by the running rule too.

    Sums of log_f are float64. Scores and softmax of 16-bit inputs are float32; the probabilities
    and the gradient of the scores are rounded to 16 bits before they enter a product, as in the
    kernels.

    Args:    q [B, M, Hq, D]; k, v [B, N, Hkv, D]; log_f [B, N, Hq] float32, or float64 where q is;
             the rest as in `cerl.kernels.attention.forgetting_attention`, threshold broadcastable
             to [B, Hq]; room [B, Hq] as in `nearer_tiles`; tiles that pruning skips or keeps.
    Returns: o [B, M, Hq, D] in q's type; lse [B, M, Hq], the log of the softmax denominators, and
             skipped [B, Hq], the share of the tiles that is skipped: float32, or float64.
    Raises:  RuntimeError when the gradient is differentiated again.
    """
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = float(width**-0.5) if scale is None else scale
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, log_f = (once(x, "forgetting_attention") for x in (q, k, v, log_f))
    with without_autocast(q.device):
        sums, left = decayed_sums(log_f, start, window)
        b_q, b_k, b_v = (x.transpose(1, 2).to(wide) for x in (q, k, v))
        b_k, b_v = (x.repeat_interleave(group, 1) for x in (b_k, b_v))  # [B, Hq, N, D]
        scores = _RoundedGradient.apply(b_q @ b_k.mT * scale, dtype)
        scores = scores + (sums[:, :, keys - queries :, None] - sums[:, :, None, :]).to(wide)

        mask = visited_tiles(sums.detach(), left, queries, tiles, threshold)
        if room is not None:
            mask = nearer_tiles(mask, scores.detach(), sums.detach(), left, room, tiles)
        skipped = skipped_share(mask, queries, keys, tiles).to(wide)
        mask = mask.repeat_interleave(tiles.rows, 2)[:, :, :queries]
        mask = mask.repeat_interleave(tiles.columns, 3)[..., :keys]  # [B, Hq, M, N]
        j = torch.arange(keys, device=q.device)
        i = j[keys - queries :].unsqueeze(1)
        mask = mask & (j <= i) & (j >= left[:, :, keys - queries :, None])
        scores = scores.masked_fill(~mask, -math.inf)
        p = scores.softmax(3).to(dtype).to(wide)
        o = (p @ b_v).to(dtype).transpose(1, 2)
        lse = scores.logsumexp(3).transpose(1, 2)
    return o, lse, skipped


class _RoundedGradient(torch.autograd.Function):
    """Passes x on unchanged; the gradient that comes back is rounded to a type."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None
