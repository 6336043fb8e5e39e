"""From rows to tables and curves: averages, intervals, which rows are used, and the notes."""

import io
import itertools
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from result_rows import PNG, ensemble, row, trained, write
from rich.console import Console

from cerl.config import load
from cerl.record import results as rows
from cerl.record.folder import dump, load_file
from cerl.record.results import RowsError
from cerl.report import curves, estimate, statistics, tables
from cerl.report.figures import curves as plots
from cerl.report.palette import shown as shown_curves
from cerl.report.summary import SUMMARY, summarise

GOLDEN = Path(__file__).parent / "golden"
RESULTS = GOLDEN.parents[1] / "docs" / "results"


def summary_of(*folders, last: int = 1) -> tuple[dict, list[str]]:
    """{(env, label, score, statistic): line} and the notes."""
    found, notes = curves.cells(curves.load_rows(folders))
    lines = summarise(found, last=last).to_pylist()
    return {(r["env"], r["label"], r["score"], r["statistic"]): r for r in lines}, notes


def numbers(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.3, shape)


def test_individual_is_the_average_over_all_members_and_seeds_are_the_unit(tmp_path):
    returns, vote = numbers((3, 4, 5)), numbers((3, 4), 1)
    returns += np.array([0.0, 1.0, 1.5, 3.0])[:, None]  # seeds differ more than members
    lines, notes = summary_of(write(tmp_path / "a", ensemble(returns, vote)))
    assert not notes
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    per_seed = [sum(returns[2, s]) / 5 for s in range(4)]
    assert one["value"] == pytest.approx(sum(per_seed) / 4, rel=1e-12)
    assert (one["seeds"], one["members"], one["step"], one["episodes"]) == (4, 5, 300, 200)
    # No interval of four seeds is to be trusted, so their range is told.
    assert one["low"] is None and one["high"] is None and one["method"] is None
    assert (one["least"], one["greatest"]) == pytest.approx((min(per_seed), max(per_seed)))
    # The percentile interval against every one of the 4^4 equally likely resamples.
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    one = summarise(found, method="percentile").to_pylist()[0]
    every = [np.mean(draw) for draw in itertools.product(per_seed, repeat=4)]
    low, high = np.percentile(every, [2.5, 97.5])
    assert one["low"] == pytest.approx(low, abs=0.03)
    assert one["high"] == pytest.approx(high, abs=0.03)
    aggregate = lines["catch", "catch/ddqn", "vote", "mean"]
    assert aggregate["value"] == pytest.approx(vote[2].mean(), rel=1e-12)
    assert aggregate["episodes"] == 40


def test_the_last_evaluations_are_averaged_before_anything_else(tmp_path):
    returns, vote = numbers((5, 3, 2)), numbers((5, 3), 1)
    folder = write(tmp_path / "a", ensemble(returns, vote))
    lines, _ = summary_of(folder, last=3)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert one["value"] == pytest.approx(returns[2:].mean(), rel=1e-12)
    assert one["evaluations"] == 3 and one["step"] == 500
    # More than there are: all of them, and the line says how many that is.
    lines, _ = summary_of(folder, last=99)
    assert lines["catch", "catch/ddqn", "vote", "mean"]["evaluations"] == 5
    with pytest.raises(ValueError, match="last: expected at least 1"):
        summary_of(folder, last=0)


def test_tandem_has_active_and_passive_scores_and_no_individual(tmp_path):
    found = [
        row(seed=s, member=i, role=role, members=2, **{"return": 10.0 * i + s})
        for s in range(3)
        for i, role in enumerate(("active", "passive"))
    ]
    lines, _ = summary_of(write(tmp_path / "a", found))
    assert {key[2] for key in lines} == {"active", "passive"}
    assert lines["catch", "catch/ddqn", "active", "mean"]["value"] == 1.0
    assert lines["catch", "catch/ddqn", "passive", "mean"]["value"] == 11.0


