"""Forgetting attention (softmax attention with a forget gate) with adaptive computation pruning.

The definition in plain torch, and the custom operators behind which the Triton kernels run. A score
is scale * q_i . k_j + D_ij with D_ij the sum of log_f over j+1..i; episodes never see each other.
Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from cerl.kernels import Impl, autocast_dtype, runs_triton, without_autocast
from cerl.kernels.attention.check import check_placement, check_pruning, check_tensors, check_values
from cerl.kernels.attention.plan import (
    FEW,
    Tiles,
    causal_tiles,
    decayed_sums,
    is_medium,
    is_short,
    nearer_tiles,
    skipped_share,
    tiles,
    visited_tiles,
)
from cerl.kernels.runtime.operator import differentiated, traced

# Makes up for float32 sums of up to 128 squares and for the rounding to float32 after them.
SLACK = 2.0**-16
AGAIN = (
    "forgetting_attention: its gradient cannot be differentiated again; call backward or grad "
    "without create_graph=True, or detach the gradient"
)


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    start: Tensor | None = None,
    window: int | None = None,
    threshold: Tensor | float | None = None,
    bound: Tensor | float | Literal["measured"] | None = None,
    log_eps: float = -10.0,
    rule: Literal["static", "running"] = "static",
    scale: float | None = None,
    check: bool = False,
    return_lse: bool = False,
    return_skipped: bool = False,
    impl: Impl = "auto",
) -> Any:
    """Causal softmax attention in which what is older than step t is scaled by exp(log_f_t).

    The queries are the last M of the N positions; query head h reads key head h // (Hq // Hkv).
    `definition` says what is computed, on the blocks that `tiles` names. Under autocast q, k and v
    are cast to its type. Decay sums are exact to 2^-46 of the largest sum of their episode. The
    gradient of log_f is 0 where an episode begins.

    Args:    q [B, M, Hq, D]; k, v [B, N, Hkv, D], all float32, float16 or bfloat16 (the definition
             also float64), D at most 128, any strides; log_f [B, N, Hq] float32, at most 0, -inf
             where an episode of that head begins (finite sums must stay in float32); start [B, N]
             bool, true where an episode of all heads begins; window: steps that a query sees, its
             own included.
             threshold: natural log; a block of scores is skipped if its largest D is below it. A
             float, or a tensor broadcastable to [B, Hq] whose positive entries count as 0.
             bound: instead of it, the largest |scale * q . k| of a head, as a float, a tensor
             broadcastable to [B, Hq] or "measured" from q and k. The share of a row that is skipped
             is then below exp(log_eps).
             rule: static decides on decays alone; running, with a bound and beyond 256 keys, also
             on what the softmax of a row sums to over its nearest keys, and skips more.
             scale: of the products, D^-0.5 if not given; check: look for errors in the values of
             log_f, threshold and bound too, which waits for the device; impl as in `cerl.kernels`.
    Returns: o [B, M, Hq, D]; or a tuple of it and what was asked: lse [B, M, Hq] float32, the
             natural log of the softmax denominators, differentiable; skipped [B, Hq] float32, the
             share of the blocks up to the diagonal that were not computed.
    Raises:  ValueError for arguments that do not fit; RuntimeError when the gradient is
             differentiated again.
    Source:  Lin et al. 2025, as above; differs: episodes, window, sums that keep their precision.
    """
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    check_tensors(q, k, v, log_f, start, window)
    use_triton = runs_triton(impl, q.device)
    if use_triton and q.dtype == torch.float64:
        raise ValueError(
            "forgetting_attention: the kernel takes float32, float16 and bfloat16, got float64; "
            'cast, or pass impl="reference"'
        )
    check_pruning(q, threshold, bound, log_eps, rule)
    if check:
        check_values(log_f, threshold, bound)
    width, keys = q.shape[3], k.shape[1]
    scale = float(width**-0.5) if scale is None else scale
    if use_triton:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    limit = room = None
    if not is_short(keys, width):
        running = rule == "running" and keys > FEW
        if isinstance(bound, str) and use_triton and not traced(q):
            limit, room = _measured_limits(q, k, log_eps, scale, running)
        else:
            if isinstance(bound, str):
                bound = _measured(q, k, scale)
            limit = _limit(q, keys, threshold, bound, log_eps, 2.0)
            room = _limit(q, keys, None, bound, log_eps, 1.0) if running else None
    if use_triton:
        attend = (
            _forward
            if traced(q)
            else _Direct.apply
            if differentiated((q, k, v, log_f))
            else _attend
        )
        options = start, limit, min(window or 0, keys), scale, room
        o, lse, skipped, *_ = attend(q, k, v, log_f, *options)
        if return_skipped:
            tile = tiles(q.shape[1], keys, width, q.dtype)
            skipped = skipped / causal_tiles(q.shape[1], keys, tile)
    else:
        tile = tiles(q.shape[1], keys, width, q.dtype)
        o, lse, skipped = definition(
            q, k, v, log_f, start=start, window=window, threshold=limit, room=room, scale=scale,
            tiles=tile,
        )  # fmt: skip
    if not (return_lse or return_skipped):
        return o
    return (o, *(x for x, wanted in ((lse, return_lse), (skipped, return_skipped)) if wanted))


def norm_bound(
    w_q: Tensor, w_k: Tensor, *, width: int, dtype: torch.dtype, scale: float | None = None
) -> Tensor:
    """Largest |scale * q . k| where q and k are rows of RMS norm w_q and w_k: a `bound`.

    A normalised row has at most the length sqrt(width) max|w|. Covers up to two roundings of each
    row to `dtype`, as of a norm computed in that type or in float32.

    Args:    w_q [..., width]; w_k [..., width], leading axes that broadcast (per head, or none; for
             grouped heads repeat w_k); dtype of the q and k that meet.
    Returns: float32, the broadcast leading axes.
    """
    if w_q.shape[-1:] != (width,) or w_k.shape[-1:] != (width,):
        raise ValueError(
            f"norm_bound: expected weights of {width} entries a row, got w_q {list(w_q.shape)} and "
            f"w_k {list(w_k.shape)}; width is that of a head"
        )
    scale = float(width**-0.5) if scale is None else abs(scale)
    largest = w_q.detach().abs().amax(-1).double() * w_k.detach().abs().amax(-1).double()
    rounded = (1.0 + torch.finfo(dtype).eps / 2.0) ** 4 * (1.0 + SLACK)
    return (largest * (width * scale * rounded)).float()


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    start: Tensor | None = None,
    window: int | None = None,
    threshold: Tensor | None = None,
    room: Tensor | None = None,
    scale: float | None = None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """What forgetting attention computes, with pruning decided on the tiles given.

    Scores and softmax of 16-bit inputs are float32, P and dS are rounded to their type before the
    products. Sums of log_f are float64 throughout.

    Args:    q [B, M, Hq, D]; k, v [B, N, Hkv, D]; log_f [B, N, Hq] float32, or float64 where q is;
             the rest as in `forgetting_attention`, threshold broadcastable to [B, Hq]; room
             [B, Hq]: the running rule too, see `nearer_tiles`.
    Returns: o [B, M, Hq, D] in q's type; lse [B, M, Hq] and skipped [B, Hq] float32, or float64.
    """
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = float(width**-0.5) if scale is None else scale
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, log_f = (_Once.apply(x) for x in (q, k, v, log_f))
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
    """Identity; the gradient is rounded to a type on its way."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


