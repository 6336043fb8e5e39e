"""Study files: shipped ones and a user's own, and what the words of a sweep name."""

from pathlib import Path

import pytest

from cerl.config import ConfigError, load, preset
from cerl.sweep.cells import cells
from cerl.sweep.study import asked, is_study, load_study, stray, title

OLD = {
    "continuous": 3,
    "curse": 5,
    "curse-flicker": 4,
    "curse-memory": 4,
    "demo": 4,
    "flicker": 4,
    "gates": 13,
    "remember": 4,
    "remember-200": 4,
    "remember-500": 4,
    "remember-popgym": 4,
}

MINE = """\
# Does the size of the ensemble matter?
presets:
  - minatar/ddqn
  - preset: mine.yaml
    envs: [asterix]
    options: {loss.n_step: 3}
    grid: {ensemble.shared_layers: 0..1}
envs: minatar-5
seeds: 0..4
options: {schedule.steps: 20_000, log: {save_replay: false}}
grid: {ensemble.members: [2, 5]}
skip: contradictions
answers: whether the size matters
costs: nothing
cpu:
  envs: breakout
  options: {schedule.steps: 10_000}
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "question.yaml"
    path.write_text(MINE)
    (tmp_path / "mine.yaml").write_text("base: minatar/bootdqn\n")
    return str(path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("name", "least"), OLD.items())
def test_shipped_studies_keep_their_names_and_their_cells_are_valid(name, least, device):
    assert name in preset.studies()
    assert len(load_study(name, device).presets) >= least
    assert len(cells(load_study(name, device))) >= least


def test_studies_are_no_presets():
    assert not any(name.startswith("studies/") for name in preset.presets())
    assert not set(preset.studies()) & set(preset.presets())


def test_a_section_lies_over_the_keys_for_every_device(mine):
    study, small = load_study(mine, "cuda"), load_study(mine, "cpu")
    assert study.envs == ("minatar-5",) and small.envs == ("breakout",)
    assert study.seeds == small.seeds == (0, 1, 2, 3, 4)
    assert study.options == {"schedule.steps": 20_000, "log": {"save_replay": False}}
    assert small.options == {"schedule.steps": 10_000, "log": {"save_replay": False}}
    assert (study.skip, study.answers, study.costs) == (
        "contradictions",
        "whether the size matters",
        "nothing",
    )
    assert load_study("demo", "cpu").presets[0].preset == "catch/ddqn"
    assert load_study("demo", "cuda").presets[0].preset == "minatar/ddqn"


def test_presets_of_a_users_study_lie_beside_it(mine, tmp_path):
    first, second = load_study(mine, "cuda").presets
    assert (first.preset, first.envs, first.grid) == ("minatar/ddqn", (), {})
    assert second.preset == str(tmp_path / "mine.yaml")
    assert (second.envs, second.options) == (("asterix",), {"loss.n_step": 3})


def test_a_sweep_names_presets_studies_and_files(mine, tmp_path):
    file = str(tmp_path / "mine.yaml")
    assert is_study(mine) and not is_study(file) and not is_study("minatar/ddqn")
    found = asked(["minatar/ddqn", file, "demo", "minatar/cerl"], "cpu")
    assert [[part.preset for part in study.presets] for study in found] == [
        ["minatar/ddqn", file],
        ["catch/ddqn", "catch/bootdqn", "catch/cerl", "catch/tandem"],
        ["minatar/cerl"],
    ]
    assert title(["demo"]) == "demo" and title([mine]) == "question"
    assert title(["demo", "minatar/cerl"]) == title(["minatar/cerl"]) == "sweep"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("presets:", "preset:"), "presets: missing"),
        (("grid: {ensemble.members", "gird: {ensemble.members"), "gird: no such key; did you mean"),
        (("    options: {loss", "    optoins: {loss"), "presets: mine.yaml: optoins: no such key"),
        (("[2, 5]", "[2, five]"), "grid: ensemble.members: expected a whole number, got 'five'"),
        (("[2, 5]", "[]"), "grid: ensemble.members: expected values, got an empty list"),
        (("20_000", "20x"), "options: schedule.steps: expected a whole number, got '20x'"),
        (
            ("schedule.steps: 20", "schedule.step: 20"),
            "no such option; did you mean schedule.steps",
        ),
        (("{loss.n_step: 3}", "{sequence.layers: 3}"), "sequence.layers: moved to encoder.layers"),
        (("{loss.n_step: 3}", "{loss: {n_step: 0}}"), "loss.n_step: expected greater than"),
        (("minatar/ddqn", "minatar/ddqm"), "no preset 'minatar/ddqm'; did you mean minatar/ddqn"),
        (("seeds: 0..4", "seeds: [a]"), "seeds.0: expected a whole number"),
        (("skip: contradictions", "skip: all"), "skip: expected none or contradictions"),
        (("cpu:\n", "cpu: 3\nother:\n"), "cpu: expected `key: value` lines below it, got 3"),
        (
            ("{schedule.steps: 20_000", "{ensemble.members: 3"),
            "in options or in the grid, got both",
        ),
    ],
)
def test_mistakes_in_a_study_name_the_file_and_the_key(mine, change, message):
    assert change[0] in MINE
    Path(mine).write_text(MINE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_study(mine, "cuda")
    assert str(caught.value).startswith(mine) and message in str(caught.value)


def test_options_that_are_mappings_may_have_any_keys(tmp_path):
    path = tmp_path / "gravity.yaml"
    path.write_text("presets: gym/pendulum\noptions: {env.kwargs: {g: 9.8}, replay.start: 2k}\n")
    (cell,) = cells(load_study(str(path), "cpu"))
    assert cell.config == load("gym/pendulum", {"env.kwargs": {"g": 9.8}, "replay.start": 2000})


def test_a_study_without_presets_is_refused(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("presets: []\n")
    with pytest.raises(ConfigError, match="presets: expected at least one preset, got none"):
        load_study(str(path), "cpu")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ensemble.members=3", "did you mean --grid ensemble.members=3?"),
        (
            "minatar/cerl:ensemble.members=2,5",
            "did you mean minatar/cerl --grid minatar/cerl:ensemble.members=2,5?",
        ),
        ("ensemble.member=2,5", "did you mean --grid ensemble.members=2,5?"),
        ("ensemble.members", "--grid ensemble.members=VALUES for several?"),
        ("minatar-5", "did you mean --envs minatar-5?"),
        ("curs", "no preset or study 'curs'; did you mean curse?"),
        ("minatar/cert", "did you mean minatar/cerl"),
    ],
)
def test_stray_words_say_what_was_meant(word, message):
    assert message in stray(word)
    with pytest.raises(ConfigError) as caught:
        asked(["minatar/ddqn", word], "cpu")
    assert str(caught.value) == stray(word)


def test_a_sweep_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one preset"):
        asked([], "cpu")
