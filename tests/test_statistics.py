"""Statistics of scores, against rliable's stored output, hand-computed numbers and slow loops."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cerl.report import statistics

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rliable.json").read_text())
STATISTICS = GOLDEN["statistics"]


def tasks(name: str) -> list[np.ndarray]:
    return list(np.array(GOLDEN[name]).T)


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_point_estimates_equal_rliable(name, statistic):
    expected = GOLDEN["point"][name][STATISTICS.index(statistic)]
    assert getattr(statistics, statistic)(tasks(name)) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("name", ["x", "y"])
def test_performance_profile_equals_rliable(name):
    ours = statistics.profile(tasks(name), GOLDEN["taus"])
    np.testing.assert_allclose(ours, GOLDEN["profile"][name], rtol=0, atol=1e-12)


def test_probability_of_improvement_equals_rliable():
    ours = statistics.improvement(tasks("x"), tasks("y"))
    assert ours == pytest.approx(GOLDEN["improvement"], rel=0, abs=1e-12)


def assert_interval_agrees(ours: np.ndarray, low: float, high: float, *, theirs: int) -> None:
    """Their ends are the 2.5% and 97.5% points of our resampled values, within Monte Carlo error.

    Five standard errors of the difference of two shares. Comparing ranks instead of values also
    holds for statistics that take few values only.
    """
    error = 5 * np.sqrt(0.025 * 0.975 * (1 / len(ours) + 1 / theirs))
    tiny = 1e-9
    assert np.mean(ours < low - tiny) <= 0.025 + error
    assert np.mean(ours <= low + tiny) >= 0.025 - error
    assert np.mean(ours > high + tiny) <= 0.025 + error
    assert np.mean(ours >= high - tiny) >= 0.025 - error


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_bootstrap_intervals_agree_with_rliable_within_monte_carlo_error(name, statistic):
    rng = np.random.default_rng(5)
    function = getattr(statistics, statistic)
    ours = statistics.bootstrap(function, tasks(name), samples=50_000, rng=rng)
    low, high = np.array(GOLDEN["interval"][name])[:, STATISTICS.index(statistic)]
    assert_interval_agrees(ours, low, high, theirs=GOLDEN["reps"]["aggregate"])


@pytest.mark.parametrize("name", ["x", "y"])
def test_profile_intervals_agree_with_rliable_within_monte_carlo_error(name):
    def statistic(group):
        return statistics.profile(group, GOLDEN["taus"])

    rng = np.random.default_rng(6)
    ours = statistics.bootstrap(statistic, tasks(name), samples=20_000, rng=rng)
    ends = np.array(GOLDEN["profile_interval"][name])
    for values, low, high in zip(ours, *ends, strict=True):
        assert_interval_agrees(values, low, high, theirs=GOLDEN["reps"]["profile"])


def test_improvement_intervals_agree_with_rliable_within_monte_carlo_error():
    rng = np.random.default_rng(7)
    groups = tasks("x"), tasks("y")
    ours = statistics.bootstrap(statistics.improvement, *groups, samples=20_000, rng=rng)
    low, high = GOLDEN["improvement_interval"]
    assert_interval_agrees(ours, low, high, theirs=GOLDEN["reps"]["improvement"])


def test_interval_of_two_runs_is_exact():
    # The mean of two resampled runs is 0, 1, 2 with chances 1/4, 1/2, 1/4: both ends are extremes.
    low, high = statistics.interval(statistics.mean, [np.array([0.0, 2.0])])
    assert (low, high) == (0.0, 2.0)
    low, high = statistics.interval(statistics.mean, [np.array([0.0, 2.0])], confidence=0.4)
    assert (low, high) == (1.0, 1.0)


def test_runs_are_resampled_within_their_task_only():
    rng = np.random.default_rng(0)
    groups = [np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0])]
    first, second = statistics.resample(groups, samples=500, rng=rng)
    assert first.shape == (500, 3) and second.shape == (500, 2)
    assert set(np.unique(first)) == {1.0, 2.0, 3.0} and set(np.unique(second)) == {10.0, 20.0}
    # Every combination of draws occurs: 3^3 and 2^2.
    assert {tuple(row) for row in first} == set(itertools.product((1.0, 2.0, 3.0), repeat=3))
    assert {tuple(row) for row in second} == set(itertools.product((10.0, 20.0), repeat=2))


def test_statistics_by_hand():
    group = [np.array([0.0, 1.0, 2.0, 9.0]), np.array([4.0, 4.0, 4.0, 4.0])]
    assert statistics.mean(group) == 3.5
    assert statistics.median(group) == 3.5
    # Sorted: 0 1 | 2 4 4 4 | 4 9.
    assert statistics.iqm(group) == 3.5
    # Shortfalls below 1: 1 0 0 0 and none.
    assert statistics.optimality_gap(group) == pytest.approx(0.125)
    assert statistics.optimality_gap(group, target=3.0) == pytest.approx((3 + 2 + 1 + 0) / 8)
    np.testing.assert_array_equal(statistics.profile(group, [1.0, 4.0]), [0.75, 0.125])


def test_iqm_of_uneven_tasks_pools_all_scores():
    group = [np.array([5.0]), np.array([0.0, 1.0, 2.0, 3.0])]
    # Five scores, one cut on each side: 1 2 3.
    assert statistics.iqm(group) == 2.0
    assert statistics.mean(group) == (5.0 + 1.5) / 2


def test_improvement_equals_a_loop_with_uneven_runs_and_ties():
    rng = np.random.default_rng(3)
    x = [rng.integers(0, 4, n).astype(float) for n in (3, 5)]
    y = [rng.integers(0, 4, n).astype(float) for n in (4, 2)]
    share = 0.0
    for a, b in zip(x, y, strict=True):
        wins = [1.0 if i > j else 0.5 if i == j else 0.0 for i in a for j in b]
        share += sum(wins) / len(wins) / 2
    assert statistics.improvement(x, y) == pytest.approx(share)
    assert statistics.improvement(y, x) == pytest.approx(1 - share)
    with pytest.raises(ValueError, match="same tasks"):
        statistics.improvement(x, y[:1])


def test_leading_axes_pass_through():
    curve = np.arange(12.0).reshape(3, 4) ** 2
    for statistic in (
        statistics.mean,
        statistics.median,
        statistics.iqm,
        statistics.optimality_gap,
    ):
        alone = [statistic([line]) for line in curve]
        np.testing.assert_allclose(statistic([curve]), alone)
    low, high = statistics.interval(statistics.mean, [curve], samples=500)
    assert low.shape == (3,) and (low < curve.mean(1)).all() and (curve.mean(1) < high).all()


def test_human_normalised_scores_are_0_for_random_and_1_for_human():
    known = statistics.human_random()
    assert len(known) == 57
    for game, (random, human) in known.items():
        np.testing.assert_allclose(
            statistics.human_normalised(np.array([random, human]), game), [0.0, 1.0], atol=1e-12
        )
    assert statistics.human_normalised(np.array(20.9), "Pong") == pytest.approx(41.6 / 35.3)
    with pytest.raises(ValueError, match="'Pingpong'"):
        statistics.human_normalised(np.zeros(1), "Pingpong")