class _Once(torch.autograd.Function):
    """Identity; the gradient cannot be differentiated again, as that of the kernels cannot."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Never.apply(grad)


class _Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(AGAIN)


def _limit(
    q: Tensor,
    keys: int,
    threshold: Tensor | float | None,
    bound: Tensor | float | None,
    log_eps: float,
    times: float,
) -> Tensor | None:
    """The threshold as a float32 contiguous tensor [B, Hq], from `times` a bound rounded down."""
    if bound is not None:
        if isinstance(bound, Tensor):
            bound = bound.detach().double()
        threshold = (log_eps - math.log(keys) - times * bound) * (1.0 + SLACK)
    size = q.shape[0], q.shape[2]
    if isinstance(threshold, Tensor):
        # A bound of NaN skips nothing.
        threshold = threshold.detach().float().nan_to_num(-math.inf, math.inf, -math.inf)
        return threshold.expand(size).contiguous()
    if threshold is None:
        return None
    return torch.full(size, threshold, dtype=torch.float32, device=q.device)


def _measured_limits(
    q: Tensor, k: Tensor, log_eps: float, scale: float, running: bool
) -> tuple[Tensor, Tensor | None]:
    """The thresholds [B, Hq] of `_limit` from a measured bound, twice and (if running) once it."""
    from cerl.kernels.attention.measure_triton import measured_limits

    check_placement(q, k)
    options: dict[str, Any] = dict(log_eps=log_eps, scale=abs(scale), slack=SLACK)
    limits = measured_limits(q.detach(), k.detach(), count=1 + running, **options)
    return limits[0], limits[1] if running else None


def _measured(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Largest length of a query times that of a key, float64 [B, Hq]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    long_q, long_k = (
        torch.linalg.vector_norm(x.detach(), dim=3, dtype=wide).amax(1).double() for x in (q, k)
    )
    long_k = long_k.repeat_interleave(q.shape[2] // k.shape[2], 1)
    return long_q * long_k * (abs(scale) * (1.0 + SLACK))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    window: int,
    scale: float,
    room: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """o, lse, number of tiles not visited, and what the backward pass wants: sums, left.

    Args:    as checked by `forgetting_attention`, rows of q, k and v contiguous; window 0 is none.
    Returns: o [B, M, Hq, D] contiguous; lse [B, M, Hq] and count [B, Hq] float32; sums and left as
             `attention_scan_triton.prepare` or `attention_medium_triton.forward` makes them; not
             where the sequence is short.
    """
    check_placement(q, k, v)
    inputs = q, k, v, log_f, start, threshold
    if is_short(k.shape[1], k.shape[3]):
        from cerl.kernels.attention import short_triton

        return short_triton.forward(*inputs[:5], window=window, scale=scale)
    if is_medium(k.shape[1], k.shape[3], k.dtype):
        from cerl.kernels.attention import medium_triton

        return medium_triton.forward(*inputs, window=window, scale=scale)
    from cerl.kernels.attention import long_triton

    return long_triton.forward(*inputs, room, window=window, scale=scale)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    window: int,
    scale: float,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_attend` with sums and left always there: empty where the sequence is short."""
    o, lse, skipped, *decay = _attend(q, k, v, log_f, start, threshold, window, scale, room)
    sums, left = decay or (lse.new_empty(0), lse.new_empty(0, dtype=torch.int32))
    return o, lse, skipped, sums, left


