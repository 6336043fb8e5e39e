"""Gymnasium: compared with its SyncVectorEnv; saving and restoring to the bit; bad simulators."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gymnasium import spaces

import cerl
from cerl import envs, training
from cerl.config import AtariEnv, GymEnv, load
from cerl.data import Step
from cerl.envs.gym import Gym, builtin_ids
from cerl.envs.host import simulator_seeds
from cerl.own_code import import_module
from cerl.state import CheckpointError

BYTES = spaces.Box(0, 255, (1, 2), np.uint8)
# Gymnasium takes flags, its annotation of dtype does not.
FLAGS = spaces.Box(0, 1, (2,), np.bool_)  # pyright: ignore


class Probe(gymnasium.Env):
    """Shows what it is told to; episodes end as `ends` says, by step number."""

    def __init__(self, space, values, rewards=(0.0,), ends=None, actions=None):
        self.observation_space = space
        self.action_space = actions or spaces.Discrete(2)
        self.values, self.rewards, self.ends = values, rewards, ends or {}
        self.time, self.noise = 0, 0.0
        self.taken = []

    def _value(self):
        return self.values[self.time % len(self.values)]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.noise = 0, self.np_random.random()
        return self._value(), {}

    def step(self, action):
        self.time += 1
        self.taken.append(action)
        reward = self.rewards[(self.time - 1) % len(self.rewards)]
        return self._value(), reward, *self.ends.get(self.time, (False, False)), {}


@pytest.fixture
def probe():
    """Registers a Probe as Probe-v0."""

    def register(*args, **kwargs):
        gymnasium.register("Probe-v0", entry_point=lambda **_: Probe(*args, **kwargs))

    yield register
    gymnasium.registry.pop("Probe-v0", None)


def build(name="Probe-v0", seeds=(0,), salt=0, **options) -> Gym:
    return Gym(GymEnv(name=name, **options), seeds=seeds, salt=salt, device="cpu")


def random_actions(env: Gym, steps: int, *, seeds: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    shape = (steps, seeds, env.spec.envs)
    if env.spec.continuous:
        return torch.from_numpy(rng.uniform(-1, 1, (*shape, env.spec.actions))).float()
    return torch.from_numpy(rng.integers(0, env.spec.actions, shape))


def act(*actions: int) -> torch.Tensor:
    return torch.tensor([actions])


def same(a: Step, b: Step) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "limit"), [("CartPole-v1", 0), ("Acrobot-v1", 23)])
def test_steps_equal_gymnasium_s_own_vector_environment(name, limit):
    env = build(name, seeds=[7, 2], envs=3, time_limit=limit)
    kwargs = {"max_episode_steps": limit} if limit else {}
    theirs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(name, **kwargs)] * 6)
    seeds = simulator_seeds([7, 2], salt=0, envs=3)
    obs, _ = theirs.reset(seed=seeds.tolist())
    assert np.array_equal(env.reset().obs.flatten(0, 1), obs)
    ends = 0
    for action in random_actions(env, 200, seeds=2):
        step = env.step(action)
        obs, reward, terminated, truncated, _ = theirs.step(action.flatten().numpy())
        assert np.array_equal(step.obs.flatten(0, 1), obs)
        assert np.array_equal(step.reward.flatten(), reward.astype(np.float32))
        assert np.array_equal(step.terminated.flatten(), terminated)
        assert np.array_equal(step.truncated.flatten(), truncated)
        ends += int((terminated | truncated).sum())
    assert ends > 6
    theirs.close()


@pytest.mark.parametrize("name", builtin_ids())
def test_a_saved_simulator_goes_on_bit_for_bit(name):
    env = build(name, seeds=[3, 4], envs=2, time_limit=25)
    assert env.spec.exact_state
    actions = random_actions(env, 110, seeds=2)
    env.reset()
    for action in actions[:31]:
        env.step(action)
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    restored = build(name, seeds=[3, 4], envs=2, time_limit=25)
    assert restored.load_state_dict(torch.load(file, weights_only=True)) is None
    ends = 0
    for action in actions[31:]:
        step = env.step(action)
        assert same(step, restored.step(action))
        ends += int((step.terminated | step.truncated).sum())
    assert ends >= 8
    assert same(env.reset(), restored.reset())


ROBOTS = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "Reacher", "Swimmer")
ROBOTS += ("InvertedDoublePendulum", "InvertedPendulum", "Pusher", "Walker2d")


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "Ant-v5",
        "HalfCheetah-v5",
        "Humanoid-v4",
        *(
            pytest.param(f"{robot}-{version}", marks=pytest.mark.slow)
            for robot in ROBOTS
            for version in ("v4", "v5")
            if f"{robot}-{version}" != "Pusher-v4"  # needs MuJoCo 2
        ),
    ],
)
def test_a_robot_goes_on_bit_for_bit(name):
    pytest.importorskip("mujoco")
    env, restored = build(name, time_limit=40), build(name, time_limit=40)
    assert env.spec.exact_state
    actions = random_actions(env, 120, seeds=1)
    env.reset()
    for start in (0, 17, 40, 70):
        file = io.BytesIO()
        torch.save(env.state_dict(), file)
        assert file.tell() < 20_000
        file.seek(0)
        assert restored.load_state_dict(torch.load(file, weights_only=True)) is None
        for action in actions[start : start + 30]:
            assert same(env.step(action), restored.step(action))
        for action in actions[start + 30 : start + 33]:
            env.step(action)


def test_a_saved_state_does_not_change_with_its_simulator():
    env = build("CartPole-v1")
    env.reset()
    state = env.state_dict()
    going_on = [env.step(act(1)) for _ in range(5)]
    assert env.load_state_dict(state) is None
    again = [env.step(act(1)) for _ in range(5)]
    assert all(same(a, b) for a, b in zip(going_on, again, strict=True))


def test_a_state_of_another_number_of_simulators_is_refused():
    env, other = build("CartPole-v1", envs=2), build("CartPole-v1", envs=3)
    env.reset()
    with pytest.raises(CheckpointError, match="expected a tensor .2, 3. of bool"):
        other.load_state_dict(env.state_dict())


def test_a_simulator_that_may_hide_state_starts_new_episodes_with_new_seeds(probe):
    probe(spaces.Box(-1, 1, (2,)), [np.zeros(2, np.float32)])
    env = build()
    assert not env.spec.exact_state
    env.reset()
    assert env.state_dict() == {"generation": 0}
    before = env._envs[0].unwrapped.noise  # pyright: ignore[reportAttributeAccessIssue]
    env.step(act(0))
    first = env.load_state_dict(env.state_dict())
    assert first is not None and not first.terminated.any()
    assert env._envs[0].unwrapped.noise != before  # pyright: ignore[reportAttributeAccessIssue]
    assert env.state_dict() == {"generation": 1}


def test_a_wrapper_with_a_state_of_its_own_makes_a_simulator_inexact():
    def wrapped(**_):
        return gymnasium.wrappers.NormalizeObservation(gymnasium.make("CartPole-v1"))

    gymnasium.register("Wrapped-v0", entry_point=wrapped)
    env = build("Wrapped-v0")
    gymnasium.registry.pop("Wrapped-v0")
    assert not env.spec.exact_state and build("CartPole-v1").spec.exact_state


def test_a_seed_plays_the_same_alone_or_among_others_and_no_two_play_alike():
    among = build("CartPole-v1", seeds=[3, 5], envs=2)
    alone, salted = build("CartPole-v1", seeds=[5], envs=2), build("CartPole-v1", seeds=[5], salt=1)
    start = among.reset()
    assert torch.equal(start.obs[1:], alone.reset().obs)
    assert len(torch.cat([start.obs.flatten(0, 1), salted.reset().obs[0]]).unique(dim=0)) == 5
    for action in random_actions(among, 100, seeds=2):
        both, one = among.step(action), alone.step(action[1:])
        assert all(torch.equal(x[1:], y) for x, y in zip(both, one, strict=True))


@pytest.mark.parametrize(
    ("space", "value", "shape", "dtype", "expected"),
    [
        (spaces.Box(-9, 9, (2,), np.float64), np.array([0.5, 2.0]), (2,), torch.float32, [0.5, 2]),
        (BYTES, np.array([[3, 250]], np.uint8), (1, 2), torch.uint8, [[3, 250]]),
        (FLAGS, np.array([True, False]), (2,), torch.bool, [1, 0]),
        (spaces.Box(-9, 9, (2,), np.int64), np.array([-4, 5]), (2,), torch.float32, [-4, 5]),
        (spaces.Box(0, 9, (), np.float32), np.float32(2.5), (1,), torch.float32, [2.5]),
        (spaces.Discrete(3, start=5), np.int64(6), (3,), torch.uint8, [0, 1, 0]),
        (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), (3,), torch.uint8, [1, 0, 1]),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 2]), (5,), torch.uint8, [0, 1, 0, 0, 1]),
        (
            spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(-9, 9, (2,))),
            {"a": 1, "b": np.array([-1.5, 4], np.float32)},
            (4,),
            torch.float32,
            [0, 1, -1.5, 4],
        ),
    ],
    ids=["float64", "uint8", "bool", "int64", "scalar", "discrete", "binary", "multi", "dict"],
)  # fmt: skip
def test_observations_become_one_tensor(probe, space, value, shape, dtype, expected):
    probe(space, [value])
    env = build()
    assert env.spec.observation == shape and env.spec.dtype == dtype
    for step in (env.reset(), env.step(act(0))):
        assert step.obs.dtype == dtype
        assert torch.equal(step.obs[0, 0], torch.tensor(expected, dtype=dtype))


def test_a_terminal_on_the_time_limit_is_not_truncated_and_the_next_step_ignores_its_action(probe):
    values = [np.full(1, t, np.float32) for t in range(5)]
    probe(spaces.Box(0, 9, (1,)), values, rewards=(1.0, 2.0, 3.0), ends={2: (True, False)})
    env = build(time_limit=2)
    steps = [env.reset(), *(env.step(act(1)) for _ in range(4))]
    assert [s.obs.item() for s in steps] == [0, 1, 2, 0, 1]
    assert [s.reward.item() for s in steps] == [0, 1, 2, 0, 1]
    assert [s.terminated.item() for s in steps] == [False, False, True, False, False]
    assert not any(s.truncated.item() for s in steps)
    taken = env._envs[0].unwrapped.taken  # pyright: ignore[reportAttributeAccessIssue]
    assert len(taken) == 3


def test_actions_are_counted_from_the_space_s_start(probe):
    probe(spaces.Box(-1, 1, (1,)), [np.zeros(1)], actions=spaces.Discrete(3, start=-1))
    env = build()
    env.reset()
    for action in range(3):
        env.step(act(action))
    taken = env._envs[0].unwrapped.taken  # pyright: ignore[reportAttributeAccessIssue]
    assert taken == [-1, 0, 1]
    with pytest.raises(ValueError, match=r"in \[0, 3\), got 3 at seed row 0, environment 0"):
        env.step(act(3))


def test_joint_actions_are_counted_row_by_row_from_the_space_s_start(probe):
    space = spaces.MultiDiscrete([2, 3], start=[0, 5])
    probe(spaces.Box(-1, 1, (1,)), [np.zeros(1)], actions=space)
    env = build()
    env.reset()
    assert env.spec.actions == 6
    for action in range(6):
        env.step(act(action))
    taken = env._envs[0].unwrapped.taken  # pyright: ignore[reportAttributeAccessIssue]
    assert [list(pair) for pair in taken] == [[0, 5], [0, 6], [0, 7], [1, 5], [1, 6], [1, 7]]
    assert all(space.contains(pair) for pair in taken)


def test_continuous_actions_are_scaled_flattened_and_given_in_the_space_s_own_type(probe):
    low, high = np.array([[-2.0, 0.0]], np.float32), np.array([[2.0, 0.4]], np.float32)
    probe(spaces.Box(-1, 1, (1,)), [np.zeros(1)], actions=spaces.Box(low, high))
    env = build()
    env.reset()
    assert env.spec.continuous and env.spec.actions == 2
    for action in ([-1.0, -1.0], [1.0, 1.0], [0.5, 0.0]):
        env.step(torch.tensor([[action]]))
    taken = env._envs[0].unwrapped.taken  # pyright: ignore[reportAttributeAccessIssue]
    assert all(action.dtype == np.float32 and action.shape == (1, 2) for action in taken)
    assert np.array_equal(taken[0], low) and np.array_equal(taken[1], high)
    assert np.allclose(taken[2], [[1.0, 0.2]])
    with pytest.raises(
        ValueError, match=r"in \[-1, 1\], got 1.5 at seed row 0, environment 0, comp"
    ):
        env.step(torch.tensor([[[0.0, 1.5]]]))


def test_a_pendulum_equals_gymnasium_s_own_vector_environment():
    env = build("Pendulum-v1", seeds=[7, 2], envs=2, time_limit=30)
    theirs = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make("Pendulum-v1", max_episode_steps=30)] * 4
    )
    seeds = simulator_seeds([7, 2], salt=0, envs=2)
    obs, _ = theirs.reset(seed=seeds.tolist())
    assert np.array_equal(env.reset().obs.flatten(0, 1), obs)
    ends = 0
    for action in random_actions(env, 70, seeds=2):
        step = env.step(action)
        obs, reward, terminated, truncated, _ = theirs.step(2 * action.flatten(0, 1).numpy())
        assert np.array_equal(step.obs.flatten(0, 1), obs)
        assert np.array_equal(step.reward.flatten(), reward.astype(np.float32))
        assert np.array_equal(step.truncated.flatten(), truncated) and not terminated.any()
        ends += int(step.truncated.sum())
    assert ends == 8
    theirs.close()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-np.inf, np.inf, (2,)), "expected bounded actions, got .*inf.* of Probe-v0"),
        (
            spaces.Box(np.zeros(1), np.full(1, np.inf), dtype=np.float64),
            "choose an environment with bounds",
        ),
        (spaces.Box(1.0, 1.0, (2,)), "whose upper bounds are above the lower ones"),
        (spaces.Box(0, 3, (2,), np.int64), "expected discrete actions or a Box of floats, got Box"),
        (spaces.MultiDiscrete([65, 64]), "got MultiDiscrete.*at most 4096 combinations"),
        (spaces.MultiBinary(3), "expected discrete actions or a Box of floats, got MultiBinary"),
    ],
)
def test_actions_that_cannot_be_scaled_are_refused(probe, space, message):
    probe(spaces.Box(-1, 1, (1,)), [np.zeros(1)], actions=space)
    with pytest.raises(ValueError, match=message):
        build()


def test_an_episode_that_diverged_is_cut_where_asked(probe):
    values = [np.array([t, 0.0]) if t != 2 else np.array([np.nan, 0.0]) for t in range(5)]
    probe(spaces.Box(-9, 9, (2,), np.float64), values, rewards=(1.0,))
    env = build(diverged="cut")
    steps = [env.reset(), env.step(act(0))]
    with pytest.warns(
        RuntimeWarning, match="Probe-v0, seed 0, environment 0, agent step 2: .*episode is cut"
    ):
        steps.append(env.step(act(0)))
    steps += [env.step(act(0)) for _ in range(2)]
    assert [s.obs[0, 0, 0].item() for s in steps] == [0, 1, 1, 0, 1]
    assert [s.reward.item() for s in steps] == [0, 1, 0, 0, 1]
    assert [s.truncated.item() for s in steps] == [False, False, True, False, False]
    assert not any(s.terminated.item() for s in steps)


def test_a_restored_simulator_that_diverges_shows_its_last_observation():
    env, restored = (build("CartPole-v1", diverged="cut") for _ in range(2))
    env.reset()
    last = env.step(act(1))
    restored.load_state_dict(env.state_dict())
    restored._envs[0].unwrapped.state = np.full(4, np.nan)  # pyright: ignore
    with pytest.warns(RuntimeWarning, match="CartPole-v1, seed 0"):
        step = restored.step(act(1))
    assert torch.equal(step.obs, last.obs) and step.truncated.item() and not step.terminated.item()


def test_a_policy_that_diverged_ends_its_own_episodes_only():
    env = build("Pendulum-v1", seeds=[3, 4], diverged="cut")
    env.reset()
    action = torch.tensor([[[torch.nan]], [[0.5]]])
    with pytest.warns(RuntimeWarning, match="Pendulum-v1, seed 3, .*expected a finite action"):
        step = env.step(action)
    assert step.truncated.tolist() == [[True], [False]] and step.obs.isfinite().all()
    with pytest.raises(RuntimeError, match="seed 3, .*expected a finite action, got .*nan"):
        other = build("Pendulum-v1", seeds=[3, 4])
        other.reset()
        other.step(action)


def test_an_observation_or_reward_that_is_not_finite_names_the_simulator(probe):
    nan = np.array([0.0, np.nan])
    probe(spaces.Box(-1, 1, (2,), np.float64), [np.zeros(2), nan])
    env = build(seeds=[7, 9], envs=2)
    env.reset()
    message = (
        "Probe-v0, seed 7, environment 0, agent step 1: expected a finite observation, got .*nan"
    )
    with pytest.raises(RuntimeError, match=message):
        env.step(torch.zeros(2, 2, dtype=torch.int64))


def test_a_reward_that_is_not_finite_names_the_simulator(probe):
    probe(spaces.Box(-1, 1, (1,)), [np.zeros(1)], rewards=(0.0, float("inf")))
    env = build(seeds=[7, 9], envs=2)
    env.reset()
    env._envs[3].unwrapped.time = 1  # pyright: ignore[reportAttributeAccessIssue]
    message = "Probe-v0, seed 9, environment 1, agent step 1: expected a finite reward, got inf"
    with pytest.raises(RuntimeError, match=message):
        env.step(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("value", [np.zeros(3, np.uint8), np.full(2, 0.5)])
def test_an_observation_that_contradicts_its_space_is_refused(probe, value):
    probe(spaces.Box(0, 255, (2,), np.uint8), [np.zeros(2, np.uint8), value])
    env = build()
    env.reset()
    with pytest.raises(RuntimeError, match="the simulator contradicts its observation_space"):
        env.step(act(0))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("CartPol-v1", ValueError, r"no environment 'CartPol-v1' \(did you mean CartPole-v"),
        ("CartPole-v99", ValueError, r"no environment 'CartPole-v99' \(did you mean CartPole-v"),
        ("Nowhere/Cart-v1", ValueError, "no environment 'Nowhere/Cart-v1'"),
        ("cart pole", ValueError, r"no environment 'cart pole'"),
        (
            "no_such_module:Cart-v1",
            ImportError,
            r"no module no_such_module in the current folder \(/.*\) or among the installed "
            "packages; run cerl where no_such_module.py lies, or pip install it",
        ),
    ],
)
def test_an_id_that_cannot_be_used_says_why(name, error, message):
    with pytest.raises(error, match=message):
        build(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ALE/Pong-v5", "'ale_py:ALE/Pong-v5', or .* family atari .* with env.name Pong"),
        ("SpaceInvadersNoFrameskip-v4", "'ale_py:SpaceInvadersNoFrameskip-v4'.* SpaceInvaders"),
    ],
)
def test_an_id_of_atari_says_who_registers_it(name, hint, monkeypatch):
    monkeypatch.delitem(gymnasium.registry, name, raising=False)  # another test's ale-py adds it
    with pytest.raises(ValueError, match=hint):
        build(name)


def test_arguments_reach_the_task_s_constructor():
    slippery, sure = build("FrozenLake-v1"), build("FrozenLake-v1", kwargs={"is_slippery": False})
    for env, moves in ((slippery, 3), (sure, 1)):
        table = env._envs[0].unwrapped.P  # pyright: ignore[reportAttributeAccessIssue]
        assert len(table[0][1]) == moves
    hint = r"takes no argument 'slippery' \(did you mean is_slippery\?\)"
    with pytest.raises(ValueError, match=f"FrozenLake-v1 {hint}; .* accepts .*is_slippery=True"):
        build("FrozenLake-v1", kwargs={"slippery": False})
    with pytest.raises(ValueError, match="max_episode_steps .* env.time_limit"):
        build("FrozenLake-v1", kwargs={"max_episode_steps": 3})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("wind"), "KeyError: 'wind'"),
        (AssertionError(), "could not be made .AssertionError"),
        (TypeError("a map is missing"), "a map is missing"),
        (gymnasium.error.Error("no licence"), "Error: no licence"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError"),
    ],
)
def test_a_constructor_that_fails_is_one_sentence_with_its_cause(error, words):
    def entry(wind=1.0):
        raise error

    gymnasium.register("Fails-v0", entry_point=entry)  # pyright: ignore[reportArgumentType]
    try:
        with pytest.raises(
            RuntimeError,
            match=f"Fails-v0, seed 4, environment 0.*{words}.*takes wind=1.0, and env.kwargs gives",
        ) as caught:
            build("Fails-v0", seeds=[4], kwargs={"wind": 2})
    finally:
        gymnasium.registry.pop("Fails-v0")
    assert isinstance(caught.value.__cause__, type(error))


class Old(Probe):
    """Answers as it is told to, whatever gymnasium wants."""

    def __init__(self, at_reset, at_step):
        super().__init__(spaces.Box(0, 9, (2,)), [np.zeros(2)])
        self.at_reset, self.at_step = at_reset, at_step

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.at_reset

    def step(self, action):
        self.time += 1
        if isinstance(self.at_step, Exception) and self.time == 2:
            raise self.at_step
        return self.at_step if self.time == 2 else (np.zeros(2), 0.0, False, False, {})


ZERO = np.zeros(2)
STEP = r"environment 0, agent step 2: .*%s.*step\(action\) has to return .*terminated, truncated"
RESET = r"environment 0, at the start of an episode: .*%s.*reset\(seed=.*\(observation, info\)"


@pytest.mark.parametrize("limit", [0, 9])
@pytest.mark.parametrize(
    ("at_reset", "at_step", "message"),
    [
        (ZERO, None, RESET % "a ndarray of|a ndarray;"),
        ((ZERO, {}), (ZERO, 0.0, False, {}), STEP % "4"),
        ((ZERO, {}), ZeroDivisionError("division by zero"), STEP % "ZeroDivisionError"),
        ((ZERO, {}), KeyError("wind"), STEP % "KeyError: 'wind'"),
        ((ZERO, {}), (ZERO, "oops", False, False, {}), STEP % "the reward .*got 'oops' .str"),
        ((ZERO, {}), (ZERO, np.ones(2), False, False, {}), STEP % "reward to be one number"),
        ((ZERO, {}), (ZERO, None, False, False, {}), STEP % "reward to be one number, got None"),
        ((ZERO, {}), (ZERO, 0.0, "no", False, {}), STEP % "terminated to be"),
        ((ZERO, {}), (ZERO, 0.0, False, 7, {}), STEP % "truncated to be True or False, got 7"),
        ((ZERO, {}), (["a", "b"], 0.0, False, False, {}), STEP % "contradicts its obs"),
    ],
)  # fmt: skip
def test_a_task_that_answers_otherwise_is_one_sentence(at_reset, at_step, message, limit):
    gymnasium.register("Old-v0", entry_point=lambda **_: Old(at_reset, at_step))
    try:
        env = build("Old-v0", seeds=[4], time_limit=limit)
    finally:
        gymnasium.registry.pop("Old-v0")
    with pytest.raises(RuntimeError, match=f"Old-v0, seed 4, {message}") as caught:
        env.reset()
        for _ in range(2):
            env.step(act(0))
    assert caught.value.__cause__ is not None


def test_a_reward_may_be_an_array_of_one_element_and_a_flag_a_number(probe):
    probe(
        spaces.Box(0, 9, (1,)),
        [np.zeros(1)],
        rewards=(np.array([1.5]),),
        ends={1: (np.int64(1), 0)},
    )
    env = build()
    env.reset()
    step = env.step(act(0))
    assert step.reward.item() == 1.5 and step.terminated.item() and not step.truncated.item()


def test_rewards_and_observations_too_large_for_replay_are_seen(probe):
    space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    probe(space, [np.zeros(1)], rewards=(1e39,))
    env = build()
    env.reset()
    with pytest.raises(RuntimeError, match=r"expected a finite reward in float32, got 1e\+39"):
        env.step(act(0))
    gymnasium.registry.pop("Probe-v0")
    probe(space, [np.zeros(1), np.full(1, -1e300)])
    env = build(diverged="cut")
    env.reset()
    with pytest.warns(RuntimeWarning, match="expected a finite observation"):
        step = env.step(act(0))
    assert step.truncated.item() and step.obs.item() == 0


@pytest.mark.parametrize(
    ("space", "start", "value", "word"),
    [
        (BYTES, np.zeros((1, 2), np.uint8), np.array([[3, 300]]), "uint8, got the value 300"),
        (BYTES, np.zeros((1, 2), np.uint8), np.array([[-1, 3]]), "uint8, got the value -1"),
        (FLAGS, np.zeros(2, bool), np.array([1, 2], np.int8), "bool, got the value 2"),
        (spaces.Discrete(3), 0, -1, r"in Discrete\(3\), got -1"),
        (spaces.MultiDiscrete([2, 3]), np.zeros(2, int), np.array([2, 0]), r"in MultiDiscrete"),
        (spaces.MultiBinary(2), np.zeros(2, int), np.array([0, 5]), r"in MultiBinary"),
        (
            spaces.Dict(a=spaces.Box(0, 255, (1,), np.uint8), b=spaces.Box(-9, 9, (1,))),
            {"a": np.zeros(1, np.uint8), "b": np.zeros(1, np.float32)},
            {"a": np.array([256]), "b": np.zeros(1, np.float32)},
            "in Dict",
        ),
        (spaces.Tuple([spaces.Discrete(2)] * 2), (0, 1), (0, 2), "in Tuple"),
    ],
    ids=["above", "below", "bool", "discrete", "multi", "binary", "dict", "tuple"],
)  # fmt: skip
def test_values_outside_of_their_space_are_refused_and_not_wrapped(
    probe, space, start, value, word
):
    probe(space, [start, value])
    env = build(seeds=[4])
    env.reset()
    message = f"Probe-v0, seed 4, environment 0, agent step 1: TypeError: expected .*{word}"
    with pytest.raises(RuntimeError, match=message):
        env.step(act(0))


def test_an_evaluation_cuts_episodes_that_never_end():
    for own, longest, length in ((0, 7, 7), (5, 7, 5), (9, 7, 7)):
        config = GymEnv(name="CliffWalking-v1", time_limit=own)
        env = envs.make(config, seeds=[0], salt=1, device="cpu", longest=longest)
        env.restart(0)
        ends = [env.step(act(0)).truncated.item() for _ in range(length)]
        assert ends == [False] * (length - 1) + [True]
    short = envs.make(GymEnv(name="CartPole-v1"), seeds=[0], salt=1, device="cpu", longest=501)
    assert short.spec.exact_state


def test_observations_that_are_no_numbers_are_refused(probe):
    probe(spaces.Text(5), ["a"])
    with pytest.raises(
        ValueError, match=r"expected observations of numbers and fixed size, got Text"
    ):
        build()


REGISTERS = (
    "import gymnasium, {sibling}\n"
    "gymnasium.register('Given-v0',"
    " entry_point='gymnasium.envs.classic_control.cartpole:CartPoleEnv')\n"
)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The current folder holds tasks_here.py, which registers Given-v0, and what that imports."""
    (tmp_path / "tasks_here.py").write_text(REGISTERS.format(sibling="beside_tasks_here"))
    (tmp_path / "beside_tasks_here.py").write_text("")
    (tmp_path / "later_of_tasks_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield tmp_path
    gymnasium.registry.pop("Given-v0", None)
    for name in [name for name in sys.modules if "tasks_here" in name]:
        del sys.modules[name]


def test_an_id_s_module_is_found_in_the_current_folder(modules):
    before = list(sys.path)
    env = build("tasks_here:Given-v0")
    assert env.spec.name == "tasks_here:Given-v0" and env.reset().obs.shape == (1, 1, 4)
    # What the task imports later is found, and nothing that is installed is replaced.
    assert sys.path == [*before, str(modules)]
    importlib.import_module("later_of_tasks_here")


def test_an_installed_module_leaves_the_search_path_alone(modules):
    before = list(sys.path)
    import_module("gymnasium.envs.toy_text", key="env.name")
    with pytest.raises(ImportError, match=f"no module nowhere_here in .*{modules}"):
        import_module("nowhere_here", key="env.name")
    assert sys.path == before


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import nowhere_here", ImportError, "module tasks_here needs a package .*nowhere_here"),
        ("1 / 0", RuntimeError, "importing tasks_here failed .ZeroDivisionError: division by zero"),
        ("def", RuntimeError, "importing tasks_here failed .SyntaxError"),
    ],
)
def test_a_module_that_fails_says_why(modules, code, error, message):
    (modules / "tasks_here.py").write_text(code)
    with pytest.raises(error, match=message):
        build("tasks_here:Given-v0")


