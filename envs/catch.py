"""Catch on the device: a ball falls one row a step, and a paddle on the bottom row must catch it.

After the dynamic task of Mnih et al. 2014 (arXiv:1406.6247), in the form of DeepMind's bsuite: the
ball starts in a random column of the top row, the paddle in the middle; actions are left, stay,
right; the only reward is +1 or -1 on the last step. An episode takes rows - 1 agent steps. An
observation is one plane of cells that shows ball and paddle. Differs: bsuite's observations are
float32, these are bool; random numbers are cerl's own.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config import CatchEnv
from cerl.envs.resident import Game


class State(NamedTuple):
    row: Tensor  # [G] int32, of the ball
    column: Tensor  # [G] int32, of the ball
    paddle: Tensor  # [G] int32, its column; it stays on the bottom row


def game(config: CatchEnv) -> Game:
    """The rules of Catch on the config's board; observations [1, rows, columns] bool."""
    return rules(rows=config.rows, columns=config.columns)


def rules(*, rows: int = 10, columns: int = 5) -> Game:
    """The rules of Catch, also an example of a game of one's own: `cerl train game/ddqn`.

    Args: rows and columns, height and width of the board in cells, 2 or more.
    """
    return Game(
        reset=partial(_reset, columns=columns),
        step=partial(_step, rows=rows, columns=columns),
        observe=partial(_observe, rows=rows, columns=columns),
        draws=0,
        reset_draws=1,
        observation=(1, rows, columns),
        actions=(0, 1, 2),
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
