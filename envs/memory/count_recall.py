"""CountRecall: say how many cards of the kind asked for were dealt, the card now shown included.

After POPGym 1.0.7. There are two piles, and both show a card at each step: those of the first pile
are counted, the card of the second pile names the kind that is asked for. A wrong count costs as
much as a right one pays, however near it is: the package's option `error_clamp` has no effect in
its code. The last card is terminal.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config.memory_tasks import CARDS
from cerl.envs.memory import deck
from cerl.envs.resident import Game


class State(NamedTuple):
    value: Tensor  # [G, cards] uint8, kinds of the cards in the pile dealt, in order
    query: Tensor  # [G, cards] uint8, kinds of the cards in the pile that asks, in order
    shown: Tensor  # [G] int64, index of the two cards now shown


def count_recall(*, decks: int, kind: str) -> Game:
    """The rules. Args: decks of 52 cards in each pile; kind of card, a key of `deck.KINDS`."""
    cards, kinds = CARDS * decks, deck.KINDS[kind]
    return Game(
        reset=partial(_reset, kind=kind),
        step=_step,
        observe=partial(_observe, kinds=kinds),
        draws=0,
        reset_draws=2 * cards,
        observation=(2 * kinds,),
        actions=tuple(range(cards // kinds + 1)),
    )


def _reset(u: Tensor, *, kind: str) -> State:
    value, query = (deck.shuffled(half, kind=kind) for half in u.chunk(2, -1))
    return State(value, query, torch.zeros_like(value[:, 0], dtype=torch.int64))


def _step(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    cards = state.value.shape[-1]
    out = torch.arange(cards, device=action.device) <= state.shown[:, None]
    asked = deck.at(state.query, state.shown)
    count = ((state.value == asked[:, None]) & out).sum(-1)
    reward = deck.signed(action == count, 1 / (cards - 1))
    shown = state.shown + 1
    return State(state.value, state.query, shown), reward, shown >= cards - 1


def _observe(state: State, *, kinds: int) -> Tensor:
    both = (state.value, state.query)
    return torch.cat([deck.one_hot(deck.at(pile, state.shown), kinds) for pile in both], -1)
