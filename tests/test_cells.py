"""The cells of studies: layers of options, single agents, doubles and contradictions."""

import time

import pytest

from cerl.config import ConfigError, load
from cerl.config.form import overridden
from cerl.sweep.cells import cells
from cerl.sweep.grid import read, zipped
from cerl.sweep.study import Part, Study, asked, load_study

MINATAR = ["asterix", "breakout", "freeway", "seaquest", "space_invaders"]


def study(*presets, **more):
    return Study.model_validate({"presets": list(presets)} | more)


def sentences(*arguments, **options):
    notes = []
    return cells(*arguments, **options, note=notes.append), notes


def test_the_baseline_stays_in_a_study_over_the_size_of_ensembles():
    words = ["ensemble.members=2,5,10", "replay.capacity=25k,100k,400k"]
    found, notes = sentences(
        asked(["minatar/ddqn", "minatar/bootdqn", "minatar/cerl"], "cpu"),
        words=["--seeds", "0", "1"],
        envs=["minatar-5"],
        grid=read(words),
    )
    assert len(found) == 5 * (3 + 9 + 9)
    assert [cell.config.env.name for cell in found[::21]] == MINATAR
    assert {cell.config.seeds for cell in found} == {(0, 1)}
    game = found[:21]
    assert [cell.config.preset for cell in game] == [
        *["minatar/ddqn"] * 3,
        *["minatar/bootdqn"] * 9,
        *["minatar/cerl"] * 9,
    ]
    assert game[1].varied == {"replay.capacity": 100_000}
    assert game[5].varied == {"ensemble.members": 2, "replay.capacity": 400_000}
    assert (game[5].config.ensemble.members, game[5].config.replay.capacity) == (2, 400_000)
    (note,) = notes
    assert note.startswith("minatar/ddqn has one member, so the axis ensemble.members leaves it")


def test_a_cell_is_what_train_makes_of_the_same_options():
    words = ["--optim.lr", "1e-3", "--loss.n_step", "3"]
    point = ["ensemble.members=4", "net.hidden=[32,32]"]
    (cell,) = cells(study("minatar/cerl"), words=words, envs=["asterix"], grid=read(point))
    options = ["--ensemble.members", "4", "--net.hidden", "32", "32", "--env.name", "asterix"]
    assert cell.config == overridden("minatar/cerl", [*words, *options], prog="x")
    assert cell.varied == {"ensemble.members": 4, "net.hidden": (32, 32)}


def test_layers_of_options_lie_over_each_other():
    one = study(
        {"preset": "minatar/bootdqn", "options": {"loss.gamma": 0.5, "loss.n_step": 2}},
        "minatar/cerl",
        options={"loss.gamma": 0.6, "replay.batch": 64, "optim.lr": 1e-3},
        seeds="3..4",
    )
    found = cells(one, words=["--optim.lr", "1e-4"], grid=read(["loss.n_step=5"]))
    got = [
        (c.config.loss.gamma, c.config.loss.n_step, c.config.replay.batch, c.config.optim.lr)
        for c in found
    ]
    assert got == [(0.5, 5, 64, 1e-4), (0.6, 5, 64, 1e-4)]
    assert found[0].config.seeds == (3, 4)
    assert cells(one, words=["--seeds", "9"])[0].config.seeds == (9,)


def test_an_axis_of_the_command_line_replaces_that_of_the_study():
    one = study(
        {"preset": "minatar/bootdqn", "grid": {"loss.n_step": [1, 2]}},
        "minatar/cerl",
        grid={"replay.batch": [16, 32], "loss.gamma": [0.9]},
    )
    grid = read(["replay.batch=64", "minatar/cerl:replay.batch=8,4", "optim.lr=1e-3"])
    found = [(c.config.preset, c.varied) for c in cells(one, grid=grid)]
    rest = {"loss.gamma": 0.9, "optim.lr": 1e-3}
    assert found == [
        ("minatar/bootdqn", {"loss.n_step": 1, "replay.batch": 64} | rest),
        ("minatar/bootdqn", {"loss.n_step": 2, "replay.batch": 64} | rest),
        ("minatar/cerl", {"replay.batch": 8} | rest),
        ("minatar/cerl", {"replay.batch": 4} | rest),
    ]


def test_one_value_of_the_command_line_replaces_an_axis_of_the_study():
    one = study("minatar/cerl", grid={"replay.batch": [16, 32], "loss.n_step": [1, 2]})
    found, notes = sentences(one, words=["--replay.batch", "8"])
    assert [c.varied for c in found] == [{"loss.n_step": 1}, {"loss.n_step": 2}]
    assert {c.config.replay.batch for c in found} == {8}
    assert notes == ["--replay.batch: one value for every run, in place of replay.batch=16,32"]


def test_an_option_of_a_preset_replaces_an_axis_of_the_study():
    own = {"preset": "minatar/bootdqn", "options": {"replay.batch": 8}}
    found = cells(study(own, "minatar/cerl", grid={"replay.batch": [16, 32]}))
    assert [c.config.replay.batch for c in found] == [8, 16, 32]


