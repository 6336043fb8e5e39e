"""Figures: looks that follow from roles, titles, sizes of text, and what every figure shows."""

# matplotlib's annotations name every kind of array that its methods accept, not what they return.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import io
import itertools
import math
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from result_rows import PNG, trained
from rich.console import Console
from scipy import special

from cerl import __main__ as command
from cerl.config import ConfigError
from cerl.record import results
from cerl.report import bands, curves, statistics, tables, typeset
from cerl.report.figures import (
    canvas,
    catalogue,
    diagnostics,
    heat,
    improvement,
    look,
    own_data,
    profile,
)
from cerl.report.figures import curves as learning
from cerl.report.figures.asked import Asked, panels
from cerl.report.summary import summarise

STEPS = (100, 200, 300)


def study(folder, *, envs=("breakout", "asterix"), seeds=range(5), members=(5, 10)):
    """A single agent, ensembles and CERL in two sizes, and a tandem."""
    how = {"seeds": [*seeds], "steps": STEPS}
    for env in envs:
        trained(folder / f"{env}-ddqn", "minatar/ddqn", {"env.name": env}, level=20.0, **how)
        for k, (name, n) in enumerate(itertools.product(("bootdqn", "cerl"), members)):
            options = {"env.name": env, "ensemble.members": n}
            trained(folder / f"{env}-{name}-{n}", f"minatar/{name}", options, 10.0 + k, **how)
    return folder


def asked_of(folder, **more):
    rows = curves.load_rows([folder])
    found, _ = curves.cells(rows)
    return found, Asked(rows=rows, summary=summarise(found, samples=100), **more)


def measured(folder, values):
    """Writes metrics.parquet into a run folder. Args: values, {(name, step, seed, member): v}."""
    lines = [
        dict(zip(("name", "step", "seed", "member", "value"), (*k, v), strict=True))
        for k, v in values.items()
    ]
    metrics = results.Rows(folder / "metrics.parquet", results.METRICS)
    for line in lines:
        metrics.append({key: [line[key]] for key in results.METRICS.names})
    metrics.flush()


def visible(figure):
    return [axis for axis in figure.axes if axis.axison]


def test_a_role_has_its_colour_whatever_presets_are_called(tmp_path):
    for members, heads in ((1, "own"), (3, "own"), (3, "cerl")):
        options = {"ensemble.members": members, "ensemble.heads": heads}
        trained(tmp_path / f"{members}-{heads}", "minatar/bootdqn", options)
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    names = {(1, "own"): "z", (3, "own"): "a", (3, "cerl"): "b"}
    called = [names[c.members, (c.options or {}).get("ensemble.heads", "own")] for c in found]
    found = [
        cell._replace(preset=f"mine/{name}", label=cell.label._replace(method=name, options={}))
        for cell, name in zip(found, called, strict=True)
    ]
    own = look.looks(found)
    assert {name: one.colour for name, one in own.items()} == {
        "z": look.ROLES["single"][0],
        "a": look.ROLES["ensemble"][0],
        "b": look.ROLES["cerl"][0],
    }
    assert [own[name].marker for name in "zab"] == ["o", "s", "^"]  # told apart in grey


def test_colours_do_not_depend_on_the_other_settings_of_a_study(tmp_path):
    for name in ("ddqn", "bootdqn", "cerl", "tandem"):
        trained(tmp_path / name, f"minatar/{name}", {})
    every, _ = curves.cells(curves.load_rows([tmp_path]))
    whole = look.looks(every)
    for name in whole:
        [alone] = [cell for cell in every if cell.name == name]
        assert look.looks([alone]) == {name: whole[name]}
    assert len({one.colour for one in whole.values()}) == 4


