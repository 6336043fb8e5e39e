"""The operator of forgetting attention and its gradient: a plan, and the kernels that it names.

Kernel files are imported when first needed, as they need Triton.
"""

import torch
from torch import Tensor

from cerl.kernels.attention.check import check_placement
from cerl.kernels.attention.plan import make_plan
from cerl.kernels.runtime.operator import operator

NAME = "forgetting_attention"


def _shapes(q, k, v, log_f, start, threshold, room, window, scale):
    batch, queries, heads, _ = q.shape
    plan = make_plan(k.shape[1], k.shape[3], k.dtype)
    o = q.new_empty(q.shape)
    lse, skipped = log_f.new_empty(batch, queries, heads), log_f.new_empty(batch, heads)
    if plan.regime == "short":
        return o, lse, skipped, log_f.new_empty(0), log_f.new_empty(0, dtype=torch.int32)
    sums = log_f.new_empty(3, batch, heads, plan.sums_length)
    left = log_f.new_empty(batch, heads, plan.left_length, dtype=torch.int32)
    return o, lse, skipped, sums, left


def _save(ctx, inputs, output) -> None:
    # The gradient needs neither threshold nor room: `left` holds what they led to.
    q, k, v, log_f, start, _, _, ctx.window, ctx.scale = inputs
    o, lse, skipped, *decay = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(skipped, *decay)
    ctx.save_for_backward(q, k, v, log_f, start, o, lse, *(decay or (None, None)))


def _gradient(ctx, do, dlse, *_):
    if do is None and dlse is None:
        return (None,) * 9
    q, k, v, log_f, start, o, lse, sums, left = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    grads = attend_backward(
        do, dlse, q, k, v, log_f, start, o, lse, sums, left, ctx.window, ctx.scale
    )
    return *grads, None, None, None, None, None


@operator(NAME, shapes=_shapes, save=_save, gradient=_gradient, results=3)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    threshold: Tensor | None,
    room: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and number of skipped tiles; then what only the gradient needs.

    Args:    as checked by `forgetting_attention`, rows of q, k and v contiguous; threshold and room
             [B, Hq] float32 contiguous; window 0 is none.
    Returns: o [B, M, Hq, D] contiguous; lse [B, M, Hq] and skipped [B, Hq] float32; sums
             [3, B, Hq, plan.sums_length] float32 and left [B, Hq, plan.left_length] int32, as
             `medium_triton.forward` or `scan_triton.prepare` makes them; the short kernels leave
             these two out.
    """
    check_placement(q, k, v)
    plan = make_plan(k.shape[1], k.shape[3], k.dtype)
    if plan.regime == "short":
        from cerl.kernels.attention import short_triton

        return short_triton.forward(q, k, v, log_f, start, window=window, scale=scale)
    if plan.regime == "medium":
        from cerl.kernels.attention import medium_triton

        return medium_triton.forward(
            q, k, v, log_f, start, threshold, plan=plan, window=window, scale=scale
        )
    from cerl.kernels.attention import long_triton

    return long_triton.forward(
        q, k, v, log_f, start, threshold, room, plan=plan, window=window, scale=scale
    )


def _backward_shapes(do, dlse, q, k, v, log_f, start, o, lse, sums, left, window, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_f))


@operator(f"{NAME}_backward", shapes=_backward_shapes, gradient_of=NAME)
def attend_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor | None,
    o: Tensor,
    lse: Tensor,
    sums: Tensor | None,
    left: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_f, contiguous, over the tiles that `left` says were visited."""
    do = do if do.stride(3) == 1 else do.contiguous()
    check_placement(do)
    plan = make_plan(k.shape[1], k.shape[3], k.dtype)
    given = do, dlse, q, k, v, log_f, start, o, lse
    if plan.regime == "short":
        from cerl.kernels.attention import short_triton

        return short_triton.backward(*given, window=window, scale=scale)
    assert sums is not None and left is not None, "the forward pass made them"
    if plan.regime == "medium":
        from cerl.kernels.attention import medium_backward_triton

        return medium_backward_triton.backward(*given, sums, left, plan=plan, scale=scale)
    from cerl.kernels.attention import long_backward_triton

    return long_backward_triton.backward(*given, sums, left, plan=plan, scale=scale)
