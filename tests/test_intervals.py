"""Intervals of few seeds and the permutation test, against scipy, loops and stored results."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cerl import bench
from cerl.bench import intervals as simulation
from cerl.report import curves, intervals, methods, statistics

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
A, B = (
    [np.random.default_rng(3).normal(1.0, 1.0, 6)],
    [np.random.default_rng(4).normal(0.0, 3.0, 9)],
)


@pytest.fixture
def rng():
    """Numbers of a test that do not depend on which tests ran before it."""
    return np.random.default_rng(3)


def test_t_interval_of_one_group_equals_scipy():
    low, high = stats.t.interval(0.9, 8, B[0].mean(), stats.sem(B[0]))
    found = intervals.single(B, confidence=0.9)
    assert found[:3] == pytest.approx((B[0].mean(), low, high), rel=1e-12)
    assert found.method == "t"


def test_t_interval_of_a_difference_equals_welch_in_scipy():
    expected = stats.ttest_ind(A[0], B[0], equal_var=False).confidence_interval(0.95)
    found = intervals.difference(A, B)
    assert found[1:3] == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_t_interval_of_paired_scores_equals_scipy():
    expected = stats.ttest_rel(A[0], B[0][:6]).confidence_interval(0.95)
    found = intervals.difference(A, [B[0][:6]], paired=True)
    assert found[1:3] == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_t_interval_of_interquartile_means_equals_yuen_in_scipy(rng):
    a, b = rng.normal(size=8), rng.normal(size=12)
    trimmed = stats.ttest_ind(a, b, equal_var=False, trim=0.25)  # pyright: ignore
    expected = trimmed.confidence_interval(0.95)
    found = intervals.difference([a], [b], statistic="iqm")
    assert found[1:3] == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_t_interval_over_tasks_equals_a_hand_computed_one():
    """Variances of two tasks of 2 and 3 seeds: (2 / 2 + 3 / 3) / 4 = 0.5; freedom 4 / (1 + 0.5)."""
    tasks = [np.array([1.0, 3.0]), np.array([5.0 - math.sqrt(3), 5.0, 5.0 + math.sqrt(3)])]
    half = stats.t.ppf(0.975, 4 / 1.5) * math.sqrt(0.5)
    assert intervals.single(tasks)[:3] == pytest.approx((3.5, 3.5 - half, 3.5 + half), rel=1e-12)


def test_bca_interval_agrees_with_scipy(rng):
    scores = rng.lognormal(0.0, 0.8, 12)
    how = {"method": "BCa", "n_resamples": 50_000, "rng": np.random.default_rng(0)}
    expected = stats.bootstrap((scores,), np.mean, **how).confidence_interval
    found = intervals.single([scores], method="bca")
    # The ends of two bootstraps of 50,000 resamples differ by about 1% of the interval's width.
    width = expected.high - expected.low
    assert found[1:3] == pytest.approx((expected.low, expected.high), abs=0.02 * width)


@pytest.mark.parametrize("paired", [False, True])
def test_percentile_interval_equals_a_loop(paired):
    a, b = [A[0], B[0][:6]], [B[0][3:], A[0] * 2]
    found = intervals.difference(a, b, method="percentile", paired=paired, samples=500)
    sizes = (6, 6) if paired else (6, 6, 6, 6)
    draws = statistics.draws(sizes, 500, 0)
    values = []
    for k in range(500):
        one = [task[draws[i][k]] for i, task in enumerate(a)]
        two = [task[draws[i if paired else i + 2][k]] for i, task in enumerate(b)]
        values.append(np.mean([x.mean() for x in one]) - np.mean([x.mean() for x in two]))
    assert found[1:3] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), rel=1e-12)


def test_studentised_interval_equals_a_loop():
    found = intervals.single(A, method="studentised", samples=400)
    (draws,) = statistics.draws((6,), 400, 0)
    mean, error = A[0].mean(), stats.sem(A[0])
    ratios = [(A[0][d].mean() - mean) / stats.sem(A[0][d]) for d in draws]
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert found[1:3] == pytest.approx((mean - high * error, mean - low * error), rel=1e-12)


def test_hierarchical_interval_draws_tasks_too():
    """Two tasks whose seeds hardly differ: a resample holds one of them twice, or both."""
    tasks = [np.array([0.0, 0.001, 0.002]), np.array([10.0, 10.001, 10.002, 10.003])]
    wide = intervals.single(tasks, method="hierarchical")
    narrow = intervals.single(tasks, method="percentile")
    assert wide[1:3] == pytest.approx((0.0, 10.0), abs=0.003)
    assert narrow[1:3] == pytest.approx((5.0, 5.0), abs=0.003)


@pytest.mark.parametrize("statistic", ["mean", "median", "iqm", "optimality_gap"])
def test_influences_give_the_change_of_a_statistic(statistic):
    tasks = [np.array([0.1, 0.5, 0.9, 0.3]), np.array([2.0, 0.7, 0.8, 0.45, 0.2])]
    kind = methods.STATISTICS[statistic]
    u = kind.influence(tasks).u
    for k, i in [(0, 1), (0, 3), (1, 2), (1, 3)]:
        moved = [task.copy() for task in tasks]
        moved[k][i] += 1e-6
        change = kind.value(moved) - kind.value(tasks)
        own = kind.influence(moved).u[k][i] - u[k][i]
        assert own == pytest.approx(change, abs=1e-12)


def test_probability_of_improvement_has_the_error_of_brunner_and_munzel(rng):
    a, b = rng.normal(size=12), rng.normal(0.3, 2.0, size=15)
    found = intervals.difference([a], [b], statistic="improvement")
    z = stats.brunnermunzel(a, b)  # its statistic is (P(a < b) - 1/2) / error, with the same df
    error = (0.5 - found.value) / z.statistic
    freedom = methods.error(methods.Sample(([a], [b])), methods.STATISTICS["improvement"])[1]
    p = 2 * stats.t.sf(abs(z.statistic), freedom)
    assert p == pytest.approx(z.pvalue, rel=1e-9)
    half = stats.t.ppf(0.975, freedom) * abs(error)
    assert found[1:3] == pytest.approx((found.value - half, found.value + half), rel=1e-9)


def test_an_interval_of_a_probability_stays_within_0_and_1():
    a, b = [np.arange(12.0) + 9], [np.arange(12.0)]
    found = intervals.difference(a, b, statistic="improvement")
    assert found.low is not None and 0.8 < found.low < found.value < 1.0
    assert found.high == 1.0


def test_relative_difference_equals_a_search_over_ratios(rng):
    """Fieller: a ratio r is held if a - r b has an interval that holds zero."""
    a, b = rng.normal(12.0, 1.0, 7), rng.normal(10.0, 1.0, 7)
    for paired in (False, True):
        found = intervals.relative([a], [b], paired=paired)
        assert found.low is not None and found.high is not None
        assert found.value == pytest.approx(a.mean() / b.mean() - 1, rel=1e-12)
        kind = methods.STATISTICS["mean"]
        ratio = a.mean() / b.mean()
        scaled = methods.Sample(([a], [b * ratio]), paired)
        quantile = stats.t.ppf(0.975, methods.error(scaled, kind)[1])
        for end in (found.low, found.high):
            held = methods.Sample(([a], [b * (1 + end)]), paired)
            error = methods.error(held, kind)[0]
            assert abs(held.value(kind)) == pytest.approx(quantile * error, rel=1e-9)


def test_a_relative_difference_needs_a_base_that_is_above_zero():
    rising = np.array([1.0, 2.0, 3.0])
    assert math.isnan(intervals.relative([rising], [-rising]).value)
    unsure = intervals.relative([rising], [np.array([-5.0, 1.0, 5.0])])  # the base may be zero
    assert unsure.low is None and unsure.value == pytest.approx(5.0)


@pytest.mark.parametrize("sizes", [(3, 3), (5, 4)])
def test_permutation_p_equals_scipy(sizes):
    rng = np.random.default_rng(8)
    a, b = rng.normal(1.0, 1.0, sizes[0]), rng.normal(0.0, 1.0, sizes[1])
    how = {"n_resamples": np.inf, "permutation_type": "independent"}
    expected = stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), **how)
    assert intervals.permutation_p([a], [b]) == pytest.approx(expected.pvalue, rel=1e-12)


def test_permutation_p_of_pairs_equals_scipy():
    a, b = A[0], A[0] - np.array([0.5, 0.1, -0.2, 0.8, 0.4, 0.3])
    how = {"n_resamples": np.inf, "permutation_type": "samples"}
    expected = stats.permutation_test((a, b), lambda x, y: (x - y).mean(), **how)
    assert intervals.permutation_p([a], [b], paired=True) == pytest.approx(expected.pvalue)


def test_permutation_over_tasks_equals_a_loop():
    a, b = [A[0][:3], A[0][3:] + 5], [B[0][:2], B[0][2:5] + 5]
    seen = sum(x.mean() - y.mean() for x, y in zip(a, b, strict=True))
    ways = []
    for x, y in zip(a, b, strict=True):
        scores, own = np.concatenate([x, y]), []
        for first in itertools.combinations(range(len(scores)), len(x)):
            rest = [i for i in range(len(scores)) if i not in first]
            own.append(scores[[*first]].mean() - scores[rest].mean())
        ways.append(own)
    sums = np.array([u + v for u, v in itertools.product(*ways)])
    tails = (sums >= seen - 1e-12).mean(), (sums <= seen + 1e-12).mean()
    assert intervals.permutation_p(a, b) == pytest.approx(min(1.0, 2 * min(tails)), rel=1e-12)


def test_sampled_permutation_agrees_with_all_of_them(monkeypatch):
    a, b = [A[0], B[0][:4]], [B[0][4:] + 1.5, A[0][:4]]
    exact = intervals.permutation_p(a, b)
    monkeypatch.setattr(intervals, "REGROUPINGS", 250)  # one of the tasks is still dealt exactly
    sampled = intervals.permutation_p(a, b)
    assert exact is not None and sampled is not None and sampled != exact
    error = math.sqrt(exact * (1 - exact / 2) * 2 / intervals.DRAWN)
    assert abs(sampled - exact) < 5 * error


def test_three_against_three_give_no_p_below_a_tenth():
    low, high = [np.arange(3.0)], [np.arange(3.0) + 100]
    assert intervals.permutation_p(high, low) == pytest.approx(0.1)


def mujoco(env: str, preset: str) -> list[np.ndarray]:
    """Mean return of the members at the last three evaluations, for each seed."""
    found, _ = curves.cells(curves.load_rows([RESULTS / "mujoco" / f"{env}-v4-{preset}"]))
    (cell,) = found
    return [cell.curves["individual"].returns[-3:].mean(0)]


@pytest.mark.parametrize(
    ("env", "a", "b", "p"),
    [
        ("Hopper", "ensemble", "sac", 0.016),
        ("Hopper", "cerl", "ensemble", 0.048),
        ("Walker2d", "cerl", "ensemble", 0.040),
        ("HalfCheetah", "cerl", "ensemble", 0.063),
    ],
)
def test_p_of_stored_rows(env, a, b, p):
    found = intervals.permutation_p(mujoco(env, a), mujoco(env, b))
    assert found is not None and round(found, 3) == p


def test_scores_that_are_not_finite_are_left_out_with_their_partners():
    a = [np.array([1.0, np.nan, 2.0, 4.0, 3.0])]
    b = [np.array([0.0, 5.0, np.inf, 1.0, 1.0])]
    kept = [np.array([1.0, 4.0, 3.0])], [np.array([0.0, 1.0, 1.0])]
    assert intervals.difference(a, b, paired=True) == intervals.difference(*kept, paired=True)
    alone = [np.array([1.0, 2.0, 4.0, 3.0])], [np.array([0.0, 5.0, 1.0, 1.0])]
    assert intervals.difference(a, b) == intervals.difference(*alone)
    assert intervals.permutation_p(a, b) == intervals.permutation_p(*alone)
    nothing = intervals.difference(a, [np.full(5, np.nan)])
    assert math.isnan(nothing.value) and nothing[1:] == (None, None, None)
    assert intervals.permutation_p(a, [np.full(5, np.nan)]) is None


def test_points_of_a_curve_equal_single_calls(rng):
    a, b = rng.normal(size=(2, 7, 5))
    a[2, 1] = a[3, 1] = np.nan
    a[5] = np.nan
    values, low, high = intervals.along([a], [b])
    for k in range(7):
        one = intervals.difference([a[k]], [b[k]])
        if k == 5:
            assert np.isnan([values[k], low[k], high[k]]).all()
        else:
            assert (values[k], low[k], high[k]) == pytest.approx(one[:3], rel=1e-12)


def test_equal_scores_have_a_value_and_no_interval():
    """0.1 + 0.1 + 0.1 is not 0.3 in floating point, and rounding is no spread."""
    same = [np.full(3, 0.1)]
    found = intervals.single(same)
    assert found.value == pytest.approx(0.1) and found[1:] == (None, None, None)
    assert intervals.smallest_gap(same, same) is None


def test_too_few_seeds_have_a_value_and_no_interval():
    two, three = [np.array([1.0, 2.0])], [np.array([1.0, 2.0, 4.0])]
    assert intervals.least_seeds("t") == 3 and intervals.least_seeds("t", tasks=2) == 2
    assert intervals.difference(two, three)[1:] == (None, None, None)
    assert intervals.difference(three, three).low is not None
    assert intervals.difference(two * 2, three * 2).low is not None
    assert intervals.difference(two, three, method="percentile").low is not None
    assert intervals.difference(three, three, statistic="improvement").low is None


def test_one_score_has_an_interval_from_as_many_seeds_on_as_measured():
    """The table of docs/statistics.md: from the least number on, every cell is 93% or more."""
    text = (RESULTS.parent / "statistics.md").read_text()
    measured: dict[tuple[str, int], dict[int, float]] = {}
    seeds: list[int] = []
    for line in text.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if cells[:2] == ["statistic", "tasks"]:
            seeds = [int(cell) for cell in cells[2:]]
        elif seeds and len(cells) == len(seeds) + 2 and cells[1].isdigit():
            shares = [float(cell.partition(" (")[0]) for cell in cells[2:]]
            measured[cells[0], int(cells[1])] = dict(zip(seeds, shares, strict=True))
    assert {name for name, _ in measured} == {*intervals.ONE_GROUP}
    for (name, tasks), shares in measured.items():
        least = intervals.least_seeds_of_one_group(statistic=name, tasks=tasks)
        short = [n for n, share in shares.items() if share < 93]
        if least is None:
            assert max(short) == max(shares), (name, tasks)
            continue
        # At 93.0 in the table the share itself may be a little less.
        assert all(share >= 93 for n, share in shares.items() if n >= least), (name, tasks)
        first = min(n for n in shares if n > max(short, default=0))
        assert least == first or shares[first] == 93.0, (name, tasks)


def test_few_seeds_of_one_score_have_no_interval_unless_it_is_asked_for():
    rng = np.random.default_rng(0)
    six, seven = [rng.normal(size=6)], [rng.normal(size=7)]
    assert intervals.single(six)[1:] == (None, None, None)
    assert intervals.single(six, method="percentile").low is not None
    assert intervals.single(seven).method == "t"
    assert intervals.single(seven, statistic="iqm").low is None
    assert intervals.single(six * 2, statistic="iqm").low is not None
    _, low, _ = intervals.along([np.stack([six[0]] * 3)])
    assert np.isnan(low).all()


def test_an_iqm_over_two_tasks_of_two_seeds_has_no_interval():
    """It averages two of four scores, which tell no spread: 14% of them held the true value."""
    two = [np.array([1.0, 2.0]), np.array([3.0, 5.0])]
    assert intervals.difference(two, two[::-1], statistic="iqm").low is None
    assert intervals.difference(two, two[::-1]).low is not None


def test_smallest_gap_is_half_the_width():
    found = intervals.difference(A, B)
    assert found.low is not None and found.high is not None
    assert intervals.smallest_gap(A, B) == pytest.approx((found.high - found.low) / 2)


def test_the_sign_of_an_interval():
    high, low = [np.arange(5.0) + 10], [np.arange(5.0)]
    assert intervals.difference(high, low).sign == 1
    assert intervals.difference(low, high).sign == -1
    assert intervals.difference(high, high).sign == 0
    assert intervals.difference(high, [low[0][:1]]).sign == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: intervals.single(A, method="bcaa"), "method: .*got 'bcaa'; did you mean bca"),
        (lambda: intervals.single(A, statistic="iqmm"), "statistic: .*did you mean iqm"),
        (lambda: intervals.single(A, statistic="improvement"), "expected two groups"),
        (lambda: intervals.single([]), "at least one task"),
        (lambda: intervals.difference(A, B * 2), "got 1 and 2 tasks"),
        (lambda: intervals.difference(A, B, paired=True), "task 0: .*got 6 and 9"),
        (lambda: intervals.permutation_p(A, B, paired=True), "task 0: .*got 6 and 9"),
        (lambda: intervals.least_seeds("u"), "method: expected one of t"),
        (lambda: intervals.relative(A, B, statistic="improvement"), "expected one of mean"),
        (lambda: intervals.single(A, confidence=95), "confidence: expected a probability"),
    ],
)
def test_bad_arguments_are_said(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_default_intervals_cover_and_percentiles_do_not():
    """Of three seeds; 2,000 studies have a standard error of 0.5% at 95%."""
    case = simulation.Case("mean", "difference", 1, 3)
    how = {"methods": ["t", "percentile"], "repetitions": 2000, "samples": 200}
    found = simulation.coverage(case, simulation.normal, **how)
    assert found["t"] > 0.93
    assert found["percentile"] < 0.85


def test_scores_of_simulated_studies_have_mean_0_and_spread_1():
    rng = np.random.default_rng(0)
    for scores in (simulation.normal, simulation.skewed, simulation.bimodal):
        for group in (0, 1):
            drawn = scores(rng, (400_000,), 0, group)
            assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.02


def test_the_benchmark_writes_a_table(tmp_path, capsys):
    page = tmp_path / "page.md"
    words = ["--repetitions", "20", "--samples", "20", "--tasks", "1", "--seeds", "3"]
    words += ["--statistics", "mean", "--of", "difference", "--methods", "t", "percentile"]
    bench.run("intervals", [*words, "--folder", str(tmp_path), "--page", str(page)])
    assert "scores are left out" in capsys.readouterr().out
    head, _, row = page.read_text().splitlines()
    assert head == "| statistic | of | tasks | seeds | t | percentile |"
    assert row.startswith("| mean | difference | 1 | 3 | ")


def test_intervals_of_relative_differences_cover():
    """True difference 25%; 1,500 studies of 4 seeds have a standard error of 0.6% at 95%."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(1500):
        a, b = rng.normal(10.0, 2.0, 4), rng.normal(8.0, 1.0, 4)
        found = intervals.relative([a], [b])
        held += found.low is None or found.high is None or found.low <= 0.25 <= found.high
    assert held / 1500 > 0.93
