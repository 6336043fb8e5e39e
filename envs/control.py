"""Continuous control on the host's cores: S x E MuJoCo simulators, one of three back ends.

`Control` is the environment that the agent sees: actions in [-1, 1], episodes, time limits, and no
NaN. The simulators are those of one of three back ends: EnvPool with Gym's robots (`mujoco.py`),
EnvPool with dm_control's suite, or the dm-control package (both in `dmc.py`). The back ends are
given no time limit, because EnvPool reports a terminal on the last step before its own limit as a
truncation. So every end that a back end reports is a terminal, and `Control` does the truncating.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cerl.config import DmcEnv, MujocoEnv
from cerl.data import EnvSpec, Step
from cerl.envs.dmc import DmControl, envpool_suite
from cerl.envs.host import Bounds, Outbox, host_controls, simulator_seeds, worker_threads
from cerl.envs.mujoco import envpool_robots
from cerl.envs.nonfinite import Watch
from cerl.envs.simulator_state import array, entries, whole


class Simulators(Protocol):
    """A back end: G = S * E simulators whose episodes restart on the step after a terminal."""

    observation: tuple[int, ...]  # shape of one observation
    dtype: torch.dtype  # of observations: float32 (even if the simulator has float64) or uint8
    low: np.ndarray  # [A] bounds of an action
    high: np.ndarray
    limit: int  # agent steps of an episode, as the task's authors set it

    def reseed(self, seeds: np.ndarray) -> None:
        """Gives the simulators new seeds [G]. The caller then has to reset all of them."""
        ...

    def reset(self, which: np.ndarray | None) -> np.ndarray:
        """Starts new episodes in the simulators with the indices `which` (None: in all).

        Returns: observations [len(which), *observation].
        """
        ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One agent step with actions [G, A] within the bounds.

        Returns: observation [G, *observation], reward [G], terminal [G] bool. For an episode that
                 was over before the step: the first observation of the next one, 0 and False.
        """
        ...

    def close(self) -> None:
        """Frees the simulators and their threads."""
        ...


