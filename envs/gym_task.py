"""One simulator of a gymnasium id: found, made with its arguments and limits, or refused in words.

What goes wrong in foreign code becomes one sentence that names the task, and keeps the cause.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from cerl.config import GymEnv
from cerl.envs.host import nearest

# Arguments of gymnasium.make itself.
_RESERVED = ("id", "max_episode_steps", "disable_env_checker")


def cause(error: BaseException) -> str:
    """An error of foreign code in a few words."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def import_task_module(name: str) -> ModuleType:
    """Imports the module that registers a task: from the current folder, else an installed package.

    The rule is the same however cerl was started. The current folder leads Python's search path
    only during the import. Where the module came from there, the folder stays at the path's end,
    so that what the task imports later is found, and no installed package is ever replaced.

    Raises:  ImportError saying where it was looked for, or what the module lacks; RuntimeError
             where the module fails, or another one of its name is in use.
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


def create(name: str, config: GymEnv, *, longest: int, where: str) -> gymnasium.Env:
    """One simulator, its episodes limited.

    Args:    name, the registered id, without a module; longest, agent steps after which an episode
             is truncated too (0: never); where, the simulator in words.
    Raises:  ValueError on an unknown id or argument; ImportError where a package is missing;
             RuntimeError where the task's constructor fails.
    """
    arguments = dict(config.kwargs)
    limit = min(config.time_limit, longest or config.time_limit)
    try:
        _check_arguments(name, config.name, arguments)
        env = gymnasium.make(
            name, max_episode_steps=limit or None, disable_env_checker=True, **arguments
        )
    except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"env.name: {config.name!r} needs a package that is missing: {error}"
        ) from error
    except _UnknownArgument as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        if name not in gymnasium.registry and isinstance(error, gymnasium.error.Error):
            raise ValueError(_unknown(config.name, error)) from error
        known = _parameters(name)
        takes = "" if known is None else f"its constructor takes {_listed(known)}, and "
        raise RuntimeError(
            f"{where}: the task could not be made ({cause(error)}); {takes}env.kwargs gives "
            f"{arguments or 'none'}"
        ) from error
    return gymnasium.wrappers.TimeLimit(env, longest) if longest and not limit else env


class _UnknownArgument(Exception):
    """Says which argument a task does not take."""


def _check_arguments(name: str, title: str, arguments: Mapping[str, Any]) -> None:
    """Raises: _UnknownArgument unless a task's constructor takes all of them."""
    for key in arguments:
        if key in _RESERVED:
            raise _UnknownArgument(
                f"env.kwargs: {key} is no argument of {title} but of gymnasium.make; "
                "env.time_limit limits an episode"
            )
    known = _parameters(name) if arguments else None
    if known is None or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for key in arguments:
        if key not in known:
            raise _UnknownArgument(
                f"env.kwargs: {title} takes no argument {key!r}{nearest(key, known)}; its "
                f"constructor accepts {_listed(known)}"
            )


def _parameters(name: str) -> dict[str, inspect.Parameter] | None:
    """What the constructor of a registered id can be given by name; None where it is not known."""
    spec = gymnasium.registry.get(name)
    if spec is None or spec.entry_point is None:
        return None
    entry = spec.entry_point
    try:
        found = inspect.signature(entry if callable(entry) else load_env_creator(entry))
    # Compiled code has no signature; a constructor that cannot be loaded is gymnasium.make's to
    # complain about, and may fail in any way.
    except Exception:
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {key: value for key, value in found.parameters.items() if value.kind not in kinds}


def _listed(known: Mapping[str, inspect.Parameter]) -> str:
    bare = (parameter.replace(annotation=parameter.empty) for parameter in known.values())
    return ", ".join(map(str, bare)) or "no arguments"


def _unknown(name: str, error: Exception) -> str:
    """That there is no such id, and which one may be meant."""
    atari = re.fullmatch(r"ALE/(\w+)-v\d+|(\w+?)(?:-ram)?(?:NoFrameskip|Deterministic)-v\d+", name)
    if atari:
        game = atari[1] or atari[2]
        return (
            f"env.name: gymnasium has no environment {name!r} before ale_py registers it; use "
            f"'ale_py:{name}', or a preset of family atari (atari/ddqn, say) with env.name {game}"
        )
    return (
        f"env.name: gymnasium has no environment {name!r}{nearest(name, gymnasium.registry)}; "
        "`cerl list` prints its own, module:Id imports the module that registers it first "
        f"({error})"
    )
