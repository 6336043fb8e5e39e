"""Imports modules of the user's own, which a config names as `module:name`.

An error in the user's code becomes one sentence that names the task and contains the cause.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from cerl.envs.host import nearest


def cause(error: BaseException) -> str:
    """Text with the class and the message of an error, for another message."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def import_task_module(name: str) -> ModuleType:
    """Imports the module of a task: from the current folder, else from the installed packages.

    This order does not depend on how cerl was started. The current folder is the first one in
    Python's search path only during the import. If the module was found there, the folder stays at
    the end of the path: modules that the task imports later are found, but none of them replaces an
    installed package.

    Raises:  ImportError naming the folder where the module was looked for, or the package that the
             module lacks; RuntimeError if the module itself fails, or another module of its name is
             in use.
    """
    folder = os.getcwd()
    top = name.partition(".")[0]
    importlib.invalidate_caches()
    here = PathFinder.find_spec(top, [folder])
    there = getattr(sys.modules.get(top), "__file__", None)
    if here and here.origin and there and os.path.realpath(there) != os.path.realpath(here.origin):
        raise RuntimeError(
            f"env.name: {here.origin} cannot be imported, because the module {top} is already in "
            f"use from {there}; give the file another name"
        )
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ImportError(
                f"env.name: module {name} needs a package that is missing: {error}"
            ) from error
        raise ImportError(
            f"env.name: no module {name} in the current folder ({folder}) or among the installed "
            f"packages; run cerl where {name.replace('.', os.sep)}.py lies, or pip install it"
        ) from error
    except Exception as error:
        raise RuntimeError(f"env.name: importing {name} failed ({cause(error)})") from error
    finally:
        sys.path.remove(folder)
    if here and folder not in sys.path:
        sys.path.append(folder)
    return module


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
