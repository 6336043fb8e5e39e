"""Files of version 0.1: what they say is what the run was, and a run folder goes on as it began.

`golden/config_0_1` and `golden/run_0_1` were written by version 0.1 (commit 371f7ae).
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cerl import draw, training, wiring
from cerl.config import Config, ConfigError, load, of_kind, preset
from cerl.config.convert import is_0_1, upgraded
from cerl.config.encoders import SequenceOptions
from cerl.config.errors import MOVED, keys
from cerl.data import EnvSpec
from cerl.evaluate_run import evaluate_run
from cerl.record import checkpoint, results
from cerl.record.folder import change, load_file

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {
    # Options that the run did not read are left out.
    "catch-ddqn-odd": ("catch/ddqn", {"optim.beta1": 0.8}),
    "atari-paper-tandem": ("atari/paper-tandem", {}),
    "atari-flicker-gru": ("atari/flicker-gru", {"encoder.sized_like": "llama"}),
    "memory-transformer": ("memory/transformer", {"encoder.heads": 4, "encoder.cache_refresh": 50}),
    "minatar-qrdqn": ("minatar/qrdqn", {"seeds": [3, 4]}),
    "minatar-young-tian": ("minatar/young-tian", {}),
    "mujoco-redq": ("mujoco/redq", {}),
    "popgym-sac-fox": ("popgym/sac-fox", {"encoder.prune": -10.0}),
    "gym-cartpole": ("gym/cartpole", {"env.kwargs": {"sutton_barto_reward": True}}),
}


def old(name):
    return preset.read(GOLDEN / "config_0_1" / f"{name}.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_0_1_is_the_run_of_todays_options(name):
    path = GOLDEN / "config_0_1" / f"{name}.yaml"
    known, changes = CONFIGS[name]
    want = load(known, changes)
    assert load_file(path) == want
    assert results.config_hash(load_file(path)) == results.config_hash(want)
    # As a preset of one's own it is the same run under another name.
    assert load(str(path), {"preset": known}) == want


def units(config):
    """Hidden units of the perceptrons of a config's sequence network."""
    spec = EnvSpec("t", (4,), torch.float32, 3, config.env.envs, 1, True, True)
    net = wiring.make_agent(config, spec, torch.device("cpu")).build(keys=draw.seed_keys([0]))
    (down,) = [leaf for name, leaf in net.named_parameters() if name.endswith("down.weight")]
    return down.shape[2]


def test_blocks_that_were_sized_by_heads_that_a_network_lacks_keep_their_size():
    # 16 heads of 4 features: version 0.1 gave the perceptrons 288 hidden units.
    config = load_file(GOLDEN / "config_0_1" / "memory-mlp-heads.yaml")
    assert units(config) == 288 and units(load("memory/mlp")) == 272
    assert of_kind(config.encoder, SequenceOptions).ratio != 3.5


def test_every_option_of_0_1_is_found_again_or_has_a_new_place():
    flat = {key for key, _ in preset.leaves(old("catch-ddqn-odd"))}
    today = set(keys(Config))
    for key in flat - {"env.observe"}:
        assert MOVED.get(key, key) in today, key
    assert set(MOVED.values()) - {"encoder"} <= today


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"net.encoder": "gru", "sequence.cache": 3, "sequence.cache_refresh": 5},
            "sequence.cache: a gru is always refreshed from a whole window",
        ),
        (
            {"net.encoder": "mlp", "sequence.context": 3, "sequence.context_grad": False},
            "sequence.context_grad: expected true with an mlp",
        ),
        ({"optim.momentum": 0.5}, "optim.momentum: adam has no momentum buffer"),
    ],
)
def test_what_today_has_no_options_for_names_the_version_that_goes_on(changes, message):
    tree = preset.merged(old("memory-transformer"), preset.nested(changes))
    with pytest.raises(ConfigError, match=f"here: {message}.*; cerl 0.1 can go on with it"):
        upgraded(tree, where="here")


@pytest.mark.parametrize(
    "changes", [{"agent": "ppo"}, {"net.encoder": "lstm"}, {"sequence.width": "wide"}]
)
def test_what_0_1_never_wrote_is_refused(changes):
    tree = preset.merged(old("memory-mlp-heads"), preset.nested(changes))
    with pytest.raises(ConfigError, match="here: has the sections of version 0.1, but not its"):
        upgraded(tree, where="here")


def test_trees_of_today_and_differences_from_a_base_are_left_alone():
    today = load("memory/gru").model_dump(mode="json")
    assert not is_0_1(today) and upgraded(today, where="x") is today
    assert not is_0_1({"agent": "sac", "net": {"hidden": [8]}})


@pytest.mark.parametrize(("key", "new"), MOVED.items())
def test_an_old_option_is_named_with_its_new_place(key, new, tmp_path):
    given = {"agent": "sac", "sequence": {"layers": 2}}.get(key, 1)
    told = {"sequence": "sequence.layers: moved to encoder.layers"}.get(
        key, f"{key}: moved to {new}"
    )
    with pytest.raises(ConfigError) as caught:
        load("catch/ddqn", {key: given})
    assert told in str(caught.value)
    path = tmp_path / "mine.yaml"
    path.write_text(preset.written({"base": "catch/ddqn", **preset.nested({key: given})}))
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert told in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "run_0_1", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_folder_of_0_1_is_evaluated(folder):
    result = evaluate_run(folder, episodes=3)["individual"]
    assert result.returns.shape == (1, 1, 3) and result.returns.abs().max() == 1


def test_a_run_folder_of_0_1_goes_on_as_it_would_have(folder):
    before = preset.read(folder / "config.yaml")
    training.resume(folder, changes={"schedule.steps": 1000})
    # The file stays one of 0.1, or its checkpoints would not belong to it any more.
    after = preset.read(folder / "config.yaml")
    assert after == preset.merged(before, {"schedule": {"steps": 1000}}) and is_0_1(after)
    table = pq.read_table(folder / "rows.parquet")
    assert (
        len(set(table["config_hash"].to_pylist())) == 1 and max(table["step"].to_pylist()) == 1000
    )
    net = checkpoint.load(folder).state["learner"]["net"]
    want = json.loads((folder / "net_at_1000.json").read_text())
    assert set(net) == set(want)
    for name, values in want.items():
        assert net[name].flatten().tolist() == pytest.approx(values, rel=1e-3, abs=1e-5), name


def test_only_what_may_change_changes_in_a_folder_of_0_1(folder):
    with pytest.raises(ConfigError, match="optim.lr cannot change in a run"):
        change(folder, {"optim.lr": 1.0})
    run = change(folder, {"log.every": 77})
    assert run.log.every == 77 and load_file(folder / "config.yaml") == run
