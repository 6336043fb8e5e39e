"""The reader of networks without memory, which stacks frames; convolutions.

`Frames` has two calls that agree: `look` at rows of a window (learning) and `step` with one new
observation and a carry (acting). Frames before an episode's start are zero in both. It has no
parameters: the convolutions that its images pass through belong to the networks.
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
    """Convolutions of a network and the width of their flat output, or of flat observations.

    Args:   layer_members: N or 1 for every convolution; entries beyond the last one are ignored.
    Raises: ValueError for observations that are no images, or too small.
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
    """Images [S, M, rows, height, width, channels] through all convolutions and their ReLUs.

    Returns: flat [S, M or N, rows, D]; without convolutions x [S, M, rows, D] as it is.
    """
    for conv in convs:
        x = conv(x, relu=True)
    return x.flatten(3)


class Frames:
    """Stacks of frames as images for convolutions; without convolutions flat vectors.

    `context` rows come before the learnt row, of which a window has `learnt`. See
    `cerl.nets.reader.Reader` for the calls.
    """

    learnt, begins, whole = 1, False, False
    layers = 0  # a look runs no layers
    carried = 1

    def __init__(self, net: NetConfig, spec: EnvSpec, *, frames: int, seeds: int) -> None:
        self.stack, self.scale, self.shape = frames, net.scale, spec.observation
        self.seeds, self.dtype = seeds, spec.dtype
        self.images = len(net.channels) > 0
        self.context = frames - 1

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Inputs of the first layer, float32.

        Args:    places, positions [S, M, B, T] int64 in W, each >= context.
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
        """The last `stack` frames of every row, [S, M, B * T, stack, *observation]."""
        back = torch.arange(self.stack - 1, -1, -1, device=place.device)
        at = place.unsqueeze(-1) - back  # [S, M, B, T, stack]
        frames = take(obs, at.flatten(3)).unflatten(3, at.shape[3:])
        # A frame belongs to the stack if no episode starts after it, up to the row.
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
        """The last stack - 1 frames [S, E, stack - 1, *observation], zero before an episode."""
        shape = (self.seeds, envs, self.stack - 1, *self.shape)
        return (torch.zeros(shape, dtype=self.dtype, device=device),)

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> Tensor:
        """Input of the first layer [S, 1, E, ...] for one new observation; carry in place."""
        (past,) = carry
        keep = (~seen.start).view(*seen.start.shape, *([1] * (past.dim() - 2)))
        frames = torch.cat([past * keep, seen.obs.unsqueeze(2)], 2)
        past.copy_(frames[:, :, 1:])
        return self._pixels(frames.unsqueeze(1))

    @torch.no_grad()
    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Writes the carry that steps through the rows of a window [S, 1, E, W] would leave."""
        rows = window.reward.shape[3]
        kept = min(self.stack - 1, rows)
        if not carry or not self.stack - 1:
            return
        starts = window.starts()[:, 0].long()  # [S, E, W]
        # A frame stays as long as no episode starts after it.
        later = starts.flip(-1).cumsum(-1).flip(-1) - starts
        keep = (later == 0)[..., rows - kept :]
        frames = window.obs[:, 0, :, rows - kept :]
        (past,) = carry
        past.zero_()
        past[:, :, self.stack - 1 - kept :] = frames * keep.view(
            *keep.shape, *([1] * len(self.shape))
        )


def take(field: Tensor, rows: Tensor) -> Tensor:
    """field [S, M, B, W, *rest] at rows [S, M or 1, B, K] -> [S, M, B, K, *rest]."""
    rows = rows.expand(-1, field.shape[1], -1, -1)
    common = zip(rows.shape[:3], rows.stride(), strict=False)
    if all(size == 1 or stride == 0 for size, stride in common):
        return field.index_select(3, rows[0, 0, 0])  # all windows name the same rows
    index = rows.view(*rows.shape, *([1] * (field.dim() - 4)))
    return field.gather(3, index.expand(*rows.shape, *field.shape[4:]))
