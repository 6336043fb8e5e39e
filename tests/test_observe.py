"""Masks, noise, dropout and flicker over the observations of any environment."""

import warnings
from typing import Any

import pytest
import torch

from cerl import draw, envs
from cerl.config import CatchEnv, GymEnv, MemoryEnv, MinAtarEnv, MujocoEnv, PointMassEnv
from cerl.data import Step
from cerl.envs.observe import ROBOTS, Observed

KINDS = {
    "gym": (GymEnv, {"name": "CartPole-v1"}),
    "point_mass": (PointMassEnv, {"time_limit": 12}),
    "memory": (MemoryEnv, {"name": "NoisyPositionOnlyPendulumEasy", "time_limit": 12}),
    "minatar": (MinAtarEnv, {"name": "breakout", "time_limit": 12}),
    "catch": (CatchEnv, {"rows": 6}),
}


def build(kind="point_mass", *, seeds=(3, 4), salt=0, count=6, **observe: Any) -> Any:
    model, options = KINDS[kind]
    config = model.model_validate({**options, "envs": count, "observe": observe})
    return envs.make(config, seeds=seeds, salt=salt, device="cpu")


def plan(env, steps: int, *, seeds: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (steps, seeds, env.spec.envs)
    if env.spec.continuous:
        return torch.rand((*shape, env.spec.actions), generator=generator) * 2 - 1
    return torch.randint(0, env.spec.actions, shape, generator=generator)


def play(env, actions: torch.Tensor) -> list[Step]:
    return [env.reset().clone(), *(env.step(action).clone() for action in actions)]


def pairs(kind: str, **observe: Any):
    """Steps of the same episodes as they are and as they are shown, resets and ends among them."""
    plain, shown = build(kind), build(kind, **observe)
    actions = plan(plain, 40)
    return list(zip(play(plain, actions), play(shown, actions), strict=True)), shown


def test_nothing_asked_for_changes_nothing():
    assert not isinstance(build(), Observed)


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_observation_stays(kind):
    steps, _ = pairs(kind, flicker=0.5, dropout=0.5)
    assert any(bool((a.terminated | a.truncated).any()) for a, _ in steps)
    for plain, shown in steps:
        assert all(torch.equal(x, y) for x, y in zip(plain[1:], shown[1:], strict=True))
        assert shown.obs.dtype == plain.obs.dtype and shown.obs.shape == plain.obs.shape


def test_indices_keep_components_in_their_order():
    steps, env = pairs("point_mass", indices=[3, 0])
    assert env.spec.observation == (2,)
    for plain, shown in steps:
        assert torch.equal(shown.obs, torch.stack([plain.obs[..., 3], plain.obs[..., 0]], -1))


@pytest.mark.parametrize(
    ("kind", "keep", "kept"),
    [
        ("point_mass", "position", [0, 1]),
        ("point_mass", "velocity", [2, 3]),
        ("gym", "position", [0, 2]),
        ("gym", "velocity", [1, 3]),
    ],
)
def test_keep_names_components(kind, keep, kept):
    steps, env = pairs(kind, keep=keep)
    assert env.spec.observation == (len(kept),)
    for plain, shown in steps:
        assert torch.equal(shown.obs, plain.obs[..., kept])


@pytest.mark.parametrize("kind", ["point_mass", "minatar", "gym"])
def test_flicker_hides_whole_observations(kind):
    steps, _ = pairs(kind, flicker=0.3)
    dark = []
    for plain, shown in steps:
        hidden = ~shown.obs.flatten(2).bool().any(-1)
        dark.append(hidden)
        want = torch.where(hidden.view(2, 6, *([1] * (plain.obs.dim() - 2))), 0, plain.obs.float())
        assert torch.equal(shown.obs.float(), want)
    dark = torch.stack(dark)
    # 492 coins of 0.3, 5 standard deviations; also on an episode's first and last observations.
    assert float(dark.float().mean()) == pytest.approx(0.3, abs=0.104)
    assert dark[0].any()
    ends = torch.stack([plain.terminated | plain.truncated for plain, _ in steps])
    assert dark[ends].any() and (~dark[ends]).any()


@pytest.mark.parametrize("kind", ["point_mass", "catch"])
def test_dropout_hides_components_one_by_one(kind):
    steps, _ = pairs(kind, dropout=0.2)
    lost = total = 0
    for plain, shown in steps:
        same = shown.obs == plain.obs
        assert not shown.obs[~same].any()
        there = plain.obs != 0
        lost, total = lost + int((~same).sum()), total + int(there.sum())
    assert lost / total == pytest.approx(0.2, abs=5 * (0.16 / total) ** 0.5)


def test_noise_is_gaussian_with_the_deviation_asked_for():
    steps, _ = pairs("point_mass", noise=0.5)
    off = torch.stack([(shown.obs - plain.obs) / 0.5 for plain, shown in steps])
    assert abs(float(off.mean())) < 5 / off.numel() ** 0.5
    assert float(off.std()) == pytest.approx(1, abs=5 / (2 * off.numel()) ** 0.5)
    assert float(off.abs().max()) > 2.5


def test_draws_are_those_of_the_seed_and_the_count_of_steps():
    """Kept, then noise, then dropout, then flicker; written out with numbers drawn again."""
    options: Any = {"indices": [1, 2, 3], "noise": 0.3, "dropout": 0.4, "flicker": 0.25}
    steps, _ = pairs("point_mass", **options)
    keys = draw.seed_keys((3, 4))
    for t, (plain, shown) in enumerate(steps):
        seen = plain.obs[..., 1:] + 0.3 * draw.normal(keys, draw.SENSOR, t, (6, 3))
        seen = torch.where(draw.uniform(keys, draw.DROPOUT, t, (6, 3)) < 0.4, 0.0, seen)
        dark = draw.uniform(keys, draw.FLICKER, t, (6,)) < 0.25
        assert torch.equal(shown.obs, torch.where(dark[..., None], 0.0, seen))


def test_certain_flicker_and_dropout_show_nothing():
    for name in ("flicker", "dropout"):
        observe: Any = {name: 1.0}
        steps, _ = pairs("minatar", **observe)
        assert not any(bool(shown.obs.any()) for _, shown in steps)


def test_a_seed_sees_the_same_alone_and_among_others_and_others_see_differently():
    options: Any = {"noise": 0.1, "dropout": 0.3, "flicker": 0.2}
    among, alone = build(seeds=(3, 4, 9), **options), build(seeds=(4,), **options)
    actions = plan(among, 20, seeds=3)
    for a, b in zip(play(among, actions), play(alone, actions[:, 1:2]), strict=True):
        assert torch.equal(a.obs[1:2], b.obs)
    other = build(seeds=(4,), salt=1, **options)
    dark = [
        torch.stack([step.obs.any(-1) for step in play(env, actions[:, 1:2])])
        for env in (build(seeds=(4,), **options), other)
    ]
    assert not torch.equal(*dark)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_shows_the_same_again(kind):
    options: Any = {"dropout": 0.3, "flicker": 0.2}
    one, two = build(kind, **options), build(kind, **options)
    actions = plan(one, 30)
    play(one, actions[:15])
    saved = one.state_dict()
    play(two, actions[:4])
    assert two.load_state_dict(saved) is None
    for action in actions[15:]:
        mine, other = one.step(action).clone(), two.step(action)
        assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))


