"""Options without effect are refused, and runs that train alike have the same hash."""

import pytest

from cerl.config import (
    Config,
    ConfigError,
    GruConfig,
    PrioritisedConfig,
    SacConfig,
    load,
    of_kind,
    preset,
)
from cerl.config.contradictions import contradictions
from cerl.config.effects import EFFECTS, SAME, differences, section_of
from cerl.config.errors import unions
from cerl.config.form import overridden
from cerl.config.model import Model
from cerl.record.results import config_hash

PIXELS = {
    **{"env.backend": "dm_control", "env.pixels": True, "net.channels": (8,)},
    **{"net.kernels": (3,), "net.strides": (2,)},
}
# preset, option, a value that means nothing, and changes that give it a meaning
IDLE = [
    ("catch/bootdqn", "ensemble.active_probability", 0.5, None),
    ("catch/tandem", "ensemble.active_probability", 0.5, {}),
    ("catch/cerl", "ensemble.horizons", 3, {"ensemble.heads": "multi_horizon"}),
    ("minatar/bootdqn", "ensemble.fork", "both", {"ensemble.heads": "cerl"}),
    ("catch/bootdqn", "agent.gradient_scale", False, {"ensemble.shared_layers": 1}),
    ("catch/bootdqn", "agent.gradient_scale", False, {"ensemble.heads": "cerl"}),
    ("minatar/bootdqn", "agent.mico_beta", 0.3, {"agent.mico_weight": 0.1}),
    ("minatar/qrdqn", "agent.mico_beta", 0.3, {"agent.mico_weight": 0.1}),
    ("catch/ddqn", "agent.huber_delta", 2.0, {"agent.loss": "huber"}),
    ("minatar/qrdqn", "agent.huber_delta", 2.0, {}),
    ("point_mass/ensemble", "agent.huber_delta", 2.0, {"agent.loss": "mse_huber"}),
    ("catch/ddqn", "net.padding", "same", {k: v for k, v in PIXELS.items() if k[:3] == "net"}),
    (
        "catch/bootdqn",
        "loss.batches_probability",
        0.5,
        {"loss.batches": "own", "replay.candidates": 128},
    ),
    ("memory/fox", "schedule.target_every", 7, {"schedule.target_rate": 1.0}),
    ("point_mass/sac", "schedule.target_every", 7, {"schedule.target_rate": 1.0}),
    ("atari/paper-ddqn", "eval.episodes", 3, {"eval.slots": 0}),
    ("atari/paper-ddqn", "eval.episodes", 3, {"eval.steps": 0}),
    ("popgym/fox", "env.diverged", "cut", {"env.backend": "package"}),
    ("memory/fox", "encoder.gate_scales", (2.0, 9.0), {}),
    ("memory/fox", "encoder.prune", -5.0, {}),
    ("popgym/fox", "encoder.rule", "running", {}),
    ("dmc/sac", "env.threads", 2, {}),
    ("dmc/sac", "env.size", 64, PIXELS),
    ("dmc/sac", "env.camera", 1, PIXELS),
]
# What makes an option of `IDLE` idle, where the preset alone does not.
MAKES_IDLE = {
    ("catch/ddqn", "agent.huber_delta"): {"agent.loss": "mse"},
    ("catch/tandem", "ensemble.active_probability"): {"ensemble.duty": "uniform"},
    ("memory/fox", "encoder.gate_scales"): {"encoder.gate": "none"},
    ("memory/fox", "encoder.prune"): {"encoder.gate": "none"},
    ("popgym/fox", "encoder.rule"): {"encoder.prune": 0.0},
    ("dmc/sac", "env.threads"): {"env.backend": "dm_control"},
}


