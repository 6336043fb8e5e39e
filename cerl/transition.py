"""From a window of rows to what a loss needs: inputs, n-step returns, weights."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl import returns
from cerl.data import Window
from cerl.encoder import Encoder


class Transition(NamedTuple):
    """What a loss needs of a window, worked out once."""

    x: Tensor  # [S, M, B * T, ...] inputs at the learnt rows
    x_next: Tensor  # the same at the bootstrap rows
    action: Tensor  # [S, M, B, T], or [S, M, B, T, A]
    reward: Tensor  # [S, M, B, T, J] n-step sum
    discount: Tensor  # [S, M, B, T, J], 0 at terminals
    weight: Tensor  # [S, M, B, T]


class Learnt(NamedTuple):
    """The learnt rows of a window."""

    at: Tensor  # [S, M, B, T] int64 positions in W
    start: Tensor  # [S, M, B, W] bool, the row begins an episode
    weight: Tensor  # [S, M, B, T], 0 where there is nothing to learn

    def inputs(self, encoder: Encoder, window: Window, ahead: Tensor | int = 0) -> Tensor:
        """Inputs of the first layer, `ahead` rows after the learnt ones."""
        return encoder(window.obs, self.start, self.at + ahead)


def learnt(encoder: Encoder, window: Window, *, n: int) -> Learnt:
    """Where the learnt rows of a window lie. Args: n rows are only looked ahead at."""
    first = encoder.context
    rows = window.reward.shape[-1] - first - n
    at = first + torch.arange(rows, device=window.reward.device)
    start = F.pad(~window.real[..., :-1], (1, 0), value=True)
    weight = window.weight.unsqueeze(-1) * window.real[..., first : first + rows]
    return Learnt(at.expand(*window.reward.shape[:-1], rows), start, weight)


def transition(encoder: Encoder, window: Window, *, n: int, gamma: Tensor) -> Transition:
    """Learnt rows, their n-step return and the rows that bootstrap it. Args: gamma [J]."""
    rows = learnt(encoder, window, n=n)
    first, count = encoder.context, rows.at.shape[-1]
    reward, discount, steps = returns.n_step(
        window.reward,
        window.terminated,
        window.real,
        first=first,
        learnt=count,
        n=n,
        gamma=gamma,
    )
    return Transition(
        x=rows.inputs(encoder, window),
        x_next=rows.inputs(encoder, window, steps),
        action=window.action[:, :, :, first : first + count],
        reward=reward,
        discount=discount,
        weight=rows.weight,
    )
