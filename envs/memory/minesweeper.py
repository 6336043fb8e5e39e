"""MineSweeper on an unseen board: an observation is only the number of mines around a square.

After POPGym 1.0.7. An action is the number of a square, counted row by row; the package's is a pair
(row, column). The network has to see its previous action too. The number of mines includes one on
the square itself. Naming a mine is terminal, as is naming the last free square. The time limit,
which the config sets, is as many agent steps as there are free squares.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cerl.envs.memory import deck
from cerl.envs.resident import Game


class State(NamedTuple):
    mine: Tensor  # [G, squares] bool, the square holds a mine
    viewed: Tensor  # [G, squares] bool, the square is free and was named
    count: Tensor  # [G] int64, mines around the square that was named last


def minesweeper(*, side: int, mines: int) -> Game:
    """The rules. Args: side of the board, squares; number of mines."""
    free = side * side - mines
    counts = min(mines + 1, 10)
    return Game(
        reset=partial(_reset, mines=mines),
        step=partial(_step, side=side, free=free),
        observe=partial(_observe, counts=counts),
        draws=0,
        reset_draws=side * side,
        observation=(counts,),
        actions=tuple(range(side * side)),
    )


def _reset(u: Tensor, *, mines: int) -> State:
    place = deck.places(u)
    mine = place < mines
    return State(mine, torch.zeros_like(mine), torch.zeros_like(place[:, 0]))


def _step(
    state: State, action: Tensor, u: Tensor, *, side: int, free: int
) -> tuple[State, Tensor, Tensor]:
    hit = deck.at(state.mine, action)
    again = deck.at(state.viewed, action)
    viewed = state.viewed | (deck.one_hot(action, side * side) & ~state.mine)
    right = 1 / free
    reward = torch.where(hit, -0.5 - right, torch.where(again, -0.5 / (free - 2), right))
    count = deck.at(_around(state.mine, side=side), action)
    return State(state.mine, viewed, count), reward, hit | (viewed | state.mine).all(-1)


def _around(mine: Tensor, *, side: int) -> Tensor:
    """Number of mines in the 3 x 3 squares around each square, [G, squares] int64."""
    board = pad(mine.view(-1, side, side).long(), (1, 1, 1, 1))
    rows = board[:, :-2] + board[:, 1:-1] + board[:, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).flatten(1)


def _observe(state: State, *, counts: int) -> Tensor:
    return deck.one_hot(state.count, counts)