def test_training_rows_do_not_count(tmp_path):
    found = [row(**{"return": 2.0}), row(policy="train", **{"return": 50.0})]
    lines, _ = summary_of(write(tmp_path / "a", found))
    assert lines["catch", "catch/ddqn", "individual", "mean"]["value"] == 2.0
    with pytest.raises(RowsError, match="no evaluation among the rows"):
        summary_of(write(tmp_path / "b", found[1:]))


def test_one_seed_has_a_value_and_no_interval(tmp_path):
    lines, _ = summary_of(write(tmp_path / "a", [row(**{"return": 2.0})]))
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert (one["value"], one["low"], one["high"], one["seeds"]) == (2.0, None, None, 1)


def test_seeds_of_several_runs_of_one_preset_are_pooled(tmp_path):
    for seed in range(3):
        write(tmp_path / f"run{seed}", [row(seed=seed, **{"return": float(seed)})])
    lines, notes = summary_of(tmp_path)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert one["seeds"] == 3 and one["value"] == 1.0 and not notes


def test_a_seed_that_ran_twice_counts_once_as_far_as_it_got(tmp_path):
    write(tmp_path / "long", [row(step=s, **{"return": 1.0}) for s in (100, 200)])
    write(tmp_path / "short", [row(step=100, **{"return": 9.0})])
    lines, notes = summary_of(tmp_path)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert (one["seeds"], one["value"], one["step"]) == (1, 1.0, 200)
    assert len(notes) == 1 and "run 2 times" in notes[0]
    assert f"not {(tmp_path / 'short').resolve()}" in notes[0]


def test_seeds_that_got_to_different_steps_meet_at_the_last_common_one(tmp_path):
    write(tmp_path / "a", [row(seed=0, step=s, **{"return": s / 100}) for s in (100, 200, 300)])
    write(tmp_path / "b", [row(seed=1, step=s, **{"return": s / 10}) for s in (100, 200)])
    lines, notes = summary_of(tmp_path)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert one["step"] == 200 and one["value"] == (2.0 + 20.0) / 2
    assert len(notes) == 1 and "at 300: seed 0; at 200: seed 1" in notes[0]


def test_notes_tell_few_names_and_count_the_others(tmp_path):
    for n in range(2, 12):
        options = {"ensemble.members": n}
        steps = (100,) if n == 9 else (100, 200) if n < 7 else (100, 300)
        trained(tmp_path / f"{n}-a", "catch/bootdqn", options, seeds=(*range(8),), steps=steps)
        trained(tmp_path / f"{n}-b", "catch/bootdqn", options, seeds=(8,), steps=(100,))
        trained(tmp_path / f"{n}-c", "catch/bootdqn", options, seeds=(*range(7),), steps=(100,))
    _, notes = curves.cells(curves.load_rows([tmp_path]))
    twice = [note for note in notes if "were run 2 times with one configuration" in note]
    assert len(twice) == 5
    assert twice[0].startswith("seeds 0, 1, 2, 3, 4 and 2 more of bootdqn, members ")
    more = "5 more settings on an environment: seeds were run several times with one configuration"
    assert more in notes
    met = [note for note in notes if "seeds got to different steps (" in note]
    assert len(met) == 5
    assert "00: seed 0, 1, 2, 3, 4 and 3 more; at 100: seed 8)" in met[0]
    assert "4 more settings on an environment: seeds got to different steps" in notes


def test_methods_that_ended_at_different_steps_are_grouped_by_step():
    ends = {f"a, members {n}": 300 for n in range(9)} | {"b": 200, "c": 100, "d": 100}
    assert curves._by_step(ends) == "at 300: 9 methods; at 200: b; at 100: c and 1 more"
    assert curves._by_step({"a": 1, "b": 2_000, "c": 1}) == "at 2,000: b; at 1: a / c"
    many = curves._by_step({f"m{n}": n for n in range(20)})
    assert many == (
        "at 19: m19; at 18: m18; at 17: m17; at 16: m16; at 15 steps between: others; at 0: m0"
    )


