"""Gymnasium environments with discrete or Box actions: S x E simulators of one id.

The simulators are stepped one after the other, as in gymnasium's SyncVectorEnv with NEXT_STEP
autoreset, and every simulator has a seed of its own. Classic control, toy text and the MuJoCo
robots are saved and restored exactly (`simulator_state.py`). Other simulators may keep state that
cannot be read from outside, so a resumed run starts new episodes in them. Differs: a terminal step
that also reaches the time limit is terminal only; observations and rewards become float32.
"""

import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from cerl.config import GymEnv
from cerl.data import EnvSpec, Step
from cerl.envs import simulator_state
from cerl.envs.gym_task import create
from cerl.envs.host import Bounds, Outbox, host_actions, host_controls, simulator_seeds
from cerl.envs.nonfinite import Watch
from cerl.own_code import cause, import_module
from cerl.text import visible

# What gymnasium requires of a task's methods, for error messages.
_STEP = "step(action) has to return (observation, reward, terminated, truncated, info)"
_RESET = "reset(seed=..., options=...) has to return (observation, info)"
_MOST_ACTIONS = 4096  # joint actions of a MultiDiscrete space; each is an output of the network


class JointAction(gymnasium.ActionWrapper):
    """Turns a MultiDiscrete action into one number; the last component changes fastest."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, spaces.MultiDiscrete)  # _make checks it
        self.parts = space
        self.action_space = spaces.Discrete(int(space.nvec.prod()))

    def action(self, action: Any) -> np.ndarray:
        """The components of joint action number `action`, in the space's shape and type."""
        parts = self.parts
        values = np.array(np.unravel_index(int(action), parts.nvec.reshape(-1)))
        return (values.reshape(parts.nvec.shape) + parts.start).astype(parts.dtype)


# Modules of gymnasium's simulators that need no further package.
_PLAIN = ("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.")


def _make(name: str, config: GymEnv, *, longest: int, where: str) -> gymnasium.Env:
    """One simulator with spaces that `Gym` supports; arguments as in `create`.

    Raises:  the errors of `create`, and ValueError if actions are neither discrete nor floats, or
             observations are not numbers of a fixed size.
    """
    env = create(name, config, longest=longest, where=where)
    space = env.action_space
    if isinstance(space, spaces.MultiDiscrete) and 1 <= np.prod(space.nvec, dtype=float) <= (
        _MOST_ACTIONS
    ):
        env = JointAction(env)
        space = env.action_space
    continuous = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not continuous and not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"env.name: expected discrete actions or a Box of floats, got {space} of "
            f"{config.name}; choose an id with one of these action spaces, or a MultiDiscrete of "
            f"at most {_MOST_ACTIONS} combinations"
        )
    known = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if not all(isinstance(part, known) for part in _parts(env.observation_space)):
        raise ValueError(
            f"env.name: expected observations of numbers and fixed size, got "
            f"{env.observation_space} of {config.name}; register an id whose observations are a Box"
        )
    return env


def _parts(space: spaces.Space) -> Iterator[spaces.Space]:
    """The spaces nested in a Tuple or Dict at any depth; of any other space, the space itself."""
    if isinstance(space, spaces.Tuple | spaces.Dict):
        inner = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        for part in inner:
            yield from _parts(part)
    else:
        yield space


def _lies_in(space: spaces.Space, value: Any) -> bool:
    """Whether an observation fits its space in shape and in being whole numbers or not.

    The bounds of a Box of floats are not checked: many simulators exceed them slightly.
    """
    if isinstance(space, spaces.Discrete) and isinstance(value, int | np.integer):
        return bool(0 <= value - space.start < space.n)  # ten times faster than `contains`
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return bool(space.contains(value))
    if isinstance(space, spaces.Tuple):
        sizes = isinstance(value, tuple | list) and len(value) == len(space.spaces)
        return sizes and all(map(_lies_in, space.spaces, value))
    if isinstance(space, spaces.Dict):
        names = isinstance(value, Mapping) and value.keys() == space.spaces.keys()
        return names and all(_lies_in(part, value[key]) for key, part in space.spaces.items())
    values = np.asarray(value)
    if values.shape != space.shape or values.dtype.kind not in "biuf":
        return False
    whole = np.dtype(space.dtype).kind != "f"
    return not whole or bool((values.astype(space.dtype) == values).all())


