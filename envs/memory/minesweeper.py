"""MineSweeper on an unseen board: the answer to a square is only how many mines lie around it.

After POPGym 1.0.7. An action names a square, row by row (the package's is a pair); the previous
action has to be an input of the network. The count includes the square itself. A mine ends the game
by terminal, as does the last free square; otherwise it is truncated after as many steps as there
are free squares.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cerl.envs.memory import deck
from cerl.envs.resident import Game


class State(NamedTuple):
    mine: Tensor  # [G, squares] bool
    viewed: Tensor  # [G, squares] bool, free squares named
    count: Tensor  # [G] int64, the last answer


def minesweeper(*, side: int, mines: int) -> Game:
    """The game."""
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
    """Mines in the 3 x 3 squares around each, [G, squares] int64."""
    board = pad(mine.view(-1, side, side).long(), (1, 1, 1, 1))
    rows = board[:, :-2] + board[:, 1:-1] + board[:, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).flatten(1)


def _observe(state: State, *, counts: int) -> Tensor:
    return deck.one_hot(state.count, counts)
