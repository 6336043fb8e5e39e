"""Continuous control: EnvPool against gymnasium and dm_control; limits, terminals, bad names."""

import io
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch

from cerl import envs
from cerl.config import DmcEnv, MujocoEnv
from cerl.config.control_tasks import ROBOTS, SUITE
from cerl.data import Step
from cerl.envs import control as control_module
from cerl.envs.control import Control
from cerl.envs.dmc import DmControl, envpool_suite
from cerl.envs.mujoco import envpool_robots
from cerl.state import CheckpointError

pytest.importorskip("envpool")


def robot(name="HalfCheetah-v4", seeds=(0,), **options) -> Control:
    config = MujocoEnv(**{"name": name, "threads": 1, **options})
    return Control(config, seeds=seeds, salt=0, device="cpu")


def task(name="cheetah-run", seeds=(0,), **options) -> Control:
    config = DmcEnv(**{"name": name, "threads": 1, **options})
    return Control(config, seeds=seeds, salt=0, device="cpu")


def random_actions(env: Control, steps: int, *, seeds: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (steps, seeds, env.spec.envs, env.spec.actions)
    return torch.rand(shape, generator=generator) * 2 - 1


def play(env: Control, actions: torch.Tensor) -> list[Step]:
    return [env.reset(), *(env.step(action) for action in actions)]


# Gym's robots against gymnasium's own, from the same state with the same actions.


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize("name", ["HalfCheetah-v4", "HalfCheetah-v5", "Hopper-v4", "Walker2d-v5"])
def test_robots_move_and_are_paid_as_in_gymnasium(name):
    pytest.importorskip("mujoco")
    ours = envpool_robots(MujocoEnv(name=name), seeds=[3], threads=1)
    theirs = gymnasium.make(name, disable_env_checker=True).unwrapped
    start = ours._pool.reset()[0][0]
    theirs.reset(seed=0)
    speeds = theirs.model.nv  # pyright: ignore
    assert start.shape == (2 * speeds - 1,)  # every place but the first, every speed
    places = np.concatenate([[0.0], start[:-speeds]])
    theirs.set_state(places, start[-speeds:])  # pyright: ignore
    rng = np.random.default_rng(0)
    ended = steps = 0
    for _ in range(12):
        action = rng.uniform(-1, 1, theirs.action_space.shape)
        obs, reward, terminal = ours.step(action[None])
        obs_, reward_, terminal_, _, _ = theirs.step(action)
        np.testing.assert_allclose(obs[0], obs_.astype(np.float32), rtol=1e-5, atol=1e-6)
        assert reward[0] == pytest.approx(reward_, abs=1e-5)
        assert terminal[0] == terminal_
        steps += 1
        if terminal_:
            ended = 1
            break
    assert ended or steps == 12
    ours.close()
    theirs.close()


def test_the_cheetah_is_paid_for_speed_less_control():
    # The place along the track is hidden, so speed over a step is the change of an info.
    simulators = envpool_robots(MujocoEnv(), seeds=range(5), threads=1)
    simulators.reset(None)
    place = simulators._pool.step(np.zeros((5, 6)))[4]["x_position"]  # at a reset it is unset
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = rng.uniform(-1, 1, (5, 6))
        _, reward, _, _, info = simulators._pool.step(action)
        speed = (info["x_position"] - place) / 0.05
        np.testing.assert_allclose(reward, speed - 0.1 * (action**2).sum(-1), atol=1e-5)
        place = info["x_position"]
    simulators.close()


@pytest.mark.parametrize(
    ("name", "observation", "actions"),
    [
        ("HalfCheetah-v4", 17, 6),
        ("Hopper-v4", 11, 3),
        ("Walker2d-v4", 17, 6),
        ("Ant-v4", 27, 8),
        ("Humanoid-v4", 376, 17),
        ("Ant-v5", 105, 8),
        ("Humanoid-v5", 348, 17),
    ],
)
def test_sizes_of_robots(name, observation, actions):
    env = robot(name)
    assert env.spec.observation == (observation,) and env.spec.actions == actions
    assert env.spec.continuous and env.spec.dtype == torch.float32
    env.close()


def test_every_listed_robot_is_envpool_s():
    from envpool.mujoco.gym.registration import gym_mujoco_envs

    theirs = {f"{name}-{v}" for name, versions, _ in gym_mujoco_envs for v in versions}
    assert set(ROBOTS) == {name for name in theirs if name[-2:] in ("v4", "v5")}
    assert envs.available()["mujoco"] == list(ROBOTS)


# Episodes.


def test_an_id_s_own_time_limit_truncates():
    env = robot("Reacher-v5", envs=2)
    steps = play(env, random_actions(env, 103))
    assert [t for t, step in enumerate(steps) if step.truncated.any()] == [50, 101]
    assert steps[50].truncated.all() and not any(step.terminated.any() for step in steps)
    assert not steps[51].reward.any() and steps[52].reward.all()
    env.close()


@pytest.mark.parametrize("margin", [0, 1])
def test_a_terminal_on_the_time_limit_is_no_truncation(margin):
    free = robot("Hopper-v4")
    actions = random_actions(free, 100)
    steps = play(free, actions)
    end = next(t for t, step in enumerate(steps) if step.terminated.any())
    assert end > 2 and not any(step.truncated.any() for step in steps)
    free.close()

    limited = robot("Hopper-v4", time_limit=end - margin)
    cut = play(limited, actions[: end + 3])
    limited.close()
    last = cut[end - margin]
    assert last.terminated.item() == (margin == 0) and last.truncated.item() == (margin == 1)
    assert torch.equal(last.obs, steps[end - margin].obs)
    # The simulator falls over while it waits for its reset: its new episode lasts all the same.
    for step in cut[end - margin + 1 :]:
        assert not step.terminated.any() and not step.truncated.any()
    first = cut[end - margin + 1]
    assert not first.reward.any() and (first.obs[..., 0] - 1.25).abs() < 0.01


def test_environments_end_one_by_one_and_the_others_do_not_notice():
    env, alone = robot("Hopper-v5", envs=4, time_limit=20), robot("Hopper-v5", time_limit=20)
    actions = random_actions(env, 200)
    several = play(env, actions)
    single = play(alone, actions[:, :, :1])
    ends = torch.stack([step.terminated | step.truncated for step in several])[:, 0]  # [T, E]
    assert (ends.sum(1) == 1).any() and torch.stack([s.truncated for s in several]).any()
    for both, one in zip(several, single, strict=True):
        assert all(torch.equal(x[:, :1], y) for x, y in zip(both, one, strict=True))
    env.close()
    alone.close()


def test_threads_do_not_change_the_numbers():
    one, two = robot(envs=6, threads=1), robot(envs=6, threads=2)
    actions = random_actions(one, 30)
    for a, b in zip(play(one, actions), play(two, actions), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    one.close()
    two.close()


def test_envpool_starts_new_episodes_with_new_numbers_and_says_so():
    env = robot(envs=2)
    assert not env.spec.exact_state and env.note == ""
    before = env.reset()
    env.step(random_actions(env, 1)[0])
    first = env.load_state_dict(env.state_dict())
    assert first is not None
    assert not first.reward.any() and not torch.equal(first.obs, before.obs)
    assert env.state_dict() == {"generation": 1} and "EnvPool" in env.note
    env.close()


def test_longest_limits_an_episode_where_the_time_limit_is_above_it():
    ends = []
    for longest in (0, 20, 90):
        config = MujocoEnv(name="Reacher-v5", threads=1)
        env = Control(config, seeds=[0], salt=0, device="cpu", longest=longest)
        steps = play(env, random_actions(env, 60))
        ends.append(next(t for t, step in enumerate(steps) if step.truncated.any()))
        env.close()
    assert ends == [50, 20, 50]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["envpool", "dm_control"])
def test_a_restart_depends_on_its_number_and_not_on_what_was_played(backend):
    pytest.importorskip(backend)
    options = {"backend": backend, "envs": 2, "time_limit": 20}
    used, fresh = (task("reacher-easy", **options) for _ in range(2))
    actions = random_actions(used, 30)
    play(used, actions)
    seven, eight, again = (
        [env.restart(number), *(env.step(action) for action in actions)]
        for env, number in ((used, 7), (used, 8), (fresh, 7))
    )
    for one, other in zip(seven, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(seven[0].obs, eight[0].obs)
    used.close()
    fresh.close()


QUICK = ("finger-turn_hard", "manipulator-insert_peg", "point_mass-hard", "reacher-easy")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in SUITE
        if not name.startswith("lqr-")
    ],
)
def test_tasks_of_dm_control_go_on_bit_for_bit(name):
    # Starts move targets, change gains, raise a terrain: what the model is depends on the episode.
    pytest.importorskip("dm_control")
    env, restored = (task(name, backend="dm_control", time_limit=12) for _ in range(2))
    actions = random_actions(env, 60)
    try:
        play(env, actions[:20])
    except ImportError as error:  # quadruped-escape draws its terrain
        pytest.skip(str(error))
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    assert file.tell() < 20_000
    file.seek(0)
    assert restored.spec.exact_state
    assert restored.load_state_dict(torch.load(file, weights_only=True)) is None
    assert restored.note == ""
    for action in actions[20:]:
        mine, theirs = env.step(action), restored.step(action)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    env.close()
    restored.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["simulators"].update(simulators=[]), "simulators: expected a list of 2"),
        (
            lambda s: s["simulators"]["simulators"][1].update(physics=torch.zeros(3)),
            r"simulators.1.physics: expected a tensor \[\d+\] of float64, got \[3\] of",
        ),
        (
            lambda s: s["simulators"]["simulators"][1]["random"]["state"].update(pos=625),
            r"simulators.1.random.state.pos: expected a whole number from 0 to 624, got 625",
        ),
        (
            lambda s: s["simulators"]["simulators"][1]["drawn"].update(bit_generator="test"),
            "simulators.1.drawn.bit_generator: expected 'MT19937', got 'test'",
        ),
        (
            lambda s: s["simulators"]["simulators"][1]["drawn"].update(gauss=float("nan")),
            "drawn.gauss: expected a finite float, got nan",
        ),
        (lambda s: s.update(gravity=1e300), "expected elapsed, .* got .*gravity"),
        (lambda s: s.update(elapsed=torch.zeros(2)), r"elapsed: expected a tensor \[2\] of int64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_tasks_go_on_as_they_were(change, message):
    pytest.importorskip("dm_control")
    env, undisturbed = (
        task("reacher-easy", backend="dm_control", envs=2, time_limit=9) for _ in range(2)
    )
    actions = random_actions(env, 30)
    want = play(undisturbed, actions)[6:]
    play(env, actions[:3])
    state = env.state_dict()
    for action in actions[3:5]:
        env.step(action)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        env.load_state_dict(state)
    for action, step in zip(actions[5:], want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(env.step(action), step, strict=True))
    env.close()
    undisturbed.close()


def test_a_step_keeps_its_values_while_the_simulators_go_on():
    env = robot()
    first = env.reset()
    copy = first.clone()
    play(env, random_actions(env, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, copy, strict=True))
    env.close()


# Actions and what is not finite.


class Scripted:
    """A back end with bounds of its own, that keeps what it is told and shows what it is given."""

    observation, dtype, limit = (2,), torch.float32, 4
    low, high = np.array([-3.0, 0.0, 1.0]), np.array([3.0, 1.0, 1.5])
    bad: dict[int, tuple[str, float]] = {}

    def __init__(self, config, *, seeds, threads):
        self.count, self.time, self.taken, self.resets = len(seeds), 0, [], []

    def _obs(self):
        return np.full((self.count, 2), self.time, np.float32)

    def reseed(self, seeds):
        pass

    def reset(self, which):
        self.resets.append(which)
        return self._obs() if which is None else self._obs()[which] + 100

    def step(self, action):
        self.time += 1
        self.taken.append(action)
        obs, reward = self._obs(), np.ones(self.count)
        what, value = self.bad.get(self.time, ("", 0.0))
        if what == "obs":
            obs[1, 1] = value
        if what == "reward":
            reward[1] = value
        return obs, reward, np.zeros(self.count, dtype=bool)

    def close(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(control_module, "envpool_robots", Scripted)

    def build(bad=None, **options):
        monkeypatch.setattr(Scripted, "bad", bad or {})
        return robot(seeds=(7, 9), **options)

    return build


def test_actions_are_scaled_to_the_simulator_s_bounds_and_the_ends_are_exact(scripted):
    env = scripted()
    env.reset()
    action = torch.tensor([[[-1.0, -1, -1]], [[1, 1, 1]]])
    env.step(action)
    env.step(torch.tensor([[[0.0, 0, 0]], [[0.5, -0.5, 0.5]]]))
    taken = env._simulators.taken  # pyright: ignore
    assert np.array_equal(taken[0], [[-3, 0, 1], [3, 1, 1.5]])
    assert np.array_equal(taken[1], [[0, 0.5, 1.25], [1.5, 0.25, 1.375]])


def test_actions_of_another_shape_type_or_range_are_refused(scripted):
    env = scripted()
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(2, 1, 3\) and type float32, got \(2, 3\)"):
        env.step(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="got .* of torch.float64"):
        env.step(torch.zeros(2, 1, 3, dtype=torch.float64))
    bad = torch.zeros(2, 1, 3)
    bad[1, 0, 2] = -1.5
    with pytest.raises(ValueError, match=r"got -1.5 at seed row 1, environment 0, component 2"):
        env.step(bad)
    bad[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got -1.5 at seed row 1"):
        env.step(bad)


@pytest.mark.parametrize("what", ["obs", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_simulator_that_diverges_stops_the_run_and_the_message_names_it(scripted, what, value):
    env = scripted({2: (what, value)})
    env.reset()
    env.step(torch.zeros(2, 1, 3))
    name = "observation" if what == "obs" else "reward"
    where = "HalfCheetah-v4, seed 9, environment 0, agent step 2"
    message = f"{where}: expected a finite {name}, got .*{value}"
    with pytest.raises(RuntimeError, match=f"{message}.*env.diverged 'cut'"):
        env.step(torch.zeros(2, 1, 3))


@pytest.mark.parametrize("what", ["obs", "reward"])
def test_an_episode_that_diverged_is_cut_alone(scripted, what):
    env = scripted({2: (what, np.nan)}, diverged="cut", time_limit=100)
    steps = [env.reset(), env.step(torch.zeros(2, 1, 3))]
    with pytest.warns(
        RuntimeWarning, match="seed 9, environment 0, agent step 2: .*its episode is cut, the 1"
    ):
        steps.append(env.step(torch.zeros(2, 1, 3)))
    steps += [env.step(torch.zeros(2, 1, 3)) for _ in range(2)]
    assert [s.obs[0, 0, 0].item() for s in steps] == [0, 1, 2, 3, 4]
    assert [s.obs[1, 0, 1].item() for s in steps] == [0, 1, 1, 103, 4]
    assert [s.reward[0].item() for s in steps] == [0, 1, 1, 1, 1]
    assert [s.reward[1].item() for s in steps] == [0, 1, 0, 0, 1]
    assert [s.truncated[1].item() for s in steps] == [False, False, True, False, False]
    assert not any(s.terminated.any() or s.truncated[0].any() for s in steps)
    simulators = env._simulators
    assert isinstance(simulators, Scripted) and simulators.resets[0] is None
    assert [list(which) for which in simulators.resets[1:]] == [[1]]
    assert env._watch.cuts.tolist() == [0, 1]


def test_a_policy_that_diverged_stops_the_run_or_only_its_own_episodes(scripted):
    action = torch.zeros(2, 1, 3)
    action[0, 0, 1] = torch.nan
    env = scripted()
    env.reset()
    with pytest.raises(RuntimeError, match="seed 7, environment 0.*: expected a finite action"):
        env.step(action)
    env = scripted(diverged="cut")
    env.reset()
    with pytest.warns(RuntimeWarning, match="seed 7, environment 0.*: expected a finite action"):
        step = env.step(action)
    assert step.truncated.tolist() == [[True], [False]]
    assert action[0, 0, 1].isnan()  # the caller's own is left alone


def test_a_first_observation_that_is_not_finite_always_stops_the_run(scripted, monkeypatch):
    env = scripted(diverged="cut")
    monkeypatch.setattr(Scripted, "_obs", lambda self: np.full((2, 2), np.nan, np.float32))
    with pytest.raises(
        RuntimeError,
        match="seed 7, environment 0, at the start of an episode: expected a finite first",
    ):
        env.reset()


# dm_control.


def test_the_list_of_tasks_is_what_both_back_ends_know():
    from envpool.mujoco.dmc.registration import dmc_mujoco_envs

    assert set(SUITE) == {f"{domain}-{name}" for domain, name, _ in dmc_mujoco_envs}
    assert set(envs.available()["dmc"]) == {name for name in SUITE if "lqr" not in name}
    suite = pytest.importorskip("dm_control.suite")
    assert set(SUITE) == {"-".join(names) for names in suite.ALL_TASKS}


@pytest.mark.parametrize(
    "name",
    [
        "cheetah-run",
        "finger-spin",
        "fish-swim",
        "fish-upright",
        "humanoid-run",
        "humanoid-run_pure_state",
        "humanoid_CMU-walk",
        "quadruped-run",
        "quadruped-escape",
        "quadruped-fetch",
        pytest.param("dog-run", marks=pytest.mark.slow),
    ],
)
def test_the_back_ends_show_the_same_keys_in_the_same_order(name):
    pytest.importorskip("dm_control")
    config = DmcEnv(name=name)
    pool, package = envpool_suite(config, seeds=[1], threads=1), DmControl(config, seeds=[1])
    assert pool.observation == package.observation and pool.limit == package.limit == 1000
    assert np.array_equal(pool.low, package.low) and np.array_equal(pool.high, package.high)
    parts = package._envs[0].observation_spec()
    obs, _ = pool._pool.reset()
    keys = pool._keys or tuple(obs)
    assert keys == tuple(parts)
    assert [obs[key][0].size for key in keys] == [int(np.prod(p.shape)) for p in parts.values()]
    pool.close()
    package.close()


@pytest.mark.parametrize(("name", "hidden"), [("cheetah-run", 1), ("point_mass-easy", 0)])
def test_tasks_move_and_are_paid_as_in_dm_control(name, hidden):
    pytest.importorskip("dm_control")
    config = DmcEnv(name=name, repeat=2)
    pool, package = envpool_suite(config, seeds=[4], threads=1), DmControl(config, seeds=[4])
    start = pool._pool.reset()[0]
    package.reset(None)
    physics = package._envs[0].physics
    with physics.reset_context():
        physics.data.qpos[:] = [*[0.0] * hidden, *start["position"][0]]
        physics.data.qvel[:] = start["velocity"][0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1, 1, (1, len(pool.low)))
        obs, reward, _ = pool.step(action)
        obs_, reward_, _ = package.step(action)
        np.testing.assert_allclose(obs, obs_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(reward, reward_, atol=1e-5)
    assert pool.limit == package.limit == 500
    pool.close()
    package.close()


@pytest.mark.parametrize("backend", ["envpool", "dm_control"])
def test_a_task_ends_by_truncation_only(backend):
    pytest.importorskip(backend)
    env = task("pendulum-swingup", backend=backend, repeat=8)
    steps = play(env, random_actions(env, 130))
    assert [t for t, step in enumerate(steps) if step.truncated.any()] == [125]
    assert not any(step.terminated.any() for step in steps)
    # Upright within 8 degrees pays 1 a control step; the observation is (cos, sin, speed).
    for step in steps[1:]:
        assert 0 <= step.reward.item() <= 8
        if step.obs[0, 0, 0] < 0:
            assert step.reward.item() < 8
    env.close()


@pytest.mark.parametrize("backend", ["envpool", "dm_control"])
def test_bounds_that_are_not_one_are_scaled_to(backend):
    pytest.importorskip(backend)
    env = task("quadruped-walk", backend=backend)
    assert env._bounds.high.max() == 1.1
    env.reset()
    assert env.step(torch.ones(1, 1, 12)).obs.isfinite().all()
    env.close()


@pytest.mark.parametrize("backend", ["envpool", "dm_control"])
def test_unbounded_actions_are_refused(backend):
    pytest.importorskip(backend)
    with pytest.raises(ValueError, match="expected bounded actions, got .* of lqr-lqr_2_1"):
        task("lqr-lqr_2_1", backend=backend)


def test_a_simulator_of_the_package_that_diverges_says_so_by_its_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file here
    pytest.importorskip("dm_control")
    package = DmControl(DmcEnv(name="pendulum-swingup"), seeds=[1, 2])
    package.reset(None)
    package._envs[1].physics.data.qvel[:] = np.nan
    _, reward, over = package.step(np.zeros((2, 1)))
    assert np.isfinite(reward[0]) and np.isnan(reward[1]) and not over.any()
    assert np.isfinite(package.reset(np.array([1]))).all()
    package.close()


PIXELS = """
import numpy as np, torch
from cerl.config import DmcEnv
from cerl.envs.control import Control
config = DmcEnv(name="cartpole-swingup", backend="dm_control", pixels=True, size=32, envs=2)
env = Control(config, seeds=[1], salt=0, device="cpu")
first = env.reset().obs
assert env.spec.observation == (3, 32, 32) and env.spec.dtype == torch.uint8
assert first.shape == (1, 2, 3, 32, 32) and first.float().std() > 5
for _ in range(10):
    step = env.step(torch.ones(1, 2, 1))
assert not torch.equal(step.obs, first)
image = env._simulators._envs[0].physics.render(32, 32, camera_id=0)
assert np.array_equal(step.obs[0, 0].permute(1, 2, 0).numpy(), image)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.slow  # starts Python and OpenGL anew
def test_pixels_are_what_the_renderer_draws():
    pytest.importorskip("dm_control")
    probe = "from dm_control import suite; suite.load('cartpole', 'swingup').physics.render(8, 8)"
    if not any(run(probe, MUJOCO_GL=gl).returncode == 0 for gl in ("egl", "osmesa")):
        pytest.skip("neither EGL nor OSMesa here")
    done = run(PIXELS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # starts Python anew
def test_without_a_renderer_pixels_and_tasks_that_need_one_say_what_to_do():
    pytest.importorskip("dm_control")
    code = PIXELS.replace("cartpole-swingup", "quadruped-escape").replace("pixels=True, ", "")
    both = f"import traceback\ntry: exec({PIXELS!r})\nexcept ImportError: traceback.print_exc()\n"
    done = run(both + code, MUJOCO_GL="disabled")
    assert "ImportError: env.pixels" in done.stderr and "apt install libegl1" in done.stderr
    assert "ImportError: env.name: quadruped-escape needs a renderer" in done.stderr
    assert "env.backend 'envpool' needs none" in done.stderr


@pytest.mark.slow  # starts Python anew
def test_a_renderer_that_does_not_exist_says_what_to_set():
    pytest.importorskip("dm_control")
    done = run(PIXELS, MUJOCO_GL="vulkan")
    assert "ImportError: MUJOCO_GL=vulkan cannot be used" in done.stderr


def test_options_that_a_back_end_cannot_express_are_refused():
    with pytest.raises(ValueError, match="env.pixels: .* set env.backend to 'dm_control'"):
        task(pixels=True)


def test_a_camera_that_the_model_lacks_is_refused():
    pytest.importorskip("dm_control")
    with pytest.raises(ValueError, match=r"env.camera: expected -1 to \d for cheetah-run, got 9"):
        task(backend="dm_control", pixels=True, camera=9)


# Names and packages.


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (robot, "HalfCheeta-v4", r"called 'HalfCheeta-v4'; did you mean HalfCheetah-v"),
        (robot, "hopper-v4", r"did you mean Hopper-v4"),
        (robot, "HalfCheetah-v2", r"did you mean HalfCheetah-v"),
        (robot, "Walker2D", r"called 'Walker2D'.*`cerl list envs`"),
        (task, "cheeta-run", r"domain-task 'cheeta-run'; did you mean cheetah-run"),
        (task, "cheetah_run", r"did you mean cheetah-run"),
        (task, "CheetahRun-v1", r"domain-task 'CheetahRun-v1'"),
    ],
)
def test_a_name_with_a_typo_brings_the_nearest_ones(build, name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


def test_a_typo_is_found_by_the_package_too():
    pytest.importorskip("dm_control")
    with pytest.raises(ValueError, match=r"did you mean walker-walk"):
        task("walker-wlak", backend="dm_control")


@pytest.mark.parametrize(
    ("module", "build", "command"),
    [
        ("envpool", robot, r"pip install 'cerl\[mujoco\]'"),
        ("envpool", task, r"pip install 'cerl\[dmc\]'"),
        ("dm_control", lambda: task(backend="dm_control"), r"pip install 'cerl\[dmc\]'"),
    ],
)
def test_a_missing_package_names_the_pip_command(monkeypatch, module, build, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        build()


def test_a_mujoco_that_does_not_fit_names_the_pip_command(monkeypatch):
    suite = pytest.importorskip("dm_control.suite")

    def load(*_, **__):
        raise AttributeError("'MjModel' object has no attribute 'flex_vertedge'")

    monkeypatch.setattr(suite, "load", load)
    with pytest.raises(ImportError, match=r"does not fit .*flex_vertedge.*'cerl\[dmc\]'"):
        task(backend="dm_control")


def test_the_list_says_how_to_install_what_is_missing(monkeypatch):
    monkeypatch.setattr(envs, "_package_folder", lambda name: None)
    listed = envs.available()
    assert listed["mujoco"] == ["none: pip install 'cerl[mujoco]'"]
    assert listed["dmc"] == ["none: pip install 'cerl[dmc]'"]


def test_make_builds_both_families():
    for config in (MujocoEnv(), DmcEnv()):
        env = envs.make(config, seeds=[0], salt=0, device="cpu")
        assert isinstance(env, Control) and env.spec.observation == (17,)
        env.close()
