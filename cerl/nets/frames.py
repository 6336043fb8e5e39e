"""Observations as inputs of networks without memory, frame stacks built from rows; convolutions.

An encoder has two calls that agree: `inputs` on the rows of a window (learning) and `step` on one
new observation with a carry (acting). Frames before an episode's start are zero in both. The
convolutions belong to the networks. Networks with memory read rows as `cerl/nets/tokens.py` says.
"""

import math

import torch
from torch import Tensor, nn

from cerl.config import NetConfig
from cerl.data import EnvSpec, Window
from cerl.nets.layers import Conv


def convolutions(
    net: NetConfig, spec: EnvSpec, *, seeds: int, layer_members: list[int], frames: int = 1
) -> tuple[nn.ModuleList, int]:
    """Convolutions of a network and the width of their flat output, or of flat observations.

    Args:   layer_members, of every convolution N or 1; more entries are of later layers.
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


class Encoder:
    """Frame stacks as images for convolutions; without convolutions observations are flattened."""

    learnt = 1  # rows of a window that are learnt from

    def __init__(self, net: NetConfig, spec: EnvSpec, *, frames: int) -> None:
        self.stack, self.scale, self.shape = frames, net.scale, spec.observation
        self.images = len(net.channels) > 0

    @property
    def context(self) -> int:
        """Rows before the learnt one that a feature depends on."""
        return self.stack - 1

    def pixels(self, frames: Tensor) -> Tensor:
        """Stacked frames [S, M, rows, stack, *observation] as the first layer's input, float32.

        That is [S, M, rows, height, width, stack * channels], or flat without convolutions.
        """
        if self.images:
            if len(self.shape) == 3:
                frames = frames.flatten(3, 4)
            frames = frames.movedim(3, -1)
        else:
            frames = frames.flatten(3)
        x = frames.to(torch.float32)
        return x if self.scale == 1.0 else x / self.scale

    def inputs(self, window: Window, start: Tensor, rows: Tensor) -> Tensor:
        """`__call__` on the observations of a window."""
        return self(window.obs, start, rows)

    def __call__(self, obs: Tensor, start: Tensor, rows: Tensor) -> Tensor:
        """Inputs of the first layer at the wanted rows of a window.

        Args:    obs [S, M, B, W, *observation]; start [S, M, B, W] bool, the row begins an episode;
                 rows [S, M, B, T] int64 positions in W, each >= context.
        Returns: [S, M, B * T, *input of the first layer] float32.
        """
        lead = rows.shape
        if self.stack == 1:
            frames = take(obs, rows).flatten(2, 3).unsqueeze(3)
            return self.pixels(frames)
        back = torch.arange(self.stack - 1, -1, -1, device=rows.device)
        at = rows.unsqueeze(-1) - back  # [S, M, B, T, stack]
        frames = take(obs, at.flatten(3)).unflatten(3, at.shape[3:])
        # A frame belongs to the stack if no episode starts after it, up to the row.
        starts = take(start, at.flatten(3)).unflatten(3, at.shape[3:]).long()
        later = starts.flip(-1).cumsum(-1).flip(-1) - starts
        keep = (later == 0).view(*lead, self.stack, *([1] * len(self.shape)))
        return self.pixels((frames * keep).flatten(2, 3))

    def carry(
        self, seeds: int, envs: int, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Empty carry of acting: the last stack - 1 frames, zero before an episode's start."""
        shape = (seeds, envs, self.stack - 1, *self.shape)
        return (torch.zeros(shape, dtype=dtype, device=device),)

    def step(self, obs: Tensor, start: Tensor, carry: tuple[Tensor, ...]) -> Tensor:
        """Input of the first layer [S, 1, E, ...] float32 for one new observation.

        Args: obs [S, E, *observation]; start [S, E] bool; carry, brought up to date in place.
        """
        (past,) = carry
        keep = (~start).view(*start.shape, *([1] * (past.dim() - 2)))
        frames = torch.cat([past * keep, obs.unsqueeze(2)], 2)
        past.copy_(frames[:, :, 1:])
        return self.pixels(frames.unsqueeze(1))


def take(field: Tensor, rows: Tensor) -> Tensor:
    """field [S, M, B, W, *rest] at rows [S, M, B, K] -> [S, M, B, K, *rest]."""
    index = rows.view(*rows.shape, *([1] * (field.dim() - 4)))
    return field.gather(3, index.expand(*rows.shape, *field.shape[4:]))
