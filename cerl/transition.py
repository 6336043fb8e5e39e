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

    first: int  # position in W
    count: int  # T
    weight: Tensor  # [S, M, B, T], 0 where there is nothing to learn

    def inputs(self, encoder: Encoder, window: Window, ahead: Tensor | int = 0) -> Tensor:
        """Inputs of the first layer, `ahead` rows after the learnt ones."""
        if encoder.stack == 1 and isinstance(ahead, int):
            first = self.first + ahead
            rows = window.obs[:, :, :, first : first + self.count].flatten(2, 3)
            return encoder.pixels(rows.unsqueeze(3).contiguous())
        start = F.pad(~window.real[..., :-1], (1, 0), value=True)  # the row begins an episode
        at = self.first + torch.arange(self.count, device=start.device)
        return encoder(window.obs, start, at.expand(*start.shape[:-1], self.count) + ahead)


def learnt(encoder: Encoder, window: Window, *, n: int) -> Learnt:
    """Where the learnt rows of a window lie. Args: n rows are only looked ahead at."""
    first = encoder.context
    rows = window.reward.shape[-1] - first - n
    weight = window.weight.unsqueeze(-1) * window.real[..., first : first + rows]
    return Learnt(first, rows, weight)


def transition(encoder: Encoder, window: Window, *, n: int, gamma: Tensor) -> Transition:
    """Learnt rows, their n-step return and the rows that bootstrap it. Args: gamma [J]."""
    rows = learnt(encoder, window, n=n)
    first, count = rows.first, rows.count
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
        x_next=rows.inputs(encoder, window, steps if n > 1 else 1),
        action=window.action[:, :, :, first : first + count],
        reward=reward,
        discount=discount,
        weight=rows.weight,
    )
