"""Tasks that need memory, on the device: T-mazes, and the games of POPGym 1.0.7 at three levels.

T-mazes are after Ni et al. 2023 (arXiv:2307.03864), the other games after POPGym (Morad et al.
2023, arXiv:2303.01859). Each file holds the rules (`Game`) of one kind of task.
`cerl/config/memory_tasks.py` lists the levels: a level is the name of a function in `RULES` with
values for its arguments.
Observations of POPGym's games are those of the package, flattened by `gymnasium.spaces.flatten`
(one-hot parts, joined): they hold the same information. Where the package's documentation
contradicts its code, these rules follow the code, and the file says where. Random numbers are
cerl's own.
"""

from collections.abc import Callable

from cerl.config.memory_tasks import Task
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
from cerl.envs.resident import Game

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


def game(task: Task) -> Game:
    """The rules of a task.

    Some tasks never end by themselves. `memory_tasks.longest(task)` is the time limit that belongs
    to a task, in agent steps.
    """
    return RULES[task.rules](**task.options)
