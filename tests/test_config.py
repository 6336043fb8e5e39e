"""Loading, merging and checking of configurations, and the contents of every shipped preset."""

import itertools
import math
import re
import time
from typing import get_args

import pytest

from cerl import config, envs
from cerl.config import (
    AdamConfig,
    Config,
    ConfigError,
    EnsembleConfig,
    GymEnv,
    NetConfig,
    RmsPropConfig,
    SacConfig,
    load,
    memory_tasks,
    of_kind,
    preset,
)
from cerl.config.contradictions import MISS, contradictions, smallest_share
from cerl.config.errors import keys, nearest
from cerl.config.form import overridden
from cerl.record import files
from cerl.record.folder import check_out, dump, load_file, new_folder
from cerl.record.results import config_hash, env_name


def written(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def refusal(name="catch/ddqn", **overrides):
    with pytest.raises(ConfigError) as caught:
        load(name, {key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


@pytest.mark.slow
def test_every_preset_loads_and_has_a_description():
    names = preset.presets()
    assert len(names) > 40
    for name in names:
        assert load(name).preset == name
        assert len(preset.description(name)) > 20


def test_arguments_of_a_task_are_read_hashed_and_saved_like_any_option(tmp_path):
    words = ["b=false", "a=-5.0", "c=1e-3", "d=[1, two]", "e='1'"]
    want = (("a", -5.0), ("b", False), ("c", 1e-3), ("d", (1, "two")), ("e", "1"))
    named = {"e": "1", "d": [1, "two"], "c": 1e-3, "b": False, "a": -5.0}
    told = overridden("gym/cartpole", ["--env.kwargs", *words], prog="cerl train")
    file = load("gym/cartpole", {"env.kwargs": named})
    assert isinstance(told.env, GymEnv) and told.env.kwargs == want
    assert file == told and hash(file) == hash(told) and config_hash(file) == config_hash(told)
    assert config_hash(file) != config_hash(load("gym/cartpole"))
    dump(told, tmp_path / "config.yaml")
    assert load_file(tmp_path / "config.yaml") == told
    assert preset.read(tmp_path / "config.yaml")["env"]["kwargs"] == named
    # Given again, and given without any, they replace those of the file.
    path = str(tmp_path / "config.yaml")
    assert overridden(path, [], prog="cerl train").env == told.env
    assert overridden(path, ["--env.kwargs"], prog="cerl train").env == load("gym/cartpole").env
    assert env_name(load("gym/cartpole", {"env.kwargs": {"a": 1}})) == "gym/CartPole-v1-a=1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "env.kwargs: expected `name: value` lines below it, got 5"),
        ({"a b": 1}, "env.kwargs: expected names of arguments, got 'a b'"),
        ({"a": {"b": 1}}, "env.kwargs.a: expected a number, a text, true, false, null or a list"),
        (["slippery"], "env.kwargs: expected name=value, got 'slippery'"),
        (["x=1", "x=2"], "env.kwargs: expected different names, got x"),
        (["x=[1"], "env.kwargs.x: expected YAML"),
    ],
)
def test_arguments_of_a_task_that_cannot_be_read_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        load("gym/cartpole", {"env.kwargs": given})


@pytest.mark.slow
def test_every_preset_survives_dump_and_load(tmp_path):
    for name in preset.presets():
        run = load(name, {"seeds": [3, 1]})
        dump(run, tmp_path / "config.yaml")
        assert load_file(tmp_path / "config.yaml") == run
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_preset_over_preset_over_defaults():
    run = load("minatar/cerl-l1")
    # from the file itself, from minatar/cerl, from minatar/bootdqn, from minatar/ddqn, a default
    assert run.ensemble == EnsembleConfig(members=10, heads="cerl", shared_layers=1)
    assert run.optim == AdamConfig(lr=2.5e-4, eps=3.125e-4)
    assert run.loss.batches == "shared"


def test_overrides_nested_and_dotted_agree_and_win():
    nested = load("minatar/cerl", {"env": {"name": "asterix"}, "seeds": [5]})
    dotted = load("minatar/cerl", {"env.name": "asterix", "seeds": (5,)})
    assert nested == dotted
    assert (nested.env.name, nested.env.envs, nested.seeds) == ("asterix", 8, (5,))


def test_another_family_starts_from_its_own_defaults():
    run = load(
        "minatar/ddqn",
        {
            "env": {"family": "gym", "name": "CartPole-v1"},
            "net.channels": [],
            "net.kernels": [],
            "net.strides": [],
        },
    )
    assert run.env == config.GymEnv(name="CartPole-v1")


@pytest.mark.parametrize(
    "text, value",
    [("1e-4", 1e-4), ("2.5E-4", 2.5e-4), ("+3e2", 300.0), (".5e-1", 0.05), ("1_0e-1", 1.0)],
)
def test_exponents_are_numbers(tmp_path, text, value):
    path = written(tmp_path, "a.yaml", f"base: catch/ddqn\noptim: {{lr: {text}}}\n")
    assert load(path).optim.lr == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["e5", "1e", "0x1e5", "1e5x", "name1e5"])
