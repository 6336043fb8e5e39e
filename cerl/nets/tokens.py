"""The reader of sequence networks, which turns the rows of a window into tokens.

A token is a row's observation (after the convolutions, if any), the action before it and the reward
before it. Every reader has its own `Trunk`, with its convolutions, that mixes tokens along time
(`cerl/nets/trunk.py`). `look` runs it once over a window and hands out the rows that are wanted;
`step` runs it over one new row and agrees with `look`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.data import ActInput, Carry, EnvSpec, Previous, Window
from cerl.nets.frames import see, take
from cerl.nets.trunk import Trunk


class Tokens:
    """Reads every row of a window in order. See `cerl.nets.reader.Reader` for the calls.

    Args: trunk, of one member (shared) or of all; context, rows before the learnt ones, of which
          the first `still` are computed without gradient; learnt, T; begins, whether learnt rows
          begin with an episode; action, reward: whether a token has them; single, whether an
          environment has one stream while training, that of its acting member, where members
          differ.
    """

    whole = True
    layers = 1  # the trunk counts as one

    def __init__(
        self,
        spec: EnvSpec,
        trunk: Trunk,
        *,
        seeds: int,
        scale: float,
        images: bool,
        context: int,
        learnt: int,
        begins: bool,
        still: int,
        action: bool,
        reward: bool,
        single: bool,
    ) -> None:
        self.spec, self.trunk, self.seeds = spec, trunk, seeds
        self.scale, self.images = scale, images
        self.context, self.learnt, self.begins, self.still = context, learnt, begins, still
        self.action, self.reward = action, reward
        self.single = single and trunk.members > 1

    @property
    def carried(self) -> int:
        """Tensors of a carry."""
        return self.trunk.carried

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Features at rows of a window, from one run over all of it.

        Args:    places, positions [S, M, B, T] int64 in W.
        Returns: [S, N, B * T, D] for each place; only the first one carries a gradient.
        """
        start = window.starts()
        features = self._features(self.tokens(window, start), start, window.state)
        found = [take(features if k == 0 else features.detach(), p) for k, p in enumerate(places)]
        return [rows.flatten(2, 3) for rows in found]

    def tokens(self, window: Window, start: Tensor) -> Tensor:
        """Tokens of all rows of a window, [S, M or N, B, W, D]. Args: start as it gives."""
        previous = Previous(_delayed(window.action), _delayed(window.reward))
        # The first row of a window has no previous action or reward.
        blank = F.pad(start[..., 1:], (1, 0), value=True)
        return self._joined(self._pixels(window.obs), self._extra(blank, previous))

    def _features(self, tokens: Tensor, start: Tensor, state: Tensor) -> Tensor:
        """[S, N, B, W, D] of all rows; the first `still` rows carry no gradient."""
        if state.shape[-1] == 0:
            return self.trunk(tokens, start, context=self.still)
        # A stored state is that before row 1: what led to row 0 is not in the window.
        past = list(state.split(self.trunk.width, -1))
        rest = self.trunk(tokens[:, :, :, 1:], start[..., 1:], context=self.still - 1, past=past)
        return F.pad(rest, (0, 0, 1, 0))

    def carry(self, *, envs: int, evaluating: bool, device: torch.device) -> Carry:
        """What the trunk remembers of no rows: of the acting members' streams, or of all."""
        members = 1 if self.single and not evaluating else self.trunk.members
        return self.trunk.carry(seeds=self.seeds, members=members, envs=envs, device=device)

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> Tensor:
        """Features of one new row; carry in place.

        Returns: [S, 1, E, D] of the acting members, or [S, N, E, D] of all members' streams.
        """
        extra = self._extra(seen.start, seen.previous).unsqueeze(1)
        tokens = self._joined(self._pixels(seen.obs).unsqueeze(1), extra)
        member = seen.member if self.single and not evaluating else None
        return self.trunk.step(_own(tokens, member), seen.start, carry, member=member)

    @torch.no_grad()
    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Writes the carry that steps through the rows of a window [S, 1, E, W] would leave."""
        stream = member if self.single and not evaluating else None
        start = window.starts()
        tokens = _own(self.tokens(window, start), stream)
        self.trunk.refill(tokens, start, carry, member=stream)

    def _pixels(self, obs: Tensor) -> Tensor:
        """Observations [..., *observation] as the first layer's input, float32."""
        shape = self.spec.observation
        if not self.images:
            x = obs.flatten(obs.dim() - len(shape))
        else:
            x = obs.movedim(-3, -1) if len(shape) == 3 else obs.unsqueeze(-1)
        x = x.to(torch.float32)
        return x if self.scale == 1.0 else x / self.scale

    def _extra(self, start: Tensor, previous: Previous) -> Tensor:
        """Action and reward before a row, zero where an episode starts, [*start, K]."""
        parts, blank = [], start.unsqueeze(-1)
        if self.action:
            action = previous.action
            if not self.spec.continuous:
                action = F.one_hot(action, self.spec.actions).to(torch.float32)
            parts.append(action.masked_fill(blank, 0.0))
        if self.reward:
            parts.append(previous.reward.unsqueeze(-1).masked_fill(blank, 0.0))
        if not parts:
            return torch.zeros(*start.shape, 0, device=start.device)
        return torch.cat(parts, -1)

    def _joined(self, pixels: Tensor, extra: Tensor) -> Tensor:
        """pixels [S, M, *rows, ...], extra [S, M, *rows, K] -> tokens [S, M or N, *rows, D]."""
        lead = extra.shape[2:-1]
        x = see(self.trunk.convs, pixels.flatten(2, 1 + len(lead))).unflatten(2, lead)
        return torch.cat([x, extra.expand(-1, x.shape[1], *extra.shape[2:])], -1)


def extras(spec: EnvSpec, *, action: bool, reward: bool) -> int:
    """Numbers of a token beside its observation."""
    return action * spec.actions + reward


def _delayed(field: Tensor) -> Tensor:
    """A field [S, M, B, W, *rest] one row later, zero in the first row."""
    return torch.cat([torch.zeros_like(field[:, :, :, :1]), field[:, :, :, :-1]], 3)


def _own(tokens: Tensor, member: Tensor | None) -> Tensor:
    """Tokens [S, 1 or N, E, ...] as the acting members [S, E] see them, [S, 1, E, ...]."""
    if member is None or tokens.shape[1] == 1:
        return tokens
    index = member.view(member.shape[0], 1, -1, *([1] * (tokens.dim() - 3)))
    return tokens.gather(1, index.expand(-1, 1, -1, *tokens.shape[3:]))
