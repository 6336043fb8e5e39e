"""RepeatPrevious and RepeatFirst: name the suit of the card k steps ago, or of the first card.

After POPGym 1.0.7. k = 1 means the card now shown: the package's documentation counts from 0, its
code from 1. Until k cards are dealt, no answer is rewarded. No flag marks the first card, although
the documentation of RepeatFirst mentions one. The last card is terminal. The return of an episode
is 1 if every answer was right.
"""

from collections.abc import Callable
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
    shown: Tensor  # [G] int64, index of the card now shown


def repeat_previous(*, decks: int, k: int) -> Game:
    """The rules. Args: decks of 52 cards in the pile; k in 1 to 52 * decks - 1."""
    return _game(partial(_previous, k=k), CARDS * decks)


def repeat_first(*, decks: int) -> Game:
    """The rules. Args: decks of 52 cards in the pile."""
    return _game(_first, CARDS * decks)


def _game(step: Callable[..., tuple[State, Tensor, Tensor]], cards: int) -> Game:
    """The rules of both tasks, which differ in the step alone. Args: cards in the pile."""
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
    """The end of a step: the next card is shown."""
    shown = state.shown + 1
    return State(state.suit, shown), reward, shown >= state.suit.shape[-1] - 1


def _observe(state: State) -> Tensor:
    return deck.one_hot(deck.at(state.suit, state.shown), _SUITS)