def test_what_only_looks_like_an_exponent_is_not_a_float(tmp_path, text):
    path = written(tmp_path, "a.yaml", f"value: {text}\n")
    assert not isinstance(preset.read(tmp_path / "a.yaml")["value"], float), path


def test_file_of_ones_own_with_base_beside_it(tmp_path):
    written(tmp_path, "below.yaml", "base: catch/cerl\nensemble: {members: 3}\n")
    top = written(tmp_path, "top.yaml", "base: below.yaml\nseeds: [7]\n")
    run = load(top)
    assert (run.ensemble.members, run.ensemble.heads, run.seeds) == (3, "cerl", (7,))
    assert run.preset == "top"


def test_base_that_leads_back_is_refused(tmp_path):
    written(tmp_path, "a.yaml", "base: b.yaml\n")
    b = written(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="b -> a -> b"):
        load(b)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seeds: [1]\nseeds: [2]\n", "'seeds' is given 2 times"),
        ("loss: {gamma: 1, gamma: 2}\n", "'gamma' is given 2 times"),
        ("- 1\n- 2\n", "expected `key: value` lines, got a list"),
        ("", "expected `key: value` lines, got nothing"),
        ("# only a comment\n", "expected `key: value` lines, got nothing"),
        ("{}", "expected `key: value` lines, got nothing"),
        ("3", "expected `key: value` lines, got a int"),
        ("seeds: [1]\n", "expected an environment, got none: give it a `base: PRESET`"),
        ("1: 2\n", "expected names as keys, got 1"),
        ("null: 2\n", "expected names as keys, got null"),
        ("? \n", "expected names as keys, got nothing"),
        ("loss: {? [a] : 1}\n", "loss: expected names as keys, got a sequence"),
        ("a: 1\n---\na: 2\n", "expected a single document"),
        ("optim: {lr: !!python/name:os.system x}\n", "optim.lr: expected a text, a number"),
        ("loss: !!set {a}\n", "loss: expected a plain list or mapping, got !!set"),
        ("seeds: !!int x\n", "seeds: invalid literal"),
        ('a: "\\0"\nb: \x00', "expected YAML"),
        ('base: "a\\0.yaml"', "no preset 'a\\x00.yaml'"),
        ("loss: {gamma\n", "expected YAML"),
        ("base: 3\n", "expected the name of a preset, got 3"),
        ("base: catch/dqn\n", "did you mean catch/ddqn"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = written(tmp_path, "a.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "a.yaml" in str(caught.value)


def test_huge_numbers_and_deep_nesting_are_refused_at_once_with_their_key(tmp_path):
    deep, started = "[" * 3000 + "]" * 3000, time.perf_counter()
    bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{x}: &{x} [{', '.join(['*' + y] * 8)}]\n" for y, x in itertools.pairwise("abcdefghijkl")
    )
    for text, message in (
        (f"schedule: {{steps: {'9' * 5000}}}", "schedule.steps: expected at most 40 digits, got 5"),
        (f"schedule: {{steps: 0x{'f' * 5000}}}", "schedule.steps: expected at most 40 digits"),
        (f"loss: {{gamma: {deep}}}", "loss.gamma.0...: expected at most 32 levels, got more"),
        ("a: " + "{b: " * 3000, "a.b.b...: expected at most 32 levels, got more"),
        (bomb, "expected fewer values, got aliases that repeat too many"),
        ("a: &a [*a]", "expected fewer values, got aliases that repeat too many"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(written(tmp_path, "a.yaml", text))
        assert message in str(caught.value) and "a.yaml" in str(caught.value)
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - started < 30  # a second or two on an idle core


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1:30", "1:30"), ("2026-11-30", "2026-11-30"), ("yes", "yes"), ("off", "off")),
        *(("010", 10), ("0o10", 8), ("0x1F", 31), ("0b11", "0b11"), ("1_000", 1000)),
        *(
            ("1__0", "1__0"),
            ("_1", "_1"),
            ("1_", "1_"),
            ("+12", 12),
            ("-3", -3),
            ("1,000", "1,000"),
        ),
        *((".inf", math.inf), ("-.Inf", -math.inf), ("inf", "inf"), ("nan", "nan"), ("1.", 1.0)),
        *((".5", 0.5), ("-.5e-3", -5e-4), ("1_000.5", 1000.5), ("0o8", "0o8"), ("1.2.3", "1.2.3")),
        *(
            ("~", None),
            ("", None),
            ("Null", None),
            ("nUll", "nUll"),
            ("true", True),
            ("tRue", "tRue"),
        ),
        *(("FALSE", False), ("'1'", "1"), ("!!str 1", "1"), ("<<", "<<"), ("=", "=")),
    ],
)
def test_words_mean_what_the_core_schema_of_yaml_1_2_says(text, value):
    found = preset.parsed(f"key: {text}", where="here")["key"]
    assert found == value and type(found) is type(value)
    # What was read is written such that it reads the same.
    assert preset.parsed(preset.written({"key": value}), where="here")["key"] == value


def test_not_a_number_is_read_and_written():
    assert math.isnan(preset.parsed(preset.written({"a": math.nan}), where="")["a"])


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("./my.yaml", "my"),
        ("/home/me/studies/my.yml", "my"),
        ("my.v2.yaml", "my.v2"),
        ("./.hidden.yaml", "hidden"),
        ("-x.yaml", "x"),
        ("my study [1]\n.yaml", "my-study-1-"),
        ("....yaml", "file"),
        ("minatar/cerl", "minatar/cerl"),
    ],
)
def test_a_preset_of_ones_own_is_called_by_its_stem(name, title):
    assert preset.title(name) == title


