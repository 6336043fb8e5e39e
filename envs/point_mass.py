"""A point mass on the device: pushed by a bounded force, it has to reach the middle and stay there.

Double integrator with drag in a square (a cube in three dimensions) of side 2. With force f, speed
v and place x, a step of 0.1 s is v' = v + 0.1 (5 f - 2 v), x' = x + 0.1 v', so a full push tends to
2.5 units a second. It starts at rest anywhere in the square; the reward is 1 in the middle and
falls linearly with the distance to 0 in a corner. Walls stop the mass; without walls leaving the
square is terminal.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config import PointMassEnv
from cerl.envs.resident import Game, Resident

_TICK = 0.1  # seconds of a step
_FORCE = 5.0  # of a full action, units / s^2
_DRAG = 2.0  # 1 / s


class State(NamedTuple):
    place: Tensor  # [G, dimensions] in [-1, 1]
    speed: Tensor  # [G, dimensions] units / s


def PointMass(
    config: PointMassEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
    fuse: bool | None = None,
) -> Resident:
    """S x E masses; see `Resident` for the arguments."""
    game = Game(
        reset=_reset,
        step=partial(_step, walls=config.walls),
        observe=_observe,
        draws=0,
        reset_draws=config.dimensions,
        observation=(2 * config.dimensions,),
        dtype=torch.float32,
        components=config.dimensions,
    )
    return Resident(
        game,
        name=config.name,
        envs=config.envs,
        sticky=0.0,
        time_limit=config.time_limit,
        seeds=seeds,
        salt=salt,
        device=device,
        longest=longest,
        fuse=fuse,
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
