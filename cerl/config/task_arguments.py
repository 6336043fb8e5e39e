"""The type of `env.kwargs`: arguments of a task's constructor or of a game's function.

In a file they are `name: value` lines, on the command line words name=value. A config holds them as
sorted pairs, since it has to be hashable.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from cerl.config import preset


def _arguments(given: Any) -> tuple[tuple[str, Any], ...]:
    """Arguments of a task's constructor as pairs (name, value), sorted by name.

    Args:    given, a mapping, pairs, or words name=value, where the value is written as in YAML.
    Raises:  ValueError on anything else.
    """
    if isinstance(given, list | tuple) and all(isinstance(word, str) for word in given):
        pairs = [word.partition("=")[::2] for word in given]
        for word in given:
            if "=" not in word:
                raise ValueError(f"env.kwargs: expected name=value, got {word!r}")
        given = [(name, preset.scalar(text, where=f"env.kwargs.{name}")) for name, text in pairs]
        if len(dict(given)) < len(given):
            raise ValueError(f"env.kwargs: expected different names, got {' '.join(dict(pairs))}")
    if isinstance(given, Mapping):
        given = list(given.items())
    if not isinstance(given, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in given
    ):
        raise ValueError(f"env.kwargs: expected `name: value` lines below it, got {given!r}")
    for name, value in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"env.kwargs: expected names of arguments, got {name!r}")
        for part in value if isinstance(value, list | tuple) else [value]:
            if part is not None and not isinstance(part, bool | int | float | str):
                raise ValueError(
                    f"env.kwargs.{name}: expected a number, a text, true, false, null or a list "
                    f"of these, got {part!r}"
                )
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    return tuple(sorted(frozen.items()))


def _named(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in pairs}


def with_arguments(name: str, pairs: tuple[tuple[str, Any], ...]) -> str:
    """A task's name followed by its arguments, e.g. FrozenLake-v1-is_slippery=False."""
    return "-".join([name, *(f"{key}={value}" for key, value in pairs)])


Arguments = Annotated[
    tuple[tuple[str, Any], ...], BeforeValidator(_arguments), PlainSerializer(_named)
]
