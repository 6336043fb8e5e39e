"""Every option of cerl, with its unit: one frozen, strict tree of models.

A run is one `Config`. Presets (`configs/**.yaml`) state only differences from their `base:`; the
command line overrides single keys. "Agent steps" are action selections of one seed (loop iterations
x E), whatever the number of environments and seeds; a frame is one emulator frame.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cerl.config import contradictions
from cerl.config.envs import CatchEnv, EnvConfig, Ints, MemoryEnv, Model, PopgymEnv

Policy = Literal["individual", "individual_mode", "vote", "mean", "mean_mode", "random"]
Policies = Annotated[tuple[Policy, ...], Field(strict=False)]
Scales = Annotated[tuple[float, ...], Field(strict=False)]


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
        problems = list(contradictions.contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
