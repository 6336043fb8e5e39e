"""Scores over tasks: which settings and tasks belong together, and which protocols do not mix."""

import io

import numpy as np
import pytest
from result_rows import row, trained, write
from rich.console import Console

import cerl.__main__ as command
from cerl.config import ConfigError
from cerl.report import aggregates, curves, statistics, tables
from cerl.report.summary import summarise


def of(*folders, **how):
    found, _ = curves.cells(curves.load_rows(folders))
    return aggregates.over_tasks(found, **how)


def suite(folder, levels, name="minatar/ddqn", family="minatar", options=(), steps=(100,)):
    """A run on each task: {task: level}; its seeds return level and level + 1."""
    for task, level in levels.items():
        own = {"env.name": task, **dict(options)}
        path = folder / f"{name.replace('/', '-')}-{task}-{len([*folder.glob('*')])}"
        trained(path, name, own, level, steps=steps)
    return folder


TWO = {"breakout": 9.5, "asterix": 19.5}


def test_scores_over_tasks_are_worked_out_from_normalised_seeds(tmp_path):
    suite(tmp_path, TWO)
    suite(tmp_path, {"breakout": 4.5, "asterix": 29.5}, "minatar/bootdqn")
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    over, notes = aggregates.over_tasks(found)
    assert not notes
    keys = [(one.how, one.cells[0].preset, one.score) for one in over]
    assert [key for key in keys if key[0] == "single"] == [
        ("single", "minatar/bootdqn", "individual"),
        ("single", "minatar/bootdqn", "vote"),
        ("single", "minatar/ddqn", "individual"),
        ("single", "minatar/ddqn", "vote"),
    ]
    [one] = [o for o, k in zip(over, keys, strict=True) if k == keys[0]]
    assert (one.env, one.unit) == ("minatar (2 tasks)", "single-agent-normalised")
    # The single agents' means are 10 and 20; tasks are in alphabetical order.
    np.testing.assert_allclose(one.tasks, [[29.5 / 20, 30.5 / 20], [0.45, 0.55]], rtol=1e-12)
    lines = summarise(found).to_pylist()
    rows = {
        (r["unit"], r["statistic"]): r
        for r in lines
        if r["preset"] == "minatar/bootdqn" and r["score"] == "individual"
    }
    got = {name: rows["single-agent-normalised", name]["value"] for name in aggregates.STATISTICS}
    assert got == pytest.approx(
        {
            "iqm": (0.55 + 1.475) / 2,  # the lowest and the highest of four seeds are cut
            "median": (0.5 + 1.5) / 2,
            "mean": (0.5 + 1.5) / 2,
            "optimality_gap": (0.55 + 0.45) / 4,
        },
        rel=1e-12,
    )
    # Over the study, breakout has 4.5 to 10.6 (the vote), asterix 19.5 to 30.6.
    low = rows["min-max-normalised", "mean"]
    wanted = (np.mean([0, 1 / 6.1]) + np.mean([10 / 11.1, 11 / 11.1])) / 2
    assert low["value"] == pytest.approx(wanted, rel=1e-12)
    assert low["low"] < low["value"] < low["high"] and low["seeds"] == 2


@pytest.mark.parametrize(
    "name, tasks, unit",
    [
        ("dmc/sac", ("cheetah-run", "walker-walk"), "return/1000"),
        ("popgym/fox", ("RepeatFirstEasy", "RepeatPreviousEasy"), "unnormalised"),
        ("atari/paper-ddqn", ("Pong", "Breakout"), "human-normalised"),
        ("minatar/ddqn", ("breakout", "asterix"), "min-max-normalised"),
    ],
)
def test_every_family_has_its_unit(tmp_path, name, tasks, unit):
    suite(tmp_path, dict.fromkeys(tasks, 0.25), name)
    over, notes = of(tmp_path)
    # The single agent is no scale for itself where there are only single agents.
    assert {one.unit for one in over} == {unit} and not notes
    [one] = [o for o in over if o.score == "individual"]
    word = "games" if name.startswith("atari") else "tasks"
    assert one.env == f"{name.partition('/')[0]} (2 {word})"
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    assert unit in tables.markdown(summarise(found), [])