def test_a_lost_state_is_shown_too():
    class Lost:
        def __init__(self, inner):
            self.inner, self.spec = inner, inner.spec

        def load_state_dict(self, state):
            return self.inner.reset()

    env = build(flicker=1.0)
    env.reset()
    saved = env.state_dict()
    env._env = Lost(env._env)
    fresh = env.load_state_dict(saved)
    assert fresh is not None and not fresh.obs.any()
    with pytest.raises(ValueError, match="saved without env.observe"):
        build(flicker=1.0).load_state_dict(build().state_dict())


@pytest.mark.parametrize(
    ("kind", "observe", "message"),
    [
        ("point_mass", {"indices": [0, 4]}, r"env.observe.indices: expected indices from 0 to 3"),
        ("point_mass", {"indices": [-1]}, "from 0 to 3, got"),
        ("point_mass", {"indices": [1, 1]}, "expected different ones"),
        ("point_mass", {"indices": [1], "keep": "position"}, "both choose components"),
        ("minatar", {"indices": [0]}, r"vectors, got images \[4, 10, 10\] from breakout"),
        ("catch", {"keep": "position"}, "env.observe.keep: expected observations that are vectors"),
        ("minatar", {"noise": 0.1}, "env.observe.noise: expected observations of fractions"),
        ("memory", {"keep": "velocity"}, "Pendulum.* is not known.*env.observe.indices instead"),
        ("point_mass", {"flicker": 1.5}, "less than or equal to 1"),
        ("point_mass", {"dropout": -0.1}, "greater than or equal to 0"),
        ("point_mass", {"noise": -1.0}, "greater than or equal to 0"),
        ("point_mass", {"noise": float("nan")}, "a finite number"),
        ("point_mass", {"keep": "speed"}, "'all', 'position' or 'velocity'"),
    ],
)
def test_what_cannot_be_shown_is_refused(kind, observe, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **observe)


