"""The environments of cerl and their options: one model a family, a union by `family`.

`Model` is what every section of a config is made of: frozen, strict, finite numbers only.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cerl.config import contradictions, memory_tasks, preset

Ints = Annotated[tuple[int, ...], Field(strict=False)]

COUNTABLE = 2**63


class Model(BaseModel):
    """Frozen and strict: no unknown keys, no silent conversions, finite numbers only."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Whole numbers end up in tensors and files, whose integers have 64 bits."""
        if type(value) is int and abs(value) >= COUNTABLE:
            raise PydanticCustomError("too_large", "a whole number below 2**63")
        return value


class ObserveConfig(Model):
    """What an agent gets to see of an observation, applied in this order: keep or indices, noise,
    dropout, flicker. Drawn once, when the step is taken: replay holds what was seen."""

    keep: Literal["all", "position", "velocity"] = "all"
    """components kept of a robot of Gym-MuJoCo, CartPole, Pendulum or the point mass"""
    indices: Ints = ()
    """components kept, in this order, of a vector; empty: all"""
    noise: float = Field(default=0.0, ge=0, le=1e6)
    """standard deviation of Gaussian noise on every component"""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """probability that a component is 0, each on its own"""
    flicker: float = Field(default=0.0, ge=0, le=1)
    """probability that the whole observation is 0"""


class CatchEnv(Model):
    """Catch: a ball falls, a paddle of one cell has to be under it (device-resident, ours)."""

    family: Literal["catch"] = "catch"
    """fixed by the preset"""
    name: Literal["catch"] = "catch"
    """the only game of this family"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    rows: int = Field(default=10, ge=2)
    """height of the board, cells; an episode takes rows - 1 agent steps"""
    columns: int = Field(default=5, ge=2)
    """width of the board, cells"""
    sticky: float = Field(default=0.0, ge=0, lt=1)
    """probability that the last action is repeated"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""


