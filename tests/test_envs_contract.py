"""All environments keep the contract of `cerl.envs.api`. Append a builder to test another one."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch

from cerl import envs
from cerl.config import (
    AtariEnv,
    CatchEnv,
    DmcEnv,
    GameEnv,
    GymEnv,
    MemoryEnv,
    MinAtarEnv,
    MujocoEnv,
    PointMassEnv,
    PopgymEnv,
)
from cerl.config.memory_tasks import TASKS
from cerl.envs.api import VecEnv

# name -> build(seeds, salt) of an environment with at least two games per seed whose episodes end,
# by terminal or time limit, within STEPS steps.
Build = Callable[[Sequence[int], int], VecEnv]
STEPS = 60


def catch(seeds: Sequence[int], salt: int) -> VecEnv:
    return envs.make(CatchEnv(envs=3, rows=6), seeds=seeds, salt=salt, device="cpu")


def minatar(name: str) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        config = MinAtarEnv.model_validate({"name": name, "envs": 3, "time_limit": 40})
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def atari(backend: str) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        pytest.importorskip({"ale": "ale_py"}.get(backend, backend))
        options = {"backend": backend, "sticky": 0.25, "fire_reset": True, "threads": 1}
        config = AtariEnv.model_validate({"name": "Pong", "envs": 2, "time_limit": 40, **options})
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def gymnasium(name: str) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        config = GymEnv(name=name, envs=3, time_limit=40)
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def point_mass(walls: bool) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        config = PointMassEnv(envs=3, walls=walls, time_limit=25)
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def mujoco(name: str) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        pytest.importorskip("envpool")
        config = MujocoEnv(name=name, envs=2, time_limit=25, threads=2)
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def suite(backend: str, **options: object) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        pytest.importorskip(backend)
        common = {"backend": backend, "envs": 2, "time_limit": 25, "threads": 1}
        config = DmcEnv.model_validate({"name": "reacher-easy", **common, **options})
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def memory(name: str) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        config = MemoryEnv(name=name, envs=3, time_limit=25)
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def popgym(name: str) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        pytest.importorskip("popgym")
        config = PopgymEnv(name=name, envs=3, backend="package", time_limit=25)
        return envs.make(config, seeds=seeds, salt=salt, device="cpu")

    return build


def own(seeds: Sequence[int], salt: int) -> VecEnv:
    config = GameEnv(name="test_own_game:summing", envs=3, sticky=0.1)
    return envs.make(config, seeds=seeds, salt=salt, device="cpu")


def observed(config: type, **options: object) -> Build:
    def build(seeds: Sequence[int], salt: int) -> VecEnv:
        observe = {"dropout": 0.2, "flicker": 0.2}
        parsed = config.model_validate({"envs": 3, "observe": observe, **options})
        return envs.make(parsed, seeds=seeds, salt=salt, device="cpu")

    return build


BUILDERS: dict[str, Build] = {
    "catch": catch,
    "asterix": minatar("asterix"),
    "breakout": minatar("breakout"),
    "freeway": minatar("freeway"),
    "seaquest": minatar("seaquest"),
    "space_invaders": minatar("space_invaders"),
    "atari_ale": atari("ale"),
    "atari_envpool": atari("envpool"),
    "gym_cartpole": gymnasium("CartPole-v1"),
    "gym_frozen_lake": gymnasium("FrozenLake-v1"),
    "gym_pendulum": gymnasium("Pendulum-v1"),
    "point_mass": point_mass(walls=True),
    "point_mass_open": point_mass(walls=False),
    "mujoco_cheetah": mujoco("HalfCheetah-v4"),
    "mujoco_hopper": mujoco("Hopper-v5"),
    "dmc_envpool": suite("envpool"),
    "dmc_package": suite("dm_control", repeat=2),
    **{f"memory_{name}": memory(name) for name in TASKS if not name.endswith(("Medium", "Hard"))},
    "popgym_autoencode": popgym("AutoencodeEasy"),
    "popgym_battleship": popgym("BattleshipEasy"),
    "popgym_pendulum": popgym("NoisyPositionOnlyPendulumEasy"),
    "own_game": own,
    "observed_catch": observed(CatchEnv, rows=6),
    "observed_point_mass": observed(PointMassEnv, time_limit=25),
    "observed_pendulum": observed(GymEnv, name="Pendulum-v1", time_limit=25),
}


# Of the module, so that the tests of one environment come together.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow)
        if name.startswith(("atari", "dmc", "mujoco", "popgym", "memory"))
        else name
        for name in sorted(BUILDERS)
    ],
)
def name(request) -> str:
    return request.param


@pytest.fixture
def build(name):
    opened = []

    def open_one(seeds: Sequence[int] = (4, 9), salt: int = 0) -> VecEnv:
        opened.append(BUILDERS[name](seeds, salt))
        return opened[-1]

    yield open_one
    for env in opened:
        env.close()


def plan(env: VecEnv, seeds: int, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if env.spec.continuous:
        shape = (steps, seeds, env.spec.envs, env.spec.actions)
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randint(0, env.spec.actions, (steps, seeds, env.spec.envs), generator=generator)


def copy(step):
    """Steps may be overwritten by later ones; a test keeps its own."""
    return type(step)(*(field.clone() for field in step))


def play(env: VecEnv, actions: torch.Tensor):
    return [copy(env.reset()), *(copy(env.step(action)) for action in actions)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@functools.cache
def played(name: str):
    """The spec of an environment, and what it shows from its reset through all steps of a plan."""
    env = BUILDERS[name]((4, 9), 0)
    steps = play(env, plan(env, 2))
    env.close()
    return env.spec, steps


def test_shapes_and_types_are_those_of_the_spec(name):
    spec, steps = played(name)
    assert spec.envs >= 2 and spec.actions >= 2 - spec.continuous and spec.frames >= 1 and spec.name
    for step in steps:
        assert step.obs.shape == (2, spec.envs, *spec.observation) and step.obs.dtype == spec.dtype
        assert step.reward.shape == (2, spec.envs) and step.reward.dtype == torch.float32
        for flag in (step.terminated, step.truncated):
            assert flag.shape == (2, spec.envs) and flag.dtype == torch.bool


def test_the_step_after_an_end_is_the_first_of_the_next_episode(name):
    _, steps = played(name)
    assert not steps[0].reward.any() and not (steps[0].terminated | steps[0].truncated).any()
    ends = 0
    for last, first in zip(steps[:-1], steps[1:], strict=True):
        over = last.terminated | last.truncated
        ends += int(over.sum())
        assert not first.reward[over].any()
        assert not (first.terminated | first.truncated)[over].any()
    assert ends > 0


def test_the_action_after_an_end_is_ignored(build):
    if not build().spec.exact_state:
        pytest.skip("needs two environments in one state")
    one, two = build(), build()
    actions = plan(one, 2)
    last = play(one, actions[:0])[0]
    play(two, actions[:0])
    ignored = 0
    for action in actions:
        over = last.terminated | last.truncated
        changed = -action if one.spec.continuous else (action + 1) % one.spec.actions
        other = torch.where(over[..., None] if one.spec.continuous else over, changed, action)
        last = copy(one.step(action))
        assert same(last, two.step(other))
        ignored += int(over.sum())
    assert ignored > 0


def test_terminated_and_truncated_exclude_each_other(name):
    for step in played(name)[1]:
        assert not (step.terminated & step.truncated).any()


def test_reset_starts_new_episodes_everywhere(build):
    env = build()
    play(env, plan(env, 2, 7))
    first = env.reset()
    assert not first.reward.any() and not (first.terminated | first.truncated).any()


def test_a_saved_state_goes_on_bit_for_bit_or_starts_new_episodes(build):
    one, two = build(), build()
    actions = plan(one, 2)
    play(one, actions[:20])
    saved = one.state_dict()
    play(two, actions[:3])
    if not one.spec.exact_state:
        first = two.load_state_dict(saved)
        assert first is not None
        assert not first.reward.any() and not (first.terminated | first.truncated).any()
        return
    want = [copy(one.step(action)) for action in actions[20:]]
    assert two.load_state_dict(saved) is None
    assert all(
        same(two.step(action), step) for action, step in zip(actions[20:], want, strict=True)
    )


def test_a_restart_depends_on_its_number_and_on_nothing_before(build):
    played, fresh = build(), build()
    actions = plan(played, 2)
    played.reset()
    for action in actions[:23]:
        played.step(action)

    def after(env, number):
        return [copy(env.restart(number)), *(copy(env.step(action)) for action in actions)]

    other, first = after(played, 6), after(played, 5)
    assert not first[0].reward.any() and not (first[0].terminated | first[0].truncated).any()
    assert all(map(same, first, after(fresh, 5))) and not all(map(same, first, other))


def test_a_restarted_seed_plays_the_same_alone_and_among_others(build):
    among, alone = build((4, 9, 1)), build((9,))
    actions = plan(among, 3)
    alone.reset()
    for action in actions[:13, 1:2]:
        alone.step(action)
    for a, b in [
        (among.restart(2), alone.restart(2)),
        *((among.step(action), alone.step(action[1:2])) for action in actions[:20]),
    ]:
        assert same([field[1:2] for field in a], b)


# A task of every family whose episodes are longer than 5 steps where nothing is done.
LONG = {
    "catch": CatchEnv(rows=9),
    "minatar": MinAtarEnv(name="freeway", envs=1),
    "atari": AtariEnv(),
    "gym": GymEnv(name="CliffWalking-v1"),
    "point_mass": PointMassEnv(),
    "mujoco": MujocoEnv(),
    "dmc": DmcEnv(name="reacher-easy", backend="envpool"),
    "memory": MemoryEnv(name="tmaze", length=20),
    "popgym": PopgymEnv(name="RepeatPreviousEasy", backend="package"),
}


@pytest.mark.parametrize("family", sorted(LONG))
def test_every_family_s_episodes_end_at_the_longest_that_is_asked_for(family):
    needed = {"atari": "ale_py", "mujoco": "envpool", "dmc": "envpool", "popgym": "popgym"}
    if family in needed:
        pytest.importorskip(needed[family])
    env = envs.make(LONG[family], seeds=(0,), salt=1, device="cpu", longest=5)
    try:
        env.restart(0)
        still = env.spec.action(1, 1, device="cpu")
        for _ in range(2):
            steps = [env.step(still).truncated.item() for _ in range(6)]
            assert steps == [False] * 4 + [True, False]
    finally:
        env.close()


def test_a_seed_plays_the_same_alone_and_among_others(build):
    among, alone = build((4, 9, 1)), build((9,))
    actions = plan(among, 3)
    for a, b in zip(play(among, actions), play(alone, actions[:, 1:2]), strict=True):
        assert same([field[1:2] for field in a], b)


def test_seeds_envs_and_salts_differ(build):
    env = build((4, 9))
    actions = plan(env, 2)
    # All games get the same actions, so what differs is their randomness.
    actions = actions[:, :1, :1].expand_as(actions).contiguous()
    one, other = play(env, actions), play(build((4, 9), 1), actions)
    obs = torch.stack([step.obs for step in one])
    assert not torch.equal(obs[:, 0], obs[:, 1])
    assert not torch.equal(obs[:, :, 0], obs[:, :, 1])
    assert not torch.equal(obs, torch.stack([step.obs for step in other]))
