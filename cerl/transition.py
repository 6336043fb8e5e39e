"""From a window of rows to what a loss needs: inputs, n-step returns, weights."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl import returns
from cerl.data import Window
from cerl.encoder import Encoder
from cerl.sequence import Tokens, Whole


class Transition(NamedTuple):
    """What a loss needs of a window, worked out once."""

    x: Tensor | Whole  # [S, M, B * T, ...] inputs at the learnt rows; see `cerl.sequence.read`
    x_next: Tensor | Whole  # the same at the bootstrap rows
    action: Tensor  # [S, M, B, T], or [S, M, B, T, A]
    reward: Tensor  # [S, M, B, T, J] n-step sum
    discount: Tensor  # [S, M, B, T, J], 0 at terminals
    weight: Tensor  # [S, M, B, T]


class Learnt(NamedTuple):
    """The learnt rows of a window."""

    at: Tensor  # [S, M, B, T] int64 positions in W
    start: Tensor  # [S, M, B, W] bool, the row begins an episode; False in the first row
    weight: Tensor  # [S, M, B, T], 0 where there is nothing to learn

    def inputs(self, encoder: Encoder | Tokens, window: Window) -> Tensor | Whole:
        """Inputs at the learnt rows."""
        return encoder.inputs(window, self.start, self.at)


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """weight [S, M, B, T] times a mask [S, N, B], or one for each learnt row [S, N, B, T]."""
    if mask is None:
        return weight
    return weight * (mask if mask.dim() == 4 else mask.unsqueeze(-1))


def learnt(encoder: Encoder | Tokens, window: Window, *, n: int) -> Learnt:
    """Where the learnt rows of a window lie. Args: n rows are only looked ahead at."""
    first = encoder.context
    rows = window.reward.shape[-1] - first - n
    at = first + torch.arange(rows, device=window.reward.device)
    start = F.pad(~window.real[..., :-1], (1, 0), value=False)
    weight = window.weight.unsqueeze(-1) * window.real[..., first : first + rows]
    return Learnt(at.expand(*window.reward.shape[:-1], rows), start, weight)


def transition(encoder: Encoder | Tokens, window: Window, *, n: int, gamma: Tensor) -> Transition:
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
    x = rows.inputs(encoder, window)
    if isinstance(x, Whole):
        x_next = x.ahead(rows.at, steps, most=n)
    else:
        x_next = encoder.inputs(window, rows.start, rows.at + steps)
    return Transition(
        x=x,
        x_next=x_next,
        action=window.action[:, :, :, first : first + count],
        reward=reward,
        discount=discount,
        weight=rows.weight,
    )
