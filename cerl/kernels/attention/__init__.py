"""Forgetting attention: softmax attention with a forget gate, and pruning of what the gate forgot.

`forgetting_attention` is for whole sequences with gradients; `step.forgetting_attention_step` for
acting, one step at a time. Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949). The room:

    definition.py             what is computed, in plain torch
    pruning.py                sums of the gates, and the rules by which tiles of scores are skipped
    bounds.py                 thresholds of pruning from bounds on q . k
    measure_triton.py           the same from measured q and k, in one launch
    check.py                  what is refused, with messages that say why
    plan.py                   which kernels run for given sizes, on which tiles, with which buffers
    operator.py               the operator of torch and its gradient, which run the plan's kernels:
      short_triton.py           up to 128 keys: a program holds a whole head
      medium_triton.py          up to 256 keys of 16 bits, in one launch forward
      medium_backward_triton.py   and one launch backward
      scan_triton.py            any length: scans of the gates, forward and back
      long_triton.py              output
      long_backward_triton.py     gradients of q, k and v
      launch.py, rows_triton.py what several kernels share: table entries; loads and stores of rows
    step.py, step_triton.py   one step while acting, with a ring of keys
    official.py               the signature of the authors' operator, with padding on the left

Words: `left` of a position is the first key that it sees or visits; a `limit` is a threshold, one
number a batch row and head; `room` is the limit of the running rule (`pruning.nearer_tiles`); a
decayed sum is the sum of log_f since an episode began, and D_ij a difference of two of them.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cerl.kernels import Impl, autocast_dtype, runs_triton
from cerl.kernels.attention import definition
from cerl.kernels.attention.bounds import limit_of, measured_bound, measured_limits, norm_bound
from cerl.kernels.attention.check import check_pruning, check_tensors, check_values
from cerl.kernels.attention.operator import attend
from cerl.kernels.attention.plan import make_plan
from cerl.kernels.attention.pruning import causal_tiles
from cerl.kernels.runtime.operator import traced

__all__ = ["forgetting_attention", "norm_bound"]


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
    `definition.forgetting_attention` says what is computed, on the tiles of the plan. Under
    autocast q, k and v are cast to its type. Decay sums are exact to 2^-46 of the largest sum of
    their episode. The gradient of log_f is 0 where an episode begins.

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
    plan = make_plan(keys, width, q.dtype)
    scale = float(width**-0.5) if scale is None else scale
    if use_triton:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))

    limit = room = None
    if plan.regime != "short":
        running = rule == "running" and not plan.few
        if isinstance(bound, str) and use_triton and not traced(q):
            limit, room = measured_limits(q, k, log_eps=log_eps, scale=scale, running=running)
        else:
            if isinstance(bound, str):
                bound = measured_bound(q, k, scale)
            limit = limit_of(q, keys, threshold=threshold, bound=bound, log_eps=log_eps, times=2.0)
            if running:
                room = limit_of(q, keys, bound=bound, log_eps=log_eps, times=1.0)

    if use_triton:
        given = start, limit, room, min(window or 0, keys), scale
        o, lse, skipped = attend(q, k, v, log_f, *given)[:3]
        if return_skipped:
            skipped = skipped / causal_tiles(q.shape[1], keys, plan.tiles)
    else:
        o, lse, skipped = definition.forgetting_attention(
            q,
            k,
            v,
            log_f,
            start=start,
            threshold=limit,
            room=room,
            window=window,
            scale=scale,
            tiles=plan.tiles,
        )
    if not (return_lse or return_skipped):
        return o
    return (o, *(x for x, wanted in ((lse, return_lse), (skipped, return_skipped)) if wanted))
