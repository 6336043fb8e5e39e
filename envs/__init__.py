"""Environments: `make` builds what a config names, `available` lists what can be built here.

A family of environments is a config model in `cerl/config/envs.py` and a case in this file: in
`_rules` if its games are device-resident (its file returns the rules, a `Game`), else in `_bare`
(its file has a class that keeps the contract of `envs/api.py`). The file of a family is imported
only when the family is asked for, so a package that only one family needs may be missing.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from cerl.config import (
    AtariEnv,
    CatchEnv,
    DmcEnv,
    EnvConfig,
    GameEnv,
    GymEnv,
    MemoryEnv,
    MinAtarEnv,
    MujocoEnv,
    PointMassEnv,
    PopgymEnv,
    control_tasks,
    memory_tasks,
)
from cerl.envs.api import VecEnv
from cerl.envs.observe import observed
from cerl.envs.resident import Game, Resident


def make(
    config: EnvConfig,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
) -> VecEnv:
    """The environments of a config, S x E of them.

    Args:    seeds are the user's numbers, S of them; salt, a number that gives each consumer of a
             seed (training, evaluation) random numbers of its own; device is where steps arrive;
             longest, agent steps after which every episode is truncated, besides the config's own
             limit (0: never).
    Raises:  ValueError on an unknown name or an option that the family cannot express; ImportError
             naming the pip command where an extra is missing.
    """
    if longest < 0:
        raise ValueError(
            f"longest: expected 0 (no further limit) or more agent steps, got {longest}"
        )
    env = _bare(config, seeds=seeds, salt=salt, device=device, longest=longest)
    return observed(env, config, seeds=seeds, salt=salt, device=device)


def _bare(config: EnvConfig, **options: Any) -> VecEnv:
    """The environments without `config.observe`; options are the other arguments of `make`."""
    match config:
        case AtariEnv():
            from cerl.envs.atari import Atari

            return Atari(config, **options)
        case GymEnv():
            from cerl.envs.gym import Gym

            return Gym(config, **options)
        case MujocoEnv() | DmcEnv():
            from cerl.envs.control import Control

            return Control(config, **options)
        case PopgymEnv(backend="package"):
            from cerl.envs.popgym import package_simulators

            return package_simulators(config, **options)
    return make_resident(config, **options)


def make_resident(
    config: EnvConfig,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
    fuse: bool | None = None,
) -> Resident:
    """The device-resident environments of a config, without `config.observe`.

    Args:    fuse compiles the step into few kernels (None: on CUDA only); all others as in `make`.
    Raises:  TypeError if the simulators of the config's family run on the host.
    """
    game, name, sticky, time_limit = _rules(config)
    return Resident(
        game,
        name=name,
        envs=config.envs,
        sticky=sticky,
        time_limit=time_limit,
        seeds=seeds,
        salt=salt,
        device=device,
        longest=longest,
        fuse=fuse,
    )


def _rules(config: EnvConfig) -> tuple[Game, str, float, int]:
    """The rules of a device-resident game, and the options that `Resident` applies to any game.

    Returns: the rules; the name in `spec`; the probability that an action is replaced by the one
             before (sticky actions); the time limit in agent steps (0: none).
    """
    match config:
        case CatchEnv():
            from cerl.envs import catch

            return catch.game(config), config.name, config.sticky, 0
        case GameEnv():
            from cerl.envs.own_game import own_game

            rules = own_game(config.name, dict(config.kwargs))
            return rules, config.name, config.sticky, config.time_limit
        case MinAtarEnv():
            from cerl.envs import minatar

            return minatar.game(config), config.name, config.sticky, config.time_limit
        case PointMassEnv():
            from cerl.envs import point_mass

            return point_mass.game(config), config.name, 0.0, config.time_limit
        case MemoryEnv():
            from cerl.envs import memory

            return memory.game(config.task), config.title, 0.0, config.longest
        case PopgymEnv(backend="resident"):
            from cerl.envs import memory

            return memory.game(config.task), f"{config.name} (resident)", 0.0, config.longest
    raise TypeError(f"expected a device-resident environment, got {type(config).__name__}")


def _package_folder(name: str) -> Path | None:
    """The folder of an installed package, found without importing it; None if not installed."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def check_name(config: EnvConfig) -> None:
    """Checks that the task of a config exists, as far as that is possible without a simulator.

    Not checked are games of one's own and gymnasium ids with a module, since modules of a user
    would have to be imported, and Atari games where no back end is installed. The names of all
    other families are checked by their models.

    Raises: ValueError with the nearest names.
    """
    if isinstance(config, AtariEnv) and (games := atari_games()):
        from cerl.envs.ale import check_known

        check_known(config.name, games)
    if isinstance(config, GymEnv) and ":" not in config.name:
        from cerl.envs.gym_task import check_registered

        check_registered(config.name)


def atari_games() -> list[str]:
    """Atari games of the installed back ends, in camel case.

    They are found by their ROM files, since importing the packages would take seconds.
    """
    from cerl.envs.ale import TWO_PLAYERS, camel_case

    ale, assets = _package_folder("ale_py"), _package_folder("envpool_assets")
    own = os.environ.get("ENVPOOL_ASSETS_PATH")
    folders = [ale and ale / "roms", assets and assets / "atari" / "roms"]
    folders += [Path(own) / "atari" / "roms"] if own else []
    roms = {rom.stem for folder in folders if folder for rom in folder.glob("*.bin")}
    return sorted({camel_case(rom) for rom in roms} - TWO_PLAYERS)


def available() -> dict[str, list[str]]:
    """The names that `env.name` may have, by family.

    Returns: a note with the pip command where no back end of a family is installed; for gymnasium
             its built-in ids that need no further package (any registered id works); for games of
             one's own how they are named, and an example.
    """
    from cerl.envs.gym import builtin_ids

    pool, control = _package_folder("envpool"), _package_folder("dm_control")
    # The linear quadratic regulator's actions are unbounded.
    suite = [task for task in control_tasks.SUITE if not task.startswith("lqr-")]
    return {
        "catch": list(get_args(CatchEnv.model_fields["name"].annotation)),
        "minatar": list(get_args(MinAtarEnv.model_fields["name"].annotation)),
        "atari": atari_games() or ["none: pip install 'cerl[atari]'"],
        "gym": builtin_ids(),
        "game": ["module:function of your own, e.g. cerl.envs.catch:rules"],
        "point_mass": list(get_args(PointMassEnv.model_fields["name"].annotation)),
        "mujoco": list(control_tasks.ROBOTS) if pool else ["none: pip install 'cerl[mujoco]'"],
        "dmc": suite if pool or control else ["none: pip install 'cerl[dmc]'"],
        "memory": list(memory_tasks.TASKS),
        "popgym": list(memory_tasks.POPGYM),
    }
