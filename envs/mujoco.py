"""MuJoCo by EnvPool's C++ threads: the robots of Gym; dm_control's suite uses it too (`dmc.py`).

Dynamics and rewards are those of gymnasium's v4 and v5 (MuJoCo 3.6 inside). Observations are
float64 there and float32 from here on; a float64 too large for that counts as infinite.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from cerl.config import MujocoEnv
from cerl.envs.host import nearest

ROBOTS = (
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "Walker2d",
)
VERSIONS = ("v4", "v5")


def robot_ids() -> list[str]:
    """The ids of this family."""
    return [f"{robot}-{version}" for robot in ROBOTS for version in VERSIONS]


def envpool_robots(
    config: MujocoEnv, *, seeds: Sequence[int] | np.ndarray, threads: int
) -> "EnvPoolPhysics":
    """Simulators of one of Gym's robots.

    Args:    seeds [G] of the simulators.
    Raises:  ValueError with the nearest ids on an unknown one; ImportError without envpool.
    """
    ids = robot_ids()
    if config.name not in ids:
        raise ValueError(
            f"env.name: no Gym-MuJoCo robot is called {config.name!r}{nearest(config.name, ids)}; "
            f"`cerl list` prints all {len(ids)}; other MuJoCo ids of gymnasium run from a "
            "preset of yours with `base: gym/pendulum`"
        )
    return EnvPoolPhysics(config.name, seeds=seeds, threads=threads, extra="mujoco")


class EnvPoolPhysics:
    """G simulators of one EnvPool id, without a limit on the episode.

    Args:    seeds [G] of the simulators; keys of a dict observation, in the order in which they are
             joined (empty: an array, or all keys); repeat, simulator steps of an agent step (for
             tasks without terminals); extra of cerl that brings envpool.
    Raises:  ImportError without envpool; ValueError if the installed one lacks the id.
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
        self._make = partial(
            envpool.make_gymnasium,
            task,
            num_envs=len(seeds),
            batch_size=len(seeds),
            num_threads=threads,
            max_episode_steps=2**30,
        )
        self._env: Any = None
        self.reseed(seeds)
        own_limit = int(envpool.make_spec(task).config.max_episode_steps)
        self.limit = -(-own_limit // repeat)
        self._keys, self._repeat = keys, repeat
        space = self._env.action_space
        self.low, self.high = space.low, space.high
        self.observation = (self._joined(self._env.observation_space.sample(), 1).shape[-1],)

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """From the next reset on, which has to be of all simulators, only these seeds matter.

        EnvPool takes seeds only where it is built, so it is built anew.
        """
        # The old one goes first, with its threads and memory: EnvPool's own `close` frees nothing.
        self._env = None
        self._env = self._make(seed=[int(seed) for seed in seeds])

    def _joined(self, obs: Any, count: int) -> np.ndarray:
        """Observations [count, D] in float32."""
        if isinstance(obs, dict):
            keys = self._keys or tuple(obs)
            obs = np.concatenate([obs[key].reshape(count, -1) for key in keys], -1)
        with np.errstate(over="ignore"):
            return obs.reshape(count, -1).astype(np.float32)

    def reset(self, which: np.ndarray | None) -> np.ndarray:
        """Starts new episodes, of the indices `which` (ascending) or of all."""
        obs, info = self._env.reset(*(() if which is None else (which.astype(np.int32),)))
        return self._joined(obs, len(info["env_id"]))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: observation [G, D], reward [G] float32, terminal [G] bool.

        An episode that was over starts anew instead, with reward 0.
        """
        obs, reward, terminal, _, _ = self._env.step(action)
        for _ in range(self._repeat - 1):
            obs, more, terminal, _, _ = self._env.step(action)
            reward += more
        return self._joined(obs, len(action)), reward, terminal

    def close(self) -> None:
        self._env.close()
        del self._env
