"""Breakout: a paddle keeps a ball in play that breaks three rows of bricks; reward 1 per brick.

The wall is one integer of 30 bits, one a brick. So a game is nine numbers, and a step is pointwise
arithmetic on them. Quirks of the original: a ball that has just broken a brick flies through the
next one, and the wall is built anew only when the ball reaches the paddle's row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS = 4  # paddle, ball, trail, brick
MINIMAL = (0, 1, 3)
DRAWS = 0
RESET_DRAWS = 1

_WALL = (1 << 30) - 1
_FLOOR = 9


class State(NamedTuple):
    row: Tensor  # [G] int32, of the ball
    column: Tensor  # [G] int32, of the ball
    down: Tensor  # [G] int32, the ball's vertical speed, +1 or -1 cell a step
    right: Tensor  # [G] int32, the ball's horizontal speed, +1 or -1 cell a step
    trail_row: Tensor  # [G] int32, of the ball before the last step
    trail_column: Tensor  # [G] int32, of the ball before the last step
    paddle: Tensor  # [G] int32, its column; it stays on the bottom row
    bricks: Tensor  # [G] int32, bit 10 * (row - 1) + column; rows 1 to 3
    strike: Tensor  # [G] bool, the ball met a brick on the last step


def reset(u: Tensor) -> State:
    """The ball enters from the left or the right wall at row 3, falling inwards."""
    from_right = (u[:, 0] * 2).to(torch.int32)  # [G]
    row = torch.full_like(from_right, 3)
    down = torch.ones_like(from_right)
    return State(
        row=row,
        column=from_right * 9,
        down=down,
        right=1 - 2 * from_right,
        trail_row=row,
        trail_column=from_right * 9,
        paddle=torch.full_like(from_right, 4),
        bricks=torch.full_like(from_right, _WALL),
        strike=torch.zeros_like(from_right, dtype=torch.bool),
    )


def step(state: State, action: Tensor, u: Tensor, *, ramping: bool) -> tuple[State, Tensor, Tensor]:
    """Moves the paddle, then the ball.

    Args:    `u` and `ramping` are unused: a step is deterministic and the difficulty constant.
    """
    paddle = (state.paddle + (action == 3).int() - (action == 1).int()).clamp(0, 9)
    ahead = state.column + state.right
    column = ahead.clamp(0, 9)
    right = torch.where(column != ahead, -state.right, state.right)
    above = state.row + state.down
    row = above.clamp(min=0)

    bit = (10 * row - 10 + column).clamp(0, 29)
    brick = (row >= 1) & (row <= 3) & ((state.bricks >> bit) & 1 != 0)
    broken = brick & ~state.strike
    bricks = torch.where(broken, state.bricks & ~(1 << bit), state.bricks)

    floor = row == _FLOOR
    bricks = torch.where(floor & (bricks == 0), _WALL, bricks)
    over_paddle = floor & (state.column == paddle)
    on_corner = floor & (column == paddle) & ~over_paddle
    bounced = broken | over_paddle | on_corner
    terminal = floor & ~over_paddle & ~on_corner
    played = State(
        row=torch.where(bounced, state.row, row),
        column=column,
        down=torch.where(bounced | (above < 0), -state.down, state.down),
        right=torch.where(on_corner, -right, right),
        trail_row=state.row,
        trail_column=state.column,
        paddle=paddle,
        bricks=bricks,
        strike=brick,
    )
    return played, broken.float(), terminal


def observe(state: State) -> Tensor:
    """The board, [G, 4, 10, 10] bool."""
    ten = torch.arange(10, dtype=torch.int32, device=state.row.device)
    # A row of a channel is an integer of ten bits, one a column, until the last line.
    paddle = torch.where(ten == _FLOOR, 1 << state.paddle[:, None], 0)  # [G, 10]
    ball = torch.where(ten == state.row[:, None], 1 << state.column[:, None], 0)
    trail = torch.where(ten == state.trail_row[:, None], 1 << state.trail_column[:, None], 0)
    # `ten` is only compared: the compiler of torch 2.11 fails on a clamp of arithmetic with it.
    wall = torch.zeros_like(ball)
    for line in range(3):
        wall = torch.where(ten == line + 1, (state.bricks[:, None] >> 10 * line) & 1023, wall)
    shown = torch.stack([paddle, ball, trail, wall], 1)
    return shown[..., None] & (1 << ten) != 0  # [G, 4, 10, 10]