def test_one_file_has_one_name_however_its_path_is_written(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    written(tmp_path, "my.yaml", "base: catch/ddqn\n")
    monkeypatch.chdir(tmp_path / "sub")
    for name in ("../my.yaml", str(tmp_path / "my.yaml"), "./.././my.yaml"):
        run = load(name, {"out": str(tmp_path / "runs")})
        assert run.preset == "my"
        assert new_folder(run).name.startswith("my-catch-")
    written(tmp_path, "top.yaml", "base: named.yaml\n")
    written(tmp_path, "named.yaml", "base: catch/ddqn\npreset: a name\n")
    assert (load("../named.yaml").preset, load("../top.yaml").preset) == ("a name", "top")


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "a\nb"},
        {"preset": "a\x1b[31m"},
        {"preset": ".hidden"},
        {"preset": "-x"},
        {"env.name": "CartPole-v1\n"},
        {"out": "a\0b"},
        {"out": ""},
        {"preset": "\udc80"},
    ],
)
def test_names_that_a_folder_or_a_line_cannot_have_are_refused(change):
    with pytest.raises(ConfigError) as caught:
        load("gym/cartpole", change)
    assert f"{next(iter(change))}: expected " in str(caught.value)


def test_folder_names_are_plain_whatever_the_names_of_preset_and_task(tmp_path):
    changes = {"out": str(tmp_path), "preset": "a b/../[x]$(y)" + "é" * 200, "env.name": "m:A/b v0"}
    folder = new_folder(load("gym/cartpole", changes))
    assert folder.parent == tmp_path
    assert re.fullmatch(r"a-b-\.\.-x-y-é+-\d{8}-\d{6}", folder.name)
    changes["preset"] = "é"
    assert new_folder(load("gym/cartpole", changes)).name.startswith("é-m-A-b-v0-2")


