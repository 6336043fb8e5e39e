"""Verdicts: differences, their intervals and their words, against numbers worked out by hand,
against stored studies, and against simulated studies whose true gaps are known."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from result_rows import trained
from rich.console import Console
from scipy import stats

from cerl.config import load
from cerl.config.labels import Label
from cerl.record import results
from cerl.report import curves, sentences, tables, verdicts
from cerl.report.curves import Cell, Curve

STORED = Path(__file__).parents[1] / "docs" / "results"
STEPS = (100, 200, 300)
PRESETS = {
    "single": "catch/ddqn",
    "ensemble": "catch/bootdqn",
    "cerl": "catch/cerl",
    "tandem": "catch/tandem",
}
VARIANTS = {
    "plain": "minatar/bootdqn",
    "own-batches": "minatar/own-batches",
    "sac": "mujoco/standard-sac",
    "redq": "mujoco/redq",
}


def curve(returns, steps=STEPS) -> Curve:
    """Returns are [T, S], or [S] for equal returns at all steps."""
    returns = np.broadcast_to(np.asarray(returns, dtype=float), (len(steps), np.shape(returns)[-1]))
    return Curve(np.array(steps), returns, np.ones(returns.shape, dtype=np.int64))


@functools.cache
def options_of(role: str) -> tuple[dict, int]:
    """Options of a shipped preset, and its number of members."""
    config = load((PRESETS | VARIANTS)[role])
    return results.scoring(config), config.ensemble.members


def cell(role: str, env: str = "catch", label: str = "", **found: Curve) -> Cell:
    """A cell with the options of a shipped preset. Args: found, curves by score."""
    options, n = options_of(role)
    seeds = tuple(range(max(c.returns.shape[1] for c in found.values())))
    name = Label(label or role, {})
    return Cell(env, f"x/{role}", name, options, results.hash_of(options), n, seeds, {}, found)


def only(found: list[verdicts.Verdict], kind: str, when: str = "end") -> verdicts.Verdict:
    [one] = [v for v in found if (v.kind, v.when) == (kind, when)]
    return one


A, B = [1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 9.0, 10.0, 8.0]  # means 3 and 8, variances 2.5


def test_a_curse_gap_by_hand():
    found = [cell("single", individual=curve(B)), cell("ensemble", individual=curve(A))]
    verdict = only(verdicts.verdicts(found), "curse")
    [line] = verdict.tasks
    half = 2.306004 * 1.0  # t of 8 degrees of freedom, times sqrt(2.5 / 5 + 2.5 / 5)
    assert line.difference.value == -5
    assert np.allclose(np.array(line.difference[1:3], dtype=float), [-5 - half, -5 + half])
    assert line.gap == pytest.approx(half)
    assert line.relative.value == pytest.approx(-5 / 8)
    assert line.normalised.value == pytest.approx(-5 / 8)  # by the score of the single agent
    assert line.improvement.value == 0
    assert line.p == pytest.approx(2 / 252)  # the most extreme of 252 regroupings, and its mirror
    assert (line.outcome, line.seeds, line.score, line.baseline) == ("less", (5, 5), 3, 8)
    assert verdict.words() == (
        "At 300 agent steps, members of ensemble return less than the single agent single on "
        "1 of 1 task (Catch: -5.00 [-7.31, -2.69], -62%; p = 0.008; 5 and 5 seeds)."
    )


def test_overlapping_intervals_of_the_two_do_not_matter():
    low, high = [0.0, 1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0, 7.0]
    own = [stats.t.interval(0.95, 4, np.mean(x), stats.sem(x)) for x in (low, high)]
    assert own[0][1] > own[1][0]
    found = [cell("single", individual=curve(high)), cell("ensemble", individual=curve(low))]
    [line] = only(verdicts.verdicts(found), "curse").tasks
    assert line.outcome == "less"


def test_scores_of_the_same_runs_are_paired_by_seed():
    vote = [x + d for x, d in zip(A, (0.2, 0.3, 0.2, 0.3, 0.25), strict=True)]
    found = [cell("ensemble", individual=curve(A), vote=curve(vote))]
    verdict = only(verdicts.verdicts(found), "aggregation")
    [line] = verdict.tasks
    [low, high] = stats.t.interval(0.95, 4, 0.25, stats.sem([0.2, 0.3, 0.2, 0.3, 0.25]))
    assert np.allclose(np.array(line.difference[1:3], dtype=float), [low, high])
    assert line.p == pytest.approx(2 / 32)
    assert verdict.paired and line.outcome == "more"
    assert "p = 0.063, the least that so few seeds can give; 5 seeds" in verdict.words()


def test_active_minus_passive_is_paired_and_needs_no_other_setting():
    found = [cell("tandem", active=curve(B), passive=curve(A))]
    verdict = only(verdicts.verdicts(found), "tandem")
    assert verdict.paired and verdict.tasks[0].difference.value == 5
    assert verdict.words().startswith(
        "At 300 agent steps, the active member of tandem returns more than the passive one"
    )


def test_every_kind_compares_the_roles_that_it_says():
    values = {"single": 5.0, "ensemble": 3.0, "cerl": 4.0}
    found = [cell(r, individual=curve([x, x + 0.1, x - 0.1])) for r, x in values.items()]
    got = {v.kind: v.tasks[0].difference.value for v in verdicts.verdicts(found) if v.when == "end"}
    assert got == pytest.approx({"curse": -2, "gain": 1, "left": -1})


def test_the_gap_of_a_variant_is_told_as_such_and_to_both_baselines():
    found = [
        cell("plain", individual=curve(A)),
        cell("own-batches", individual=curve(B)),
    ]
    [told] = sentences.summary(verdicts.verdicts(found))
    assert told.startswith(
        "Gap of own-batches to the ensemble: At 300 agent steps, members of own-batches return "
        "more than members of the ensemble plain on 1 of 1 task (Catch: +5.00 "
    )
    found = [
        cell("sac", individual=curve(A)),
        cell("redq", individual=curve(B)),
    ]
    [told] = sentences.summary(verdicts.verdicts(found))
    assert told.startswith(
        "Gap of redq to the single agent: At 300 agent steps, redq returns more than the single "
        "agent sac on 1 of 1 task"
    )


def test_a_drawn_member_stands_for_the_members_where_they_were_not_all_evaluated():
    found = [cell("single", random=curve(B)), cell("ensemble", random=curve(A), vote=curve(B))]
    got = verdicts.verdicts(found)
    assert only(got, "curse").tasks[0].difference.value == -5
    assert only(got, "aggregation").tasks[0].difference.value == 5


def test_scores_are_compared_at_the_last_step_of_both_sides_and_that_is_said():
    long = curve([[1, 1.1, 0.9], [2, 2.1, 1.9], [9, 9.1, 8.9]])
    short = curve([[0, 0.1, -0.1], [5, 5.1, 4.9]], steps=(100, 200))
    found = [cell("single", individual=long), cell("ensemble", individual=short)]
    verdict = only(verdicts.verdicts(found), "curse")
    [line] = verdict.tasks
    assert (line.step, line.ends, line.difference.value) == (200, (200, 300), pytest.approx(3))
    assert verdict.words().startswith("At 200 agent steps, the last that both have, members of")


def test_last_evaluations_are_averaged_at_equal_steps_of_both_sides():
    one = curve([[1, 2, 3], [4, 5, 6], [7, 8, 9]], steps=(100, 200, 400))
    other = curve([[0, 0, 0], [1, 2, 3], [0, 1, 2]], steps=(100, 300, 400))
    found = [cell("single", individual=other), cell("ensemble", individual=one)]
    [line] = only(verdicts.verdicts(found, last=2), "curse").tasks
    assert line.score == np.mean([2, 8]) and line.baseline == np.mean([0, 1])
    assert (line.first, line.step) == (100, 400)


def test_a_verdict_at_a_step_and_over_the_area_under_the_curve():
    steps = (100, 200, 400)
    rising = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 5.0], [6.0, 6.0, 7.0]])
    found = [
        cell("single", individual=curve(np.ones(3), steps=steps)),
        cell("ensemble", individual=curve(rising, steps=steps)),
    ]
    got = verdicts.verdicts(found, at=250)
    [line] = only(got, "curse", "step").tasks
    assert (line.step, line.score) == (200, pytest.approx(10 / 3))
    [line] = only(got, "curse", "area").tasks
    area = [np.interp(np.arange(100, 401), steps, r).mean() for r in rising.T]
    exact = [((a + b) * 50 + (b + c) * 100) / 300 for a, b, c in rising.T]
    assert np.allclose(area, exact, atol=0.02)  # the sum over single steps nearly is the integral
    assert line.score == pytest.approx(np.mean(exact))
    assert (line.first, line.step) == (100, 400)
    assert not [v for v in verdicts.verdicts(found, at=50) if v.when == "step"]


def test_with_too_few_seeds_there_is_no_verdict():
    found = [cell("single", individual=curve(B[:2])), cell("ensemble", individual=curve(A[:2]))]
    verdict = only(verdicts.verdicts(found), "curse")
    assert verdict.tasks[0].outcome == "none" and verdict.tasks[0].difference.value == -5
    assert verdict.words() == (
        "At 300 agent steps, there is no verdict on members of ensemble and the single agent "
        "single on 1 of 1 task (Catch: 2 seeds, at least 3 seeds needed)."
    )


def test_equal_scores_of_all_seeds_give_no_verdict():
    found = [cell(role, individual=curve(np.ones(4))) for role in ("single", "ensemble")]
    assert "all seeds have the same score" in only(verdicts.verdicts(found), "curse").words()


def test_an_undecided_verdict_says_how_small_a_gap_could_have_been_seen():
    found = [cell("single", individual=curve(A)), cell("ensemble", individual=curve(A[::-1]))]
    verdict = only(verdicts.verdicts(found), "curse")
    assert verdict.words() == (
        "At 300 agent steps, members of ensemble and the single agent single cannot be told apart "
        "on 1 of 1 task (Catch: 0.00 [-2.31, 2.31], 0%; a gap of 2.31 or more would have been "
        "seen; p = 1.00; 5 and 5 seeds)."
    )


def test_seeds_without_a_finite_score_do_not_count():
    broken = [*A, np.nan]
    found = [cell("single", individual=curve(B)), cell("ensemble", individual=curve(broken))]
    [line] = only(verdicts.verdicts(found), "curse").tasks
    assert line.seeds == (5, 5) and line.difference.value == -5
    found = [cell("single", individual=curve(B)), cell("ensemble", individual=curve([np.nan] * 3))]
    verdict = only(verdicts.verdicts(found), "curse")
    assert "no finite score" in verdict.words()
    assert verdicts.table([verdict])["difference"].to_pylist() == [None]


def tasks(count: int) -> list[Cell]:
    """Members lose 1 of 8 on a first task, 2 of 8 on a second, and so on."""
    envs = [f"minatar/game_{k}" for k in range(count)]
    singles = [cell("single", env, individual=curve(np.array(B))) for env in envs]
    members = [
        cell("ensemble", env, individual=curve(np.array(B) - 1 - k)) for k, env in enumerate(envs)
    ]
    return [*singles, *members]


def test_over_tasks_scores_are_normalised_and_one_verdict_counts_the_tasks():
    verdict = only(verdicts.verdicts(tasks(3)), "curse")
    line = verdict.overall
    assert line is not None and (line.statistic, line.unit) == ("mean", "single-agent-normalised")
    assert line.difference.value == pytest.approx(-2 / 8)
    assert [one.statistic for one in verdict.over] == ["mean", "iqm"]
    assert (verdict.count("less"), verdict.count("undecided")) == (1, 2)
    text = verdict.words()
    assert "return less than the single agent single on 1 of 3 games (Game 2: -3.00" in text
    assert "the two cannot be told apart on 2 (Game 0: " in text
    # Variance of the difference on a task: 2 (2.5 / 64) / 5; over tasks a third, 24 degrees.
    half = stats.t.ppf(0.975, 24) * (2 * 2.5 / 64 / 5 / 3) ** 0.5
    assert line.gap == pytest.approx(half)
    assert "over all 3 games mean -25% [-40, -10] of the single agent's score; p " in text


def test_over_five_tasks_the_iqm_is_told():
    verdict = only(verdicts.verdicts(tasks(5)), "curse")
    assert verdict.overall is not None and verdict.overall.statistic == "iqm"
    assert "less than the single agent single on 3 of 5 games (Game 2, Game 3, Game 4)" in (
        verdict.words()
    )


def test_over_tasks_only_steps_that_all_share_count():
    found = tasks(2)
    cut = found[2].curves["individual"]
    cut = Curve(cut.steps[:2], cut.returns[:2] - 4, cut.episodes[:2])
    found[2] = found[2]._replace(curves={"individual": cut})
    verdict = only(verdicts.verdicts(found), "curse")
    assert [line.step for line in verdict.tasks] == [200, 300]
    assert verdict.overall is not None and verdict.overall.step == 200
    assert "Game 0: at 200 agent steps, the last that both have; -5.00" in verdict.words()


def test_tasks_of_several_families_are_not_averaged():
    found = tasks(1) + [
        cell("single", "mujoco/Hopper-v4", individual=curve(B)),
        cell("ensemble", "mujoco/Hopper-v4", individual=curve(A)),
    ]
    got = [v for v in verdicts.verdicts(found) if v.kind == "curse" and v.when == "end"]
    assert [(v.family, len(v.tasks), v.overall) for v in got] == [
        ("minatar", 1, None),
        ("mujoco", 1, None),
    ]


def test_the_summary_counts_verdicts_of_a_grid():
    found = []
    for k in range(4):
        env = f"minatar/game_{k}"
        found.append(cell("single", env, individual=curve(np.array(B))))
        lost = np.array(B) - (5 if k < 3 else 0.1)
        found.append(cell("ensemble", env, f"members {k}", individual=curve(lost)))
    got = verdicts.verdicts(found)
    assert sentences.summary(got) == [
        "Curse gap: Members of ensembles return less than single agents by 62% to 62% in 3 of 4 "
        "comparisons (4 settings, 4 games) and more in none; in 1 the two cannot be told apart."
    ]


def test_a_summary_begins_with_what_can_be_told():
    found = [
        cell("single", individual=curve(A)),
        cell("ensemble", individual=curve(np.array(A) + 0.1)),
        cell("tandem", active=curve(B), passive=curve(A)),
    ]
    told = sentences.summary(verdicts.verdicts(found))
    assert [text.partition(":")[0] for text in told] == ["Active minus passive", "Curse gap"]


def test_a_difference_that_shows_only_over_all_tasks_is_one_that_can_be_told():
    found = []
    for k in range(5):
        found.append(cell("single", f"minatar/{k}", individual=curve(A)))
        found.append(cell("ensemble", f"minatar/{k}", individual=curve(np.array(A) + 0.1)))
        active = curve(np.array(B) + [-1, 0, 1, 2, 3])  # an interval of 1 [-0.96, 2.96]
        found.append(cell("tandem", f"minatar/{k}", active=active, passive=curve(B)))
    told = sentences.summary(verdicts.verdicts(found))
    assert [text.partition(":")[0] for text in told] == ["Active minus passive", "Curse gap"]
    assert "cannot be told apart on 5 of 5 games" in told[0] and "may be chance" not in told[0]


@pytest.mark.parametrize(("wrong", "says"), [({"last": 0}, "at least 1"), ({"method": "z"}, "z")])
def test_arguments_are_checked(wrong: dict, says: str):
    with pytest.raises(ValueError, match=says):
        verdicts.verdicts([cell("single", individual=curve(A))], **wrong)


@pytest.fixture(scope="module")
def mujoco() -> list[verdicts.Verdict]:
    """Verdicts of a stored study up to 280,000 agent steps."""
    table, _ = tables._earlier(curves.load_rows([STORED / "mujoco"]), 280_000)
    return verdicts.verdicts(curves.cells(table)[0], last=3)


def test_permutation_tests_of_the_stored_robots(mujoco: list[verdicts.Verdict]):
    curse = {line.envs[0]: line for line in only(mujoco, "curse").tasks}
    assert round(curse["mujoco/Hopper-v4"].p or 0, 3) == 0.016
    gain = {line.envs[0]: round((line.p or 0) + 1e-9, 3) for line in only(mujoco, "gain").tasks}
    assert gain == {
        "mujoco/HalfCheetah-v4": 0.063,
        "mujoco/Hopper-v4": 0.048,
        "mujoco/Walker2d-v4": 0.040,
    }


def test_the_stored_grid_is_compared_within_the_same_buffer():
    found, _ = curves.cells(curves.load_rows([STORED / "minatar-size"]))
    got = [v for v in verdicts.verdicts(found, last=3) if v.kind == "curse" and v.when == "end"]
    assert len(got) == 12
    assert all(v.setting.endswith(v.baseline.removeprefix("ddqn, ")) for v in got)
    [verdict] = [v for v in got if v.setting == "bootdqn, members 10, capacity 100k"]
    line = next(line for line in verdict.tasks if line.envs == ("minatar/space_invaders",))
    assert round(line.difference.value, 1) == -11.6 and round(line.relative.value, 2) == -0.26


# Of simulated tasks: mean and standard deviation of a single agent's seeds, and the gap.
TRUTH = {"a": (100.0, 10.0, -12.0), "b": (5.0, 1.0, 0.0), "c": (1.0, 0.2, 0.15)}


def simulated(studies: int) -> list[verdicts.Verdict]:
    """The curse gap of studies of five normal seeds on each task."""
    rng = np.random.default_rng(7)
    found = []
    for study, (task, (mean, std, gap)) in itertools.product(range(studies), TRUTH.items()):
        for role, centre in (("single", mean), ("ensemble", mean + gap)):
            scores = curve(centre + std * rng.standard_normal(5), steps=(100,))
            found.append(cell(role, f"s{study}/{task}", individual=scores))
    return [v for v in verdicts.verdicts(found) if v.when == "end" and v.kind == "curse"]


def covered(lines: list[verdicts.Line], truth: float, name: str = "difference") -> float:
    """The share of intervals that hold the true gap."""
    own = [getattr(line, name) for line in lines]
    return float(np.mean([x.low is not None and x.low <= truth <= x.high for x in own]))


def test_a_simulated_difference_of_zero_is_seldom_taken_for_one():
    lines = [v.tasks[1] for v in simulated(100)]
    # Of 100 studies at most 12 are expected to err by chance (99.9% quantile of the binomial).
    assert sum(line.outcome != "undecided" for line in lines) <= stats.binom.ppf(0.999, 100, 0.05)


@pytest.mark.slow
def test_intervals_of_verdicts_hold_the_true_gaps_of_a_thousand_simulated_studies():
    found = simulated(1000)
    measured = {
        task: covered([v.tasks[k] for v in found], gap)
        for k, (task, (*_, gap)) in enumerate(TRUTH.items())
    }
    shares = [gap / mean for mean, _, gap in TRUTH.values()]
    over = [v.overall for v in found if v.overall is not None]
    measured["over"] = covered(over, float(np.mean(shares)))
    measured["relative"] = covered(over, float(np.mean(shares)), "relative")
    print(measured)
    # The standard error of a coverage of 95% over 1,000 studies is 0.7%.
    assert len(over) == 1000
    assert all(0.93 <= share <= 0.98 for share in measured.values()), measured


def test_a_report_tells_verdicts_first_and_stores_them(tmp_path: Path):
    for k, name in enumerate(PRESETS.values()):
        if "tandem" not in name:
            trained(tmp_path / f"runs/{k}", name, {}, float(-10 * k), seeds=(0, 1, 2))
    screen = Console(record=True, width=200)
    tables.main([tmp_path / "runs"], tmp_path / "out", console=screen)
    printed = screen.export_text()
    said = "At 100 agent steps, members of bootdqn return less than the single agent ddqn"
    assert printed.index(said) < printed.index("method")
    assert (tmp_path / "out/table.md").read_text().startswith(f"Verdicts:\n\n- Curse gap: {said}")
    rows = pq.read_table(tmp_path / "out/verdicts.parquet").to_pylist()
    [row] = [row for row in rows if row["kind"] == "curse" and row["when"] == "end"]
    assert row["difference"] == -10 and row["outcome"] == "less" and row["env"] == "catch"
    assert (tmp_path / "out/verdicts.csv").read_text().startswith("kind,when,setting,score,")


def test_a_report_of_single_agents_has_no_verdicts(tmp_path: Path):
    trained(tmp_path / "run", "catch/ddqn", {})
    tables.main([tmp_path / "run"], tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out/table.md").read_text().startswith("Verdicts")
    assert pq.read_table(tmp_path / "out/verdicts.parquet").num_rows == 0