def test_further_methods_of_a_role_and_networks_have_colours_of_their_own(tmp_path):
    for name in ("bootdqn", "bootdqn-l1", "bootdqn-l2"):
        trained(tmp_path / name, f"minatar/{name}", {})
    own = look.looks(curves.cells(curves.load_rows([tmp_path]))[0])
    assert own["bootdqn"].colour == look.ROLES["ensemble"][0]
    assert len({one.colour for one in own.values()}) == 3
    for name in ("fox", "gru", "mlp", "transformer"):
        trained(tmp_path / "networks" / name, f"atari/flicker-{name}", {})
    own = look.looks(curves.cells(curves.load_rows([tmp_path / "networks"]))[0])
    places = [look.NAMED[name] for name in ("fox", "gru", "mlp", "transformer")]
    wanted = [look.VARIANTS[place][0] for place in places]
    names = [f"flicker-{name}" for name in ("fox", "gru", "mlp", "transformer")]
    assert [own[name].colour for name in names] == wanted


def test_values_of_an_option_are_shades_from_light_to_dark(tmp_path):
    for n in (2, 5, 20):
        trained(tmp_path / str(n), "minatar/cerl", {"ensemble.members": n})
    own = look.looks(curves.cells(curves.load_rows([tmp_path]))[0])
    light = [sum(int(one.colour[k : k + 2], 16) for k in (1, 3, 5)) for one in own.values()]
    assert [*own] == [f"cerl, members {n}" for n in (2, 5, 20)]
    assert light[0] > light[1] > light[2]


def test_titles_say_that_observations_are_partial_or_noisy(tmp_path):
    trained(tmp_path / "a", "atari/flicker-mlp", {})
    trained(tmp_path / "b", "minatar/ddqn", {})
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    assert look.title_of("atari/Pong", found) == "atari/Pong, flicker 0.5"
    assert look.title_of("minatar/breakout", found) == "minatar/breakout"
    # Where it differs between the settings of a task, labels tell it.
    plain = [cell._replace(env="atari/Pong") for cell in found]
    assert look.title_of("atari/Pong", plain) == "atari/Pong"


@pytest.mark.parametrize("text, lines", [
    ("minatar/asterix (5 seeds)", ["minatar/asterix (5 seeds)"]),
    ("popgym/PositionOnlyCartPoleHard (5 seeds)",
     ["popgym/", "PositionOnlyCartPoleHard", "(5 seeds)"]),
    ("mujoco/HalfCheetah-v4 (5 seeds)", ["mujoco/HalfCheetah-v4", "(5 seeds)"]),
])  # fmt: skip
def test_long_titles_are_folded_between_their_parts(text, lines):
    assert canvas.folded(text, width=1.6).split("\n") == lines


def test_every_figure_has_text_of_seven_points_at_a_columns_width_and_no_empty_panel(tmp_path):
    folder = study(tmp_path / "runs")
    trained(folder / "t", "minatar/tandem", {"env.name": "asterix"}, seeds=range(5), steps=STEPS)
    for run in folder.iterdir():
        values = {("feature_rank", t, s, 0): t + s for t in STEPS for s in range(5)}
        measured(run, values)
    found, asked = asked_of(folder, x="ensemble.members")
    figures, notes = catalogue.drawn(found, asked)
    assert notes == []
    assert [*figures] == [name for name in catalogue.FIGURES if name != "map"]
    for name, figure in figures.items():
        canvas.save(figure, tmp_path / f"{name}.png")
        scale = figure.get_figwidth() / canvas.WIDTH
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                assert text.get_fontsize() >= 7.0 * scale, (name, text)
        assert visible(figure), name
        for axis in visible(figure):
            assert axis.lines or axis.images or axis.collections, name
            labels = [axis.get_xlabel(), axis.get_ylabel()]
            assert name == "improvement" or any(labels) or len(visible(figure)) > 1


