"""Device-resident games of the user's own: found, checked against `Game`, and played."""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cerl import envs, training
from cerl.config import (
    CatchEnv,
    ConfigError,
    GameEnv,
    MemoryEnv,
    MinAtarEnv,
    PointMassEnv,
    load,
    preset,
)
from cerl.config.memory_tasks import TASKS
from cerl.envs import _rules
from cerl.envs.own_game import check_game, own_game
from cerl.envs.resident import Game, Resident
from cerl.evaluate_run import evaluate_run
from cerl.record import checkpoint
from cerl.wiring import assemble

CORRIDOR = """
from typing import NamedTuple
import torch
from torch import Tensor
from cerl.envs.resident import Game

class State(NamedTuple):
    place: Tensor  # [G] int64

def corridor(*, length: int = 3) -> Game:
    def reset(u):
        return State((u[:, 0] * 0).long())

    def step(state, action, u):
        place = (state.place + 2 * action - 1).clamp(min=0)
        return State(place), (place == length).float(), place == length

    def observe(state):
        return torch.arange(length + 1, device=state.place.device) == state.place[:, None]

    return Game(reset, step, observe, 0, 1, (length + 1,), actions=(0, 1))

def failing(*, why):
    raise KeyError(why)

number = 5
"""


@pytest.fixture
def my_games(tmp_path, monkeypatch):
    """The current folder holds a module of games."""
    (tmp_path / "my_games.py").write_text(CORRIDOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_games", None)


def test_a_function_of_one_s_own_module_makes_the_rules(my_games):
    game = own_game("my_games:corridor", {"length": 2})
    env = Resident(
        game, name="corridor", envs=2, sticky=0.0, time_limit=0, seeds=[3], salt=0, device="cpu"
    )
    assert env.reset().obs.tolist() == [[[True, False, False]] * 2]
    right_and_left = torch.tensor([[1, 0]])
    env.step(right_and_left)
    step = env.step(right_and_left)
    assert step.obs.tolist() == [[[False, False, True], [True, False, False]]]
    assert step.reward.tolist() == [[1, 0]] and step.terminated.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("corridor", {}, ValueError, "expected module:function, .* got 'corridor'"),
        ("my_games:", {}, ValueError, "expected module:function"),
        ("my_games:coridor", {}, ValueError, r"no function 'coridor' \(did you mean corridor\?\)"),
        ("my_games:number", {}, ValueError, "no function 'number'"),
        ("no_games:corridor", {}, ImportError, "no module no_games in the current folder"),
        (
            "my_games:corridor",
            {"lenght": 2},
            ValueError,
            r"takes no argument 'lenght' \(did you mean length\?\); .*accepts length=3",
        ),
        (
            "my_games:failing",
            {"why": "odd"},
            RuntimeError,
            "failing failed .KeyError: 'odd'.*'why'",
        ),
        ("my_games:State", {"place": 1}, RuntimeError, "a cerl.envs.resident.Game, got State"),
    ],
)
def test_what_cannot_be_made_says_why(my_games, name, arguments, error, message):
    with pytest.raises(error, match=message):
        own_game(name, arguments)


class State(NamedTuple):
    sum: Tensor  # [G] float32
    time: Tensor  # [G] int64


class Other(NamedTuple):
    sum: Tensor
    time: Tensor


def reset(u: Tensor) -> State:
    return State(u[:, 0], torch.zeros_like(u[:, 0], dtype=torch.int64))


def step(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    total, time = state.sum + action * u[:, 0], state.time + 1
    return State(total, time), total, time == 3


def observe(state: State) -> Tensor:
    return torch.stack([state.sum, state.time], -1)


RULES = Game(reset, step, observe, 1, 1, (2,), actions=(0, 1), dtype=torch.float32)


def summing() -> Game:
    """For `test_envs_contract.py`, which plays it as a user's own game."""
    return RULES


def in_place(state, action, u):
    state.time.add_(1)
    return step(state, action, u)


def random(state, action, u):
    state, reward, terminal = step(state, action, u)
    return state, reward + torch.rand(()), terminal


def mixing(state, action, u):
    state, reward, terminal = step(state, action, u)
    return state, reward - reward.mean(), terminal


def branching(state, action, u):
    return step(state, action, u) if state.sum.min() < 2 else step(state, action, 2 * u)


def on_the_cpu(state, action, u):
    state, reward, terminal = step(state, action, u)
    return state, reward * torch.ones(len(u)), terminal


def test_rules_that_keep_the_contract_pass_and_leave_torch_s_random_numbers_alone():
    before = torch.get_rng_state()
    check_game(RULES, name="mine")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": -1}, r"whole numbers, got tuple\(0: -1, "),
        ({"observation": (0,)}, "observation of whole numbers"),
        ({"observation": ()}, "observation of whole numbers"),
        ({"dtype": torch.int64}, r"observations of .*float32, got torch.int64"),
        ({"components": 1}, "either action ids or components"),
        ({"actions": ()}, "either action ids or components"),
        ({"observation": (3,)}, r"an observation \[3, 3\] of torch.float32, got \[3, 2\]"),
        (
            {"dtype": torch.bool},
            r"an observation \[3, 2\] of torch.bool, got \[3, 2\] of .*float32",
        ),
        ({"reset": lambda u: u}, r"NamedTuple of tensors \[3, ...\], got \[3, 1\]"),
        ({"reset": lambda u: State(u[0], u[0])}, r"got State\(sum: \[1\] of torch.float32"),
        ({"reset": lambda u: u[:, 7]}, "reset of mine failed .IndexError"),
        ({"step": lambda *_: 1}, r"step to return \(state, reward, terminal\), got 1"),
        (
            {"step": lambda s, a, u: (Other(*s), s.sum, s.sum > 0)},
            r"like that of reset, State\(sum.*, got Other\(",
        ),
        (
            {"step": lambda s, a, u: (State(s.sum.double(), s.time), s.sum, s.sum > 0)},
            r"got State\(sum: \[3\] of torch.float64",
        ),
        ({"step": lambda s, a, u: (s, s.time, s.sum > 0)}, r"a reward \[3\] of .*, got .*int64"),
        ({"step": lambda s, a, u: (s, s.sum, s.sum)}, r"a terminal \[3\] of torch.bool, got"),
        ({"observe": lambda state: state.nothing}, "observe of mine failed .AttributeError"),
        ({"step": in_place}, "a step of mine changed the field time"),
        ({"step": random}, "give other numbers when the same games are played again"),
        ({"step": mixing}, "other numbers when the same games are played without the others"),
        ({"step": branching}, "on tensors without data .*no Python branch may depend"),
        ({"step": on_the_cpu}, "on the device of the arguments"),
    ],
)
def test_rules_that_break_the_contract_are_refused(changes, message):
    with pytest.raises(RuntimeError, match=message):
        check_game(RULES._replace(**changes), name="mine")


