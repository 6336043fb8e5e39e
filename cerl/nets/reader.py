"""How a network reads rows: the contract of a reader, and the one place that makes readers.

A reader turns rows into the inputs of a network's feed-forward layers. `Frames` (networks without
memory) stacks a few frames, `Tokens` (sequence networks) runs a trunk over all rows. Everyone else
only names positions in a window and asks the reader, or the network that it belongs to.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cerl.config import (
    Config,
    FoxConfig,
    FramesConfig,
    SequenceOptions,
    TransformerConfig,
    of_kind,
)
from cerl.data import ActInput, Carry, EnvSpec, Window
from cerl.nets.frames import Frames, convolutions
from cerl.nets.tokens import Tokens, extras
from cerl.nets.trunk import Trunk, make_trunk


class Reader(Protocol):
    """Turns rows into inputs of feed-forward layers: `look` in windows, `step` while acting."""

    @property
    def context(self) -> int:
        """Number of context rows, which come before the learnt rows of a window."""
        ...

    @property
    def learnt(self) -> int:
        """T, the number of learnt rows of a window."""
        ...

    @property
    def begins(self) -> bool:
        """Whether the first learnt row of a window is the first row of an episode."""
        ...

    @property
    def whole(self) -> bool:
        """Whether `look` computes all rows of a window, however few are asked for.

        Two calls of `look` then cost twice as much as one call for both places.
        """
        ...

    @property
    def layers(self) -> int:
        """How many of the layers that `ensemble.shared_layers` counts run inside the reader."""
        ...

    @property
    def carried(self) -> int:
        """Number of tensors in a carry."""
        ...

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Inputs of the feed-forward layers at some rows of a window.

        Args:    places, each positions [S, M, B, T] int64 in the W rows.
        Returns: [S, M or N, B * T, ...] for each place. Only the first of them carries a gradient
                 to the parameters that the reader runs.
        """
        ...

    def carry(self, *, envs: int, evaluating: bool, device: torch.device) -> Carry:
        """The empty recurrent state for acting, before any row."""
        ...

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> Tensor:
        """The input that `look` gives, for one new row; `carry` is written in place.

        Returns: [S, 1, E, ...] for the acting members, or [S, N, E, ...] for all members.
        """
        ...

    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Recomputes a carry in place, with the present parameters.

        Args: window [S, 1, E, W], the last W rows of every environment; carry, or () to compute but
              write nothing; member [S, E], the acting members.
        """
        ...


class Sight(NamedTuple):
    """All that comes before the hidden layers of a network, or of one of its parts."""

    reader: Reader
    convs: nn.ModuleList  # convolutions that the network runs on the reader's output; often empty
    trunk: Trunk | None  # of sequence networks: run by the reader, registered by the network
    width: int  # features of a row, the input of the first hidden layer
    layers: int  # layers that these are: the number of convolutions, or 1 for a trunk


def sights(
    config: Config, spec: EnvSpec, *, seeds: int, members: int, shared: int, parts: int = 1
) -> list[Sight]:
    """A `Sight` for each part of a network.

    Parts without memory share one reader and its carry, since stacking frames takes no parameters.

    Args: shared, how many of the first layers all members share; parts, how many there are, such as
          2 for policies and critics.
    """
    if isinstance(config.encoder, FramesConfig):
        frames = config.encoder.frames
        reader = Frames(config.net, spec, frames=frames, seeds=seeds)
        lead = [1 if k < shared else members for k in range(len(config.net.channels))]
        found = []
        for _ in range(parts):
            convs, width = convolutions(
                config.net, spec, seeds=seeds, layer_members=lead, frames=frames
            )
            found.append(Sight(reader, convs, None, width, len(lead)))
        return found
    own = 1 if shared else members
    return [_sequence(config, spec, seeds=seeds, members=own) for _ in range(parts)]


def _sequence(config: Config, spec: EnvSpec, *, seeds: int, members: int) -> Sight:
    """The `Sight` of a sequence network, whose trunk has convolutions if it reads images."""
    net, sequence = config.net, of_kind(config.encoder, SequenceOptions)
    fox = sequence if isinstance(sequence, FoxConfig) else FoxConfig()
    scales = fox.gate_scales
    inputs = {"action": sequence.previous_action, "reward": sequence.previous_reward}
    lead, rows = [members] * len(net.channels), config.rows_of_window
    convs, width = convolutions(net, spec, seeds=seeds, layer_members=lead)
    trunk = make_trunk(
        kind=sequence.name,
        layers=sequence.layers,
        width=sequence.width,
        heads=sequence.fox_heads,
        variant=sequence.fox_variant,
        ratio=sequence.ratio,
        cache=config.rows_looked_back_on,
        gate_bias=(scales[0], scales[1]) if scales else None,
        prune=fox.prune or None,
        rule=fox.rule,
        gate=fox.gate,
        without=fox.without,
        rotary=fox.rotary,
        key_heads=fox.key_heads,
        attention=sequence.attention if isinstance(sequence, TransformerConfig) else "own",
        precision=sequence.precision,
        seeds=seeds,
        members=members,
        inputs=width + extras(spec, **inputs),
        convs=convs,
    )
    reader = Tokens(
        spec,
        trunk,
        seeds=seeds,
        scale=net.scale,
        images=len(net.channels) > 0,
        context=rows.context,
        learnt=rows.learnt,
        begins=config.encoder.from_episode_start,
        still=0 if sequence.context_carries_gradient else rows.context,
        **inputs,
        single=config.ensemble.switch == "episode",
    )
    return Sight(reader, nn.ModuleList(), trunk, trunk.width, 1)
