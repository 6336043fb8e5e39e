"""RepeatPrevious and RepeatFirst: name the suit of the card k steps ago, or of the first card.

After POPGym 1.0.7 (Morad et al. 2023, arXiv:2303.01859). k = 1 is the card that is now shown (its
description counts from 0, its code from 1), and before k cards are out nothing is rewarded. No flag
marks the first card, though RepeatFirst's description speaks of one. An episode ends, by terminal,
with the last card: its return is 1 if every answer was right.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config.memory_tasks import CARDS
from cerl.envs.memory import deck
from cerl.envs.resident import Game

_SUITS = deck.KINDS["suits"]


class State(NamedTuple):
    suit: Tensor  # [G, cards] uint8, in the order dealt
    shown: Tensor  # [G] int64, which of them is


def repeat_previous(*, decks: int, k: int) -> Game:
    """The game. Args: k in 1 .. 52 * decks - 1."""
    return _game(partial(_previous, k=k), CARDS * decks)


def repeat_first(*, decks: int) -> Game:
    """The game."""
    return _game(_first, CARDS * decks)


def _game(step, cards: int) -> Game:
    return Game(
        reset=_reset,
        step=step,
        observe=_observe,
        draws=0,
        reset_draws=cards,
        observation=(_SUITS,),
        actions=tuple(range(_SUITS)),
    )


def _reset(u: Tensor) -> State:
    suit = deck.shuffled(u, kind="suits")
    return State(suit, torch.zeros_like(suit[:, 0], dtype=torch.int64))


def _previous(state: State, action: Tensor, u: Tensor, *, k: int) -> tuple[State, Tensor, Tensor]:
    cards = state.suit.shape[-1]
    right = action == deck.at(state.suit, state.shown + 1 - k)
    reward = torch.where(state.shown + 1 >= k, deck.signed(right, 1 / (cards - k)), 0.0)
    return _deal(state, reward)


def _first(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    return _deal(state, deck.signed(action == state.suit[:, 0], 1 / (state.suit.shape[-1] - 1)))


def _deal(state: State, reward: Tensor) -> tuple[State, Tensor, Tensor]:
    shown = state.shown + 1
    return State(state.suit, shown), reward, shown >= state.suit.shape[-1] - 1


def _observe(state: State) -> Tensor:
    return deck.one_hot(deck.at(state.suit, state.shown), _SUITS)
