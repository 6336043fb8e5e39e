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
from cerl.envs.nonfinite import Watch
from cerl.envs.simulator_state import array, entries, whole


class Simulators(Protocol):
    """What a back end does: simulates G episodes that restart on the step after their terminal."""

    observation: tuple[int, ...]  # shape of one observation
    dtype: torch.dtype  # of it: float32 (whatever the simulator computes with) or uint8
    low: np.ndarray  # [A] bounds of an action
    high: np.ndarray
    limit: int  # agent steps of an episode as the task's authors have it

    def reseed(self, seeds: np.ndarray) -> None: ...

    def reset(self, which: np.ndarray | None) -> np.ndarray: ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def close(self) -> None: ...


class Control:
    """A VecEnv of S x E simulators with continuous actions.

    Reaching the time limit truncates unless that very step is terminal. Steps have memory of their
    own: they stay valid as long as somebody holds them. The simulators of dm_control are restored
    exactly; EnvPool's cannot be saved, so `load_state_dict` builds new ones with new seeds and
    starts new episodes (`note` says so).

    Args:    seeds are the user's numbers; salt separates consumers (training, evaluation) of a
             seed; longest, where above 0, limits an episode's agent steps as `time_limit` does.
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
        self._config, self._seeds, self._salt = config, tuple(seeds), salt
        self._generation = 0
        self.note = ""  # how restoring went
        self._simulators = simulators = self._build()
        self._bounds = Bounds(simulators.low, simulators.high, name=config.name)
        own_limit = config.time_limit or simulators.limit
        self._limit = min(own_limit, longest or own_limit)
        self._watch = Watch(config.diverged, name=config.name, seeds=self._seeds, envs=config.envs)
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
        self._over = np.zeros(count, dtype=bool)  # terminal: the simulator's next step is its reset
        self._cut = np.zeros(count, dtype=bool)  # truncated: has to be reset

    def _simulator_seeds(self) -> np.ndarray:
        return simulator_seeds(
            self._seeds, salt=self._salt, envs=self._config.envs, generation=self._generation
        )

    def _build(self) -> Simulators:
        config, seeds = self._config, self._simulator_seeds()
        threads = worker_threads(config.threads, simulators=len(seeds))
        if isinstance(config, MujocoEnv):
            return envpool_robots(config, seeds=seeds, threads=threads)
        if config.backend == "envpool":
            return envpool_suite(config, seeds=seeds, threads=threads)
        return DmControl(config, seeds=seeds)

    def restart(self, number: int) -> Step:
        """A new episode everywhere; all that follows depends on the seeds and `number` alone."""
        self._generation = number
        self._simulators.reseed(self._simulator_seeds())
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
        """How often the simulators were seeded, and all of them where they can be saved."""
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
