"""Every option of a run, with its unit: `Config`, a frozen, strict tree of pydantic models.

Presets (`configs/**.yaml`) state only differences from their `base:`; the command line overrides
single keys. "Agent steps" count the actions of one seed in all of its E environments (iterations of
the training loop x E); a frame is one emulator frame. The sections `env`, `agent`, `encoder` and
`optim` are unions: each kind has only the options that mean something to it.
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
from cerl.config.own import OR_OWN, OwnName, is_own
from cerl.config.samplers import SamplerConfig, UniformConfig
from cerl.head_kinds import HEAD_KINDS, in_words

if TYPE_CHECKING:
    HeadKindName = str
else:  # a Literal of names that only the registry knows
    HeadKindName = Annotated[Literal[tuple(HEAD_KINDS)], *OR_OWN]

Policy = Literal["individual", "individual_mode", "vote", "mean", "mean_mode", "random"]
Policies = Annotated[tuple[Policy, ...], Field(strict=False)]
Tracks = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)]
INDIVIDUAL = ("individual", "individual_mode")  # policies of which every member has a score


class NetConfig(Model):
    """The network of one member, from input to output: convolutions, the sequence network if
    `encoder` names one, hidden layers, output layer."""

    channels: Ints = ()
    """number of filters of each convolution; empty: no convolutions, observations are flattened.
    With agent sac, the policy of a member has one stack of convolutions, its C critics share
    another"""
    kernels: Ints = ()
    """kernel size of each convolution, cells"""
    strides: Ints = ()
    """stride of each convolution, cells"""
    padding: Literal["valid", "same"] = "valid"
    """padding of the convolutions. valid: none; same: zeros, so that only strides shrink the
    image"""
    hidden: Ints = (64, 64)
    """width of each hidden layer; the last one is what papers call the penultimate layer"""
    scale: float = Field(default=1.0, ge=1e-9, le=1e9)
    """the network divides observations by this, e.g. 255 for pixels"""
    init: Literal["fan_in", "xavier", "variance", "orthogonal"] = "fan_in"
    """initialisation. fan_in: U(+-1/sqrt(fan_in)), weights and biases; xavier: uniform, biases 0;
    variance: U(+-sqrt(sqrt(3)/fan_in)), biases 0; orthogonal (only agent sac): gain sqrt 2, for log
    standard deviations 1, biases 0"""

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
    """The ensemble: its members, what they share, what their heads regress to, and who acts."""

    members: int = Field(default=1, ge=1)
    """N, ensemble members of a seed"""
    shared_layers: int = Field(default=0, ge=0)
    """L, number of first layers that all members share (the order is convolutions, hidden layers,
    output layer; a sequence network with its convolutions counts as one layer)"""
    heads: HeadKindName = Field(default="own", description=in_words())
    fork: Literal["final", "both"] = "final"
    """layers that each head of a member has for itself. final: the output layer; both: the last
    hidden layer and the output layer"""
    horizons: int = Field(default=10, ge=1)
    """heads of a member under a kind of heads with horizons of their own (multi_horizon)"""
    duty: Literal["uniform", "tandem", "first"] = "uniform"
    """which member is on duty, i.e. acts. uniform: one drawn uniformly; tandem: member 0 with
    probability active_probability, else member 1; first: always member 0"""
    active_probability: float = Field(default=0.9, ge=0, le=1)
    """with duty tandem: probability that member 0 acts"""
    switch: Literal["episode", "step"] = "episode"
    """how often the member on duty is drawn: for every episode or for every agent step"""
    frozen: Ints = ()
    """members, from 0, that do not learn: they may act, and their parameters stay as they are"""

    @property
    def several_heads(self) -> bool:
        """Whether the kind of heads gives a member more heads than its own; one of a module may."""
        return is_own(self.heads) or HEAD_KINDS[self.heads].heads != "one"

    @property
    def several_horizons(self) -> bool:
        """Whether heads have discounts of their own, `horizons` of them."""
        return not is_own(self.heads) and HEAD_KINDS[self.heads].heads == "horizons"


class LossConfig(Model):
    """Returns and batches of an update."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """discount of one agent step"""
    n_step: int = Field(default=1, ge=1, le=1000)
    """n of n-step returns: rewards summed before bootstrapping, agent steps"""
    batches: Literal["shared", "independent", "own", "disjoint"] = "shared"
    """shared: one batch for all members; independent: a batch for each member, from all data; own:
    a batch for each member, from the data that it generated; disjoint: a batch for each member,
    where every row of the data belongs to one member, chosen at random"""
    batches_probability: float = Field(default=1.0, ge=0, le=1)
    """share of updates that use `batches`; the others use one shared batch"""
    mask_probability: float = Field(default=1.0, gt=0, le=1)
    """probability that a member learns from a row (bootstrap mask, as in Bootstrapped DQN)"""


class OptimOptions(Model):
    """Options of both optimisers; every member of every seed is optimised on its own."""

    name: Any  # every kind narrows it to a Literal of one word
    """kind of the optimiser"""
    lr: float = Field(default=2.5e-4, gt=0, le=1000)
    """learning rate, constant over the run"""
    clip_norm: float = Field(default=0.0, ge=0, le=1e9)
    """largest L2 norm of a member's gradient, which is scaled down to it; 0: no clipping"""


