"""The popgym family: both back ends of all 42 tasks, and options that are refused."""

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from cerl import envs
from cerl.config import ConfigError, PopgymEnv, load
from cerl.config.memory_tasks import POPGYM
from cerl.envs.popgym import popgym_id


def build(name: str, backend="package", *, count=2, seeds=(0,), **options):
    config = PopgymEnv.model_validate({"name": name, "backend": backend, "envs": count, **options})
    return envs.make(config, seeds=seeds, salt=0, device="cpu")


def actions(env, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (steps, 1, env.spec.envs)
    if env.spec.continuous:
        return torch.rand((*shape, env.spec.actions), generator=generator) * 2 - 1
    return torch.randint(0, env.spec.actions, shape, generator=generator)


def test_the_42_tasks_are_those_that_the_package_registers():
    pytest.importorskip("popgym")
    ids = {name for name in gymnasium.registry if name.startswith("popgym-")}
    ids = {name for name in ids if "Labyrinth" not in name}  # they need a further package
    assert {popgym_id(name) for name in POPGYM} == ids and len(ids) == 42


@pytest.mark.parametrize("name", POPGYM)
def test_both_back_ends_look_the_same_from_outside(name):
    pytest.importorskip("popgym")
    package, resident = build(name), build(name, "resident")
    assert package.spec.name == popgym_id(name) and resident.spec.name == f"{name} (resident)"
    assert resident.spec.resident and not package.spec.resident
    for field in ("observation", "actions", "continuous", "envs", "frames"):
        assert getattr(package.spec, field) == getattr(resident.spec, field), field
    for env in (package, resident):
        env.reset()
        for action in actions(env, 12):
            step = env.step(action)
            assert step.obs.shape == (1, 2, *env.spec.observation)
            assert float(step.reward.abs().max()) <= 1
        env.close()


def test_the_package_s_steps_arrive_unchanged():
    """Against the package stepped by hand, with the seed that the adapter gave."""
    pytest.importorskip("popgym")
    from cerl.envs.host import simulator_seeds

    name = "BattleshipEasy"
    env = build(name, count=1, seeds=(5,))
    seed = int(simulator_seeds((5,), salt=0, envs=1)[0])
    theirs = gymnasium.make(popgym_id(name), disable_env_checker=True).unwrapped
    space = theirs.observation_space
    obs = theirs.reset(seed=seed)[0]
    assert (env.reset().obs[0, 0].numpy() == spaces.flatten(space, obs)).all()
    over, ends = False, 0
    for action in actions(env, 300):
        step = env.step(action)
        if over:
            obs, reward, terminal, cut = theirs.reset()[0], 0.0, False, False
        else:
            obs, reward, terminal, cut, _ = theirs.step(np.unravel_index(int(action), (8, 8)))
        assert (step.obs[0, 0].numpy() == spaces.flatten(space, obs)).all()
        assert float(step.reward) == pytest.approx(reward, abs=1e-7)
        assert bool(step.terminated) == terminal and bool(step.truncated) == (cut and not terminal)
        over = terminal or cut
        ends += over
    assert ends >= 4


def test_a_time_limit_cuts_the_package_s_episodes_too():
    pytest.importorskip("popgym")
    env = build("AutoencodeEasy", time_limit=5)
    env.reset()
    cut = [bool(env.step(action).truncated.all()) for action in actions(env, 5)]
    assert cut == [False] * 4 + [True]


def test_a_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "popgym", None)
    with pytest.raises(ImportError, match=r"pip install 'cerl\[popgym\]'; env.backend resident"):
        build("RepeatPreviousEasy")
    assert build("RepeatPreviousEasy", "resident").spec.resident


@pytest.mark.parametrize("backend", ["resident", "package"])
@pytest.mark.parametrize(
    ("preset", "name", "suited"),
    [
        ("popgym/fox", "PositionOnlyPendulumEasy", "sac .for example a preset popgym/sac-fox"),
        ("popgym/sac-fox", "RepeatFirstEasy", "quantile .for example a preset popgym/fox"),
    ],
)
def test_a_task_of_other_actions_is_refused_with_a_preset_that_suits(preset, name, suited, backend):
    with pytest.raises(ConfigError, match=f"{name} takes .* ones; expected .*{suited}"):
        load(preset, {"env.name": name, "env.backend": backend})