def test_presets_that_ended_at_different_steps_are_said(tmp_path):
    write(tmp_path / "a", [row(step=s, **{"return": s / 100}) for s in (100, 200)])
    write(tmp_path / "b", [row(preset="catch/cerl", **{"return": 5.0})])
    lines, notes = summary_of(tmp_path)
    assert {key[1]: (r["step"], r["value"]) for key, r in lines.items()} == {
        "catch/ddqn": (200, 2.0),
        "catch/cerl": (100, 5.0),
    }
    assert len(notes) == 1 and "at 200: catch/ddqn; at 100: catch/cerl" in notes[0]


def test_evaluations_after_a_step_are_left_out(tmp_path):
    write(tmp_path / "runs" / "a", [row(step=s, **{"return": s / 100}) for s in (100, 200, 300)])
    runs = [row(preset="catch/cerl", step=s, **{"return": 5.0 + s}) for s in (100, 200)]
    write(tmp_path / "runs" / "b", runs)
    summary = tables.main([tmp_path / "runs"], tmp_path / "out", until=250).to_pylist()
    means = {r["preset"]: (r["step"], r["value"]) for r in summary if r["statistic"] == "mean"}
    assert means == {"catch/ddqn": (200, 2.0), "catch/cerl": (200, 205.0)}
    trained = row(policy="train", step=20, **{"return": 1.0})
    write(tmp_path / "runs" / "c", [trained, row(preset="catch/bootdqn", step=300)])
    with pytest.raises(RowsError, match="no evaluation up to step 50; the first is at 100"):
        tables.main([tmp_path / "runs"], tmp_path / "out", until=50)
    console = Console(record=True, width=400)
    tables.main([tmp_path / "runs"], tmp_path / "out", until=250, console=console)
    text = console.export_text()
    assert "no evaluation up to step 250, so left out: " in text and "c/rows.parquet" in text


def test_configurations_of_one_preset_are_kept_apart(tmp_path):
    write(tmp_path / "a", [row(**{"return": 1.0})])
    write(tmp_path / "b", [row(config_hash="0123456789ab", **{"return": 2.0})])
    lines, notes = summary_of(tmp_path)
    values = {key[1]: line["value"] for key, line in lines.items()}
    assert values == {"catch/ddqn [abcdef]": 1.0, "catch/ddqn [012345]": 2.0}
    assert len(notes) == 1 and "2 different configurations" in notes[0]


GAMES = ("Pong", "Breakout", "Seaquest")


def test_ensembles_of_two_sizes_have_lines_over_games_each(tmp_path):
    for game, n in itertools.product(GAMES, (10, 5)):
        options = {"env.name": game, "ensemble.members": n}
        trained(tmp_path / f"{game}-{n}", "atari/paper-bootdqn", options, level=n)
    lines, notes = summary_of(tmp_path)
    over = {key[1] for key in lines if key[0] == "atari (3 games)"}
    assert over == {"paper-bootdqn, members 5", "paper-bootdqn, members 10"} and not notes
    for n in (5, 10):
        line = lines["atari (3 games)", f"paper-bootdqn, members {n}", "individual", "mean"]
        tasks = [statistics.human_normalised(np.array([n, n + 1.0]), game) for game in GAMES]
        assert line["value"] == pytest.approx(np.mean(tasks), rel=1e-12)
        assert (line["ensemble.members"], line["members"], line["seeds"]) == (n, n, 2)
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    names = [cell.name for cell in found if cell.env == "atari/Pong"]
    assert names == ["paper-bootdqn, members 5", "paper-bootdqn, members 10"]


def test_rows_that_do_not_say_their_options_have_no_lines_over_games_and_a_note_says_so(tmp_path):
    for game, part in itertools.product(GAMES, "ab"):
        code = f"{part}{game:<11}"  # of the options and the game
        found = [row(preset="atari/x", env=f"atari/{game}", config_hash=code)]
        write(tmp_path / f"{game}-{code}", found)
    lines, notes = summary_of(tmp_path)
    assert {key[0] for key in lines} == {f"atari/{game}" for game in GAMES}
    assert any("atari/x" in note and "no lines over tasks" in note for note in notes)