@pytest.mark.parametrize(("name", "option", "value", "meaning"), IDLE)
def test_an_option_without_effect_cannot_be_written(name, option, value, meaning):
    idle = {option: value, **MAKES_IDLE.get((name, option), {})}
    if (name, option) not in MAKES_IDLE and meaning == {}:
        assert load(name, idle)  # it has an effect with this preset
        return
    section, last = section_of(load(name), option)
    default = type(section).model_fields[last].default
    with pytest.raises(ConfigError) as caught:
        load(name, idle)
    text = str(caught.value)
    assert f"{option}: has no effect unless " in text
    assert f"; expected its default, {_yaml(default)}, got {_yaml(value)}" in text
    if meaning is not None:
        assert load(name, {option: value, **meaning})
    # At its default it is no part of what the run says.
    assert option not in differences(load(name, MAKES_IDLE.get((name, option), {})))


# preset, changes, the option that they make idle, and the default that it returns to
RETURNS = [
    ("mujoco/cerl", {"agent.loss": "mse"}, "agent.huber_delta", 10.0, 1.0),
    ("minatar/cerl-both", {"ensemble.heads": "own"}, "ensemble.fork", "both", "final"),
    ("catch/tandem", {"ensemble.duty": "first"}, "ensemble.active_probability", None, 0.9),
    ("minatar/mico", {"agent.mico_weight": 0.0}, "agent.mico_beta", None, 0.1),
    ("minatar/own-batches", {"loss.batches": "shared"}, "loss.batches_probability", None, 1.0),
]


@pytest.mark.parametrize(("name", "changes", "option", "value", "default"), RETURNS)
def test_what_only_the_preset_states_returns_to_its_default(name, changes, option, value, default):
    notes, told = [], []
    run = load(name, changes, note=notes.append)
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    assert overridden(name, words, prog="x", note=told.append) == run
    section, last = section_of(run, option)
    assert getattr(section, last) == default
    assert notes == told
    if value is None:  # the preset has the default, so there is nothing to tell
        assert notes == []
    else:
        assert len(notes) == 1
        assert notes[0].startswith(f"{name}: {option}: {value} has no effect unless ")
        assert notes[0].endswith(f"; this run has the default, {default}")


@pytest.mark.parametrize(("name", "changes", "option", "value", "default"), RETURNS)
def test_what_the_user_states_is_refused_even_if_the_preset_states_it_too(
    name, changes, option, value, default
):
    notes = []
    stated = {**changes, option: value or (default + 0.05 if default < 0.9 else 0.7)}
    words = [word for key, value in stated.items() for word in (f"--{key}", str(value))]
    with pytest.raises(ConfigError, match=f"{option}: has no effect unless"):
        load(name, stated, note=notes.append)
    with pytest.raises(ConfigError, match=f"{option}: has no effect unless"):
        overridden(name, words, prog="x", note=notes.append)
    assert notes == []


def test_a_file_makes_options_of_its_base_idle_but_not_its_own(tmp_path):
    def written(name, text):
        (tmp_path / f"{name}.yaml").write_text(text)
        return str(tmp_path / f"{name}.yaml")

    top = written("top", "base: mujoco/cerl\nagent: {loss: mse}\n")
    assert of_kind(load(top).agent, SacConfig).huber_delta == 1.0
    # The layers above start from the default, as the options of `top` show.
    above = written("above", "base: top.yaml\nagent: {loss: mse_huber}\n")
    assert of_kind(load(above).agent, SacConfig).huber_delta == 1.0
    own = written("own", "base: mujoco/cerl\nagent: {loss: mse, huber_delta: 10.0}\n")
    # What a file says against itself stays refused under changes that have nothing to do with it.
    for name in (own, written("other", "base: own.yaml\nseeds: [1]\n")):
        for changes in ({}, {"schedule.steps": 7}):
            with pytest.raises(ConfigError, match="agent.huber_delta: has no effect unless"):
                load(name, changes)
    assert load(own, {"agent.loss": "mse_huber"}) != load(above)


def test_what_a_study_makes_idle_returns_to_its_default():
    run = overridden("minatar/cerl-both", [], prog="x", changes={"ensemble.heads": "own"})
    assert run == load("minatar/cerl-both", {"ensemble.heads": "own", "ensemble.fork": "final"})


