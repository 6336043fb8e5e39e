"""Partial observability: masks, noise, dropout and flicker over any environment, on the device.

One wrapper applies the options of `env.observe`, in this order: it keeps some components, adds
Gaussian noise, sets single components to 0 (dropout), sets the whole observation to 0 (flicker).
Random numbers are counter-based (seed value, purpose, number of steps). They are drawn once, when
an observation is made, and replay stores the changed observation. All observations are changed in
this way, including the first and the last of an episode.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cerl import draw
from cerl.config import EnvConfig, ObserveConfig
from cerl.data import EnvSpec, Step
from cerl.envs.api import VecEnv
from cerl.envs.host import nearest

# For each robot, the indices of the components that are positions or angles, and of those that are
# velocities. Contact forces, inertias and the like are neither. The robots are those of Gym-MuJoCo,
# versions 4 and 5, and of gymnasium's classic control.
ROBOTS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "Ant": (range(13), range(13, 27)),
    "CartPole": ((0, 2), (1, 3)),
    "HalfCheetah": (range(8), range(8, 17)),
    "Hopper": (range(5), range(5, 11)),
    "Humanoid": (range(22), range(22, 45)),
    "HumanoidStandup": (range(22), range(22, 45)),
    "InvertedDoublePendulum": (range(5), range(5, 8)),
    "InvertedPendulum": (range(2), range(2, 4)),
    "Pendulum": ((0, 1), (2,)),
    "Pusher": ((*range(7), *range(14, 23)), range(7, 14)),
    "Reacher": ((*range(6), 8, 9), (6, 7)),
    "Swimmer": (range(3), range(3, 8)),
    "Walker2d": (range(8), range(8, 17)),
}


def observed(
    env: VecEnv,
    config: EnvConfig,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
) -> VecEnv:
    """The environments; wrapped in `Observed` unless `config.observe` changes nothing.

    Args:    seeds, salt and device with which the environments were made.
    Raises:  ValueError on an option that is impossible for observations of this kind; the
             environments are closed then.
    """
    if config.observe == ObserveConfig():
        return env
    try:
        kept = _kept(env.spec, config)
        if config.observe.noise and not env.spec.dtype.is_floating_point:
            raise ValueError(
                f"env.observe.noise: expected observations of fractions, got {env.spec.dtype} from "
                f"{env.spec.name}; use dropout or flicker"
            )
    except ValueError:
        env.close()
        raise
    key = draw.seed_keys(seeds, salt=salt, device=device)
    return Observed(env, config.observe, kept=kept, key=key)


def _kept(spec: EnvSpec, config: EnvConfig) -> tuple[int, ...]:
    """The indices of the components to keep, in order; empty: all are kept.

    Raises:  ValueError on an image, an index out of range or given twice, an unknown robot.
    """
    observe = config.observe
    if observe.keep == "all" and not observe.indices:
        return ()
    key = "indices" if observe.indices else "keep"
    if observe.keep != "all" and observe.indices:
        raise ValueError(
            "env.observe.keep, env.observe.indices: both choose components; expected keep all or "
            f"no indices, got {observe.keep} and {list(observe.indices)}"
        )
    if len(spec.observation) != 1:
        raise ValueError(
            f"env.observe.{key}: expected observations that are vectors, got images "
            f"{list(spec.observation)} from {spec.name}; use dropout or flicker"
        )
    size = spec.observation[0]
    kept = observe.indices or _named(size, config)
    if not all(0 <= index < size for index in kept):
        raise ValueError(
            f"env.observe.{key}: expected indices from 0 to {size - 1}, got {list(kept)}; "
            f"an observation of {spec.name} has {size} components"
        )
    if len(set(kept)) < len(kept):
        raise ValueError(f"env.observe.indices: expected different ones, got {list(kept)}")
    return tuple(kept)


def _named(size: int, config: EnvConfig) -> Sequence[int]:
    """The indices of the components that the option `keep` names, position or velocity.

    Args:    size, components of an observation.
    Raises:  ValueError if they are not known for this environment.
    """
    speeds = config.observe.keep == "velocity"
    if config.family == "point_mass":
        return range(size // 2, size) if speeds else range(size // 2)
    robot = config.name.rpartition(":")[2].rpartition("-v")[0]
    if config.family not in ("mujoco", "gym") or robot not in ROBOTS:
        hint = nearest(robot, ROBOTS) if config.family in ("mujoco", "gym") else ""
        raise ValueError(
            f"env.observe.keep: which components of {config.family}/{config.name} are "
            f"{config.observe.keep} is not known{hint}; expected one of {', '.join(ROBOTS)} "
            "(families mujoco and gym), the point mass, or env.observe.indices instead of keep"
        )
    return ROBOTS[robot][speeds]


class Observed:
    """A VecEnv that changes the observations of another VecEnv and nothing else.

    Args:    kept, indices of the components to keep, in order (empty: all); key [S] int64, from
             `draw.seed_keys`, on the device of the observations.
    """

    def __init__(
        self, env: VecEnv, config: ObserveConfig, *, kept: tuple[int, ...], key: Tensor
    ) -> None:
        self._env, self._config, self._key = env, config, key
        self._kept = torch.tensor(kept, dtype=torch.int64, device=key.device) if kept else None
        self._spec = env.spec._replace(observation=(len(kept),)) if kept else env.spec
        self._counter = torch.zeros((), dtype=torch.int64, device=key.device)

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def note(self) -> str:
        return self._env.note

    def reset(self) -> Step:
        """Starts a new episode everywhere."""
        return self._seen(self._env.reset())

    def restart(self, number: int) -> Step:
        """Starts new episodes that depend on seeds, salt and `number` alone, as in `VecEnv`."""
        self._counter.fill_(draw.first_step(number))
        return self._seen(self._env.restart(number))

    def step(self, action: Tensor) -> Step:
        """Advances every environment by one agent step; arguments are those of the wrapped one."""
        return self._seen(self._env.step(action))

    def _seen(self, step: Step) -> Step:
        """The step with its observations changed as the config asks."""
        config, obs = self._config, step.obs
        if self._kept is not None:
            obs = obs.index_select(-1, self._kept)
        lead, shape = obs.shape[1:2], obs.shape[1:]
        if config.noise:
            obs = obs + config.noise * draw.normal(self._key, draw.SENSOR, self._counter, shape)
        if config.dropout:
            lost = draw.uniform(self._key, draw.DROPOUT, self._counter, shape) < config.dropout
            obs = obs.masked_fill(lost, 0)
        if config.flicker:
            dark = draw.uniform(self._key, draw.FLICKER, self._counter, lead) < config.flicker
            obs = obs.masked_fill(dark.view(*dark.shape, *([1] * (obs.dim() - 2))), 0)
        self._counter.add_(1)
        return step._replace(obs=obs)

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped environments, and how often observations were changed."""
        return {"env": self._env.state_dict(), "shown": self._counter.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores a state in place.

        Returns: None, or the first Step of new episodes where the old ones cannot be continued.
        Raises:  ValueError if the state was saved without `env.observe`.
        """
        if state.keys() != {"env", "shown"}:
            raise ValueError(
                f"{self._spec.name}: the saved state holds {sorted(state)}, expected env and "
                "shown; it was saved without env.observe"
            )
        fresh = self._env.load_state_dict(state["env"])
        self._counter.copy_(state["shown"])
        return None if fresh is None else self._seen(fresh)

    def close(self) -> None:
        """Closes the wrapped environments."""
        self._env.close()
