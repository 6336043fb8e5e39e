"""Options with impossible numbers are refused with the option's name before a run begins."""

import math

import pytest
import torch

from cerl import training
from cerl.config import ConfigError, load
from cerl.device.pick import prepare

NOT_FINITE = [math.inf, -math.inf, math.nan]
FLOATS = {
    "catch/ddqn": [
        *("optim.lr", "optim.eps", "optim.clip_norm", "net.scale"),
        *("agent.huber_delta", "agent.mico_beta", "loss.gamma"),
        *("replay.reward_clip", "schedule.target_rate", "explore.start", "explore.end"),
        *("eval.epsilon", "ensemble.active_probability", "env.observe.noise", "env.sticky"),
    ],
    "minatar/young-tian": ["optim.momentum", "optim.decay"],
    "point_mass/sac": [
        "agent.temperature",
        *("agent.log_std_min", "agent.log_std_max", "agent.target_entropy", "agent.actor_lr"),
        *("agent.temperature_lr", "agent.spread_temperature"),
    ],
    "memory/fox": ["encoder.ratio", "encoder.prune"],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in FLOATS for key in FLOATS[name]])
def test_no_option_takes_what_is_not_finite(name, key):
    for value in NOT_FINITE:
        with pytest.raises(ConfigError, match=rf"{key}: expected .*, got -?(inf|nan)"):
            load(name, {key: value})


NONSENSE = [
    ("catch/ddqn", {"optim.lr": 1e30}, "optim.lr: expected less than or equal to 1000, got 1e"),
    ("catch/ddqn", {"optim.eps": 1e300}, "optim.eps: expected less than or equal to 1000"),
    ("catch/ddqn", {"optim.eps": 1e-50}, "optim.eps: expected greater than or equal to 1e-30"),
    ("catch/ddqn", {"net.scale": 1e-300}, "net.scale: expected greater than or equal to 1e-09"),
    ("catch/ddqn", {"optim.clip_norm": 1e300}, "optim.clip_norm: expected less"),
    ("point_mass/sac", {"agent.log_std_max": 1e5}, "agent.log_std_max: expected less"),
    ("point_mass/sac", {"agent.target_entropy": -1e9}, "agent.target_entropy: expected greater"),
    ("catch/ddqn", {"loss.n_step": 10**9}, "loss.n_step: expected less than or equal to 1000"),
    ("memory/fox", {"encoder.layers": 10**9}, "encoder.layers: expected less"),
    ("atari/ddqn", {"env.frame_skip": 10**9}, "env.frame_skip: expected less"),
    ("dmc/sac", {"env.repeat": 10**9}, "env.repeat: expected less"),
    (
        "catch/ddqn",
        {"schedule.steps": 2**63},
        r"schedule.steps: expected .* below 2\*\*63, got 9223",
    ),
    (
        "catch/ddqn",
        {"eval.slots": 100_000, "eval.episodes": 2},
        r"eval.slots: every environment plays .* at most eval.episodes \(2\), got 100000",
    ),
    (
        "catch/ddqn",
        {"eval.slots": 100, "eval.steps": 99},
        r"eval.slots: .* at most eval.steps \(99\), got 100",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), NONSENSE)
def test_numbers_without_sense_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load(name, options)


@pytest.mark.parametrize("key", ["threads", "env.threads"])
def test_threads_are_bounded_by_the_machine_that_runs_them(key, monkeypatch):
    config = load("atari/ddqn", {key: 4000, "device": "cpu"})  # of a larger machine it may be
    message = rf"^{key}: expected at most 64 on this machine of 2 cores, got 4000; 0 means one per"
    monkeypatch.setattr("cerl.device.pick.cores", lambda: 2)
    with pytest.raises(ValueError, match=message):
        prepare(config)
    monkeypatch.setattr("cerl.device.pick.cores", lambda: 1000)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert prepare(config).type == "cpu"


def test_compiling_on_a_cpu_is_said_to_have_no_effect(tmp_path, capsys):
    options = {"schedule.steps": 60, "replay.start": 60, "eval.episodes": 1, "seeds": (0,)}
    more = {"device": "cpu", "compile": True, "out": str(tmp_path)}
    training.train(load("catch/ddqn", {**options, **more}))
    said = " ".join(capsys.readouterr().out.split())
    assert "compile: without effect on a CPU" in said and "needs" in said and "free" in said
