"""A point mass on the device: pushed by a bounded force, it has to reach the middle and stay there.

A task of cerl's own, the smallest one with continuous actions (dm_control's task of the same name
has other dynamics). The mass is a double integrator with drag in a square (a cube in three
dimensions) of side 2. With force f, speed v and place x, an agent step of 0.1 s is
v' = v + 0.1 (5 f - 2 v), x' = x + 0.1 v', so under a full push the speed tends to 2.5 units a
second. An episode starts at rest at a uniformly drawn place. The reward is 1 in the middle and
falls linearly with the distance from it, to 0 in a corner. Walls stop the mass; without walls,
leaving the square is terminal.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config import PointMassEnv
from cerl.envs.resident import Game

_TICK = 0.1  # seconds of an agent step
_FORCE = 5.0  # units / s^2, the acceleration by a full action
_DRAG = 2.0  # 1 / s


class State(NamedTuple):
    place: Tensor  # [G, dimensions] in [-1, 1]
    speed: Tensor  # [G, dimensions] units / s


def game(config: PointMassEnv) -> Game:
    """The rules of the point mass; an observation is place and speed, [2 dimensions] float32."""
    return rules(dimensions=config.dimensions, walls=config.walls)


def rules(*, dimensions: int = 2, walls: bool = True) -> Game:
    """The rules of the point mass, also an example of a game of one's own: `cerl train game/sac`.

    Args: dimensions of the space that the mass moves in; walls, without them leaving the square
          ends the episode.
    """
    return Game(
        reset=_reset,
        step=partial(_step, walls=walls),
        observe=_observe,
        draws=0,
        reset_draws=dimensions,
        observation=(2 * dimensions,),
        dtype=torch.float32,
        components=dimensions,
    )


def _reset(u: Tensor) -> State:
    return State(place=2 * u - 1, speed=torch.zeros_like(u))


def _step(state: State, action: Tensor, u: Tensor, *, walls: bool) -> tuple[State, Tensor, Tensor]:
    speed = state.speed + _TICK * (_FORCE * action - _DRAG * state.speed)
    place = state.place + _TICK * speed
    beyond = place.abs() > 1
    place = place.clamp(-1, 1)
    speed = torch.where(beyond, 0.0, speed)
    left = beyond.any(-1)
    reward = 1 - place.norm(dim=-1) / place.shape[-1] ** 0.5
    return State(place, speed), reward, torch.zeros_like(left) if walls else left


def _observe(state: State) -> Tensor:
    return torch.cat([state.place, state.speed], -1)
