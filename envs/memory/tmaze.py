"""T-maze: a cue at the start of a corridor tells which way to turn at its end.

After the T-mazes of Ni et al. 2023 (arXiv:2307.03864), with a penalty of -1 / length; variants by
other authors change the penalty, or add the time or noise to the observation.

The corridor has the cells 0 to oracle + length. The last one is the junction, with a goal above and
one below it. Actions are right, up, left, down; a move into a wall does nothing. In the passive
task (oracle 0) the episode starts in cell 0 with the cue. In the active one (oracle 1) it starts
one cell to the right of it, and the cue is shown on the first visit of cell 0. The observation is
[1 at the junction or a goal, else 0; signal]. The signal is the cue (+1 up, -1 down) on the step
that shows it, on a goal +1 for the upper and -1 for the lower one, and 0 otherwise.

An episode takes length + 1 + 2 oracle agent steps; the last one is terminal. It pays 1 if the agent
is then on the goal that the cue named. Every other step costs 1 / length if after it, the t-th of
the episode, the agent is left of cell t - oracle. An agent on the shortest path by way of the cue
to the junction never is.
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
    goal: Tensor  # [G] int32, y of the goal that pays
    signal: Tensor  # [G] int32, the cue if this step shows it, else 0
    told: Tensor  # [G] bool, the cue was shown
    time: Tensor  # [G] int32, agent steps of the episode


def t_maze(*, length: int, oracle: int) -> Game:
    """The rules. Args: length of the corridor; oracle, distance from start to cue (both cells)."""
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