def _yaml(value):
    if isinstance(value, tuple):
        return str([*value])
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_every_entry_of_the_table_is_tested_and_is_an_option():
    assert {effect.option for effect in EFFECTS} == {option for _, option, _, _ in IDLE}
    for option in [effect.option for effect in EFFECTS] + [same.option for same in SAME]:
        assert any(section_of(load(name), option)[0] for name in ("catch/ddqn", *_presets())), (
            option
        )


def _presets():
    return [name for name, _, _, _ in IDLE]


@pytest.mark.slow
def test_no_preset_says_what_has_no_effect():
    for name in preset.presets():
        assert list(contradictions(load(name))) == []


FOREIGN = [
    ("minatar/ddqn", "agent.temperature", 0.5, "agent dqn has none, sac does"),
    ("minatar/ddqn", "agent.log_std_min", -3, "agent dqn has none, sac does"),
    ("minatar/ddqn", "agent.quantiles", 7, "agent dqn has none, quantile does"),
    ("minatar/ddqn", "agent.policy_every", 7, "agent dqn has none, sac does"),
    ("minatar/ddqn", "encoder.layers", 4, "encoder frames has none, mlp, gru, transformer and fox"),
    ("minatar/ddqn", "optim.momentum", 0.5, "optim adam has none, rmsprop does"),
    ("minatar/young-tian", "optim.beta1", 0.5, "optim rmsprop has none, adam does"),
    ("memory/gru", "encoder.variant", "llama", "encoder gru has none, fox does"),
    ("memory/gru", "encoder.prune", -5.0, "encoder gru has none, fox does"),
    ("memory/gru", "encoder.rotary", True, "encoder gru has none, fox does"),
    ("memory/transformer", "encoder.gate", "none", "encoder transformer has none, fox does"),
    ("memory/fox", "encoder.attention", "torch", "encoder fox has none, transformer does"),
    ("memory/gru", "encoder.heads", 4, "encoder gru has none, transformer and fox do"),
    ("memory/gru", "encoder.cache", 4, "encoder gru has none, transformer and fox do"),
    ("memory/gru", "encoder.context_grad", False, "encoder gru has none, transformer and fox do"),
    ("memory/mlp", "encoder.cache_refresh", 4, "encoder mlp has none, gru, transformer and fox do"),
    ("memory/fox", "encoder.stored_state", True, "encoder fox has none, gru does"),
    ("memory/fox", "encoder.frames", 2, "encoder fox has none, frames does"),
    (
        "memory/fox",
        "encoder.sized_like",
        "pro",
        "encoder fox has none, mlp, gru and transformer do",
    ),
    ("mujoco/sac", "agent.double", False, "agent sac has none, dqn and quantile do"),
    ("mujoco/sac", "agent.feature_norm", True, "agent sac has none, dqn and quantile do"),
    ("mujoco/sac", "agent.mico_weight", 0.1, "agent sac has none, dqn and quantile do"),
    ("minatar/qrdqn", "agent.loss", "mse", "agent quantile has none, dqn and sac do"),
    (
        "minatar/ddqn",
        "replay.sampler.alpha",
        0.5,
        "replay.sampler uniform has none, prioritised does",
    ),
]


@pytest.mark.parametrize(("name", "option", "value", "message"), FOREIGN)
def test_an_option_of_another_kind_does_not_exist(name, option, value, message):
    with pytest.raises(ConfigError) as caught:
        load(name, {option: value})
    assert f"{option}: no such key; {message}" in str(caught.value)


