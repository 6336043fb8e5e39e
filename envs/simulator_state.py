"""Saves and restores the states of simulators as plain data, checked before any of it is used.

A state may come from a stranger's file. So it can set only what this file lists: the attributes
that a step or a reset changes in known classes, numpy's five bit generators, and the integration
state of a MuJoCo model of the same sizes. Simulators of other classes are not saved. If any part of
a state does not fit, CheckpointError is raised and no simulator is changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from cerl.state import CheckpointError

_GENERATORS = {
    kind.__name__: kind
    for kind in (
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.MT19937,
        np.random.Philox,
        np.random.SFC64,
    )
}
# The largest value of each whole number in a generator's state. They have to be checked here: numpy
# takes any value, and then reads beyond its buffers where a position is too large.
_LARGEST = {
    "state": 2**128 - 1,
    "inc": 2**128 - 1,
    "pos": 624,
    "buffer_pos": 4,
    "has_uint32": 1,
    "uinteger": 2**32 - 1,
    "has_gauss": 1,
}


def _shown(value: Any) -> str:
    """A value from a file as text for an error message; short, however large the value is."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {value.dtype}"
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**64):
        return repr(value)
    if type(value) is str:
        return repr(value[:40])
    return f"a value of type {type(value).__name__}"


def refuse(where: str, expected: str, got: Any) -> CheckpointError:
    """The error to raise for a saved value that does not fit.

    Args: where, the value's path in the saved state; expected, in words; got, the value.
    """
    return CheckpointError(
        f"{where}: expected {expected}, got {_shown(got)}; the saved state is of another task, of "
        "other options, or damaged"
    )


def entries(saved: Any, keys: Sequence[str], *, where: str) -> dict[str, Any]:
    """Checks a saved dict and returns it. Raises: CheckpointError unless it has just these keys."""
    if type(saved) is not dict:
        raise refuse(where, f"a dict of {', '.join(sorted(keys)) or 'nothing'}", saved)
    if saved.keys() != set(keys):
        raise CheckpointError(
            f"{where}: expected {', '.join(sorted(keys)) or 'nothing'}, got "
            f"{', '.join(sorted(str(key)[:40] for key in saved)) or 'nothing'}; the saved state is "
            "of another task, of other options, or damaged"
        )
    return saved


def whole(value: Any, *, where: str, largest: int = 2**62) -> int:
    """Checks a saved whole number and returns it.

    Raises: CheckpointError unless it is one from 0 to `largest`.
    """
    if type(value) is not int or not 0 <= value <= largest:
        raise refuse(where, f"a whole number from 0 to {largest}", value)
    return value


def array(value: Any, shape: Sequence[int], dtype: Any, *, where: str) -> np.ndarray:
    """A saved tensor, copied into a numpy array.

    Args:    shape that is expected; -1 stands for any length.
    Raises:  CheckpointError on another type, shape or dtype.
    """
    dtype = np.dtype(dtype)
    fits = (
        isinstance(value, Tensor)
        and value.dtype == torch.from_numpy(np.empty(0, dtype)).dtype
        and value.dim() == len(shape)
        and all(want in (-1, got) for want, got in zip(shape, value.shape, strict=True))
    )
    if not fits:
        raise refuse(where, f"a tensor {list(shape)} of {dtype}", value)
    return value.detach().cpu().numpy().copy()


# Random generators.


def save_numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A numpy generator's state as plain data; arrays become signed tensors with the same bits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return save_numbers(value)
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.view(f"i{value.itemsize}").copy())
        return value if isinstance(value, str | float) else int(value)

    return {key: plain(value) for key, value in state.items()}


