"""FoX: attention with a forget gate, as a block of the trunk, in its variants LLaMA and Pro.

Lin et al. 2025 (arXiv:2503.02130), pruned as in arXiv:2504.06949. Parts of a block can be left out,
the gate too: softmax attention with rotary positions is a block without gates. Gate, shift and
attention never reach back across the start of an episode. `forward` takes the rows of windows.
`step` takes one new row of every stream and keeps the last R keys in a ring, which it writes in
place. In both a row sees at most R rows, so they give the same output.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl.kernels import Impl, runs_triton
from cerl.kernels.attention import forgetting_attention, norm_bound
from cerl.kernels.attention.step import Cache, forgetting_attention_step
from cerl.kernels.fox import EPS, Inputs, fox_inputs, shifted
from cerl.kernels.pointwise import sigmoid
from cerl.nets.acting import Duty, networks, pick, project
from cerl.nets.gates import gauges
from cerl.nets.layers import Projection, rms_norm
from cerl.nets.parts import Gate, Parts, columns, gate_biases
from cerl.nets.rings import FoxCarry, Past, Ring, own_ring_step, refill, ring_step
from cerl.nets.transformer import attend_rows, rotated, visible

OUTPUT_EPS = 1e-6
LOG_EPS = -10.0  # the share of a softmax that the paper's authors let pruning skip, its logarithm


class Fox(nn.Module):
    """Forgetting attention of every member, with H query heads of width Dh = D / H.

    The variant `llama` has the forget gate alone. `pro` also has an output gate, norms of q, k and
    the outputs, and a shift of k and v, which mixes each row with the row before. A whole `pro`
    block with gates from data computes the inputs of attention in one fused kernel; other choices
    of parts do so in plain torch. Without gates and on a CPU, attention is torch's own (a CPU has
    no kernel of ours, and the definition of the operator is slower).

    Parameters: wide, the projections that lie side by side, [S, N, D, columns]: to q (D columns),
                k, v (Hkv Dh each), the output gate's logits (D), and the logits of forget gate (H),
                shift of k and shift of v (Hkv each), as far as the block has them;
                bias [S, N, H] of a learnt forget gate (`gate_biases`); output [S, N, D, D];
                in `pro` q_scale, o_scale [S, N, H, Dh] and k_scale [S, N, Hkv, Dh] of the norms.
                A fixed gate's bias is no parameter but a buffer [H].
    Args:       key_heads, Hkv, keys and values are those of fewer heads, 0 for H; cache, R, the
                rows that a row sees, its own included; gate, without, rotary: see `Parts`;
                gate_bias, shortest and longest time scale of the forget gates in steps, None for
                biases of 0; prune, natural log of the share of a softmax that may be skipped, None
                to skip nothing; rule of pruning, see `forgetting_attention`; attention, own or
                torch, by which a block without gates attends.
    """

    fixed: Tensor

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
        gate: Gate = "data",
        without: Iterable[str] = (),
        rotary: bool = False,
        key_heads: int = 0,
        rule: Literal["static", "running"] = "static",
        attention: Literal["own", "torch"] = "own",
    ) -> None:
        super().__init__()
        self.width, self.heads, self.key_heads = width, heads, key_heads or heads
        self.head = width // heads
        self.parts = Parts.of(variant, gate=gate, rotary=rotary, without=without)
        self.cache, self.prune, self.attention = cache, prune, attention
        self.rule: Literal["static", "running"] = rule
        self.impl: Impl = impl
        self.columns = columns(self.parts, width=width, heads=heads, key_heads=self.key_heads)
        self.fused = (
            {"gate", "forget", "shift_k"} <= self.columns.keys()
            and self.parts.qk_norm
            and self.key_heads == heads
        )
        self.wide = Projection(seeds, members, width, sum(self.columns.values()))
        self.output = Projection(seeds, members, width, width)
        biases = gate_biases(heads, gate_bias)
        if self.parts.learns_bias:
            self.bias = nn.Parameter(biases.repeat(seeds, members, 1))
        elif gate == "fixed":
            self.register_buffer("fixed", biases, persistent=False)
        shape = (seeds, members, heads, self.head)
        if self.parts.qk_norm:
            self.q_scale = nn.Parameter(torch.ones(shape))
            self.k_scale = nn.Parameter(torch.ones(seeds, members, self.key_heads, self.head))
        if self.parts.output_norm:
            self.o_scale = nn.Parameter(torch.ones(shape))

    @staticmethod
    def size(width: int, *, heads: int, key_heads: int, parts: Parts) -> int:
        """Number of parameters of one member."""
        wide = sum(columns(parts, width=width, heads=heads, key_heads=key_heads).values())
        norms = width * parts.output_norm
        norms += (width + width // heads * key_heads) * parts.qk_norm
        return width * (wide + width) + heads * parts.learns_bias + norms

    def forward(
        self, x: Tensor, start: Tensor, past: Past | None, duty: Duty | None
    ) -> tuple[Tensor, Past]:
        """Attention of each row to itself and earlier rows, including the rows of `past`.

        Args:    x [S, N, B, W, D]; start [S, 1 or N, B, W] bool, the row begins an episode; past of
                 the rows before, or None; duty, the acting members, for which N is 1 and axis B are
                 the E environments, or None.
        Returns: [S, N, B, W, D], and the past for the rows after these.
        """
        inputs, after = self._windows(x, start, past, duty)
        lead = x.shape[:3]
        if after.log_f is None and not self._runs_own(x.device):
            seen = visible(after.start, x.shape[3], self.cache)  # [S, 1 or N, B, W, keys]
            q, k, v = (part.unflatten(0, lead) for part in (inputs.q, after.k, after.v))
            o = attend_rows(q, k, v, seen)
        else:
            o = self._attend(inputs.q, after, duty).unflatten(0, lead)
        return self._outputs(o, inputs.gate, duty), after

    @torch.no_grad()
    def measured(self, x: Tensor, start: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows as `forward` gives them without a past, and measurements of gates and attention.

        Whatever `attention` and `prune` are, it is our operator that attends, and pairs count as
        prunable at the paper's `LOG_EPS` where nothing is pruned.
        """
        inputs, rows = self._windows(x, start, None, None)
        lead = x.shape[:3]
        o, lse, skipped = self._attend(inputs.q, rows, None, return_lse=True, return_skipped=True)
        found = gauges(
            inputs.q,
            rows.k,
            rows.log_f,
            lse=lse,
            skipped=skipped,
            start=rows.begins(),
            window=self.cache,
            bound=self._bound(inputs.q, None),
            log_eps=LOG_EPS if self.prune is None else self.prune,
            lead=lead,
        )
        return self._outputs(o.unflatten(0, lead), inputs.gate, None), found

    def carry(self, streams: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """An empty carry, whose tensors lead with G streams.

        Returns: the tensors of `Cache`, or of `Ring` without gates; then k and v of the last row
                 before the shift [G, Hkv, Dh], in a block that shifts them; last, in a block with
                 gates and rotary positions, rows of the episode so far [G] int64.
        """

        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(streams, *size, dtype=dtype, device=device)

        row = self.key_heads, self.head
        shift = [zeros(*row) for _ in range(2 * self.parts.kv_shift)]
        if self.parts.gate == "none":
            rings = [zeros(self.key_heads, self.cache, self.head) for _ in range(2)]
            return [*rings, zeros(dtype=torch.int64), zeros(dtype=torch.int32), *shift]
        cache = Cache.new(
            batch=streams,
            heads=self.heads,
            key_heads=self.key_heads,
            ring=self.cache,
            width=self.head,
            dtype=dtype,
            device=device,
        )
        return [*cache, *shift, *[zeros(dtype=torch.int64)] * self.parts.rotary]

    def step(self, x: Tensor, start: Tensor, carry: list[Tensor], duty: Duty | None) -> Tensor:
        """Attention of one new row of every stream to the rows in its ring.

        Args:    x [S, N, E, 1, D]; start [S, 1, E, 1] bool, the row begins an episode; carry as
                 `carry` made it, written in place; duty as in `forward`.
        Returns: [S, N, E, 1, D].
        """
        lead = x.shape[:3]
        begins = start.expand(*lead, 1).flatten(0, 2)  # [G, 1]
        held, before, count = self._held(carry)
        at = None
        if count is not None:
            at = count.masked_fill_(begins[:, 0], 0).view(-1, 1, 1)
        inputs, raw = self._inputs(x, begins, before, duty, at=at)
        row, first = (inputs.q[:, 0], inputs.k[:, 0], inputs.v[:, 0]), begins[:, 0].contiguous()
        if isinstance(held, Cache):
            log_f, log_eps = inputs.log_f[:, 0], self.prune
            o = forgetting_attention_step(
                *row, log_f, held, start=first, log_eps=log_eps, impl=self.impl
            )
        elif self._runs_own(x.device):
            o = own_ring_step(*row, held, first, impl=self.impl)
        else:
            o = ring_step(*row, held, first)
        if count is not None:
            count.add_(1)
        for mine, new in zip(before or (), raw or (), strict=True):
            mine.copy_(new)
        return self._outputs(o.unsqueeze(1).unflatten(0, lead), inputs.gate, duty)

    def refill(self, past: Past, carry: list[Tensor]) -> None:
        """Writes the carry that `step` would leave after the rows of `past` and none before.

        The count of rows goes on across episodes here, which changes no distance between rows.
        """
        held, before, count = self._held(carry)
        refill(held, past)
        if count is not None:
            count.fill_(past.k.shape[1])
        for mine, new in zip(before or (), past.raw or (), strict=True):
            mine.copy_(new)

    def _held(
        self, carry: list[Tensor]
    ) -> tuple[Cache | Ring, tuple[Tensor, Tensor] | None, Tensor | None]:
        """The ring of a carry; k and v before the shift, or None; rows of the episode, or None."""
        if self.parts.gate == "none":
            ring, shift = Ring(*carry[:4]), carry[4:]
            return ring, (shift[0], shift[1]) if shift else None, ring.count
        held = FoxCarry.of(carry)
        return held.cache, held.raw, held.count

    def _runs_own(self, device: torch.device) -> bool:
        """Whether a block without gates attends by our kernel instead of torch's attention."""
        return self.attention == "own" and runs_triton(self.impl, device)

    def _windows(
        self, x: Tensor, start: Tensor, past: Past | None, duty: Duty | None
    ) -> tuple[Inputs, Past]:
        """The inputs of attention for new rows, and all rows up to them as the past of later rows.

        Args: as in `forward`.
        """
        begins = start.expand(*x.shape[:3], -1).flatten(0, 2)  # [G, W]
        before = None if past is None else past.raw
        at = None
        if self.parts.rotary:
            known = 0 if past is None else past.k.shape[1]
            at = torch.arange(known, known + x.shape[3], device=x.device).unsqueeze(1)
        inputs, raw = self._inputs(x, begins, before, duty, at=at)
        k, v, log_f = inputs.k, inputs.v, inputs.log_f
        if past is not None:
            k, v = torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)
            start = torch.cat([past.start, start], 3)
            log_f = None if past.log_f is None else torch.cat([past.log_f, log_f], 1)
        return inputs, Past(k, v, log_f, start, raw)

    def _attend(self, q: Tensor, rows: Past, duty: Duty | None, **wanted: bool) -> Any:
        """Attention by our operator. Args: q [G, W, H, Dh]; rows attended to; wanted, results."""
        log_f = rows.log_f
        if log_f is None:
            log_f = torch.zeros(*rows.k.shape[:2], self.heads, device=q.device)
        pruned = self.prune is not None
        return forgetting_attention(
            q,
            rows.k,
            rows.v,
            log_f,
            start=rows.begins(),
            window=self.cache,
            bound=self._bound(q, duty) if pruned else None,
            log_eps=self.prune if self.prune is not None else LOG_EPS,
            rule=self.rule if pruned else "static",
            impl=self.impl,
            **wanted,
        )

    def _inputs(
        self,
        x: Tensor,
        begins: Tensor,
        before: tuple[Tensor, Tensor] | None,
        duty: Duty | None,
        *,
        at: Tensor | None,
    ) -> tuple[Inputs, tuple[Tensor, Tensor] | None]:
        """The inputs of attention; k and v of the last row before their shift, None without one.

        Args: x [S, N, B, W, D]; begins [G, W], the row begins an episode; before, k and v
              [G, Hkv, Dh], not yet shifted, of the row before the first, or None if there is none;
              at, positions of the rows, [W, 1] or [G, 1, 1], which only rotary positions need.
        """
        y = project(x, _aligned(self.wide.weight), duty).contiguous()
        raw = None
        if self.parts.kv_shift:
            keys = self.key_heads * self.head
            k, v = y.detach()[:, :, :, -1, self.width :].flatten(0, 2)[:, : 2 * keys].chunk(2, 1)
            raw = k.unflatten(1, (self.key_heads, -1)), v.unflatten(1, (self.key_heads, -1))
        if self.fused:
            nets = networks(self.bias, duty)
            inputs = fox_inputs(
                y.view(len(nets), -1, *y.shape[3:]),
                nets,
                networks(self.q_scale, duty),
                networks(self.k_scale, duty),
                begins,
                *(before or ()),
                impl=self.impl,
            )
        else:
            inputs = self._plain_inputs(y, begins, before, duty)
        if self.parts.rotary and at is not None:
            q, k = rotated(at, inputs.q, inputs.k)
            inputs = inputs._replace(q=q, k=k)
        return inputs, raw

    def _plain_inputs(
        self,
        y: Tensor,
        begins: Tensor,
        before: tuple[Tensor, Tensor] | None,
        duty: Duty | None,
    ) -> Inputs:
        """The inputs of attention in plain torch, without rotation, from y [S, N, B, W, columns].

        `log_f` is None without gates.
        """
        rest = y.shape[4] - sum(self.columns.values())
        every = y.split([*self.columns.values(), rest], -1)
        part = dict(zip(self.columns, every, strict=False))

        def heads(name: str) -> Tensor:  # [G, W, heads, Dh]
            return part[name].unflatten(-1, (-1, self.head)).flatten(0, 2)

        q, k, v = heads("q"), heads("k"), heads("v")
        if self.parts.kv_shift:
            old_k, old_v = before or (None, None)
            k = shifted(k, old_k, part["shift_k"].flatten(0, 2), begins)
            v = shifted(v, old_v, part["shift_v"].flatten(0, 2), begins).to(y.dtype)
        if self.parts.qk_norm:
            q, k = (
                rms_norm(z.unflatten(0, y.shape[:3]), pick(scale, duty), eps=EPS, dtype=y.dtype)
                for z, scale in ((q, self.q_scale), (k, self.k_scale))
            )
            q, k = q.flatten(0, 2), k.flatten(0, 2)
        gate = heads("gate") if "gate" in part else None
        return Inputs(q, k.to(y.dtype), v, self._log_gates(part.get("forget"), y, duty), gate)

    def _log_gates(self, logit: Tensor | None, y: Tensor, duty: Duty | None) -> Any:
        """Logarithms of the forget gates [G, W, H], at least float32; None without gates.

        Args: logit [S, N, B, W, H] of gates from data, or None; y [S, N, B, W, columns].
        """
        if self.parts.gate == "none":
            return None
        bias = self.fixed if self.parts.gate == "fixed" else pick(self.bias, duty)
        logit = bias if logit is None else logit.float() + bias
        return F.logsigmoid(logit).expand(*y.shape[:4], self.heads).flatten(0, 2)

    def _outputs(self, o: Tensor, gate: Tensor | None, duty: Duty | None) -> Tensor:
        """Norm and output gate, where the block has them, and projection of what attention gives.

        Args:    o [S, N, B, W, H, Dh]; gate [G, W, H, Dh] logits, or None.
        Returns: [S, N, B, W, D].
        """
        dtype = o.dtype
        if self.parts.output_norm:
            o = rms_norm(o, pick(self.o_scale, duty), eps=OUTPUT_EPS, dtype=torch.float32)
        if gate is not None:
            o = o * sigmoid(gate.view(o.shape).float())
        return project(o.to(dtype).flatten(4), self.output.weight, duty)

    def _bound(self, q: Tensor, duty: Duty | None) -> Tensor | Literal["measured"]:
        """Largest possible |q . k| / sqrt(Dh), from which attention knows which keys to skip.

        With norms of q and k it follows from their scales, [G, H]; a rotation leaves lengths as
        they are. Otherwise it is measured.
        """
        if not self.parts.qk_norm:
            return "measured"
        k_scale = self.k_scale.repeat_interleave(self.heads // self.key_heads, 2)
        bound = norm_bound(self.q_scale, k_scale, width=self.head, dtype=q.dtype)
        bound = pick(bound, duty)[:, :, :, 0]  # [S, N, B or 1, H]
        again = q.shape[0] // (bound.numel() // self.heads)
        return bound.repeat_interleave(again, 2).flatten(0, 2)  # [G, H]


def _aligned(weight: Tensor) -> Tensor:
    """Appends columns of zeros up to a multiple of 16, so that kernels read rows in wide words."""
    missing = -weight.shape[3] % 16
    return F.pad(weight, (0, missing)) if missing else weight
