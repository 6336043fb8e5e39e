"""Environments: `make` builds what a config names, `available` lists what can be built here.

Families import only when they are asked for, so a missing extra hurts nobody who does not use it.
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
    GymEnv,
    MemoryEnv,
    MinAtarEnv,
    MujocoEnv,
    PointMassEnv,
    PopgymEnv,
    memory_tasks,
)
from cerl.envs.api import VecEnv
from cerl.envs.observe import observed


def make(
    config: EnvConfig,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
) -> VecEnv:
    """The environments of a config.

    Args:    seeds are the user's numbers, S of them; salt separates consumers (training,
             evaluation) of one seed; device is where steps arrive; longest, agent steps after
             which every episode is truncated too, whatever limit the config has (0: never).
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
    """The environments as their family makes them; options as `make` has them."""
    match config:
        case CatchEnv():
            from cerl.envs.catch import Catch

            return Catch(config, **options)
        case MinAtarEnv():
            from cerl.envs.minatar import MinAtar

            return MinAtar(config, **options)
        case AtariEnv():
            from cerl.envs.atari import AtariPool

            return AtariPool(config, **options)
        case GymEnv():
            from cerl.envs.gym import Gym

            return Gym(config, **options)
        case PointMassEnv():
            from cerl.envs.point_mass import PointMass

            return PointMass(config, **options)
        case MujocoEnv() | DmcEnv():
            from cerl.envs.control import Control

            return Control(config, **options)
        case MemoryEnv():
            from cerl.envs.memory import Memory

            return Memory(config, **options)
        case PopgymEnv():
            from cerl.envs.popgym import Popgym

            return Popgym(config, **options)
    raise TypeError(f"expected one of cerl.config's environments, got {type(config).__name__}")


def _package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def atari_games() -> list[str]:
    """Games of the installed back ends, found by their ROM files, without importing anything."""
    from cerl.envs.ale import TWO_PLAYERS, camel_case

    ale, assets = _package_folder("ale_py"), _package_folder("envpool_assets")
    own = os.environ.get("ENVPOOL_ASSETS_PATH")
    folders = [ale and ale / "roms", assets and assets / "atari" / "roms"]
    folders += [Path(own) / "atari" / "roms"] if own else []
    roms = {rom.stem for folder in folders if folder for rom in folder.glob("*.bin")}
    return sorted({camel_case(rom) for rom in roms} - TWO_PLAYERS)


def available() -> dict[str, list[str]]:
    """Names that `env.name` may have, by family.

    Returns: a note with the pip command where no back end of a family is installed; for gymnasium
             its built-in ids that need no further package (any registered id works).
    """
    from cerl.envs.dmc import TASKS
    from cerl.envs.gym import builtin_ids
    from cerl.envs.mujoco import robot_ids

    pool, control = _package_folder("envpool"), _package_folder("dm_control")
    # The linear quadratic regulator's actions are unbounded.
    suite = [task for task in TASKS if not task.startswith("lqr-")]
    return {
        "catch": list(get_args(CatchEnv.model_fields["name"].annotation)),
        "minatar": list(get_args(MinAtarEnv.model_fields["name"].annotation)),
        "atari": atari_games() or ["none: pip install 'cerl[atari]'"],
        "gym": builtin_ids(),
        "point_mass": list(get_args(PointMassEnv.model_fields["name"].annotation)),
        "mujoco": robot_ids() if pool else ["none: pip install 'cerl[mujoco]'"],
        "dmc": suite if pool or control else ["none: pip install 'cerl[dmc]'"],
        "memory": list(memory_tasks.TASKS),
        "popgym": list(memory_tasks.POPGYM),
    }
