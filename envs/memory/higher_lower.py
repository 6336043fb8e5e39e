"""HigherLower: guess whether the next card's rank is higher (action 0) or lower (action 1).

After POPGym 1.0.7. Equal ranks pay nothing. An agent that remembers the cards dealt so far guesses
better. The last card is terminal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config.memory_tasks import CARDS
from cerl.envs.memory import deck
from cerl.envs.resident import Game

_RANKS = deck.KINDS["ranks"]


class State(NamedTuple):
    rank: Tensor  # [G, cards] uint8, in the order dealt
    shown: Tensor  # [G] int64, index of the card now shown


def higher_lower(*, decks: int) -> Game:
    """The rules. Args: decks of 52 cards in the pile."""
    return Game(
        reset=_reset,
        step=_step,
        observe=_observe,
        draws=0,
        reset_draws=CARDS * decks,
        observation=(_RANKS,),
        actions=(0, 1),
    )


def _reset(u: Tensor) -> State:
    rank = deck.shuffled(u, kind="ranks")
    return State(rank, torch.zeros_like(rank[:, 0], dtype=torch.int64))


def _step(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    cards = state.rank.shape[-1]
    shown = state.shown + 1
    now, then = deck.at(state.rank, state.shown), deck.at(state.rank, shown)
    right = torch.where(action == 0, then > now, then < now)
    reward = torch.where(then == now, 0.0, deck.signed(right, 1 / cards))
    return State(state.rank, shown), reward, shown >= cards - 1


def _observe(state: State) -> Tensor:
    return deck.one_hot(deck.at(state.rank, state.shown), _RANKS)
