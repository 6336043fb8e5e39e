"""Protects users from run folders of others: a config can make cerl import a Python module.

A command such as `cerl train PRESET` imports what its user asked for. A run folder may come from
somebody else. If its config would import a module or run code, cerl refuses and says what it would
run, unless the user passes --trust.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cerl.config import Config, ConfigError, GameEnv, GymEnv, OwnSamplerConfig
from cerl.config.own import is_own
from cerl.record import seal
from cerl.text import visible


def check(config: Config, folder: Path, *, trusted: bool) -> None:
    """Refuses a run that would run code, unless it is this user's own or trusted.

    A run is this user's own if its config.yaml was sealed with the user's key. That does not cover
    the module itself: if the user's own folder comes back from somebody else with a changed module
    in it, cerl imports that.

    Args:   config of the run; folder of the run; trusted, whether --trust was given.
    Raises: ConfigError if the run is somebody else's, not trusted, and would run code.
    """
    found = list(code(config))
    if found and not trusted and not seal.opened(folder / "config.yaml").own:
        raise ConfigError(
            f"{folder}: this run was not made by you (or its config was changed){_keyless()}: it "
            f"would {' and '.join(found)}; read that code first, then pass --trust"
        )


def _keyless() -> str:
    """The part of the message that says that this user's key cannot be read; "" if it can."""
    try:
        seal.key()
    except (OSError, RuntimeError) as error:
        return f", as far as cerl can tell without your key ({error})"
    return ""


def code(config: Config) -> Iterator[str]:
    """What a run would execute besides cerl and its dependencies, as ends of a sentence that begins
    with "it would"."""
    named = [config.ensemble.heads, *config.explore.rules, *config.log.measures]
    if isinstance(config.replay.sampler, OwnSamplerConfig):
        named.append(config.replay.sampler.by)
    modules = dict.fromkeys(name.partition(":")[0] for name in named if is_own(name))
    for module in modules:
        yield f"import the module {visible(module)} and run its code"
    if not isinstance(config.env, GymEnv | GameEnv):  # in other families no name imports a module
        return
    module, colon, _ = config.env.name.partition(":")
    if colon and module not in modules:
        yield f"import the module {visible(module)} and run its code"
    # Constructors may take names of modules and files (those that adapt the old gym, for example),
    # so texts with characters such as dots, colons or slashes are suspicious.
    taker = "the task's constructor" if isinstance(config.env, GymEnv) else "the game's function"
    for key, word in _words(dict(config.env.kwargs), "env.kwargs"):
        if not re.fullmatch(r"[\w -]*", word):
            yield f"hand {visible(word)!r} to {taker} ({visible(key)})"


def _words(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in nested dicts and lists, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _words(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _words(part, f"{key}.{index}")
