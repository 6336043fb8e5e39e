"""Means over own and others' rows, spread and disagreement against numbers worked out by hand."""

import math

import pytest
import torch

from cerl.agents.measures import by_owner, row_mean, value_spread, vote_disagreement

WEIGHT = torch.tensor([1.0, 2.0, 0.0]).view(1, 1, 3)


def test_means_over_own_and_others_rows():
    values = torch.tensor([[1.0, 4.0, math.nan], [2.0, 2.0, math.inf]]).unsqueeze(0)  # [1, 2, 3]
    own = torch.tensor([[True, False, False], [False, False, True]]).unsqueeze(0)
    found = by_owner("error", values, WEIGHT, own)
    assert set(found) == {"error", "error_own", "error_others"}
    assert found["error"].tolist() == [[3.0, 2.0]]  # (1 + 2 x 4) / 3; the third row has no weight
    assert found["error_own"][0, 0] == 1.0 and bool(found["error_own"][0, 1].isnan())
    assert found["error_others"].tolist() == [[4.0, 2.0]]


def test_a_value_that_is_not_finite_shows_in_the_mean():
    values = torch.tensor([math.nan, 1.0, 1.0]).view(1, 1, 3)
    assert bool(row_mean(values, WEIGHT).isnan())


def test_spread_is_the_deviation_over_members():
    values = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 9.0]]).unsqueeze(0)
    assert float(value_spread(values, WEIGHT)) == pytest.approx(math.sqrt(2.0) / 3)


def test_disagreement_counts_votes_of_a_minority():
    # In row 0 members 0 and 1 outvote member 2, in row 1 all agree, in row 2 nobody is outvoted.
    greedy = torch.tensor([[0, 1, 0], [0, 1, 1], [2, 1, 2]]).unsqueeze(0)
    weight = torch.ones(1, 1, 3)
    found = vote_disagreement(greedy, weight, actions=3)
    assert found[0].tolist() == pytest.approx([0.0, 0.0, 1 / 3])