def test_human_scores_are_equal_to_the_statistics_to_the_bit(tmp_path):
    suite(tmp_path, {"Pong": 1.3, "Breakout": 40.7}, "atari/paper-ddqn")
    over, _ = of(tmp_path)
    [one] = [o for o in over if o.score == "individual"]
    for cell, task in zip(one.cells, one.tasks, strict=True):
        returns = cell.curves["individual"].returns[-1]
        game = cell.env.partition("/")[2]
        np.testing.assert_array_equal(task, statistics.human_normalised(returns, game))


def test_a_normalisation_can_be_asked_for(tmp_path):
    suite(tmp_path, TWO)
    over, _ = of(tmp_path, how="none")
    assert {one.unit for one in over} == {"unnormalised"}
    np.testing.assert_array_equal(over[0].tasks, [[19.5, 20.5], [9.5, 10.5]])
    over, notes = of(tmp_path, how="human")
    assert not over and "all scores are left out" in notes[0]
    with pytest.raises(ConfigError, match="did you mean minmax"):
        of(tmp_path, how="minmx")


def test_one_task_is_no_suite(tmp_path):
    suite(tmp_path, {"breakout": 9.5})
    suite(tmp_path, {"Pong": 9.5}, "atari/paper-ddqn")
    assert of(tmp_path) == ([], [])


def test_settings_are_aggregated_over_the_tasks_that_all_have_and_a_note_says_so(tmp_path):
    suite(tmp_path, {**TWO, "freeway": 3.0})
    suite(tmp_path, TWO, "minatar/bootdqn")
    suite(tmp_path, {"freeway": 3.0}, "minatar/cerl")
    over, [note] = of(tmp_path)
    assert {one.env for one in over} == {"minatar (2 tasks)"}
    assert {one.cells[0].preset for one in over} == {"minatar/ddqn", "minatar/bootdqn"}
    assert all("freeway" not in cell.env for one in over for cell in one.cells)
    assert "only the 2 that all settings have" in note and "not minatar/freeway" in note
    assert "missing in bootdqn" in note


def test_settings_with_other_tasks_than_the_most_complete_are_left_out(tmp_path):
    suite(tmp_path, {**TWO, "freeway": 3.0})
    suite(tmp_path, {"freeway": 3.0, "seaquest": 3.0}, "minatar/bootdqn")
    over, [note] = of(tmp_path, how="none")
    assert {(one.env, one.cells[0].preset) for one in over} == {
        ("minatar (3 tasks)", "minatar/ddqn")
    }
    assert "left out there: bootdqn" in note


def test_runs_of_different_lengths_are_refused_unless_asked(tmp_path):
    suite(tmp_path, {"breakout": 9.5}, steps=(100, 200))
    suite(tmp_path, {"asterix": 19.5}, steps=(100,))
    over, [note] = of(tmp_path)
    assert not over
    assert "no aggregates, because the runs had different protocols" in note
    assert "agent steps: 100 (ddqn on minatar/asterix); 200 (ddqn on minatar/breakout)" in note
    assert "--mix" in note and "--until 100 " in note
    over, [note] = of(tmp_path, mix=True)
    assert {one.step for one in over} == {100} and "mix protocols, as asked" in note


@pytest.mark.parametrize(
    "option, one, other, said",
    [
        ("env.sticky", 0.0, 0.25, "env.sticky: 0 (ddqn on minatar/breakout); 0.25"),
        ("env.full_actions", False, True, "env.full_actions: off"),
        ("env.observe.flicker", 0.0, 0.5, "env.observe.flicker: 0 "),
        ("eval.episodes", 32, 64, "eval.episodes: 32 (ddqn on minatar/breakout); 64"),
        ("eval.epsilon", 0.01, 0.1, "eval.epsilon: "),
    ],
)
def test_rules_and_budgets_that_differ_are_refused_and_named(tmp_path, option, one, other, said):
    suite(tmp_path, {"breakout": 9.5}, options={option: one})
    suite(tmp_path, {"freeway": 19.5}, options={option: other})
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    differ = aggregates.protocols(found)
    # Evaluations are no options of the environment, so settings that differ in them have labels.
    if option.startswith("eval."):
        assert all(option in cell.label.options for cell in found)
        found = [cell._replace(label=cell.label._replace(options={})) for cell in found]
        differ = aggregates.protocols(found)
    assert [*differ] == [option]
    over, [note] = aggregates.over_tasks(found)
    assert not over and said in note and "--until" not in note
    over, _ = aggregates.over_tasks(found, mix=True)
    assert over


