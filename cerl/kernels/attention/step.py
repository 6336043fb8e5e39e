"""One step of forgetting attention while acting: the cache, the definition, and the dispatch.

A step appends one key to every row of a ring of R keys and attends to what the row still sees; it
equals `forgetting_attention` on the whole sequence with window = R, position by position. Lengths
and resets live on the device, so that one CUDA graph serves every step. On CUDA it is one launch
(`step_triton.py`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.kernels import Impl, autocast_dtype, runs_triton
from cerl.kernels.attention.bounds import SLACK
from cerl.kernels.runtime.operator import operator

# Keys are pruned in blocks of this many, counted back from the newest key: part of the definition.
BLOCK = 64
NAME = "forgetting_attention_step:"


class Cache(NamedTuple):
    """What acting remembers of every batch row; all contiguous, written in place by every step.

    Keys go round the ring: a lap writes slots 0 to R - 1, and the next lap begins at slot 0 again.
    `decay` holds sums of log_f since the episode of the head or the lap began, whichever is later,
    so that sums stay small in an episode of any length. When a lap begins, the sums of the one
    before need no correction: its total stands in slot R - 1 for as long as a slot of it is left.

    All heads of a row have the same position, and the same length unless a head was reset alone.
    They are stored once a head nevertheless: the program of a head then waits for no other program.
    """

    k: Tensor  # [B, Hkv, R, D]
    v: Tensor  # [B, Hkv, R, D]
    decay: Tensor  # [B, Hq, 2, R] float32: high and low part of a sum in two floats
    norm: Tensor  # [B, Hkv] float32: largest |k| since the row began
    position: Tensor  # [B, Hkv] int32: slot of the next key
    length: Tensor  # [B, Hq] int32: keys that a head sees, at most R

    @classmethod
    def new(
        cls,
        *,
        batch: int,
        heads: int,
        key_heads: int,
        ring: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "Cache":
        """A cache in which every row is at the beginning of an episode.

        Takes 2 B R (Hkv D bytes of an element + 4 Hq) + 4 B (2 Hkv + Hq) bytes, `nbytes`.

        Args:   ring: keys that are kept, R; width: of a head, D; dtype of q, k and v.
        Raises: ValueError for sizes below 1, Hq not a multiple of Hkv, or D above 128.
        """
        sizes = dict(batch=batch, heads=heads, key_heads=key_heads, ring=ring, width=width)
        wrong = {name: size for name, size in sizes.items() if size < 1}
        if wrong:
            raise ValueError(f"Cache: sizes count from 1 on, got {wrong}")
        if heads % key_heads or width > 128:
            raise ValueError(
                "Cache: expected heads a multiple of key_heads and width at most 128, got "
                f"{heads}, {key_heads} and {width}"
            )

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            zeros(batch, key_heads, ring, width, dtype=dtype),
            zeros(batch, key_heads, ring, width, dtype=dtype),
            zeros(batch, heads, 2, ring, dtype=torch.float32),
            zeros(batch, key_heads, dtype=torch.float32),
            zeros(batch, key_heads, dtype=torch.int32),
            zeros(batch, heads, dtype=torch.int32),
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def forgetting_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    cache: Cache,
    *,
    start: Tensor,
    window: int | None = None,
    log_eps: float | None = -10.0,
    scale: float | None = None,
    check: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Appends one key to every row of `cache`, in place, and attends with one query a head.

    Query head h reads key head h // (Hq // Hkv). A key is left out, and not read, if the decay of
    the newest key of its block of 64 is below -(2 |q| max|k| |scale| + ln(keys seen)) + log_eps:
    the share of the softmax that is left out is then below exp(log_eps). Nothing is evicted before
    the ring is full. Under autocast q, k and v are cast to its type. Has no gradient.

    Args:    q [B, Hq, D]; k, v [B, Hkv, D], in the type of the cache, any strides; log_f [B, Hq]
             float32, at most 0, -inf where an episode of that head begins; start [B] bool, true
             where an episode of all heads begins; window: keys that a query sees, its own
             included, at most R and R if not given; log_eps: None reads every key that is seen.
             scale: of the products, D^-0.5 if not given; check: look for errors in the values of
             log_f too, which waits for the device; impl as in `cerl.kernels`.
    Returns: o [B, Hq, D] in the type of q.
    Raises:  ValueError for arguments that do not fit or that want a gradient.
    Source:  Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949); differs: ring, episodes, and
             a bound that is measured, since keys outlive the weights that made them.
    """
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    _check(q, k, v, log_f, cache, start)
    ring = cache.k.shape[2]
    window = ring if window is None else window
    if not 1 <= window <= ring:
        raise ValueError(
            f"{NAME} window counts steps from 1 to what the cache holds, got {window} with a cache "
            f"of {ring}; make the cache longer"
        )
    if log_eps is not None and not log_eps < 0.0:
        raise ValueError(
            f"{NAME} log_eps must be below 0, got {log_eps}; it is the log of the share of a row "
            "that may be left out, None leaves out nothing"
        )
    if check and not bool((log_f <= 0.0).all()):
        wrong = int((~(log_f <= 0.0)).sum())
        raise ValueError(
            f"{NAME} log_f must be at most 0, got {wrong} values above it or NaN; it is the log of "
            "a gate in [0, 1]"
        )
    factor: float = float(q.shape[2]) ** -0.5 if scale is None else scale
    if not runs_triton(impl, q.device):
        return definition(
            q, k, v, log_f, cache, start=start, window=window, log_eps=log_eps, scale=factor
        )
    if q.dtype == torch.float64:
        raise ValueError(
            f"{NAME} the kernel takes float32, float16 and bfloat16, got float64; cast, or pass "
            'impl="reference"'
        )
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    return _step(q, k, v, log_f, start, *cache, window, log_eps, factor)


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    cache: Cache,
    *,
    start: Tensor,
    window: int,
    log_eps: float | None,
    scale: float,
) -> Tensor:
    """What a step computes. Sums of log_f are float64, scores and softmax at least float32."""
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums, age = _append(k, v, log_f, cache, start)
    q, k, v = (x.detach().to(wide) for x in (q, cache.k, cache.v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # [B, Hq, R, D]
    seen = age < cache.length.clamp(max=window).unsqueeze(2)
    decay = sums.gather(2, age.argmin(2, keepdim=True)) - sums  # [B, Hq, R]
    if log_eps is not None:
        bound = q.float().norm(dim=2) * cache.norm.repeat_interleave(group, 1) * abs(scale)
        keys = cache.length.clamp(max=window).float()
        threshold = (log_eps - keys.log() - 2.0 * bound) * (1.0 + SLACK)
        seen = seen & ~prunable(decay, age, threshold)
    # Slots that are not seen may hold NaN, which a weight of 0 would not remove.
    k, v = (x.masked_fill(~seen.unsqueeze(3), 0.0) for x in (k, v))
    scores = (q.unsqueeze(2) * k).sum(3) * scale + decay.to(wide)
    p = scores.masked_fill(~seen, -math.inf).softmax(2)
    return (p.unsqueeze(3) * v).sum(2).to(cache.k.dtype)


def prunable(decay: Tensor, age: Tensor, threshold: Tensor) -> Tensor:
    """Keys that pruning leaves out: the newest key of their block is decayed below the threshold.

    Args:    decay, age [B, Hq, R], age 0 the newest key; threshold [B, Hq], below 0.
    Returns: bool [B, Hq, R]; false in the first block, whose newest key has not decayed.
    """
    newest = age // BLOCK * BLOCK
    slot = (age.argmin(2, keepdim=True) - newest) % age.shape[2]
    return decay.gather(2, slot) < threshold.unsqueeze(2)


def _append(
    k: Tensor, v: Tensor, log_f: Tensor, cache: Cache, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the new key, its value and its gate into the cache.

    Returns: sums of log_f up to every slot, float64 [B, Hq, R], whose differences are D wherever
             keys are seen; age of every slot in steps [B, Hq, R].
    """
    ring, group = cache.k.shape[2], log_f.shape[1] // k.shape[1]
    at = cache.position.long().unsqueeze(2)  # [B, Hkv, 1]
    for ours, new in ((cache.k, k), (cache.v, v)):
        rows = at.unsqueeze(3).expand(-1, -1, 1, k.shape[2])
        ours.scatter_(2, rows, new.detach().unsqueeze(2))
    norm = k.detach().float().norm(dim=2)
    cache.norm.copy_(cache.norm.masked_fill(start.unsqueeze(1), 0.0).maximum(norm))
    cache.position.copy_((cache.position + 1) % ring)

    length = cache.length.masked_fill(start.unsqueeze(1) | (log_f == -math.inf), 0)
    cache.length.copy_((length + 1).clamp(max=ring))
    at = at.repeat_interleave(group, 1)  # [B, Hq, 1]
    sums = cache.decay.double().sum(2)
    fresh = length.unsqueeze(2) == 0
    before = sums.gather(2, (at - 1).clamp(min=0)).masked_fill(fresh | (at == 0), 0.0)
    new = before + log_f.detach().double().unsqueeze(2).masked_fill(fresh, 0.0)
    high = new.float()
    pair = torch.stack([high, (new - high.double()).float()], 2)  # [B, Hq, 2, 1]
    cache.decay.scatter_(3, at.unsqueeze(2).expand(-1, -1, 2, 1), pair)

    slot = torch.arange(ring, device=k.device)
    # Slots after the new one belong to the lap before, whose total is in the last slot.
    total = sums[:, :, -1:]
    return sums.sub(total.masked_fill(slot <= at, 0.0)).scatter(2, at, new), (at - slot) % ring


def _check(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, cache: Cache, start: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_f)):
        raise ValueError(
            f"{NAME} has no gradient and got an argument that requires one; call it under "
            "torch.no_grad(), or use forgetting_attention"
        )
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"{NAME} expected q [B, Hq, D] and k, v [B, Hkv, D], got {list(q.shape)}, "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    (batch, heads, width), key_heads = q.shape, k.shape[1]
    if k.shape[0] != batch or k.shape[2] != width:
        raise ValueError(
            f"{NAME} q and k must share B and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if min(*q.shape, *k.shape) < 1 or heads % key_heads or width > 128:
        raise ValueError(
            f"{NAME} expected Hq a multiple of Hkv, D at most 128 and no empty axis, got q "
            f"{list(q.shape)} and k {list(k.shape)}"
        )
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if q.dtype not in kinds or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{NAME} q, k and v must share float32, float16 or bfloat16, got {q.dtype}, {k.dtype} "
            f"and {v.dtype}"
        )
    ring = cache.k.shape[2] if cache.k.dim() == 4 else 1
    expected = {
        "log_f": (log_f, (batch, heads), torch.float32),
        "start": (start, (batch,), torch.bool),
        "cache.k": (cache.k, (batch, key_heads, ring, width), q.dtype),
        "cache.v": (cache.v, (batch, key_heads, ring, width), q.dtype),
        "cache.decay": (cache.decay, (batch, heads, 2, ring), torch.float32),
        "cache.norm": (cache.norm, (batch, key_heads), torch.float32),
        "cache.position": (cache.position, (batch, key_heads), torch.int32),
        "cache.length": (cache.length, (batch, heads), torch.int32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{NAME} expected {name} {list(shape)} of {dtype}, got {list(tensor.shape)} of "
                f"{tensor.dtype}; make the cache with Cache.new for these sizes"
            )
        if name.startswith("cache") and not tensor.is_contiguous():
            raise ValueError(
                f"{NAME} {name} must be contiguous, got strides {tensor.stride()}; a cache is "
                "written in place, make it with Cache.new"
            )
    for name, tensor in {"k": k, "v": v, **{n: t[0] for n, t in expected.items()}}.items():
        if tensor.device != q.device:
            raise ValueError(
                f"{NAME} q is on {q.device} and {name} on {tensor.device}; move one of them"
            )


@operator(
    "forgetting_attention_step",
    shapes=lambda q, *rest: q.new_empty(q.shape),
    mutates=("keys", "values", "decay", "norm", "position", "length"),
)
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    norm: Tensor,
    position: Tensor,
    length: Tensor,
    window: int,
    log_eps: float | None,
    scale: float,
) -> Tensor:
    """The kernel's step; writes the six tensors of the cache, in the order of `Cache`."""
    from cerl.kernels.attention import step_triton

    return step_triton.step(
        q,
        k,
        v,
        log_f,
        start,
        keys,
        values,
        decay,
        norm,
        position,
        length,
        window=window,
        log_eps=log_eps,
        scale=scale,
        block=BLOCK,
        slack=SLACK,
    )
