"""Levels of tasks that need memory: how long their episodes are, and levels that are refused."""

import pytest

from cerl.config import ConfigError, MemoryEnv, PopgymEnv, load, memory_tasks
from cerl.record import results


@pytest.mark.parametrize(
    ("game", "lengths"),
    [
        # By the package's code: cards - 1; 2 cards - 1; limits of its constructors.
        ("RepeatPrevious", (51, 103, 155)),
        ("RepeatFirst", (51, 415, 831)),
        ("CountRecall", (51, 103, 207)),
        ("Autoencode", (103, 207, 311)),
        ("PositionOnlyCartPole", (200, 400, 600)),
        ("VelocityOnlyCartPole", (200, 400, 600)),
        ("NoisyPositionOnlyCartPole", (200, 200, 200)),
        ("PositionOnlyPendulum", (200, 150, 100)),
        ("NoisyPositionOnlyPendulum", (200, 200, 200)),
        ("MultiarmedBandit", (200, 400, 600)),
        ("HigherLower", (51, 103, 155)),
        ("Concentration", (104, 208, 104)),
        ("MineSweeper", (14, 30, 54)),
        ("Battleship", (64, 100, 144)),
    ],
)
def test_longest_episodes_of_popgym(game, lengths):
    names = [game + level for level in ("Easy", "Medium", "Hard")]
    assert tuple(PopgymEnv(name=name).longest for name in names) == lengths
    assert tuple(MemoryEnv(name=name).longest for name in names) == lengths
    assert PopgymEnv(name=names[0], time_limit=7).longest == 7
    assert PopgymEnv(name=names[0], time_limit=9999).longest == lengths[0]


def test_longest_episodes_of_mazes():
    assert MemoryEnv(name="tmaze").longest == 51
    assert MemoryEnv(name="tmaze", length=200).longest == 201
    assert MemoryEnv(name="tmaze_active", length=200).longest == 203
    assert MemoryEnv(name="tmaze", length=200, time_limit=30).longest == 30
    assert load("memory/mlp", {"env.name": "RepeatPreviousEasy"}).env.longest == 51


def test_rows_tell_sizes_apart():
    def name(**options):
        return results.env_name(load("memory/mlp", {f"env.{k}": v for k, v in options.items()}))

    assert name() == "memory/tmaze-50" and name(length=200) == "memory/tmaze-200"
    assert name(name="tmaze_active", length=20) == "memory/tmaze_active-20"
    assert name(name="RepeatPreviousEasy") == "memory/RepeatPreviousEasy"
    assert name(name="RepeatPreviousEasy", k=8) == "memory/RepeatPreviousEasy-k8"
    noisy = name(name="NoisyPositionOnlyCartPoleEasy", noise=0.25)
    assert noisy == "memory/NoisyPositionOnlyCartPoleEasy-noise0.25"


def test_there_are_44_tasks_and_42_of_them_are_popgym_s():
    assert len(memory_tasks.POPGYM) == 42 and len(memory_tasks.TASKS) == 44


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "RepeatPreviousEazy"}, "called 'RepeatPreviousEazy'; did you mean RepeatPreviou"),
        ({"name": "VelocityOnlyCartpoleEasy"}, "did you mean VelocityOnlyCartPoleEasy"),
        ({"name": "RepeatFirstEasy", "k": 3}, "env.k: .* got 3 .it has decks"),
        ({"name": "MineSweeperEasy", "noise": 0.1}, "env.noise: MineSweeperEasy has no such"),
        ({"name": "RepeatPreviousEasy", "k": 52}, "env.k: expected less than the 52 cards.* 52"),
        ({"name": "RepeatPreviousEasy", "length": 9}, "it has decks and k"),
        ({"name": "tmaze", "decks": 2}, "env.decks: tmaze has no such option.*it has length"),
        ({"name": "tmaze", "length": 0}, "env.length: expected greater than or equal to 1, got 0"),
        ({"name": "RepeatPreviousEasy", "k": 0}, "env.k: expected greater than or equal to 1"),
        ({"time_limit": 0}, "env.time_limit: episodes of memory tasks have to end; expected at le"),
        ({"time_limit": -3}, "or none for the task's own limit, got -3"),
    ],
)
def test_names_and_options_that_do_not_fit_are_refused(options, message):
    changes = {f"env.{key}": value for key, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        load("memory/mlp", changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tmaze"}, "env.name: POPGym has no task 'tmaze'"),
        ({"name": "RepeatPreviosEasy"}, "'RepeatPreviosEasy'; did you mean RepeatPreviousEasy"),
        ({"time_limit": 0}, "episodes of memory tasks have to end"),
        ({"backend": "packge"}, "expected resident or package, got 'packge'; did you mean package"),
    ],
)
def test_names_and_options_of_popgym_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load("popgym/mlp", {f"env.{key}": value for key, value in options.items()})
