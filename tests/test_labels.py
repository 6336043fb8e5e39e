"""Names of settings: what differs is in the name, and nothing else."""

import itertools

import pytest

from cerl.config import labels, load
from cerl.config.labels import Label, Setting, labelled
from cerl.record import results


def setting(preset: str, **options) -> Setting:
    """A setting of a shipped preset. Args: options, with `__` for the dots of their keys."""
    config = load(preset, {key.replace("__", "."): value for key, value in options.items()})
    return Setting(preset, results.env_name(config), results.scoring(config))


def texts(*settings: Setting) -> list[str]:
    return [label.text for label in labelled(settings)]


def test_options_that_differ_are_the_name_and_defaults_are_said_too():
    assert texts(
        setting("minatar/ddqn"),
        setting("minatar/bootdqn", ensemble__members=1, replay__capacity=100_000),
        setting("minatar/bootdqn", ensemble__members=5, replay__capacity=400_000),
    ) == ["ddqn", "bootdqn, members 1, capacity 100k", "bootdqn, members 5, capacity 400k"]
    assert texts(setting("minatar/ddqn"), setting("minatar/bootdqn")) == ["ddqn", "bootdqn"]


def test_a_setting_has_one_name_in_all_environments():
    # Only Breakout has two sizes; the name of the size that Asterix has is the same there.
    own = [
        setting("minatar/bootdqn", env__name="breakout", ensemble__members=5),
        setting("minatar/bootdqn", env__name="breakout", ensemble__members=10),
        setting("minatar/bootdqn", env__name="asterix", ensemble__members=10),
    ]
    assert texts(*own) == ["bootdqn, members 5", "bootdqn, members 10", "bootdqn, members 10"]
    # Each size on a game of its own: different settings all the same.
    assert texts(own[0], own[2]) == ["bootdqn, members 5", "bootdqn, members 10"]


def test_options_that_follow_from_the_environment_split_no_line():
    own = [
        setting("atari/paper-ddqn", env__name="Pong", env__time_limit=100, eval__time_limit=200),
        setting("atari/paper-ddqn", env__name="Breakout", env__full_actions=True),
    ]
    assert texts(*own) == ["paper-ddqn", "paper-ddqn"]
    # Within one environment they are settings like any other.
    other = setting("atari/paper-ddqn", env__name="Pong", env__sticky=0.25)
    [label, _] = labelled([own[0], other])
    assert label.options == {"env.sticky": 0.0, "env.time_limit": 100, "eval.time_limit": 200}
    assert label.text.endswith("env time limit 100, eval time limit 200")


def test_families_are_said_where_presets_would_be_called_the_same():
    own = [setting("minatar/ddqn"), setting("catch/ddqn"), setting("catch/bootdqn")]
    assert texts(*own) == ["minatar/ddqn", "catch/ddqn", "bootdqn"]


def test_settings_of_unknown_options_are_called_by_their_preset():
    old = Setting("minatar/ddqn", "minatar/breakout", None)
    assert texts(old, setting("minatar/bootdqn")) == ["minatar/ddqn", "minatar/bootdqn"]
    new = [setting("minatar/ddqn", replay__capacity=size) for size in (50_000, 200_000)]
    assert texts(old, *new) == [
        "minatar/ddqn",
        "minatar/ddqn, capacity 50k",
        "minatar/ddqn, capacity 200k",
    ]


def test_options_of_one_kind_are_compared_within_that_kind_only():
    size = {"encoder__name": "gru", "encoder__width": 32, "encoder__layers": 2}
    gru = [setting("memory/gru", **size, encoder__cache_refresh=c) for c in (0, 8)]
    mlp = setting("memory/gru", encoder__name="mlp", encoder__width=128)
    assert texts(*gru, mlp) == [
        "gru, encoder gru, cache refresh 0",
        "gru, encoder gru, cache refresh 8",
        "gru, encoder mlp",
    ]


def test_an_option_that_several_kinds_state_is_compared_between_them():
    own = [
        setting("minatar/ddqn", optim__name=name, optim__lr=lr)
        for name, lr in (("adam", 1e-3), ("rmsprop", 2e-3))
    ]
    assert texts(*own) == ["ddqn, optim adam, lr 0.001", "ddqn, optim rmsprop, lr 0.002"]


def test_short_names_have_more_parts_where_two_would_be_equal():
    assert labels.short_names(["ensemble.shared_layers", "encoder.layers"]) == {
        "ensemble.shared_layers": "shared layers",
        "encoder.layers": "layers",
    }
    assert labels.short_names(["encoder.name", "eval.time_limit", "env.time_limit"]) == {
        "encoder.name": "encoder",
        "eval.time_limit": "eval time limit",
        "env.time_limit": "env time limit",
    }
    assert labels.short_names(["replay.sampler.name"]) == {"replay.sampler.name": "sampler"}


def test_a_default_that_stands_for_another_number_is_said_as_that_number():
    lr = load("mujoco/sac").optim.lr
    own = [setting("mujoco/sac", agent__actor_lr=value) for value in (1e-5, lr)]
    assert labelled(own)[1].options == {"agent.actor_lr": lr}


def test_legends_list_methods_and_then_values_as_numbers():
    found = [
        Label(method, {"ensemble.members": n, "encoder.name": kind})
        for method, n, kind in itertools.product(("b", "a"), (10, 2, 5), ("gru", "fox"))
    ]
    wanted = [
        f"{method}, members {n}, encoder {kind}"
        for method, n, kind in itertools.product(("b", "a"), (2, 5, 10), ("fox", "gru"))
    ]
    assert labels.ranked([*found, *found]) == wanted


def test_the_label_of_all_other_options():
    label = Label("cerl", {"ensemble.members": 5, "replay.capacity": 25_000})
    assert label.without("ensemble.members").text == "cerl, capacity 25k"


@pytest.mark.parametrize("text", ["\x1b[31m", "\n"])
def test_names_have_no_control_characters(text):
    own = [Setting("catch/ddqn", "gym/x", {"env.name": f"a{text}{k}"}) for k in range(2)]
    assert all(name.isprintable() for name in texts(*own))


def test_every_option_that_two_presets_differ_in_is_found():
    own = [setting("minatar/ddqn").options, setting("minatar/bootdqn").options]
    assert labels.differing([options for options in own if options is not None]) == [
        "ensemble.members",
        "eval.policies",
    ]
    assert labels.value_of({"encoder.name": "gru"}, "encoder.layers") == 1
    assert not labels.exists({}, "encoder.layers") and not labels.exists({}, "no.such")
