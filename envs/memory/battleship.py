"""Battleship on an unseen board: sink ships of 2, 3, 3 and 4 squares, told only hit or miss.

After POPGym 1.0.7. An action names a square, row by row (the package's is a pair); the previous
action has to be an input of the network. A square that was hit before counts as a miss. Each ship
lies, uniformly, in one of the places that those before it left free. An episode ends by terminal
with the last hit, and is truncated after as many steps as there are squares.
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
    ship: Tensor  # [G, squares] bool
    guessed: Tensor  # [G, squares] bool
    hit: Tensor  # [G] bool, the last guess


def battleship(*, side: int) -> Game:
    """The game."""
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
    """The squares of a further ship, [G, side, side] int32.

    Free places are counted row by row, first those that lie along a row, by their leftmost square,
    then those along a column, by their uppermost; the one with number floor(u * places) is taken.
    """
    taken = (board.unfold(axis, size, 1).sum(-1) for axis in (2, 1))
    along, down = (squares == 0 for squares in taken)  # free places by their first square
    rows = torch.cat([along.sum(-1), down.sum(-1)], -1)
    places = rows.sum(-1)
    number = (u * places).long().clamp(max=places - 1)
    # Counts of rows, then of a row's places: running sums over all places are split up by
    # torch.compile, whose release 2.11 fails on that.
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