@pytest.mark.parametrize(
    "out", ["/proc/nope", "/dev/null", "{}/file", "{}/file/below", "/proc/self/x"]
)
def test_a_folder_that_cannot_be_made_names_its_option(tmp_path, out):
    (tmp_path / "file").write_text("")
    out = out.format(tmp_path)
    run = load("catch/ddqn", {"out": out})
    for attempt in (lambda: check_out(out), lambda: new_folder(run)):
        try:
            attempt()
        except ConfigError as error:
            text = f"--out: expected a folder that can be made and written to, got {out!r} ("
            assert str(error).startswith(text)
        else:
            assert attempt is not new_folder and out.startswith("/proc")


def test_file_that_is_not_there():
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        load("nowhere.yaml")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no preset 'minatar/crel'; did you mean minatar/cerl"):
        load("minatar/crel")


@pytest.mark.parametrize(
    "override, message",
    [
        ({"lr": 1.0}, "lr: no such key; did you mean optim.lr?"),
        ({"loss.gama": 1.0}, "loss.gama: no such key; did you mean loss.gamma"),
        ({"env.nmae": "x"}, "env.nmae: no such key; did you mean env.name"),
        ({"schedule.steps": 1e6}, "a whole number without point or exponent (1_000_000), got 1000"),
        ({"schedule.steps": 1.5}, "schedule.steps: expected a whole number, got 1.5"),
        ({"seeds": ["1"]}, "seeds.0: expected a whole number, got '1'"),
        ({"seeds": [1.0]}, "seeds.0: expected a whole number"),
        ({"seeds": 1}, "seeds: expected a list, e.g. [0, 1, 2], got 1"),
        ({"loss.gamma": 2}, "loss.gamma: expected less than or equal to 1, got 2"),
        ({"agent.double": "yes"}, "agent.double: expected true or false, got 'yes'"),
        ({"loss": 3}, "loss: expected `key: value` lines below it, got 3"),
        ({"loss": None}, "loss: expected `key: value` lines below it, got nothing"),
        ({"env": "catch"}, "env: expected `key: value` lines below it, got 'catch'"),
        ({"schedule.steps": math.inf}, "schedule.steps: expected a whole number, got inf"),
        ({"encoder": "gru"}, "got 'gru' (encoder.name chooses its kind)"),
        ({"agent": "dqn"}, "got 'dqn' (agent: moved to agent.name)"),
        ({"optim": "adam"}, "got 'adam' (optim.name chooses its kind)"),
        ({"env": "catch"}, "got 'catch' (env.family chooses its kind)"),
        ({"replay.sampler": "uniform"}, "got 'uniform' (replay.sampler.name chooses its kind)"),
        ({"env.walls": True}, "no such key; family catch has none, point_mass does"),
        ({"walls": True}, "walls: no such key; family catch has none, point_mass does"),
        ({"agent.critics": 2}, "agent.critics: no such key; agent dqn has none, sac does"),
        ({"encoder.heads": 2}, "encoder frames has none, transformer and fox do"),
        ({"optim.momentum": 0.5}, "optim.momentum: no such key; optim adam has none, rmsprop does"),
        (
            {"agent.name": "dqnn"},
            "agent.name: expected dqn, quantile or sac, got 'dqnn'; did you mean",
        ),
        ({"env.row": 3}, "env.row: no such key; did you mean env.rows?"),
        (
            {"agent.loss": "hubr"},
            "agent.loss: expected huber or mse, got 'hubr'; did you mean huber",
        ),
        ({"eval.policies": ["vot"]}, "mean, mean_mode or random, got 'vot'; did you mean vote?"),
        (
            {"env.family": "minatr"},
            "atari, gym, game, point_mass, mujoco, dmc, memory or popgym, got",
        ),
        ({"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        ({"device": "cuda:x"}, "device: expected"),
    ],
)
def test_refusals_name_key_expected_got_and_nearest(override, message):
    with pytest.raises(ConfigError) as caught:
        load("catch/ddqn", override)
    assert message in str(caught.value)
    assert str(caught.value).startswith("catch/ddqn with ")


def test_hints_name_keys_of_the_family_at_hand_only():
    for key in ("env.walls", "env.rows", "env.length", "walls"):
        text = refusal("gym/cartpole", **{key.replace(".", "__"): 1})
        assert f"{key}: no such key; family gym has none, " in text and "did you mean" not in text
    own = set(keys(Config, kinds={"env": "gym"}))
    assert "env.diverged" in own and "env.walls" not in own and "env.walls" in set(keys(Config))


def test_unknown_game_names_the_nearest():
    text = refusal("minatar/ddqn", env__name="SpaceInvaders")
    assert "got 'SpaceInvaders'; did you mean space_invaders?" in text


@pytest.mark.parametrize(
    ("preset", "name", "message"),
    [
        ("mujoco/sac", "breakout", "no Gym-MuJoCo robot is called 'breakout' (`cerl list envs`"),
        ("mujoco/sac", "hopper-v4", "called 'hopper-v4'; did you mean Hopper-v4"),
        ("mujoco/sac", "HalfCheetah-v2", "called 'HalfCheetah-v2'; did you mean HalfCheetah-v"),
        ("dmc/sac", "cheetah_run", "no domain-task 'cheetah_run'; did you mean cheetah-run"),
        ("dmc/sac", "Hopper-v4", "dm_control's suite has no domain-task 'Hopper-v4'"),
    ],
)
def test_robots_and_domains_are_known_without_their_simulators(preset, name, message):
    assert message in refusal(preset, env__name=name).partition(": env.name: ")[2]


def test_several_mistakes_are_all_told():
    text = refusal(loss__gamma=2, optim__lr=-1, seeds=["a"])
    assert len(text.splitlines()) == 3


def test_seeds_are_different_and_not_empty():
    assert "seeds: 4 is given 3 times" in refusal(seeds=[4, 1, 4, 4])
    assert "at least one seed" in refusal(seeds=[])
    assert "from 0 to 2**63 - 1, got -1" in refusal(seeds=[-1])
    assert load("catch/ddqn", {"seeds": [2, 0, 1]}).seeds == (2, 0, 1)


def test_cerl_needs_features_of_its_own():
    # Nature network: three convolutions, one hidden layer; the paper's L = 4 shares them all.
    assert "expected at most 3 with heads cerl" in refusal(
        "atari/paper-cerl", ensemble__shared_layers=4
    )
    assert load("atari/paper-cerl", {"ensemble.shared_layers": 3}).ensemble.shared_layers == 3
    assert load("atari/paper-bootdqn-l4").ensemble.shared_layers == 4
    assert "expected at most 4" in refusal("atari/paper-bootdqn", ensemble__shared_layers=5)
    assert "expected at most 1 with heads cerl" in refusal(
        "minatar/cerl", ensemble__shared_layers=2
    )


def test_fork_both_needs_unshared_layers_and_a_hidden_one():
    assert "expected 0, got 1" in refusal("minatar/cerl-both", ensemble__shared_layers=1)
    assert "net.hidden is empty" in refusal("minatar/cerl-both", net__hidden=[])


def test_multi_horizon_limits():
    assert "expected 0, got 1 with 10 members" in refusal(
        "minatar/multi-horizon", ensemble__shared_layers=1
    )
    alone = {"ensemble.shared_layers": 1, "ensemble.members": 1}
    assert load("minatar/multi-horizon", alone).ensemble.members == 1
    # Longest horizon 1 / (1 - 0.9) = 10 steps: ten heads reach down to one step, eleven do not.
    assert load("minatar/multi-horizon", {"loss.gamma": 0.9}).loss.gamma == 0.9
    text = refusal("minatar/multi-horizon", loss__gamma=0.9, ensemble__horizons=11)
    assert "expected at most 10" in text
    assert "expected below 1, got 1" in refusal("minatar/multi-horizon", loss__gamma=1.0)


def test_tandem_is_two_members_with_own_heads():
    assert "expected 2 with duty tandem, got 3" in refusal("catch/tandem", ensemble__members=3)
    assert "expected own with duty tandem" in refusal("catch/tandem", ensemble__heads="cerl")


def test_single_actor_lets_member_0_act():
    assert "expected first, got uniform" in refusal("catch/cerl", ensemble__heads="single_actor")


def test_batches_and_masks_need_own_heads():
    assert "expected shared, got independent" in refusal("catch/cerl", loss__batches="independent")
    assert "expected 1 with heads cerl, got 0.5" in refusal(
        "catch/cerl", loss__mask_probability=0.5
    )
    assert load("catch/bootdqn", {"loss.mask_probability": 0.5}).loss.mask_probability == 0.5


@pytest.mark.parametrize("kind", ["own", "disjoint"])
def test_owner_batches_need_enough_candidates(kind):
    def tried(candidates):
        return {"ensemble__members": 10, "loss__batches": kind, "replay__candidates": candidates}

    text = refusal("catch/bootdqn", **tried(8))
    assert f"with probability {0.9**8:.2g}" in text
    needed = next(k for k in range(1, 1000) if 0.9**k <= MISS)
    assert f"at least {needed} candidates" in text
    refusal("catch/bootdqn", **tried(needed - 1))
    for enough in (needed, 128):
        run = load("catch/bootdqn", {k.replace("__", "."): v for k, v in tried(enough).items()})
        assert run.replay.candidates == enough


def test_smallest_share_of_the_rows():
    def share(batches, **ensemble):
        run = Config(ensemble=EnsembleConfig(**ensemble))
        return smallest_share(run.model_copy(update={"loss": config.LossConfig(batches=batches)}))

    assert share("own", members=5) == 0.2
    assert share("own", members=2, duty="tandem", active_probability=0.9) == pytest.approx(0.1)
    assert share("disjoint", members=2, duty="tandem") == 0.5
    assert share("own", members=3, duty="first") == 0.0
    assert "one of them never does" in refusal(
        "catch/bootdqn", ensemble__duty="first", loss__batches="own"
    )


def test_network_lists_agree():
    assert "got 1, 2 and 1" in refusal("minatar/ddqn", net__kernels=[3, 3])
    assert "sizes of at least 1" in refusal("minatar/ddqn", net__hidden=[0])


def test_mico_needs_convolutions():
    assert "net.channels is empty" in refusal("catch/bootdqn", agent__mico_weight=0.01)


def test_policies_are_given_once_and_not_empty():
    assert "got none" in refusal(eval__policies=[])
    assert "different policies" in refusal(eval__policies=["vote", "vote"])


def test_budgets_fit_each_other():
    assert "at least replay.start (500)" in refusal(replay__capacity=499)
    assert "end before its first update" in refusal(schedule__steps=499)
    assert "replay.start: expected at least 8" in refusal(replay__start=7)
    assert "a window and one more row (3) for each of 4 environments" in refusal(
        replay__capacity=11, replay__start=10
    )


def test_config_checks_itself_however_it_is_built():
    with pytest.raises(ValueError, match="seeds: 1 is given 2 times"):
        Config(seeds=(1, 1))
    with pytest.raises(ValueError, match="got 1, 0 and 0"):
        Config(net=NetConfig(channels=(8,)))
    for section, message in (
        (lambda: SacConfig(target_critics=3), "agent.target_critics: expected at most"),
        (lambda: config.FoxConfig(heads=5), "encoder.width: expected a multiple of encoder.heads"),
        (lambda: config.FoxConfig(gate_scales=(2.0, 1.0)), "encoder.gate_scales: expected the"),
        (lambda: config.FoxConfig(gate="fixed"), "encoder.gate_scales: missing; encoder.gate fix"),
        (lambda: config.FoxConfig(variant="llama", without=("kv_shift",)), "has no kv_shift to"),
        (lambda: config.FoxConfig(without=("kv_shift", "kv_shift")), "expected every part once"),
        (lambda: config.FoxConfig(heads=4, key_heads=3), r"a divisor of encoder.heads \(1, 2, 4\)"),
        (lambda: config.EvalConfig(slots=11), "eval.slots: every environment plays"),
    ):
        with pytest.raises(ValueError, match=message):
            section()
    assert list(contradictions(Config())) == []


def test_nearest_ignores_case_and_separators():
    names = ["asterix", "breakout", "space_invaders"]
    assert nearest("Space-Invaders", names) == "; did you mean space_invaders?"
    assert nearest("zzz", names) == ""


def models(annotation):
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, config.Model) else []
    return [model for part in get_args(annotation) for model in models(part)]


def unexplained(model, path=""):
    for name, field in model.model_fields.items():
        below = models(field.annotation)
        if not below and len(field.description or "") < 5:
            yield f"{path}{name}"
        for each in below:
            yield from unexplained(each, f"{path}{name}.")


def test_every_option_is_explained():
    assert list(unexplained(Config)) == []


def test_failed_dump_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    dump(load("catch/ddqn"), path)
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, full)
            with pytest.raises(OSError, match="No space left"):
                dump(load("catch/cerl"), path)
        assert path.read_text() == before
        assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_new_folders_never_collide(tmp_path):
    run = load("minatar/cerl", {"out": str(tmp_path / "runs")})
    folders = [new_folder(run) for _ in range(3)]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.name.startswith("minatar-cerl-breakout-")
        assert load_file(folder / "config.yaml") == run


