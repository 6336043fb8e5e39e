"""Forgetting attention under the signature of the authors' own operator.

`forgetting_attention` takes the arguments of the function of that name in the package
`forgetting_transformer` of Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949), so that a
program that calls theirs calls ours after one changed import. The kernel is the one behind
`cerl.kernels.attention.forgetting_attention`, which has more options.
"""

from typing import Literal

import torch
from torch import Tensor

from cerl.kernels import Impl
from cerl.kernels import attention as own
from cerl.kernels.runtime.operator import traced

NAME = "forgetting_attention:"
LOG_EPS = -10.0  # natural log of the share of a softmax that "auto" may skip


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_fgate: Tensor,
    *,
    head_first: bool = False,
    seq_start: Tensor | None = None,
    sm_scale: float | None = None,
    adaptive_threshold: Tensor | float | Literal["auto"] | None = None,
    check: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Causal attention with a forget gate; the queries are the last M of the N positions.

    A batch whose sequences have different lengths is padded on the left: of sequence b, positions
    before seq_start[b] are padding. No later query sees them; outputs and gradients there are 0.
    Their q, k and v must be finite, while log_fgate may hold anything there.

    Args:    q [B, M, H, D]; k, v [B, N, H, D], or with fewer heads, of which H is a multiple; all
             float32, float16 or bfloat16, with D at most 128; log_fgate [B, N, H] float32, at most
             0.
             head_first: the tensors are [B, H, M, D], [B, H, N, D] and [B, H, N] instead.
             seq_start: [B] int32 or int64, from 0 to N.
             sm_scale: factor of q . k, D^-0.5 if not given.
             adaptive_threshold: natural log; blocks of scores whose decays all lie below it are
             skipped. A float, a tensor that broadcasts to [B, H], or "auto": the largest value for
             which each row skips a share of its softmax of at most exp(-10), by measured q and k.
             check: read seq_start, the threshold and log_fgate on a GPU too in order to find values
             out of range, which waits for the device. Values on the CPU are always looked at.
             impl: as in `cerl.kernels`.
    Returns: o like q. With head_first it is a transposed view of [B, M, H, D].
    Raises:  ValueError for arguments that do not fit, for values that are out of range.
    Source:  the authors' operator; differs: float32, any D up to 128 and grouped heads are taken, a
             threshold is rounded so that it never skips more than it says.
    """
    _check(q, k, v, log_fgate, head_first)
    if head_first:
        q, k, v, log_fgate = (x.transpose(1, 2) for x in (q, k, v, log_fgate))
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    _check_threshold(adaptive_threshold, batch, heads, check=check)

    start = padding = None
    if seq_start is not None:
        check_starts(seq_start, batch, keys, check=check)
        at = torch.arange(keys, device=q.device)
        first = seq_start.to(q.device).unsqueeze(1)
        start, padding = at == first, at < first  # [B, N]
        log_fgate = log_fgate.masked_fill(padding.unsqueeze(2), 0.0)

    auto = isinstance(adaptive_threshold, str)
    o = own.forgetting_attention(
        q,
        k,
        v,
        log_fgate,
        start=start,
        threshold=None if auto else adaptive_threshold,
        bound="measured" if auto else None,
        log_eps=LOG_EPS,
        scale=sm_scale,
        check=check or _readable(log_fgate),
        impl=impl,
    )
    if padding is not None:
        o = o.masked_fill(padding[:, keys - queries :, None, None], 0.0)
    return o.transpose(1, 2) if head_first else o


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device and without a compiler."""
    return x.device.type == "cpu" and not traced(x)


