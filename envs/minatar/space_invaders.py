"""Space Invaders: shoot a block of aliens (reward 1 each) that comes down and shoots back.

The 100 cells of a kind of object are two integers of 50 bits ("words"), one for the upper five rows
and one for the lower five; a cell is bit 10 * (row % 5) + column. So a step is arithmetic on a few
numbers of each game. There is no randomness. With ramping, each new block waits one step less
between its moves than the block before, down to six steps.

Quirks of the original: the column of aliens nearest to the cannon shoots, and of two that are
equally near the left one; when the block steps down, aliens on the floor appear again at the top,
in the last state of the episode; a new block keeps the direction and the waiting time of the block
before.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS = 6  # cannon, alien, alien going left, alien going right, shot, bomb
MINIMAL = (0, 1, 3, 5)
DRAWS = 0
RESET_DRAWS = 0

_COOLDOWN = 5  # steps between shots
_BOMBS = 10  # steps between bombs
_SLOWEST, _FASTEST = 12, 6  # steps between moves of a full block: the first one, and at the limit

_HALF = (1 << 50) - 1
_COLUMN = sum(1 << (10 * row) for row in range(5))  # the cells of column 0 in a word
_BLOCK = sum(0b11111100 << (10 * row) for row in range(4))  # the aliens of a new block


class State(NamedTuple):
    column: Tensor  # [G] int64, of the cannon
    cooldown: Tensor  # [G] int64, steps until the next shot may be fired
    goes_left: Tensor  # [G] bool, the direction of the block of aliens
    move_wait: Tensor  # [G] int64, steps until the block moves
    move_period: Tensor  # [G] int64, steps between moves of a full block
    bomb_wait: Tensor  # [G] int64, steps until the next bomb
    upper_aliens: Tensor  # [G] int64 words, rows 0 to 4
    lower_aliens: Tensor  # [G] int64 words, rows 5 to 9
    upper_shots: Tensor  # [G] int64 words
    lower_shots: Tensor  # [G] int64 words
    upper_bombs: Tensor  # [G] int64 words
    lower_bombs: Tensor  # [G] int64 words


def reset(u: Tensor) -> State:
    """A full block of 4 x 6 aliens that goes left. Args: `u` is unused."""
    zero = torch.zeros(u.shape[0], dtype=torch.int64, device=u.device)
    return State(
        column=torch.full_like(zero, 5),
        cooldown=zero,
        goes_left=torch.ones_like(zero, dtype=torch.bool),
        move_wait=torch.full_like(zero, _SLOWEST),
        move_period=torch.full_like(zero, _SLOWEST),
        bomb_wait=torch.full_like(zero, _BOMBS),
        upper_aliens=torch.full_like(zero, _BLOCK),
        lower_aliens=zero,
        upper_shots=zero,
        lower_shots=zero,
        upper_bombs=zero,
        lower_bombs=zero,
    )


def step(state: State, action: Tensor, u: Tensor, *, ramping: bool) -> tuple[State, Tensor, Tensor]:
    """Moves in turn: cannon, shots, bombs, aliens; then a bomb is dropped and shots hit aliens.

    Args:    `u` is unused; ramping, each cleared block makes the next one move more often.
    """
    fires = (action == 5) & (state.cooldown == 0)
    column = (state.column + (action == 3).long() - (action == 1).long()).clamp(0, 9)
    cannon = 1 << 40 + column  # in the lower half

    # A new shot starts in row 9 and moves up in the same step. A bomb in row 9 leaves the board.
    lower_shots = state.lower_shots | torch.where(fires, cannon, 0)
    upper_shots = state.upper_shots >> 10 | lower_shots << 40 & _HALF
    lower_shots = lower_shots >> 10
    lower_bombs = state.lower_bombs << 10 & _HALF | state.upper_bombs >> 40
    upper_bombs = state.upper_bombs << 10 & _HALF
    terminal = (lower_bombs | state.lower_aliens) & cannon != 0

    moves = state.move_wait == 0
    upper, lower, goes_left, landed = _march(state)
    upper = torch.where(moves, upper, state.upper_aliens)
    lower = torch.where(moves, lower, state.lower_aliens)
    goes_left = torch.where(moves, goes_left, state.goes_left)
    terminal = terminal | (moves & (landed | (lower & cannon != 0)))

    drops = state.bomb_wait == 0
    upper_bomber, lower_bomber = _bomber(upper, lower, column)
    upper_bombs = upper_bombs | torch.where(drops, upper_bomber, 0)
    lower_bombs = lower_bombs | torch.where(drops, lower_bomber, 0)

    upper_hits, lower_hits = upper & upper_shots, lower & lower_shots
    upper, lower = upper ^ upper_hits, lower ^ lower_hits
    cleared = (upper | lower) == 0
    period = state.move_period
    if ramping:
        period = (period - cleared.long()).clamp(min=_FASTEST)
    count = _count(state.upper_aliens, state.lower_aliens)
    played = State(
        column=column,
        cooldown=(torch.where(fires, _COOLDOWN, state.cooldown) - 1).clamp(min=0),
        goes_left=goes_left,
        move_wait=torch.where(moves, torch.minimum(count, state.move_period), state.move_wait) - 1,
        move_period=period,
        bomb_wait=torch.where(drops, _BOMBS, state.bomb_wait) - 1,
        upper_aliens=torch.where(cleared, _BLOCK, upper),
        lower_aliens=lower,
        upper_shots=upper_shots ^ upper_hits,
        lower_shots=lower_shots ^ lower_hits,
        upper_bombs=upper_bombs,
        lower_bombs=lower_bombs,
    )
    return played, _count(upper_hits, lower_hits).float(), terminal


def observe(state: State) -> Tensor:
    """The board, [G, 6, 10, 10] bool."""
    left, cannon = state.goes_left, 1 << 40 + state.column
    # Shifted by 50 bits, the cannon in the lower half leaves zeros for the upper half.
    upper = (cannon >> 50, state.upper_aliens, state.upper_shots, state.upper_bombs)
    lower = (cannon, state.lower_aliens, state.lower_shots, state.lower_bombs)
    planes = []
    for first, aliens, *rest in (upper, lower):
        ways = torch.where(left, aliens, 0), torch.where(left, 0, aliens)
        planes.append(torch.stack([first, aliens, *ways, *rest], 1)[..., None])  # [G, 6, 1]
    ten = torch.arange(10, device=cannon.device)
    # The ten bits of each row. They are made int16 before they become ten cells each, so that the
    # large tensor holds narrow numbers.
    rows = torch.where(ten < 5, planes[0], planes[1]) >> 10 * (ten % 5) & 1023  # [G, 6, 10]
    return rows.short()[..., None] & (1 << ten).short() != 0  # [G, 6, 10, 10]


def _march(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block of aliens after a move: by a cell, or down by a row if it is at the wall.

    Returns: its upper and lower words, whether it goes left, whether aliens were on the floor when
             it moved down.
    """
    upper, lower, left = state.upper_aliens, state.lower_aliens, state.goes_left
    wall = torch.where(left, _COLUMN, _COLUMN << 9)
    turns = (upper | lower) & wall != 0
    upper_down = upper << 10 & _HALF | lower >> 40
    lower_down = lower << 10 & _HALF | upper >> 40
    upper_on = torch.where(turns, upper_down, torch.where(left, upper >> 1, upper << 1))
    lower_on = torch.where(turns, lower_down, torch.where(left, lower >> 1, lower << 1))
    return upper_on, lower_on, left ^ turns, turns & (lower >> 40 != 0)


