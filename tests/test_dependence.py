"""`cerl report --x OPTION`: the scores against an option, as a figure and as a table."""

import io
import itertools
from typing import Any

import pyarrow.parquet as pq
import pytest
from result_rows import PNG, row, trained, write
from rich.console import Console

from cerl.config import ConfigError
from cerl.report import curves, dependence, tables
from cerl.report.figures import canvas, look, score
from cerl.report.figures import curves as learning
from cerl.report.summary import summarise

SIZES = (2, 10, 40)


def study(folder, *, envs=("breakout", "asterix")):
    """Bootstrapped DQN and CERL in three sizes, and a single agent; returns of N + seed."""
    for env, (k, name) in itertools.product(envs, enumerate(("bootdqn", "cerl"))):
        for n in SIZES:
            options = {"env.name": env, "ensemble.members": n}
            trained(folder / f"{env}-{name}-{n}", f"minatar/{name}", options, level=n + k / 2)
    for env in envs:
        trained(folder / f"{env}-ddqn", "minatar/ddqn", {"env.name": env}, level=7.0)
    return folder


def of(folder, option):
    found, _ = curves.cells(curves.load_rows([folder]))
    key = dependence.key_of(option, found)
    return dependence.points(found, summarise(found), key)


def test_each_setting_of_the_other_options_is_a_line_and_a_single_agent_is_constant(tmp_path):
    own = of(study(tmp_path), "ensemble.members")
    lines = {(p.panel, p.setting, p.score): [] for p in own}
    for p in own:
        lines[p.panel, p.setting, p.score].append((p.constant, p.x, p.estimate["value"]))
    for env, (k, name) in itertools.product(
        ("breakout", "asterix"), enumerate(("bootdqn", "cerl"))
    ):
        wanted = [(False, n, pytest.approx(n + k / 2 + 0.5)) for n in SIZES]
        assert lines[f"minatar/{env}", name, "individual"] == wanted
        wanted = [(False, n, pytest.approx(n + k / 2 + 0.6)) for n in SIZES]
        assert lines[f"minatar/{env}", name, "vote"] == wanted
        # The vote of a single member is its own score, and is not drawn.
        assert lines[f"minatar/{env}", "ddqn", "individual"] == [(True, None, 7.5)]
        assert (f"minatar/{env}", "ddqn", "vote") not in lines
    assert len([panel for panel, _, _ in lines if panel != "minatar (2 tasks)"]) == 10


def test_over_tasks_the_first_normalisation_is_drawn(tmp_path):
    own = [p for p in of(study(tmp_path), "ensemble.members") if p.panel == "minatar (2 tasks)"]
    assert {p.unit for p in own} == {"single-agent-normalised"}
    iqm = {(p.setting, p.x): p.estimate["value"] for p in own if p.score == "individual"}
    assert iqm["ddqn", None] == pytest.approx(1.0)  # scores 7 and 8 on both tasks
    assert iqm["bootdqn", 10] == pytest.approx(10.5 / 7.5)


def test_a_preset_that_has_one_value_of_the_option_is_a_point_there(tmp_path):
    study(tmp_path, envs=("breakout",))
    trained(tmp_path / "l1", "minatar/bootdqn-l1", {"env.name": "breakout", "ensemble.members": 7})
    own = [p for p in of(tmp_path, "ensemble.members") if p.setting == "bootdqn-l1"]
    assert {(p.constant, p.x) for p in own} == {(False, 7)}


def test_games_with_a_normalisation_have_a_panel_over_all(tmp_path):
    for game, n in itertools.product(("Pong", "Breakout"), (5, 10)):
        options = {"env.name": game, "ensemble.members": n}
        trained(tmp_path / f"{game}-{n}", "atari/paper-bootdqn", options, level=n)
    own = of(tmp_path, "ensemble.members")
    over = [p for p in own if p.panel == "atari (2 games)" and p.score == "individual"]
    assert [p.x for p in over] == [5, 10] and {p.unit for p in over} == {"human-normalised"}
    found, _ = curves.cells(curves.load_rows([tmp_path]))
    iqm = {
        r["label"]: r["value"]
        for r in summarise(found).to_pylist()
        if r["statistic"] == "iqm" and r["score"] == "individual"
    }
    assert [p.estimate["value"] for p in over] == [*iqm.values()]