def test_three_formats_are_written_and_the_same_figure_makes_the_same_bytes(tmp_path):
    found, asked = asked_of(study(tmp_path / "runs", envs=("breakout",)))
    paths, _ = catalogue.write(
        found, asked, tmp_path, names=["curves"], formats=["png", "PDF", ".svg"]
    )
    assert [path.name for path in paths] == ["curves.png", "curves.pdf", "curves.svg"]
    first = [path.read_bytes() for path in paths]
    for content, start in zip(first, (PNG, b"%PDF", b"<?xml"), strict=True):
        assert content.startswith(start)
    assert b"agent steps of one seed" in first[2]  # text stays text
    catalogue.write(found, asked, tmp_path, names=["curves"], formats=["png", "pdf", "svg"])
    assert [path.read_bytes() for path in paths] == first


def test_unknown_figures_and_formats_are_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="no figure 'profiles'; did you mean profile"):
        catalogue.known("profiles")
    with pytest.raises(ConfigError, match="no format 'jpg'.*png, pdf, svg"):
        catalogue.write([], Asked(), tmp_path, formats=["jpg"])


def test_a_figure_that_is_asked_for_and_has_nothing_to_show_is_noted(tmp_path):
    trained(tmp_path / "a", "minatar/ddqn", {})
    found, asked = asked_of(tmp_path)
    figures, notes = catalogue.drawn(found, asked, ["map", "diagnostics", "own-data"])
    assert figures == {} and [note.split()[1] for note in notes] == [
        "map",
        "diagnostics",
        "own-data",
    ]
    assert "no two options differ" in notes[0] and "metrics.parquet" in notes[1]
    assert "map" not in catalogue.drawn(found, asked)[0]


def test_markup_in_names_is_drawn_as_text(tmp_path):
    trained(tmp_path / "a", "minatar/ddqn", {})
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    odd = found[0]._replace(label=found[0].label._replace(method="$x_$ <b>&amp;"), env="a/$y^$")
    figure = learning.draw([odd])
    canvas.save(figure, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert "$x_$ &lt;b&gt;&amp;amp;" in text and "a/$y^$" in text


def test_members_and_aggregates_have_panels_of_their_own(tmp_path):
    found, _ = curves.cells(curves.load_rows([study(tmp_path, members=(5,))]))
    figure = learning.draw(found)
    assert len(figure.axes) == 4
    styles = [[line.get_linestyle() for line in axis.lines] for axis in figure.axes]
    assert styles == [["-"] * 3] * 2 + [["--", "--", "-"]] * 2
    assert [axis.texts[0].get_text() for axis in figure.axes[1::2]] == ["members", "aggregates"]


@pytest.mark.parametrize("seeds", [1, 6, 7])
def test_every_seed_is_a_thin_line_where_seeds_are_too_few_for_a_band(tmp_path, seeds):
    trained(tmp_path / "a", "minatar/ddqn", {}, 4.0, seeds=range(seeds), steps=STEPS)
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    figure = learning.draw(found)
    thin = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    curve = found[0].curves["individual"]
    lines = [segment[:, 1].tolist() for collection in thin for segment in collection.get_segments()]
    assert lines == (curve.returns.T.tolist() if seeds == 6 else [])
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("one seed" in text for text in told) == (seeds == 6)
    assert ("95% interval" in told) == (seeds == 7)


def test_a_profile_is_the_share_of_runs_above_each_score(tmp_path):
    found, asked = asked_of(study(tmp_path, envs=("breakout",), members=(5,)))
    [axis] = profile.draw(found, asked).axes
    for line, one in zip(axis.lines, panels(found, asked)[0].lines, strict=True):
        [scores] = one.finals
        wanted = [(scores > at).mean() for at in line.get_xdata()]
        np.testing.assert_array_equal(line.get_ydata(), wanted)


def test_the_band_of_a_profile_by_percentiles_is_that_of_resampled_runs():
    rng = np.random.default_rng(0)
    tasks = [rng.normal(size=5), rng.normal(size=3)]
    at = np.linspace(-1, 1, 7)
    low, high = profile.band(tasks, at, confidence=0.9, method="percentile")
    drawn = statistics.draws((5, 3), bands.SAMPLES, 0)
    shares = [
        [np.mean([(task[runs] > t).mean() for task, runs in zip(tasks, pair, strict=True)])
         for pair in zip(*drawn, strict=True)]
        for t in at
    ]  # fmt: skip
    np.testing.assert_allclose((low, high), np.percentile(shares, [5, 95], axis=1))


def test_the_band_of_a_profile_holds_the_true_share():
    """Five tasks of five seeds, 25 runs in all; fewer runs have no band."""
    rng = np.random.default_rng(0)
    levels = np.linspace(0, 2, 5)
    at = np.array([0.0, 1.0, 2.0])
    true = np.mean([special.ndtr(level - at) for level in levels], axis=0)
    held = []
    for _ in range(1_000):
        tasks = [level + rng.normal(size=5) for level in levels]
        low, high = profile.band(tasks, at, confidence=0.95, method="t")
        held.append((low <= true) & (true <= high))
    assert np.mean(held) > 0.93


def test_iqm_over_tasks_is_that_of_normalised_scores_at_every_step(tmp_path):
    found, asked = asked_of(study(tmp_path, members=(5,)))
    [panel] = panels(found, asked)
    assert panel.title == "minatar (2 tasks)" and panel.several
    figure = catalogue.FIGURES["iqm"].draw(found, asked)
    members, votes = figure.axes
    assert [axis.get_title() for axis in (members, votes)] == ["members", "aggregates"]
    values = {line.get_color(): line.get_ydata() for line in members.lines}
    # Every seed s of the single agent has 20 + s; the ensemble has 10 + s.
    wanted = statistics.iqm([(10.0 + np.arange(5)) / 22.0] * 2)
    np.testing.assert_allclose(values[look.ROLES["ensemble"][0]], [wanted] * 3)


def test_against_time_every_point_is_at_the_hours_that_its_run_had_trained(tmp_path):
    trained(tmp_path / "a", "minatar/ddqn", {}, seeds=[0, 1], steps=STEPS)
    found, asked = asked_of(tmp_path)
    seconds = pa.array([36.0 * step for step in asked.rows["step"].to_pylist()])
    at = asked.rows.schema.get_field_index("wall_seconds")
    asked = asked._replace(rows=asked.rows.set_column(at, "wall_seconds", seconds))
    [axis] = catalogue.FIGURES["iqm-time"].draw(found, asked).axes
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [1.0, 2.0, 3.0])


