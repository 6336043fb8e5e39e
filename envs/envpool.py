"""Simulators of the envpool package: G of them step side by side on C++ threads.

EnvPool takes seeds only where it is built, its `close` frees neither threads nor memory, and it
calls a terminal on the last step of its own time limit a truncation. So this class builds it anew
for new seeds, drops it to free it, and gives it no time limit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np


class EnvPool:
    """G simulators of one EnvPool id, without a limit on the episode.

    The package has to be importable: callers import it first, to say which extra of cerl brings it.

    Args:    task, EnvPool's id; seeds [G] of the simulators; threads of the simulators; options as
             `envpool.make_gymnasium` has them.
    """

    def __init__(
        self, task: str, *, seeds: Sequence[int] | np.ndarray, threads: int, **options: Any
    ) -> None:
        import envpool

        self._make = partial(
            envpool.make_gymnasium,
            task,
            num_envs=len(seeds),
            batch_size=len(seeds),
            num_threads=threads,
            max_episode_steps=2**30,
            **options,
        )
        self._env: Any = None
        self.reseed(seeds)

    @property
    def spaces(self) -> tuple[Any, Any]:
        """The gymnasium spaces of one observation and of one action."""
        return self._env.observation_space, self._env.action_space

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """Builds the simulators anew; a reset of all of them has to follow. Args: seeds [G]."""
        # Dropped before the next one is built, so that the two never hold memory at once.
        self._env = None
        self._env = self._make(seed=[int(seed) for seed in seeds])

    def reset(self, which: np.ndarray | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts new episodes, of the indices `which` (ascending) or of all.

        Returns: observations and info of these simulators.
        """
        return self._env.reset(*(() if which is None else (which.astype(np.int32),)))

    def step(self, action: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One step of all simulators: observation, reward, terminated, truncated [G], info.

        A simulator whose episode ended on the step before starts the next one, with reward 0.
        """
        return self._env.step(action)

    def close(self) -> None:
        """Frees the simulators and their threads."""
        self._env.close()
        self._env = None
