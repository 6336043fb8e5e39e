"""FoX: attention with a forget gate, as a block of the trunk, in its variants LLaMA and Pro.

Lin et al. 2025 (arXiv:2503.02130), pruned as in arXiv:2504.06949. Gate, shift and attention never
reach back across the start of an episode. `forward` takes the rows of windows. `step` takes one new
row of every stream and keeps the last R keys in a ring, which it writes in place. In both a row
sees at most R rows, so they give the same output.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl.kernels import Impl
from cerl.kernels.attention import forgetting_attention, norm_bound
from cerl.kernels.attention.pruning import decayed_sums
from cerl.kernels.attention.step import Cache, forgetting_attention_step
from cerl.kernels.fox import Inputs, fox_inputs
from cerl.kernels.pointwise import sigmoid
from cerl.nets.acting import Duty, networks, pick, project
from cerl.nets.layers import Projection, rms_norm

OUTPUT_EPS = 1e-6


class Past(NamedTuple):
    """Keys, values and gates of earlier rows, which later rows attend to; G = S * N * B streams."""

    k: Tensor  # [G, W, H, Dh] after shift and norm
    v: Tensor  # [G, W, H, Dh] after the shift
    log_f: Tensor  # [G, W, H]
    start: Tensor  # [G, W]
    raw_k: Tensor  # [G, H, Dh] of the last row, before the shift
    raw_v: Tensor  # [G, H, Dh]


class FoxCarry(NamedTuple):
    """What acting remembers of G streams; raw_k and raw_v exist only in the variant `pro`."""

    cache: Cache
    raw_k: Tensor | None  # [G, H, Dh] of the last row, before the shift
    raw_v: Tensor | None  # [G, H, Dh]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "FoxCarry":
        """Names the tensors of a carry. Args: tensors, as `Fox.carry` lists them."""
        ring = len(Cache._fields)
        return cls(Cache(*tensors[:ring]), *(tensors[ring:] or (None, None)))

    @property
    def before(self) -> tuple[Tensor, Tensor] | None:
        """raw_k and raw_v together; None in the variant without a shift."""
        return None if self.raw_k is None or self.raw_v is None else (self.raw_k, self.raw_v)


class Fox(nn.Module):
    """Forgetting attention of every member, with heads of width Dh = D / H.

    The variant `llama` has the forget gate alone. `pro` also has an output gate, norms of q, k and
    the outputs, and a shift of k and v, which mixes each row with the row before.

    Parameters: wide, the projections that lie side by side: to q, k, v and the forget gate's logits
                [S, N, D, 3 D + H]; in `pro` to q, k, v, the output gate's logits and the logits of
                forget gate, shift of k and shift of v [S, N, D, 4 D + 3 H];
                bias [S, N, H] of the forget gate (`gate_biases`); output [S, N, D, D];
                in `pro` q_scale, k_scale and o_scale [S, N, H, Dh] of the norms.
    Args:       cache, R, the rows that a row sees, its own included; gate_bias, shortest and
                longest time scale of the forget gates in steps, None for biases of 0; prune,
                natural log of the share of a softmax that may be skipped, None to skip nothing.
    """

    def __init__(
        self,
        seeds: int,
        members: int,
        *,
        width: int,
        heads: int,
        variant: str,
        cache: int,
        gate_bias: tuple[float, float] | None,
        prune: float | None,
        impl: Impl,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.pro = width, heads, variant == "pro"
        self.cache, self.prune = cache, prune
        self.impl: Impl = impl
        columns = [*[width] * 4, *[heads] * 3] if self.pro else [*[width] * 3, heads]
        self.columns = columns
        self.wide = Projection(seeds, members, width, sum(columns))
        self.output = Projection(seeds, members, width, width)
        self.bias = nn.Parameter(gate_biases(heads, gate_bias).repeat(seeds, members, 1))
        if self.pro:
            shape = (seeds, members, heads, width // heads)
            self.q_scale = nn.Parameter(torch.ones(shape))
            self.k_scale = nn.Parameter(torch.ones(shape))
            self.o_scale = nn.Parameter(torch.ones(shape))

    @staticmethod
    def size(width: int, *, heads: int, variant: str) -> int:
        """Number of parameters of one member."""
        pro = width * width + 2 * width * heads + 3 * width if variant == "pro" else 0
        return 4 * width * width + (width + 1) * heads + pro

    def forward(
        self, x: Tensor, start: Tensor, past: Past | None, duty: Duty | None
    ) -> tuple[Tensor, Past]:
        """Attention of each row to itself and earlier rows, including the rows of `past`.

        Args:    x [S, N, B, W, D]; start [S, 1 or N, B, W] bool, the row begins an episode; past of
                 the rows before, or None; duty, the acting members, for which N is 1 and axis B are
                 the E environments, or None.
        Returns: [S, N, B, W, D], and the past for the rows after these.
        """
        lead = x.shape[:3]
        begins = start.expand(*lead, -1).flatten(0, 2)  # [G, W]
        before = None if past is None else (past.raw_k, past.raw_v)
        inputs, raw = self._inputs(x, begins, before, duty)
        k, v, log_f = inputs.k, inputs.v, inputs.log_f
        if past is not None:
            k, v = torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)
            log_f, begins = torch.cat([past.log_f, log_f], 1), torch.cat([past.start, begins], 1)
        o = forgetting_attention(
            inputs.q,
            k,
            v,
            log_f,
            start=begins,
            window=self.cache,
            bound=self._bound(inputs.q, duty),
            log_eps=-10.0 if self.prune is None else self.prune,
            impl=self.impl,
        )
        y = self._outputs(o.unflatten(0, lead), inputs.gate, duty)
        return y, Past(k, v, log_f, begins, *raw)

    def carry(self, streams: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """An empty carry: a ring of every stream and, in `pro`, k and v before the shift."""
        width = self.width // self.heads
        cache = Cache.new(
            batch=streams,
            heads=self.heads,
            key_heads=self.heads,
            ring=self.cache,
            width=width,
            dtype=dtype,
            device=device,
        )
        shifts = 2 if self.pro else 0
        shape = (streams, self.heads, width)
        return [*cache, *(torch.zeros(shape, dtype=dtype, device=device) for _ in range(shifts))]

    def step(self, x: Tensor, start: Tensor, carry: list[Tensor], duty: Duty | None) -> Tensor:
        """Attention of one new row of every stream to the rows in its ring.

        Args:    x [S, N, E, 1, D]; start [S, 1, E, 1] bool, the row begins an episode; carry as
                 `carry` made it, written in place; duty as in `forward`.
        Returns: [S, N, E, 1, D].
        """
        lead = x.shape[:3]
        begins = start.expand(*lead, 1).flatten(0, 2)  # [G, 1]
        held = FoxCarry.of(carry)
        inputs, raw = self._inputs(x, begins, held.before, duty)
        o = forgetting_attention_step(
            inputs.q[:, 0],
            inputs.k[:, 0],
            inputs.v[:, 0],
            inputs.log_f[:, 0],
            held.cache,
            start=begins[:, 0].contiguous(),
            log_eps=self.prune,
            impl=self.impl,
        )
        if held.before is not None:
            held.before[0].copy_(raw[0])
            held.before[1].copy_(raw[1])
        return self._outputs(o.unsqueeze(1).unflatten(0, lead), inputs.gate, duty)

    def refill(self, past: Past, carry: list[Tensor]) -> None:
        """Writes the carry that `step` would leave after the rows of `past` and none before."""
        held = FoxCarry.of(carry)
        cache, rows = held.cache, past.k.shape[1]
        kept = min(rows, self.cache)
        cache.k[:, :, :kept] = past.k[:, rows - kept :].transpose(1, 2)
        cache.v[:, :, :kept] = past.v[:, rows - kept :].transpose(1, 2)
        sums, _ = decayed_sums(past.log_f[:, rows - kept :], past.start[:, rows - kept :])
        high = sums.float()
        cache.decay[:, :, 0, :kept] = high
        cache.decay[:, :, 1, :kept] = (sums - high.double()).float()
        at = torch.arange(rows, device=past.k.device)
        first = (past.start * at).amax(1, keepdim=True)  # [G, 1]
        norm = past.k.float().norm(dim=3).masked_fill((at < first).unsqueeze(2), 0.0)
        cache.norm.copy_(norm.amax(1))
        cache.position.fill_(kept % self.cache)
        cache.length.copy_((rows - first).clamp(max=self.cache).expand(-1, self.heads))
        if held.before is not None:
            held.before[0].copy_(past.raw_k)
            held.before[1].copy_(past.raw_v)

    def _inputs(
        self,
        x: Tensor,
        begins: Tensor,
        before: tuple[Tensor, Tensor] | None,
        duty: Duty | None,
    ) -> tuple[Inputs, tuple[Tensor, Tensor]]:
        """The inputs of attention, and k and v of the last row before their shift.

        Args: x [S, N, B, W, D]; begins [G, W], the row begins an episode; before, k and v
              [G, H, Dh], not yet shifted, of the row before the first, or None if there is none.
        """
        y = project(x, _aligned(self.wide.weight), duty)
        nets = networks(self.bias, duty)
        y = y.reshape(len(nets), -1, *y.shape[3:])  # [networks, rows, W, P]
        last = y.detach()[:, :, -1].flatten(0, 1)
        raw = tuple(
            last[:, cut : cut + self.width].unflatten(1, (self.heads, -1))
            for cut in (self.width, 2 * self.width)
        )
        if self.pro:
            inputs = fox_inputs(
                y,
                nets,
                networks(self.q_scale, duty),
                networks(self.k_scale, duty),
                begins,
                *(before or ()),
                impl=self.impl,
            )
            return inputs, (raw[0], raw[1])
        *parts, f, _ = y.split([*self.columns, y.shape[3] - sum(self.columns)], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).flatten(0, 1) for part in parts)
        log_f = F.logsigmoid(f.float() + nets[:, None, None]).flatten(0, 1)
        return Inputs(q, k, v, log_f, None), (raw[0], raw[1])

    def _outputs(self, o: Tensor, gate: Tensor | None, duty: Duty | None) -> Tensor:
        """Norm and output gate (in `pro`) and projection of what attention gives.

        Args:    o [S, N, B, W, H, Dh]; gate [G, W, H, Dh] logits, or None.
        Returns: [S, N, B, W, D].
        """
        dtype = o.dtype
        if gate is not None:
            o = rms_norm(o, pick(self.o_scale, duty), eps=OUTPUT_EPS, dtype=torch.float32)
            o = (o * sigmoid(gate.view(o.shape).float())).to(dtype)
        return project(o.flatten(4), self.output.weight, duty)

    def _bound(self, q: Tensor, duty: Duty | None) -> Tensor | Literal["measured"] | None:
        """Largest possible |q . k| / sqrt(Dh), from which attention knows which keys to skip.

        `pro` normalises q and k, so that it follows from their scales, [G, H]; `llama` has it
        measured. None: nothing is pruned.
        """
        if self.prune is None:
            return None
        if not self.pro:
            return "measured"
        width = self.width // self.heads
        bound = norm_bound(self.q_scale, self.k_scale, width=width, dtype=q.dtype)
        bound = pick(bound, duty)[:, :, :, 0]  # [S, N, B or 1, H]
        again = q.shape[0] // (bound.numel() // self.heads)
        return bound.repeat_interleave(again, 2).flatten(0, 2)  # [G, H]


def gate_biases(heads: int, scales: tuple[float, float] | None) -> Tensor:
    """Biases of the forget gates [H]: 0, or one time scale tau a head, so that f = exp(-1 / tau).

    Args: scales, shortest and longest tau in steps; the heads' tau are log-spaced between them.
    """
    if scales is None:
        return torch.zeros(heads)
    shortest, longest = (math.log(scale) for scale in scales)
    tau = torch.linspace(shortest, longest, heads, dtype=torch.float64).exp()
    return -torch.log(torch.expm1(1.0 / tau)).float()


def _aligned(weight: Tensor) -> Tensor:
    """Appends columns of zeros up to a multiple of 16, so that kernels read rows in wide words."""
    columns = weight.shape[3]
    return F.pad(weight, (0, -columns % 16))
