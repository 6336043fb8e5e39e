"""Catch on the device: a ball falls one row a step, a paddle on the bottom row has to be under it.

After the dynamic task of Mnih et al. 2014 (arXiv:1406.6247), as bsuite has it: the ball starts in a
random column of the top row, the paddle in the middle; actions are left, stay, right; the only
reward is +1 or -1 on the last step. An episode takes rows - 1 steps. One plane shows both.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config import CatchEnv
from cerl.envs.resident import Game, Resident


class State(NamedTuple):
    row: Tensor  # [G] int32, the ball's
    column: Tensor  # [G] int32, the ball's
    paddle: Tensor  # [G] int32, column on the bottom row


def Catch(
    config: CatchEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
    fuse: bool | None = None,
) -> Resident:
    """S x E games on boards of one size; see `Resident` for the arguments."""
    rows, columns = config.rows, config.columns
    game = Game(
        reset=partial(_reset, columns=columns),
        step=partial(_step, rows=rows, columns=columns),
        observe=partial(_observe, rows=rows, columns=columns),
        draws=0,
        reset_draws=1,
        observation=(1, rows, columns),
        actions=(0, 1, 2),
    )
    return Resident(
        game,
        name=config.name,
        envs=config.envs,
        sticky=config.sticky,
        time_limit=0,
        seeds=seeds,
        salt=salt,
        device=device,
        longest=longest,
        fuse=fuse,
    )


def _reset(u: Tensor, *, columns: int) -> State:
    column = (u[:, 0] * columns).to(torch.int32)
    return State(
        row=torch.zeros_like(column), column=column, paddle=torch.full_like(column, columns // 2)
    )


def _step(
    state: State, action: Tensor, u: Tensor, *, rows: int, columns: int
) -> tuple[State, Tensor, Tensor]:
    paddle = (state.paddle + action.int() - 1).clamp(0, columns - 1)
    row = state.row + 1
    terminal = row >= rows - 1
    won = torch.where(paddle == state.column, 1.0, -1.0)
    return State(row, state.column, paddle), torch.where(terminal, won, 0.0), terminal


def _observe(state: State, *, rows: int, columns: int) -> Tensor:
    cell = torch.arange(rows * columns, dtype=torch.int32, device=state.row.device)
    ball = cell == (state.row * columns + state.column)[:, None]
    paddle = cell == (state.paddle + (rows - 1) * columns)[:, None]
    return (ball | paddle).view(-1, 1, rows, columns)