def test_the_report_writes_the_figure_and_prints_the_table(tmp_path):
    text, out = io.StringIO(), tmp_path / "out"
    runs = study(tmp_path / "runs")
    summary = tables.main([runs], out, x="ensemble.members", console=Console(file=text, width=80))
    assert (out / "score-by-members.png").read_bytes().startswith(PNG)
    printed = text.getvalue()
    assert f"plot:  {out / 'score-by-members.png'}" in printed
    part = printed[printed.index("minatar/breakout, by members") :].splitlines()
    assert part[1] == "  ddqn (single agent): 7.50 (7.00..8.00)"
    assert part[3] == "minatar/breakout, individual, by members"
    assert part[5].split() == ["method", "2", "10", "40"]
    assert part[7].split() == ["bootdqn", "2.50", "10.5", "40.5"]
    assert part[8].split() == ["(2.00..3.00)", "(10.0..11.0)", "(40.0..41.0)"]
    lines = (out / "score-by-members.csv").read_text().splitlines()
    assert (
        lines[0] == "env,unit,setting,method,ensemble.members,score,value,low,high,least,greatest"
    )
    assert "minatar/breakout,return,ddqn,ddqn,,individual,7.5,,,7.0,8.0" in lines
    assert "minatar/breakout,return,bootdqn,bootdqn,40,individual,40.5,,,40.0,41.0" in lines
    column = summary["ensemble.members"]
    assert set(column.to_pylist()) == {1, *SIZES}


def test_results_of_all_runs_have_labels_options_and_names_of_folders(tmp_path):
    tables.main([study(tmp_path / "runs")], tmp_path / "out", console=Console(file=io.StringIO()))
    found = pq.read_table(tmp_path / "out" / "results.parquet")
    rows = [r for r in found.to_pylist() if r["run"] == "breakout-cerl-10" and r["member"] < 0]
    assert {r["label"] for r in rows} == {"cerl, members 10"}
    assert [r["ensemble.members"] for r in rows] == [10, 10] and rows[0]["ensemble.heads"] == "cerl"
    [single] = {r["ensemble.members"] for r in found.to_pylist() if r["label"] == "ddqn"}
    assert single == 1 and "breakout-ddqn" in found["run"].to_pylist()


@pytest.mark.parametrize(
    "option, message",
    [
        ("ensemble.member", "did you mean ensemble.members"),
        ("encoder", "encoder.name has one value in all runs of a preset"),
        ("replay.capacity", "has one value in all runs of a preset; these runs differ in ensemble"),
        ("nonsense", "no option 'nonsense' .these runs differ in ensemble.members"),
    ],
)
def test_an_option_that_does_not_differ_is_refused_before_anything_is_written(
    tmp_path, option, message
):
    runs = study(tmp_path / "runs", envs=("breakout",))
    with pytest.raises(ConfigError, match=message):
        tables.main([runs], tmp_path / "out", x=option)
    assert not (tmp_path / "out").exists()
    old = write(tmp_path / "old", [row()])
    with pytest.raises(ConfigError, match="rows do not say which options"):
        tables.main([old], tmp_path / "out", x="ensemble.members")


def test_rows_that_do_not_say_their_options_are_no_constant(tmp_path):
    study(tmp_path, envs=("breakout",))
    write(tmp_path / "old", [row(preset="minatar/tandem", members=2)])
    own = [p for p in of(tmp_path, "ensemble.members") if p.setting == "minatar/tandem"]
    assert {(p.constant, p.x) for p in own} == {(False, 2)}
    for lr in (1e-3, 1e-4):
        trained(tmp_path / f"{lr}", "minatar/cerl", {"env.name": "breakout", "optim.lr": lr})
    assert not [p for p in of(tmp_path, "optim.lr") if p.setting == "minatar/tandem"]
    text = io.StringIO()
    tables.main([tmp_path], tmp_path / "out", x="lr", console=Console(file=text, width=300))
    assert "which optim.lr some runs had, so these are left out there: minatar/tandem" in (
        text.getvalue()
    )


def test_tables_fit_the_width_and_methods_are_folded_at_commas(tmp_path):
    for n, c, b in itertools.product((2, 5, 10, 20, 40, 80), (25_000, 100_000), (16, 32)):
        options = {"env.name": "breakout", "ensemble.members": n, "replay.capacity": c}
        trained(tmp_path / f"{n}-{c}-{b}", "minatar/bootdqn", options | {"replay.batch": b})
    text = io.StringIO()
    own = of(tmp_path, "ensemble.members")
    dependence.printed(own, Console(file=text, width=80), option="members")
    lines = text.getvalue().splitlines()
    heads = [line.split() for line in lines if "method" in line]
    assert heads[0][:2] == ["method", "2"] and heads[0][1:] + heads[1][1:] == [
        *("2", "5", "10", "20", "40", "80")
    ]
    assert max(map(len, lines)) <= 80
    assert any(line[:24].strip() == "bootdqn, capacity 25k," for line in lines)
    assert any(line[:24].strip() == "batch 16" for line in lines)


