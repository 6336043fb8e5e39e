"""Numbers that are not finite are found, whatever the others are, and reported sparingly."""

import re
import warnings
from typing import Literal

import numpy as np
import pytest

from cerl.envs.nonfinite import Watch


def watch(diverged: Literal["cut", "error"] = "cut") -> Watch:
    return Watch(diverged, name="Hopper-v4", seeds=(5, 6), envs=2)


def results(guard: Watch, obs, reward=(0.0,) * 4, fresh=(False,) * 4, kind=np.float64):
    """The environments are at steps 1, 2, 3 and 4 of their episodes."""
    obs, reward = np.array(obs, np.float32), np.array(reward, kind)
    before, elapsed = np.full_like(obs, 7), np.arange(1, 5)
    cut = guard.results(obs, reward, before, fresh=np.array(fresh, dtype=bool), elapsed=elapsed)
    return obs, reward, cut


@pytest.mark.parametrize("size", [0.0, 1.0, 1e30, -3e38])
def test_finite_numbers_of_any_size_pass(size):
    obs, reward, cut = results(watch("error"), [[size, 1.0]] * 4, reward=[size] * 4)
    assert not cut.any() and obs[0, 0] == np.float32(size) and reward[0] == size


@pytest.mark.parametrize("size", [1e39, -1e300, 3.5e38])
def test_rewards_that_replay_cannot_hold_are_seen(size):
    reward = [0, 0, size, 3e38]
    message = (
        f"seed 6, environment 0, agent step 3: expected a finite reward in float32, got {size}"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        results(watch("error"), [[0.0]] * 4, reward=reward)
    with pytest.warns(RuntimeWarning, match="its episode is cut"):
        obs, reward, cut = results(watch(), [[0.0]] * 4, reward=reward)
    assert cut.tolist() == [False, False, True, False] and reward.tolist() == [0, 0, 0, 3e38]
    assert obs[2] == 7


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_seen_beside_huge_ones(value):
    with pytest.warns(RuntimeWarning, match="Hopper-v4, seed 6, environment 0, agent step 3"):
        obs, _, cut = results(watch(), [[0, 1e30], [0, 0], [value, 1e30], [0, 0]])
    assert cut.tolist() == [False, False, True, False]
    assert obs[2].tolist() == [7, 7] and obs[0, 1] == np.float32(1e30)


def test_opposite_infinities_do_not_cancel():
    with pytest.warns(RuntimeWarning):
        _, reward, cut = results(watch(), [[0.0]] * 4, reward=[np.inf, -np.inf, 0, 2])
    assert cut.tolist() == [True, True, False, False] and reward.tolist() == [0, 0, 0, 2]


def test_warnings_become_rare_and_every_cut_is_counted():
    guard = watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            results(guard, [[np.nan], [0.0], [0.0], [0.0]])
    assert len(caught) == 3 and "the 100." in str(caught[2].message)
    assert guard.cuts.tolist() == [120, 0, 0, 0]


def test_an_observation_and_a_reward_of_one_step_are_one_cut():
    guard = watch()
    with pytest.warns(RuntimeWarning) as caught:
        results(guard, [[np.nan], [0.0], [0.0], [0.0]], reward=[np.nan, 0, 0, 0])
    assert len(caught) == 1 and guard.cuts.tolist() == [1, 0, 0, 0]


def test_whole_numbers_are_not_looked_at():
    obs, reward = np.zeros((4, 3), np.uint8), np.zeros(4)
    never = np.zeros(4, bool)
    elapsed = np.ones(4, int)
    assert not watch("error").results(obs, reward, obs, fresh=never, elapsed=elapsed).any()


@pytest.mark.parametrize("diverged", ["cut", "error"])
def test_a_first_observation_is_always_an_error(diverged):
    with pytest.raises(
        RuntimeError, match="environment 1, agent step 2: expected a finite first obs"
    ):
        results(watch(diverged), [[0.0], [np.nan], [0.0], [0.0]], fresh=[0, 1, 0, 0])
