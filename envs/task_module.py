"""The arguments of functions and classes of the user's own that a config names."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cerl.envs.host import nearest


def keyword_arguments(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class that can be given by name.

    Raises:  ValueError or TypeError where Python knows no signature (compiled code, for example).
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in parameters.items() if value.kind not in kinds}


def listed(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Parameters with their defaults as text, for an error message."""
    bare = (parameter.replace(annotation=parameter.empty) for parameter in parameters.values())
    return ", ".join(map(str, bare)) or "no arguments"


def unknown_argument(
    arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], *, title: str
) -> str:
    """The error message for the first argument that a task does not take; "" if it takes all.

    Args:    parameters, those of the function or constructor; title, the task's name.
    """
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return ""
    for key in arguments:
        if key not in parameters:
            return (
                f"env.kwargs: {title} takes no argument {key!r}{nearest(key, parameters)}; it "
                f"accepts {listed(parameters)}"
            )
    return ""
