"""Every option of cerl, with its unit: one frozen, strict tree of models, and how presets fill it.

A run is one `Config`. Presets (`configs/**.yaml`) state only differences from their `base:`; the
command line overrides single keys. A run folder holds its own as config.yaml, which is sealed: of a
run only the options of `CHANGEABLE` may change. "Agent steps" are action selections of one seed
(loop iterations x E), whatever the number of environments and seeds; a frame is one emulator frame.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cerl import files, mistakes, preset, seal, tasks
from cerl.mistakes import ConfigError
from cerl.text import visible
from cerl.versions import record_versions as record_versions

FILE = "config.yaml"  # of a run folder
# Options of a run that may change when it goes on, or groups of them: no part of what it is.
CHANGEABLE = ("schedule.steps", "log", "diverged", "device", "threads", "out")
CHANGEABLE_WORDS = "schedule.steps, log.*, diverged, device, threads or out"

Ints = Annotated[tuple[int, ...], Field(strict=False)]
Policy = Literal["individual", "individual_mode", "vote", "mean", "mean_mode", "random"]
Policies = Annotated[tuple[Policy, ...], Field(strict=False)]
Scales = Annotated[tuple[float, ...], Field(strict=False)]

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


TimeLimit = Annotated[int | None, AfterValidator(mistakes.ending)]


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
        tasks.level(self.name, self._own)
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
    def task(self) -> tasks.Task:
        """Its rules, and the options that they are given."""
        return tasks.level(self.name, self._own)

    @property
    def longest(self) -> int:
        """Agent steps of the longest episode."""
        steps = tasks.longest(self.task)
        return min(steps, self.time_limit or steps)


class PopgymEnv(Model):
    """POPGym (Morad et al. 2023): device-resident games of ours, or the popgym package itself."""

    family: Literal["popgym"] = "popgym"
    """fixed by the preset"""
    name: Annotated[str, AfterValidator(tasks.popgym_name)] = "RepeatPreviousEasy"
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
        steps = tasks.longest(tasks.POPGYM[self.name])
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


class NetConfig(Model):
    """Network of one member: convolutions, a sequence network if any, hidden layers, output."""

    encoder: Literal["frames", "mlp", "gru", "transformer", "fox"] = "frames"
    """frames: a stack of the last observations; the others read windows of rows as `sequence` says:
    mlp (no memory), gru, transformer (softmax attention) or fox (forgetting attention)"""
    channels: Ints = ()
    """filters of each convolution; empty: no convolution, observations are flattened. sac: a
    member's policy has convolutions of its own, its C critics share others"""
    kernels: Ints = ()
    """kernel size of each convolution, cells"""
    strides: Ints = ()
    """stride of each convolution, cells"""
    padding: Literal["valid", "same"] = "valid"
    """of the convolutions: none, or zeros so that only strides shrink the image"""
    hidden: Ints = (64, 64)
    """width of each hidden layer; the last one is the paper's penultimate layer"""
    stack: int = Field(default=1, ge=1)
    """frames per observation, built from replay; frames before an episode's start are zero"""
    scale: float = Field(default=1.0, ge=1e-9, le=1e9)
    """observations are divided by this inside the network"""
    init: Literal["fan_in", "xavier", "variance", "orthogonal"] = "fan_in"
    """fan_in: U(+-1/sqrt(fan_in)), weights and biases; xavier: uniform, biases 0;
    variance: U(+-sqrt(sqrt(3)/fan_in)), biases 0; orthogonal: gain sqrt 2 (1 for log standard
    deviations), biases 0 (agent: sac)"""
    shared_bias: bool = False
    """one scalar output bias for all actions (the original's)"""
    feature_norm: bool = False
    """divides the penultimate features by their L2 norm + 1e-6 (agents dqn, quantile)"""
    critics: int = Field(default=2, ge=1)
    """sac: C, critics of a member"""
    critic_norm: Literal["none", "layer", "layer_plain"] = "none"
    """sac: layer norm before every ReLU of the critics, with learnt scale and offset or without"""
    log_std: Literal["tanh", "clip"] = "tanh"
    """sac: how the policy's log standard deviation is kept between its bounds"""
    log_std_min: float = Field(default=-10.0, ge=-50, le=50)
    """sac: lower bound of the log standard deviation"""
    log_std_max: float = Field(default=2.0, ge=-50, le=50)
    """sac: upper bound of the log standard deviation"""