def grid(folder, *, members=(2, 5), capacities=(25_000, 100_000), single=None):
    """Bootstrapped DQN over two options, and a single agent over the values of `single`."""
    for n, c in itertools.product(members, capacities):
        options = {"env.name": "breakout", "ensemble.members": n, "replay.capacity": c}
        trained(folder / f"b-{n}-{c}", "minatar/bootdqn", options, level=n)
    for c in capacities if single is None else single:
        options = {"env.name": "breakout", "replay.capacity": c}
        trained(folder / f"d-{c}", "minatar/ddqn", options, level=7.0)
    return folder


def test_each_value_of_another_option_has_a_row_of_panels(tmp_path):
    own = of(grid(tmp_path), "ensemble.members")
    assert score.rows(own) == [{"replay.capacity": 25_000}, {"replay.capacity": 100_000}]
    single = [p for p in own if p.alone]
    assert [[score.within(p, row) for row in score.rows(own)] for p in single] == [
        [True, False],
        [False, True],
    ]
    # Without a second option there are no rows.
    assert score.rows([p for p in own if p.others["replay.capacity"] == 25_000]) == []


def test_a_single_agent_is_in_each_row_of_another_option_of_ensembles(tmp_path):
    own = of(grid(tmp_path), "replay.capacity")
    assert score.rows(own) == [{"ensemble.members": 2}, {"ensemble.members": 5}]
    single = [p for p in own if p.method == "ddqn"]
    assert len(single) == 2 and not any(p.constant or p.others for p in single)
    assert all(score.within(p, row) for p in single for row in score.rows(own))


def test_a_method_with_one_value_of_another_option_is_in_the_row_of_that_value(tmp_path):
    [one] = [p for p in of(grid(tmp_path / "a", single=[100_000]), "members") if p.alone]
    assert one.others == {"replay.capacity": 100_000}
    # No row has its value, so it is in all of them.
    own = of(grid(tmp_path / "b", single=[50_000]), "members")
    [one] = [p for p in own if p.alone]
    assert one.others == {} and len(score.rows(own)) == 2