class MinAtarEnv(Model):
    """MinAtar (Young and Tian 2019), device-resident, ours."""

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
    time_limit: int = Field(default=0, ge=0)
    """agent steps after which an episode is truncated; 0: never"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""


class AtariEnv(Model):
    """Atari 2600 by ale-py's own vector environment or by EnvPool; one 84x84 frame a step."""

    family: Literal["atari"] = "atari"
    """fixed by the preset"""
    name: str = "Pong"
    """game in camel case, e.g. Pong or SpaceInvaders"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    backend: Literal["envpool", "ale"] = "ale"
    """emulator: ale-py's own vector environment, or EnvPool; same frames and rewards in both"""
    sticky: float = Field(default=0.0, ge=0, lt=1)
    """probability that the emulator repeats the last action (Machado et al. 2018: 0.25)"""
    full_actions: bool = False
    """all 18 actions instead of the game's minimal set"""
    frame_skip: int = Field(default=4, ge=1, le=1000)
    """emulator frames of one agent step; the last two are max-pooled"""
    noop_max: int = Field(default=0, ge=0, le=10_000)
    """at most this many no-op frames at the start of an episode, a random number; 0: none (envpool:
    at least one, so 0 is an error there, except where fire_reset presses FIRE)"""
    fire_reset: bool = False
    """press FIRE for one frame at the start of an episode, where the game has it (envpool: after
    the no-op frames, ale: before them)"""
    life_loss: bool = False
    """a lost life ends the agent's episode (terminal); the game plays on, next with a no-op"""
    time_limit: int = Field(default=27_000, ge=1)
    """agent steps after which an episode is truncated"""
    threads: int = Field(default=0, ge=0)
    """emulator threads; 0: one for each core, at most S x E"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""


Diverged = Literal["error", "cut"]


def _arguments(given: Any) -> tuple[tuple[str, Any], ...]:
    """Arguments of a task, sorted by name, from a mapping or from words name=value of YAML scalars.

    Raises:  ValueError on anything else.
    """
    if isinstance(given, list | tuple) and all(isinstance(word, str) for word in given):
        pairs = [word.partition("=")[::2] for word in given]
        for word in given:
            if "=" not in word:
                raise ValueError(f"env.kwargs: expected name=value, got {word!r}")
        given = [(name, preset.scalar(text, where=f"env.kwargs.{name}")) for name, text in pairs]
        if len(dict(given)) < len(given):
            raise ValueError(f"env.kwargs: expected different names, got {' '.join(dict(pairs))}")
    if isinstance(given, Mapping):
        given = list(given.items())
    if not isinstance(given, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in given
    ):
        raise ValueError(f"env.kwargs: expected `name: value` lines of its own, got {given!r}")
    for name, value in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"env.kwargs: expected names of arguments, got {name!r}")
        for part in value if isinstance(value, list | tuple) else [value]:
            if part is not None and not isinstance(part, bool | int | float | str):
                raise ValueError(
                    f"env.kwargs.{name}: expected a number, a text, true, false, null or a list "
                    f"of these, got {part!r}"
                )
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    return tuple(sorted(frozen.items()))


def _named(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in pairs}


Arguments = Annotated[
    tuple[tuple[str, Any], ...], BeforeValidator(_arguments), PlainSerializer(_named)
]


class GymEnv(Model):
    """Any registered gymnasium id with discrete or bounded continuous actions."""

    family: Literal["gym"] = "gym"
    """fixed by the preset"""
    name: str = "CartPole-v1"
    """registered id, e.g. CartPole-v1; module:Id imports the module first, from the current folder
    or, where it has none of that name, from the installed packages"""
    kwargs: Arguments = ()
    """arguments of the task's constructor, e.g. is_slippery=false (in a file name: value); replace
    those of the preset"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    time_limit: int = Field(default=0, ge=0)
    """agent steps after which an episode is truncated; 0: the id's own limit"""
    diverged: Diverged = "error"
    """on a NaN or an infinity: stop the run, or cut that episode with a warning and go on"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""

    @property
    def title(self) -> str:
        """The name with the arguments of its own, e.g. FrozenLake-v1-is_slippery=False."""
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.kwargs)])


class PointMassEnv(Model):
    """A point mass pushed to the middle of a square (device-resident, ours)."""

    family: Literal["point_mass"] = "point_mass"
    """fixed by the preset"""
    name: Literal["point_mass"] = "point_mass"
    """the only task of this family"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    dimensions: int = Field(default=2, ge=1)
    """of the space that the mass moves in; so many components has an action"""
    walls: bool = True
    """the square has walls; without them leaving it ends the episode (terminal)"""
    time_limit: int = Field(default=50, ge=1)
    """agent steps after which an episode is truncated"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""


class MujocoEnv(Model):
    """Gym-MuJoCo by EnvPool: C++ threads, dynamics and rewards of gymnasium's v4 and v5."""

    family: Literal["mujoco"] = "mujoco"
    """fixed by the preset"""
    name: str = "HalfCheetah-v4"
    """robot and version, e.g. HalfCheetah-v4"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    time_limit: int = Field(default=0, ge=0)
    """agent steps after which an episode is truncated; 0: the id's own limit"""
    threads: int = Field(default=0, ge=0)
    """simulator threads; 0: one for each core, at most S x E"""
    diverged: Diverged = "error"
    """on a NaN or an infinity: stop the run, or cut that episode with a warning and go on"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""


class DmcEnv(Model):
    """dm_control's suite, by EnvPool (C++ threads) or by the dm-control package (pixels too)."""

    family: Literal["dmc"] = "dmc"
    """fixed by the preset"""
    name: str = "cheetah-run"
    """domain-task as the suite spells them, e.g. cheetah-run or ball_in_cup-catch"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    backend: Literal["envpool", "dm_control"] = "envpool"
    """simulator: EnvPool, or the dm-control package, one simulator after the other"""
    repeat: int = Field(default=1, ge=1, le=1000)
    """control steps that one action lasts; their rewards are summed"""
    time_limit: int = Field(default=0, ge=0)
    """agent steps after which an episode is truncated; 0: the suite's 1000 control steps"""
    pixels: bool = False
    """observations are images [3, size, size] instead of the state (backend: dm_control)"""
    size: int = Field(default=84, ge=1)
    """height and width of an image, pixels"""
    camera: int = Field(default=0, ge=-1)
    """number of the camera; -1: the model's free one"""
    threads: int = Field(default=0, ge=0)
    """EnvPool's simulator threads; 0: one for each core, at most S x E"""
    diverged: Diverged = "error"
    """on a NaN or an infinity: stop the run, or cut that episode with a warning and go on"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""


TimeLimit = Annotated[int | None, AfterValidator(contradictions.ending)]


class MemoryEnv(Model):
    """Tasks that need memory, device-resident, ours: T-mazes, and the games of POPGym."""

    family: Literal["memory"] = "memory"
    """fixed by the preset"""
    name: str = "tmaze"
    """tmaze, tmaze_active, or a task of POPGym with its level, e.g. RepeatPreviousEasy"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    length: int | None = Field(default=None, ge=1)
    """T-mazes: of the corridor, cells (none: 50); cart-poles, pendulums, bandits: of an episode,
    agent steps (none: the level's)"""
    decks: int | None = Field(default=None, ge=1)
    """card games: decks of 52 cards; none: the level's"""
    k: int | None = Field(default=None, ge=1)
    """RepeatPrevious: which of the last cards to name, 1 is the one now shown; none: the level's"""
    noise: float | None = Field(default=None, ge=0, le=1e6)
    """noisy cart-poles and pendulums: standard deviation; none: the level's"""
    time_limit: TimeLimit = None
    """agent steps after which an episode is truncated, if it did not end; none: the task's own"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""

    @model_validator(mode="after")
    def _known(self) -> "MemoryEnv":
        memory_tasks.level(self.name, self._own)
        return self

    @property
    def _own(self) -> dict[str, int | float | None]:
        return {name: getattr(self, name) for name in ("length", "decks", "k", "noise")}

    @property
    def title(self) -> str:
        """The name with options of its own, and any T-maze with its length, e.g. tmaze-200."""
        own = {name: value for name, value in self._own.items() if value is not None}
        if self.task.rules == "t_maze":
            return f"{self.name}-{self.task.options['length']}"
        return "-".join([self.name, *(f"{name}{value:g}" for name, value in own.items())])

    @property
    def task(self) -> memory_tasks.Task:
        """Its rules, and the options that they are given."""
        return memory_tasks.level(self.name, self._own)

    @property
    def longest(self) -> int:
        """Agent steps of the longest episode."""
        steps = memory_tasks.longest(self.task)
        return min(steps, self.time_limit or steps)


class PopgymEnv(Model):
    """POPGym (Morad et al. 2023): device-resident games of ours, or the popgym package itself."""

    family: Literal["popgym"] = "popgym"
    """fixed by the preset"""
    name: Annotated[str, AfterValidator(memory_tasks.popgym_name)] = "RepeatPreviousEasy"
    """task and level, e.g. RepeatPreviousEasy"""
    envs: int = Field(default=1, ge=1)
    """E, environments per seed"""
    backend: Literal["resident", "package"] = "resident"
    """resident: ours, equal step by step, as in family memory; package: popgym's simulators, one
    after the other on the host"""
    time_limit: TimeLimit = None
    """agent steps after which an episode is truncated, if it did not end; none: the task's own"""
    diverged: Diverged = "error"
    """package, on a NaN or an infinity: stop the run, or cut that episode with a warning"""
    observe: ObserveConfig = ObserveConfig()
    """what the agent gets to see of an observation"""

    @property
    def longest(self) -> int:
        """Agent steps of the longest episode."""
        steps = memory_tasks.longest(memory_tasks.POPGYM[self.name])
        return min(steps, self.time_limit or steps)


EnvConfig = Annotated[
    CatchEnv
    | MinAtarEnv
    | AtariEnv
    | GymEnv
    | PointMassEnv
    | MujocoEnv
    | DmcEnv
    | MemoryEnv
    | PopgymEnv,
    Field(discriminator="family"),
]
