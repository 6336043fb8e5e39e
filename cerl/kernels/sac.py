"""The small steps of soft actor-critic between its networks: definitions, dispatch.

A squashed sample, the critics' regression and the policies' objective are each a dozen elementwise
operations and sums, and as many again backwards; on CUDA each is one launch (`soft_triton.py`),
behind custom operators, so that torch.compile traces over it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.kernels import Impl, runs_triton


def moments(raw: Tensor, *, low: float, high: float, clip: bool) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation [..., A] from a policy's output [..., 2 A].

    The latter is clipped to [low, high], or mapped into it by a tanh.
    """
    mean, raw = raw.chunk(2, -1)
    if clip:
        return mean, raw.clamp(low, high)
    return mean, low + (high - low) * (0.5 * (1.0 + torch.tanh(raw)))


def sampled(mean: Tensor, log_std: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Action of a tanh-squashed Gaussian and its log-probability.

    Args:    all [..., A]; normal, standard normal noise (0: the mode).
    Returns: [..., A] in [-1, 1], [...].
    """
    u = mean + log_std.exp() * normal
    return torch.tanh(u), density(u, log_std, normal)


def density(u: Tensor, log_std: Tensor, normal: Tensor) -> Tensor:
    """Log-density of tanh(u), u = mean + exp(log_std) normal, over the last axis.

    The Jacobian of the tanh is 2 (ln 2 - u + log sigmoid(2 u)), which stays finite where
    1 - tanh(u)^2 does not.
    """
    gaussian = -0.5 * normal.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    jacobian = 2.0 * (math.log(2.0) - u + F.logsigmoid(2.0 * u))
    return (gaussian - jacobian).sum(-1)


def squashed(
    raw: Tensor, normal: Tensor, *, low: float, high: float, clip: bool, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """`sampled` of the `moments` of a policy's output.

    Args:    raw [S, N, rows, 2 A] float32; normal [S, N, rows, A].
    Returns: action [S, N, rows, A], log-probability [S, N, rows].
    Raises:  ValueError if the shapes do not fit together, or the kernel gets other types.
    """
    if raw.dim() != 4 or (*normal.shape[:-1], 2 * normal.shape[-1]) != raw.shape:
        raise ValueError(
            f"squashed: expected noise [S, N, rows, A] for outputs [S, N, rows, 2 A] of "
            f"{list(raw.shape)}, got {list(normal.shape)}"
        )
    if not runs_triton(impl, raw.device):
        return sampled(*moments(raw, low=low, high=high, clip=clip), normal)
    _check_types("squashed", raw, normal)
    return _squashed(raw, normal, low, high, clip)


def regression(
    q: Tensor, y: Tensor, weight: Tensor, *, delta: float, impl: Impl = "auto"
) -> Tensor:
    """Mean error of every value head over the rows: squared, from the second head on maybe Huber.

    e = q - y; a head's own error is e^2, the others' 2 Huber_delta(e) = e^2 where |e| <= delta,
    2 delta |e| - delta^2 beyond.

    Args:    q [S, N, C, rows, J]; y [S, N, rows, J], no gradient; weight [S, M, rows], M is 1 or
             N, of the rows, whose sum counts as 1 at least, no gradient either; delta, 0 for e^2
             everywhere.
    Returns: [S, N, C, J].
    Raises:  ValueError if the shapes do not fit together, or the kernel gets other than float32.
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
        return _regression(q, y, weight, delta)
    return (errors(q, y, delta=delta) * normalised(weight)[:, :, None, :, None]).sum(3)


def errors(q: Tensor, y: Tensor, *, delta: float) -> Tensor:
    """Error of every row, [S, N, C, rows, J]; args as in `regression`."""
    error = q - y.unsqueeze(2)
    if not delta or q.shape[-1] == 1:
        return error.square()
    inside = error[..., 1:].abs().clamp(max=delta)
    others = inside * (2.0 * error[..., 1:].abs() - inside)
    return torch.cat([error[..., :1].square(), others], -1)


def normalised(weight: Tensor) -> Tensor:
    """weight [S, M, rows] as shares of a mean over the rows."""
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
    """What policies and temperatures descend: alpha log p - value; alpha (entropy - goal).

    Policies see alpha, and temperatures the entropy, as constants.

    Args:    q [S, N, C, rows], of which the least, or the `mean`, is the value; log_p [S, N, rows];
             log_alpha [S, N, 1]; weight as in `regression`.
    Returns: losses of policies and of temperatures; entropy and value, detached; all [S, N] means
             over the rows.
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
        return _objective(q, log_p, log_alpha, weight, goal, mean)
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


@torch.library.custom_op("cerl::squashed", mutates_args=())
def _squashed(
    raw: Tensor, normal: Tensor, low: float, high: float, clip: bool
) -> tuple[Tensor, Tensor]:
    from cerl.kernels import sac_triton

    return sac_triton.squashed(raw, normal, low=low, high=high, clip=clip)


@torch.library.custom_op("cerl::squashed_backward", mutates_args=())
def _squashed_backward(
    grad: Tensor, grad_log_p: Tensor, raw: Tensor, normal: Tensor, low: float, high: float,
    clip: bool,
) -> Tensor:  # fmt: skip
    from cerl.kernels import sac_triton

    return sac_triton.squashed_backward(
        grad, grad_log_p, raw, normal, low=low, high=high, clip=clip
    )


@torch.library.custom_op("cerl::regression", mutates_args=())
def _regression(q: Tensor, y: Tensor, weight: Tensor, delta: float) -> Tensor:
    from cerl.kernels import sac_triton

    return sac_triton.regression(q, y, weight, delta=delta)


@torch.library.custom_op("cerl::regression_backward", mutates_args=())
def _regression_backward(
    grad: Tensor, q: Tensor, y: Tensor, weight: Tensor, delta: float
) -> Tensor:
    from cerl.kernels import sac_triton

    return sac_triton.regression_backward(grad, q, y, weight, delta=delta)


@torch.library.custom_op("cerl::objective", mutates_args=())
def _objective(
    q: Tensor, log_p: Tensor, log_alpha: Tensor, weight: Tensor, goal: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cerl.kernels import sac_triton

    return sac_triton.objective(q, log_p, log_alpha, weight, goal=goal, mean=mean)


@torch.library.custom_op("cerl::objective_backward", mutates_args=())
def _objective_backward(
    grad: Tensor,
    grad_temperature: Tensor,
    temperature: Tensor,
    q: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, log_p and log_alpha."""
    from cerl.kernels import sac_triton

    return sac_triton.objective_backward(
        grad, grad_temperature, temperature, q, log_alpha, weight, mean=mean
    )


@_squashed.register_fake
def _(raw, normal, low, high, clip):
    return raw.new_empty(normal.shape), raw.new_empty(normal.shape[:-1])


@_squashed_backward.register_fake
def _(grad, grad_log_p, raw, normal, low, high, clip):
    return raw.new_empty(raw.shape)


@_regression.register_fake
def _(q, y, weight, delta):
    return q.new_empty(*q.shape[:3], q.shape[4])


@_regression_backward.register_fake
def _(grad, q, y, weight, delta):
    return q.new_empty(q.shape)


@_objective.register_fake
def _(q, log_p, log_alpha, weight, goal, mean):
    return tuple(q.new_empty(q.shape[:2]) for _ in range(4))


@_objective_backward.register_fake
def _(grad, grad_temperature, temperature, q, log_alpha, weight, mean):
    rows = (*q.shape[:2], q.shape[3])
    return q.new_empty(q.shape), q.new_empty(rows), q.new_empty(log_alpha.shape)


def _save_squashed(ctx, inputs, output) -> None:
    raw, normal, *ctx.options = inputs
    ctx.save_for_backward(raw, normal)


def _differentiate_squashed(ctx, grad, grad_log_p):
    return _squashed_backward(grad, grad_log_p, *ctx.saved_tensors, *ctx.options), *[None] * 4


def _save_regression(ctx, inputs, output) -> None:
    *tensors, ctx.delta = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_regression(ctx, grad):
    return _regression_backward(grad, *ctx.saved_tensors, ctx.delta), None, None, None


def _save_objective(ctx, inputs, output) -> None:
    q, _, log_alpha, weight, _, ctx.mean = inputs
    ctx.save_for_backward(output[1], q, log_alpha, weight)
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _differentiate_objective(ctx, grad, grad_temperature, *_):
    zero = torch.zeros_like
    grad = zero(ctx.saved_tensors[0]) if grad is None else grad
    below = zero(grad) if grad_temperature is None else grad_temperature
    grads = _objective_backward(grad, below, *ctx.saved_tensors, ctx.mean)
    return *grads, None, None, None


_squashed.register_autograd(_differentiate_squashed, setup_context=_save_squashed)
_regression.register_autograd(_differentiate_regression, setup_context=_save_regression)
_objective.register_autograd(_differentiate_objective, setup_context=_save_objective)
