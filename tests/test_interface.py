"""The interface from Python: `cerl.train`, `cerl.resume`, `cerl.load` and what their page says."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from options import encoder

import cerl
from cerl.config import ConfigError, evaluated, load
from cerl.evaluate_run import evaluate_run
from cerl.record import checkpoint
from cerl.record.folder import FILE, load_file
from cerl.wiring import evaluation_env

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    **{"device": "cpu", "seeds": (3, 5), "net.hidden": (16,), "env.envs": 2},
    **{"replay.start": 40, "replay.batch": 8, "schedule.steps": 160, "explore.hold": 20},
    **{"explore.decay": 40, "eval.every": 160, "eval.episodes": 1, "eval.time_limit": 20},
    "log.every": 80,
}
SMALL_SEQUENCE = {"width": 16, "heads": 2, "layers": 1, "context": 2, "learnt": 4}
FLICKER = {"env.rows": 6, "env.columns": 4, "env.observe.flicker": 0.3, "replay.reward_clip": 0.5}


def sequence(kind):
    return {**FLICKER, "encoder": encoder(kind, **SMALL_SEQUENCE)}


# Runs by name: a preset and its options.
RUNS = {
    "catch": ("catch/cerl", {"ensemble.members": 3, "env.rows": 6}),
    "stack": ("catch/cerl", {"encoder.frames": 3, **FLICKER}),
    "gru": ("catch/cerl", sequence("gru")),
    "fox": ("catch/cerl", sequence("fox")),
    "point_mass": ("point_mass/ensemble", {"ensemble.members": 3, "eval.share": False}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains a run of `RUNS` once; returns its folder."""
    folders = {}

    def trained(name):
        if name not in folders:
            preset, options = RUNS[name]
            out = str(tmp_path_factory.mktemp(name))
            folders[name] = cerl.train(preset, {**SMALL, **options, "out": out})
        return folders[name]

    return trained


def net_of(folder):
    return checkpoint.load(folder).state["learner"]["net"]


def test_the_package_is_imported_without_its_dependencies():
    probe = "import sys, cerl; names = {'torch', 'numpy', 'pydantic'} & {*sys.modules}; "
    probe += "assert not names, names; assert {*cerl.__all__} <= {*dir(cerl)}; cerl.load"
    probe += "; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cerl.trian  # noqa: B018  # pyright: ignore


def test_a_name_with_overrides_trains_what_its_config_trains(tmp_path):
    name, options = RUNS["catch"]
    options = {**SMALL, **options}
    config = load(name, {**options, "out": str(tmp_path / "b")})
    ours = [cerl.train(name, {**options, "out": str(tmp_path / "a")}), cerl.train(config)]
    assert load_file(ours[1] / FILE) == config
    one, other = map(net_of, ours)
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="overrides: expected with the name of a preset"):
        cerl.train(config, {"seeds": (1,)})
    with pytest.raises(ConfigError, match="did you mean catch/ddqn"):
        cerl.train("catch/dqn")


def test_resume_goes_on_with_a_folder_given_by_its_name(tmp_path):
    name, options = RUNS["catch"]
    options = {**SMALL, **options, "out": str(tmp_path)}
    whole = cerl.train(name, options)
    part = cerl.train(name, {**options, "schedule.steps": 80, "eval.every": 160})
    assert cerl.resume(str(part), changes={"schedule.steps": 160}) == part
    one, other = net_of(whole), net_of(part)
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="the run is finished"):
        cerl.resume(part)
    for function in (cerl.resume, cerl.load):
        with pytest.raises(ConfigError, match="config.yaml: cannot be read"):
            function(tmp_path / "nothing")


def played(policy, lanes):
    """Returns of the first episode in every environment of evaluation number 0."""
    env = evaluation_env(evaluated(policy.config, {"episodes": lanes}), torch.device("cpu"))
    step = env.restart(0)
    returned, over = torch.zeros(step.reward.shape[1]), torch.zeros(step.reward.shape[1]).bool()
    while not over.all():
        action = policy.act(step.obs[0], step.reward[0])
        step = env.step(action.unsqueeze(0))
        returned += torch.where(over, 0.0, step.reward[0])
        over |= (step.terminated | step.truncated)[0]
    return returned


