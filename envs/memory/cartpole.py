"""CartPole with partial observations: only positions, positions with noise, or only velocities.

After POPGym 1.0.7, which uses gymnasium's CartPole (Barto, Sutton and Anderson 1983; Euler steps of
0.02 s). Differs: the arithmetic is in float32 here and in float64 in the package. Every step pays
1 / length, also the one on which the pole falls. A fall is terminal; `length` agent steps are the
time limit, which the config sets. Quirk of the package: where only velocities are seen, the first
observation of an episode shows positions.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.envs.resident import Game
from cerl.kernels.random import gaussian

_GRAVITY = 9.8  # m / s^2
_CART, _POLE = 1.0, 0.1  # kg
_HALF = 0.5  # m, half the pole's length
_FORCE = 10.0  # N, on the cart, to the left or to the right
_TICK = 0.02  # s
_EDGE, _TILT = 2.4, 12 * math.pi / 180  # m and rad, where an episode ends
_START = 0.05  # each of the four numbers of the state starts uniformly in [-0.05, 0.05]


class State(NamedTuple):
    place: Tensor  # [G, 2] m and rad, of the cart and of the pole
    speed: Tensor  # [G, 2] m / s and rad / s
    error: Tensor  # [G, 2] noise that is added to the positions in the observation
    fresh: Tensor  # [G] bool, no step of the episode was taken yet


def cart_pole(*, speeds: bool, length: int, noise: float = 0.0) -> Game:
    """The rules.

    Args:    speeds, whether velocities are seen instead of positions; length of an episode, agent
             steps, which scales rewards; noise, standard deviation of the noise that is added to
             positions, m and rad.
    """
    draws = 4 if noise else 0
    return Game(
        reset=partial(_reset, noise=noise),
        step=partial(_step, noise=noise, length=length),
        observe=partial(_observe, speeds=speeds, noise=noise),
        draws=draws,
        reset_draws=4 + draws,
        observation=(2,),
        actions=(0, 1),
        dtype=torch.float32,
    )


def _errors(u: Tensor, like: Tensor, *, noise: float) -> Tensor:
    """Gaussian noise [G, 2] out of u [G, 4], or zeros like `like`."""
    return noise * gaussian(u.unflatten(-1, (2, 2))) if noise else torch.zeros_like(like)


def _reset(u: Tensor, *, noise: float) -> State:
    start = (2 * u[:, :4] - 1) * _START
    place, speed = start[:, 0::2], start[:, 1::2]
    error = _errors(u[:, 4:], place, noise=noise)
    return State(place, speed, error, torch.ones_like(u[:, 0], dtype=torch.bool))


def _step(
    state: State, action: Tensor, u: Tensor, *, noise: float, length: int
) -> tuple[State, Tensor, Tensor]:
    angle, turning = state.place[:, 1], state.speed[:, 1]
    cos, sin = angle.cos(), angle.sin()
    mass = _CART + _POLE
    force = torch.where(action == 1, _FORCE, -_FORCE)
    push = (force + _POLE * _HALF * turning**2 * sin) / mass
    bend = (_GRAVITY * sin - cos * push) / (_HALF * (4 / 3 - _POLE * cos**2 / mass))
    drive = push - _POLE * _HALF * bend * cos / mass
    place = state.place + _TICK * state.speed
    speed = state.speed + _TICK * torch.stack([drive, bend], -1)
    fallen = (place[:, 0].abs() > _EDGE) | (place[:, 1].abs() > _TILT)
    error = _errors(u, place, noise=noise)
    after = State(place, speed, error, torch.zeros_like(state.fresh))
    return after, torch.full_like(force, 1 / length), fallen


def _observe(state: State, *, speeds: bool, noise: float) -> Tensor:
    if speeds:
        return torch.where(state.fresh[:, None], state.place, state.speed)
    if not noise:
        return state.place
    seen = state.place + state.error
    ends = (2 * _EDGE, 2 * _TILT)
    return torch.stack([seen[:, k].clamp(-end, end) for k, end in enumerate(ends)], -1)
