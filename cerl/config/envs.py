"""The options of environments: one model for each family, chosen by `env.family`.

A model also tells the rest of the config how long episodes can be, which actions the environment
takes, what it shows, and with which options an evaluation plays it.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cerl.config import control_tasks, memory_tasks
from cerl.config.model import Ints, Model
from cerl.config.task_arguments import Arguments, with_arguments

Actions = Literal["discrete", "continuous", "either"]
Shown = Literal["numbers", "images", "either"]
Diverged = Literal["error", "cut"]


class ObserveConfig(Model):
    """Makes observations partial or noisy, in this order: keep or indices, noise, dropout, flicker.
    This happens once for every agent step, and replay stores the result."""

    keep: Literal["all", "position", "velocity"] = "all"
    """which components the agent sees (Gym-MuJoCo, CartPole, Pendulum and the point mass)"""
    indices: Ints = ()
    """indices of the components of a vector that the agent sees, in this order; empty: all"""
    noise: float = Field(default=0.0, ge=0, le=1e6)
    """standard deviation of Gaussian noise that is added to every component"""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """probability that a component is set to 0, independently for each"""
    flicker: float = Field(default=0.0, ge=0, le=1)
    """probability that the whole observation is set to 0"""


class EnvOptions(Model):
    """What the environments of all families have."""

    actions: ClassVar[Actions]
    """kind of actions of all tasks of the family; either: it depends on the task"""
    examples: ClassVar[Mapping[str, str]] = {
        "discrete": "of minatar or gym",
        "continuous": "of mujoco",
    }
    """presets that error messages suggest, for discrete and for continuous actions"""

    family: Any  # every family narrows it to a Literal of one word
    """fixed by the preset"""
    name: Any  # a str, or a Literal of the family's tasks
    """the task"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    observe: ObserveConfig = ObserveConfig()
    """makes observations partial or noisy"""

    @property
    def title(self) -> str:
        """The name of the task, followed by options that make a different task of it."""
        return self.name

    @property
    def actions_of_task(self) -> Actions:
        """Kind of actions of the task; either: only its simulator knows."""
        return self.actions

    @property
    def longest(self) -> int:
        """Agent steps of the longest episode, if the options determine it; 0: unknown."""
        return 0

    @property
    def shows(self) -> Shown:
        """Whether observations are vectors of numbers or images; either: it depends on the task."""
        return "either"

    @property
    def resident(self) -> bool:
        """Whether the environments are tensors on the run's device, not simulators on the host."""
        return False

    def for_evaluation(self, lanes: int) -> Self:
        """The options of the environments of an evaluation. Args: lanes, environments per seed."""
        return self.model_copy(update={"envs": lanes})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """One sentence for every contradiction among the options of the environment."""
        if problem := unreadable("env.name", self.name):
            yield problem


class LimitedEnv(EnvOptions):
    """Environments whose episodes can be cut after a number of agent steps."""

    time_limit: int = Field(default=0, ge=0)
    """agent steps after which an episode is truncated; 0: only the task's own limit, if any"""

    @property
    def longest(self) -> int:
        return self.time_limit


class ThreadedEnv(LimitedEnv):
    """Environments whose simulators run in several threads."""

    threads: int = Field(default=0, ge=0)
    """simulator threads; 0: one per core, at most S x E"""


class DivergingEnv(EnvOptions):
    """Environments whose simulators can return numbers that are not finite."""

    diverged: Diverged = "error"
    """if a simulator returns NaN or an infinity. error: stop the run; cut: end that episode with a
    warning and go on"""


def unreadable(key: str, text: str) -> str:
    """An error sentence if a text has characters that names of files must not have, else "".

    Args: key, dotted key of the option whose value is `text`.
    """
    # Cc are control characters; Cs are halves of surrogate pairs, from undecodable bytes.
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        return f"{key}: expected no control characters and no undecodable ones, got {text!r}"
    return ""


class CatchEnv(EnvOptions):
    """Catch: a paddle of one cell has to be under a falling ball. cerl's own, on the device."""

    actions = "discrete"
    family: Literal["catch"] = "catch"
    """fixed by the preset"""
    name: Literal["catch"] = "catch"
    """the only game of this family"""
    rows: int = Field(default=10, ge=2)
    """height of the board, cells; an episode takes rows - 1 agent steps"""
    columns: int = Field(default=5, ge=2)
    """width of the board, cells"""
    sticky: float = Field(default=0.0, ge=0, lt=1)
    """probability that the last action is repeated"""

    @property
    def longest(self) -> int:
        return self.rows - 1

    @property
    def resident(self) -> bool:
        return True


class MinAtarEnv(LimitedEnv):
    """MinAtar (Young and Tian 2019): cerl's own implementation, on the device."""

    actions = "discrete"
    family: Literal["minatar"] = "minatar"
    """fixed by the preset"""
    name: Literal["asterix", "breakout", "freeway", "seaquest", "space_invaders"] = "breakout"
    """which of the five games"""
    envs: int = Field(default=8, ge=1)
    """E, environments per seed"""
    sticky: float = Field(default=0.1, ge=0, lt=1)
    """probability that the last action is repeated"""
    ramping: bool = True
    """difficulty rises with time in asterix, seaquest and space_invaders"""
    full_actions: bool = False
    """all six actions instead of the game's minimal set"""

    @property
    def resident(self) -> bool:
        return True