def _number(value: Any, what: str) -> float:
    """Reads one number that a simulator returned, possibly as an array of one element.

    Args:    what, the name of the value in the message.
    Raises:  TypeError on anything else.
    """
    if isinstance(value, int | float):
        return float(value)
    values = np.asarray(value)
    if values.size != 1 or values.dtype.kind not in "biuf":
        shown = reprlib.repr(value)
        raise TypeError(f"expected {what} to be one number, got {shown} ({type(value).__name__})")
    return float(values.item())


def _flag(value: Any, what: str) -> bool:
    """Reads a flag that a simulator returned, possibly as 1 or 0. Raises: TypeError otherwise."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    number = _number(value, what)
    if number not in (0.0, 1.0):
        raise TypeError(f"expected {what} to be True or False, got {number}")
    return bool(number)


def _parted(result: Any, count: int, method: str) -> tuple[Any, ...]:
    """The values that a method returned. Raises: TypeError unless they are a tuple of `count`."""
    if not isinstance(result, tuple) or len(result) != count:
        size = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        raise TypeError(f"{method} returned a {type(result).__name__}{size}")
    return result


def builtin_ids() -> list[str]:
    """Gymnasium's own ids that need no further package, each in its newest version."""
    newest: dict[str, Any] = {}
    for spec in gymnasium.registry.values():
        old = newest.get(spec.name)
        if isinstance(spec.entry_point, str) and spec.entry_point.startswith(_PLAIN):
            newest[spec.name] = max(spec, old, key=lambda s: s.version or 0) if old else spec
    return sorted(spec.id for spec in newest.values())