ODD = [
    ("catch/cerl", {"loss.batches": "own"}, "have to learn from the same batch"),
    (
        "catch/bootdqn",
        {"ensemble.heads": "mean", "loss.batches": "independent"},
        "heads mean",
    ),
    (
        "minatar/prioritised",
        {"ensemble.members": 2, "loss.batches": "own", "replay.candidates": 64},
        "prioritised draws rows whoever owns them",
    ),
    ("memory/fox", {"replay.sampler.name": "prioritised"}, "prioritised draws rows, not episodes"),
    ("minatar/prioritised", {"replay.capacity": 2**25}, "at most 16,777,216 rows"),
    (
        "minatar/prioritised",
        {"replay.sampler.name": "none"},
        "expected uniform, prioritised or own",
    ),
    ("minatar/prioritised", {"replay.sampler.beta": 2}, "replay.sampler.beta: expected less than"),
    ("minatar/cerl", {"agent.name": "sac"}, "minatar takes discrete ones"),
    ("point_mass/sac", {"agent.spread_temperature": 1.0}, "2 or more members"),
    ("point_mass/sac", {"ensemble.fork": "both"}, "heads fork at the output"),
    ("memory/gru", {"encoder.width": 512}, "at most 256 features"),
    ("memory/fox", {"encoder.learnt": 5}, "only the first rows of an episode are learnt"),
    ("memory/fox", {"agent.mico_weight": 0.1}, "expected 0 with encoder fox"),
    ("gym/cartpole", {"encoder.name": "gru"}, "encoder.learnt: 0 means the longest episode"),
    ("gym/cartpole", {"explore.end": None}, "agent steps of the longest episode"),
    ("mujoco/sac", {"net.channels": (8,), "net.kernels": (3,), "net.strides": (1,)}, "not images"),
    ("catch/tandem", {"ensemble.members": 3}, "expected 2 with duty tandem"),
    ("catch/cerl", {"ensemble.heads": "single_actor"}, "expected first, got uniform"),
]


