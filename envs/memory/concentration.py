"""Concentration (the game of pairs): turn two cards of a spread deck; equal ones stay face up.

After POPGym 1.0.7. An action is the number of a place. The observation shows, for every place, its
card or that it is face down. Cards of found pairs and those just turned are face up. Turning a card
of a found pair ends the turn. Finding the last pair is terminal; the time limit, which the config
sets, is about twice as many agent steps as there are cards.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.config.memory_tasks import CARDS, tries
from cerl.envs.memory import deck
from cerl.envs.resident import Game


class State(NamedTuple):
    kind: Tensor  # [G, cards] uint8, of the card at each place
    up: Tensor  # [G, cards] bool, the card belongs to a pair that was found
    seen: Tensor  # [G, cards] bool, the card is visible in the observation
    first: Tensor  # [G] int64, place of the first card of this turn; -1: not turned yet


def concentration(*, decks: int, kind: str) -> Game:
    """The rules. Args: decks of 52 cards; kind of card that has to match, of `deck.KINDS`."""
    cards, kinds = CARDS * decks, deck.KINDS[kind]
    return Game(
        reset=partial(_reset, kind=kind),
        step=partial(_step, limit=tries(cards)),
        observe=partial(_observe, kinds=kinds),
        draws=0,
        reset_draws=cards,
        observation=(cards * (kinds + 1),),
        actions=tuple(range(cards)),
    )


def _reset(u: Tensor, *, kind: str) -> State:
    kinds = deck.shuffled(u, kind=kind)
    none = torch.zeros_like(kinds, dtype=torch.bool)
    return State(kinds, none, none, torch.full_like(kinds[:, 0], -1, dtype=torch.int64))


def _step(state: State, action: Tensor, u: Tensor, *, limit: int) -> tuple[State, Tensor, Tensor]:
    cards = state.kind.shape[-1]
    second = state.first >= 0
    place = deck.one_hot(action, cards)
    turned = place | deck.one_hot(state.first, cards)  # -1 is no place
    wasted = deck.at(state.up, action)
    equal = deck.at(state.kind, action) == deck.at(state.kind, state.first)
    found = second & ~wasted & equal & (action != state.first)
    failed = wasted | (second & ~found)
    flips = torch.where(second, 2.0, 1.0)
    reward = torch.where(failed, flips * (-1 / limit), torch.where(found, 2 / cards, 0.0))
    up = state.up | (turned & found[:, None])
    first = torch.where(second | wasted, -1, action)
    return State(state.kind, up, state.up | turned, first), reward, found & up.all(-1)


def _observe(state: State, *, kinds: int) -> Tensor:
    visible = torch.where(state.seen, state.kind, kinds)
    return deck.one_hot(visible, kinds + 1).flatten(1)
