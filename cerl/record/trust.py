"""Whose code a run folder would run: the name of a task in a config can make cerl import a module.

`cerl train PRESET` does what its caller wrote. A run folder may come from somebody else; then what
its config would import or execute is told instead, and done only when it is asked for.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cerl.config import Config, ConfigError, GameEnv, GymEnv
from cerl.record import seal
from cerl.text import visible


def check(config: Config, folder: Path, *, trusted: bool) -> None:
    """Lets a run of this user, or a trusted one, do as its config says.

    A run is this user's if its config.yaml was sealed with the user's key. Who hands out a folder
    of theirs with another module of the same name in it can still deceive its maker.

    Args:   folder, that of the run; trusted, --trust was given.
    Raises: ConfigError if the config of somebody else's run would run code.
    """
    found = list(code(config))
    if found and not trusted and not seal.opened(folder / "config.yaml").own:
        raise ConfigError(
            f"{folder}: this run was not made by you (or its config was changed){_keyless()}: it "
            f"would {' and '.join(found)}; read it first, then pass --trust"
        )


def _keyless() -> str:
    """Why this user's own runs cannot be told from others, if so."""
    try:
        seal.key()
    except (OSError, RuntimeError) as error:
        return f", as far as can be told without a key of yours ({error})"
    return ""


def code(config: Config) -> Iterator[str]:
    """What a config makes Python run beyond cerl and installed packages, as ends of a sentence."""
    if not isinstance(config.env, GymEnv | GameEnv):  # other families know all of their names
        return
    module, colon, _ = config.env.name.partition(":")
    if colon:
        yield f"import the module {visible(module)} and run its code"
    # A task may take names of modules and files as arguments, e.g. one that adapts the old gym.
    taker = "the task's constructor" if isinstance(config.env, GymEnv) else "the game's function"
    for key, word in _words(dict(config.env.kwargs), "env.kwargs"):
        if not re.fullmatch(r"[\w -]*", word):
            yield f"hand {visible(word)!r} to {taker} ({visible(key)})"


def _words(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in a tree of plain values, with its key path."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _words(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _words(part, f"{key}.{index}")