class Control:
    """A VecEnv of S x E simulators with continuous actions.

    Reaching the time limit truncates an episode unless that very step is terminal. A Step that was
    returned is not overwritten by later steps. The simulators of the dm-control package are
    restored exactly. EnvPool's cannot be saved: `load_state_dict` builds new ones with new seeds
    and starts new episodes (`note` says so).

    Args:    seeds are the user's numbers; salt gives each consumer of a seed (training, evaluation)
             random numbers of its own; longest, where above 0, limits an episode's agent steps as
             `time_limit` does.
    Raises:  ImportError without the back end; ValueError on an unknown name, unbounded actions or
             an option that the back end cannot express.
    """

    def __init__(
        self,
        config: MujocoEnv | DmcEnv,
        *,
        seeds: Sequence[int],
        salt: int,
        device: torch.device | str,
        longest: int = 0,
    ) -> None:
        self._config, self._shape = config, (len(seeds), config.envs)
        self._seeds = partial(simulator_seeds, seeds, salt=salt, envs=config.envs)
        self._generation = 0  # the number that the simulators' seeds were drawn with
        self.note = ""  # of `load_state_dict`, as in `VecEnv`
        self._simulators = simulators = _simulators(config, seeds=self._seeds(generation=0))
        self._bounds = Bounds(simulators.low, simulators.high, name=config.name)
        own_limit = config.time_limit or simulators.limit
        self._limit = min(own_limit, longest or own_limit)
        self._watch = Watch(config.diverged, name=config.name, seeds=tuple(seeds), envs=config.envs)
        self.spec = EnvSpec(
            name=config.name,
            observation=simulators.observation,
            dtype=simulators.dtype,
            actions=len(simulators.low),
            envs=config.envs,
            frames=config.repeat if isinstance(config, DmcEnv) else 1,
            resident=False,
            exact_state=isinstance(simulators, DmControl),
            continuous=True,
        )
        self._outbox = Outbox(self.spec, seeds=len(seeds), device=device)
        count = len(seeds) * config.envs
        shape, kind = self.spec.observation, torch.empty(0, dtype=self.spec.dtype).numpy().dtype
        self._obs = np.zeros((count, *shape), dtype=kind)  # of the last step
        self._elapsed = np.zeros(count, dtype=np.int64)  # agent steps of the episode
        # How the last step ended each episode, if it did.
        self._over = np.zeros(count, dtype=bool)  # terminal; the simulator's next step restarts it
        self._cut = np.zeros(count, dtype=bool)  # truncated; the simulator has to be reset

    def restart(self, number: int) -> Step:
        """Starts new episodes that depend on seeds, salt and `number` alone, as in `VecEnv`."""
        self._generation = number
        self._simulators.reseed(self._seeds(generation=number))
        return self.reset()

    def reset(self) -> Step:
        """Starts a new episode everywhere."""
        self._obs = self._simulators.reset(None)
        for each in (self._elapsed, self._over, self._cut):
            each[:] = 0
        reward = np.zeros(len(self._over))
        self._watch.results(self._obs, reward, self._obs, fresh=~self._over, elapsed=self._elapsed)
        return self._outbox.send(self._obs, reward, self._over, self._cut)

    def step(self, action: Tensor) -> Step:
        """Advances every simulator by one agent step.

        Args:    action [S, E, spec.actions] float32 in [-1, 1] on any device; ignored where the
                 last step ended an episode.
        Raises:  ValueError on a wrong shape, dtype or an action out of range; RuntimeError naming
                 the simulator on numbers that are not finite, unless `diverged` is "cut".
        """
        starts = self._over | self._cut
        ignored = starts.reshape(self._shape)
        controls = host_controls(
            action, name=self._config.name, count=self.spec.actions, ignored=ignored
        )
        controls, bad = self._watch.controls(controls)
        obs, reward, over = self._simulators.step(self._bounds.scale(controls))
        if self._cut.any():
            which = np.flatnonzero(self._cut)
            obs[which], over[which] = self._simulators.reset(which), False
        self._elapsed += 1
        if ignored.any():
            reward[starts] = self._elapsed[starts] = 0
        cut = bad | self._watch.results(obs, reward, self._obs, fresh=starts, elapsed=self._elapsed)
        self._obs, self._over = obs, over & ~cut
        self._cut = cut | ((self._elapsed >= self._limit) & ~over)
        return self._outbox.send(obs, reward, self._over, self._cut)

    def picture(self, height: int, width: int) -> np.ndarray:
        """What the camera of the first simulator sees, [height, width, 3] uint8.

        Raises:  ValueError unless the simulators are those of the dm-control package.
        """
        if not isinstance(self._simulators, DmControl):
            raise ValueError(f"{self._config.name}: EnvPool draws no pictures; use dm_control")
        return self._simulators.picture(height, width)

    def state_dict(self) -> dict[str, Any]:
        """The generation of the simulators' seeds, and their states where they can be saved."""
        state: dict[str, Any] = {"generation": self._generation}
        if isinstance(self._simulators, DmControl):
            state["elapsed"] = torch.from_numpy(self._elapsed.copy())
            state["ended"] = torch.from_numpy(np.stack([self._over, self._cut]))
            state["obs"] = torch.from_numpy(self._obs.copy())
            state["simulators"] = self._simulators.state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores in place, or starts new episodes with new seeds where that cannot be done.

        Returns: None, or the first Step of the new episodes.
        Raises:  CheckpointError if the state does not fit; then nothing is changed.
        """
        name, count = self._config.name, len(self._over)
        keys = ["elapsed", "ended", "obs", "simulators"] if self.spec.exact_state else []
        entries(state, ["generation", *keys], where=name)
        generation = whole(state["generation"], where=f"{name}.generation")
        if not isinstance(self._simulators, DmControl):
            self.note = "EnvPool's simulators cannot be saved"
            return self.restart(generation + 1)
        elapsed = array(state["elapsed"], (count,), np.int64, where=f"{name}.elapsed")
        ended = array(state["ended"], (2, count), bool, where=f"{name}.ended")
        obs = array(state["obs"], self._obs.shape, self._obs.dtype, where=f"{name}.obs")
        self._simulators.restore(state["simulators"], where=name)
        self._generation, self._elapsed, self._obs = generation, elapsed, obs
        self._over, self._cut = ended
        return None

    def close(self) -> None:
        """Frees the simulators and their threads."""
        self._simulators.close()


def _simulators(config: MujocoEnv | DmcEnv, *, seeds: np.ndarray) -> Simulators:
    """The back end that a config asks for. Args: seeds [G] of the simulators."""
    threads = worker_threads(config.threads, simulators=len(seeds))
    if isinstance(config, MujocoEnv):
        return envpool_robots(config, seeds=seeds, threads=threads)
    if config.backend == "envpool":
        return envpool_suite(config, seeds=seeds, threads=threads)
    return DmControl(config, seeds=seeds)
