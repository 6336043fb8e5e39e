"""MuJoCo simulated by EnvPool: Gym's robots, and a class that `dmc.py` uses too.

Dynamics and rewards are those of gymnasium's v4 and v5 environments; EnvPool contains MuJoCo 3.6.
Differs: observations are float64 in gymnasium and float32 here; a number too large for float32
becomes infinite.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cerl.config import MujocoEnv
from cerl.envs.envpool import EnvPool
from cerl.envs.host import nearest


def envpool_robots(
    config: MujocoEnv, *, seeds: Sequence[int] | np.ndarray, threads: int
) -> "EnvPoolPhysics":
    """Simulators of one of Gym's robots.

    Args:    seeds [G] of the simulators; threads of the simulators.
    Raises:  ImportError without envpool.
    """
    return EnvPoolPhysics(config.name, seeds=seeds, threads=threads, extra="mujoco")


class EnvPoolPhysics:
    """G simulators of one MuJoCo task of EnvPool, without a limit on the episode.

    Args:    task, EnvPool's id; seeds [G] of the simulators; threads, how many C++ threads step
             them; extra, the extra of cerl that installs envpool, for messages; keys of a dict
             observation, in the order in which they are joined (empty: all keys, or the observation
             is an array); repeat, simulator steps in an agent step (must be 1 for tasks that have
             terminals).
    Raises:  ImportError without envpool; ValueError if the installed envpool lacks the id.
    """

    dtype = torch.float32

    def __init__(
        self,
        task: str,
        *,
        seeds: Sequence[int] | np.ndarray,
        threads: int,
        extra: str,
        keys: tuple[str, ...] = (),
        repeat: int = 1,
    ) -> None:
        try:
            import envpool
            import envpool.mujoco.dmc.registration
            import envpool.mujoco.gym.registration  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{task} needs envpool ({error}): pip install 'cerl[{extra}]'"
            ) from error
        known = envpool.list_all_envs()
        if task not in known:
            raise ValueError(
                f"env.name: the installed envpool has no {task!r}{nearest(task, known)}; "
                f"pip install 'cerl[{extra}]' brings one that has"
            )
        self._pool = EnvPool(task, seeds=seeds, threads=threads)
        own_limit = int(envpool.make_spec(task).config.max_episode_steps)  # simulator steps
        self.limit = -(-own_limit // repeat)
        self._keys, self._repeat = keys, repeat
        observations, actions = self._pool.spaces
        self.low, self.high = actions.low, actions.high
        self.observation = (self._joined(observations.sample(), 1).shape[-1],)

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """Gives the simulators new seeds [G]. The caller then has to reset all of them."""
        self._pool.reseed(seeds)

    def _joined(self, obs: Any, count: int) -> np.ndarray:
        """Observations [count, D] float32, made of an array or of the entries of a dict."""
        if isinstance(obs, dict):
            keys = self._keys or tuple(obs)
            obs = np.concatenate([obs[key].reshape(count, -1) for key in keys], -1)
        with np.errstate(over="ignore"):
            return obs.reshape(count, -1).astype(np.float32)

    def reset(self, which: np.ndarray | None) -> np.ndarray:
        """Starts new episodes in the simulators with the indices `which` (ascending; None: in all).

        Returns: observations [len(which), D] float32.
        """
        obs, info = self._pool.reset(which)
        return self._joined(obs, len(info["env_id"]))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: observation [G, D], reward [G] float32, terminal [G] bool.

        An episode that was over starts anew instead, with reward 0.
        """
        obs, reward, terminal, _, _ = self._pool.step(action)
        for _ in range(self._repeat - 1):
            obs, more, terminal, _, _ = self._pool.step(action)
            reward += more
        return self._joined(obs, len(action)), reward, terminal

    def close(self) -> None:
        """Frees the simulators and their threads."""
        self._pool.close()