def test_seeds_of_a_setting_in_several_runs_are_one_line(tmp_path):
    for seeds in ((0, 1), (2,)):
        for n in (2, 3):
            run = tmp_path / f"{n}-{seeds[0]}"
            trained(run, "catch/bootdqn", {"ensemble.members": n}, seeds=seeds)
    found, notes = curves.cells(curves.load_rows([tmp_path]))
    assert [(cell.name, cell.seeds) for cell in found] == [
        ("bootdqn, members 2", (0, 1, 2)),
        ("bootdqn, members 3", (0, 1, 2)),
    ]
    assert not notes


def test_a_seed_that_diverged_is_left_out_and_said(tmp_path):
    found = [row(seed=s, **{"return": v}) for s, v in enumerate((1.0, math.nan, 3.0))]
    lines, notes = summary_of(write(tmp_path / "a", found))
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert (one["value"], one["seeds"], one["seeds_lost"]) == (2.0, 2, 1)
    assert "a return of seed 1 is not a finite number" in notes[0]
    _, text = tables.table(summarise(curves.cells(curves.load_rows([tmp_path]))[0]))
    assert text[0][3] == "2 (1 lost)"
    bad = [row(seed=s, **{"return": math.inf}) for s in range(2)]
    lines, _ = summary_of(write(tmp_path / "b", bad))
    assert lines["catch", "catch/ddqn", "individual", "mean"]["value"] is None


def marked(seed: int, step: int, **changes) -> dict:
    return row(seed=seed, step=step, diverged=True, **changes)


def test_seeds_that_diverged_stay_in_and_are_said(tmp_path):
    found = [row(seed=s, step=t, **{"return": 1.0 + s}) for s in range(3) for t in (100, 200)]
    found += [
        marked(s, t, **{"return": 0.0})
        for s, first in ((3, 100), (4, 200))
        for t in (100, 200)
        if t >= first
    ]
    found += [row(seed=4, step=100, **{"return": 5.0})]
    run = write(tmp_path / "a", found)
    lines, notes = summary_of(run)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert (one["value"], one["seeds"], one["seeds_lost"], one["seeds_diverged"]) == (1.2, 5, 0, 2)
    assert notes == [
        "catch/ddqn on catch: 2 of 5 seeds diverged (agent steps: seed 3 at 100, seed 4 at 200); "
        "what they scored counts as it is"
    ]
    text = io.StringIO()
    tables.main([run], tmp_path / "out", console=Console(file=text, width=80))
    printed = " ".join(text.getvalue().split())
    assert "5 (2 diverged) seeds" in printed and f"note: {notes[0]}" in printed
    shown = (tmp_path / "out" / "table.md").read_text()
    assert "| 5 (2 diverged) |" in shown and f"- {notes[0]}" in shown
    names, values = (
        line.split(",") for line in (tmp_path / "out" / "table.csv").read_text().split()
    )
    assert values[names.index("seeds_diverged")] == "2"
    # Before it is seen, no seed has diverged.
    tables.main([run], tmp_path / "early", until=150, console=Console(file=io.StringIO()))
    assert "| 5 (1 diverged) |" in (tmp_path / "early" / "table.md").read_text()


def test_a_seed_that_was_cut_costs_the_others_no_evaluation(tmp_path):
    found = [row(seed=s, step=t, **{"return": 1.0 + s}) for s in range(2) for t in (100, 200, 300)]
    found += [row(seed=2, step=100), marked(2, 200, **{"return": -7.0})]
    # This one was cut before its first evaluation.
    found += [marked(3, 50, policy="train")]
    run = write(tmp_path / "a", found)
    lines, notes = summary_of(run)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert (one["value"], one["step"]) == (1.5, 300)
    assert (one["seeds"], one["seeds_lost"], one["seeds_diverged"]) == (2, 2, 2)
    assert notes == [
        "catch/ddqn on catch: 2 of 4 seeds diverged (agent steps: seed 2 at 200, seed 3 at 50); "
        "what they scored counts as it is, and there are no scores to the end of seed 2, 3"
    ]
    _, text = tables.table(summarise(curves.cells(curves.load_rows([run]))[0]))
    assert text[0][3] == "2 (2 lost, 2 diverged)"
    plots.write(curves.cells(curves.load_rows([run]))[0], tmp_path / "curves.png")
    # Where all seeds were cut, what they have in common is compared.
    alone = write(tmp_path / "b", [row(step=100), marked(0, 200, **{"return": 2.0})])
    lines, notes = summary_of(alone)
    one = lines["catch", "catch/ddqn", "individual", "mean"]
    assert (one["value"], one["step"], one["seeds_diverged"]) == (2.0, 200, 1)