class SequenceConfig(Model):
    """Sequence network and its windows (net.encoder other than frames)."""

    layers: int = Field(default=1, ge=1, le=1000)
    """blocks"""
    width: int = Field(default=64, ge=1)
    """D, features of a row"""
    heads: int = Field(default=2, ge=1)
    """H, attention heads (fox, transformer)"""
    variant: Literal["llama", "pro"] = "pro"
    """fox: plain blocks, or with QK-norm, shifted keys and values, output norm and output gate"""
    ratio: float = Field(default=3.5, gt=0)
    """hidden width of a block's perceptron over `width`, before the 2/3 of gated units; the twins
    of fox are resized to its number of parameters"""
    gate_scales: Scales = ()
    """fox: shortest and longest time scale of the forget gates at the start, agent steps, spread
    over the heads; empty: gates of 1/2, which forget in a step or two"""
    prune: float = Field(default=0.0, le=0)
    """fox: log of the share of a softmax that may be left out (spec: -10); 0: nothing is"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the products inside the blocks"""
    previous_action: bool = True
    """a row's features include the action before it (0 where an episode starts)"""
    previous_reward: bool = True
    """a row's features include the reward before it, as replay stores it"""
    context: int = Field(default=0, ge=0)
    """rows before the learnt ones, without loss"""
    learnt: int = Field(default=0, ge=0)
    """T, learnt rows of a window; 0: as many as the longest episode of env has (families whose
    episodes have a limit)"""
    context_grad: bool = True
    """gradients flow into the context rows (fox, transformer; never with gru)"""
    sampling: Literal["uniform", "episode_start"] = "uniform"
    """where the learnt rows of a window begin: at any row, or with an episode (then all episodes
    are drawn alike, and each is learnt up to its end)"""
    cache: int = Field(default=0, ge=0)
    """R, rows that acting and windows look back on, their own included (fox, transformer); 0: a
    whole window"""
    stored_state: bool = False
    """gru: replay keeps the state that acting was in before every row, and windows begin with it
    (Kapturowski et al. 2019); agents dqn and quantile, with one member or own batches"""
    cache_refresh: int = Field(default=0, ge=0)
    """updates between recomputations of what acting remembers, from the last layers x R rows of
    replay (of gru: nothing before them is remembered then); 0: never, it then holds what older
    parameters made of older rows"""


class EnsembleConfig(Model):
    """Who learns what from whom."""

    members: int = Field(default=1, ge=1)
    """N, ensemble members of a seed"""
    shared_layers: int = Field(default=0, ge=0)
    """L, leading layers shared by all members (in order: convolutions, hidden layers, output; a
    sequence network is one layer, its convolutions included)"""
    heads: Literal["own", "cerl", "own_target", "single_actor", "multi_horizon"] = "own"
    """what the value heads of a member regress to (cerl/heads.py)"""
    fork: Literal["final", "both"] = "final"
    """where heads fork: only the output layer, or the last hidden layer and the output layer"""
    horizons: int = Field(default=10, ge=1)
    """heads of a member under multi_horizon"""
    duty: Literal["uniform", "tandem", "first"] = "uniform"
    """who acts: a member drawn uniformly; member 0 with active_probability, else member 1 (tandem);
    always member 0 (first)"""
    active_probability: float = Field(default=0.9, ge=0, le=1)
    """tandem: share of episodes in which member 0 acts"""
    switch: Literal["episode", "step"] = "episode"
    """when the member on duty is drawn anew"""
    gradient_scale: bool = True
    """gradients scaled by 1/N below the last shared layer and 1/J below the fork of the heads
    (agents dqn, quantile; sac sums the losses of its heads)"""