def test_improvement_has_a_row_for_every_task_and_one_over_tasks(tmp_path):
    found, asked = asked_of(study(tmp_path, members=(5,)))
    [axis] = improvement.draw(found, asked).axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names[:3] == ["minatar (2 tasks)", "minatar/asterix", "minatar/breakout"]
    assert axis.texts[0].get_text() == "curse gap: bootdqn against ddqn"
    # Seeds 10 to 14 never score more than seeds 20 to 24.
    points = [line for line in axis.lines if line.get_marker() in ("o", "D")]
    assert [line.get_xdata()[0] for line in points[:3]] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("options, share", [
    ({"ensemble.members": 4}, 0.25),
    ({"ensemble.members": 2, "ensemble.duty": "tandem", "ensemble.active_probability": 0.8}, 0.2),
    ({"ensemble.members": 4, "loss.batches": "own", "loss.batches_probability": 0.5}, 0.625),
    ({}, 1.0),
])  # fmt: skip
def test_the_share_of_own_data_follows_from_the_options(options, share):
    assert own_data.share_of(options) == pytest.approx(share)


def test_gaps_are_to_the_single_agent_at_the_last_step_of_both(tmp_path):
    trained(tmp_path / "s", "minatar/ddqn", {}, 5.0, seeds=range(5), steps=(100, 200, 300))
    trained(tmp_path / "e", "minatar/bootdqn", {}, 3.0, seeds=range(5), steps=(100, 200))
    found, asked = asked_of(tmp_path)
    [gap] = own_data.gaps(found, asked)
    assert gap.share == pytest.approx(0.1) and gap.gap.value == pytest.approx(-2.0)
    assert gap.gap.low is None or gap.gap.low < -2.0 < gap.gap.high


