"""Every option of cerl, with its unit: one frozen, strict tree of models.

A run is one `Config`. Presets (`configs/**.yaml`) state only differences from their `base:`; the
command line overrides single keys. "Agent steps" are action selections of one seed (loop iterations
x E), whatever the number of environments and seeds; a frame is one emulator frame. The sections
`env`, `agent`, `encoder` and `optim` are unions: each kind has its own options, and none of the
others'.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cerl.config.agents import AgentConfig, DqnConfig
from cerl.config.encoders import (
    AttentionOptions,
    EncoderConfig,
    FramesConfig,
    SequenceOptions,
    WindowRows,
)
from cerl.config.envs import CatchEnv, EnvConfig, unreadable
from cerl.config.model import Ints, Model
from cerl.config.samplers import SamplerConfig, UniformConfig
from cerl.head_kinds import HEAD_KINDS, in_words

if TYPE_CHECKING:
    HeadKindName = str
else:  # a Literal of names that only the registry knows
    HeadKindName = Literal[tuple(HEAD_KINDS)]

Policy = Literal["individual", "individual_mode", "vote", "mean", "mean_mode", "random"]
Policies = Annotated[tuple[Policy, ...], Field(strict=False)]
INDIVIDUAL = ("individual", "individual_mode")  # policies of which every member has a score


class NetConfig(Model):
    """Network of one member: convolutions, a sequence network if `encoder` is one, hidden layers,
    output."""

    channels: Ints = ()
    """filters of each convolution; empty: no convolution, observations are flattened. With
    agent sac a member's policy has convolutions of its own, its C critics share others"""
    kernels: Ints = ()
    """kernel size of each convolution, cells"""
    strides: Ints = ()
    """stride of each convolution, cells"""
    padding: Literal["valid", "same"] = "valid"
    """of the convolutions: none, or zeros so that only strides shrink the image"""
    hidden: Ints = (64, 64)
    """width of each hidden layer; the last one is the paper's penultimate layer"""
    scale: float = Field(default=1.0, ge=1e-9, le=1e9)
    """observations are divided by this inside the network"""
    init: Literal["fan_in", "xavier", "variance", "orthogonal"] = "fan_in"
    """fan_in: U(+-1/sqrt(fan_in)), weights and biases; xavier: uniform, biases 0;
    variance: U(+-sqrt(sqrt(3)/fan_in)), biases 0; orthogonal: gain sqrt 2 (1 for log standard
    deviations), biases 0 (agent: sac)"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        lengths = len(self.channels), len(self.kernels), len(self.strides)
        if len(set(lengths)) > 1:
            yield (
                "net.channels, net.kernels, net.strides: expected the same number of entries, one "
                f"for each convolution, got {lengths[0]}, {lengths[1]} and {lengths[2]}"
            )
        for name in ("channels", "kernels", "strides", "hidden"):
            if any(size < 1 for size in getattr(self, name)):
                yield f"net.{name}: expected sizes of at least 1, got {list(getattr(self, name))}"


class EnsembleConfig(Model):
    """Who learns what from whom."""

    members: int = Field(default=1, ge=1)
    """N, ensemble members of a seed"""
    shared_layers: int = Field(default=0, ge=0)
    """L, leading layers shared by all members (in order: convolutions, hidden layers, output; a
    sequence network is one layer, its convolutions included)"""
    heads: HeadKindName = Field(default="own", description=in_words())
    fork: Literal["final", "both"] = "final"
    """where heads fork: only the output layer, or the last hidden layer and the output layer"""
    horizons: int = Field(default=10, ge=1)
    """heads of a member under a kind of heads with horizons of their own (multi_horizon)"""
    duty: Literal["uniform", "tandem", "first"] = "uniform"
    """who acts: a member drawn uniformly; member 0 with active_probability, else member 1 (tandem);
    always member 0 (first)"""
    active_probability: float = Field(default=0.9, ge=0, le=1)
    """tandem: share of episodes in which member 0 acts"""
    switch: Literal["episode", "step"] = "episode"
    """when the member on duty is drawn anew"""

    @property
    def several_heads(self) -> bool:
        """Whether the kind of heads gives a member more heads than its own."""
        return HEAD_KINDS[self.heads].heads != "one"

    @property
    def several_horizons(self) -> bool:
        """Whether heads have discounts of their own, `horizons` of them."""
        return HEAD_KINDS[self.heads].heads == "horizons"


class LossConfig(Model):
    """What an update minimises."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """discount of one agent step"""
    n_step: int = Field(default=1, ge=1, le=1000)
    """rewards summed before bootstrapping, agent steps"""
    batches: Literal["shared", "independent", "own", "disjoint"] = "shared"
    """shared: one batch for all members; independent: one each, of all data; own: one each, of the
    data that the member generated; disjoint: one each, every row being one random member's"""
    batches_probability: float = Field(default=1.0, ge=0, le=1)
    """share of updates that use `batches`; the others use one shared batch"""
    mask_probability: float = Field(default=1.0, gt=0, le=1)
    """bootstrap mask: probability that a member learns from a row"""


