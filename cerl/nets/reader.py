"""How a network sees rows: the contract of a reader, and the one place that makes one.

`Frames` (networks without memory) and `Tokens` (sequence networks) differ by what they look at.
Everyone else names positions in a window and asks a reader, or the network that it belongs to.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cerl.config import Config, FoxConfig, FramesConfig, SequenceOptions, of_kind
from cerl.data import ActInput, Carry, EnvSpec, Window
from cerl.nets.frames import Frames, convolutions
from cerl.nets.tokens import Tokens, extras
from cerl.nets.trunk import Trunk, make_trunk


class Reader(Protocol):
    """Rows of windows (learning) and single rows (acting) as inputs of feed-forward layers."""

    @property
    def context(self) -> int:
        """Rows of a window before the learnt ones."""
        ...

    @property
    def learnt(self) -> int:
        """T, learnt rows of a window."""
        ...

    @property
    def begins(self) -> bool:
        """Whether the learnt rows of a window begin with an episode."""
        ...

    @property
    def whole(self) -> bool:
        """Whether a look runs over all of a window, so that two looks cost twice as much."""
        ...

    @property
    def layers(self) -> int:
        """Layers that a look runs, of those that `ensemble.shared_layers` counts."""
        ...

    @property
    def carried(self) -> int:
        """Tensors of a carry."""
        ...

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Inputs of the feed-forward part [S, M or N, B * T, ...] at positions [S, M, B, T] in W.

        One of each place; only the first carries a gradient to what the reader runs.
        """
        ...

    def carry(self, *, envs: int, evaluating: bool, device: torch.device) -> Carry:
        """What acting remembers of no rows at all."""
        ...

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> Tensor:
        """The same as `look` for one new row, [S, 1 or N, E, ...]; carry moves on in place."""
        ...

    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Recomputes a carry in place, with the parameters of now.

        Args: window [S, 1, E, W], the last rows that were acted on; carry, or () to compute and
              write nothing; member [S, E], who acts.
        """
        ...


class Sight(NamedTuple):
    """What a network, or each of its parts, sees rows by, before its hidden layers."""

    reader: Reader
    convs: nn.ModuleList  # of networks without memory, run on what the reader gives; may be empty
    trunk: Trunk | None  # of sequence networks, run by the reader; the network registers it
    width: int  # features of a row behind convolutions or trunk
    layers: int  # convolutions, or 1 for a trunk


def sights(
    config: Config, spec: EnvSpec, *, seeds: int, members: int, shared: int, parts: int = 1
) -> list[Sight]:
    """What the parts of a network see by. Args: shared, first layers that all members share.

    Frame stacks have no parameters, so that the parts share a reader and its carry.
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
    """The sequence network of a config, with convolutions where it reads images."""
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
