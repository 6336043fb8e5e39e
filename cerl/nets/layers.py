"""Layers whose parameters lead with [S, N] (size 1: shared), initialisation, gradient scaling.

Activations are [S, M, rows, D] or, for convolutions, [S, M, rows, height, width, channels]:
channels last, so that a convolution is one batched matrix product over patches and its output
flattens in the order (height, width, channel). M is 1 where all members see the same input.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl import draw
from cerl.kernels.conv import conv2d


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns x; its gradient is multiplied by `factor` on the way back."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies every member's rows by its weights; all members may share the rows or the weights.

    Args:    x [S, M, rows, in]; weight [S, N, in, out]; M and N equal, or one of them 1 (shared).
    Returns: [S, max(M, N), rows, out].
    """
    seeds, inputs, rows, width = x.shape
    members, out = weight.shape[1], weight.shape[3]
    if inputs > 1 and members == 1:
        return (x.reshape(seeds, inputs * rows, width) @ weight[:, 0]).unflatten(1, (inputs, rows))
    if inputs == 1 and members > 1 and rows >= out:
        # All members' weights become one wide matrix, so that x is read once. That copies the
        # weights, which are no larger than x here.
        wide = weight.transpose(1, 2).reshape(seeds, width, members * out)
        return (x[:, 0] @ wide).unflatten(2, (members, out)).transpose(1, 2)
    return x @ weight


class Linear(nn.Module):
    """x W + b for every member. weight [S, N, in, out], bias [S, N, out].

    Args:   blocks, (outputs, gain) of the matrices that lie side by side in W, each initialised
            like a layer of its own. They have equally many outputs; a gain is that of the
            orthogonal initialisation. Without `blocks` W is one matrix, of gain sqrt(2).
    Raises: ValueError if the blocks' outputs differ, or do not sum to `fan_out`.
    """

    def __init__(
        self,
        seeds: int,
        members: int,
        fan_in: int,
        fan_out: int,
        *,
        blocks: tuple[tuple[int, float], ...] = (),
    ) -> None:
        super().__init__()
        blocks = blocks or ((fan_out, math.sqrt(2.0)),)
        if any(width * len(blocks) != fan_out for width, _ in blocks):
            raise ValueError(
                f"blocks: expected equal outputs that sum to {fan_out}, got "
                f"{[width for width, _ in blocks]}"
            )
        self.weight = nn.Parameter(torch.empty(seeds, members, fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(seeds, members, fan_out))
        self.fan_in, self.fan_out = fan_in, blocks[0][0]
        self.gains = [gain for _, gain in blocks]

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight) + self.bias.unsqueeze(-2)


class Projection(nn.Module):
    """x W for every member, in the type of x. weight [S, N, in, out]."""

    gains = [1.0]  # of the orthogonal initialisation

    def __init__(self, seeds: int, members: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seeds, members, fan_in, fan_out))
        self.fan_in, self.fan_out = fan_in, fan_out

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight.to(x.dtype))


class Critics(nn.Module):
    """x W + b for C critics of every member. weight [S, N, C, in, out], bias [S, N, C, out]."""

    gains = [math.sqrt(2.0)]  # of the orthogonal initialisation

    def __init__(self, seeds: int, members: int, critics: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seeds, members, critics, fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(seeds, members, critics, fan_out))
        self.fan_in, self.fan_out = fan_in, fan_out

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """The first `outputs` of the layer's outputs (None: all).

        Args:    x [S, M, K, rows, in]; M is 1 (all members see the same rows) or N, K is 1 (all
                 critics of a member see the same rows) or C.
        Returns: [S, N, C, rows, outputs].
        """
        return x @ self.weight[..., :outputs] + self.bias[..., :outputs].unsqueeze(-2)


