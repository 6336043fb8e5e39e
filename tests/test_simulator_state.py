"""Saved states of simulators: what steps change is saved; what does not fit is refused whole."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from cerl.envs import simulator_state
from cerl.envs.gym import builtin_ids
from cerl.envs.simulator_state import exact, load_numbers, restore, save, save_numbers
from cerl.state import CheckpointError

# Drawn or set where an episode starts, and only looked at by pictures.
DRAWN = {"taxi_orientation", "dealer_top_card_suit", "dealer_top_card_value_str"}
BUILTIN = [gymnasium.spec(name) for name in builtin_ids()]


def layers(env: Any) -> list[Any]:
    """The wrappers, outermost first, and the simulator."""
    found = [env]
    while isinstance(found[-1], gymnasium.Wrapper):
        found.append(found[-1].env)
    return found


def attributes(env: Any) -> list[dict[str, Any]]:
    """Every attribute of the simulator and its wrappers that is data."""
    kinds = (bool, int, float, str, list, tuple, np.ndarray, np.generic, type(None))
    return [{k: v for k, v in vars(o).items() if isinstance(v, kinds)} for o in layers(env)]


def equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and np.array_equal(a, b)


def play(env: Any, steps: int, seed: int = 0) -> list[Any]:
    """Observations and rewards of random actions; episodes start anew."""
    env.action_space.seed(seed)
    seen = []
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        seen.append((np.copy(obs), reward))
        if terminated or truncated:
            seen.append(np.copy(env.reset()[0]))
    return seen


@pytest.mark.parametrize("spec", BUILTIN, ids=lambda spec: spec.id)
def test_what_is_not_saved_never_changes(spec):
    env = gymnasium.make(spec, disable_env_checker=True)
    assert exact(env)
    env.reset(seed=1)
    saved, before = save(env), copy.deepcopy(attributes(env))
    play(env, 400)
    for kept, old, new in zip(saved, before, attributes(env), strict=True):
        others = old.keys() - kept.keys() - DRAWN - {"_np_random_seed"}
        changed = [key for key in others if not equal(old[key], new[key])]
        assert not changed and old.keys() == new.keys()


def test_an_unknown_simulator_or_wrapper_is_not_exact():
    class Own(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)

    cartpole = gymnasium.make("CartPole-v1", disable_env_checker=True)
    assert exact(cartpole) and not exact(Own())
    assert not exact(gymnasium.wrappers.NormalizeObservation(cartpole))
    # A subclass may hold more than its parent.
    subclass = type("CartPoleEnv", (type(cartpole.unwrapped),), {"__module__": "elsewhere"})
    assert not exact(subclass())


@pytest.fixture
def cartpole() -> gymnasium.Env:
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    env.reset(seed=3)
    play(env, 5)
    return env


Change = Callable[[list[Any]], object]
INNER = -1
HOSTILE: list[tuple[Change, str]] = [
    (lambda s: s[INNER]["generator"].update(bit_generator="test"), "one of PCG64, .* got 'test'"),
    (lambda s: s[INNER]["generator"].update(bit_generator=["PCG64"]), "one of PCG64"),
    (lambda s: s[INNER]["generator"].pop("has_uint32"), "generator: expected bit_generator, has"),
    (lambda s: s[INNER]["generator"]["state"].update(inc=2**128), "inc: expected a whole number"),
    (lambda s: s[INNER]["generator"]["state"].update(inc=True), "inc: expected .* got True"),
    (lambda s: s[INNER]["generator"]["state"].update(inc=10**9999), "got a value of type int"),
    (lambda s: s[INNER].update(generator=None), "bit_generator: expected one of .* got None"),
    (lambda s: s[INNER].update(step=1), "CartPoleEnv: expected .*got .*, step,"),
    (lambda s: s[INNER].update(render_mode="human"), "got .*render_mode"),
    (lambda s: s[INNER].update(gravity=1e300), "got .*gravity"),
    (lambda s: s[0].update(_max_episode_steps=10**9), "TimeLimit: .* got .*_max_episode_steps"),
    (lambda s: s[0].update(_elapsed_steps="9"), "_elapsed_steps: expected a whole .* got '9'"),
    (lambda s: s[0].update(_elapsed_steps=-1), "_elapsed_steps: expected a whole number from 0"),
    (lambda s: s[0].pop("_elapsed_steps"), "TimeLimit: expected _elapsed_steps, got nothing"),
    (lambda s: s[1].update(_has_reset=1), "OrderEnforcing._has_reset: expected True or False"),
    (lambda s: s[INNER].update(state=torch.zeros(5)), r"expected a tensor \[4\] .* got \[5\]"),
    (lambda s: s[INNER].update(state=torch.zeros(4, dtype=torch.int64)), "expected 4 numbers"),
    (lambda s: s[INNER].update(state=[0.0, 0.0, 0.0]), "state: expected 4 numbers, got .*list"),
    (lambda s: s[INNER].update(state=[[0.0]] * 4), "state: expected a number, got .*list"),
    (lambda s: s[INNER].update(state=None), "state: expected 4 numbers, got None"),
    (lambda s: s[INNER].update({"x" * 999: 0}), r"got .*x{40};"),
    (lambda s: s.pop(), "simulator 1: expected a list of 3"),
    (lambda s: s.insert(0, s[0]), "simulator 1: expected a list of 3"),
    (lambda s: s.__setitem__(1, []), "OrderEnforcing: expected a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_a_hostile_state_is_refused_and_nothing_is_changed(cartpole, change, message):
    first = gymnasium.make("CartPole-v1", disable_env_checker=True)
    first.reset(seed=8)
    good = save(first)
    bad = save(cartpole)
    change(bad)
    play(first, 3)
    before = copy.deepcopy([attributes(env) for env in (first, cartpole)])
    generators = [env.unwrapped.np_random.bit_generator.state for env in (first, cartpole)]
    with pytest.raises(CheckpointError, match=message):
        restore([first, cartpole], [good, bad], where="CartPole-v1")
    for env, old in zip((first, cartpole), before, strict=True):
        for mine, theirs in zip(attributes(env), old, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(equal(mine[key], theirs[key]) for key in mine)
    now = [env.unwrapped.np_random.bit_generator.state for env in (first, cartpole)]
    assert now == generators


@pytest.mark.parametrize("saved", [None, {}, [[]], "x"])
def test_a_state_of_another_number_of_simulators_is_refused(cartpole, saved):
    with pytest.raises(CheckpointError, match="expected the state of 2 simulators, got"):
        restore([cartpole, cartpole], saved, where="CartPole-v1")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("Taxi-v4", "s", 500, "TaxiEnv.s: expected a whole number below 500, got 500"),
        ("FrozenLake-v1", "s", -1, "s: expected a whole number below 16"),
        ("FrozenLake-v1", "s", 1.5, "s: expected a whole number below 16"),
        ("CliffWalking-v1", "lastaction", [1], "lastaction: expected a number"),
        ("Blackjack-v1", "player", [], "player: expected a list of 1 to 32 cards"),
        ("Blackjack-v1", "player", [11], "player: expected a whole number from 0 to 10"),
        ("Blackjack-v1", "dealer", [1.0] * 2, "dealer: expected a whole number"),
        ("Pendulum-v1", "last_u", torch.zeros(1), "last_u: expected a number, got .1. of"),
        ("MountainCar-v0", "state", (0.0, "1"), "state: expected a number, got '1'"),
    ],
)
def test_values_that_a_simulator_cannot_have_are_refused(name, key, value, message):
    env = gymnasium.make(name, disable_env_checker=True)
    env.reset(seed=0)
    saved = save(env)
    saved[-1][key] = value
    with pytest.raises(CheckpointError, match=message):
        restore([env], [saved], where=name)


@pytest.mark.parametrize("kind", simulator_state._GENERATORS.values())
def test_every_bit_generator_goes_on_from_its_saved_state(kind):
    env: Any = gymnasium.make("CartPole-v1", disable_env_checker=True)
    env.reset(seed=0)
    env.unwrapped.np_random = np.random.Generator(kind(5))
    env.unwrapped.np_random.random(3, dtype=np.float32)  # keeps half of a draw
    saved = save(env)
    want = env.unwrapped.np_random.integers(0, 1000, 700)
    restore([env], [saved], where="CartPole-v1")
    assert np.array_equal(env.unwrapped.np_random.integers(0, 1000, 700), want)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        (np.random.MT19937, ("state", "pos"), 625),
        (np.random.MT19937, ("state", "pos"), -1),
        (np.random.MT19937, ("state", "key"), torch.zeros(623, dtype=torch.int32)),
        (np.random.MT19937, ("state", "key"), torch.zeros(624)),
        (np.random.Philox, ("buffer_pos",), 5),
        (np.random.Philox, ("buffer",), torch.zeros(3, dtype=torch.int64)),
        (np.random.SFC64, ("uinteger",), 2**32),
        (np.random.PCG64, ("has_uint32",), 2),
    ],
)
def test_a_generator_s_state_out_of_its_bounds_is_refused(kind, path, value):
    state = kind(0).state
    saved = node = save_numbers(state)
    assert load_numbers(saved, state, where="generator").keys() == state.keys()
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(CheckpointError, match=f"generator.*{path[-1]}: expected"):
        load_numbers(saved, state, where="generator")


def test_what_was_restored_does_not_share_memory_with_what_was_saved(cartpole):
    saved = save(cartpole)
    restore([cartpole], [saved], where="CartPole-v1")
    want = save(cartpole)[-1]["state"].clone()
    saved[-1]["state"].fill_(9)
    assert torch.equal(save(cartpole)[-1]["state"], want)


def test_a_robot_s_places_and_physics_are_checked():
    pytest.importorskip("mujoco")
    env: Any = gymnasium.make("HalfCheetah-v5", disable_env_checker=True)
    env.reset(seed=0)
    before = env.unwrapped.data.qpos.copy()
    for key in ("physics", "xpos"):
        saved = save(env)
        saved[-1]["physics"] = saved[-1]["physics"] + 1
        saved[-1][key] = saved[-1][key][:-1]
        with pytest.raises(CheckpointError, match=f"HalfCheetahEnv.{key}: expected a tensor"):
            restore([env], [saved], where="HalfCheetah-v5")
    assert np.array_equal(env.unwrapped.data.qpos, before)


def test_a_model_with_a_memory_of_its_sensors_is_not_exact():
    mujoco: Any = pytest.importorskip("mujoco")
    body = "<worldbody><body><joint name='j'/><geom size='1'/></body></worldbody>"
    sensor = "<sensor><jointpos joint='j' {}/></sensor>"
    plain, delayed = (
        mujoco.MjModel.from_xml_string(f"<mujoco>{body}{sensor.format(extra)}</mujoco>")
        for extra in ("", "delay='0.01' nsample='5'")
    )
    assert simulator_state.physics_is_exact(plain)
    assert not simulator_state.physics_is_exact(delayed)