class AdamConfig(OptimOptions):
    """Adam (Kingma and Ba 2015)."""

    name: Literal["adam"] = "adam"
    """Adam, with bias correction"""
    eps: float = Field(default=1e-8, ge=1e-30, le=1000)
    """added to the denominator of the step, outside the square root"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """decay of the first moment"""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """decay of the second moment"""


class RmsPropConfig(OptimOptions):
    """Centred RMSProp (Graves 2013)."""

    name: Literal["rmsprop"] = "rmsprop"
    """centred RMSProp: divides by the root of the second moment minus the squared first moment"""
    eps: float = Field(default=1e-8, ge=1e-30, le=1000)
    """added to the denominator of the step, inside the square root"""
    decay: float = Field(default=0.95, ge=0, lt=1)
    """decay of both moments"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """momentum of the step after that division; 0: none"""


OptimConfig = Annotated[AdamConfig | RmsPropConfig, Field(discriminator="name")]


class ReplayConfig(Model):
    """The replay buffer of each seed."""

    capacity: int = Field(default=100_000, ge=2)
    """rows per seed; the last observation of an episode takes a row of its own"""
    batch: int = Field(default=32, ge=1)
    """B, rows of a batch (with a sequence network: windows)"""
    start: int = Field(default=5_000, ge=1)
    """agent steps of one seed before the first update"""
    placement: Literal["device", "host"] = "device"
    """where rows are stored. device: memory of the training device; host: pinned host memory,
    slower"""
    reward_clip: float = Field(default=0.0, ge=0, le=1e9)
    """rewards are clipped to +- this before they are stored; 0: no clipping (reported returns are
    never clipped)"""
    candidates: int = Field(default=8, ge=1)
    """random rows drawn for each slot of a batch; the first valid one of them is used, and a slot
    without any has weight 0"""
    fixed: bool = False
    """no rows are added: members learn from those that a fork took over (`cerl fork`), while
    episodes go on"""
    sampler: SamplerConfig = UniformConfig()
    """how rows are drawn: uniform, prioritised by the errors of their values, or own: by a class of
    a module of yours"""


class ScheduleConfig(Model):
    """The length of a run, and how often networks and target networks are updated."""

    steps: int = Field(default=100_000, ge=1)
    """length of the run, agent steps of one seed"""
    update_every: int = Field(default=4, ge=1)
    """agent steps of one seed from one round of updates to the next"""
    updates: int = Field(default=1, ge=1)
    """updates in a round"""
    target_every: int = Field(default=1_000, ge=1)
    """agent steps of one seed between copies to the target network (with target_rate 1)"""
    target_rate: float = Field(default=1.0, gt=0, le=1)
    """1: the target network is a copy, renewed every target_every agent steps; below 1: after every
    update it moves by this share towards the online network (soft update)"""


class ExploreConfig(Model):
    """Epsilon-greedy exploration during training: epsilon is constant, then decays linearly."""

    start: float = Field(default=1.0, ge=0, le=1)
    """epsilon for the first `hold` agent steps"""
    end: float | None = Field(default=0.01, ge=0, le=1)
    """epsilon after the decay; None (in a file null): 1 / agent steps of the longest episode, i.e.
    one random action per episode on average (only families whose episodes have a limit)"""
    hold: int = Field(default=5_000, ge=0)
    """agent steps of one seed before the decay begins"""
    decay: int = Field(default=100_000, ge=1)
    """agent steps of one seed that the decay takes"""
    rules: Annotated[tuple[OwnName, ...], Field(strict=False)] = ()
    """functions MODULE:NAME of modules of yours, which change in turn the random choices of every
    agent step of training (docs/joints.md)"""


class EvalConfig(Model):
    """Evaluation of every member and of the aggregate."""

    every: int = Field(default=50_000, ge=1)
    """agent steps of one seed between evaluations (one more is made at the end of the run)"""
    episodes: int = Field(default=10, ge=1)
    """episodes of each member, and of each aggregate policy, per evaluation and seed"""
    share: bool = False
    """divides the episodes among the members: each plays 1/N of them, rounded up"""
    slots: int = Field(default=0, ge=0)
    """environments for each member or aggregate policy, which play at the same time; at most one
    per episode; 0: as many as episodes"""
    epsilon: float = Field(default=0.01, ge=0, le=1)
    """share of random actions in evaluations"""
    policies: Policies = ("individual", "vote")
    """policies to evaluate. individual: every member; vote: the most frequent greedy action of the
    members; mean: greedy action of the mean Q, or mean of the members' continuous actions; random:
    a member drawn for each episode; individual_mode, mean_mode (only agent sac): with the modes of
    the members' policies in place of sampled actions"""
    steps: int = Field(default=0, ge=0)
    """0: a fixed number of episodes; else a budget for each policy, as in the code of the CERL
    paper: whole episodes are played until this many agent steps are spent"""
    time_limit: int = Field(default=27_000, ge=1)
    """agent steps after which an evaluation episode is cut off and counted, in every family; a
    shorter limit of the task or env.time_limit applies first"""

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
                "eval.share: divides a number of episodes, but eval.steps asks for a budget of "
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
    """What a run writes to its folder, and when."""

    every: int = Field(default=5_000, ge=1)
    """agent steps of one seed between lines of training metrics"""
    members: Literal["mean", "each"] = "mean"
    """what TensorBoard and trackers show of metrics and scores of members. mean: their mean over
    the members; each: also those of every member (metrics.parquet and rows.parquet always hold all
    of them)"""
    track: Tracks = ("tensorboard",)
    """what shows curves while the run trains, one or several of tensorboard, wandb and trackio
    (docs/tracking.md)"""
    project: str = Field(default="cerl", pattern=r"^[A-Za-z0-9_.-]+$")
    """name of the project of wandb and trackio that gets the curves"""
    checkpoint_every: int = Field(default=250_000, ge=1)
    """agent steps of one seed between checkpoints (one is also saved at the start, at the end, and
    when the run is told to stop)"""
    checkpoint_minutes: float = Field(default=15.0, ge=0)
    """a checkpoint is also saved when the newest is older than this many minutes; 0: never"""
    measures: Annotated[tuple[OwnName, ...], Field(strict=False)] = ()
    """functions MODULE:NAME of modules of yours, which compute further metrics (docs/joints.md)"""
    keep: Ints = ()
    """agent steps of one seed whose checkpoints stay in the folder, with their rows of replay, for
    `cerl fork`; all others are deleted once there are two newer ones"""
    keep_every: int = Field(default=0, ge=0)
    """agent steps of one seed from one such checkpoint to the next; 0: only those of log.keep"""
    save_replay: bool = True
    """checkpoints include the replay buffer (in RUN/replay; new rows are written while training
    goes on). Without it a resumed run has to refill its replay first"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.track)) < len(self.track):
            raise ValueError(f"log.track: expected different names, got {' '.join(self.track)}")
        return self


class OriginConfig(Model):
    """The run that this one was forked from. `cerl fork` sets these options, and nobody else."""

    run: str = ""
    """name of the folder of that run"""
    forked_at: int = Field(default=0, ge=0)
    """agent steps of one seed that it had done; 0: this run is no fork"""
    members: Ints = ()
    """for each member of this run, the member of that run that it began as; empty: the one of the
    same number, or copies of the only one"""
    options: str = ""
    """the hash of that run's options, as in its result rows (config_hash)"""
    checkpoint: str = ""
    """SHA-256 of the checkpoint that this run began with"""