def _bomber(upper: Tensor, lower: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The alien that drops a bomb: the lowest one of the column nearest to the cannon.

    There always is one, since a cleared block is replaced at once.

    Args:    upper, lower, the aliens' words [G]; column [G] of the cannon.
    Returns: upper and lower words with its bit.
    """
    columns = upper | lower
    columns = (columns | columns >> 10 | columns >> 20 | columns >> 30 | columns >> 40) & 1023
    here = (1 << column + 1) - 1
    left, right = columns & here, columns & ~here
    left = left | left >> 1
    left = left | left >> 2
    left = left | left >> 4
    left = left | left >> 8
    # What remains is the nearest column i on the left and j on the right, as 2**i and 2**j. The
    # left one is nearer, or as near, if column - i <= j - column: 2**i * 2**j >= 2**(2 * column).
    left, right = left ^ left >> 1, right & -right
    # Without a left column, the product is 0 and the right one is taken.
    nearest = torch.where((right == 0) | (left * right >= 1 << 2 * column), left, right)
    shaft = nearest * _COLUMN
    upper, lower = upper & shaft, lower & shaft
    return torch.where(lower == 0, _lowest(upper), 0), _lowest(lower)


def _lowest(word: Tensor) -> Tensor:
    """The bit nearest to the floor, of a word whose bits are all in one column."""
    word = word | word >> 10
    word = word | word >> 20
    word = word | word >> 40
    return word ^ word >> 10


def _count(upper: Tensor, lower: Tensor) -> Tensor:
    """Number of bits in both words, [G]: they are summed within fields of 2, 4, then 8 bits."""
    pairs, nibbles, bytes_, ones = (((1 << 64) - 1) // k for k in (3, 5, 17, 255))
    nibble = 0
    for word in (upper, lower):
        word = word - (word >> 1 & pairs)
        nibble = nibble + (word & nibbles) + (word >> 2 & nibbles)
    total = (nibble & bytes_) + (nibble >> 4 & bytes_)
    return total * ones >> 56 & 255
