"""MinAtar (Young and Tian 2019, arXiv:1903.03176) on the device: five games, S x E copies of each.

Every game is a module of pure functions over its own `State` (tensors [G, ...], G = S * E):
`reset`, `step` and `observe`, with `CHANNELS` planes of 10 x 10 cells, `MINIMAL` the ids of its
minimal action set (no-op, left, up, right, down, fire = 0..5), and the numbers of uniforms that a
step (`DRAWS`) and a reset (`RESET_DRAWS`) may use. Dynamics are those of the `minatar` package
1.0.15, quirks included.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module

import torch

from cerl.config import MinAtarEnv
from cerl.envs.resident import Game, Resident

ACTIONS = 6  # of the full set, the same ids in every game


def MinAtar(
    config: MinAtarEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
    fuse: bool | None = None,
) -> Resident:
    """S x E copies of the game that `config` names; see `Resident` for the arguments."""
    rules = import_module(f"{__name__}.{config.name}")
    game = Game(
        reset=rules.reset,
        step=partial(rules.step, ramping=config.ramping),
        observe=rules.observe,
        draws=rules.DRAWS,
        reset_draws=rules.RESET_DRAWS,
        observation=(rules.CHANNELS, 10, 10),
        actions=tuple(range(ACTIONS)) if config.full_actions else rules.MINIMAL,
    )
    return Resident(
        game,
        name=config.name,
        envs=config.envs,
        sticky=config.sticky,
        time_limit=config.time_limit,
        seeds=seeds,
        salt=salt,
        device=device,
        longest=longest,
        fuse=fuse,
    )