@pytest.mark.parametrize(("name", "changes", "message"), ODD)
def test_sections_that_contradict_each_other_are_told(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(name, changes)


def test_another_kind_starts_from_its_own_defaults():
    gru = load("memory/fox", {"encoder": {"name": "gru", "learnt": 60, "sampling": "uniform"}})
    assert gru.encoder == GruConfig(learnt=60, sampling="uniform")
    # In whatever order the keys are given.
    agent = {"agent.critics": 3, "agent.name": "sac", "eval.policies": ["individual"]}
    found = load("gym/cartpole", {**agent, "env.name": "Pendulum-v1"})
    assert found.agent == SacConfig(critics=3)
    prioritised = {"replay.sampler.name": "prioritised", "replay.sampler.beta": 0.7}
    assert load("catch/ddqn", prioritised).replay.sampler == PrioritisedConfig(beta=0.7)
    uniform = load("minatar/prioritised", {"replay.sampler.name": "uniform"})
    assert uniform.replay == load("minatar/ddqn").replay
    # The same kind, stated again, changes nothing.
    assert load("memory/fox", {"encoder.name": "fox"}) == load("memory/fox")
    assert load("catch/ddqn", {"agent.name": "dqn"}) == load("catch/ddqn")


def test_a_file_that_changes_the_kind_drops_what_its_base_says_of_the_section(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "base: memory/fox\nencoder: {name: transformer, learnt: 60}\nagent: {double: false}\n"
    )
    run = load(str(tmp_path / "a.yaml"))
    assert run.encoder.name == "transformer" and not run.encoder.from_episode_start
    assert run.agent.model_dump() == load("memory/fox").agent.model_dump() | {"double": False}


def test_unions_are_those_of_the_merging_of_files():
    plain = load("catch/ddqn")
    for section, (key, default) in preset.UNIONS.items():
        above, name = section_of(plain, section)
        field = type(above).model_fields[name]
        assert field.discriminator == key
        assert getattr(field.default, key) == default or section == "env"
    assert set(unions(Config)) == set(preset.UNIONS) == set(plain.kinds)


# Hashes of result rows. They may change only where training does.
HASHES = {
    "catch/ddqn": "6e438efece8d",
    "minatar/cerl": "9f12620722f7",
    "memory/fox": "92349532e3bc",
    "mujoco/redq": "7b2c415e83e3",
}


def test_pruning_is_another_run_where_it_can_skip_blocks():
    for option in ({"encoder.prune": 0.0}, {"encoder.rule": "running"}):
        assert config_hash(load("memory/fox", {"env.length": 500, **option})) != config_hash(
            load("memory/fox", {"env.length": 500})
        )


@pytest.mark.parametrize("name", HASHES)
def test_hashes_of_presets_stay(name):
    assert config_hash(load(name)) == HASHES[name]


def test_a_new_option_changes_no_hash():
    class Newer(Config):
        option: int = 3
        section: Model = SacConfig()

    for name in HASHES:
        run = load(name)
        newer = Newer.model_validate(run.model_dump())
        assert config_hash(newer) == config_hash(run)
        assert config_hash(newer.model_copy(update={"option": 4})) != config_hash(run)


SAME_BITS = [
    ("memory/fox", {"explore.end": 1 / 51}),
    ("memory/fox", {"encoder.learnt": 51}),
    ("memory/fox", {"env.length": 50}),
    ("memory/fox", {"encoder.cache": 1 + 51 + 1}),
    ("memory/fox", {"encoder.key_heads": 2}),
    ("memory/fox", {"encoder.prune": 0.0}),  # windows of 53 rows are one block
    ("memory/fox", {"encoder.rule": "running"}),
    ("catch/ddqn", {"eval.slots": 20}),
    ("point_mass/sac", {"agent.actor_lr": 1e-3, "agent.temperature_lr": 1e-3}),
    ("catch/ddqn", {"seeds": [9], "schedule.steps": 50_000, "log.every": 9, "threads": 2}),
    ("catch/ddqn", {"device": "cuda", "out": "x", "preset": "y", "diverged": "cut"}),
    ("dmc/sac", {"env.threads": 3}),
    ("minatar/ddqn", {"env.ramping": False}),
]


@pytest.mark.parametrize(("name", "changes"), SAME_BITS)
def test_runs_that_train_alike_have_one_hash(name, changes):
    assert config_hash(load(name, changes)) == config_hash(load(name))


def test_a_decay_between_equal_numbers_is_no_difference():
    still = {"explore.start": 0.1, "explore.end": 0.1}
    a, b = (load("catch/ddqn", {**still, "explore.hold": hold}) for hold in (1, 2))
    assert config_hash(a) == config_hash(b)


DIFFERENT = [
    *({"agent.double": False}, {"agent.loss": "mse"}, {"optim.lr": 2e-3}, {"env.rows": 9}),
    *(
        {"optim.name": "rmsprop"},
        {"eval.epsilon": 0.1},
        {"replay.batch": 16},
        {"precision": "fp32"},
        {"replay.sampler.name": "prioritised"},
    ),
    *({"env.observe.flicker": 0.5}, {"explore.hold": 3}, {"ensemble.members": 2}),
]


@pytest.mark.parametrize("changes", DIFFERENT)
def test_runs_that_differ_have_different_hashes(changes):
    assert config_hash(load("catch/ddqn", changes)) != config_hash(load("catch/ddqn"))
    assert config_hash(load("minatar/ddqn", {"env.name": "asterix"})) != config_hash(
        load("minatar/ddqn", {"env.name": "asterix", "env.ramping": False})
    )


def test_a_section_is_known_to_be_of_one_kind_or_refused():
    assert of_kind(load("point_mass/sac").agent, SacConfig).critics == 2
    with pytest.raises(TypeError, match="expected a SacConfig, got a DqnConfig"):
        of_kind(load("catch/ddqn").agent, SacConfig)


def test_limits_of_kernels_are_those_of_the_options():
    pytest.importorskip("triton")
    from cerl.config.contradictions import GRU_WIDEST
    from cerl.kernels import gru_triton

    assert GRU_WIDEST == gru_triton.WIDEST
