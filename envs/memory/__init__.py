"""Tasks that need memory, on the device: T-mazes, and the games of POPGym 1.0.7 at three levels.

Every task is a pair of pure rules (`Game`) and the agent steps after which it is truncated (0: it
ends by itself); a level is a set of options. Observations are those of the package flattened as
`gymnasium.spaces.flatten` does it (one-hot and joined), so nothing is lost and nothing is added.
Where description and code of the package differ, the code is followed; the files say where.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cerl.config import MemoryEnv
from cerl.envs.host import nearest
from cerl.envs.memory.autoencode import autoencode
from cerl.envs.memory.bandit import bandit
from cerl.envs.memory.battleship import battleship
from cerl.envs.memory.cartpole import cart_pole
from cerl.envs.memory.concentration import concentration
from cerl.envs.memory.count_recall import count_recall
from cerl.envs.memory.higher_lower import higher_lower
from cerl.envs.memory.minesweeper import minesweeper
from cerl.envs.memory.pendulum import pendulum
from cerl.envs.memory.repeat import repeat_first, repeat_previous
from cerl.envs.memory.tmaze import t_maze
from cerl.envs.resident import Game, Resident


class Task(NamedTuple):
    """Rules and the options that make a level of them."""

    rules: Callable[..., tuple[Game, int]]
    options: dict[str, bool | int | float | str]


def _levels(name: str, rules: Callable[..., tuple[Game, int]], **options: tuple) -> dict[str, Task]:
    """The three levels of a game: an option is (easy, medium, hard)."""
    return {
        f"{name}{level}": Task(rules, {key: values[k] for key, values in options.items()})
        for k, level in enumerate(("Easy", "Medium", "Hard"))
    }


_PLACES, _SPEEDS = (False,) * 3, (True,) * 3
POPGYM: dict[str, Task] = {
    **_levels("RepeatPrevious", repeat_previous, decks=(1, 2, 3), k=(4, 32, 64)),
    **_levels("RepeatFirst", repeat_first, decks=(1, 8, 16)),
    **_levels("CountRecall", count_recall, decks=(1, 2, 4), kind=("colors", "suits", "ranks")),
    **_levels("Autoencode", autoencode, decks=(1, 2, 3)),
    **_levels("PositionOnlyCartPole", cart_pole, speeds=_PLACES, length=(200, 400, 600)),
    **_levels("VelocityOnlyCartPole", cart_pole, speeds=_SPEEDS, length=(200, 400, 600)),
    **_levels(
        "NoisyPositionOnlyCartPole",
        cart_pole,
        speeds=_PLACES,
        length=(200, 200, 200),
        noise=(0.1, 0.2, 0.3),
    ),
    **_levels("PositionOnlyPendulum", pendulum, length=(200, 150, 100)),
    **_levels("NoisyPositionOnlyPendulum", pendulum, length=(200,) * 3, noise=(0.1, 0.2, 0.3)),
    **_levels("MultiarmedBandit", bandit, arms=(10, 20, 30), length=(200, 400, 600)),
    **_levels("HigherLower", higher_lower, decks=(1, 2, 3)),
    **_levels("Concentration", concentration, decks=(1, 2, 1), kind=("colors", "colors", "ranks")),
    **_levels("MineSweeper", minesweeper, side=(4, 6, 8), mines=(2, 6, 10)),
    **_levels("Battleship", battleship, side=(8, 10, 12)),
}
TASKS: dict[str, Task] = {
    "tmaze": Task(t_maze, {"length": 50, "oracle": 0}),
    "tmaze_active": Task(t_maze, {"length": 50, "oracle": 1}),
    **POPGYM,
}
OPTIONS = ("length", "decks", "k", "noise")  # of a config, where the level has them


def Memory(
    config: MemoryEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    fuse: bool | None = None,
    title: str = "",
) -> Resident:
    """S x E copies of the task that `config` names; see `Resident` for the arguments.

    Args:    title, the name in `spec` (empty: config.name).
    Raises:  ValueError on an unknown name, or an option that the task does not have.
    """
    game, limit = rules(config)
    limits = [steps for steps in (limit, config.time_limit) if steps]
    return Resident(
        game,
        name=title or config.name,
        envs=config.envs,
        sticky=0.0,
        time_limit=min(limits, default=0),
        seeds=seeds,
        salt=salt,
        device=device,
        fuse=fuse,
    )


def rules(config: MemoryEnv) -> tuple[Game, int]:
    """The game that a config asks for, and the agent steps after which it is truncated (0: never).

    Raises:  ValueError on an unknown name, or an option that the task does not have.
    """
    task = TASKS.get(config.name)
    if task is None:
        raise ValueError(
            f"env.name: no memory task is called {config.name!r}{nearest(config.name, TASKS)}; "
            f"`cerl list envs` prints all {len(TASKS)}"
        )
    asked = {key: getattr(config, key) for key in OPTIONS if getattr(config, key) is not None}
    for key in asked:
        if key not in task.options:
            own = [name for name in OPTIONS if name in task.options]
            raise ValueError(
                f"env.{key}: {config.name} has no such option; expected none, got {asked[key]}"
                + (f" (it has {' and '.join(own)})" if own else "")
            )
    return task.rules(**(task.options | asked))