def _stored(space: spaces.Box, *, flags: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of an observation in replay.

    Args:    flags, whether every number is 0 or 1, as in joined one-hot and binary parts.
    Returns: shape; bool for a space of bool, uint8 for one of uint8 or of flags, else float32.
    """
    if space.dtype == np.bool_:
        dtype = torch.bool
    else:
        dtype = torch.uint8 if flags or space.dtype == np.uint8 else torch.float32
    return space.shape or (1,), dtype


class Gym:
    """A VecEnv of S x E simulators of one gymnasium id.

    Observations: a Box keeps its shape (uint8 and bool stay as they are, other numbers become
    float32), Discrete and MultiDiscrete become one-hot, MultiBinary becomes flags; a Tuple or Dict
    of these is flattened and joined. float32 has 24 bits: a Unix time in seconds is rounded to a
    multiple of 128, so a task should return differences of such numbers. A reward is one number, or
    an array of one element. Actions: Discrete, MultiDiscrete as one number, or a Box of floats,
    flattened and scaled from [-1, 1] to its bounds. A Step that was returned is not overwritten by
    later steps.

    `restart` resets the simulators with new seeds. If a simulator keeps some state when it is reset
    with a seed, that state remains.

    Args:    seeds are the user's numbers; salt gives each consumer of a seed (training, evaluation)
             random numbers of its own; longest, agent steps after which an episode is truncated
             besides the config's own limit (0: never).
    Raises:  ValueError on an unknown id or argument, actions that are neither discrete nor bounded
             floats, observations without a fixed size; ImportError where a module or a package is
             missing; RuntimeError where the task's own code fails, here and in every step.
    """

    def __init__(
        self,
        config: GymEnv,
        *,
        seeds: Sequence[int],
        salt: int,
        device: torch.device | str,
        longest: int = 0,
    ) -> None:
        self._config, self._lead = config, (len(seeds), config.envs)
        self._seeds = partial(simulator_seeds, seeds, salt=salt, envs=config.envs)
        self._generation = 0  # the number that the simulators' seeds are drawn with
        self.note = ""  # of `load_state_dict`, as in `VecEnv`
        self._seeded = False  # whether the simulators have been reset with their seeds
        self._watch = Watch(config.diverged, name=config.name, seeds=tuple(seeds), envs=config.envs)
        module, _, name = config.name.rpartition(":")
        if module:
            import_module(module, key="env.name")
        self._envs = [
            _make(name, config, longest=longest, where=self._watch.where(index))
            for index in range(len(seeds) * config.envs)
        ]
        env = self._envs[0]
        self._space = env.observation_space
        self._actions = env.action_space
        self._bounds: Bounds | None = None
        if isinstance(self._actions, spaces.Box):
            self._bounds = Bounds(self._actions.low, self._actions.high, name=config.name)
            count = len(self._bounds.low)
        else:
            assert isinstance(self._actions, spaces.Discrete)  # `_make` has checked it
            count = int(self._actions.n)
        flags = not any(isinstance(part, spaces.Box) for part in _parts(self._space))
        self._joined = not isinstance(self._space, spaces.Box)
        flat = spaces.flatten_space(self._space) if self._joined else self._space
        assert isinstance(flat, spaces.Box)  # every kind of space that `_make` allows gives a Box
        shape, dtype = _stored(flat, flags=flags)
        self.spec = EnvSpec(
            name=config.name,
            observation=shape,
            dtype=dtype,
            actions=count,
            envs=config.envs,
            frames=1,
            resident=False,
            exact_state=simulator_state.exact(env),
            continuous=self._bounds is not None,
        )
        self._outbox = Outbox(self.spec, seeds=len(seeds), device=device)
        count = len(self._envs)
        self._shape = flat.shape  # of the simulator's observation; () is stored as [1]
        self._obs = np.zeros((count, *shape), dtype=torch.empty(0, dtype=dtype).numpy().dtype)
        self._reward = np.zeros(count, dtype=np.float64)
        self._terminated = np.zeros(count, dtype=bool)
        self._truncated = np.zeros(count, dtype=bool)
        self._elapsed = np.zeros(count, dtype=np.int64)  # agent steps of the episode

    def _take(self, index: int, obs: Any) -> None:
        """Writes a simulator's observation into the results of this step.

        Raises:  TypeError on one that contradicts the simulator's observation_space.
        """
        mine = self._obs[index]
        if self._joined:
            mine[...] = self._flattened(obs)
            return
        values = np.asarray(obs)
        if values.dtype == mine.dtype and values.shape == self._shape:
            mine[...] = values
            return
        whole = mine.dtype.kind != "f"
        if values.shape != self._shape or values.dtype.kind not in ("biu" if whole else "biuf"):
            raise TypeError(
                f"expected an observation of shape {self._shape}"
                f"{' of whole numbers' if whole else ''}, got {values.shape} of {values.dtype}; "
                "the simulator contradicts its observation_space"
            )
        with np.errstate(over="ignore"):  # numbers too large for float32 are handled by `_watch`
            mine[...] = values
        if whole and (mine != values).any():
            wrong = values.reshape(-1)[(mine != values).reshape(-1)][0]
            raise TypeError(
                f"expected an observation of {mine.dtype}, got the value {wrong}; the simulator "
                "contradicts its observation_space"
            )

    def _flattened(self, obs: Any) -> Any:
        """An observation that is no Box (joined parts, one-hot numbers) as one array."""
        if not _lies_in(self._space, obs):
            raise TypeError(
                f"expected an observation in {self._space}, got {reprlib.repr(obs)}; the simulator "
                "contradicts its observation_space"
            )
        if self._obs.dtype.kind != "f":
            return spaces.flatten(self._space, obs)
        with np.errstate(over="ignore"):
            return spaces.flatten(self._space, obs)

    def _reset_one(self, index: int, seed: int | None) -> None:
        self._elapsed[index] = 0
        try:
            obs, _ = _parted(self._envs[index].reset(seed=seed), 2, "reset")
            self._take(index, obs)
        except Exception as error:
            raise RuntimeError(
                f"{self._watch.where(index, 0)}: {cause(error)}; {_RESET}"
            ) from error
        self._reward[index] = 0.0
        self._terminated[index] = self._truncated[index] = False

    def _step_one(self, index: int, action: Any) -> None:
        try:
            result = _parted(self._envs[index].step(action), 5, "step")
            obs, reward, terminated, truncated, _ = result
            self._take(index, obs)
            self._reward[index] = _number(reward, "the reward")
            self._terminated[index] = over = _flag(terminated, "terminated")
            self._truncated[index] = _flag(truncated, "truncated") and not over
        except Exception as error:
            where = self._watch.where(index, int(self._elapsed[index]))
            raise RuntimeError(f"{where}: {cause(error)}; {_STEP}") from error

    def _controls(self, action: Tensor, ended: np.ndarray) -> tuple[list[Any], np.ndarray]:
        """The actions in the form that the simulators take.

        Args:    ended [S * E] bool, simulators that ignore their action.
        Returns: a list with the action for each simulator, and [S * E] bool, True where the agent's
                 action was not finite.
        """
        name, count, space = self._config.name, self.spec.actions, self._actions
        ignored = ended.reshape(self._lead)
        if self._bounds is None:
            values = host_actions(action, name=name, count=count, ignored=ignored).reshape(-1)
            assert isinstance(space, spaces.Discrete)
            return (values + space.start).tolist(), np.zeros_like(ended)
        controls = host_controls(action, name=name, count=count, ignored=ignored)
        controls, bad = self._watch.controls(controls)
        assert isinstance(space, spaces.Box)
        values = self._bounds.scale(controls).astype(space.dtype)
        return list(values.reshape(-1, *space.shape)), bad

    def _send(self) -> Step:
        return self._outbox.send(self._obs, self._reward, self._terminated, self._truncated)

    def reset(self) -> Step:
        """Starts a new episode everywhere; the first call seeds the simulators."""
        seeds: list[int | None] = [None] * len(self._envs)
        if not self._seeded:
            seeds = self._seeds(generation=self._generation).tolist()
            self._seeded = True
        for index, seed in enumerate(seeds):
            self._reset_one(index, seed)
        fresh = np.ones_like(self._terminated)
        self._watch.results(self._obs, self._reward, self._obs, fresh=fresh, elapsed=self._elapsed)
        return self._send()

    def restart(self, number: int) -> Step:
        """Starts new episodes that depend on seeds, salt and `number` alone, as in `VecEnv`."""
        self._generation, self._seeded = number, False
        return self.reset()

    def step(self, action: Tensor) -> Step:
        """Advances every simulator by one agent step.

        Args:    action [S, E] int64 in [0, spec.actions), or [S, E, spec.actions] float32 in
                 [-1, 1], on any device; ignored where the last step ended an episode.
        Raises:  ValueError on a wrong shape, dtype or an action out of range; RuntimeError naming
                 the simulator on numbers that are not finite, unless `diverged` is "cut", and where
                 the task's own code fails or returns something that is no observation, reward or
                 flag.
        """
        ended = self._terminated | self._truncated
        actions, bad = self._controls(action, ended)
        before = self._obs.copy()
        self._elapsed += 1
        for index in range(len(self._envs)):
            if ended[index]:
                self._reset_one(index, None)
            else:
                self._step_one(index, actions[index])
        cut = bad | self._watch.results(
            self._obs, self._reward, before, fresh=ended, elapsed=self._elapsed
        )
        self._terminated &= ~cut
        self._truncated |= cut
        return self._send()

    def picture(self) -> np.ndarray:
        """What the first simulator draws, [H, W, 3] uint8, if `env.kwargs` has a `render_mode`."""
        return np.asarray(self._envs[0].render())

    def state_dict(self) -> dict[str, Any]:
        """The generation of the simulators' seeds, and their states where they can be saved."""
        state: dict[str, Any] = {"generation": self._generation}
        if self.spec.exact_state:
            state["seeded"] = self._seeded
            state["ended"] = torch.from_numpy(np.stack([self._terminated, self._truncated]))
            state["obs"] = torch.from_numpy(self._obs.copy())
            state["elapsed"] = torch.from_numpy(self._elapsed.copy())
            envs = self._envs if self._seeded else []
            state["simulators"] = [simulator_state.save(env) for env in envs]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores in place, or starts new episodes with new seeds where the state was lost.

        Returns: None, or the first Step of the new episodes.
        Raises:  CheckpointError if the state does not fit; then nothing is changed.
        """
        name = self._config.name
        keys = ("seeded", "ended", "obs", "elapsed", "simulators") if self.spec.exact_state else ()
        simulator_state.entries(state, ["generation", *keys], where=name)
        generation = simulator_state.whole(state["generation"], where=f"{name}.generation")
        if not keys:
            self.note = "simulators of this id may hide state that cannot be saved"
            self._generation, self._seeded = generation + 1, False
            return self.reset()
        seeded = state["seeded"]
        if type(seeded) is not bool:
            raise simulator_state.refuse(f"{name}.seeded", "True or False", seeded)
        shape = (2, len(self._envs))
        ended = simulator_state.array(state["ended"], shape, bool, where=f"{name}.ended")
        obs = simulator_state.array(
            state["obs"], self._obs.shape, self._obs.dtype, where=f"{name}.obs"
        )
        elapsed = simulator_state.array(
            state["elapsed"], shape[1:], np.int64, where=f"{name}.elapsed"
        )
        envs = self._envs if seeded else []
        simulator_state.restore(envs, state["simulators"], where=name)
        self._generation, self._seeded = generation, seeded
        self._terminated[:], self._truncated[:] = ended
        self._obs[:], self._elapsed[:] = obs, elapsed
        return None

    def close(self) -> None:
        """Closes the simulators. One that fails to close gives a warning and stops no run."""
        for index, env in enumerate(self._envs):
            try:
                env.close()
            # A task's own code may raise any error here, for example for a viewer never opened.
            except Exception as error:
                where = self._watch.where(index)
                text = f"{where}: closing it raised {type(error).__name__}: {error}"
                warnings.warn(visible(text), RuntimeWarning, stacklevel=2)