def test_more_combinations_than_six_are_lines_of_one_panel(tmp_path):
    capacities = [25_000 * k for k in range(1, 8)]
    own = of(grid(tmp_path, capacities=capacities, single=[]), "ensemble.members")
    assert score.rows(own) == []
    six = [p for p in own if p.others["replay.capacity"] <= 150_000]
    assert len(score.rows(six)) == 6
    canvas.save(drawn(tmp_path, own), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def drawn(folder, own):
    """The figure that `score.draw` makes of some points."""
    found, _ = curves.cells(curves.load_rows([folder]))
    return score.draw(found, own, key="ensemble.members")


def test_panels_share_colours_and_the_axis_of_their_environment(tmp_path):
    own = of(grid(tmp_path), "ensemble.members")
    figure = drawn(tmp_path, own)
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert [axis.get_title() for axis in figure.axes] == ["capacity 25k", "capacity 100k"]
    assert [text.get_text() for text in right.texts] == ["minatar/breakout"]
    lines = [[x for x in axis.lines if x.get_marker() != "."] for axis in figure.axes]
    colours = [[line.get_color() for line in own] for own in lines]
    # The single agent, and the individual score and the vote of the ensemble.
    assert colours[0] == colours[1] and len(colours[0]) == 3
    assert set(colours[0]) == {look.ROLES["single"][0], look.ROLES["ensemble"][0]}
    assert [line.get_linestyle() for line in lines[0]] == ["-", "--", "-"]
    seeds: list[Any] = [line.get_ydata() for line in left.lines if line.get_marker() == "."]
    # Both seeds, at both values; and of the single agent at the edge of the panel.
    assert len(seeds) == 3 and {len(own) for own in seeds} == {2}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["bootdqn", "ddqn (single agent)"] and len(legend) == 5
    assert [axis.get_ylabel() for axis in figure.axes] == ["final return", ""]
    sizes: list[Any] = [t.get_fontsize() for t in (*right.texts, *figure.legends[0].get_texts())]
    assert min(sizes) >= 7


def test_more_than_six_environments_are_rows(tmp_path):
    own = of(grid(tmp_path), "ensemble.members")
    many = [p._replace(panel=f"env {k}") for k in range(7) for p in own]
    figure = drawn(tmp_path, many)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["capacity 25k", "capacity 100k"]
    assert len(figure.axes) == 14 and figure.axes[1].get_ylabel() == ""
    assert [axis.texts[0].get_text() for axis in figure.axes[1::2]] == [
        f"env {k}" for k in range(7)
    ]


def test_options_may_be_called_as_labels_call_them(tmp_path):
    found, _ = curves.cells(curves.load_rows([study(tmp_path, envs=("breakout",))]))
    assert dependence.key_of("members", found) == "ensemble.members"


def test_options_may_be_written_as_on_the_command_line(tmp_path):
    for layers in (0, 1):
        options = {"env.name": "breakout", "ensemble.shared_layers": layers}
        trained(tmp_path / str(layers), "minatar/bootdqn", options)
    assert {p.x for p in of(tmp_path, "--ensemble.shared-layers")} == {0, 1}


class Axis:
    """Keeps what is set on an axis of matplotlib."""

    def __init__(self):
        self.scale, self.ticks = "linear", []

    def set_xscale(self, scale):
        self.scale = scale

    def set_xticks(self, places, texts=()):
        self.ticks = [*zip(places, texts, strict=True)]

    def minorticks_off(self):
        pass

    def get_xticklabels(self):
        return []


def test_axes_are_logarithmic_where_values_are_far_apart_and_texts_are_categories():
    axis = Axis()
    score._scale(axis, [25_000, 100_000, 400_000])
    assert axis.scale == "log" and axis.ticks == [(25e3, "25k"), (1e5, "100k"), (4e5, "400k")]
    for values in ([2, 5, 10], [0, 1, 100], [-1, 1, 50]):
        axis = Axis()
        score._scale(axis, values)
        assert axis.scale == "linear" and [place for place, _ in axis.ticks] == values
    axis = Axis()
    assert score._scale(axis, ["fox", "gru"]).places == {"fox": 0.0, "gru": 1.0}
    assert axis.ticks == [(0.0, "fox"), (1.0, "gru")]
    # Texts of ticks that would overlap are left out, the ticks are not.
    axis = Axis()
    score._scale(axis, [0.1, 0.5, 0.501])
    assert [text != "" for _, text in axis.ticks] == [True, True, False]


def test_a_setting_has_one_colour_in_all_panels_and_forty_five_are_drawn_with_a_note(
    tmp_path, monkeypatch
):
    for env, n in itertools.product(("breakout", "asterix"), range(2, 47)):
        options = {"env.name": env, "ensemble.members": n}
        trained(tmp_path / "runs" / f"{env}-{n}", "minatar/bootdqn", options, level=n)
    drawn: dict[str, set] = {}

    def draw(panel, cell, own, scores, bands):
        drawn.setdefault(cell.name, set()).add(own)
        panel.plot([0, 1], [0, 1])
        return [], []

    monkeypatch.setattr(learning, "_draw", draw)
    text = io.StringIO()
    tables.main([tmp_path / "runs"], tmp_path / "out", console=Console(file=text, width=400))
    found, _ = curves.cells(curves.load_rows([tmp_path / "runs"]))
    assert drawn == {name: {own} for name, own in look.looks(found).items()} and len(drawn) == 45
    assert "45 settings share 32 colours with markers" in text.getvalue()
    assert len({own for [own] in drawn.values()}) == look.LOOKS == 32


def test_many_settings_have_a_row_of_curves_for_each_method_without_aggregates(tmp_path):
    folder = grid(tmp_path / "runs", members=(2, 5, 10, 20), single=[100_000])
    for n, c in itertools.product((5, 10), (25_000, 100_000)):
        # This method has no runs on the other game.
        options = {"env.name": "asterix", "ensemble.members": n, "replay.capacity": c}
        trained(folder / f"c-{n}-{c}", "minatar/cerl", options)
    found, _ = curves.cells(curves.load_rows([folder]))
    figure = learning.draw(found)
    assert learning.methods_apart(found) == ["cerl", "bootdqn", "ddqn"] and len(figure.axes) == 6
    assert [len(axis.lines) for axis in figure.axes] == [4, 0, 0, 8, 0, 1]
    assert [axis.axison for axis in figure.axes] == [True, False, False, True, False, True]
    assert figure.axes[0].get_title() == "minatar/asterix (2 seeds)"
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() != "."]
    assert {line.get_linestyle() for line in lines} == {"-"}
    # Lines with the same options have the same shade and marker in the panels of all methods.
    own = look.looks(found)
    cerl = [name for name in own if name.startswith("cerl")]
    assert len(cerl) == 4 and len(set(own.values())) == 13
    assert len({(one.shade, one.marker) for one in own.values()}) == 8
    for name in cerl:
        other = own[name.replace("cerl", "bootdqn")]
        assert (own[name].shade, own[name].marker) == (other.shade, other.marker)
    assert any("scores of aggregates are left out" in note for note in learning.notes(found))
    few = [cell for cell in found if cell.label.method != "bootdqn"]
    assert learning.methods_apart(few) == [] and learning.notes(few) == []