class AtariEnv(ThreadedEnv):
    """Atari 2600, simulated by ale-py or EnvPool; every agent step shows one 84x84 frame."""

    actions = "discrete"
    family: Literal["atari"] = "atari"
    """fixed by the preset"""
    name: str = "Pong"
    """game in camel case, e.g. Pong or SpaceInvaders"""
    backend: Literal["envpool", "ale"] = "ale"
    """emulator. ale: ale-py's vector environment; envpool: EnvPool; frames and rewards are equal"""
    sticky: float = Field(default=0.0, ge=0, lt=1)
    """probability that the emulator repeats the last action (Machado et al. 2018: 0.25)"""
    full_actions: bool = False
    """all 18 actions instead of the game's minimal set"""
    frame_skip: int = Field(default=4, ge=1, le=1000)
    """emulator frames of one agent step; the last two are max-pooled"""
    noop_max: int = Field(default=0, ge=0, le=10_000)
    """an episode starts with a random number of no-op frames, at most this many; 0: none (envpool
    plays at least one, so 0 is an error there, except where fire_reset presses FIRE)"""
    fire_reset: bool = False
    """press FIRE for one frame at the start of an episode, if the game has that action (envpool:
    after the no-op frames, ale: before them)"""
    life_loss: bool = False
    """a lost life ends the agent's episode as a terminal; the game goes on, first with a no-op"""
    time_limit: int = Field(default=27_000, ge=1)
    """agent steps after which an episode is truncated"""

    def for_evaluation(self, lanes: int) -> Self:
        """As for every family; in addition a lost life ends no episode, so scores are of whole
        games."""
        return self.model_copy(update={"envs": lanes, "life_loss": False})


class GymEnv(LimitedEnv, DivergingEnv):
    """Any registered gymnasium id with discrete or bounded continuous actions."""

    actions = "either"
    family: Literal["gym"] = "gym"
    """fixed by the preset"""
    name: str = "CartPole-v1"
    """registered id, e.g. CartPole-v1; module:Id first imports the Python module, from the current
    folder or else from the installed packages"""
    kwargs: Arguments = ()
    """arguments of the task's constructor, e.g. is_slippery=false (in a file `name: value`); they
    replace those of the preset"""

    @property
    def title(self) -> str:
        """The name and the arguments, e.g. FrozenLake-v1-is_slippery=False."""
        return with_arguments(self.name, self.kwargs)


class GameEnv(LimitedEnv):
    """A game of one's own (device-resident): a function returns its rules, which are three
    functions of tensors (`cerl.envs.resident.Game`)."""

    actions = "either"
    examples = {"discrete": "game/ddqn", "continuous": "game/sac"}

    family: Literal["game"] = "game"
    """fixed by the preset"""
    name: str = "cerl.envs.catch:rules"
    """module:function; the module is imported from the current folder or, where that has none of
    this name, from the installed packages; the function returns the rules"""
    kwargs: Arguments = ()
    """arguments of the function, e.g. length=20 (in a file name: value); replace those of the
    preset"""
    sticky: float = Field(default=0.0, ge=0, lt=1)
    """probability that the last action is repeated"""

    @property
    def title(self) -> str:
        """The name and the arguments, e.g. my_games:corridor-length=20."""
        return with_arguments(self.name, self.kwargs)

    @property
    def resident(self) -> bool:
        return True

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        module, _, function = self.name.partition(":")
        if not all(word.isidentifier() for word in (*module.split("."), function)):
            yield (
                "env.name: expected module:function, the function that returns the rules of the "
                f"game, got {self.name!r}"
            )


class PointMassEnv(LimitedEnv):
    """A point mass that is pushed to the middle of a square. cerl's own, on the device."""

    actions = "continuous"
    family: Literal["point_mass"] = "point_mass"
    """fixed by the preset"""
    name: Literal["point_mass"] = "point_mass"
    """the only task of this family"""
    dimensions: int = Field(default=2, ge=1)
    """dimensions of the space that the mass moves in, and so the components of an action"""
    walls: bool = True
    """the square has walls; without walls, leaving it ends the episode as a terminal"""
    time_limit: int = Field(default=50, ge=1)
    """agent steps after which an episode is truncated"""

    @property
    def resident(self) -> bool:
        return True


class MujocoEnv(ThreadedEnv, DivergingEnv):
    """Gym-MuJoCo by EnvPool, in C++ threads; dynamics and rewards are those of gymnasium's v4 and
    v5."""

    actions = "continuous"
    family: Literal["mujoco"] = "mujoco"
    """fixed by the preset"""
    name: Annotated[str, AfterValidator(control_tasks.robot_name)] = "HalfCheetah-v4"
    """robot and version, e.g. HalfCheetah-v4"""

    @property
    def shows(self) -> Shown:
        return "numbers"