def test_presets_of_two_protocols_are_refused_though_each_is_consistent(tmp_path):
    games = {"Pong": 1.0, "Breakout": 2.0}
    suite(tmp_path, games, "atari/paper-ddqn")
    suite(tmp_path, games, "atari/machado-ddqn")
    over, [note] = of(tmp_path)
    assert not over
    for option in ("env.sticky", "env.frame_skip", "env.full_actions"):
        assert option in note
    assert "0.25 (machado-ddqn)" in note


def test_options_that_follow_the_environment_or_stand_in_labels_are_no_mixture(tmp_path):
    # A time limit belongs to the task; breakout never reads `ramping`.
    suite(tmp_path, {"breakout": 9.5}, options={"env.time_limit": 500})
    suite(tmp_path, {"asterix": 19.5}, options={"env.ramping": False})
    over, notes = of(tmp_path)
    assert over and not notes
    both = tmp_path / "both"
    for sticky in (0.0, 0.25):
        suite(both, TWO, options={"env.sticky": sticky})
    over, notes = of(both)
    assert {one.cells[0].name for one in over} == {"ddqn, sticky 0", "ddqn, sticky 0.25"}
    assert not notes


def test_rows_without_options_only_tell_their_steps(tmp_path):
    for task in ("breakout", "asterix"):
        own = [row(preset="minatar/ddqn", env=f"minatar/{task}", seed=s) for s in (0, 1)]
        own = [r | {"return": 1.0 + r["seed"], "config_hash": f"{task:<12}"} for r in own]
        write(tmp_path / task, own)
    over, notes = of(tmp_path)
    assert {one.unit for one in over} == {"min-max-normalised"} and not notes


def test_seeds_without_a_finite_score_do_not_count(tmp_path):
    suite(tmp_path, TWO)
    broken = [row(seed=s, **{"return": 1.0 + s}) for s in range(3)]
    broken[2]["return"] = float("nan")
    for task in TWO:
        own = [r | {"preset": "minatar/x", "env": f"minatar/{task}"} for r in broken]
        write(tmp_path / f"x-{task}", [r | {"config_hash": f"{task:<12}"} for r in own])
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    lines = summarise(found, normalise="none").to_pylist()
    [line] = [
        r
        for r in lines
        if r["preset"] == "minatar/x" and r["statistic"] == "mean" and r["unit"] != "return"
    ]
    assert (line["value"], line["seeds"], line["seeds_lost"]) == (1.5, 2, 2)


def test_the_report_prints_a_table_for_each_statistic_with_its_normalisation(tmp_path):
    suite(tmp_path / "runs", {"cheetah-run": 250.0, "walker-walk": 500.0}, "dmc/sac")
    suite(tmp_path / "runs", {"cheetah-run": 350.0, "walker-walk": 500.0}, "dmc/cerl")
    text = io.StringIO()
    console = Console(file=text, width=80)
    tables.main([tmp_path / "runs"], tmp_path / "out", console=console)
    printed = text.getvalue()
    for name in ("IQM", "median", "mean", "optimality gap"):
        assert f"dmc (2 tasks), return/1000 {name}" in printed
    assert "return/1000: 1 is a return of 1000" in " ".join(printed.split())
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    over = [line.split(" | ")[:2] for line in lines if "(2 tasks)" in line]
    # Settings stand next to each other, statistic by statistic.
    assert [line[1] for line in over] == ["cerl", "sac"] * 4
    assert over[0][0] == over[1][0] == "| dmc (2 tasks), return/1000 IQM"
    tables.main([tmp_path / "runs"], tmp_path / "out", normalise="minmax", console=console)
    assert "min-max-normalised IQM" in (tmp_path / "out" / "table.md").read_text()


def test_a_mixture_is_a_note_of_the_report_and_stops_nothing(tmp_path):
    suite(tmp_path / "runs", {"breakout": 9.5}, steps=(100, 200))
    suite(tmp_path / "runs", {"asterix": 19.5}, steps=(100,))
    assert command.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "minatar/breakout" in text and "different protocols" in text
