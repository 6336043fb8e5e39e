"""Steps a MinAtar game of ours and of the `minatar` package side by side on shared random numbers.

The package draws from `RandomState` objects. Here a `Tape` takes their place: it returns the
uniform numbers that our environment uses for that game and step. The package is used only as the
reference of tests.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import minatar
import numpy as np
import torch

from cerl.config import MinAtarEnv
from cerl.envs import make_resident
from cerl.envs.resident import Resident

# obs [G, C, 10, 10] bool, step, generator -> action ids of the full set [G]
Policy = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


class Tape:
    """Replaces `RandomState`: `rand` is the next uniform number u, `randint` a + int(u * (b - a)).

    Numbers are taken in order. Some games draw different things on different steps. For these,
    `sections` maps the name of a function of the package to the column at which its draws begin on
    every call. Columns are those of the rules; the number for sticky actions is not counted.
    """

    def __init__(self, sections: Mapping[str, int]) -> None:
        self.sections = dict(sections)
        self.row = np.zeros(1, dtype=np.float32)
        self.at = 0
        self.frame: object = None

    def put(self, row: np.ndarray, *, at: int) -> None:
        self.row, self.at, self.frame = row, at, None

    def rand(self, size: int | None = None) -> np.ndarray | float:
        return self._next(size)

    def randint(self, low: int, high: int | None = None, size: int | None = None) -> Any:
        low, high = (0, low) if high is None else (low, high)
        scaled = np.float32(self._next(size)) * np.float32(high - low)
        return low + (int(scaled) if size is None else np.asarray(scaled).astype(np.int64))

    def _next(self, size: int | None) -> np.ndarray | float:
        caller = sys._getframe(2)
        if caller.f_code.co_name in self.sections and caller is not self.frame:
            self.at, self.frame = 1 + self.sections[caller.f_code.co_name], caller
        start, self.at = self.at, self.at + (1 if size is None else size)
        if self.at > len(self.row):
            raise AssertionError(
                f"the package drew {self.at - 1} numbers for its rules, ours declares "
                f"{len(self.row) - 1}"
            )
        return float(self.row[start]) if size is None else self.row[start : self.at]


class Report(NamedTuple):
    """What happened in a comparison, so that a test can require that it covered enough."""

    steps: int  # game steps compared, resets not counted
    episodes: int  # episodes that ended by a terminal
    rewards: dict[float, int]  # how often each reward came


def side_by_side(
    name: str,
    *,
    games: int,
    steps: int,
    ramping: bool = True,
    sticky: float = 0.1,
    policy: Policy | None = None,
    sections: Mapping[str, int] | None = None,
    seed: int = 0,
    watch: Callable[[list, Resident], None] | None = None,
) -> Report:
    """Asserts that observation, reward and terminal are equal at every step of every game.

    Args:    policy gives the actions (None: uniform over all six); watch is called after every
             step with the package's game objects (`minatar.environments.<name>.Env`) and our
             environment, e.g. to count rare events.
    """
    config = MinAtarEnv(
        name=name,  # type: ignore[arg-type]
        envs=games,
        sticky=sticky,
        ramping=ramping,
        full_actions=True,
    )
    ours = make_resident(config, seeds=[seed], salt=0, device="cpu")
    theirs = [minatar.Environment(name, sticky, ramping) for _ in range(games)]
    tapes = [Tape(sections or {}) for _ in range(games)]
    for env, tape in zip(theirs, tapes, strict=True):
        env.__dict__["random"] = env.env.random = tape
    rng = np.random.default_rng(seed)

    def fill() -> None:
        for tape, row in zip(tapes, ours.draws()[0].numpy(), strict=True):
            # A step reads from the number for sticky actions on; `restart` skips that number.
            tape.put(row, at=0)

    def check(where: str, obs: torch.Tensor) -> np.ndarray:
        got = obs[0].numpy()
        want = np.stack([env.state() for env in theirs]).transpose(0, 3, 1, 2)
        if not np.array_equal(got, want):
            game, channel, row, column = np.argwhere(got != want)[0]
            raise AssertionError(
                f"{name}, {where}, game {game}: observation differs first at channel {channel}, "
                f"row {row}, column {column}\nours\n{got[game, channel].astype(int)}\n"
                f"package\n{want[game, channel].astype(int)}"
            )
        return got

    def restart(env: minatar.Environment, tape: Tape) -> None:
        tape.at = 1
        env.reset()

    fill()
    first = ours.reset()
    for env, tape in zip(theirs, tapes, strict=True):
        restart(env, tape)
    obs = check("reset", first.obs)
    done = np.zeros(games, dtype=bool)
    played, episodes, rewards = 0, 0, {}
    for t in range(steps):
        action = rng.integers(0, 6, games) if policy is None else policy(obs, t, rng)
        fill()
        result = ours.step(torch.from_numpy(np.asarray(action, dtype=np.int64))[None])
        reward, terminal = np.zeros(games, np.float32), np.zeros(games, bool)
        for g, (env, tape) in enumerate(zip(theirs, tapes, strict=True)):
            if done[g]:
                restart(env, tape)
            else:
                reward[g], terminal[g] = env.act(int(action[g]))
        obs = check(f"step {t}", result.obs)
        for label, got, want in (
            ("reward", result.reward[0].numpy(), reward),
            ("terminal", result.terminated[0].numpy(), terminal),
            ("truncation", result.truncated[0].numpy(), np.zeros(games, bool)),
        ):
            if not np.array_equal(got, want):
                g = np.flatnonzero(got != want)[0]
                raise AssertionError(
                    f"{name}, step {t}, game {g}: {label} ours {got[g]}, package {want[g]}"
                )
        played += int((~done).sum())
        episodes += int(terminal.sum())
        for value in reward[~done]:
            rewards[float(value)] = rewards.get(float(value), 0) + 1
        done = terminal
        if watch is not None:
            watch([env.env for env in theirs], ours)
    return Report(steps=played, episodes=episodes, rewards=rewards)
