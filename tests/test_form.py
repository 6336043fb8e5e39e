"""Options on the command line: those of the chosen kinds, and the errors for others."""

import dataclasses
import re
from pathlib import Path

import pytest

from cerl.config import ConfigError, QuantileConfig, SacConfig, errors, evaluated, load, validated
from cerl.config.form import form_of, overridden

ROOT = Path(__file__).resolve().parent.parent


def told(name, line):
    with pytest.raises(ConfigError) as caught:
        overridden(name, line.split(), prog="cerl train")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "line", "options"),
    [
        ("memory/fox", "--encoder.name gru", {"encoder": {"name": "gru"}}),
        ("memory/fox", "--encoder.name=gru --encoder.layers 2", {"encoder": {"name": "gru"}}),
        ("minatar/ddqn", "--optim.name rmsprop --optim.momentum 0.9", {"optim.name": "rmsprop"}),
        ("minatar/ddqn", "--agent.name quantile --agent.quantiles 9", {"agent.name": "quantile"}),
        (
            "minatar/ddqn",
            "--replay.sampler.name prioritised --replay.batch 16",
            {"replay.sampler.name": "prioritised", "replay.batch": 16},
        ),
        (
            "minatar/prioritised",
            "--replay.sampler.name=uniform",
            {"replay.sampler": {"name": "uniform"}},
        ),
    ],
)
def test_another_kind_has_its_own_options_from_their_defaults(name, line, options):
    extra = {
        "--encoder.layers": {"encoder.layers": 2},
        "--optim.momentum": {"optim.momentum": 0.9},
        "--agent.quantiles": {"agent.quantiles": 9},
    }
    options = dict(options)
    for flag, more in extra.items():
        options |= more if flag in line else {}
    assert overridden(name, line.split(), prog="x") == load(name, options)


def test_options_may_come_before_the_kind_that_has_them():
    line = "--agent.critics 3 --eval.policies individual --env.name Pendulum-v1 --agent.name sac"
    run = overridden("gym/cartpole", line.split(), prog="x")
    assert run.agent == SacConfig(critics=3)
    # The kind of the preset, named again, keeps what the preset says.
    same = overridden("minatar/qrdqn", ["--agent.name", "quantile"], prog="x")
    assert same.agent == QuantileConfig(quantiles=51, double=False)


def test_options_of_other_kinds_are_refused_with_the_kinds_that_have_them():
    assert told("minatar/ddqn", "--agent.critics 3") == (
        "--agent.critics: no such option; agent dqn has none, sac does"
    )
    assert "encoder gru has none, fox does" in told("memory/gru", "--encoder.variant llama")
    assert "agent sac has none, dqn and quantile do" in told(
        "minatar/ddqn", "--agent.name sac --agent.no-double"
    )
    assert "replay.sampler uniform has none, prioritised does" in told(
        "minatar/ddqn", "--replay.sampler.alpha 0.5"
    )
    assert "--env.walls: no such option; family catch has none, point_mass does" in told(
        "catch/ddqn", "--env.walls"
    )


def test_options_of_0_1_are_refused_with_their_new_names():
    assert told("minatar/ddqn", "--loss.double") == "--loss.double: moved to agent.double"
    assert told("minatar/ddqn", "--loss.no-double --net.stack 4 --agent sac").split("\n") == [
        "--loss.double: moved to agent.double",
        "--net.stack: moved to encoder.frames",
        "--agent: moved to agent.name",
    ]


def test_no_text_for_users_names_an_option_of_0_1():
    old = "|".join(re.escape(key) for key in errors.MOVED if "." in key)
    pattern = re.compile(rf"(?<![\w.])(?:{old})(?!\w)")
    texts = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").rglob("*.yaml"),
    ]
    assert len(texts) > 100
    for path in texts:
        found = pattern.findall(path.read_text().replace("-", "_"))
        assert not found, f"{path}: {found}"


def test_an_unknown_kind_names_the_nearest():
    text = told("memory/fox", "--encoder.name fxo")
    assert "encoder.name: expected frames, mlp, gru, transformer or fox, got 'fxo'" in text
    assert "did you mean fox?" in text


@pytest.mark.parametrize("name", ["mujoco/redq", "memory/transformer", "minatar/young-tian"])
def test_a_form_has_the_values_of_the_model(name):
    run = load(name)
    tree = dataclasses.asdict(form_of(run)[1])
    tree["env"]["family"] = run.env.family
    assert validated(tree, where=name) == run


def test_a_number_of_episodes_takes_the_place_of_a_budget():
    run = load("atari/paper-ddqn")
    asked = evaluated(run, {"episodes": 3, "policies": ("vote",)}).eval
    assert (asked.steps, asked.slots, asked.episodes, asked.policies) == (0, 0, 3, ("vote",))
    assert evaluated(run, {"epsilon": 0.1}).eval.steps == 125_000
    with pytest.raises(ConfigError, match="^eval of atari/paper-ddqn: eval.episodes: expected"):
        evaluated(run, {"episodes": 0})
