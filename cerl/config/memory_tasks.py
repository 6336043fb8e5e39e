"""The table of tasks that need memory: which rules and options each has, and its longest episode.

T-mazes (Ni et al. 2023, arXiv:2307.03864) and the 42 tasks of POPGym 1.0.7 (Morad et al. 2023,
arXiv:2303.01859). The rules themselves are in `envs/memory`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cerl.config import errors

CARDS = 52  # cards of one deck


class Task(NamedTuple):
    """A game at one level of difficulty."""

    rules: str  # the function of `envs/memory` that makes the game
    options: Mapping[str, Any]  # the arguments of that function


def _levels(name: str, rules: str, **options: tuple) -> dict[str, Task]:
    """The three levels of a game. Args: options, values at (easy, medium, hard) by name."""
    return {
        f"{name}{level}": Task(rules, {key: values[k] for key, values in options.items()})
        for k, level in enumerate(("Easy", "Medium", "Hard"))
    }


_PLACES, _SPEEDS, _SAME = (False,) * 3, (True,) * 3, (200,) * 3
POPGYM: dict[str, Task] = {
    **_levels("RepeatPrevious", "repeat_previous", decks=(1, 2, 3), k=(4, 32, 64)),
    **_levels("RepeatFirst", "repeat_first", decks=(1, 8, 16)),
    **_levels("CountRecall", "count_recall", decks=(1, 2, 4), kind=("colors", "suits", "ranks")),
    **_levels("Autoencode", "autoencode", decks=(1, 2, 3)),
    **_levels("PositionOnlyCartPole", "cart_pole", speeds=_PLACES, length=(200, 400, 600)),
    **_levels("VelocityOnlyCartPole", "cart_pole", speeds=_SPEEDS, length=(200, 400, 600)),
    **_levels(
        "NoisyPositionOnlyCartPole",
        "cart_pole",
        speeds=_PLACES,
        length=_SAME,
        noise=(0.1, 0.2, 0.3),
    ),
    **_levels("PositionOnlyPendulum", "pendulum", length=(200, 150, 100)),
    **_levels("NoisyPositionOnlyPendulum", "pendulum", length=_SAME, noise=(0.1, 0.2, 0.3)),
    **_levels("MultiarmedBandit", "bandit", arms=(10, 20, 30), length=(200, 400, 600)),
    **_levels("HigherLower", "higher_lower", decks=(1, 2, 3)),
    **_levels(
        "Concentration", "concentration", decks=(1, 2, 1), kind=("colors", "colors", "ranks")
    ),
    **_levels("MineSweeper", "minesweeper", side=(4, 6, 8), mines=(2, 6, 10)),
    **_levels("Battleship", "battleship", side=(8, 10, 12)),
}
TASKS: dict[str, Task] = {
    "tmaze": Task("t_maze", {"length": 50, "oracle": 0}),
    "tmaze_active": Task("t_maze", {"length": 50, "oracle": 1}),
    **POPGYM,
}


def popgym_name(name: str) -> str:
    """The name itself. Raises: ValueError if POPGym has no such task."""
    if name not in POPGYM:
        raise ValueError(
            f"env.name: POPGym has no task {name!r}{errors.nearest(name, list(POPGYM))} "
            f"(`cerl list envs` prints all {len(POPGYM)})"
        )
    return name


def level(name: str, asked: Mapping[str, Any]) -> Task:
    """A task, some of whose options are replaced.

    Args:    asked, values of options by name; None keeps that of the level.
    Raises:  ValueError on an unknown name, an option that the task does not have, or a k that is
             not below the number of cards.
    """
    task = TASKS.get(name)
    if task is None:
        raise ValueError(
            f"env.name: no memory task is called {name!r}{errors.nearest(name, list(TASKS))} "
            f"(`cerl list envs` prints all {len(TASKS)})"
        )
    own = {key: value for key, value in asked.items() if value is not None}
    for key in own:
        if key not in task.options:
            known = [other for other in asked if other in task.options]
            raise ValueError(
                f"env.{key}: {name} has no such option; expected none, got {own[key]}"
                + (f" (it has {' and '.join(known)})" if known else "")
            )
    options = {**task.options, **own}
    if "k" in options and not options["k"] < CARDS * options["decks"]:
        raise ValueError(
            f"env.k: expected less than the {CARDS * options['decks']} cards of env.decks "
            f"{options['decks']}, got {options['k']}"
        )
    return Task(task.rules, options)


def tries(cards: int) -> int:
    """Agent steps after which POPGym truncates Concentration. Args: cards, how many there are."""
    return math.ceil(2 * cards - cards / (2 * cards - 1))


def actions(task: Task) -> Literal["discrete", "continuous"]:
    """Kind of a task's actions."""
    return "continuous" if task.rules == "pendulum" else "discrete"


def longest(task: Task) -> int:
    """Agent steps of a task's longest episode."""
    options = task.options
    match task.rules:
        case "t_maze":
            return options["length"] + 1 + 2 * options["oracle"]
        case "autoencode":
            return 2 * CARDS * options["decks"] - 1
        case "concentration":
            return tries(CARDS * options["decks"])
        case "minesweeper":
            return options["side"] ** 2 - options["mines"]
        case "battleship":
            return options["side"] ** 2
    return options["length"] if "length" in options else CARDS * options["decks"] - 1
