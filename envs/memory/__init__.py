"""Tasks that need memory, on the device: T-mazes, and the games of POPGym 1.0.7 at three levels.

A file holds the pure rules (`Game`) of one kind of task; `cerl/config/memory_tasks.py` lists the
levels that are made of them. Observations are those of the package flattened as
`gymnasium.spaces.flatten` does it (one-hot and joined), so nothing is lost and nothing is added.
Where description and code of the package differ, the code is followed; the files say where.
"""

from collections.abc import Callable, Sequence

import torch

from cerl.config import MemoryEnv
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

RULES: dict[str, Callable[..., Game]] = {
    rules.__name__: rules
    for rules in (
        autoencode,
        bandit,
        battleship,
        cart_pole,
        concentration,
        count_recall,
        higher_lower,
        minesweeper,
        pendulum,
        repeat_first,
        repeat_previous,
        t_maze,
    )
}


def Memory(
    config: MemoryEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
    fuse: bool | None = None,
    title: str = "",
) -> Resident:
    """S x E copies of the task that `config` names; see `Resident` for the arguments.

    Reaching the end of the longest episode that there is truncates unless the game ends by itself.

    Args:    title, the name in `spec` (empty: config.title).
    """
    return Resident(
        RULES[config.task.rules](**config.task.options),
        name=title or config.title,
        envs=config.envs,
        sticky=0.0,
        time_limit=config.longest,
        seeds=seeds,
        salt=salt,
        device=device,
        longest=longest,
        fuse=fuse,
    )
