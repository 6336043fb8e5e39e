"""Gymnasium: against its own SyncVectorEnv, saved and restored bit for bit, and bad simulators."""

import io

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gymnasium import spaces

from cerl import envs, train
from cerl.checkpoint import CheckpointError
from cerl.config import AtariEnv, GymEnv, load
from cerl.data import Step
from cerl.envs.gym import Gym, builtin_ids
from cerl.envs.host import simulator_seeds

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
    with pytest.warns(RuntimeWarning, match="Probe-v0, seed 0, environment 0: .*episode is cut"):
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
    message = "Probe-v0, seed 7, environment 0: expected a finite observation, got .*nan"
    with pytest.raises(RuntimeError, match=message):
        env.step(torch.zeros(2, 2, dtype=torch.int64))


def test_a_reward_that_is_not_finite_names_the_simulator(probe):
    probe(spaces.Box(-1, 1, (1,)), [np.zeros(1)], rewards=(0.0, float("inf")))
    env = build(seeds=[7, 9], envs=2)
    env.reset()
    env._envs[3].unwrapped.time = 1  # pyright: ignore[reportAttributeAccessIssue]
    message = "Probe-v0, seed 9, environment 1: expected a finite reward, got inf"
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
            "needs a package that is missing: No module named 'no_such_module'",
        ),
    ],
)
def test_an_id_that_cannot_be_used_says_why(name, error, message):
    with pytest.raises(error, match=message):
        build(name)


def test_observations_that_are_no_numbers_are_refused(probe):
    probe(spaces.Text(5), ["a"])
    with pytest.raises(
        ValueError, match=r"expected observations of numbers and fixed size, got Text"
    ):
        build()


def test_an_id_with_a_module_imports_it_first(tmp_path, monkeypatch):
    code = (
        "import gymnasium\n"
        "gymnasium.register('Given-v0',"
        " entry_point='gymnasium.envs.classic_control.cartpole:CartPoleEnv')\n"
    )
    (tmp_path / "module_with_an_id.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    env = build("module_with_an_id:Given-v0")
    gymnasium.registry.pop("Given-v0")
    assert env.spec.name == "module_with_an_id:Given-v0" and env.reset().obs.shape == (1, 1, 4)


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


def test_sac_learns_from_images(tmp_path):
    """Random pushes score about -4, no pushes as well."""
    gymnasium.register("Dot-v0", entry_point=lambda **_: Dot())
    options = {
        "out": str(tmp_path),
        "device": "cpu",
        "env": {"name": "Dot-v0", "envs": 4},
        "net": {"channels": (4,), "kernels": (3,), "strides": (2,), "scale": 255.0, "stack": 2}
        | {"hidden": (32, 32)},
        "ensemble": {"members": 2, "heads": "cerl"},
        "replay": {"batch": 32, "start": 200},
        "explore.hold": 200,
        "schedule": {"steps": 2_400, "update_every": 4},
        "eval": {"every": 2_400},
    }
    try:
        folder = train.train(load("gym/pendulum", options))
    finally:
        gymnasium.registry.pop("Dot-v0")
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    scores = [row["return"] for row in rows if row["policy"] == "individual_mode"]
    assert len(scores) == 2 and min(scores) > -2.0
