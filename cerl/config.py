"""Every option of cerl, with its unit: one frozen, strict tree of models.

A run is one `Config`. Presets (`configs/**.yaml`) state only differences from their `base:`; the command
line overrides single keys. "Agent steps" are action selections of one seed (loop iterations x E),
whatever the number of environments and seeds; a frame is one emulator frame.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Ints = Annotated[tuple[int, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class CatchEnv(Model):
    """Catch: a ball falls, a paddle of one cell has to be under it (device-resident, ours)."""

    family: Literal["catch"] = "catch"
    name: Literal["catch"] = "catch"
    envs: int = Field(1, ge=1)
    """E, environments per seed"""
    rows: int = Field(10, ge=2)
    """height of the board, cells; an episode takes rows - 1 agent steps"""
    columns: int = Field(5, ge=2)
    """width of the board, cells"""
    sticky: float = Field(0.0, ge=0, lt=1)
    """probability that the last action is repeated"""


class MinAtarEnv(Model):
    """MinAtar (Young and Tian 2019), device-resident, ours."""

    family: Literal["minatar"] = "minatar"
    name: Literal["asterix", "breakout", "freeway", "seaquest", "space_invaders"] = "breakout"
    envs: int = Field(8, ge=1)
    """E, environments per seed"""
    sticky: float = Field(0.1, ge=0, lt=1)
    """probability that the last action is repeated"""
    ramping: bool = True
    """difficulty rises with time in asterix, seaquest and space_invaders"""
    full_actions: bool = False
    """all six actions instead of the game's minimal set"""
    time_limit: int = Field(0, ge=0)
    """agent steps after which an episode is truncated; 0: never"""


class AtariEnv(Model):
    """Atari 2600 by EnvPool or by ale-py's own vector environment; one 84x84 frame a step."""

    family: Literal["atari"] = "atari"
    name: str = "Pong"
    """game in camel case, e.g. Pong or SpaceInvaders"""
    envs: int = Field(1, ge=1)
    """E, environments per seed"""
    backend: Literal["envpool", "ale"] = "envpool"
    sticky: float = Field(0.0, ge=0, lt=1)
    """probability that the emulator repeats the last action (Machado et al. 2018: 0.25)"""
    full_actions: bool = False
    """all 18 actions instead of the game's minimal set"""
    frame_skip: int = Field(4, ge=1)
    """emulator frames of one agent step; the last two are max-pooled"""
    noop_max: int = Field(0, ge=0)
    """at most this many no-op frames at the start of an episode, a random number; 0: none"""
    fire_reset: bool = False
    """press FIRE at the start of an episode where the game has it"""
    life_loss: bool = False
    """a lost life ends the agent's episode (terminal), the game plays on"""
    time_limit: int = Field(27_000, ge=1)
    """agent steps after which an episode is truncated"""
    threads: int = Field(0, ge=0)
    """emulator threads; 0: one for each core, at most S x E"""


class GymEnv(Model):
    """Any registered gymnasium id with discrete actions."""

    family: Literal["gym"] = "gym"
    name: str = "CartPole-v1"
    """registered id, e.g. CartPole-v1; module:Id imports the module first"""
    envs: int = Field(1, ge=1)
    """E, environments per seed"""
    time_limit: int = Field(0, ge=0)
    """agent steps after which an episode is truncated; 0: the id's own limit"""


EnvConfig = Annotated[CatchEnv | MinAtarEnv | AtariEnv | GymEnv, Field(discriminator="family")]


class NetConfig(Model):
    """Network of one member: convolutions, hidden layers, output."""

    channels: Ints = ()
    """filters of each convolution; empty: no convolution, observations are flattened"""
    kernels: Ints = ()
    """kernel size of each convolution, cells"""
    strides: Ints = ()
    """stride of each convolution, cells"""
    padding: Literal["valid", "same"] = "valid"
    hidden: Ints = (64, 64)
    """width of each hidden layer; the last one is the paper's penultimate layer"""
    stack: int = Field(1, ge=1)
    """frames per observation, built from replay; frames before an episode's start are zero"""
    scale: float = Field(1.0, gt=0)
    """observations are divided by this inside the network"""
    init: Literal["fan_in", "xavier", "variance"] = "fan_in"
    """fan_in: U(+-1/sqrt(fan_in)), weights and biases; xavier: uniform, biases 0; variance: U(+-sqrt(sqrt(3)/fan_in)), biases 0"""
    shared_bias: bool = False
    """one scalar output bias for all actions (the original's)"""
    feature_norm: bool = False
    """divides the penultimate features by their L2 norm + 1e-6"""


class EnsembleConfig(Model):
    """Who learns what from whom."""

    members: int = Field(1, ge=1)
    """N, ensemble members of a seed"""
    shared_layers: int = Field(0, ge=0)
    """L, leading layers shared by all members (convolutions, hidden layers, output, in this order)"""
    heads: Literal["own", "cerl", "own_target", "single_actor", "multi_horizon"] = "own"
    """what the value heads of a member regress to (cerl/heads.py)"""
    fork: Literal["final", "both"] = "final"
    """where heads fork: only the output layer, or the last hidden layer and the output layer"""
    horizons: int = Field(10, ge=1)
    """heads of a member under multi_horizon"""
    duty: Literal["uniform", "tandem", "first"] = "uniform"
    """who acts: a member drawn uniformly, member 0 with active_probability (else member 1), always member 0"""
    active_probability: float = Field(0.9, ge=0, le=1)
    """tandem: share of episodes in which member 0 acts"""
    switch: Literal["episode", "step"] = "episode"
    """when the member on duty is drawn anew"""
    gradient_scale: bool = True
    """gradients scaled by 1/N below the last shared layer and 1/J below the fork of the heads"""


