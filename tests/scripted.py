"""Two environments for tests: one whose episodes a test prescribes, and a chain to be learnt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cerl.data import EnvSpec, Step


class Scripted:
    """An environment whose lengths, rewards and ends of episodes are functions that a test gives.

    Episode k of environment e of a seed has `length(seed, e, k)` steps. It ends with a terminal if
    `terminal(seed, e, k)`, else it is truncated. The reward of its step t is
    `reward(seed, e, k, t, action)`, where the action is an int or, if continuous, a list of floats.
    An observation is (seed, e, k, t) in float32. `taken` holds the actions of every step.
    `restart(n)` continues with episode 1000 n.
    """

    def __init__(
        self,
        *,
        seeds: Sequence[int],
        envs: int,
        length: Callable[[int, int, int], int],
        reward: Callable[[int, int, int, int, Any], float],
        terminal: Callable[[int, int, int], bool] = lambda seed, e, k: True,
        actions: int = 3,
        resident: bool = False,
        exact: bool = True,
        continuous: bool = False,
    ) -> None:
        self.note = ""
        self.seeds, self.length, self.reward, self.terminal = list(seeds), length, reward, terminal
        self.spec = EnvSpec(
            "scripted",
            (4,),
            torch.float32,
            actions,
            envs,
            1,
            resident,
            exact_state=exact,
            continuous=continuous,
        )
        self.episode = [[-1] * envs for _ in self.seeds]
        self.time = [[0] * envs for _ in self.seeds]
        self.over = [[True] * envs for _ in self.seeds]
        self.taken: list[Tensor] = []

    def reset(self) -> Step:
        self.over = [[True] * self.spec.envs for _ in self.seeds]
        return self._advance(torch.zeros(len(self.seeds), self.spec.envs, dtype=torch.int64))

    def restart(self, number: int) -> Step:
        self.episode = [[1000 * number - 1] * self.spec.envs for _ in self.seeds]
        return self.reset()

    def step(self, action: Tensor) -> Step:
        self.taken.append(action.clone())
        return self._advance(action)

    def _advance(self, action: Tensor) -> Step:
        shape = (len(self.seeds), self.spec.envs)
        obs, reward = torch.zeros(*shape, 4), torch.zeros(shape)
        ended = torch.zeros(2, *shape, dtype=torch.bool)
        for s, seed in enumerate(self.seeds):
            for e in range(self.spec.envs):
                if self.over[s][e]:
                    self.episode[s][e] += 1
                    self.time[s][e], self.over[s][e] = 0, False
                else:
                    k, t = self.episode[s][e], self.time[s][e]
                    reward[s, e] = self.reward(seed, e, k, t, action[s, e].tolist())
                    self.time[s][e] = t + 1
                    self.over[s][e] = t + 1 == self.length(seed, e, k)
                    if self.over[s][e]:
                        ended[0 if self.terminal(seed, e, k) else 1, s, e] = True
                place = (seed, e, self.episode[s][e], self.time[s][e])
                obs[s, e] = torch.tensor(place, dtype=torch.float32)
        return Step(obs, reward, ended[0], ended[1])

    def state_dict(self) -> dict[str, Any]:
        if not self.spec.exact_state:
            return {}
        copies = ([list(row) for row in x] for x in (self.episode, self.time, self.over))
        return dict(zip(("episode", "time", "over"), copies, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        if not self.spec.exact_state:
            return self.reset()
        for name, value in state.items():
            setattr(self, name, [list(row) for row in value])
        return None

    def close(self) -> None:
        pass


class Chain:
    """Five cells in a row: action 1 goes right, 0 left; right from the last cell pays 1 and ends.

    Episodes start in the first cell, whose value under the best policy is gamma^4, and are
    truncated after 20 steps.
    """

    def __init__(self, *, seeds: int, envs: int) -> None:
        self.spec = EnvSpec("chain", (5,), torch.float32, 2, envs, 1, True, True)
        self.note = ""
        self.cell = torch.zeros(seeds, envs, dtype=torch.int64)
        self.time, self.over = torch.zeros_like(self.cell), self.cell == 0

    def reset(self) -> Step:
        self.over = torch.ones_like(self.over)
        return self.step(self.cell)

    def restart(self, number: int) -> Step:
        return self.reset()

    def step(self, action: Tensor) -> Step:
        right = (action == 1) & ~self.over
        won = right & (self.cell == 4)
        cell = torch.where(right, self.cell + 1, self.cell - 1).clamp(0, 4)
        self.cell = torch.where(self.over, 0, cell)
        self.time = torch.where(self.over, 0, self.time + 1)
        late = (self.time == 20) & ~won
        self.over = won | late
        obs = torch.nn.functional.one_hot(self.cell, 5).float()
        return Step(obs, won.float(), won, late)

    def state_dict(self) -> dict[str, Any]:
        return {"cell": self.cell, "time": self.time, "over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cell, self.time, self.over = state["cell"], state["time"], state["over"]

    def close(self) -> None:
        pass