class LossConfig(Model):
    """What an update minimises."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """discount of one agent step"""
    n_step: int = Field(default=1, ge=1, le=1000)
    """rewards summed before bootstrapping, agent steps"""
    double: bool = True
    """the online network chooses the next action, the target network values it (agents dqn,
    quantile; with sac the policy chooses)"""
    kind: Literal["huber", "mse", "mse_huber"] = "huber"
    """huber, or the squared error without the 1/2 (agents dqn, sac); mse_huber: squared for a
    member's own head, twice Huber for the others (agent: sac)"""
    huber_delta: float = Field(default=1.0, gt=0, le=1e9)
    """where Huber turns from square to linear; for quantiles the paper's kappa"""
    quantiles: int = Field(default=200, ge=2)
    """quantiles of a value distribution (agent: quantile), at least 2"""
    mico_weight: float = Field(default=0.0, ge=0, le=1)
    """loss = (1 - w) TD + w MICo metric loss"""
    mico_beta: float = Field(default=0.1, ge=0, le=1e6)
    """weight of the angle in the MICo distance"""
    batches: Literal["shared", "independent", "own", "disjoint"] = "shared"
    """shared: one batch for all members; independent: one each, of all data; own: one each, of the
    data that the member generated; disjoint: one each, every row being one random member's"""
    batches_probability: float = Field(default=1.0, ge=0, le=1)
    """share of updates that use `batches`; the others use one shared batch"""
    mask_probability: float = Field(default=1.0, gt=0, le=1)
    """bootstrap mask: probability that a member learns from a row"""
    target_critics: int = Field(default=0, ge=0)
    """sac: the target is the smallest of this many critics, drawn anew for each update (REDQ); 0:
    of all"""
    actor_value: Literal["min", "mean"] = "min"
    """sac: what the policy climbs, the smallest or the mean of its member's critics"""
    backup_entropy: bool = True
    """sac: the target counts the next action's entropy"""
    target_entropy: float = Field(default=-1.0, ge=-1000, le=1000)
    """sac: entropy that the temperature aims at, nats for each action component"""
    temperature: float = Field(default=1.0, gt=0, le=1e6)
    """sac: of every policy at the start"""
    spread_temperature: float = Field(default=0.0, ge=0, le=1e6)
    """sac: T of the weight sigmoid(-T std) + 1/2 of a row, std being that of the members' target
    values of the next action (SUNRISE); 0: all rows weigh the same"""


class OptimConfig(Model):
    """The optimiser, one for every member of every seed."""

    name: Literal["rmsprop", "adam"] = "adam"
    """adam, or centred rmsprop with epsilon inside the root"""
    lr: float = Field(default=2.5e-4, gt=0, le=1000)
    """learning rate, constant over the run"""
    eps: float = Field(default=1e-8, ge=1e-30, le=1000)
    """added to the denominator of the step: inside the root (rmsprop), outside it (adam)"""
    decay: float = Field(default=0.95, ge=0, lt=1)
    """rmsprop: decay of both moments"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """rmsprop: momentum of the scaled step"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """adam: decay of the first moment"""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """adam: decay of the second moment"""
    clip_norm: float = Field(default=0.0, ge=0, le=1e9)
    """each member's gradient is scaled down to this L2 norm; 0: no clipping"""
    actor_lr: float = Field(default=0.0, ge=0, le=1000)
    """sac: learning rate of the policies; 0: lr"""
    temperature_lr: float = Field(default=0.0, ge=0, le=1000)
    """sac: learning rate of the log temperatures; 0: lr"""


class ReplayConfig(Model):
    """The replay buffer of each seed."""

    capacity: int = Field(default=100_000, ge=2)
    """rows per seed, reset rows included"""
    batch: int = Field(default=32, ge=1)
    """B, rows of a batch"""
    start: int = Field(default=5_000, ge=1)
    """agent steps of one seed before the first update"""
    placement: Literal["device", "host"] = "device"
    """where rows live; host: pinned memory, slower"""
    reward_clip: float = Field(default=0.0, ge=0, le=1e9)
    """rewards are clipped to +- this before they are stored; 0: not (returns are never clipped)"""
    candidates: int = Field(default=8, ge=1)
    """rows drawn for each slot of a batch, of which the first valid one is taken"""


class ScheduleConfig(Model):
    """How long, and how often what happens."""

    steps: int = Field(default=100_000, ge=1)
    """length of the run, agent steps of one seed"""
    update_every: int = Field(default=4, ge=1)
    """agent steps of one seed per update"""
    updates: int = Field(default=1, ge=1)
    """updates made where update_every asks for one"""
    policy_every: int = Field(default=1, ge=1)
    """sac: updates of the critics per update of policies and temperatures"""
    target_every: int = Field(default=1_000, ge=1)
    """agent steps of one seed between copies to the target network (target_rate 1)"""
    target_rate: float = Field(default=1.0, gt=0, le=1)
    """below 1: after every update the target network moves by this share towards the online one"""


