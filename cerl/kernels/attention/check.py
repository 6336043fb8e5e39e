"""What forgetting attention refuses: ValueErrors that say what, expected, got, what to do."""

import math

import torch
from torch import Tensor

NAME = "forgetting_attention:"
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, start: Tensor | None, window: int | None
) -> None:
    """Shapes, types and devices of the tensors, and the window."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"{NAME} expected q [B, M, Hq, D] and k, v [B, N, Hkv, D], got {list(q.shape)}, "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    (batch, queries, heads, width), (key_batch, keys, key_heads, key_width) = q.shape, k.shape
    if key_batch != batch or key_width != width:
        raise ValueError(
            f"{NAME} q and k must share B and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if min(batch, queries, heads, width, keys, key_heads) < 1:
        raise ValueError(f"{NAME} an axis is empty: q {list(q.shape)}, k {list(k.shape)}")
    if width > 128:
        raise ValueError(f"{NAME} heads may be 128 wide, got D = {width}; use more heads")
    if queries > keys:
        raise ValueError(
            f"{NAME} the queries are the last M of N positions, got M = {queries} > N = {keys}"
        )
    if heads % key_heads:
        raise ValueError(
            f"{NAME} Hq must be a multiple of Hkv, got Hq = {heads} and Hkv = {key_heads}"
        )
    if log_f.shape != (batch, keys, heads):
        raise ValueError(
            f"{NAME} expected log_f [B, N, Hq] = {[batch, keys, heads]}, got {list(log_f.shape)}"
        )
    if start is not None and (start.shape != (batch, keys) or start.dtype != torch.bool):
        raise ValueError(
            f"{NAME} expected start [B, N] = {[batch, keys]} of torch.bool, got "
            f"{list(start.shape)} of {start.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{NAME} window counts steps from 1 on, got {window}; None for no window")
    dtype, device = q.dtype, q.device
    if dtype not in KINDS or not dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{NAME} q, k and v must share float32, float16 or bfloat16, got {q.dtype}, {k.dtype} "
            f"and {v.dtype}"
        )
    if log_f.dtype != torch.float32 and not log_f.dtype == dtype == torch.float64:
        raise ValueError(f"{NAME} log_f must be float32, got {log_f.dtype}; cast it")
    for other, tensor in (("k", k), ("v", v), ("log_f", log_f), ("start", start)):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{NAME} q is on {q.device} and {other} on {tensor.device}; move one of them"
            )


def check_pruning(
    q: Tensor,
    threshold: Tensor | float | None,
    bound: Tensor | float | str | None,
    log_eps: float,
    rule: str,
) -> None:
    """What pruning is asked for: one threshold or bound, in range, of a shape that fits."""
    if rule not in ("static", "running"):
        raise ValueError(f"{NAME} rule must be static or running, got {rule!r}")
    if rule == "running" and bound is None:
        raise ValueError(
            f"{NAME} rule='running' needs a bound, got none; it compares what a row has summed up "
            "with what the rest can add"
        )
    if threshold is not None and bound is not None:
        raise ValueError(f"{NAME} got threshold and bound; pass one of them")
    if not log_eps < 0.0:
        raise ValueError(
            f"{NAME} log_eps must be below 0, got {log_eps}; it is the log of the share of a row "
            "that may be skipped"
        )
    if isinstance(bound, str) and bound != "measured":
        raise ValueError(f"{NAME} bound must be a float, a tensor or 'measured', got {bound!r}")
    if not (threshold is None or isinstance(threshold, Tensor) or threshold <= 0.0):
        raise ValueError(
            f"{NAME} threshold must be at most 0, got {threshold}; it is the log of a factor below "
            "which scores are dropped"
        )
    if not (bound is None or isinstance(bound, str | Tensor) or 0.0 <= bound < math.inf):
        raise ValueError(
            f"{NAME} bound is the largest |scale * q . k|, at least 0 and finite, got {bound}"
        )
    size = q.shape[0], q.shape[2]
    for what, tensor in (("threshold", threshold), ("bound", bound)):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != q.device:
            raise ValueError(
                f"{NAME} q is on {q.device} and {what} on {tensor.device}; move one of them"
            )
        fits = tensor.dim() <= 2 and all(
            given in (1, wanted)
            for given, wanted in zip(tensor.shape[::-1], size[::-1], strict=False)
        )
        if not fits or not tensor.is_floating_point():
            raise ValueError(
                f"{NAME} {what} must be of floats and broadcast to [B, Hq] = {list(size)}, got "
                f"{list(tensor.shape)} of {tensor.dtype}"
            )


def check_values(
    log_f: Tensor, threshold: Tensor | float | None, bound: Tensor | float | str | None
) -> None:
    """The values inside tensors, which have to be read back from the device."""
    if not bool((log_f <= 0.0).all()):
        wrong = int((~(log_f <= 0.0)).sum())
        raise ValueError(
            f"{NAME} log_f must be at most 0, got {wrong} values above it or NaN, the largest "
            f"{float(log_f.max())}; it is the log of a gate in [0, 1]"
        )
    if isinstance(threshold, Tensor) and not bool((threshold <= 0.0).all()):
        raise ValueError(f"{NAME} threshold must be at most 0, got {threshold.tolist()}")
    if isinstance(bound, Tensor) and not bool(((bound >= 0.0) & (bound < math.inf)).all()):
        raise ValueError(f"{NAME} bound must be at least 0 and finite, got {bound.tolist()}")


def check_placement(*tensors: Tensor) -> None:
    """Where tensors [B, time, H, D] are: on the current device, with offsets of 32 bits."""
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"{NAME} kernels run on the current device, cuda:{torch.cuda.current_device()}, "
            f"got tensors on {device}; call it under torch.cuda.device({device.index})"
        )
    for x in tensors:
        (_, time, heads, width), (_, s_t, s_h, _) = x.shape, x.stride()
        reach = max((time - 1) * s_t + (heads - 1) * s_h + width, time * heads * width)
        if reach >= 2**31:
            raise ValueError(
                f"{NAME} offsets within a batch row are 32 bits wide, got a tensor of "
                f"{list(x.shape)} with strides {list(x.stride())}; make it contiguous, or use "
                "fewer steps or heads a call"
            )
