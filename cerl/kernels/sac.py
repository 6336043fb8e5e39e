"""The small computations of soft actor-critic between its networks: definitions and dispatch.

They are the squashed samples, the critics' regression and the policies' objective. Each is a dozen
elementwise operations and sums, and as many backward; on CUDA it is one launch forward and one
backward (`sac_triton.py`).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, runs_triton


def moments(raw: Tensor, *, low: float, high: float, clip: bool) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation [..., A] from a policy's output [..., 2 A].

    The log standard deviation is clipped to [low, high] if `clip`, else a tanh maps it there.
    """
    mean, raw = raw.chunk(2, -1)
    if clip:
        return mean, raw.clamp(low, high)
    return mean, low + (high - low) * (0.5 * (1.0 + torch.tanh(raw)))


def sampled(mean: Tensor, log_std: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Action of a tanh-squashed Gaussian and its log-probability.

    Args:    mean, log_std and normal [..., A]; normal is standard normal noise (0 gives the mode).
    Returns: action [..., A] in [-1, 1], log-probability [...].
    """
    u = mean + log_std.exp() * normal
    return torch.tanh(u), density(u, log_std, normal)


def density(u: Tensor, log_std: Tensor, normal: Tensor) -> Tensor:
    """Log-density [...] of tanh(u) for u = mean + exp(log_std) normal, summed over the last axis.

    The log of the Jacobian of the tanh is 2 (ln 2 - u + log sigmoid(2 u)), which stays finite where
    1 - tanh(u)^2 does not.
    """
    gaussian = -0.5 * normal.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    jacobian = 2.0 * (math.log(2.0) - u + F.logsigmoid(2.0 * u))
    return (gaussian - jacobian).sum(-1)


def squashed(
    raw: Tensor, normal: Tensor, *, low: float, high: float, clip: bool, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Actions from a policy's output: `sampled` of its `moments`.

    Args:    raw [S, N, rows, 2 A] float32; normal [S, N, rows, A], standard normal noise; low, high
             and clip as in `moments`; impl as in `cerl.kernels`.
    Returns: action [S, N, rows, A], log-probability [S, N, rows].
    Raises:  ValueError if the shapes do not fit together, or if the kernel gets tensors that are
             not float32.
    """
    if raw.dim() != 4 or (*normal.shape[:-1], 2 * normal.shape[-1]) != raw.shape:
        raise ValueError(
            f"squashed: expected noise [S, N, rows, A] for outputs [S, N, rows, 2 A] of "
            f"{list(raw.shape)}, got {list(normal.shape)}"
        )
    if not runs_triton(impl, raw.device):
        return sampled(*moments(raw, low=low, high=high, clip=clip), normal)
    _check_types("squashed", raw, normal)
    from cerl.kernels import sac_triton

    return sac_triton.squashed(raw, normal, low, high, clip)


def regression(
    q: Tensor, y: Tensor, weight: Tensor, *, delta: float, impl: Impl = "auto"
) -> Tensor:
    """Mean error of every value head over the rows: squared for head 0, Huber for the others.

    e = q - y. The error of head 0 is e^2, that of the others 2 Huber_delta(e): e^2 where
    |e| <= delta, 2 delta |e| - delta^2 beyond. The mean weights rows by weight / max(sum of the
    weights, 1).

    Args:    q [S, N, C, rows, J]; y [S, N, rows, J] and weight [S, M, rows], M is 1 or N, get no
             gradient; delta, 0 for e^2 in all heads; impl as in `cerl.kernels`.
    Returns: [S, N, C, J].
    Raises:  ValueError if the shapes do not fit together, or if the kernel gets tensors that are
             not float32.
    """
    seeds, members, _, rows, heads = q.shape
    own, shared = (seeds, members, rows), (seeds, 1, rows)
    if y.shape != (*own, heads) or weight.shape not in (own, shared):
        raise ValueError(
            f"regression: values [S, N, C, rows, J] of {list(q.shape)} need targets "
            f"{[seeds, members, rows, heads]} and weights {[seeds, '1 or N', rows]}, got "
            f"{list(y.shape)} and {list(weight.shape)}"
        )
    if runs_triton(impl, q.device):
        _check_types("regression", q, y, weight)
        from cerl.kernels import sac_triton

        return sac_triton.regression(q, y, weight, delta)
    return (errors(q, y, delta=delta) * normalised(weight)[:, :, None, :, None]).sum(3)


def errors(q: Tensor, y: Tensor, *, delta: float) -> Tensor:
    """Error of every head in every row, [S, N, C, rows, J]; arguments as in `regression`."""
    error = q - y.unsqueeze(2)
    if not delta or q.shape[-1] == 1:
        return error.square()
    inside = error[..., 1:].abs().clamp(max=delta)
    others = inside * (2.0 * error[..., 1:].abs() - inside)
    return torch.cat([error[..., :1].square(), others], -1)


def normalised(weight: Tensor) -> Tensor:
    """weight [S, M, rows] divided by its sum over the rows, or by 1 where that is smaller."""
    return weight / weight.sum(2, keepdim=True).clamp(min=1.0)


def objective(
    q: Tensor,
    log_p: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    *,
    goal: float,
    mean: bool,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of policies, alpha log p - value, and of temperatures, alpha (entropy - goal).

    Neither loss passes a gradient to the other's parameters: the policies' loss treats alpha as a
    constant, the temperatures' loss the entropy.

    Args:    q [S, N, C, rows]: the value is the least over the critics, or if `mean` their mean;
             log_p [S, N, rows]; log_alpha [S, N, 1]; weight as in `regression`; goal, the entropy
             to keep in nats; impl as in `cerl.kernels`.
    Returns: losses of policies and of temperatures; entropy and value, detached. All are means over
             the rows, [S, N].
    Raises:  as `regression`.
    """
    seeds, members, _, rows = q.shape
    own, shared = (seeds, members, rows), (seeds, 1, rows)
    small = log_alpha.shape == (seeds, members, 1)
    if log_p.shape != own or not small or weight.shape not in (own, shared):
        raise ValueError(
            f"objective: values [S, N, C, rows] of {list(q.shape)} need log-probabilities "
            f"{list(own)}, log temperatures {[seeds, members, 1]} and weights "
            f"{[seeds, '1 or N', rows]}, got {list(log_p.shape)}, {list(log_alpha.shape)} and "
            f"{list(weight.shape)}"
        )
    if runs_triton(impl, q.device):
        _check_types("objective", q, log_p, log_alpha, weight)
        from cerl.kernels import sac_triton

        return sac_triton.objective(q, log_p, log_alpha, weight, goal, mean)
    value, alpha, weight = q.mean(2) if mean else q.amin(2), log_alpha.exp(), normalised(weight)
    actor = ((alpha.detach() * log_p - value) * weight).sum(2)
    entropy = -(log_p.detach() * weight).sum(2)
    temperature = alpha[..., 0] * (entropy - goal)
    return actor, temperature, entropy, (value.detach() * weight).sum(2)


def _check_types(what: str, *tensors: Tensor) -> None:
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise ValueError(
            f"{what}: the kernel takes float32, got {', '.join(str(t.dtype) for t in tensors)}; "
            'convert them, or use impl="reference"'
        )