def _check(q: Tensor, k: Tensor, v: Tensor, log_fgate: Tensor, head_first: bool) -> None:
    """Sizes and types of the tensors, named in the order of axes in which they were given."""
    rows, gates = ("B, H, {}, D", "B, H, {}") if head_first else ("B, {}, H, D", "B, {}, H")
    order = (
        f"axes were read as [{rows.format('time')}]; if they are in the other order, pass "
        f"head_first={not head_first}"
    )
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or log_fgate.dim() != 3:
        raise ValueError(
            f"{NAME} expected q [{rows.format('M')}], k and v [{rows.format('N')}] and log_fgate "
            f"[{gates.format('N')}], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)} and "
            f"{list(log_fgate.shape)}"
        )
    time, head = (2, 1) if head_first else (1, 2)
    batch, heads, queries, keys = q.shape[0], q.shape[head], q.shape[time], k.shape[time]
    if k.shape[0] != batch or k.shape[3] != q.shape[3] or heads % max(k.shape[head], 1):
        raise ValueError(
            f"{NAME} q and k must share B and D, and H of q must be a multiple of H of k, got q "
            f"{list(q.shape)} and k {list(k.shape)}; {order}"
        )
    if queries > keys:
        raise ValueError(
            f"{NAME} the queries are the last M of the N positions, got M = {queries} and N = "
            f"{keys}; {order}"
        )
    wanted = (batch, heads, keys) if head_first else (batch, keys, heads)
    if log_fgate.shape != wanted:
        raise ValueError(
            f"{NAME} expected log_fgate [{gates.format('N')}] = {list(wanted)}, got "
            f"{list(log_fgate.shape)}; {order}"
        )
    if log_fgate.dtype != torch.promote_types(q.dtype, torch.float32):
        raise ValueError(
            f"{NAME} log_fgate must be float32, got {log_fgate.dtype}; compute it as "
            "logsigmoid(logit.float())"
        )
    if q.shape[3] > 128:
        raise ValueError(
            f"{NAME} a head may be at most 128 wide, got D = {q.shape[3]}; use more, narrower heads"
        )


def _check_threshold(
    threshold: Tensor | float | str | None, batch: int, heads: int, *, check: bool
) -> None:
    name = f"{NAME} adaptive_threshold"
    if isinstance(threshold, str):
        if threshold != "auto":
            raise ValueError(f"{name} must be 'auto', a number or a tensor, got {threshold!r}")
        return
    if threshold is None:
        return
    wrong = "it is the natural log of a factor below which scores are dropped, e.g. -40.0"
    if not isinstance(threshold, Tensor):
        if not threshold <= 0.0:
            raise ValueError(f"{name} must be at most 0, got {threshold}; {wrong}")
        return
    try:
        fits = torch.broadcast_shapes(threshold.shape, (batch, heads)) == (batch, heads)
    except RuntimeError:
        fits = False
    if not fits or not threshold.is_floating_point():
        raise ValueError(
            f"{name} must be of floats and broadcast to [B, H] = {[batch, heads]}, got "
            f"{list(threshold.shape)} of {threshold.dtype}"
        )
    if (check or _readable(threshold)) and not bool((threshold <= 0.0).all()):
        raise ValueError(f"{name} must be at most 0, got {threshold.tolist()}; {wrong}")


def check_starts(
    seq_start: Tensor, batch: int, keys: int, *, check: bool = False, name: str = NAME
) -> None:
    """Refuses a `seq_start` of another shape or type, or one that counts more than there is.

    Args:   keys, positions of a sequence; check, look at values on a GPU too; name of the function
            that was called, with which the message begins.
    Raises: ValueError.
    """
    if seq_start.shape != (batch,) or seq_start.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} seq_start must be int32 or int64 of [B] = {[batch]}, got "
            f"{list(seq_start.shape)} of {seq_start.dtype}; it holds how many positions on the "
            "left of each sequence are padding"
        )
    if check or _readable(seq_start):
        wrong = (seq_start < 0) | (seq_start > keys)
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            raise ValueError(
                f"{name} seq_start must lie between 0 and the {keys} positions of a sequence, got "
                f"{int(seq_start[row])} for sequence {row}; it counts the padding on the left"
            )
