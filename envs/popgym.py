"""POPGym's tasks, simulated by the popgym package (Morad et al. 2023, arXiv:2303.01859).

The other back end of this family is the device-resident rules in `envs/memory`. Both have the same
observations (flattened, one-hot), actions, rewards and ends of episodes. Where an action of the
package is a pair (row, column), the agent's action is one number, counted row by row; continuous
actions are scaled from [-1, 1]. An episode that the package truncates is truncated here too, so
targets bootstrap from its last state; some codebases (AMAGO) treat such an end as a terminal.
"""

from collections.abc import Sequence

import torch

from cerl.config import GymEnv, PopgymEnv
from cerl.envs.gym import Gym


def popgym_id(name: str) -> str:
    """The id under which the package registers a task.

    The package spells VelocityOnlyCartPole with a small p there, unlike its other cart-poles.
    """
    return f"popgym-{name.replace('VelocityOnlyCartPole', 'VelocityOnlyCartpole')}-v0"


def package_simulators(
    config: PopgymEnv,
    *,
    seeds: Sequence[int],
    salt: int,
    device: torch.device | str,
    longest: int = 0,
) -> Gym:
    """S x E of the package's simulators of the task that `config` names.

    Args:    seeds are the user's numbers; salt gives each consumer of a seed (training, evaluation)
             random numbers of its own; longest, agent steps after which an episode is truncated
             besides the config's own limit (0: never).
    Raises:  ImportError naming the pip command where the package is missing.
    """
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
