"""Device-resident games of the user's own: found, checked against `Game`, and played."""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cerl.config import CatchEnv, MemoryEnv, MinAtarEnv, PointMassEnv
from cerl.config.memory_tasks import TASKS
from cerl.envs import _rules
from cerl.envs.own_game import check_game, own_game
from cerl.envs.resident import Game, Resident

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