def test_an_unknown_robot_gets_the_nearest_name():
    config = GymEnv.model_validate({"name": "Acrobot-v1", "observe": {"keep": "velocity"}})
    with pytest.raises(ValueError, match="gym/Acrobot-v1 are velocity is not known.*Ant, CartPole"):
        envs.make(config, seeds=(0,), salt=0, device="cpu")


@pytest.mark.parametrize("robot", sorted(set(ROBOTS) - {"CartPole", "Pendulum"}))
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_masks_of_robots_part_places_from_speeds(robot, version):
    """Other speeds change only what `velocity` keeps, other places only what `position` keeps."""
    pytest.importorskip("mujoco")
    pytest.importorskip("imageio")
    import gymnasium
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of version 4
        warnings.simplefilter("ignore", UserWarning)
        try:
            made = gymnasium.make(f"{robot}-{version}", disable_env_checker=True)
        except ImportError as error:
            pytest.skip(str(error))  # Pusher-v4 does not run on MuJoCo 3
    env: Any = made.unwrapped
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    position, velocity = (list(part) for part in ROBOTS[robot])

    def look(places, speeds):
        env.set_state(places, speeds)
        return env._get_obs().copy()

    places, speeds = env.data.qpos.copy(), rng.normal(0, 1, env.model.nv)
    base = look(places, speeds)
    faster = look(places, rng.normal(0, 1, env.model.nv))
    assert (base[position] == faster[position]).all()
    assert (base[velocity] != faster[velocity]).all()
    moved = look(places + rng.normal(0, 0.05, env.model.nq), speeds)
    assert (base[velocity] == moved[velocity]).all()
    assert (base[position] != moved[position]).mean() > 0.6
    made.close()


def test_masked_robots_of_envpool_have_the_shapes_of_their_masks():
    pytest.importorskip("envpool")
    for keep, size in (("position", 8), ("velocity", 9)):
        config = MujocoEnv.model_validate({"threads": 1, "observe": {"keep": keep}})
        env = envs.make(config, seeds=(0,), salt=0, device="cpu")
        assert env.spec.observation == (size,) and env.reset().obs.shape == (1, 1, size)
        env.close()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["minatar", "catch", "memory"])
def test_inside_a_graph_on_the_gpu_the_same_is_seen(kind):
    model, options = KINDS[kind]
    observe = {"dropout": 0.2, "flicker": 0.3} | ({"noise": 0.1} if kind == "memory" else {})
    config = model.model_validate({**options, "envs": 50, "observe": observe})
    cpu, gpu = (envs.make(config, seeds=(3, 4), salt=0, device=d) for d in ("cpu", "cuda"))

    def agree(mine: Step, other: Step) -> None:
        torch.testing.assert_close(other.obs.cpu(), mine.obs, rtol=0, atol=1e-4)
        assert torch.equal(other.truncated.cpu(), mine.truncated)
        if kind != "memory":
            assert torch.equal(other.obs.cpu(), mine.obs)

    agree(cpu.reset(), gpu.reset())
    actions = plan(cpu, 60)
    given, graph = torch.zeros_like(actions[0]).cuda(), torch.cuda.CUDAGraph()
    for action in actions[:3]:
        agree(cpu.step(action), gpu.step(action.cuda()))
    with torch.cuda.graph(graph):
        out = gpu.step(given)
    for action in actions[3:]:
        given.copy_(action)
        graph.replay()
        agree(cpu.step(action), out)
    counts = [env.state_dict()["shown"] for env in (cpu, gpu)]
    assert int(counts[0]) == int(counts[1]) == 61
