"""Bands of curves: intervals at every step, where there are seeds enough for one."""

import numpy as np
import pytest
from scipy import stats

from cerl.report import bands, intervals, statistics


def scores(steps: int, seeds: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(steps, seeds))


def stacked(found: bands.Band) -> np.ndarray:
    """Value and both ends [3, T] of a band that has both."""
    assert found.low is not None and found.high is not None
    return np.stack([found.value, found.low, found.high])


def test_a_band_is_student_s_interval_at_every_step():
    returns = scores(4, 8)
    found = bands.band([returns])
    ends = stats.t.interval(0.95, 7, loc=returns.mean(1), scale=stats.sem(returns, axis=1))
    np.testing.assert_allclose(stacked(found), [returns.mean(1), *ends], rtol=1e-12)


def test_seeds_that_miss_an_evaluation_are_left_out():
    returns = scores(5, 9)
    returns[3, 2] = np.nan
    whole = bands.band([np.delete(returns, 2, axis=1)])
    np.testing.assert_array_equal(stacked(bands.band([returns])), stacked(whole))
    assert np.isnan(bands.band([np.full((3, 2), np.nan)]).value).all()


@pytest.mark.parametrize("seeds", [1, 2, 6])
def test_few_seeds_have_no_band(seeds):
    value, low, high = bands.band([scores(3, seeds)])
    np.testing.assert_allclose(value, scores(3, seeds).mean(1))
    assert low is None and high is None


def test_the_band_of_an_iqm_over_tasks_is_its_interval_at_every_step():
    tasks = [scores(3, 5), 2 * scores(3, 5)[::-1]]
    found = bands.band(tasks, statistic="iqm")
    for k in range(3):
        one = intervals.single([task[k] for task in tasks], statistic="iqm")
        assert found.low is not None and found.high is not None
        assert (found.value[k], found.low[k], found.high[k]) == pytest.approx(one[:3])


def test_percentiles_are_those_of_resampled_seeds():
    returns = scores(2, 3)
    found = bands.band([returns], method="percentile", confidence=0.9)
    [drawn] = statistics.draws((3,), bands.SAMPLES, 0)
    ends = np.percentile(returns[:, drawn].mean(-1), [5, 95], axis=1)
    np.testing.assert_allclose(stacked(found)[1:], ends, rtol=1e-12)


def test_equal_scores_have_a_band_without_width():
    returns = scores(3, 8)
    returns[0] = 2.0
    found = bands.band([returns])
    assert found.low is not None and found.high is not None
    assert found.low[0] == found.value[0] == found.high[0] == 2.0
    assert found.low[1] < found.value[1] < found.high[1]