@pytest.mark.parametrize(
    ("name", "policy", "epsilon"),
    [
        ("catch", "vote", 0.0),
        ("catch", "vote", 0.5),
        ("catch", "mean", 0.3),
        ("catch", "random", 0.0),
        ("stack", "mean", 0.2),
        ("gru", "random", 0.0),
        ("fox", "vote", 0.1),
        ("point_mass", "mean", 0.0),
        ("point_mass", "mean_mode", 0.2),
        ("point_mass", "random", 0.0),
    ],
)
def test_a_policy_plays_what_an_evaluation_plays(run, name, policy, epsilon):
    folder = run(name)
    want = evaluate_run(folder, episodes=4, policies=(policy,), epsilon=epsilon)[policy].returns
    for index, seed in enumerate((3, 5)):
        ours = cerl.load(folder, policy=policy, seed=seed, epsilon=epsilon)
        assert played(ours, 4).tolist() == want[index, 0].tolist()


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("catch", "individual"),
        ("gru", "individual"),
        ("point_mass", "individual"),
        ("point_mass", "individual_mode"),
    ],
)
def test_every_member_plays_by_itself(run, name, policy):
    folder = run(name)
    want = evaluate_run(folder, episodes=2, policies=(policy,), epsilon=0.0)[policy].returns
    for member in range(want.shape[1]):
        ours = cerl.load(folder, policy=policy, member=member, seed=5)
        own = slice(2 * member, 2 * member + 2)  # environments that the evaluation gave to it
        assert played(ours, 2)[own].tolist() == want[1, member].tolist()


def test_without_a_choice_the_aggregate_of_the_run_plays(run):
    names = {name: cerl.load(run(name)).config.eval.policies for name in ("catch", "point_mass")}
    assert names == {"catch": ("vote",), "point_mass": ("mean",)}
    policy = cerl.load(run("catch"))
    assert policy.config.seeds == (3,) and policy.spec.actions == 3


def test_an_observation_alone_is_one_of_a_batch_in_numpy_or_torch(run):
    policy = cerl.load(run("catch"), policy="mean")
    boards = np.random.default_rng(0).random((5, 1, 6, 10)) < 0.1
    boards.flags.writeable = False
    actions = policy.act(boards)
    assert actions.dtype == np.int64 and actions.shape == (5,)
    assert [policy.act(board) for board in boards] == actions.tolist()
    alone = policy.act(boards[0])
    assert alone.shape == () and alone.dtype == np.int64
    assert policy.act(boards[::-1]).tolist() == actions.tolist()[::-1]
    tensors = policy.act(torch.tensor(boards))
    assert isinstance(tensors, torch.Tensor) and tensors.tolist() == actions.tolist()


def test_continuous_actions_have_their_components(run):
    policy = cerl.load(run("point_mass"), policy="mean_mode")
    alone = policy.act([0.1, 0.2, 0.0, 0.0])
    assert alone.shape == (2,) and alone.dtype == np.float32 and np.abs(alone).max() <= 1
    both = policy.act(np.array([[0.1, 0.2, 0.0, 0.0]] * 2))  # float64, as simulators have it
    assert both.shape == (2, 2) and np.allclose(both, alone)


@pytest.mark.parametrize("name", ["stack", "gru", "fox"])
def test_memory_lasts_until_an_episode_begins(run, name):
    """Where an episode begins, actions are those of a policy that saw nothing before."""

    def policy():
        return cerl.load(run(name), policy="individual")

    def values(one):
        """What the network remembers, as numbers."""
        return torch.cat([part.flatten().float() for part in one._carry])

    boards = torch.rand(6, 2, 1, 6, 4, generator=torch.Generator().manual_seed(1)) < 0.3
    rewards = torch.linspace(-1, 1, 12).view(6, 2)
    long, first, second = policy(), policy(), policy()
    for board, reward in zip(boards[:3], rewards[:3], strict=True):
        long.act(board, reward)
    long.reset(np.array([False, True]))
    for board, reward in zip(boards, rewards, strict=True):
        actions = [one.act(board, reward) for one in (long, first, second)]
        assert actions[0][1] == actions[1][1]  # the second environment began anew
        assert torch.equal(actions[1], actions[2])
        if torch.equal(board, boards[0]):
            assert not torch.equal(values(long), values(first))  # the first one went on
    long.reset()
    for board, reward in zip(boards, rewards, strict=True):
        long.act(board, reward)
    assert torch.equal(values(long), values(first))