# Values of the authors' code (configs/boot_dqn_rmsprop.gin and boot_quantile.gin) and the papers.


def test_paper_presets_hold_the_authors_values():
    run = load("atari/paper-ddqn")
    assert (run.net.channels, run.net.kernels, run.net.strides) == (
        (32, 64, 64),
        (8, 4, 3),
        (4, 2, 1),
    )
    assert (run.net.hidden, run.net.scale) == ((512,), 255.0)
    assert run.encoder == config.FramesConfig(frames=4)
    assert (run.net.padding, run.net.init) == ("valid", "fan_in")
    assert run.agent == config.DqnConfig(shared_bias=True)
    optim = of_kind(run.optim, RmsPropConfig)
    assert optim.eps == pytest.approx(0.01 / 32**2, rel=1e-12)
    assert (optim.lr, optim.decay, optim.momentum) == (2.5e-4, 0.95, 0.0)
    assert (run.replay.capacity, run.replay.batch, run.replay.start) == (1_000_000, 32, 50_000)
    assert (run.schedule.update_every, run.schedule.target_every) == (4, 30_000)
    assert run.schedule.steps == 200 * 250_000
    assert (run.explore.hold, run.explore.decay, run.explore.end) == (50_000, 1_000_000, 0.01)
    assert (run.eval.every, run.eval.steps, run.eval.slots) == (250_000, 125_000, 1)
    env = run.env
    assert isinstance(env, config.AtariEnv)
    assert (env.sticky, env.noop_max, env.fire_reset, env.life_loss) == (0.0, 0, False, False)
    assert (env.frame_skip, env.time_limit, env.full_actions, env.envs) == (4, 27_000, False, 1)
    quantile = load("atari/paper-qrdqn")
    assert (quantile.optim.lr, of_kind(quantile.optim, AdamConfig).eps) == (5e-5, 3.125e-4)
    assert quantile.agent == config.QuantileConfig(quantiles=200, double=False)
    assert quantile.loss.n_step == 3
    assert (quantile.replay.start, quantile.schedule.target_every) == (20_000, 8_000)
    assert (quantile.net.padding, quantile.net.init) == ("same", "variance")
    assert quantile.eval.epsilon == 0.001


