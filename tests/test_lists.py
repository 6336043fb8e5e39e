"""Named lists of environments: that every name in them can be built, and how they are asked for."""

import csv

import pytest

from cerl import envs
from cerl.config import ConfigError, control_tasks, load, memory_tasks, preset
from cerl.config.lists import expanded, lists
from cerl.envs.ale import check_known

PRESETS = {
    "atari": "atari/ddqn",
    "minatar": "minatar/ddqn",
    "mujoco": "mujoco/sac",
    "dmc": "dmc/sac",
    "popgym": "popgym/fox",
}


def refused(words, family):
    with pytest.raises(ConfigError) as caught:
        expanded(words, family=family)
    return str(caught.value)


@pytest.mark.parametrize("name", list(lists()))
def test_every_environment_of_a_list_can_be_built(name):
    """As far as its config and the installed packages tell; no simulator is started."""
    entry = lists()[name]
    assert entry.names and len(set(entry.names)) == len(entry.names)
    for env in entry.names:
        run = load(PRESETS[entry.family], {"env.name": env})
        assert run.env.family == entry.family
        envs.check_name(run.env)


@pytest.mark.parametrize("name", list(lists()))
def test_a_list_has_as_many_environments_as_its_name_says_and_a_source(name):
    entry, size = lists()[name], name.partition("-")[2]
    assert len(entry.names) == (int(size) if size.isdigit() else 12)
    assert entry.source.endswith(".") and "arXiv:" in entry.source
    assert name.startswith(entry.family)


def test_the_lists_of_atari_lie_in_one_another():
    scored = {row["game"] for row in csv.DictReader(_scores())}
    games = {name: set(entry.names) for name, entry in lists().items()}
    assert games["atari-55"] == scored - {"Defender", "Surround"}
    assert games["atari-5"] < games["atari-10"] < games["atari-55"]
    assert games["atari-26"] < games["atari-55"]
    for game in games["atari-55"]:
        check_known(game, sorted(scored))


def _scores():
    lines = (preset.FOLDER / "atari_human_random.csv").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_dmc_28_is_what_dm_control_calls_benchmarking():
    suite = pytest.importorskip("dm_control.suite")
    assert set(lists()["dmc-28"].names) == {"-".join(task) for task in suite.BENCHMARKING}


def test_levels_of_popgym_are_its_discrete_tasks():
    for level in ("easy", "medium", "hard"):
        discrete = [
            name
            for name, task in memory_tasks.POPGYM.items()
            if name.endswith(level.capitalize()) and memory_tasks.actions(task) == "discrete"
        ]
        assert set(lists()[f"popgym-{level}"].names) == set(discrete)


def test_a_list_stands_for_its_names_and_every_name_comes_once():
    assert expanded(["seaquest", "minatar-5", "asterix"], family="minatar") == [
        *("seaquest", "asterix", "breakout", "freeway", "space_invaders")
    ]
    assert len(expanded(["atari-5", "atari-10", "Pong"], family="atari")) == 11
    assert expanded([], family="atari") == []


def test_a_list_of_another_family_is_refused_with_those_of_the_preset():
    assert refused(["atari-5"], "minatar") == (
        "atari-5 is a list of environments of family atari, but the preset is of family minatar; "
        "expected lists of family minatar: minatar-5"
    )
    assert refused(["atari-5"], "gym").endswith("expected names of environments")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *(("minatar-6", "minatar-5"), ("minater-5", "minatar-5"), ("atari5", "atari-5")),
        *(("Atari-26", "atari-26"), ("atari_10", "atari-10"), ("popgym-esay", "popgym-easy")),
        *(("mujoco-9", "mujoco-"), ("dmc-27", "dmc-28"), ("atari-57", "atari-5")),
    ],
)
def test_a_misspelt_list_names_the_nearest(word, meant):
    text = refused(["Pong", word], "atari")
    assert f"no list of environments is called {word!r}; did you mean {meant}" in text


def test_names_of_environments_are_not_taken_for_lists():
    names = [*control_tasks.SUITE, *control_tasks.ROBOTS, *memory_tasks.TASKS]
    names += ["CartPole-v1", "FrozenLake8x8-v1", "minigrid:MiniGrid-Empty-5x5-v0", "my_game:rules"]
    names += [name for names in envs.available().values() for name in names if "pip" not in name]
    assert expanded(names, family="any") == list(dict.fromkeys(names))


def test_the_file_of_lists_is_no_preset_and_no_study():
    assert not any("lists" in name for name in (*preset.presets(), *preset.studies()))
