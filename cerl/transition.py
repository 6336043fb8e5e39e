"""From a window of rows to what a loss needs: inputs, n-step returns, weights."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl import returns
from cerl.data import Window
from cerl.nets.frames import Encoder
from cerl.nets.tokens import Tokens, Whole


class Transition(NamedTuple):
    """What a loss needs of a window, worked out once."""

    x: Tensor | Whole  # [S, M, B * T, ...] inputs at the learnt rows; see `cerl.nets.tokens.read`
    x_next: Tensor | Whole  # the same at the bootstrap rows
    action: Tensor  # [S, M, B, T], or [S, M, B, T, A]
    reward: Tensor  # [S, M, B, T, J] n-step sum
    discount: Tensor  # [S, M, B, T, J], 0 at terminals
    weight: Tensor  # [S, M, B, T]


class Learnt(NamedTuple):
    """The learnt rows of a window."""

    first: int  # position in W
    count: int  # T
    weight: Tensor  # [S, M, B, T], 0 where there is nothing to learn

    def rows(self, ahead: Tensor | int = 0) -> Tensor | slice:
        """Positions in W, `ahead` rows after the learnt ones."""
        if isinstance(ahead, int):
            return slice(self.first + ahead, self.first + ahead + self.count)
        return self.first + torch.arange(self.count, device=ahead.device) + ahead

    def inputs(
        self, encoder: Encoder | Tokens, window: Window, ahead: Tensor | int = 0
    ) -> Tensor | Whole:
        """Inputs of the network, `ahead` rows after the learnt ones."""
        rows = self.rows(ahead)
        if isinstance(encoder, Encoder) and encoder.stack == 1 and isinstance(rows, slice):
            obs = window.obs[:, :, :, rows].flatten(2, 3)
            return encoder.pixels(obs.unsqueeze(3).contiguous())
        start = F.pad(~window.real[..., :-1], (1, 0), value=False)  # the row begins an episode
        if isinstance(encoder, Tokens):
            return encoder.inputs(window, start, rows)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=start.device)
            rows = rows.expand(*start.shape[:-1], self.count)
        return encoder(window.obs, start, rows)


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """weight [S, M, B, T] times a mask [S, N, B], or one for each learnt row [S, N, B, T]."""
    if mask is None:
        return weight
    return weight * (mask if mask.dim() == 4 else mask.unsqueeze(-1))


def learnt(encoder: Encoder | Tokens, window: Window, *, n: int) -> Learnt:
    """Where the learnt rows of a window lie. Args: n rows are only looked ahead at.

    Of windows that begin with an episode its rows alone are learnt, so that where episodes are
    short no row is learnt more often than where they are long.
    """
    first = encoder.context
    rows = window.reward.shape[-1] - first - n
    real = window.real[..., first : first + rows].float()
    if isinstance(encoder, Tokens) and encoder.begins:
        real = real.cumprod(-1)
    return Learnt(first, rows, window.weight.unsqueeze(-1) * real)


def transition(encoder: Encoder | Tokens, window: Window, *, n: int, gamma: Tensor) -> Transition:
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
    x, ahead = rows.inputs(encoder, window), steps if n > 1 else 1
    if isinstance(x, Whole):
        x_next = x._replace(rows=rows.rows(ahead))
    else:
        x_next = rows.inputs(encoder, window, ahead)
    return Transition(
        x=x,
        x_next=x_next,
        action=window.action[:, :, :, first : first + count],
        reward=reward,
        discount=discount,
        weight=rows.weight,
    )
