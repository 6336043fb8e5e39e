"""Axes of grids: read from words and study files, checked, multiplied."""

import pytest

from cerl.config import ConfigError
from cerl.sweep.grid import Axes, Axis, is_text, of_tree, points, read, zipped


def test_words_are_axes_with_values_of_the_options_type():
    groups = read(
        [
            "ensemble.members=2,5,10",
            "minatar/cerl:replay.capacity=25k,100k",
            "encoder.name=gru,fox",
            "net.hidden=[64,64],[128,128],32",
            "loss.gamma=0.9,1",
            "agent.double=true,false",
            "ensemble.shared-layers=0..2",
        ]
    )
    assert groups == [
        Axes("", (Axis("ensemble.members", (2, 5, 10)),)),
        Axes("minatar/cerl", (Axis("replay.capacity", (25_000, 100_000)),)),
        Axes("", (Axis("encoder.name", ("gru", "fox")),)),
        Axes("", (Axis("net.hidden", ((64, 64), (128, 128), (32,))),)),
        Axes("", (Axis("loss.gamma", (0.9, 1)),)),
        Axes("", (Axis("agent.double", (True, False)),)),
        Axes("", (Axis("ensemble.shared_layers", (0, 1, 2)),)),
    ]


def test_texts_are_not_read_as_numbers():
    assert is_text("env.backend") and is_text("ensemble.heads") and not is_text("loss.gamma")
    with pytest.raises(ConfigError, match="got '1k'"):
        read(["env.backend=1k"])
    (group,) = read(["agent.critic_norm=none,layer"])
    assert group.axes[0].values == ("none", "layer")


def test_points_are_a_product_with_the_last_axis_fastest():
    groups = [*read(["loss.n_step=1,3"]), *zipped(["replay.batch=32,64", "optim.lr=1e-3,1e-4"])]
    assert points(groups) == [
        {"loss.n_step": 1, "replay.batch": 32, "optim.lr": 1e-3},
        {"loss.n_step": 1, "replay.batch": 64, "optim.lr": 1e-4},
        {"loss.n_step": 3, "replay.batch": 32, "optim.lr": 1e-3},
        {"loss.n_step": 3, "replay.batch": 64, "optim.lr": 1e-4},
    ]
    assert points([]) == [{}]


def test_zip_has_a_group_for_each_preset():
    words = ["loss.n_step=1,1", "minatar/cerl:loss.gamma=0.9,0.8", "optim.lr=1e-3,1e-4"]
    groups = zipped([*words, "minatar/cerl:replay.batch=32,64"])
    assert [(group.preset, [axis.option for axis in group.axes]) for group in groups] == [
        ("", ["loss.n_step", "optim.lr"]),
        ("minatar/cerl", ["loss.gamma", "replay.batch"]),
    ]


def test_study_files_state_values_as_lists_or_texts():
    groups = of_tree(
        {
            "ensemble.members": "2,5",
            "replay": {"capacity": ["25k", 50_000]},
            "loss.n_step": 3,
            "encoder.name": ["gru", "fox"],
            "net.hidden": [[64, 64], 32],
        },
        {"optim.lr": [1e-3, 1e-4], "loss.gamma": [0.9, 0.99]},
        where="my.yaml",
        name="minatar/cerl",
    )
    assert [group.preset for group in groups] == ["minatar/cerl"] * 6
    assert [group.axes[0].values for group in groups[:-1]] == [
        (2, 5),
        (25_000, 50_000),
        (3,),
        ("gru", "fox"),
        ((64, 64), (32,)),
    ]
    assert [axis.option for axis in groups[-1].axes] == ["optim.lr", "loss.gamma"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ensemble.member=2", "no option 'ensemble.member'; did you mean ensemble.members"),
        ("ensemble.members=", "--grid ensemble.members=: expected"),
        ("loss.gamma=0.9,,1", "--grid loss.gamma=0.9,,1: expected"),
        ("encoder.name=gru,,fox", "expected values separated by commas"),
        ("ensemble.members=2,two", "expected a whole number, got 'two'"),
        ("ensemble.members=2.5", "expected a whole number, got 2.5"),
        ("ensemble.members=0", "greater than or equal to 1, got 0"),
        ("net.hidden=[64,x]", "item 1: expected a whole number, got 'x'"),
        ("encoder.name=gri", "expected frames, mlp, gru, transformer or fox, got 'gri'; did you"),
        ("ensemble.duty=tandm", "got 'tandm'; did you mean tandem"),
        ("ensemble.members=2,2", "the value 2 is given 2 times"),
        ("encoder=gru,fox", "did you mean encoder.name?"),
        ("net=3", "net is a group of options; expected one of them: net.channels"),
        ("sequence.layers=1,2", "moved to encoder.layers"),
        ("seeds=0..4", "expected --seeds"),
        ("schedule.steps=1k,2k", "cerl report --until"),
        ("log.every=1k,2k", "log.every has no influence on scores"),
        ("device=cpu,cuda", "device has no influence on scores"),
        ("env.name=breakout,asterix", "environments are chosen by --envs"),
        ("preset=a,b", "name several presets"),
        ("minatar/ddqn", "cerl sweep minatar/ddqn --grid OPTION=VALUES"),
        ("curse", "got a preset or study"),
        ("members", "expected OPTION=VALUES"),
        ("=1,2", "expected OPTION=VALUES"),
        ("ensemble=1,2", "ensemble is a group of options; expected one of them: ensemble.members"),
    ],
)
def test_mistakes_in_a_grid_say_what_was_meant(word, message):
    with pytest.raises(ConfigError) as caught:
        read([word])
    assert message in str(caught.value) and word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.n_step=1,3"], "expected two or more options"),
        (["loss.n_step=1,3", "optim.lr=1"], "loss.n_step has 2, optim.lr has 1"),
        (["loss.n_step=1,3", "loss.n_step=1,3"], "loss.n_step is given twice"),
    ],
)
def test_zip_refuses_axes_that_cannot_advance_together(words, message):
    with pytest.raises(ConfigError, match="--zip: .*" + message):
        zipped(words)


def test_an_option_has_one_axis_for_each_preset():
    with pytest.raises(ConfigError, match="loss.gamma is given twice"):
        read(["loss.gamma=0.9", "loss.n_step=1", "loss.gamma=0.8"])
    assert len(read(["loss.gamma=0.9", "minatar/cerl:loss.gamma=0.8"])) == 2


def test_empty_lists_of_a_file_are_refused():
    with pytest.raises(ConfigError, match=r"my.yaml: grid: loss.gamma: .*empty list"):
        of_tree({"loss.gamma": []}, {}, where="my.yaml")