class LayerNorm(nn.Module):
    """Layer normalisation for C critics of every member, over the last axis (Ba et al. 2016).

    scale and offset [S, N, C, D] are 1 and 0 before training; None where not `affine`.
    """

    def __init__(self, seeds: int, members: int, critics: int, width: int, *, affine: bool) -> None:
        super().__init__()
        shape = (seeds, members, critics, width)
        self.scale = nn.Parameter(torch.ones(shape)) if affine else None
        self.offset = nn.Parameter(torch.zeros(shape)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x [S, N, C, rows, D]."""
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        if self.scale is None or self.offset is None:
            return x
        return x * self.scale.unsqueeze(-2) + self.offset.unsqueeze(-2)


def rms_norm(x: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019), in at least float32.

    Args:    x [..., D]; scale, which broadcasts over x.
    Returns: [..., D] of `dtype`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.rms_norm(x.to(wide), x.shape[-1:], eps=eps) * scale).to(dtype)


class Conv(nn.Module):
    """2-D convolution of every member, channels last.

    weight [S, N, kernel * kernel * channels, filters] ordered (ky, kx, c); bias [S, N, filters].
    """

    gains = [math.sqrt(2.0)]  # of the orthogonal initialisation

    def __init__(
        self,
        seeds: int,
        members: int,
        *,
        channels: int,
        filters: int,
        kernel: int,
        stride: int,
        padding: str,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.fan_in, self.fan_out = channels * kernel * kernel, filters * kernel * kernel
        self.weight = nn.Parameter(torch.empty(seeds, members, self.fan_in, filters))
        self.bias = nn.Parameter(torch.empty(seeds, members, filters))

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """x [S, M, rows, h, w, c] -> [S, max(M, N), rows, h', w', filters], after a ReLU if `relu`.

        M and N are equal, or one of them is 1.
        """
        if self.padding == "same":
            x = F.pad(x, (0, 0, *self._pads(x.shape[4]), *self._pads(x.shape[3])))
        return conv2d(x, self.weight, self.bias, kernel=self.kernel, stride=self.stride, relu=relu)

    def _pads(self, size: int) -> tuple[int, int]:
        """Zeros before and after `size` cells, for an output of ceil(size / stride) cells."""
        total = max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2

    def output_size(self, size: int) -> int:
        """Cells along one side of the output for `size` cells of input."""
        if self.padding == "same":
            return math.ceil(size / self.stride)
        return (size - self.kernel) // self.stride + 1


class Heads(nn.Module):
    """Output layer with J value heads of `width` numbers each; the heads share all layers below.

    weight [S, N, in, J, width]; bias [S, N, J, width], or if `shared_bias` [S, N, J, 1], which is
    one scalar a head for all of its outputs (as in the code of Lin et al. 2024).
    """

    def __init__(
        self, seeds: int, members: int, fan_in: int, *, heads: int, width: int, shared_bias: bool
    ) -> None:
        super().__init__()
        self.fan_in, self.fan_out = fan_in, width
        self.weight = nn.Parameter(torch.empty(seeds, members, fan_in, heads, width))
        self.bias = nn.Parameter(torch.empty(seeds, members, heads, 1 if shared_bias else width))

    def forward(self, x: Tensor, heads: int) -> Tensor:
        """x [S, M, rows, in] -> the first `heads` heads [S, N, rows, heads, width]."""
        weight, bias = self.weight[..., :heads, :], self.bias[:, :, :heads]
        y = matmul(x, weight.flatten(3)).unflatten(3, weight.shape[3:])
        return y + bias.unsqueeze(2)


class ForkedHeads(nn.Module):
    """Output and last hidden layer of J value heads that share neither (ensemble.fork `both`).

    hidden [S, N, J, in, hidden], hidden_bias [S, N, J, hidden]; weight [S, N, J, hidden, width];
    bias as in `Heads`.
    """

    def __init__(
        self,
        seeds: int,
        members: int,
        fan_in: int,
        *,
        hidden: int,
        heads: int,
        width: int,
        shared_bias: bool,
    ) -> None:
        super().__init__()
        self.fan_in, self.fan_hidden, self.fan_out = fan_in, hidden, width
        self.hidden = nn.Parameter(torch.empty(seeds, members, heads, fan_in, hidden))
        self.hidden_bias = nn.Parameter(torch.empty(seeds, members, heads, hidden))
        self.weight = nn.Parameter(torch.empty(seeds, members, heads, hidden, width))
        self.bias = nn.Parameter(torch.empty(seeds, members, heads, 1 if shared_bias else width))

    def forward(self, x: Tensor, heads: int) -> Tensor:
        """x [S, M, rows, in] -> the first `heads` heads [S, N, rows, heads, width]."""
        return self.output(self.features(x, heads))

    def features(self, x: Tensor, heads: int) -> Tensor:
        """Hidden activations [S, N, heads, rows, hidden]."""
        y = x.unsqueeze(2) @ self.hidden[:, :, :heads]
        return F.relu(y + self.hidden_bias[:, :, :heads].unsqueeze(3))

    def output(self, features: Tensor) -> Tensor:
        """Hidden activations [S, N, heads, rows, hidden] -> [S, N, rows, heads, width]."""
        heads = features.shape[2]
        y = features @ self.weight[:, :, :heads] + self.bias[:, :, :heads].unsqueeze(3)
        return y.transpose(2, 3)


def _leaves(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, int, int]]:
    """Parameters of all layers of this file: name in the layer, tensor, fan-in and fan-out."""
    for module in net.modules():
        if isinstance(module, ForkedHeads):
            for name, leaf in module.named_parameters(recurse=False):
                first = name.startswith("hidden")
                fan_in = module.fan_in if first else module.fan_hidden
                yield name, leaf, fan_in, module.fan_hidden if first else module.fan_out
        elif isinstance(module, Linear | Projection | Critics | Conv | Heads):
            for name, leaf in module.named_parameters(recurse=False):
                yield name, leaf, module.fan_in, module.fan_out


@torch.no_grad()
def initialise(net: nn.Module, *, keys: Tensor, scheme: str) -> None:
    """Fills the parameters of all layers with random numbers; seeds and members draw their own.

    Other parameters, which are scales of norms and biases of forget gates, keep the values that
    their constructors gave them.

    Args:    keys [S] from `draw.seed_keys`; scheme, with U(a) for uniform numbers in [-a, a]:
             `fan_in`      weights and biases U(1/sqrt(fan_in)), the default of PyTorch and DQN Zoo
             `xavier`      weights U(sqrt(6/(fan_in+fan_out))), biases 0
             `variance`    weights U(sqrt(sqrt(3)/fan_in)), biases 0, as Dopamine's quantile network
             `orthogonal`  orthogonal weights times the layer's gain, biases 0
    Raises:  ValueError for an unknown scheme, and for `orthogonal` with Heads or ForkedHeads, which
             have no gain.
    """
    if scheme == "orthogonal":
        _orthogonal(net, keys)
        return
    for number, (name, leaf, fan_in, fan_out) in enumerate(_leaves(net)):
        if scheme == "fan_in":
            bound = 1.0 / math.sqrt(fan_in)
        elif scheme == "xavier":
            bound = math.sqrt(6.0 / (fan_in + fan_out))
        elif scheme == "variance":
            bound = math.sqrt(math.sqrt(3.0) / fan_in)
        else:
            raise ValueError(
                f"init: expected fan_in, xavier, variance or orthogonal, got {scheme!r}"
            )
        if scheme != "fan_in" and "bias" in name:
            leaf.zero_()
            continue
        u = draw.uniform(keys, draw.INIT, number, leaf.shape[1:])
        leaf.copy_((2.0 * u - 1.0) * bound)


def _orthogonal(net: nn.Module, keys: Tensor) -> None:
    """Weights with orthonormal rows or columns, times the layer's gain (Saxe et al. 2014)."""
    number = 0
    for module in net.modules():
        if isinstance(module, Heads | ForkedHeads):
            raise ValueError(
                "init: orthogonal is defined for the networks of agent sac; "
                f"got a layer {type(module).__name__}, use fan_in, xavier or variance"
            )
        if not isinstance(module, Linear | Projection | Critics | Conv):
            continue
        if not isinstance(module, Projection):
            module.bias.zero_()
        blocks = module.weight.chunk(len(module.gains), -1)
        for gain, block in zip(module.gains, blocks, strict=True):
            size = tuple(block.shape)
            tall, flat = max(size[-2:]), min(size[-2:])
            # On the CPU: a GPU's batched QR may round differently for another number of seeds.
            host = keys if keys.is_meta else keys.cpu()
            normal = draw.normal(host, draw.INIT, number, (*size[1:-2], tall, flat))
            q, r = torch.linalg.qr(normal)
            q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
            block.copy_(gain * (q if size[-2] == tall else q.mT))
            number += 1
