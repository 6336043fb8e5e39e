"""MultiarmedBandit: arms that pay with probabilities drawn anew for each episode.

After POPGym 1.0.7. The observation says only whether the last pull paid, so the network has to see
its previous action too. There is no terminal: `length` agent steps are the task's time limit, which
the config sets.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.envs.memory import deck
from cerl.envs.resident import Game


class State(NamedTuple):
    chance: Tensor  # [G, arms] float32, probability that an arm pays
    paid: Tensor  # [G] bool, the last pull paid


def bandit(*, arms: int, length: int) -> Game:
    """The rules. Args: number of arms; length of an episode, agent steps, which scales rewards."""
    return Game(
        reset=_reset,
        step=partial(_step, length=length),
        observe=_observe,
        draws=1,
        reset_draws=arms,
        observation=(2,),
        actions=tuple(range(arms)),
    )


def _reset(u: Tensor) -> State:
    return State(u, torch.zeros_like(u[:, 0], dtype=torch.bool))


def _step(state: State, action: Tensor, u: Tensor, *, length: int) -> tuple[State, Tensor, Tensor]:
    paid = u[:, 0] < deck.at(state.chance, action)
    return State(state.chance, paid), deck.signed(paid, 1 / length), torch.zeros_like(paid)


def _observe(state: State) -> Tensor:
    return deck.one_hot(state.paid.long(), 2)