def test_what_cannot_be_played_is_refused_in_words(run, tmp_path):
    catch, gru, mass = run("catch"), run("gru"), run("point_mass")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"seed": 4}, ValueError, r"seed: expected one of \(3, 5\), got 4"),
        ({"member": 3}, ValueError, "member: expected 0 to 2, got 3"),
        ({"device": "gpu"}, ValueError, "device: expected auto, cpu"),
        ({"policy": "mode"}, ConfigError, "eval.policies"),
        ({"policy": "mean_mode"}, ConfigError, "only policies of agent sac have a mode"),
        ({"epsilon": 2}, ConfigError, "eval.epsilon: expected less than or equal to 1"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            cerl.load(catch, **options)
    with pytest.raises(ConfigError, match="continuous actions have no vote"):
        cerl.load(mass, policy="vote")
    policy, board = cerl.load(catch), np.zeros((1, 6, 10), dtype=bool)
    with pytest.raises(ValueError, match=r"expected \[1, 6, 10\] or a batch .*, got \[6, 10\]"):
        policy.act(board[0])
    with pytest.raises(ValueError, match=r"expected torch.bool, got torch.float64"):
        policy.act(board.astype(float))
    policy, boards = cerl.load(gru), np.zeros((3, 1, 6, 4), dtype=bool)
    policy.act(boards)
    with pytest.raises(ValueError, match=r"reward: .*expected act\(observation, reward\)"):
        policy.act(boards)
    with pytest.raises(ValueError, match="expected 3 numbers, got 2"):
        policy.act(boards, [0.0, 1.0])
    with pytest.raises(ValueError, match="expected a batch of 3, as before, got 2"):
        policy.act(boards[:2], 0.0)
    with pytest.raises(ValueError, match="expected 3 flags, got 1"):
        policy.reset(True)
    policy.reset()
    assert policy.act(boards[:2]).shape == (2,)


def test_a_stranger_s_module_is_imported_with_trust_only(tmp_path, monkeypatch):
    options = {**SMALL, "env.name": "test_own_game:summing", "out": str(tmp_path)}
    folder = cerl.train("game/ddqn", options)
    assert cerl.load(folder).act([0.5, 0.0]) in (0, 1)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(ConfigError, match="import the module test_own_game .*--trust"):
        cerl.load(folder)
    with pytest.raises(ConfigError, match="import the module test_own_game .*--trust"):
        cerl.resume(folder)
    assert cerl.load(folder, trusted=True).act([0.5, 0.0]) in (0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["catch", "gru", "point_mass"])
def test_a_run_of_a_cpu_acts_on_a_gpu(run, name):
    policies = [cerl.load(run(name), device=device) for device in ("cpu", "cuda")]
    spec = policies[0].spec
    seen = torch.rand(4, *spec.observation) < 0.3
    ours, theirs = (policy.act(seen.to(spec.dtype)) for policy in policies)
    assert theirs.device.type == "cpu"
    assert torch.allclose(ours.float(), theirs.float(), atol=1e-2)
    assert policies[1].act(seen.to("cuda", spec.dtype), 0.0).device.type == "cuda"


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = (ROOT / "docs" / "python.md").read_text()
    files = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL)
    for name, code in files:
        Path(name).write_text(code)
    blocks = re.findall(r"```python\n(?!# \w+\.py\n)(.*?)```", page, re.DOTALL)
    assert files and len(blocks) > 3
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
    finally:
        for name, _ in files:
            sys.modules.pop(name.removesuffix(".py"), None)
    assert 0 < names["total"] <= 500