def test_short_names_are_the_papers():
    for name in ("ddqn", "bootdqn", "cerl", "tandem", "qrdqn"):
        short, paper = load(f"atari/{name}"), load(f"atari/paper-{name}")
        assert short == paper.model_copy(update={"preset": f"atari/{name}"})


def test_machado_presets_follow_the_protocol():
    run = load("atari/machado-cerl")
    env = run.env
    assert isinstance(env, config.AtariEnv)
    assert (env.sticky, env.full_actions, env.life_loss) == (0.25, True, False)
    assert env.frame_skip * env.time_limit == 18_000
    assert env.frame_skip * run.schedule.steps == 200_000_000
    assert run.schedule.target_every == 10_000 * run.schedule.update_every


def test_minatar_presets_follow_their_sources():
    run = load("minatar/ddqn")
    assert (run.net.channels, run.net.kernels, run.net.hidden) == ((16,), (3,), (128,))
    assert run.optim == AdamConfig(lr=2.5e-4, eps=3.125e-4)
    assert (run.replay.capacity, run.replay.start) == (100_000, 1_000)
    assert (run.schedule.update_every, run.schedule.target_every) == (4, 1_000)
    assert (run.schedule.steps, run.explore.decay) == (10_000_000, 250_000)
    authors = load("minatar/young-tian")
    assert (authors.schedule.update_every, authors.schedule.target_every) == (1, 1_000)
    assert (authors.schedule.steps, authors.explore.decay) == (5_000_000, 100_000)
    assert (authors.explore.end, authors.replay.start) == (0.1, 5_000)
    assert authors.agent == config.DqnConfig(double=False)
    optim = of_kind(authors.optim, RmsPropConfig)
    assert optim.momentum == optim.decay == 0.95
    assert math.sqrt(optim.eps) == pytest.approx(0.01)


