"""Windows of rows as tokens of a sequence network.

A token is a row's observation (after the convolutions, if any), the action before it and the reward
before it. Every network has its own `Trunk`, with its convolutions, that mixes tokens along time
(`cerl/nets/trunk.py`); `read` runs it once over a window and hands out the rows that are wanted.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.config import Config, FoxConfig, SequenceOptions, of_kind
from cerl.data import EnvSpec, Previous, Window
from cerl.nets.frames import Encoder, convolutions, see, take
from cerl.nets.trunk import Trunk, TrunkOptions


class Whole(NamedTuple):
    """All rows of windows, for networks that read them in order, and the rows that are wanted."""

    obs: Tensor  # [S, M, B, W, *input of the first layer] float32
    extra: Tensor  # [S, M, B, W, K] float32, action and reward before the row; K may be 0
    start: Tensor  # [S, M, B, W] bool
    rows: Tensor | slice  # [S, M, B, T] int64 positions in W
    state: Tensor  # [S, M, B, layers * D] of recurrent units before row 1, or [S, M, B, 0]


class Tokens:
    """What a sequence network reads of every row: an image or flat observation, and extras."""

    def __init__(self, config: Config, spec: EnvSpec) -> None:
        net, sequence = config.net, of_kind(config.encoder, SequenceOptions)
        self.spec, self.scale, self.images = spec, net.scale, len(net.channels) > 0
        self.context, self.learnt, _ = config.rows_of_window
        self.begins = config.encoder.from_episode_start
        # First rows without gradient.
        self.still = 0 if sequence.context_carries_gradient else self.context
        self.action, self.reward = sequence.previous_action, sequence.previous_reward
        self.extras = self.action * spec.actions + self.reward  # numbers of a row

    def inputs(self, window: Window, start: Tensor, rows: Tensor | slice) -> Whole:
        """All rows of windows. Args: start [S, M, B, W]; rows [S, M, B, T], those wanted."""
        previous = Previous(_delayed(window.action), _delayed(window.reward))
        blank = F.pad(start[..., 1:], (1, 0), value=True)  # before a first row is nothing known
        return Whole(
            self._pixels(window.obs), self._extra(blank, previous), start, rows, window.state
        )

    def step(self, obs: Tensor, start: Tensor, previous: Previous) -> tuple[Tensor, Tensor]:
        """What `tokens_of` takes of a new observation [S, E, ...]: [S, 1, E, ...], [S, 1, E, K]."""
        return self._pixels(obs).unsqueeze(1), self._extra(start, previous).unsqueeze(1)

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
        """What came before a row, zero where an episode starts, [*start, K]."""
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


def tokens_of(trunk: Trunk, obs: Tensor, extra: Tensor) -> Tensor:
    """obs [S, M, *rows, ...], extra [S, M, *rows, K] -> tokens of a trunk [S, M or N, *rows, D]."""
    lead = extra.shape[2:-1]
    x = see(trunk.convs, obs.flatten(2, 1 + len(lead))).unflatten(2, lead)
    return torch.cat([x, extra.expand(-1, x.shape[1], *extra.shape[2:])], -1)


def _delayed(field: Tensor) -> Tensor:
    """A field [S, M, B, W, *rest] one row later, zero in the first row."""
    return torch.cat([torch.zeros_like(field[:, :, :, :1]), field[:, :, :, :-1]], 3)


def _features(tokens: Tensor, whole: Whole, trunk: Trunk, *, still: int) -> Tensor:
    """[S, N, B, W, D] of all rows; the first `still` rows carry no gradient."""
    if whole.state.shape[-1] == 0:
        return trunk(tokens, whole.start, context=still)
    # What led to row 0 is not in the window, so a state that is exact goes on with row 1.
    past = list(whole.state.split(trunk.width, -1))
    rest = trunk(tokens[:, :, :, 1:], whole.start[..., 1:], context=still - 1, past=past)
    return F.pad(rest, (0, 0, 1, 0))


def make_trunk(config: Config, spec: EnvSpec, tokens: Tokens, *, seeds: int, members: int) -> Trunk:
    """The sequence network of a config, with convolutions where it reads images."""
    sequence = of_kind(config.encoder, SequenceOptions)
    fox = sequence if isinstance(sequence, FoxConfig) else FoxConfig()
    scales = fox.gate_scales
    lead = [members] * len(config.net.channels)
    convs, width = convolutions(config.net, spec, seeds=seeds, layer_members=lead)
    options = TrunkOptions(
        kind=sequence.name,
        layers=sequence.layers,
        width=sequence.width,
        heads=sequence.fox_heads,
        variant=sequence.fox_variant,
        ratio=sequence.ratio,
        cache=config.rows_looked_back_on,
        gate_bias=(scales[0], scales[1]) if scales else None,
        prune=fox.prune or None,
        precision=sequence.precision,
    )
    inputs = width + tokens.extras
    return Trunk(options, seeds=seeds, members=members, inputs=inputs, convs=convs)


def read(encoder: Encoder | Tokens, trunk: Trunk | None, *wanted: Tensor | Whole) -> list[Tensor]:
    """Inputs of the feed-forward part of a network at the wanted rows, [S, M or N, B * T, ...].

    Inputs of a feed-forward network are returned as they are. Those of a sequence network must be
    of the same windows, over which it runs once; only the first rows wanted carry a gradient.
    """
    if trunk is None:
        return [x for x in wanted if isinstance(x, Tensor)]
    whole = wanted[0]
    assert isinstance(whole, Whole) and isinstance(encoder, Tokens), "a sequence reads tokens"
    tokens = tokens_of(trunk, whole.obs, whole.extra)
    features = _features(tokens, whole, trunk, still=encoder.still)
    found = []
    for k, one in enumerate(wanted):
        assert isinstance(one, Whole), "all rows wanted are of one network"
        rows = features if k == 0 else features.detach()
        if isinstance(one.rows, slice):
            rows = rows[:, :, :, one.rows]
        else:
            rows = take(rows, one.rows.expand(-1, rows.shape[1], -1, -1))
        found.append(rows.flatten(2, 3))
    return found
