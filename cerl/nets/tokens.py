"""The reader of sequence networks, which turns the rows of a window into tokens.

A token is a row's observation (after the convolutions, if any) beside the previous action and the
previous reward. Every reader has its own `Trunk`, with its own convolutions, which mixes tokens
along time (`cerl/nets/trunk.py`). `look` runs the trunk once over a window and returns the rows
that were asked for; `step` runs it over one new row and gives the same features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.data import ActInput, Carry, EnvSpec, Previous, Window
from cerl.kernels.pointwise import one_hot
from cerl.nets.frames import see, take
from cerl.nets.trunk import Trunk


class Tokens:
    """Reads every row of a window in order. See `cerl.nets.reader.Reader` for attributes and calls.

    Args: trunk, of one member (shared by all) or of all N; scale, by which observations are
          divided; images, whether observations pass through convolutions; context, learnt and
          begins, as in `Reader`; still, how many of the first rows are computed without gradient;
          action, reward: whether a token holds the previous action, the previous reward; single:
          where members have trunks of their own, an environment has one stream while training,
          that of its acting member, instead of one stream for each member.
    """

    whole = True
    layers = 1  # the trunk counts as one layer

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
        """Number of tensors in a carry."""
        return self.trunk.carried

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Features at rows of a window, from one run over all of it.

        Args:    places, each positions [S, M, B, T] int64 in the W rows.
        Returns: [S, N, B * T, D] for each place; only those of the first carry a gradient.
        """
        start = window.starts()
        features = self._features(self.tokens(window, start), start, window.state)
        found = [take(features if k == 0 else features.detach(), p) for k, p in enumerate(places)]
        return [rows.flatten(2, 3) for rows in found]

    def measured(self, window: Window) -> list[dict[str, Tensor]]:
        """What every block of attention measures of a window's rows (`Trunk.measured`)."""
        start = window.starts()
        return self.trunk.measured(self.tokens(window, start), start)

    def tokens(self, window: Window, start: Tensor) -> Tensor:
        """Tokens of all rows of a window, [S, M or N, B, W, D]. Args: start, `window.starts()`."""
        previous = Previous(_delayed(window.action), _delayed(window.reward))
        # The first row of a window has no previous action or reward.
        blank = F.pad(start[..., 1:], (1, 0), value=True)
        return self._joined(self._pixels(window.obs), self._extra(blank, previous))

    def _features(self, tokens: Tensor, start: Tensor, state: Tensor) -> Tensor:
        """The trunk's features of all rows, [S, N, B, W, D]; the first `still` have no gradient.

        Args: state [S, M or N, B, K], the stored states of all blocks before row 1; K may be 0.
        """
        if state.shape[-1] == 0:
            return self.trunk(tokens, start, context=self.still)
        # The window lacks the action and reward before row 0, so the trunk starts from the stored
        # state at row 1. Row 0 is a context row, whose features nobody uses.
        past = list(state.split(self.trunk.width, -1))
        rest = self.trunk(tokens[:, :, :, 1:], start[..., 1:], context=self.still - 1, past=past)
        return F.pad(rest, (0, 0, 1, 0))

    def carry(self, *, envs: int, evaluating: bool, device: torch.device) -> Carry:
        """The trunk's carry before the first row, for the acting members' streams or for all."""
        members = 1 if self.single and not evaluating else self.trunk.members
        return self.trunk.carry(seeds=self.seeds, members=members, envs=envs, device=device)

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> Tensor:
        """Features of one new row; `carry` is written in place.

        Returns: [S, 1, E, D] of the acting members' streams, or [S, N, E, D] of all members'.
        """
        extra = self._extra(seen.start, seen.previous).unsqueeze(1)
        tokens = self._joined(self._pixels(seen.obs).unsqueeze(1), extra)
        member = seen.member if self.single and not evaluating else None
        return self.trunk.step(_own(tokens, member), seen.start, carry, member=member)

    @torch.no_grad()
    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Writes the carry that `step` would leave after the rows of a window [S, 1, E, W]."""
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
        """Previous action (one-hot if discrete) and reward, 0 where an episode starts.

        Args:    start [*rows] bool; previous, whose fields lead with the same axes.
        Returns: [*rows, K] float32; K is 0 if tokens hold neither of them.
        """
        parts, blank = [], start.unsqueeze(-1)
        if self.action:
            action = previous.action
            if not self.spec.continuous:
                action = one_hot(action, self.spec.actions).to(torch.float32)
            parts.append(action.masked_fill(blank, 0.0))
        if self.reward:
            parts.append(previous.reward.unsqueeze(-1).masked_fill(blank, 0.0))
        if not parts:
            return torch.zeros(*start.shape, 0, device=start.device)
        return torch.cat(parts, -1)

    def _joined(self, pixels: Tensor, extra: Tensor) -> Tensor:
        """Tokens [S, M or N, *rows, D] from pixels [S, M, *rows, ...] and extra [S, M, *rows, K].

        The pixels pass through the convolutions first.
        """
        lead = extra.shape[2:-1]
        x = see(self.trunk.convs, pixels.flatten(2, 1 + len(lead))).unflatten(2, lead)
        return torch.cat([x, extra.expand(-1, x.shape[1], *extra.shape[2:])], -1)


def extras(spec: EnvSpec, *, action: bool, reward: bool) -> int:
    """How many numbers a token holds beside its observation."""
    return action * spec.actions + reward


def _delayed(field: Tensor) -> Tensor:
    """Moves a field [S, M, B, W, *rest] one row later; the first row becomes 0."""
    return torch.cat([torch.zeros_like(field[:, :, :, :1]), field[:, :, :, :-1]], 3)


def _own(tokens: Tensor, member: Tensor | None) -> Tensor:
    """Selects the acting members' tokens: [S, 1 or N, E, ...], member [S, E] -> [S, 1, E, ...].

    Without `member`, or if all members see the same tokens, returns them as they are.
    """
    if member is None or tokens.shape[1] == 1:
        return tokens
    index = member.view(member.shape[0], 1, -1, *([1] * (tokens.dim() - 3)))
    return tokens.gather(1, index.expand(-1, 1, -1, *tokens.shape[3:]))