def test_the_mark_is_of_the_run_that_counts(tmp_path):
    write(tmp_path / "a", [row(step=100), marked(0, 200)])
    write(tmp_path / "b", [row(step=t, **{"return": 1.0}) for t in (100, 200, 300)])
    lines, notes = summary_of(tmp_path)
    assert lines["catch", "catch/ddqn", "individual", "mean"]["seeds_diverged"] == 0
    assert len(notes) == 1 and "was run 2 times" in notes[0]


def test_rows_of_older_versions_have_no_mark(tmp_path):
    old = pa.Table.from_pylist([row()], schema=rows.ROWS).drop_columns(["diverged"])
    (tmp_path / "a").mkdir()
    pq.write_table(old, tmp_path / "a" / "rows.parquet")
    lines, notes = summary_of(tmp_path / "a")
    assert lines["catch", "catch/ddqn", "individual", "mean"]["seeds_diverged"] == 0 and not notes


def test_atari_games_are_summarised_by_human_normalised_scores(tmp_path):
    games = {"Pong": numbers((1, 3, 2)) * 10, "Breakout": numbers((1, 3, 2), 1) * 40}
    found = []
    for game, returns in games.items():
        found += ensemble(returns, returns.mean(2), env=f"atari/{game}", preset="atari/cerl")
        # Every game is a configuration of its own.
        found = [r | {"config_hash": f"{r['env']:<12}"} for r in found]
    found += [row(preset="atari/ddqn", env="atari/Pong", **{"return": 3.0})]
    lines, _ = summary_of(write(tmp_path / "a", found))
    tasks = []
    for game, returns in games.items():
        random, human = statistics.human_random()[game]
        tasks.append((returns[0].mean(1) - random) / (human - random))
    pooled = sorted(np.concatenate(tasks))
    expected = {
        "mean": np.mean(tasks),
        "median": np.median([task.mean() for task in tasks]),
        "iqm": np.mean(pooled[1:5]),
        "optimality_gap": 1 - np.mean(np.minimum(pooled, 1)),
    }
    for name, value in expected.items():
        line = lines["atari (2 games)", "atari/cerl", "individual", name]
        assert line["value"] == pytest.approx(value, rel=1e-12)
        assert line["unit"] == "human-normalised"
        # An optimality gap over two games needs six seeds of each for an interval.
        sure = name != "optimality_gap"
        assert (line["low"] < value < line["high"]) if sure else line["low"] is None
    # One game is no suite.
    assert not any(key[1] == "atari/ddqn" and "games" in key[0] for key in lines)


def test_numbers_show_the_digits_that_matter():
    assert [estimate.number(x) for x in (0.1234, -0.5, 1.234, 13.87, -20.94, 418.5, 16452.7)] == [
        "0.123",
        "-0.500",
        "1.23",
        "13.9",
        "-20.9",
        "418",
        "16,453",
    ]
    assert estimate.number(None) == estimate.number(math.nan) == "n/a"
    assert estimate.estimate({"value": 0.91, "low": -0.82, "high": 1.0}) == "0.91 [-0.82, 1.00]"
    assert estimate.estimate({"value": 950.4, "low": 90.0, "high": 1234.5}) == "950 [90, 1,234]"
    assert estimate.estimate({"value": 2.0, "low": None, "high": None}) == "2.00"
    assert estimate.estimate({"value": None, "low": None, "high": None}) == "n/a"


