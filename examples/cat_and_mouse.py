"""An environment of one's own whose rules are tensor operations, so that it runs on the device.

`cerl.envs.resident.Game` says what its three functions are given and return.

    cerl train game/ddqn --env.name cat_and_mouse:rules --env.time-limit 20 --eval.time-limit 20
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.envs.resident import Game


class State(NamedTuple):
    cat: Tensor  # [G] int64, its cell
    mouse: Tensor  # [G] int64


def rules(*, cells: int = 7) -> Game:
    """A cat that goes left, stays or goes right catches a mouse that runs about: +1."""

    def reset(u):  # [G, 2], uniform in [0, 1)
        return State((cells * u[:, 0]).long(), (cells * u[:, 1]).long())

    def step(state, action, u):
        cat = (state.cat + action - 1).clamp(0, cells - 1)
        caught = cat == state.mouse
        mouse = (state.mouse + (3 * u[:, 0]).long() - 1).clamp(0, cells - 1)
        return State(cat, mouse), caught.float(), caught

    def observe(state):
        floor = torch.arange(cells, device=state.cat.device)
        return torch.cat([floor == state.cat[:, None], floor == state.mouse[:, None]], 1)

    return Game(reset, step, observe, 1, 2, (2 * cells,), actions=(0, 1, 2))