class LossConfig(Model):
    gamma: float = Field(0.99, ge=0, le=1)
    """discount of one agent step"""
    n_step: int = Field(1, ge=1)
    """rewards summed before bootstrapping, agent steps"""
    double: bool = True
    """the online network chooses the next action, the target network values it"""
    kind: Literal["huber", "mse"] = "huber"
    huber_delta: float = Field(1.0, gt=0)
    """where Huber turns from square to linear; for quantiles the paper's kappa"""
    quantiles: int = Field(200, ge=1)
    """quantiles of a value distribution (agent: quantile)"""
    mico_weight: float = Field(0.0, ge=0, le=1)
    """loss = (1 - w) TD + w MICo metric loss"""
    mico_beta: float = Field(0.1, ge=0)
    """weight of the angle in the MICo distance"""
    batches: Literal["shared", "independent", "own", "disjoint"] = "shared"
    """shared: one batch for all members; independent: one each, all data; own: one each, of the data that the
    member generated; disjoint: one each, every row belonging to one member at random"""
    batches_probability: float = Field(1.0, ge=0, le=1)
    """share of updates that use `batches`; the others use one shared batch"""
    mask_probability: float = Field(1.0, gt=0, le=1)
    """bootstrap mask: probability that a member learns from a row"""


class OptimConfig(Model):
    name: Literal["rmsprop", "adam"] = "adam"
    """rmsprop is centred, with epsilon inside the root"""
    lr: float = Field(2.5e-4, gt=0)
    eps: float = Field(1e-8, gt=0)
    decay: float = Field(0.95, ge=0, lt=1)
    """rmsprop: decay of both moments"""
    momentum: float = Field(0.0, ge=0, lt=1)
    """rmsprop: momentum of the scaled step"""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    clip_norm: float = Field(0.0, ge=0)
    """each member's gradient is scaled down to this L2 norm; 0: no clipping"""


class ReplayConfig(Model):
    capacity: int = Field(100_000, ge=2)
    """rows per seed, reset rows included"""
    batch: int = Field(32, ge=1)
    """B, rows of a batch"""
    start: int = Field(5_000, ge=1)
    """agent steps of one seed before the first update"""
    placement: Literal["device", "host"] = "device"
    """where rows live; host: pinned memory, slower"""
    candidates: int = Field(8, ge=1)
    """rows drawn for each slot of a batch, of which the first valid one is taken"""


class ScheduleConfig(Model):
    steps: int = Field(100_000, ge=1)
    """length of the run, agent steps of one seed"""
    update_every: int = Field(4, ge=1)
    """agent steps of one seed per update"""
    target_every: int = Field(1_000, ge=1)
    """agent steps of one seed between copies to the target network"""


class ExploreConfig(Model):
    start: float = Field(1.0, ge=0, le=1)
    """epsilon until `hold` agent steps"""
    end: float = Field(0.01, ge=0, le=1)
    """epsilon after the decay"""
    hold: int = Field(5_000, ge=0)
    """agent steps before the decay begins"""
    decay: int = Field(100_000, ge=1)
    """agent steps of the linear decay"""


class EvalConfig(Model):
    every: int = Field(50_000, ge=1)
    """agent steps of one seed between evaluations (the last one comes at the end of the run)"""
    episodes: int = Field(10, ge=1)
    """episodes of each member, and of each aggregate policy, per evaluation and seed"""
    epsilon: float = Field(0.01, ge=0, le=1)
    """share of random actions"""
    policies: Names = ("individual", "vote")
    """any of individual (every member), vote, mean (of Q), random (a member drawn per episode)"""
    steps: int = Field(0, ge=0)
    """0: a fixed number of episodes; else the original's budget: whole episodes until this many agent steps"""
    time_limit: int = Field(27_000, ge=1)
    """agent steps after which an evaluation episode is cut and counted"""


class LogConfig(Model):
    every: int = Field(5_000, ge=1)
    """agent steps of one seed between lines of training metrics"""
    checkpoint_every: int = Field(250_000, ge=1)
    """agent steps of one seed between checkpoints (one is also saved at the end and on Ctrl-C)"""
    save_replay: bool = True
    """checkpoints hold the replay buffer; without it a resumed run refills it first"""


class Config(Model):
    """One run: a population of seeds x members on one environment."""

    preset: str = ""
    """name of the preset that this run started from; goes into every result row"""
    agent: Literal["dqn", "quantile"] = "dqn"
    seeds: Ints = (0,)
    """seeds trained side by side in this process; all different"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    precision: Literal["tf32", "fp32", "bf16"] = "tf32"
    """of matrix products on a GPU; everything else is float32"""
    compile: bool = False
    """fuses the update with torch.compile (GPU; about a minute at start)"""
    out: str = "runs"
    """folder that receives the run folder"""
    env: EnvConfig = CatchEnv()
    net: NetConfig = NetConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    replay: ReplayConfig = ReplayConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    explore: ExploreConfig = ExploreConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