class ExploreConfig(Model):
    """Epsilon-greedy exploration during training: constant, then linear decay."""

    start: float = Field(default=1.0, ge=0, le=1)
    """epsilon until `hold` agent steps"""
    end: float | None = Field(default=0.01, ge=0, le=1)
    """epsilon after the decay; None (in a file null): a random action in the longest episode, 1 /
    its agent steps (families whose episodes have a limit)"""
    hold: int = Field(default=5_000, ge=0)
    """agent steps before the decay begins"""
    decay: int = Field(default=100_000, ge=1)
    """agent steps of the linear decay"""


class EvalConfig(Model):
    """Evaluation of every member and of the aggregate."""

    every: int = Field(default=50_000, ge=1)
    """agent steps of one seed between evaluations (the last one comes at the end of the run)"""
    episodes: int = Field(default=10, ge=1)
    """episodes of each member, and of each aggregate policy, per evaluation and seed"""
    share: bool = False
    """the episodes are shared out over the members: each plays 1/N of them, rounded up"""
    slots: int = Field(default=0, ge=0)
    """environments per member or aggregate, each playing its share of the episodes, at most one an
    episode; 0: as many as episodes"""
    epsilon: float = Field(default=0.01, ge=0, le=1)
    """share of random actions"""
    policies: Policies = ("individual", "vote")
    """any of individual (every member), vote (the most frequent greedy action), mean (greedy in the
    mean Q, or the mean of the members' actions), random (a member drawn for each episode);
    sac: individual_mode and mean_mode, the same with the members' modes for actions"""
    steps: int = Field(default=0, ge=0)
    """0: a fixed number of episodes; else the original's budget for each policy: whole episodes
    until this many agent steps"""
    time_limit: int = Field(default=27_000, ge=1)
    """agent steps after which an evaluation episode is cut and counted, in every family; a shorter
    limit of the task or of env.time_limit stands"""


class LogConfig(Model):
    """What a run writes, and when."""

    every: int = Field(default=5_000, ge=1)
    """agent steps of one seed between lines of training metrics"""
    checkpoint_every: int = Field(default=250_000, ge=1)
    """agent steps of one seed between checkpoints (one is also saved at the start, at the end, and
    when the run is told to stop)"""
    checkpoint_minutes: float = Field(default=15.0, ge=0)
    """minutes between checkpoints, beside those of checkpoint_every; 0: not by the clock"""
    save_replay: bool = True
    """checkpoints hold the replay buffer (RUN/replay, written beside training, new rows only);
    without it a resumed run refills it first"""


