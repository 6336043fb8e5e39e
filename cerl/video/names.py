"""What the parts of observations and the actions are called in the tasks that say so.

The order of planes, components and actions is that of the rules in `envs/`.
"""

from cerl.config import (
    CatchEnv,
    EnvConfig,
    MemoryEnv,
    MinAtarEnv,
    PointMassEnv,
    PopgymEnv,
)

PLANES = {
    "asterix": ("player", "enemy", "trail", "gold"),
    "breakout": ("paddle", "ball", "trail", "brick"),
    "freeway": ("chicken", "car", *(f"speed {k}" for k in range(1, 6))),
    "seaquest": (
        *("front", "back", "torpedo", "trail", "missile", "fish", "submarine"),
        *("oxygen", "divers on board", "diver"),
    ),
    "space_invaders": ("cannon", "alien", "going left", "going right", "shot", "bomb"),
}
MINATAR = ("no-op", "left", "up", "right", "down", "fire")
# The actions of each game's minimal set, as numbers of `MINATAR`.
MINIMAL = {
    "asterix": (0, 1, 2, 3, 4),
    "breakout": (0, 1, 3),
    "freeway": (0, 2, 4),
    "seaquest": (0, 1, 2, 3, 4, 5),
    "space_invaders": (0, 1, 3, 5),
}
SUITS = ("spades", "diamonds", "clubs", "hearts")
RANKS = ("ace", *map(str, range(2, 11)), "jack", "queen", "king")
KINDS = {"suits": SUITS, "ranks": RANKS, "colors": ("black", "red")}  # of cards
COMPONENTS = {
    "t_maze": ("junction", "signal"),
    "repeat_first": SUITS,
    "repeat_previous": SUITS,
    "autoencode": ("recall", "watch", *SUITS),
    "higher_lower": RANKS,
    "bandit": ("lost", "paid"),
    "battleship": ("miss", "hit"),
    "pendulum": ("cosine", "sine"),
}
ACTIONS = {
    "t_maze": ("right", "up", "left", "down"),
    "repeat_first": SUITS,
    "repeat_previous": SUITS,
    "autoencode": SUITS,
    "cart_pole": ("left", "right"),
    "higher_lower": ("higher", "lower"),
}


def planes(env: EnvConfig) -> tuple[str, ...]:
    """The planes of an observation that is a board; () where they have no names."""
    return PLANES[env.name] if isinstance(env, MinAtarEnv) else ()


def components(env: EnvConfig, size: int) -> tuple[str, ...]:
    """The components of an observation that is a vector; their numbers where they have no names.

    Args: size, how many there are.
    """
    names: tuple[str, ...] = ()
    if isinstance(env, MemoryEnv | PopgymEnv):
        rules, options = env.task.rules, env.task.options
        names = COMPONENTS.get(rules, ())
        if rules == "cart_pole":
            names = ("speed", "turning") if options["speeds"] else ("place", "tilt")
        elif rules == "count_recall":
            kinds = KINDS[options["kind"]]
            names = (*kinds, *(f"{kind}?" for kind in kinds))
        elif rules == "minesweeper":
            names = tuple(f"{k} near" for k in range(size))
    elif isinstance(env, PointMassEnv):
        axes = "xyz"[: env.dimensions]
        names = (*axes, *(f"speed {axis}" for axis in axes))
    if kept := env.observe.indices:
        names = tuple(names[k] for k in kept) if names and max(kept) < len(names) else ()
    return names if len(names) == size else tuple(str(k) for k in range(size))


def actions(env: EnvConfig, count: int) -> tuple[str, ...]:
    """The discrete actions; their numbers where they have no names. Args: count, how many."""
    names: tuple[str, ...] = ()
    if isinstance(env, CatchEnv):
        names = ("left", "stay", "right")
    elif isinstance(env, MinAtarEnv):
        names = MINATAR if env.full_actions else tuple(MINATAR[k] for k in MINIMAL[env.name])
    elif isinstance(env, MemoryEnv | PopgymEnv):
        names = ACTIONS.get(env.task.rules, ())
    return names if len(names) == count else tuple(str(k) for k in range(count))
