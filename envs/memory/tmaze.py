"""T-maze: a cue, a corridor, and at its end the turn that the cue told.

After Ni et al. 2023 (arXiv:2307.03864), their classic T-mazes with a penalty of -1 / length (other
authors' variants change the penalty, or add the time or noise to the observation). The corridor's
cells are 0 to oracle + length, the last one is the junction, goals lie on both sides of it. Passive
(oracle 0): the episode starts on the cue. Active (oracle 1): it starts one cell to the right of it,
and the cue is told on the first visit of cell 0. Actions are right, up, left, down; into a wall
nothing moves. The observation is [at the junction or a goal, signal]: the signal is the cue (+1 up,
-1 down) where it is told, beside the junction where one stands (+1, -1), and else 0. Every episode
takes length + 1 + 2 oracle steps and ends by terminal: the last step pays 1 on the right goal;
every other step that is further behind than the shortest way to the cue and back allows costs
1 / length.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.envs.resident import Game

RIGHT, UP, LEFT, DOWN = range(4)


class State(NamedTuple):
    x: Tensor  # [G] int32, cell of the corridor
    y: Tensor  # [G] int32, +1 or -1 on a goal, else 0
    goal: Tensor  # [G] int32, y of the right one
    signal: Tensor  # [G] int32, the cue as told on this step, else 0
    told: Tensor  # [G] bool
    time: Tensor  # [G] int32, agent steps of the episode


def t_maze(*, length: int, oracle: int) -> Game:
    """The game. Args: length of the corridor and oracle, cells from start to cue."""
    return Game(
        reset=partial(_reset, oracle=oracle),
        step=partial(_step, length=length, oracle=oracle),
        observe=partial(_observe, junction=oracle + length),
        draws=0,
        reset_draws=1,
        observation=(2,),
        actions=(RIGHT, UP, LEFT, DOWN),
        dtype=torch.float32,
    )


def _reset(u: Tensor, *, oracle: int) -> State:
    goal = torch.where(u[:, 0] < 0.5, -1, 1).int()
    none = torch.zeros_like(goal)
    return State(
        x=torch.full_like(goal, oracle),
        y=none,
        goal=goal,
        signal=none if oracle else goal,
        told=torch.full_like(goal, oracle == 0, dtype=torch.bool),
        time=none,
    )


def _step(
    state: State, action: Tensor, u: Tensor, *, length: int, oracle: int
) -> tuple[State, Tensor, Tensor]:
    junction = oracle + length
    right = (action == RIGHT).int() - (action == LEFT).int()
    up = (action == UP).int() - (action == DOWN).int()
    x = torch.where(state.y == 0, state.x + right, state.x).clamp(0, junction)
    y = torch.where(state.x == junction, state.y + up, state.y).clamp(-1, 1)
    time = state.time + 1
    over = time >= length + 1 + 2 * oracle
    late = torch.where(x < time - oracle, -1 / length, 0.0)
    reward = torch.where(over, (y == state.goal).float(), late)
    cue = (x == 0) & ~state.told
    signal = torch.where(cue, state.goal, 0)
    return State(x, y, state.goal, signal, state.told | cue, time), reward, over


def _observe(state: State, *, junction: int) -> Tensor:
    there = state.x == junction
    signal = torch.where(there, state.y, state.signal)
    return torch.stack([there, signal], -1).float()
