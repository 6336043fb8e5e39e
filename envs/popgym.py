"""POPGym (Morad et al. 2023, arXiv:2303.01859): device-resident games, or the popgym package.

Both back ends have the same observations (flattened, one-hot), actions, rewards and ends. Actions
of the package that are pairs become one number, row by row; Boxes are scaled from [-1, 1]. What the
package truncates is truncated here too and still has a value; AMAGO, for one, calls it a terminal.
"""

from collections.abc import Sequence

import torch

from cerl.config import GymEnv, MemoryEnv, PopgymEnv
from cerl.envs.gym import Gym
from cerl.envs.memory import Memory
from cerl.envs.resident import Resident


def popgym_id(name: str) -> str:
    """The id under which the package registers a task; it spells one of its names differently."""
    return f"popgym-{name.replace('VelocityOnlyCartPole', 'VelocityOnlyCartpole')}-v0"


def Popgym(
    config: PopgymEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
) -> Resident | Gym:
    """S x E games of the task that `config` names; `spec.name` says which back end plays them.

    Args:    seeds are the user's numbers; salt separates consumers (training, evaluation) of one
             seed; longest, agent steps after which an episode is truncated too (0: never).
    Raises:  ImportError naming the pip command where the package is asked for and missing.
    """
    if config.backend == "resident":
        shared = {key: getattr(config, key) for key in ("name", "envs", "time_limit")}
        game = MemoryEnv.model_validate(shared)
        title = f"{config.name} (resident)"
        return Memory(game, seeds=seeds, salt=salt, device=device, longest=longest, title=title)
    try:
        import popgym  # noqa: F401  registers its ids
    except ImportError as error:
        raise ImportError(
            f"{config.name} with env.backend package needs popgym ({error}): "
            "pip install 'cerl[popgym]'; env.backend resident needs nothing"
        ) from error
    simulators = GymEnv(
        name=popgym_id(config.name),
        envs=config.envs,
        time_limit=config.time_limit or 0,
        diverged=config.diverged,
    )
    return Gym(simulators, seeds=seeds, salt=salt, device=device, longest=longest)