def test_agents_and_the_rest_have_to_fit():
    text = refusal("minatar/ddqn", agent__name="sac")
    assert "agent.name: sac chooses continuous actions, but minatar takes discrete ones" in text
    assert "agent.name: dqn chooses discrete actions, but mujoco takes" in refusal(
        "mujoco/sac", agent__name="dqn"
    )
    point = "point_mass/cerl"
    for option, value, message in (
        ("agent__target_critics", 3, "expected at most agent.critics (2), got 3"),
        ("agent__log_std_min", 2.0, "expected below agent.log_std_max (2), got 2"),
        ("ensemble__shared_layers", 1, "share no layers"),
        ("agent__loss", "huber", "agent.loss: expected mse or mse_huber, got 'huber'"),
        ("eval__policies", ["vote"], "continuous actions have no vote"),
    ):
        assert message in refusal(point, **{option: value})
    assert "2 or more members" in refusal("point_mass/sac", agent__spread_temperature=1.0)
    assert "only policies of agent sac have" in refusal("catch/ddqn", eval__policies=["mean_mode"])
    assert "orthogonal works with agent sac only" in refusal("catch/ddqn", net__init="orthogonal")
    assert "eval.share" in refusal("catch/ddqn", eval__share=True, eval__steps=100)


@pytest.mark.parametrize("family", ["memory", "popgym"])
def test_the_kind_of_actions_of_a_memory_task_is_known(family):
    names = memory_tasks.TASKS if family == "memory" else memory_tasks.POPGYM
    for name in names:
        env = load(f"{family}/fox", {"env.name": "RepeatFirstEasy"}).env
        env = type(env).model_validate({"name": name})
        game = envs.make_resident(env, seeds=[0], salt=0, device="cpu")
        assert game.spec.continuous == (env.actions_of_task == "continuous")
    text = refusal(f"{family}/fox", env__name="PositionOnlyPendulumEasy")
    assert "dqn chooses discrete actions, but PositionOnlyPendulumEasy takes continuous" in text
    assert "expected sac (for example a preset popgym/sac-fox), or another env.name" in text


