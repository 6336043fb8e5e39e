"""Parts that all device-resident games share: the state that is updated in place."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cerl.envs.resident import Game, Resident


class Pair(NamedTuple):
    a: Tensor
    b: Tensor
    whole: Tensor  # [G, 2]
    part: Tensor  # [G]


def start(u: Tensor) -> Pair:
    a = (10 * u[:, 0]).long()
    return Pair(a, a + 100, 0 * u, 0 * u[:, 0])


def swap(state: Pair, action: Tensor, u: Tensor) -> tuple[Pair, Tensor, Tensor]:
    """Two fields trade places without a copy, a third becomes a view of a fourth."""
    after = Pair(state.b, state.a, state.whole + 1, state.whole[:, 0])
    return after, state.a.float(), action == 2


def build(**changes) -> Resident:
    game = Game(
        reset=start,
        step=swap,
        observe=lambda state: torch.stack([state.a, state.b, *state.whole.T, state.part], -1),
        draws=0,
        reset_draws=2,
        observation=(5,),
        actions=tuple(range(3)),
        dtype=torch.float32,
    )._replace(**changes)
    more = {"name": "swap", "envs": 2, "sticky": 0.0, "time_limit": 0, "seeds": [0], "salt": 0}
    return Resident(game, device="cpu", **more)


@pytest.mark.parametrize("among", [False, True])
def test_fields_that_trade_places_do_not_overwrite_each_other(among):
    """Where an episode begins elsewhere (`among`) on every second step, and where none does."""
    env = build()
    a, b = env.reset().obs[0, 0, :2].tolist()
    for t in range(1, 9):
        a, b = b, a
        step = env.step(torch.tensor([[0, 2 if among else 0]]))
        assert step.obs[0, 0].tolist() == [a, b, t, t, t - 1]
        assert float(step.reward[0, 0]) == b
        assert bool(step.terminated[0, 1]) == (among and t % 2 == 1)


def test_any_number_of_actions_in_order_or_a_choice_of_eight():
    assert build(actions=tuple(range(50))).spec.actions == 50
    assert build(actions=(5, 0, 7)).spec.actions == 3
    with pytest.raises(ValueError, match=r"or at most 8 of 0..7, got \(0, 9\)"):
        build(actions=(0, 9))
    with pytest.raises(ValueError, match=r"expected actions in 0..49, got 0..50$"):
        env = build(actions=tuple(range(50)))
        env.step(torch.tensor([[0, 50]]))
