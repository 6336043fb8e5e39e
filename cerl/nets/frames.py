"""The reader of networks without memory, which stacks frames; and the convolutions of networks.

`Frames` reads rows of a window with `look` (learning) and one new observation with `step` and a
carry (acting). Both give the same stacks, in which frames from before the episode are zero.
`Frames` has no parameters: the convolutions that its images pass through belong to the networks.
"""

import math

import torch
from torch import Tensor, nn

from cerl.config import NetConfig
from cerl.data import ActInput, Carry, EnvSpec, Window
from cerl.nets.layers import Conv


def convolutions(
    net: NetConfig, spec: EnvSpec, *, seeds: int, layer_members: list[int], frames: int = 1
) -> tuple[nn.ModuleList, int]:
    """Convolutions of a network and the width of their flat output.

    Args:    layer_members: of every convolution, N or 1 (shared by all members); entries beyond
             the last convolution are ignored; frames, how many are stacked.
    Returns: the convolutions in order, and features of a row behind them; without convolutions
             (net.channels empty) the size of a stack of flat observations.
    Raises:  ValueError for observations that are no images, or too small.
    """
    convs = nn.ModuleList()
    if not net.channels:
        return convs, math.prod(spec.observation) * frames
    if len(spec.observation) not in (2, 3):
        raise ValueError(
            f"net.channels: convolutions need image observations [height, width] or "
            f"[channels, height, width], got {list(spec.observation)} from {spec.name}; "
            "set net.channels to an empty list"
        )
    if len(spec.observation) == 3 and spec.observation[2] <= 4 < spec.observation[0]:
        raise ValueError(
            f"net.channels: convolutions read images as [channels, height, width], got "
            f"{list(spec.observation)} from {spec.name}, which looks like [height, width, "
            "channels]; move the last axis to the front in the environment, e.g. by gymnasium's "
            "TransformObservation"
        )
    channels = frames * (spec.observation[0] if len(spec.observation) == 3 else 1)
    height, width = spec.observation[-2:]
    layers = zip(net.channels, net.kernels, net.strides, layer_members, strict=False)
    for filters, kernel, stride, members in layers:
        conv = Conv(
            seeds,
            members,
            channels=channels,
            filters=filters,
            kernel=kernel,
            stride=stride,
            padding=net.padding,
        )
        convs.append(conv)
        channels, height, width = filters, conv.output_size(height), conv.output_size(width)
        if min(height, width) < 1:
            raise ValueError(
                f"net.kernels: {list(net.kernels)} do not fit the observation "
                f"{list(spec.observation)} of {spec.name}"
            )
    return convs, height * width * channels


def see(convs: nn.ModuleList, x: Tensor) -> Tensor:
    """Runs images through all convolutions, each followed by a ReLU.

    Args:    x [S, M, rows, height, width, channels], or without convolutions [S, M, rows, D].
    Returns: flat features [S, M or N, rows, D]; without convolutions x itself.
    """
    for conv in convs:
        x = conv(x, relu=True)
    return x.flatten(3)


class Frames:
    """Reads rows as stacks of frames: images for convolutions, flat vectors without them.

    A window has one learnt row and before it `context` = frames - 1 rows, which complete its stack.
    See `cerl.nets.reader.Reader` for the attributes and calls.
    """

    learnt, begins, whole = 1, False, False
    layers = 0  # `look` runs no layers
    carried = 1

    def __init__(self, net: NetConfig, spec: EnvSpec, *, frames: int, seeds: int) -> None:
        self.stack, self.scale, self.shape = frames, net.scale, spec.observation
        self.seeds, self.dtype = seeds, spec.dtype
        self.images = len(net.channels) > 0
        self.context = frames - 1

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Inputs of the first layer, float32.

        Args:    places, each positions [S, M, B, T] int64 in the W rows, all >= context.
        Returns: [S, M, B * T, height, width, stack * channels] for each place, or without
                 convolutions [S, M, B * T, D].
        """
        if self.stack == 1:
            stacks = [take(window.obs, place).flatten(2, 3).unsqueeze(3) for place in places]
        else:
            start = window.starts()
            stacks = [self._stacked(window.obs, start, place) for place in places]
        return [self._pixels(stack) for stack in stacks]

    def _stacked(self, obs: Tensor, start: Tensor, place: Tensor) -> Tensor:
        """The last `stack` frames up to each place, [S, M, B * T, stack, *observation].

        Args: obs [S, M, B, W, *observation]; start [S, M, B, W] bool; place [S, M, B, T].
        """
        back = torch.arange(self.stack - 1, -1, -1, device=place.device)
        at = place.unsqueeze(-1) - back  # [S, M, B, T, stack]
        frames = take(obs, at.flatten(3)).unflatten(3, at.shape[3:])
        # A frame belongs to the stack if no episode starts between it and the row at `place`.
        starts = take(start, at.flatten(3)).unflatten(3, at.shape[3:]).long()
        later = starts.flip(-1).cumsum(-1).flip(-1) - starts
        keep = (later == 0).view(*at.shape, *([1] * len(self.shape)))
        return (frames * keep).flatten(2, 3)

    def _pixels(self, frames: Tensor) -> Tensor:
        """Stacked frames [S, M, rows, stack, *observation] as the first layer's input, float32."""
        if self.images:
            if len(self.shape) == 3:
                frames = frames.flatten(3, 4)
            frames = frames.movedim(3, -1)
        else:
            frames = frames.flatten(3)
        x = frames.to(torch.float32)
        return x if self.scale == 1.0 else x / self.scale

    def carry(self, *, envs: int, evaluating: bool, device: torch.device) -> Carry:
        """The last stack - 1 frames [S, E, stack - 1, *observation], all zero at first."""
        shape = (self.seeds, envs, self.stack - 1, *self.shape)
        return (torch.zeros(shape, dtype=self.dtype, device=device),)

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> Tensor:
        """Input of the first layer [S, 1, E, ...] for one new row; `carry` is written in place."""
        (past,) = carry
        keep = (~seen.start).view(*seen.start.shape, *([1] * (past.dim() - 2)))
        frames = torch.cat([past * keep, seen.obs.unsqueeze(2)], 2)
        past.copy_(frames[:, :, 1:])
        return self._pixels(frames.unsqueeze(1))

    @torch.no_grad()
    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Writes the carry that `step` would leave after the rows of a window [S, 1, E, W]."""
        rows = window.reward.shape[3]
        kept = min(self.stack - 1, rows)
        if not carry or not self.stack - 1:
            return
        starts = window.starts()[:, 0].long()  # [S, E, W]
        # A frame belongs to the carry if no episode starts after it.
        later = starts.flip(-1).cumsum(-1).flip(-1) - starts
        keep = (later == 0)[..., rows - kept :]
        frames = window.obs[:, 0, :, rows - kept :]
        (past,) = carry
        past.zero_()
        past[:, :, self.stack - 1 - kept :] = frames * keep.view(
            *keep.shape, *([1] * len(self.shape))
        )


def take(field: Tensor, rows: Tensor) -> Tensor:
    """Selects rows: field [S, M, B, W, *rest], rows [S, M or 1, B, K] -> [S, M, B, K, *rest]."""
    rows = rows.expand(-1, field.shape[1], -1, -1)
    common = zip(rows.shape[:3], rows.stride(), strict=False)
    if all(size == 1 or stride == 0 for size, stride in common):
        return field.index_select(3, rows[0, 0, 0])  # the same rows of every window
    index = rows.view(*rows.shape, *([1] * (field.dim() - 4)))
    return field.gather(3, index.expand(*rows.shape, *field.shape[4:]))
