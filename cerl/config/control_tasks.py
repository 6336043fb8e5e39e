"""The names of continuous-control tasks: the robots of Gym-MuJoCo and dm_control's suite.

Both are fixed lists, so that a name is checked without importing a simulator.
"""

from cerl.config import errors

_ROBOTS = (
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "Walker2d",
)
ROBOTS = tuple(f"{robot}-{version}" for robot in _ROBOTS for version in ("v4", "v5"))

_SUITE = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse three_poles two_poles",
    "cheetah": "run",
    "dog": "fetch run stand trot walk",
    "finger": "spin turn_easy turn_hard",
    "fish": "swim upright",
    "hopper": "hop stand",
    "humanoid": "run run_pure_state stand walk",
    "humanoid_CMU": "run stand walk",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "escape fetch run walk",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "run stand walk",
}
SUITE = tuple(f"{domain}-{task}" for domain, tasks in _SUITE.items() for task in tasks.split())


def robot_name(name: str) -> str:
    """The name itself. Raises: ValueError if Gym-MuJoCo has no such robot and version."""
    if name not in ROBOTS:
        raise ValueError(
            f"env.name: no Gym-MuJoCo robot is called {name!r}{errors.nearest(name, ROBOTS)} "
            f"(`cerl list envs` prints all {len(ROBOTS)}; other MuJoCo ids of gymnasium run from a "
            "preset of yours with `base: gym/pendulum`)"
        )
    return name


def suite_name(name: str) -> str:
    """The name itself. Raises: ValueError if dm_control's suite has no such task."""
    if name not in SUITE:
        raise ValueError(
            f"env.name: dm_control's suite has no domain-task {name!r}"
            f"{errors.nearest(name, SUITE)} (`cerl list envs` prints all {len(SUITE)})"
        )
    return name