def test_a_zip_advances_together():
    grid = zipped(["replay.batch=16,32", "optim.lr=1e-3,1e-4"])
    found = cells(study("minatar/ddqn"), grid=grid)
    assert [(c.config.replay.batch, c.config.optim.lr) for c in found] == [(16, 1e-3), (32, 1e-4)]


def test_an_axis_named_for_a_single_agent_applies_to_it():
    grid = read(["minatar/ddqn:ensemble.members=1,3"])
    found = cells(study("minatar/ddqn", "minatar/cerl"), grid=grid)
    assert [c.varied for c in found] == [{"ensemble.members": 1}, {"ensemble.members": 3}, {}]
    own = {"preset": "minatar/ddqn", "grid": {"ensemble.members": [1, 3]}}
    assert len(cells(study(own))) == 2


def test_an_axis_that_leaves_every_preset_alone_is_refused():
    with pytest.raises(ConfigError, match="--grid minatar/ddqn:ensemble.members=2,5"):
        cells(study("minatar/ddqn"), grid=read(["ensemble.members=2,5"]))


def test_members_of_the_command_line_make_an_ensemble_of_a_single_agent():
    words = ["--ensemble.members", "3"]
    found = cells(study("minatar/ddqn"), words=words, grid=read(["ensemble.shared_layers=0,1"]))
    assert [c.config.ensemble.shared_layers for c in found] == [0, 1]


def test_cells_that_train_alike_are_one():
    own = {"preset": "minatar/ddqn", "grid": {"ensemble.members": [1, 10]}}
    # The two presets differ in their members and in the policies that they evaluate.
    one = study(own, "minatar/bootdqn", options={"eval.policies": ["individual", "vote"]})
    assert load("minatar/bootdqn").ensemble.members == 10
    found, notes = sentences(one)
    assert [(c.config.preset, c.varied) for c in found] == [
        ("minatar/ddqn", {"ensemble.members": 1}),
        ("minatar/ddqn", {"ensemble.members": 10}),
    ]
    (note,) = notes
    assert note == (
        "minatar/bootdqn on breakout trains like minatar/ddqn on breakout with "
        "ensemble.members=10, so the two are one cell"
    )


def test_a_double_keeps_the_longer_run_and_all_seeds():
    first = study("minatar/ddqn", options={"schedule.steps": 10_000}, seeds=[0, 1])
    (cell,) = cells([first, study("minatar/ddqn", options={"schedule.steps": 20_000}, seeds=1)])
    assert (cell.config.schedule.steps, cell.config.seeds) == (20_000, (0, 1))


def test_contradictory_cells_are_all_listed():
    grid = read(["ensemble.duty=uniform,tandem", "ensemble.members=2,3"])
    one = study("minatar/bootdqn", "minatar/cerl")
    with pytest.raises(ConfigError) as caught:
        cells(one, envs=["asterix", "breakout"], grid=grid)
    head, *lines, advice = str(caught.value).split("\n")
    assert head == "6 cells cannot be trained:"
    assert [line.partition(": ")[0] for line in lines] == [
        "minatar/bootdqn with ensemble.duty=tandem, ensemble.members=3",
        "minatar/cerl with ensemble.duty=tandem, ensemble.members=2",
        "minatar/cerl with ensemble.duty=tandem, ensemble.members=3",
    ]
    assert "expected 2 with duty tandem, got 3" in lines[0]
    assert "expected own with duty tandem, got cerl" in lines[1]
    assert all(line.endswith("(env.name asterix and 1 other tasks)") for line in lines)
    assert "skip: contradictions" in advice


def test_skip_leaves_contradictory_cells_out():
    axes = {"ensemble.duty": ["uniform", "tandem"], "ensemble.members": [2, 3]}
    found, notes = sentences(study("minatar/bootdqn", grid=axes, skip="contradictions"))
    assert [tuple(c.varied.values()) for c in found] == [
        ("uniform", 2),
        ("uniform", 3),
        ("tandem", 2),
    ]
    (note,) = notes
    assert note.startswith(
        "left out: minatar/bootdqn with ensemble.duty=tandem, ensemble.members=3"
    )


def test_a_study_of_which_every_cell_is_left_out_is_refused():
    one = study("minatar/cerl", grid={"encoder.layers": [1, 2]}, skip="contradictions")
    with pytest.raises(ConfigError, match="2 cells cannot be trained"):
        cells(one)


def test_options_of_some_kinds_only_make_the_other_cells_contradictory():
    grid = read(["encoder.name=gru,frames", "encoder.layers=1,2"])
    with pytest.raises(ConfigError, match="encoder frames has none") as caught:
        cells(study("memory/gru"), grid=grid)
    assert str(caught.value).startswith("2 cells")
    grid = read(["encoder.name=gru,fox", "encoder.layers=1,2"])
    words = ["--encoder.width", "32"]
    found = cells(study("memory/gru"), words=words, grid=grid)
    got = [(c.config.kinds["encoder"], c.varied["encoder.layers"]) for c in found]
    assert got == [("gru", 1), ("gru", 2), ("fox", 1), ("fox", 2)]