@pytest.mark.parametrize(
    "config",
    [
        CatchEnv(),
        *(MinAtarEnv(name=name) for name in ("asterix", "breakout", "freeway", "seaquest")),
        MinAtarEnv(name="space_invaders", full_actions=True),
        PointMassEnv(),
        PointMassEnv(walls=False),
        *(MemoryEnv(name=name) for name in TASKS if not name.endswith(("Medium", "Hard"))),
    ],
    ids=lambda config: config.name,
)
def test_the_games_of_this_package_keep_the_contract(config):
    check_game(_rules(config)[0], name=config.name)


SMALL = {
    **{"device": "cpu", "seeds": (3,), "net.hidden": (16,), "replay.start": 40, "env.envs": 2},
    **{"schedule.steps": 200, "schedule.target_every": 20, "explore.hold": 40},
    **{"eval.every": 100, "eval.episodes": 2, "eval.time_limit": 20, "log.every": 100},
}


def test_a_config_names_the_function_and_its_arguments(my_games):
    options = {"env.name": "my_games:corridor", "env.kwargs": {"length": 4}, "env.time_limit": 9}
    config = load("game/ddqn", options)
    assert config.env.title == "my_games:corridor-length=4" and config.env.longest == 9
    env = envs.make(config.env, seeds=[0], salt=0, device="cpu")
    assert env.spec.observation == (5,) and env.spec.resident
    steps = [env.reset(), *(env.step(torch.zeros(1, 4, dtype=torch.int64)) for _ in range(9))]
    assert [bool(step.truncated.any()) for step in steps] == [False] * 9 + [True]


@pytest.mark.parametrize("name", ["corridor", "my_games:", ":corridor", "my games:corridor"])
def test_a_config_refuses_a_name_without_module_or_function(name):
    with pytest.raises(ConfigError, match="env.name: expected module:function, .* got"):
        load("game/ddqn", {"env.name": name})


def test_no_action_of_another_kind_is_learnt(my_games):
    config = load("game/sac", {"env.name": "my_games:corridor", **{"device": "cpu"}})
    with pytest.raises(
        ValueError, match="expected agent dqn or quantile .for example a preset game/ddqn"
    ):
        assemble(config)


def test_a_game_of_one_s_own_is_trained_stopped_resumed_and_evaluated(my_games, tmp_path):
    options = {**SMALL, "env.name": "my_games:corridor", "env.time_limit": 30}
    whole = training.train(load("game/ddqn", {**options, "out": str(tmp_path / "whole")}))
    halves = {**options, "out": str(tmp_path / "halves"), "schedule.steps": 100}
    folder = training.train(load("game/ddqn", halves))
    training.resume(folder, changes={"schedule.steps": 200})
    nets = [checkpoint.load(one).state["learner"]["net"] for one in (whole, folder)]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    (result,) = evaluate_run(folder, episodes=3).values()
    assert result.returns.shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("own", "ours", "changes"),
    [
        ("game/ddqn", "catch/ddqn", {}),
        ("game/sac", "point_mass/sac", {"schedule.target_every": 1_000}),
    ],
)
def test_rules_train_the_same_bits_by_either_family(own, ours, changes, tmp_path):
    """A game that a function returns is the game of the package, to the last bit."""
    options = {**SMALL, **changes}
    board = {"env.columns": 5} if ours == "catch/ddqn" else {}
    nets = []
    for name, more in ((own, {}), (ours, board)):
        folder = training.train(load(name, {**options, **more, "out": str(tmp_path / name)}))
        nets.append(checkpoint.load(folder).state["learner"]["net"])
    assert nets[0].keys() == nets[1].keys()
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_presets_of_own_games_differ_from_those_of_ours_by_the_environment_alone():
    for own, ours in (("game/ddqn", "catch/ddqn"), ("game/sac", "point_mass/sac")):
        trees = [load(name).model_dump(exclude={"env", "preset"}) for name in (own, ours)]
        assert trees[0] == trees[1]
    assert set(GameEnv.examples.values()) <= set(preset.presets())