def test_the_papers_continuous_presets_are_the_specification():
    cerl = load("mujoco/cerl")
    assert cerl.net.hidden == (256, 256) and cerl.net.init == "orthogonal"
    agent = of_kind(cerl.agent, SacConfig)
    assert (agent.log_std, agent.log_std_min, agent.log_std_max) == ("tanh", -10, 2)
    assert (agent.loss, agent.huber_delta, agent.target_entropy) == ("mse_huber", 10.0, -0.5)
    assert cerl.optim == AdamConfig(lr=3e-4, eps=1e-8)
    assert (cerl.replay.capacity, cerl.replay.batch) == (200_000, 256)
    assert (cerl.ensemble.members, cerl.ensemble.heads) == (10, "cerl")
    assert (cerl.eval.every, cerl.eval.episodes, cerl.eval.share) == (20_000, 30, True)
    tandem = load("mujoco/tandem").ensemble
    assert (tandem.members, tandem.duty, tandem.active_probability) == (2, "tandem", 0.9)
    standard = load("mujoco/standard-sac")
    assert standard.replay.capacity == 1_000_000
    assert of_kind(standard.agent, SacConfig).target_entropy == -1.0
    assert "individual_mode" in standard.eval.policies


def test_images_want_convolutions_and_numbers_none():
    conv = {"net__channels": (8,), "net__kernels": (3,), "net__strides": (2,)}
    drawn = {"env__pixels": True, "env__backend": "dm_control"}
    assert "env.pixels shows images, which need convolutions" in refusal("dmc/sac", **drawn)
    assert "set env.pixels (with env.backend dm_control) or" in refusal("dmc/sac", **conv)
    assert "observations of mujoco are vectors, not images; leave out" in refusal(
        "mujoco/sac", **conv
    )
    options = {key.replace("__", "."): value for key, value in (conv | drawn).items()}
    assert load("dmc/sac", options).net.channels == (8,)