def test_an_option_that_a_point_makes_idle_is_noted_once_with_a_count():
    grid = read(["ensemble.duty=tandem,uniform", "loss.n_step=1,3,5"])
    tandem = load("minatar/tandem")
    assert tandem.ensemble.duty == "tandem"
    own = {"preset": "minatar/tandem", "options": {"ensemble.active_probability": 0.8}}
    found, notes = sentences(study(own), envs=["asterix", "breakout"], grid=grid)
    assert len(found) == 12
    (note,) = notes
    assert "ensemble.active_probability: 0.8 has no effect unless ensemble.duty is tandem" in note
    assert note.endswith("(in 6 of 12 cells)")


def test_environments_of_the_command_line_come_before_those_of_the_study():
    one = study(
        {"preset": "minatar/ddqn", "envs": "asterix"}, "minatar/cerl", envs=["breakout", "asterix"]
    )

    def pairs(**options):
        return [(c.config.env.name, c.config.preset) for c in cells(one, **options)]

    assert pairs() == [
        ("asterix", "minatar/ddqn"),
        ("asterix", "minatar/cerl"),
        ("breakout", "minatar/cerl"),
    ]
    freeway = [("freeway", "minatar/ddqn"), ("freeway", "minatar/cerl")]
    assert pairs(envs=["freeway"]) == pairs(words=["--env.name", "freeway"]) == freeway


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ensemble.members 2 5 10", "did you mean --grid ensemble.members=2,5,10?"),
        ("--ensemble.members=2,5", "did you mean --grid ensemble.members=2,5?"),
        ("--ensemble.members 2..5", "did you mean --grid ensemble.members=2..5?"),
        ("--encoder.name gru fox", "did you mean --grid encoder.name=gru,fox?"),
        ("--env.name breakout asterix", "did you mean --envs breakout asterix?"),
        ("--schedule.steps 1000 2000", "cerl report --until"),
        ("--sequence.layers 1", "moved to encoder.layers"),
        ("--loss.n_step 3", "expected --loss.n_step or an axis of --grid, got both"),
    ],
)
def test_words_that_were_meant_as_a_grid_are_refused(line, message):
    with pytest.raises(ConfigError) as caught:
        cells(study("minatar/cerl"), words=line.split(), grid=read(["loss.n_step=1,3"]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("envs", "grid", "message"),
    [
        (["curse"], [], "--envs: expected environments or lists of them, got 'curse'"),
        (["minatar/ddqn"], [], "cerl sweep minatar/ddqn"),
        (["pong"], [], "expected asterix, breakout"),
        ([], ["minatar/cert:loss.n_step=1"], "did you mean minatar/cerl"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(envs, grid, message):
    with pytest.raises(ConfigError) as caught:
        cells(study("minatar/cerl"), envs=envs, grid=read(grid))
    assert message in str(caught.value)


def test_an_option_has_one_axis_in_grid_and_zip_together():
    both = [*read(["loss.n_step=5,7"]), *zipped(["loss.n_step=1,3", "optim.lr=1e-3,1e-4"])]
    with pytest.raises(ConfigError, match="--grid and --zip: loss.n_step is given twice"):
        cells(study("minatar/cerl"), grid=both)


def test_environments_are_given_once():
    with pytest.raises(ConfigError, match="expected --envs or --env.name, got both"):
        cells(study("minatar/cerl"), words=["--env.name", "asterix"], envs=["breakout"])


def test_lists_of_values_stay_one_value_of_options_that_take_lists():
    (cell,) = cells(study("minatar/cerl"), words=["--net.hidden", "32", "32", "--seeds", "0", "1"])
    assert (cell.config.net.hidden, cell.config.seeds) == ((32, 32), (0, 1))


def test_studies_without_axes_are_their_presets():
    for device in ("cpu", "cuda"):
        demo = load_study("demo", device)
        seeds = {"seeds": demo.seeds} if demo.seeds else {}
        want = [load(part.preset, demo.options | part.options | seeds) for part in demo.presets]
        assert [cell.config for cell in cells(demo)] == want
    parts = [Part(preset=name) for name in ("catch/ddqn", "catch/cerl")]
    assert [cell.varied for cell in cells(Study(presets=tuple(parts)))] == [{}, {}]


def test_a_thousand_cells_take_seconds():
    grid = read(["ensemble.members=1..20", "loss.n_step=1..10"])
    start = time.perf_counter()
    found = cells(
        study("minatar/bootdqn"), words=["--optim.lr", "1e-3"], envs=["minatar-5"], grid=grid
    )
    assert len(found) == 1000
    assert time.perf_counter() - start < 15  # half a second on an idle core
