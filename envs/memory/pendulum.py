"""Pendulum with its velocity hidden: swing it up with a bounded torque, seeing only the angle.

After POPGym 1.0.7, which uses gymnasium's Pendulum (steps of 0.05 s). Differs: the arithmetic is in
float32 here and in float64 in the package. An action in [-1, 1] is a torque in [-2, 2] N m. Rewards
are scaled so that an episode's return is within [-1, 1]. There is no terminal: `length` agent steps
are the time limit, which the config sets.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.envs.resident import Game
from cerl.kernels.random import gaussian

_GRAVITY = 10.0  # m / s^2; mass 1 kg, length 1 m
_TORQUE = 2.0  # N m of a full action
_TICK = 0.05  # s
_FASTEST = 8.0  # rad / s, largest velocity
# Half the largest cost of a step: a cost of 0 is mapped to 1 / length, the largest to -1 / length.
_MIDDLE = 16.2736044 / 2


class State(NamedTuple):
    angle: Tensor  # [G] rad from upright, not wrapped: a full turn adds 2 pi
    speed: Tensor  # [G] rad / s
    error: Tensor  # [G, 2] noise that is added to the observation


def pendulum(*, length: int, noise: float = 0.0) -> Game:
    """The rules.

    Args:    length of an episode, agent steps, which scales rewards; noise, standard deviation of
             the noise that is added to the observation (cosine and sine of the angle).
    """
    draws = 4 if noise else 0
    return Game(
        reset=partial(_reset, noise=noise),
        step=partial(_step, noise=noise, length=length),
        observe=partial(_observe, noise=noise),
        draws=draws,
        reset_draws=2 + draws,
        observation=(2,),
        dtype=torch.float32,
        components=1,
    )


def _errors(u: Tensor, like: Tensor, *, noise: float) -> Tensor:
    """Gaussian noise [G, 2] made of u [G, 4]; zeros if there is no noise. Args: like [G]."""
    if not noise:
        return torch.zeros_like(like).unsqueeze(-1).expand(-1, 2)
    return noise * gaussian(u.unflatten(-1, (2, 2)))


def _reset(u: Tensor, *, noise: float) -> State:
    angle, speed = (2 * u[:, 0] - 1) * math.pi, 2 * u[:, 1] - 1
    return State(angle, speed, _errors(u[:, 2:], angle, noise=noise))


def _step(
    state: State, action: Tensor, u: Tensor, *, noise: float, length: int
) -> tuple[State, Tensor, Tensor]:
    torque = _TORQUE * action[:, 0]
    off = torch.remainder(state.angle + math.pi, 2 * math.pi) - math.pi
    cost = off**2 + 0.1 * state.speed**2 + 0.001 * torque**2
    speed = state.speed + _TICK * (1.5 * _GRAVITY * state.angle.sin() + 3 * torque)
    speed = speed.clamp(-_FASTEST, _FASTEST)
    angle = state.angle + _TICK * speed
    after = State(angle, speed, _errors(u, angle, noise=noise))
    reward = (_MIDDLE - cost) / (_MIDDLE * length)
    return after, reward, torch.zeros_like(angle, dtype=torch.bool)


def _observe(state: State, *, noise: float) -> Tensor:
    seen = torch.stack([state.angle.cos(), state.angle.sin()], -1)
    return (seen + state.error).clamp(-1, 1) if noise else seen
