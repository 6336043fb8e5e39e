"""Inputs of attention in FoX's Pro block, from its one wide projection: definition and dispatch.

These steps are the shift of k and v, the norms of q and k and the logarithm of the forget gate. On
CUDA they are one launch forward and one backward (`fox_triton.py`), which read every number of the
projection once. Lin et al. 2025 (arXiv:2503.02130).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, runs_triton
from cerl.kernels.pointwise import sigmoid

EPS = 1e-5  # of the norms of q and k


class Inputs(NamedTuple):
    """Inputs of attention, and the logits of the output gate."""

    q: Tensor  # [G B, W, H, Dh]
    k: Tensor  # [G B, W, H, Dh]
    v: Tensor  # [G B, W, H, Dh]
    log_f: Tensor  # [G B, W, H] float32
    gate: Tensor | None  # [G B, W, H, Dh]; None: attention without an output gate


def fox_inputs(
    y: Tensor,
    bias: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    start: Tensor,
    before_k: Tensor | None = None,
    before_v: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Inputs:
    """Queries, keys, values and gates for the rows of G networks.

    The shift mixes k and v of a row with those of the row before, z_t <- a z_(t-1) + (1 - a) z_t,
    where z_(t-1) counts as 0 if the row begins an episode. Norms and shifts are computed in
    float32.

    Args:    y [G, B, W, P], the projection, P at least 4 D + 3 H: columns of q, k, v and the output
             gate, D = H Dh each, then the logits of forget gate, shift of k and shift of v, H each,
             then columns that are not read; bias [G, H] of the forget gate; q_scale, k_scale
             [G, H, Dh] of the norms; start [G B, W] bool, the row begins an episode; before_k,
             before_v [G B, H, Dh], k and v (not shifted) of the row before the first, None for 0,
             which get no gradient; impl as in `cerl.kernels`.
    Returns: q, k, v and gate in the type of y; log_f in float32 (float64 if y is).
    Raises:  ValueError where shapes or types do not fit together.
    """
    _check(y, bias, q_scale, k_scale, start, before_k, before_v)
    args = y, bias, q_scale, k_scale, start, before_k, before_v
    if not runs_triton(impl, y.device):
        return definition(*args)
    if y.dtype == torch.float64:
        raise ValueError(
            "fox_inputs: the kernel takes float32, float16 and bfloat16, got float64; cast, or "
            'pass impl="reference"'
        )
    from cerl.kernels import fox_triton

    return Inputs(*fox_triton.fox_inputs(*args, EPS))


def definition(
    y: Tensor,
    bias: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    start: Tensor,
    before_k: Tensor | None,
    before_v: Tensor | None,
) -> Inputs:
    """The definition in plain torch; arguments as in `fox_inputs`."""
    nets, heads, head = q_scale.shape
    parts = columns(y.flatten(0, 1), heads, head)
    q, k, v, gate = parts[:4]
    wide = torch.promote_types(y.dtype, torch.float32)

    def normed(z: Tensor, scale: Tensor) -> Tensor:
        z = F.rms_norm(z.to(wide), (head,), eps=EPS).unflatten(0, (nets, -1))
        return (z * scale[:, None, None]).to(y.dtype).flatten(0, 1)

    log_f = F.logsigmoid(parts[4].to(wide).unflatten(0, (nets, -1)) + bias[:, None, None])
    k = shifted(k, before_k, parts[5], start)
    v = shifted(v, before_v, parts[6], start).to(y.dtype)
    return Inputs(normed(q, q_scale), normed(k, k_scale), v, log_f.flatten(0, 1), gate)


def shifted(z: Tensor, before: Tensor | None, logit: Tensor, start: Tensor) -> Tensor:
    """Mixes every row with the one before it: a z_(t-1) + (1 - a) z_t, a = sigmoid(logit).

    Args:    z [X, W, H, Dh]; before [X, H, Dh], the row before the first, None for 0; logit
             [X, W, H]; start [X, W] bool: z_(t-1) of such a row counts as 0.
    Returns: [X, W, H, Dh] in at least float32.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    previous = F.pad(z[:, :-1], (0, 0, 0, 0, 1, 0))
    if before is not None:
        previous = torch.cat([before.unsqueeze(1), z[:, :-1]], 1)
    previous = previous.masked_fill(start[:, :, None, None], 0.0).to(wide)
    share = sigmoid(logit.to(wide)).unsqueeze(3)
    return z.to(wide) + share * (previous - z.to(wide))


def columns(y: Tensor, heads: int, head: int) -> list[Tensor]:
    """Splits the columns of y [..., P].

    Returns: q, k, v and gate [..., H, Dh]; logits of forget gate, shift of k and of v [..., H].
    """
    width = heads * head
    rest = y.shape[-1] - 4 * width - 3 * heads
    parts = y.split([*[width] * 4, *[heads] * 3, rest], -1)
    return [*(part.unflatten(-1, (heads, head)) for part in parts[:4]), *parts[4:7]]


def _check(
    y: Tensor,
    bias: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    start: Tensor,
    before_k: Tensor | None,
    before_v: Tensor | None,
) -> None:
    if y.dim() != 4 or q_scale.dim() != 3 or 0 in (*y.shape, *q_scale.shape):
        raise ValueError(
            "fox_inputs: expected y [G, B, W, P] and q_scale [G, H, Dh] with no empty axis, got "
            f"{list(y.shape)} and {list(q_scale.shape)}"
        )
    (nets, batch, rows, width), (_, heads, head) = y.shape, q_scale.shape
    if width < heads * (4 * head + 3):
        raise ValueError(
            f"fox_inputs: {heads} heads of {head} need {heads * (4 * head + 3)} columns of y, got "
            f"{width}"
        )
    wide = torch.promote_types(y.dtype, torch.float32)
    expected = {
        "bias": (bias, (nets, heads), wide),
        "q_scale": (q_scale, (nets, heads, head), wide),
        "k_scale": (k_scale, (nets, heads, head), wide),
        "start": (start, (nets * batch, rows), torch.bool),
        "before_k": (before_k, (nets * batch, heads, head), y.dtype),
        "before_v": (before_v, (nets * batch, heads, head), y.dtype),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(
                f"fox_inputs: expected {name} {list(shape)} of {dtype}, got {list(tensor.shape)} "
                f"of {tensor.dtype}; y is {list(y.shape)} of {y.dtype}"
            )
    if (before_k is None) != (before_v is None):
        raise ValueError("fox_inputs: got one of before_k and before_v; pass both or none")