class Config(Model):
    """One run: a population of seeds x members on one environment."""

    preset: str = ""
    """name of the preset that this run started from; goes into every result row"""
    agent: Literal["dqn", "quantile", "sac"] = "dqn"
    """dqn: expected values; quantile: distributions of loss.quantiles quantiles; sac: soft
    actor-critic, for continuous actions"""
    seeds: Ints = (0,)
    """seeds trained side by side in this process; all different"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int = Field(default=1, ge=0)
    """CPU threads of tensor arithmetic (small networks are fastest with 1), at most 64 or 4 for a
    core; 0: one for each core"""
    precision: Literal["tf32", "fp32", "bf16"] = "tf32"
    """of matrix products on a GPU; everything else is float32"""
    compile: bool = False
    """fuses acting and the update with torch.compile (about a minute at start; without effect on a
    CPU)"""
    out: str = "runs"
    """folder that receives the run folder"""
    diverged: Literal["freeze", "cut", "error"] = "freeze"
    """a seed whose losses, parameters or optimiser's moments are not finite: freeze, it learns no
    more and its rows go on, marked; cut, they end there too; error, the run stops"""
    env: EnvConfig = CatchEnv()
    net: NetConfig = NetConfig()
    sequence: SequenceConfig = SequenceConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    replay: ReplayConfig = ReplayConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    explore: ExploreConfig = ExploreConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def longest(self) -> int:
        """Agent steps of the longest episode, as far as options of env say; 0: unknown."""
        env = self.env
        if env.family == "catch":
            return env.rows - 1
        if isinstance(env, MemoryEnv | PopgymEnv):
            return env.longest
        return getattr(env, "time_limit", 0) or 0

    @property
    def exploration(self) -> ExploreConfig:
        """`explore`, its end a number."""
        if self.explore.end is not None:
            return self.explore
        return self.explore.model_copy(update={"end": 1 / self.longest})

    @property
    def learnt(self) -> int:
        """T, learnt rows of a window."""
        if self.net.encoder == "frames":
            return 1
        return self.sequence.learnt or self.longest

    @property
    def context(self) -> int:
        """Rows of a window before the learnt ones; a sequence has one more that leads it."""
        return self.net.stack - 1 if self.net.encoder == "frames" else 1 + self.sequence.context

    @property
    def window(self) -> int:
        """W, rows of a window."""
        return self.context + self.learnt + self.loss.n_step

    @property
    def remembered(self) -> int:
        """Numbers of a state that replay keeps beside a row."""
        stored = self.net.encoder == "gru" and self.sequence.stored_state
        return self.sequence.layers * self.sequence.width if stored else 0

    @property
    def begins(self) -> bool:
        """Whether the learnt rows of a window begin with an episode."""
        return self.net.encoder != "frames" and self.sequence.sampling == "episode_start"

    @property
    def refresh(self) -> int:
        """Updates between refreshes of what acting remembers; 0: none."""
        return 0 if self.net.encoder == "frames" else self.sequence.cache_refresh

    @property
    def cache(self) -> int:
        """R, rows that a sequence network looks back on."""
        return self.sequence.cache or self.window

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = list(mistakes.contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Study(Model):
    """Presets that are run and reported together, and what they change."""

    presets: Annotated[tuple[str, ...], Field(strict=False)]
    """names of presets"""
    options: dict[str, bool | int | float | str] = {}
    """dotted keys of the command line, for every preset"""


def validated(tree: Mapping[str, Any], *, where: str) -> Config:
    """The Config of a complete tree of options.

    Raises: ConfigError naming `where`, the key path, what was expected and got, the nearest key.
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        env = tree.get("env", {"family": "catch"})
        family = str(env.get("family", "")) if isinstance(env, Mapping) else ""
        raise mistakes.refused(error, Config, where=where, family=family) from None


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The Config of a preset.

    Args:   name of a preset or path of a YAML file; overrides nested, or with dotted keys.
    Raises: ConfigError.
    """
    tree = preset.merged(preset.tree(name), preset.nested(overrides or {}))
    changes = f" with {preset.words(overrides)}" if overrides else ""
    return validated(tree, where=f"{name}{changes}")


def load_study(name: str, device: Literal["cpu", "cuda"]) -> Study:
    """A study's presets and options for a kind of device. Raises: ConfigError."""
    path = preset.FOLDER / f"{name}.yaml"
    tree = preset.read(path)
    if device not in tree:
        raise ConfigError(f"{path}: expected a key {device}, got {', '.join(tree) or 'none'}")
    try:
        return Study.model_validate(tree[device])
    except ValidationError as error:
        raise mistakes.refused(error, Study, where=f"{path}: {device}") from None