class OptimOptions(Model):
    """What both optimisers have: one of them for every member of every seed."""

    name: Any  # one word, a type of its own in every kind
    """kind of the optimiser"""
    lr: float = Field(default=2.5e-4, gt=0, le=1000)
    """learning rate, constant over the run"""
    clip_norm: float = Field(default=0.0, ge=0, le=1e9)
    """each member's gradient is scaled down to this L2 norm; 0: no clipping"""


class AdamConfig(OptimOptions):
    """Adam (Kingma and Ba 2015)."""

    name: Literal["adam"] = "adam"
    """steps of the moments' ratio, corrected for their start at zero"""
    eps: float = Field(default=1e-8, ge=1e-30, le=1000)
    """added to the denominator of the step, outside the root"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """decay of the first moment"""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """decay of the second moment"""


class RmsPropConfig(OptimOptions):
    """Centred RMSProp (Graves 2013)."""

    name: Literal["rmsprop"] = "rmsprop"
    """centred: the second moment less the square of the first"""
    eps: float = Field(default=1e-8, ge=1e-30, le=1000)
    """added to the denominator of the step, inside the root"""
    decay: float = Field(default=0.95, ge=0, lt=1)
    """decay of both moments"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """momentum of the scaled step"""


OptimConfig = Annotated[AdamConfig | RmsPropConfig, Field(discriminator="name")]


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
    sampler: SamplerConfig = UniformConfig()
    """how rows are drawn: uniform, or prioritised by the errors of their values"""


class ScheduleConfig(Model):
    """How long, and how often what happens."""

    steps: int = Field(default=100_000, ge=1)
    """length of the run, agent steps of one seed"""
    update_every: int = Field(default=4, ge=1)
    """agent steps of one seed per update"""
    updates: int = Field(default=1, ge=1)
    """updates made where update_every asks for one"""
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if not self.policies:
            yield "eval.policies: expected at least one of individual, vote, mean, random; got none"
        if self.share and self.steps:
            yield (
                "eval.share: shares out a number of episodes, and eval.steps asks for a budget of "
                f"agent steps; expected false or eval.steps 0, got true and {self.steps}"
            )
        most = ("eval.steps", self.steps) if self.steps else ("eval.episodes", self.episodes)
        if self.slots > most[1]:
            yield (
                "eval.slots: every environment plays at least one of the episodes; expected at "
                f"most {most[0]} ({most[1]}), got {self.slots}"
            )
        if len(set(self.policies)) < len(self.policies):
            yield f"eval.policies: expected different policies, got {' '.join(self.policies)}"


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
    """family of tasks"""
    agent: AgentConfig = DqnConfig()
    """dqn: expected values; quantile: distributions of agent.quantiles quantiles; sac: soft
    actor-critic, for continuous actions"""
    encoder: EncoderConfig = FramesConfig()
    """frames: a stack of the last observations; the others read windows of rows: mlp (no memory),
    gru, transformer (softmax attention) or fox (forgetting attention)"""
    net: NetConfig = NetConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = AdamConfig()
    """adam, or centred rmsprop with epsilon inside the root"""
    replay: ReplayConfig = ReplayConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    explore: ExploreConfig = ExploreConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of every section that is a union, by the name of the section."""
        return {
            "env": self.env.family,
            "agent": self.agent.name,
            "encoder": self.encoder.name,
            "optim": self.optim.name,
            "replay.sampler": self.replay.sampler.name,
        }

    @property
    def epsilon_schedule(self) -> ExploreConfig:
        """`explore` with a number at its end."""
        if self.explore.end is not None:
            return self.explore
        return self.explore.model_copy(update={"end": 1 / self.env.longest})

    @property
    def rows_of_window(self) -> WindowRows:
        """How the rows of a window are used."""
        context, learnt = self.encoder.rows(self.env.longest)
        return WindowRows(context, learnt, ahead=self.loss.n_step)

    @property
    def rows_looked_back_on(self) -> int:
        """R, rows that a row's features depend on, its own included: as many as a window has, where
        the encoder is not asked for fewer."""
        own = self.encoder.cache if isinstance(self.encoder, AttentionOptions) else 0
        return own or self.rows_of_window.total

    @property
    def rows_of_refresh(self) -> int:
        """Rows of replay that a refresh of what acting remembers reads again: each layer looks back
        on R rows of the layer below."""
        layers = self.encoder.layers if isinstance(self.encoder, SequenceOptions) else 1
        return layers * self.rows_looked_back_on + 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """What is wrong with the options outside the sections, a sentence each."""
        yield from filter(None, (unreadable(key, getattr(self, key)) for key in ("preset", "out")))
        if self.preset.startswith((".", "-")):
            yield f"preset: expected a name that begins with a letter or digit, got {self.preset!r}"
        if not self.out:
            yield "out: expected the name of a folder, got an empty one; `.` is the current one"
        if not self.seeds:
            yield "seeds: expected at least one seed, got none; e.g. --seeds 0 1 2"
        for seed in sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            yield (
                f"seeds: {seed} is given {self.seeds.count(seed)} times; every seed trains on its "
                "own, so all must be different"
            )
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                yield f"seeds: expected whole numbers from 0 to 2**63 - 1, got {seed}"
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            yield f"device: expected auto, cpu, cuda or cuda:NUMBER, got {self.device!r}"