def load_numbers(saved: Any, like: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A numpy generator's state, from what `save_numbers` returned.

    Args:    like, the state of any generator of the same kind.
    Raises:  CheckpointError naming the entry that does not fit.
    """

    def value(key: str, got: Any, mine: Any) -> Any:
        place = f"{where}.{key}"
        if isinstance(mine, Mapping):
            return load_numbers(got, mine, where=place)
        if isinstance(mine, np.ndarray):
            return array(got, mine.shape, f"i{mine.itemsize}", where=place).view(mine.dtype)
        if isinstance(mine, float):
            if type(got) is not float or not np.isfinite(got):
                raise refuse(place, "a finite float", got)
            return got
        if isinstance(mine, str):
            if type(got) is not str or got != mine:
                raise refuse(place, repr(mine), got)
            return got
        return whole(got, where=place, largest=_LARGEST[key])

    entries(saved, list(like), where=where)
    return {key: value(key, saved[key], mine) for key, mine in like.items()}


def _load_generator(saved: Any, *, where: str) -> np.random.Generator:
    name = saved.get("bit_generator") if type(saved) is dict else None
    kind = _GENERATORS.get(name) if type(name) is str else None
    if kind is None:
        raise refuse(f"{where}.bit_generator", f"one of {', '.join(_GENERATORS)}", name)
    bits: Any = kind(0)
    bits.state = load_numbers(saved, bits.state, where=where)
    return np.random.Generator(bits)


# MuJoCo.


def _mujoco() -> Any:
    """The mujoco package, imported on first use: few simulators need it."""
    import mujoco

    return mujoco


def _kept() -> int:
    """MuJoCo's bit mask for the parts of its state on which the next step depends."""
    return int(_mujoco().mjtState.mjSTATE_INTEGRATION)


def physics_is_exact(model: Any) -> bool:
    """Whether a MuJoCo model has no state beyond numbers that are safe to set to any value.

    Plugins have state of their own. A history of controls or sensors holds positions in buffers,
    which MuJoCo does not check.
    """
    state, size = _mujoco().mjtState, _mujoco().mj_stateSize
    hidden = int(state.mjSTATE_HISTORY) | int(state.mjSTATE_PLUGIN)
    return model.nplugin == 0 and size(model, _kept() & ~hidden) == size(model, _kept())


def save_physics(model: Any, data: Any) -> Tensor:
    """The state on which MuJoCo's next step depends, one float64 vector."""
    state = np.empty(_mujoco().mj_stateSize(model, _kept()))
    _mujoco().mj_getState(model, data, state, _kept())
    return torch.from_numpy(state)


def load_physics(saved: Any, model: Any, *, where: str) -> np.ndarray:
    """The vector from `save_physics`. Raises: CheckpointError if it is of another model."""
    return array(saved, (_mujoco().mj_stateSize(model, _kept()),), np.float64, where=where)


def set_physics(model: Any, data: Any, state: np.ndarray) -> None:
    """Puts a model into a state and computes positions, contacts and sensors from it."""
    _mujoco().mj_setState(model, data, state, _kept())
    _mujoco().mj_forward(model, data)
    # The line above also replaced the solver's starting point, which is a part of the state.
    _mujoco().mj_setState(model, data, state, _kept())


# Gymnasium: checks of saved attributes. A check takes (saved value, simulator or wrapper, where)
# and returns the attribute's value, or raises CheckpointError.

_Check = Callable[[Any, Any, str], Any]
_NUMBERS = (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)


def _number(saved: Any, layer: Any, where: str) -> Any:
    """None, a Python number or a numpy scalar."""
    if isinstance(saved, Tensor) and saved.dim() == 0 and saved.dtype in _NUMBERS:
        return saved.numpy(force=True)[()]
    if saved is None or type(saved) in (bool, float):
        return saved
    if type(saved) is int and abs(saved) < 2**62:
        return saved
    raise refuse(where, "a number", saved)


def _count(saved: Any, layer: Any, where: str) -> int | None:
    return None if saved is None else whole(saved, where=where)


def _flag(saved: Any, layer: Any, where: str) -> bool:
    if type(saved) is not bool:
        raise refuse(where, "True or False", saved)
    return saved


def _cell(saved: Any, layer: Any, where: str) -> Any:
    """The number of a state in a tabular task; `layer` has Discrete observations."""
    value = _number(saved, layer, where)
    if not isinstance(value, int | np.integer) or not 0 <= value < layer.observation_space.n:
        raise refuse(where, f"a whole number below {layer.observation_space.n}", saved)
    return value


def _hand(saved: Any, layer: Any, where: str) -> list[Any]:
    """A hand of Blackjack: cards up to 10, aces as 1."""
    if type(saved) is not list or not 1 <= len(saved) <= 32:
        raise refuse(where, "a list of 1 to 32 cards", saved)
    return [whole(_number(card, layer, where), where=where, largest=10) for card in saved]


def _vector(size: int) -> _Check:
    """The check of `size` numbers, in an array, tuple or list: some simulators use all three."""

    def check(saved: Any, layer: Any, where: str) -> Any:
        if isinstance(saved, Tensor) and saved.dtype in (torch.float32, torch.float64):
            dtype = np.float32 if saved.dtype == torch.float32 else np.float64
            return array(saved, (size,), dtype, where=where)
        if type(saved) not in (list, tuple) or len(saved) != size:
            raise refuse(where, f"{size} numbers", saved)
        return type(saved)(_number(part, layer, where) for part in saved)

    return check


_TABLE = {"s": _cell, "lastaction": _number}
# For each class, the attributes that its steps and resets change and depend on, with their checks.
# Its other attributes are constants, follow from these, or serve rendering only.
_CHANGING: dict[str, dict[str, _Check]] = {
    "gymnasium.envs.classic_control.acrobot.AcrobotEnv": {"state": _vector(4)},
    "gymnasium.envs.classic_control.cartpole.CartPoleEnv": {
        "state": _vector(4),
        "steps_beyond_terminated": _count,
    },
    "gymnasium.envs.classic_control.continuous_mountain_car.Continuous_MountainCarEnv": {
        "state": _vector(2)
    },
    "gymnasium.envs.classic_control.mountain_car.MountainCarEnv": {"state": _vector(2)},
    "gymnasium.envs.classic_control.pendulum.PendulumEnv": {
        "state": _vector(2),
        "last_u": _number,
    },
    "gymnasium.envs.toy_text.blackjack.BlackjackEnv": {"dealer": _hand, "player": _hand},
    "gymnasium.envs.toy_text.cliffwalking.CliffWalkingEnv": _TABLE,
    "gymnasium.envs.toy_text.frozen_lake.FrozenLakeEnv": _TABLE,
    "gymnasium.envs.toy_text.taxi.TaxiEnv": {**_TABLE, "fickle_step": _number},
    "gymnasium.wrappers.common.TimeLimit": {"_elapsed_steps": _count},
    "gymnasium.wrappers.common.OrderEnforcing": {"_has_reset": _flag},
    "gymnasium.wrappers.transform_observation.FlattenObservation": {},
    "cerl.envs.gym.JointAction": {},
}
_ROBOTS = "gymnasium.envs.mujoco."
# Positions of bodies, which are saved beside MuJoCo's state. Rewards of the robots compare the
# positions after a step with those before it, and MuJoCo computes the latter in the middle of the
# earlier step: they cannot be computed again from the state after that step.
_PLACES = ("xpos", "xipos")


def _layers(env: gymnasium.Env) -> Iterator[Any]:
    """The wrappers of an environment, outermost first, and last the environment itself."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _name(layer: Any) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _is_robot(layer: Any) -> bool:
    return _name(layer).startswith(_ROBOTS)


def exact(env: gymnasium.Env) -> bool:
    """Whether `save` keeps everything on which a simulator and its wrappers depend."""
    *wrappers, inner = _layers(env)
    if any(_name(wrapper) not in _CHANGING for wrapper in wrappers):
        return False
    kwargs = inner.spec.kwargs if inner.spec is not None else {}
    if kwargs.get("map_name", "") is None and kwargs.get("desc") is None:
        return False  # gymnasium draws the map of such a FrozenLake from an unseeded generator
    return physics_is_exact(inner.model) if _is_robot(inner) else _name(inner) in _CHANGING


def _plain(value: Any) -> Any:
    """The value of an attribute as plain data: numpy's arrays and scalars become tensors."""
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def save(env: gymnasium.Env) -> list[dict[str, Any]]:
    """The state of a simulator and of its wrappers, outermost first.

    Args:    env, an environment for which `exact` is True, after its first reset.
    """
    saved = [
        {key: _plain(getattr(layer, key)) for key in _CHANGING.get(_name(layer), {})}
        for layer in _layers(env)
    ]
    inner: Any = env.unwrapped
    saved[-1]["generator"] = save_numbers(inner.np_random.bit_generator.state)
    if _is_robot(inner):
        saved[-1]["physics"] = save_physics(inner.model, inner.data)
        for key in _PLACES:
            saved[-1][key] = torch.from_numpy(getattr(inner.data, key).copy())
    return saved


def restore(envs: Sequence[gymnasium.Env], saved: Any, *, where: str) -> None:
    """Checks the saved states of all simulators, then restores all simulators.

    Args:    saved, a list of what `save` returned for each; where, for messages.
    Raises:  CheckpointError naming the simulator and the attribute that do not fit; no simulator is
             changed then.
    """
    if type(saved) is not list or len(saved) != len(envs):
        got = len(saved) if type(saved) is list else _shown(saved)
        raise CheckpointError(
            f"{where}: expected the state of {len(envs)} simulators, got {got}; resume with the "
            "run's own seeds and env.envs"
        )
    changes = []
    for index, (env, layers) in enumerate(zip(envs, saved, strict=True)):
        changes += _changes(env, layers, where=f"{where}, simulator {index}")
    for change in changes:
        change()


def _changes(env: gymnasium.Env, saved: Any, *, where: str) -> list[Callable[[], None]]:
    """Checks a saved state. Returns: functions that restore the simulator when all are called."""
    layers = list(_layers(env))
    if type(saved) is not list or len(saved) != len(layers):
        raise refuse(where, f"a list of {len(layers)}, the wrappers and the simulator", saved)
    changes: list[Callable[[], None]] = []
    for layer, values in zip(layers, saved, strict=True):
        place = f"{where}, {type(layer).__name__}"
        checks, more = _CHANGING.get(_name(layer), {}), []
        if layer is layers[-1]:
            more = ["generator", "physics", *_PLACES] if _is_robot(layer) else ["generator"]
        entries(values, [*checks, *more], where=place)
        for key, check in checks.items():
            value = check(values[key], layer, f"{place}.{key}")
            changes.append(partial(setattr, layer, key, value))
        if more:
            generator = _load_generator(values["generator"], where=f"{place}.generator")
            changes.append(partial(setattr, layer, "np_random", generator))
        if "physics" in more:
            changes += _robot_changes(layer, values, where=place)
    return changes


def _robot_changes(robot: Any, saved: dict[str, Any], *, where: str) -> list[Callable[[], None]]:
    state = load_physics(saved["physics"], robot.model, where=f"{where}.physics")
    changes: list[Callable[[], None]] = [partial(set_physics, robot.model, robot.data, state)]
    for key in _PLACES:
        mine = getattr(robot.data, key)
        places = array(saved[key], mine.shape, np.float64, where=f"{where}.{key}")
        changes.append(partial(np.copyto, mine, places))
    return changes