def load_file(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """The Config that `dump` saved.

    Args:   changes of options of `CHANGEABLE`, by dotted key; they are not written.
    Raises: ConfigError, also if the file was changed or cut since.
    """
    path = Path(path)
    return validated(_changed(_sealed(path), changes or {}, path), where=str(path))


def change(folder: Path, changes: Mapping[str, Any]) -> Config:
    """Changes options of a run in its config.yaml; for the only writer of the folder.

    Args:   changes of options of `CHANGEABLE`, by dotted key.
    Raises: ConfigError, with nothing changed.
    """
    path = folder / FILE
    tree = _changed(_sealed(path), changes, path)
    config = validated(tree, where=str(path))
    if changes:
        # Options that this version of cerl has and the file has not stay out of it.
        files.write_text(path, _text(tree, path, own=seal.opened(path).own))
    return config


def _changed(tree: preset.Tree, changes: Mapping[str, Any], path: Path) -> preset.Tree:
    if other := [key for key in changes if not changeable(key)]:
        raise ConfigError(unchangeable(other, path))
    return preset.merged(tree, preset.nested(changes))


def unchangeable(keys: Sequence[str], path: Path) -> str:
    """A sentence that says which options of a run cannot change, and what to do instead."""
    return (
        f"{path}: {', '.join(keys)} cannot change in a run; expected one of {CHANGEABLE_WORDS}. "
        f"To train with other options start another run: cerl train {path} --{keys[0]} ..."
    )


def changeable(key: str) -> bool:
    """Whether an option, given by its dotted key, may change in a run."""
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def fixed(run: Config | Path) -> dict[str, str]:
    """The options of a run that may not change in it, as JSON by dotted key.

    Args:   run, or its folder: then those that its file states, so that a newer cerl with more
            options finds the same.
    Raises: ConfigError if the file was changed or cut.
    """
    tree = _sealed(run / FILE) if isinstance(run, Path) else run.model_dump(mode="json")
    found = {key: json.dumps(value, sort_keys=True) for key, value in preset.leaves(tree)}
    return {key: found[key] for key in sorted(found) if not changeable(key)}


def fixed_hash(run: Config | Path) -> str:
    """SHA-256 in hex digits of `fixed`, seeds included."""
    return hashlib.sha256(json.dumps(fixed(run), sort_keys=True).encode()).hexdigest()


def check_fixed(folder: Path, made: str | Mapping[str, str], *, where: str) -> None:
    """Whether what a file of a run folder holds was made by the run of its config.yaml.

    Args:   made, what the file says that it was made by: `fixed_hash`, or `fixed` itself; where,
            the file, for the message.
    Raises: ConfigError naming options that differ, as far as `made` tells.
    """
    own = fixed(folder)
    if made == own or made == fixed_hash(folder):
        return
    what = "another config.yaml"
    if not isinstance(made, str):
        different = [key for key in sorted({*own, *made}) if own.get(key) != made.get(key)]
        what = ", ".join(f"{key} {visible(str(made.get(key, 'none')))}" for key in different[:5])
        what += f" and {len(different) - 5} more" if len(different) > 5 else ""
        what += " (config.yaml: " + ", ".join(own.get(key, "none") for key in different[:5]) + ")"
    raise ConfigError(
        f"{where}: expected what the run of {folder / FILE} made, got that of {what}; put back the "
        "config.yaml that the run had"
    )


def dump(config: Config, path: str | os.PathLike[str]) -> None:
    """Saves every resolved option as YAML, sealed; `load_file` gives the same Config back."""
    path = Path(path)
    files.write_text(path, _text(config.model_dump(mode="json"), path))


def _text(tree: preset.Tree, path: Path, *, own: bool = True) -> str:
    head = f"# Every option of a run; `cerl train {path.name}` repeats it.\n"
    return seal.sealed(head + preset.written(tree), own=own)


def _sealed(path: Path) -> preset.Tree:
    """The options in a sealed file. Raises: ConfigError."""
    return preset.options(seal.opened(path).text, where=str(path))


def new_folder(config: Config) -> Path:
    """A new run folder below `config.out`, with config.yaml in it.

    Raises: ConfigError if none can be made there.
    """
    words = re.sub(r"[^\w.+-]+", "-", f"{config.preset or 'run'}-{config.env.name}")
    # A file system takes names of 255 bytes.
    plain = words.encode()[:150].decode(errors="ignore").lstrip(".-")
    name = f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = _made(out, name)
        dump(config, folder / FILE)
        files.sync_folder(out)
    except (OSError, ValueError) as error:
        raise unwritable("--out", config.out, error) from error
    return folder


def _made(out: Path, name: str) -> Path:
    """A new folder in `out`, numbered where the name is taken. Raises: OSError."""
    for count in itertools.count(1):
        folder = out / (name if count == 1 else f"{name}-{count}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always another number")


def check_out(out: str | os.PathLike[str], *, option: str = "--out") -> None:
    """Finds out early whether a folder can be made and written to. Raises: ConfigError."""
    try:
        path = Path(out).absolute()
        while not os.path.lexists(path):
            path = path.parent
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path} is no folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{path} cannot be written to")
    except (OSError, ValueError) as error:
        raise unwritable(option, out, error) from error


def unwritable(
    option: str, out: str | os.PathLike[str], error: OSError | ValueError
) -> ConfigError:
    """A ConfigError that says why the folder of an option cannot be made or written to."""
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return ConfigError(
        f"{option}: expected a folder that can be made and written to, got {str(out)!r} ({reason})"
    )
