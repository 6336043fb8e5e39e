"""Battleship on an unseen board: sink ships of 2, 3, 3 and 4 squares, told only hit or miss.

After POPGym 1.0.7. An action is the number of a square, counted row by row; the package's is a pair
(row, column). The network has to see its previous action too. A square that was hit before counts
as a miss. Ships are placed one after the other, each uniformly among the places that are free. The
last hit is terminal; the time limit, which the config sets, is as many agent steps as there are
squares.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cerl.envs.memory import deck
from cerl.envs.resident import Game

SHIPS = (2, 3, 3, 4)  # squares, in the order in which they are placed


class State(NamedTuple):
    ship: Tensor  # [G, squares] bool, the square is part of a ship
    guessed: Tensor  # [G, squares] bool, the square was named before
    hit: Tensor  # [G] bool, the square named on the last step was a hit


def battleship(*, side: int) -> Game:
    """The rules. Args: side of the board, squares."""
    return Game(
        reset=partial(_reset, side=side),
        step=_step,
        observe=_observe,
        draws=0,
        reset_draws=len(SHIPS),
        observation=(2,),
        actions=tuple(range(side * side)),
    )


def _reset(u: Tensor, *, side: int) -> State:
    board = torch.zeros(len(u), side, side, dtype=torch.int32, device=u.device)
    for draw, size in zip(u.unbind(-1), SHIPS, strict=True):
        board = board + _placed(board, draw, size)
    ship = board.flatten(1) > 0
    return State(ship, torch.zeros_like(ship), torch.zeros_like(ship[:, 0]))


def _placed(board: Tensor, u: Tensor, size: int) -> Tensor:
    """The squares of one more ship, [G, side, side] int32, 1 where it lies.

    A place is named by its first square. The free places are numbered row by row: first those along
    a row, by their leftmost square, then those along a column, by their uppermost one. The ship
    takes the place with number floor(u * number of places).

    Args:    board [G, side, side] int32, above 0 where ships lie; u [G] uniform in [0, 1); size of
             the ship, squares.
    """
    taken = (board.unfold(axis, size, 1).sum(-1) for axis in (2, 1))
    along, down = (squares == 0 for squares in taken)  # True at the first square of a free place
    rows = torch.cat([along.sum(-1), down.sum(-1)], -1)
    places = rows.sum(-1)
    number = (u * places).long().clamp(max=places - 1)
    # A place's number is the count of those in earlier rows plus its number within its row. One
    # running sum over all places would do, but the compiler of torch 2.11 fails on it.
    before = (rows.cumsum(-1) - rows).unsqueeze(-1)
    before_along, before_down = before.split([along.shape[1], down.shape[1]], 1)
    along, down = (
        (free & (earlier + free.cumsum(-1) == number[:, None, None] + 1)).int()
        for free, earlier in ((along, before_along), (down, before_down))
    )
    squares = torch.zeros_like(board)
    for k in range(size):
        rest = size - 1 - k
        squares = squares + pad(along, (k, rest)) + pad(down, (0, 0, k, rest))
    return squares


def _step(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    squares, needed = state.ship.shape[-1], sum(SHIPS)
    hit = deck.at(state.ship & ~state.guessed, action)
    guessed = state.guessed | deck.one_hot(action, squares)
    reward = torch.where(hit, 1 / needed, -1 / (squares - needed))
    sunk = (guessed | ~state.ship).all(-1)
    return State(state.ship, guessed, hit), reward, sunk


def _observe(state: State) -> Tensor:
    return deck.one_hot(state.hit.long(), 2)
