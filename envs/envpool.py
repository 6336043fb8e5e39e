"""Simulators of the envpool package: G of them step side by side on C++ threads.

EnvPool has three peculiarities. It takes seeds only when it is built, so this class builds it anew
for new seeds. Its `close` frees neither threads nor memory, so this class also drops the object.
And it reports a terminal on the last step before its own time limit as a truncation, so this class
gives it a limit that no episode reaches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np


class EnvPool:
    """G simulators of one EnvPool id, without a limit on the episode.

    The package has to be importable: callers import it first, so that their error message can name
    the extra of cerl that installs it.

    Args:    task, EnvPool's id; seeds [G] of the simulators; threads, how many C++ threads step
             them; options, further arguments of `envpool.make_gymnasium`.
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
        """Builds the simulators anew; the caller then has to reset all. Args: seeds [G]."""
        # The old object is dropped before the new one is built: memory never holds both.
        self._env = None
        self._env = self._make(seed=[int(seed) for seed in seeds])

    def reset(self, which: np.ndarray | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts new episodes in the simulators with the indices `which` (ascending; None: in all).

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