class Config(Model):
    """One run: a population of seeds x members on one environment."""

    preset: str = ""
    """name of the preset that this run started from; it is written to every result row"""
    seeds: Ints = (0,)
    """seeds trained side by side in this process; all different. 0..4 are the seeds 0 to 4"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is one"""
    threads: int = Field(default=1, ge=0)
    """CPU threads of tensor arithmetic (small networks are fastest with 1), at most 64 or 4 per
    core; 0: one per core"""
    precision: Literal["tf32", "fp32", "bf16"] = "tf32"
    """precision of matrix products on a GPU; everything else is float32"""
    compile: bool = False
    """compiles acting and the update with torch.compile (takes about a minute at the start; no
    effect on a CPU)"""
    out: str = "runs"
    """folder in which the run folder is made"""
    diverged: Literal["freeze", "cut", "error"] = "freeze"
    """what to do with a seed whose losses, parameters or optimiser moments are not finite. freeze:
    train it no further and mark its later result rows; cut: train it no further and write no later
    rows; error: stop the run"""
    env: EnvConfig = CatchEnv()
    """family of tasks"""
    agent: AgentConfig = DqnConfig()
    """dqn: values are expected returns; quantile: values are distributions; sac: soft actor-critic,
    for continuous actions"""
    encoder: EncoderConfig = FramesConfig()
    """frames: a stack of the last observations; the others are sequence networks, which read
    windows of rows: mlp (no memory), gru, transformer (softmax attention), fox (forgetting
    attention)"""
    net: NetConfig = NetConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = AdamConfig()
    """adam, or rmsprop: centred RMSProp with epsilon inside the square root"""
    replay: ReplayConfig = ReplayConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    explore: ExploreConfig = ExploreConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    origin: OriginConfig = OriginConfig()

    @property
    def kinds(self) -> dict[str, str]:
        """The chosen kind of every section that is a union, e.g. {"agent": "dqn", ...}."""
        return {
            "env": self.env.family,
            "agent": self.agent.name,
            "encoder": self.encoder.name,
            "optim": self.optim.name,
            "replay.sampler": self.replay.sampler.name,
        }

    @property
    def epsilon_schedule(self) -> ExploreConfig:
        """`explore`, with `end` computed from the longest episode if it is None."""
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
        """R, the number of rows that one layer of the encoder looks back on, its own row included:
        encoder.cache, or a whole window."""
        own = self.encoder.cache if isinstance(self.encoder, AttentionOptions) else 0
        return own or self.rows_of_window.total

    @property
    def rows_of_refresh(self) -> int:
        """Rows of replay that a refresh of the carry reads. Each of L layers looks back on R rows
        of the layer below, and one more row holds the action and reward before the first."""
        layers = self.encoder.layers if isinstance(self.encoder, SequenceOptions) else 1
        return layers * self.rows_looked_back_on + 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """One sentence for each problem with the options that are in no section."""
        yield from filter(None, (unreadable(key, getattr(self, key)) for key in ("preset", "out")))
        if self.preset.startswith((".", "-")):
            yield f"preset: expected a name that begins with a letter or digit, got {self.preset!r}"
        if not self.out:
            yield "out: expected the name of a folder, got an empty one; `.` is the current one"
        if not self.seeds:
            yield "seeds: expected at least one seed, got none; e.g. --seeds 0 1 2"
        for seed in sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            yield (
                f"seeds: {seed} is given {self.seeds.count(seed)} times; expected different seeds, "
                "since equal ones would train exactly alike"
            )
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                yield f"seeds: expected whole numbers from 0 to 2**63 - 1, got {seed}"
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            yield f"device: expected auto, cpu, cuda or cuda:NUMBER, got {self.device!r}"