def test_missing_empty_and_damaged_rows_are_clear_errors(tmp_path):
    with pytest.raises(RowsError, match="no such file or folder"):
        curves.load_rows([tmp_path / "nowhere"])
    with pytest.raises(RowsError, match=r"no rows\.parquet in or below it"):
        curves.load_rows([tmp_path])
    with pytest.raises(RowsError, match="at least one run folder"):
        curves.load_rows([])
    good, bad = write(tmp_path / "good", [row()]), write(tmp_path / "bad", [row()])
    data = (bad / "rows.parquet").read_bytes()
    for content in (b"", data[: len(data) // 2], b"not parquet at all"):
        (bad / "rows.parquet").write_bytes(content)
        with pytest.raises(RowsError, match=r"bad/rows\.parquet: damaged"):
            curves.load_rows([good, bad])
    with pytest.raises(RowsError, match="no evaluation"):
        tables.main([write(tmp_path / "empty", [])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_a_run_and_a_file_name_the_same_rows_once(tmp_path):
    run = write(tmp_path / "runs" / "a", [row()])
    paths = [tmp_path / "runs", run, run / "rows.parquet"]
    assert curves.run_folders(paths) == [(run / "rows.parquet").resolve()]
    assert curves.load_rows(paths).num_rows == 1


def study(tmp_path):
    """Two environments; four presets, one of them a tandem, one with a single member."""
    for env, level in (("catch", 1.0), ("minatar/breakout", 12.0)):
        for k, name in enumerate(("bootdqn", "cerl")):
            returns = level * numbers((6, 4, 3), k) * np.linspace(0.2, 1, 6)[:, None, None]
            found = ensemble(returns, returns.max(2), env=env, preset=f"catch/{name}")
            write(tmp_path / "runs" / f"{env[:5]}-{name}", found)
        returns = level * numbers((6, 4, 1), 7)
        found = ensemble(returns, returns[..., 0], env=env)
        write(tmp_path / "runs" / f"{env[:5]}-ddqn", found)
        found = ensemble(level * numbers((6, 4, 2), 8), np.zeros((0, 4)), env=env)
        for r in found:
            r |= {"preset": "catch/tandem", "role": ("active", "passive")[r["member"]]}
        write(tmp_path / "runs" / f"{env[:5]}-tandem", found)
    return tmp_path / "runs"


def test_main_prints_the_table_and_writes_all_files(tmp_path):
    runs, out = study(tmp_path), tmp_path / "report"
    (runs / "catch-ddqn" / "tensorboard").mkdir()
    text = io.StringIO()
    summary = tables.main([runs], out, console=Console(file=text, width=80))
    printed = text.getvalue()
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "results.parquet",
        "summary.parquet",
        "table.csv",
        "table.md",
        "verdicts.csv",
        "verdicts.parquet",
    ]
    assert (out / "curves.png").read_bytes().startswith(PNG)
    assert f"plot:  {out / 'curves.png'}" in printed
    assert f"tensorboard --logdir {(runs / 'catch-ddqn').resolve()}" in printed
    assert "catch, 4 seeds, 600 agent steps" in printed and "95%" in printed
    assert pq.read_table(out / "summary.parquet").equals(summary)
    assert summary.schema.equals(SUMMARY)  # no options are known, so none differs
    # Every value and interval is whole, in the file and on an 80 column terminal.
    marked = (out / "table.md").read_text().splitlines()
    [headings] = [line for line in marked if line.startswith("| env | ")]
    assert headings.startswith("| env | method | N | seeds | agent steps | individual | aggregate")
    for line in summary.to_pylist():
        value, _, interval = estimate.estimate(line).partition(" ")
        of_preset = [m for m in marked if m.startswith(f"| {line['env']} | {line['preset']} |")]
        assert len(of_preset) == 1 and f"{value} {interval}" in of_preset[0]
        assert value in printed and interval in printed
    table = (out / "table.csv").read_text().splitlines()
    assert table[0] == ",".join(SUMMARY.names) and len(table) == 1 + summary.num_rows


def test_names_from_files_are_neither_markup_nor_control_characters_nor_mathematics(tmp_path):
    names = {"preset": "_[bold] $\\frac$ a|b\x1b[31m\n", "env": "gym/[/x]$x:$_\u202e"}
    run = write(tmp_path / "run", [row(**names)])
    text = io.StringIO()
    tables.main([run], tmp_path / "out", console=Console(file=text, width=200))
    shown = r"_[bold] $\frac$ a|b\x1b[31m\n"
    assert shown in text.getvalue() and r"gym/[/x]$x:$_\u202e" in text.getvalue()
    assert "\x1b[31m" not in text.getvalue()
    table = (tmp_path / "out" / "table.md").read_text()
    assert shown.replace("|", r"\|") in table


def test_the_title_of_a_table_counts_seeds(tmp_path):
    for count, said in ((1, "catch, 1 seed, 100"), (2, "catch, 2 seeds, 100")):
        runs = write(tmp_path / str(count), [row(seed=seed) for seed in range(count)])
        text = io.StringIO()
        tables.main([runs], tmp_path / "out", console=Console(file=text, width=80))
        assert said in text.getvalue()


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    runs, out = study(tmp_path), tmp_path / "report"
    quiet = Console(file=io.StringIO())
    tables.main([runs], out, console=quiet)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        tables.main([runs], out, last=3, console=quiet)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_curves_show_individual_aggregate_active_and_passive_only_where_they_tell_something(
    tmp_path,
):
    found, _ = curves.cells(curves.load_rows([study(tmp_path)]))
    shown = {(cell.env, cell.preset): list(shown_curves(cell)) for cell in found}
    assert shown["catch", "catch/cerl"] == ["individual", "vote"]
    assert shown["catch", "catch/ddqn"] == ["individual"]
    assert shown["catch", "catch/tandem"] == ["active", "passive"]


def test_bands_look_as_matplotlib_draws_them_one_by_one():
    x, colours = np.arange(20), [(0.8, 0.1, 0.1, 0.3), (0.1, 0.1, 0.8, 0.6)]
    ends = np.sin(x / 6) + np.array([[[0.0], [0.5]], [[0.3], [0.9]]])  # [bands, ends, steps]
    pictures, limits = [], []
    for one_by_one in (True, False):
        figure = Figure(figsize=(6, 4), dpi=100)
        canvas, panel = FigureCanvasAgg(figure), figure.subplots()
        if one_by_one:
            for (low, high), colour in zip(ends, colours, strict=True):
                panel.fill_between(x, low, high, color=colour, linewidth=0)
        else:
            bands = zip(ends, colours, strict=True)
            plots._fill(panel, [plots.Area(x, low, high, c) for (low, high), c in bands])
        limits.append([*panel.get_xlim(), *panel.get_ylim()])
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()).astype(float))
    np.testing.assert_allclose(*limits)
    different = abs(pictures[0] - pictures[1]).max(-1) > 8
    coloured = np.ptp(pictures[0][..., :3], axis=-1) > 8
    assert coloured.mean() > 0.1 and different.sum() < 0.06 * coloured.sum()  # the outlines only


def test_runs_of_all_versions_that_train_alike_are_one_configuration(tmp_path):
    shutil.copytree(GOLDEN / "run_0_1", tmp_path / "old")
    config = load_file(tmp_path / "old" / "config.yaml")
    table = rows.read(tmp_path / "old" / "rows.parquet", rows.ROWS)
    [written] = set(table["config_hash"].to_pylist())
    today = rows.config_hash(config)
    assert written != today
    # Another seed of the same run, by this version; then a config beside rows of another run.
    again = [r | {"seed": 7, "config_hash": today} for r in table.to_pylist()]
    write(tmp_path / "new", again)
    found, notes = curves.cells(curves.load_rows([tmp_path / "old", tmp_path / "new"]))
    assert [(cell.preset, cell.seeds) for cell in found] == [("catch/ddqn", (0, 7))]
    dump(load("catch/cerl"), tmp_path / "new" / "config.yaml")
    found, _ = curves.cells(curves.load_rows([tmp_path / "old", tmp_path / "new"]))
    assert [(cell.preset, cell.seeds) for cell in found] == [("catch/ddqn", (0, 7))]


@pytest.mark.parametrize("study", ["minatar", "mujoco", "curse-memory"])
def test_stored_results_of_0_1_are_read_and_pooled(study):
    found, notes = curves.cells(curves.load_rows([RESULTS / study]))
    assert len({(cell.env, cell.preset) for cell in found}) == len(found) >= 4
    assert not any("different configurations" in note for note in notes)
