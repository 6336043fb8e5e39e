"""Continuous control on the host's cores: S x E MuJoCo simulators, one of three back ends.

`Control` is what the agent sees: actions in [-1, 1], episodes, time limits, what is not finite.
Behind it simulate EnvPool (`mujoco.py`; Gym's robots and dm_control's suite) and the dm-control
package (`dmc.py`). The back ends know no time limit, so that an end of theirs is always a terminal:
EnvPool itself would call a terminal on the limit's step a truncation.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cerl.config import DmcEnv, MujocoEnv
from cerl.data import EnvSpec, Step
from cerl.envs.dmc import DmControl, envpool_suite
from cerl.envs.host import Bounds, Outbox, host_controls, simulator_seeds, worker_threads
from cerl.envs.mujoco import envpool_robots
from cerl.envs.watch import Watch


class Simulators(Protocol):
    """What a back end does: simulates G episodes that restart on the step after their terminal."""

    observation: tuple[int, ...]  # shape of one observation
    dtype: torch.dtype  # of it: float32 (whatever the simulator computes with) or uint8
    low: np.ndarray  # [A] bounds of an action
    high: np.ndarray
    limit: int  # agent steps of an episode as the task's authors have it

    def reset(self, which: np.ndarray | None) -> np.ndarray: ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def close(self) -> None: ...


class Control:
    """A VecEnv of S x E simulators with continuous actions.

    Reaching the time limit truncates unless that very step is terminal. Steps have memory of their
    own: they stay valid as long as somebody holds them. The simulators cannot be saved:
    `load_state_dict` builds new ones with new seeds and starts new episodes.

    Args:    seeds are the user's numbers; salt separates consumers (training, evaluation) of a
             seed.
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
    ) -> None:
        self._config, self._seeds, self._salt = config, tuple(seeds), salt
        self._generation = 0
        self._simulators = simulators = self._build()
        self._bounds = Bounds(simulators.low, simulators.high, name=config.name)
        self._limit = config.time_limit or simulators.limit
        self._watch = Watch(config.diverged, name=config.name, seeds=self._seeds, envs=config.envs)
        self.spec = EnvSpec(
            name=config.name,
            observation=simulators.observation,
            dtype=simulators.dtype,
            actions=len(simulators.low),
            envs=config.envs,
            frames=config.repeat if isinstance(config, DmcEnv) else 1,
            resident=False,
            exact_state=False,
            continuous=True,
        )
        self._outbox = Outbox(self.spec, seeds=len(seeds), device=device)
        count = len(seeds) * config.envs
        self._obs = np.zeros(0)  # [G, ...] of the last step
        self._elapsed = np.zeros(count, dtype=np.int64)  # agent steps of the episode
        self._over = np.zeros(count, dtype=bool)  # terminal: the simulator's next step is its reset
        self._cut = np.zeros(count, dtype=bool)  # truncated: has to be reset

    def _build(self) -> Simulators:
        config = self._config
        seeds = simulator_seeds(
            self._seeds, salt=self._salt, envs=config.envs, generation=self._generation
        )
        threads = worker_threads(config.threads, simulators=len(seeds))
        if isinstance(config, MujocoEnv):
            return envpool_robots(config, seeds=seeds, threads=threads)
        if config.backend == "envpool":
            return envpool_suite(config, seeds=seeds, threads=threads)
        return DmControl(config, seeds=seeds)

    def reset(self) -> Step:
        """Starts a new episode everywhere."""
        self._obs = self._simulators.reset(None)
        for array in (self._elapsed, self._over, self._cut):
            array[:] = 0
        reward = np.zeros(len(self._over))
        self._watch.results(self._obs, reward, self._obs, fresh=~self._over, elapsed=self._elapsed)
        return self._outbox.send(self._obs, reward, self._over, self._cut)

    def step(self, action: Tensor) -> Step:
        """Advances every simulator by one agent step.

        Args:    action [S, E, spec.actions] float32 in [-1, 1] on any device; ignored where the
                 last step ended an episode.
        Raises:  ValueError on a wrong shape, dtype or an action out of range; RuntimeError on
                 what is not finite, naming the simulator, unless `diverged` is "cut".
        """
        starts = self._over | self._cut
        ignored = starts.reshape(len(self._seeds), self._config.envs)
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

    def state_dict(self) -> dict[str, Any]:
        """How often the simulators were built; they themselves cannot be saved."""
        return {"generation": self._generation}

    def load_state_dict(self, state: dict[str, Any]) -> Step:
        """Builds new simulators with new seeds. Returns: the first Step of new episodes."""
        self._generation = int(state.get("generation", 0)) + 1
        self._simulators.close()
        self._simulators = self._build()
        return self.reset()

    def close(self) -> None:
        """Frees the simulators and their threads."""
        self._simulators.close()
