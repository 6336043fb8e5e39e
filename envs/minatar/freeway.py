"""Freeway: a chicken crosses eight lanes of traffic; reward 1 per crossing, which draws new cars.

There is one car on each lane. The chicken moves at most every third step. Quirk of the original:
the end after 2501 steps is a terminal, not a truncation.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CHANNELS = 7  # chicken, car, and the trails of cars that need 1, 2, 3, 4 or 5 steps for a cell
MINIMAL = (0, 2, 4)
DRAWS = 16
RESET_DRAWS = 16

_LANES = 8  # rows 1 to 8
_COLUMN = 4  # of the chicken
_HOME = 9  # row of the chicken at the start
_REST = 3  # steps between two moves of the chicken
_STEPS = 2500


class State(NamedTuple):
    row: Tensor  # [G] int32, of the chicken
    rest: Tensor  # [G] int32, steps until the chicken may move
    left: Tensor  # [G] int32, steps until the game ends
    column: Tensor  # [G, 8] int32, of the car on each lane
    wait: Tensor  # [G, 8] int32, steps until the car moves
    speed: Tensor  # [G, 8] int32, steps that the car needs for a cell, 1 to 5; below 0: leftwards


def _traffic(u: Tensor) -> Tensor:
    """Random speeds and directions of all cars, as in `State.speed`. Args: u [G, 16]."""
    pace = (u[:, :_LANES] * 5).to(torch.int32) + 1
    return torch.where(u[:, _LANES : 2 * _LANES] < 0.5, -pace, pace)  # [G, 8]


def reset(u: Tensor) -> State:
    """Every car at the left edge, with a random speed and direction. Args: u [G, 16]."""
    speed = _traffic(u)
    row = torch.full_like(speed[:, 0], _HOME)
    return State(
        row=row,
        rest=torch.full_like(row, _REST),
        left=torch.full_like(row, _STEPS),
        column=torch.zeros_like(speed),
        wait=speed.abs(),
        speed=speed,
    )


def step(state: State, action: Tensor, u: Tensor, *, ramping: bool) -> tuple[State, Tensor, Tensor]:
    """Moves the chicken, then the cars.

    Args:    u [G, 16] decides the speeds of new cars after a crossing; `ramping` is unused: the
             difficulty is constant.
    """
    lane = torch.arange(1, _LANES + 1, dtype=torch.int32, device=u.device)
    able = state.rest == 0
    move = torch.where(able, (action == 4).int() - (action == 2).int(), 0)
    rest = torch.where(move != 0, _REST, state.rest)
    row = (state.row + move).clamp(0, 9)
    goal = row == 0
    row = torch.where(goal, _HOME, row)
    fresh = _traffic(u)
    speed = torch.where(goal[:, None], fresh, state.speed)
    wait = torch.where(goal[:, None], fresh.abs(), state.wait)

    drives = wait == 0
    column = torch.where(drives, (state.column + speed.sign()) % 10, state.column)
    wait = torch.where(drives, speed.abs(), wait - 1)
    met = (state.column == _COLUMN) | (column == _COLUMN)  # before or after the car has moved
    hit = (met & (lane == row[:, None])).any(1)
    left = state.left - 1
    played = State(
        row=torch.where(hit, _HOME, row),
        rest=(rest - 1).clamp(min=0),
        left=left,
        column=column,
        wait=wait,
        speed=speed,
    )
    return played, goal.float(), left < 0


def observe(state: State) -> Tensor:
    """The board, [G, 7, 10, 10] bool."""
    ten = torch.arange(10, dtype=torch.int32, device=state.row.device)
    # In each channel, at most one cell of a row is set: its column, or -1 for none.
    chicken = torch.where(ten == state.row[:, None], _COLUMN, -1).to(torch.int32)  # [G, 10]
    car = pad(state.column, (1, 1), value=-1)
    behind = pad((state.column - state.speed.sign()) % 10, (1, 1), value=-1)
    pace = pad(state.speed.abs(), (1, 1))
    trails = torch.where(pace[:, None] == ten[1:6, None], behind[:, None], -1)  # [G, 5, 10]
    shown = torch.cat([chicken[:, None], car[:, None], trails], 1)
    return shown[..., None] == ten  # [G, 7, 10, 10]
