"""A gymnasium task of one's own: importing this module registers it.

`--env.kwargs` gives the arguments of its constructor.

    cerl train gym/cartpole --env.name corridor:Corridor-v0 --env.kwargs length=5
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Corridor(gymnasium.Env[np.ndarray, np.int64]):
    """A corridor: action 1 goes right, action 0 goes left; +1 at its right end."""

    def __init__(self, *, length: int = 5) -> None:
        self.length, self.place = length, 0
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def _seen(self) -> np.ndarray:
        return np.array([self.place / self.length], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(self.length))
        return self._seen(), {}

    def step(self, action: np.int64):
        self.place = max(self.place + (1 if action == 1 else -1), 0)
        over = self.place == self.length
        return self._seen(), float(over), over, False, {}


gymnasium.register("Corridor-v0", entry_point=f"{__name__}:Corridor", max_episode_steps=30)
