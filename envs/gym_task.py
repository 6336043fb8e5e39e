"""Makes one simulator of a gymnasium id, with its arguments and time limits.

An error in the task's own code becomes one sentence that names the task and contains the cause.
"""

import re
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from cerl.config import GymEnv
from cerl.envs.host import nearest
from cerl.envs.task_module import keyword_arguments, listed, unknown_argument
from cerl.own_code import cause

# Arguments of `gymnasium.make` itself, which therefore never reach the constructor of a task.
_RESERVED = ("id", "max_episode_steps", "disable_env_checker")


def create(name: str, config: GymEnv, *, longest: int, where: str) -> gymnasium.Env:
    """One simulator, with the time limits of `config.time_limit` and `longest`.

    Args:    name, the registered id, without a module; longest, agent steps after which an episode
             is truncated besides the config's own limit (0: never); where, text that names the
             simulator in messages.
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
        takes = "" if known is None else f"its constructor takes {listed(known)}, and "
        raise RuntimeError(
            f"{where}: the task could not be made ({cause(error)}); {takes}env.kwargs gives "
            f"{arguments or 'none'}"
        ) from error
    return gymnasium.wrappers.TimeLimit(env, longest) if longest and not limit else env


def check_registered(name: str) -> None:
    """Raises: ValueError with the nearest ids if gymnasium does not have an id without a module."""
    try:
        gymnasium.spec(name)
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(_unknown(name, error)) from error
    # `gymnasium.make` itself decides about ids without a version, and about those of no known form.
    except gymnasium.error.Error:
        return


class _UnknownArgument(Exception):
    """The task does not take an argument; the message says which."""


def _check_arguments(name: str, title: str, arguments: Mapping[str, Any]) -> None:
    """Raises: _UnknownArgument unless the task's constructor takes all of the arguments.

    Args: name, the registered id; title, the name in messages.
    """
    for key in arguments:
        if key in _RESERVED:
            raise _UnknownArgument(
                f"env.kwargs: {key} is no argument of {title} but of gymnasium.make; "
                "env.time_limit limits an episode"
            )
    known = _parameters(name) if arguments else None
    if known is not None and (wrong := unknown_argument(arguments, known, title=title)):
        raise _UnknownArgument(wrong)


def _parameters(name: str) -> dict[str, Parameter] | None:
    """The constructor's parameters that can be given by name; None where they are not known."""
    spec = gymnasium.registry.get(name)
    if spec is None or spec.entry_point is None:
        return None
    entry = spec.entry_point
    try:
        return keyword_arguments(entry if callable(entry) else load_env_creator(entry))
    # Compiled code has no signature. And loading a constructor may fail with any error: then
    # `gymnasium.make` fails with the same error afterwards, and that one is shown.
    except Exception:
        return None


def _unknown(name: str, error: Exception) -> str:
    """The message for an id that is not registered, with ids that the user may have meant."""
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