def test_a_map_has_a_number_for_every_pair_of_values(tmp_path):
    for n, c in itertools.product((2, 5), (1_000, 2_000)):
        options = {"ensemble.members": n, "replay.capacity": c, "replay.start": 100}
        trained(tmp_path / f"{n}-{c}", "minatar/cerl", options, level=n + c / 1000)
    for c in (1_000, 2_000):
        options = {"replay.capacity": c, "replay.start": 100}
        trained(tmp_path / str(c), "minatar/ddqn", options, level=c / 1000)
    found, asked = asked_of(tmp_path, x="ensemble.members")
    assert heat.options_of(found, asked) == ("ensemble.members", "replay.capacity")
    score, gap = heat.draw(found, asked).axes
    np.testing.assert_allclose(score.images[0].get_array(), [[3.5, 6.5], [4.5, 7.5]])
    np.testing.assert_allclose(gap.images[0].get_array(), [[2.0, 5.0], [2.0, 5.0]])
    assert [t.get_text() for t in score.get_xticklabels()] == ["2", "5"]


def test_maps_and_diagnostics_say_what_they_leave_out(tmp_path):
    names = [f"minatar/{name}" for name in ("bootdqn", "cerl", "mico", "bootdqn-l1", "cerl-l1")]
    sizes = itertools.product(names, (2, 3), (50_000, 100_000))
    for k, (name, n, c) in enumerate(sizes):
        options = {"ensemble.members": n, "replay.capacity": c}
        run = trained(tmp_path / str(k), name, options)
        measured(run, {(metric, 1, 0, 0): 1.0 for metric in diagnostics.METRICS})
    found, asked = asked_of(tmp_path)
    figures, notes = catalogue.drawn(found, asked, ["map", "diagnostics"])
    told = {note.partition(":")[0]: note for note in notes}
    assert "not drawn, for want of room: " in told["figure map"]
    drawn = {axis.get_title() for axis in figures["map"].axes} - {""}
    assert len(drawn) == heat.COLUMNS
    last = [*diagnostics.METRICS][diagnostics.ROWS]
    assert last in told["figure diagnostics"]
    for name, figure in figures.items():
        content = canvas.encoded(figure, "svg").decode().replace("\n", " ")
        assert "want of room" in content, name