_forward = torch.library.custom_op("cerl::forgetting_attention", _run_forward, mutates_args=())


@_forward.register_fake
def _(q, k, v, log_f, start, threshold, window, scale, room=None):
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    lse, skipped = log_f.new_empty(batch, queries, heads), log_f.new_empty(batch, heads)
    o, short = q.new_empty(q.shape), is_short(keys, width)
    medium = is_medium(keys, width, k.dtype)
    length = 320 if medium else (-(-keys // 128) + 1) * 128
    sums = log_f.new_empty(0 if short else (3, batch, heads, length))
    last = 256 if medium else length
    left = log_f.new_empty(0 if short else (batch, heads, last), dtype=torch.int32)
    return o, lse, skipped, sums, left


def _run_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    o: Tensor,
    lse: Tensor,
    decay: Tensor | None,
    left: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_f; `left` says what was skipped."""
    do = do if do.stride(3) == 1 else do.contiguous()
    check_placement(do)
    inputs = do, dlse, q, k, v, log_f, start, o, lse
    if is_short(k.shape[1], k.shape[3]):
        from cerl.kernels.attention import short_triton

        return short_triton.backward(*inputs, window=window, scale=scale)
    assert decay is not None and left is not None, "made forward"
    if is_medium(k.shape[1], k.shape[3], k.dtype):
        from cerl.kernels.attention import medium_triton

        return medium_triton.backward(*inputs, decay, left, scale=scale)
    from cerl.kernels.attention import long_backward_triton

    return long_backward_triton.backward(*inputs, decay, left, scale=scale)


_backward = torch.library.custom_op(
    "cerl::forgetting_attention_backward", _run_backward, mutates_args=()
)


@_backward.register_fake
def _(do, dlse, q, k, v, log_f, start, o, lse, decay, left, window, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_f))


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.window, ctx.scale, _ = inputs  # what the threshold led to is in `left`
    o, lse, skipped, *decay = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(skipped, *decay)
    ctx.save_for_backward(*tensors, o, lse, *(decay or (None, None)))


def _differentiate(ctx, do, dlse, *_, run: Callable[..., tuple[Tensor, ...]] = _backward):
    if do is None and dlse is None:
        return (None,) * 9
    tensors = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(tensors[5])
    grads = run(do, dlse, *tensors, ctx.window, ctx.scale)
    return *grads, None, None, None, None, None


def _save_nothing(ctx, inputs, output) -> None:
    pass


def _refuse(ctx, *grads):
    raise RuntimeError(AGAIN)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse, setup_context=_save_nothing)


class _Direct(torch.autograd.Function):
    """The operators without the dispatch of custom operators, which takes longer than launches."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _attend(*inputs)
        _save(ctx, inputs, output)
        return output[:3]

    @staticmethod
    def backward(ctx, *grads):
        # A graph of the gradient is wanted: the operator refuses to be differentiated again.
        run = _backward if torch.is_grad_enabled() else _run_backward
        return _differentiate(ctx, *grads, run=run)
