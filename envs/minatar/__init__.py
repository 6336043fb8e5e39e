"""MinAtar (Young and Tian 2019, arXiv:1903.03176) on the device: five games, S x E copies of each.

Every game is a module of pure functions over its own `State` (tensors [G, ...], G = S * E), with
the signatures of `Game`: `reset`, `step` and `observe`. Beside them stand constants: `CHANNELS`,
the number of 10 x 10 planes of an observation; `MINIMAL`, the ids of its minimal action set (no-op,
left, up, right, down, fire are 0 to 5); `DRAWS` and `RESET_DRAWS`, how many uniform numbers a step
and a reset may use. Dynamics are those of the `minatar` package 1.0.15, quirks included: tests step
both side by side on the same random numbers, which here are cerl's own. Differs: a `time_limit` can
truncate episodes, which the package leaves to its user.
"""

from functools import partial
from importlib import import_module

from cerl.config import MinAtarEnv
from cerl.envs.resident import Game

ACTIONS = 6  # in the full set, whose ids mean the same in every game


def game(config: MinAtarEnv) -> Game:
    """The rules of the game that `config` names; observations [channels, 10, 10] bool."""
    rules = import_module(f"{__name__}.{config.name}")
    return Game(
        reset=rules.reset,
        step=partial(rules.step, ramping=config.ramping),
        observe=rules.observe,
        draws=rules.DRAWS,
        reset_draws=rules.RESET_DRAWS,
        observation=(rules.CHANNELS, 10, 10),
        actions=tuple(range(ACTIONS)) if config.full_actions else rules.MINIMAL,
    )
