"""Autoencode: watch a pile of cards being dealt, then name their suits in reverse order.

After POPGym 1.0.7. An observation is a flag (watch or play) and a suit. The flag says play as soon
as the last card is shown. From that observation on every action is an answer; earlier actions have
no effect. After the last card, the suit shown is always spades and means nothing. An episode of n
cards takes 2 n - 1 agent steps, and the last one is terminal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config.memory_tasks import CARDS
from cerl.envs.memory import deck
from cerl.envs.resident import Game

_SUITS = deck.KINDS["suits"]


class State(NamedTuple):
    suit: Tensor  # [G, cards] uint8, in the order dealt
    time: Tensor  # [G] int64, agent steps of the episode


def autoencode(*, decks: int) -> Game:
    """The rules. Args: decks of 52 cards in the pile."""
    return Game(
        reset=_reset,
        step=_step,
        observe=_observe,
        draws=0,
        reset_draws=CARDS * decks,
        observation=(2 + _SUITS,),
        actions=tuple(range(_SUITS)),
    )


def _reset(u: Tensor) -> State:
    suit = deck.shuffled(u, kind="suits")
    return State(suit, torch.zeros_like(suit[:, 0], dtype=torch.int64))


def _step(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    last = state.suit.shape[-1] - 1
    right = action == deck.at(state.suit, 2 * last - state.time)
    reward = torch.where(state.time >= last, deck.signed(right, 1 / (last + 1)), 0.0)
    time = state.time + 1
    return State(state.suit, time), reward, time > 2 * last


def _observe(state: State) -> Tensor:
    last = state.suit.shape[-1] - 1
    watch = (state.time < last).long()
    suit = torch.where(state.time <= last, deck.at(state.suit, state.time), 0)
    return torch.cat([deck.one_hot(watch, 2), deck.one_hot(suit, _SUITS)], -1)