def test_a_module_whose_name_is_taken_is_not_confused_with_the_other(modules):
    (modules / "gymnasium.py").write_text("")
    with pytest.raises(RuntimeError, match="already in use from .*give the file another name"):
        build("gymnasium:Given-v0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [["-m", "cerl"], ["-c", "from cerl.__main__ import main; main()"]]
)
def test_every_way_of_starting_finds_the_module(modules, start):
    """`python -m cerl` has the current folder on its path, the command `cerl` has not."""
    (modules / "json.py").write_text("raise SystemExit('the current folder was searched first')")
    words = ["train", "gym/cartpole", "--env.name", "tasks_here:Given-v0", "--schedule.steps", "9"]
    small = ["--replay.start", "8", "--replay.batch", "4", "--out", "runs", "--device", "cpu"]
    flags = [] if start[0] == "-m" else ["-P"]
    # No folder of cerl's own hides in the variable, and cerl itself is found.
    path = {**os.environ, "PYTHONPATH": str(Path(cerl.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *flags, *start, *words, *small], env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (modules / "runs").iterdir()
    assert (folder / "finished").is_file()


def test_make_builds_the_family_that_a_config_names():
    env = envs.make(GymEnv(name="CartPole-v1"), seeds=[0], salt=0, device="cpu")
    assert isinstance(env, Gym) and env.spec.actions == 2
    with pytest.raises(TypeError, match="got dict"):
        envs.make({"family": "gym"}, seeds=[0], salt=0, device="cpu")  # pyright: ignore
    with pytest.raises((ValueError, ImportError), match=r"Atari game|cerl\[atari\]"):
        envs.make(AtariEnv(name="Pongg"), seeds=[0], salt=0, device="cpu")


def test_the_list_of_ids_can_be_built_and_has_the_newest_versions():
    ids = envs.available()["gym"]
    assert {"CartPole-v1", "FrozenLake-v1", "Acrobot-v1", "Pendulum-v1"} <= set(ids)
    assert not {"CartPole-v0", "HalfCheetah-v5"} & set(ids)
    for name in ids:
        assert build(name).reset().obs.shape[:2] == (1, 1)


class Dot(gymnasium.Env):
    """A bright bar on a dark screen, moved to and fro; return 0 where it stays in the middle."""

    observation_space = spaces.Box(0, 255, (6, 8), np.uint8)
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def _screen(self):
        distance = np.abs(np.linspace(-1, 1, 8) - self.place)
        bar = (255 * np.clip(1 - 2 * distance, 0, 1)).astype(np.uint8)
        return np.tile(bar, (6, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-1, 1), 0
        return self._screen(), {}

    def step(self, action):
        self.place = float(np.clip(self.place + 0.4 * action[0], -1, 1))
        self.time += 1
        return self._screen(), -abs(self.place), False, self.time == 8, {}


@pytest.mark.slow
def test_sac_learns_from_images(tmp_path):
    """Random pushes score about -4, no pushes as well."""
    gymnasium.register("Dot-v0", entry_point=lambda **_: Dot())
    options = {
        "out": str(tmp_path),
        "device": "cpu",
        "env": {"name": "Dot-v0", "envs": 4},
        "net": {"channels": (4,), "kernels": (3,), "strides": (2,), "scale": 255.0}
        | {"hidden": (32, 32)},
        "encoder": {"frames": 2},
        "ensemble": {"members": 2, "heads": "cerl"},
        "replay": {"batch": 32, "start": 200},
        "explore.hold": 200,
        "schedule": {"steps": 2_400, "update_every": 4},
        "eval": {"every": 2_400},
    }
    try:
        folder = training.train(load("gym/pendulum", options))
    finally:
        gymnasium.registry.pop("Dot-v0")
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    scores = [row["return"] for row in rows if row["policy"] == "individual_mode"]
    assert len(scores) == 2 and min(scores) > -2.0


def test_a_task_that_cannot_be_closed_is_said_and_closes_the_others(monkeypatch):
    closed = []

    def close(self):
        closed.append(self)
        raise AttributeError("no viewer [/x]")

    env = build("CartPole-v1", envs=2)
    monkeypatch.setattr("gymnasium.envs.classic_control.cartpole.CartPoleEnv.close", close)
    with pytest.warns(RuntimeWarning, match=r"closing it raised AttributeError: no viewer \[/x\]"):
        env.close()
    assert len(closed) == 2


def test_a_lake_drawn_without_a_seed_is_not_called_exact():
    assert build("FrozenLake-v1").spec.exact_state
    drawn = envs.make(
        GymEnv(name="FrozenLake-v1", kwargs=(("map_name", None),)), seeds=(0,), salt=0, device="cpu"
    )
    assert not drawn.spec.exact_state