def test_no_remark_stands_on_another_text(tmp_path):
    found, asked = asked_of(study(tmp_path, envs=("breakout",), members=(2, 3, 4, 5, 6)))
    figure = catalogue.FIGURES["iqm"].draw(found, asked)
    assert "scores of aggregates are left out" in canvas.remark_of(figure)
    canvas.encoded(figure, "png")
    [legend] = figure.legends
    boxes = [text.get_window_extent() for text in (legend.get_title(), *legend.get_texts())]
    boxes += [axis.get_tightbbox() for axis in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_runs_write_every_metric_that_the_figure_of_diagnostics_knows(tmp_path):
    """Ensembles of both agents with auxiliary heads, and one with gates: some metrics are of one
    of them alone."""
    small = ["--schedule.steps", "120", "--replay.start", "50", "--replay.batch", "8"]
    small += ["--ensemble.members", "2", "--ensemble.heads", "cerl", "--log.every", "60"]
    small += ["--eval.every", "60", "--eval.episodes", "2", "--log.no-save-replay", "--seeds", "0"]
    short = ["--env.length", "3", "--env.envs", "2"]
    for name, more in {"catch/cerl": [], "gym/pendulum": [], "memory/fox": short}.items():
        words = ["train", name, *small, *more, "--device", "cpu", "--out", str(tmp_path)]
        assert command.main(words) == 0
    written = set()
    for file in tmp_path.rglob("metrics.parquet"):
        written |= set(results.read(file, results.METRICS)["name"].to_pylist())
    assert not {*diagnostics.METRICS} - written


def test_diagnostics_are_means_over_members_and_damaged_files_stop_nothing(tmp_path):
    for k, name in enumerate(("ddqn", "cerl")):
        run = trained(tmp_path / name, f"minatar/{name}", {"ensemble.members": 1 + k})
        values = {("feature_rank", t, s, i): 10.0 * t + s + i
                  for t in (1, 2) for s in (0, 1) for i in range(1 + k)}  # fmt: skip
        measured(run, values | {("feature_rank", 3, 0, 0): math.nan})
    found, asked = asked_of(tmp_path)
    [axis] = diagnostics.draw(found, asked).axes
    values = {line.get_color(): line.get_ydata() for line in axis.lines}
    np.testing.assert_allclose(values[look.ROLES["single"][0]], [10.5, 20.5])
    np.testing.assert_allclose(values[look.ROLES["cerl"][0]], [11.0, 21.0])
    (tmp_path / "cerl" / "metrics.parquet").write_bytes(b"damaged")
    [axis] = diagnostics.draw(found, asked).axes
    assert len(axis.lines) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("members", [(5,), (5, 10, 15, 20)])
def test_pdflatex_sets_both_tables_whatever_names_hold(tmp_path, members):
    found, asked = asked_of(study(tmp_path / "runs", members=members))
    odd = "[x] *a_b&50%$#{}~^\\\u65e5<|>\n"
    found = [c._replace(label=c.label._replace(method=odd + c.label.method)) for c in found]
    for name, text in typeset.tables(found, summarise(found)).items():
        (tmp_path / name).write_text(text)
    long = "longtable" in (tmp_path / typeset.RESULTS).read_text()
    assert long == (len(members) > 1)
    inputs = "".join(f"\\input{{{name}}}\n" for name in (typeset.RESULTS, typeset.PARAMETERS))
    (tmp_path / "paper.tex").write_text(
        "\\documentclass[landscape]{article}\n\\usepackage[T1]{fontenc}\n"
        f"\\usepackage{{booktabs,longtable}}\n\\begin{{document}}\n{inputs}\\end{{document}}\n"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")


def test_latex_escapes_names_and_marks_options_that_differ(tmp_path):
    for n in (2, 5):
        trained(tmp_path / str(n), "minatar/cerl", {"ensemble.members": n}, level=n)
    found, asked = asked_of(tmp_path)
    files = typeset.tables(found, asked.summary)
    assert [*files] == ["results.tex", "hyperparameters.tex"]
    lines = files["results.tex"].splitlines()
    [line] = [x for x in lines if x.startswith("cerl, members 5")]
    assert line.split(" & ")[1:3] == ["5", "2"] and "$5.50$" in line and line.endswith(r"\\")
    lines = files["hyperparameters.tex"].splitlines()
    bold = [x for x in lines if x.startswith(r"\textbf")]
    assert bold == [r"\textbf{\texttt{ensemble.members}} & \textbf{2} & \textbf{5} \\"]
    assert any(x.startswith(r"\texttt{agent.huber\_delta} & ") for x in lines)
    assert typeset.escaped("[*]\n\u65e5") == r"{[}{*}]\textbackslash{}nU+65E5"
    assert typeset.escaped("a_b&50%\\{$}") == r"a\_b\&50\%\textbackslash{}\{\$\}"


def test_a_report_draws_what_is_asked_for_in_every_format(tmp_path):
    study(tmp_path / "runs", envs=("breakout",), seeds=range(2))
    quiet = Console(file=io.StringIO(), width=100)
    how = {"figures": ["improvement", "map"], "formats": ["svg"], "latex": True, "x": "members"}
    tables.main([tmp_path / "runs"], tmp_path / "out", console=quiet, **how)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"curves.svg", "improvement.svg", "score-by-members.svg", "results.tex"} <= names
    assert not any(name.endswith(".png") for name in names)
    assert "figure map is not drawn" in quiet.file.getvalue()