class DmcEnv(ThreadedEnv, DivergingEnv):
    """dm_control's suite, by EnvPool (C++ threads) or by the dm-control package (pixels too)."""

    actions = "continuous"
    family: Literal["dmc"] = "dmc"
    """fixed by the preset"""
    name: Annotated[str, AfterValidator(control_tasks.suite_name)] = "cheetah-run"
    """domain-task as the suite spells them, e.g. cheetah-run or ball_in_cup-catch"""
    backend: Literal["envpool", "dm_control"] = "envpool"
    """simulator. envpool: EnvPool, in parallel threads; dm_control: the dm-control package, which
    steps one environment after the other"""
    repeat: int = Field(default=1, ge=1, le=1000)
    """control steps for which an action is repeated; their rewards are summed"""
    pixels: bool = False
    """observations are images [3, size, size] instead of the state (only backend dm_control)"""
    size: int = Field(default=84, ge=1)
    """height and width of an image, pixels"""
    camera: int = Field(default=0, ge=-1)
    """number of the camera; -1: the free camera of the model"""

    @property
    def shows(self) -> Shown:
        return "images" if self.pixels else "numbers"


def _ending(limit: int | None) -> int | None:
    """The time limit itself. Raises: ValueError if it is below 1, where 0 would mean no limit."""
    if limit is not None and limit < 1:
        raise ValueError(
            "env.time_limit: episodes of memory tasks have to end; expected at least 1 agent step, "
            f"or none for the task's own limit, got {limit}"
        )
    return limit


class MemoryOptions(EnvOptions):
    """Options of the two families of memory tasks, whose episodes all have a longest length."""

    actions = "either"
    examples = {"discrete": "popgym/fox", "continuous": "popgym/sac-fox"}

    time_limit: Annotated[int | None, AfterValidator(_ending)] = None
    """agent steps after which an episode is truncated; none: the task's own limit"""

    @property
    def task(self) -> memory_tasks.Task:
        """The rules of the game and their options."""
        return memory_tasks.TASKS[self.name]

    @property
    def actions_of_task(self) -> Actions:
        return memory_tasks.actions(self.task)

    @property
    def longest(self) -> int:
        steps = memory_tasks.longest(self.task)
        return min(steps, self.time_limit or steps)


class MemoryEnv(MemoryOptions):
    """Tasks that need memory: T-mazes, and the games of POPGym. cerl's own, on the device."""

    family: Literal["memory"] = "memory"
    """fixed by the preset"""
    name: str = "tmaze"
    """tmaze, tmaze_active, or a task of POPGym with its level, e.g. RepeatPreviousEasy"""
    length: int | None = Field(default=None, ge=1)
    """T-mazes: length of the corridor, cells (none: 50); cart-poles, pendulums and bandits: length
    of an episode, agent steps (none: that of the level)"""
    decks: int | None = Field(default=None, ge=1)
    """card games: number of decks of 52 cards; none: that of the level"""
    k: int | None = Field(default=None, ge=1)
    """RepeatPrevious: which of the last cards to name, where 1 is the card now shown; none: that of
    the level"""
    noise: float | None = Field(default=None, ge=0, le=1e6)
    """noisy cart-poles and pendulums: standard deviation of the noise; none: that of the level"""

    @model_validator(mode="after")
    def _known(self) -> Self:
        memory_tasks.level(self.name, self._own)
        return self

    @property
    def _own(self) -> dict[str, int | float | None]:
        return {name: getattr(self, name) for name in ("length", "decks", "k", "noise")}

    @property
    def title(self) -> str:
        """The name and the options that were set, and for T-mazes the length, e.g. tmaze-200."""
        own = {name: value for name, value in self._own.items() if value is not None}
        if self.task.rules == "t_maze":
            return f"{self.name}-{self.task.options['length']}"
        return "-".join([self.name, *(f"{name}{value:g}" for name, value in own.items())])

    @property
    def task(self) -> memory_tasks.Task:
        return memory_tasks.level(self.name, self._own)

    @property
    def resident(self) -> bool:
        return True


class PopgymEnv(MemoryOptions, DivergingEnv):
    """POPGym (Morad et al. 2023): cerl's own games on the device, or the popgym package."""

    family: Literal["popgym"] = "popgym"
    """fixed by the preset"""
    name: Annotated[str, AfterValidator(memory_tasks.popgym_name)] = "RepeatPreviousEasy"
    """task and level, e.g. RepeatPreviousEasy"""
    backend: Literal["resident", "package"] = "resident"
    """resident: cerl's own games on the device, as in family memory; step by step they equal the
    package's; package: the simulators of popgym, one after the other on the host"""

    @property
    def resident(self) -> bool:
        return self.backend == "resident"


EnvConfig = Annotated[
    CatchEnv
    | MinAtarEnv
    | AtariEnv
    | GymEnv
    | GameEnv
    | PointMassEnv
    | MujocoEnv
    | DmcEnv
    | MemoryEnv
    | PopgymEnv,
    Field(discriminator="family"),
]
