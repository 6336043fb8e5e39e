"""The options of encoders: one model for each kind of encoder, chosen by `encoder.name`.

An encoder turns observations into features: a stack of the last frames, or a window of rows that a
sequence network reads in order. Its model also tells the rest of the config how many rows a window
needs, whether replay stores recurrent states, and how often the carry is refreshed.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from cerl.config.model import Model

Scales = Annotated[tuple[float, ...], Field(strict=False)]

# Most learnt rows of a window if encoder.learnt is 0, i.e. if no number was asked for.
MOST_ROWS = 4096
HEAD_STEP, WIDEST_HEAD = 8, 128  # an attention head is 8, 16, ... 128 features wide
# Networks without attention heads (mlp, gru) are made as large as a fox block, see `SizedOptions`.
# The heads of that fox block have this many features.
FOX_HEAD = 32


class WindowRows(NamedTuple):
    """How the rows of a window are used, from the first to the last; their sum is W."""

    context: int  # rows before the learnt ones, which get no loss
    learnt: int  # T, learnt rows: a loss is computed for each of them
    ahead: int  # n, rows after the learnt ones, which n-step returns need

    @property
    def total(self) -> int:
        """W, rows of a window."""
        return sum(self)


class EncoderOptions(Model):
    """What every encoder has."""

    name: Any  # every kind narrows it to a Literal of one word
    """kind of the encoder"""

    @property
    def from_episode_start(self) -> bool:
        """Whether the first learnt row of every window is the first row of an episode."""
        return False

    @property
    def state_size(self) -> int:
        """Length of the recurrent state that replay stores with every row; 0: none."""
        return 0

    @property
    def updates_between_refreshes(self) -> int:
        """Updates between refreshes of the carry; 0: it is never refreshed."""
        return 0


class FramesConfig(EncoderOptions):
    """A stack of the last frames; earlier ones are not seen."""

    name: Literal["frames"] = "frames"
    """a stack of the last observations"""
    frames: int = Field(default=1, ge=1)
    """observations in a stack; those before the start of the episode are zero"""

    def rows(self, longest: int) -> tuple[int, int]:
        """Number of context rows of a window, and of learnt rows, which is always 1."""
        return self.frames - 1, 1


class SequenceOptions(EncoderOptions):
    """Options of sequence networks: stacks of residual blocks that read windows row by row."""

    layers: int = Field(default=1, ge=1, le=1000)
    """number of residual blocks"""
    width: int = Field(default=64, ge=1)
    """D, features of a row"""
    ratio: float = Field(default=3.5, gt=0)
    """MLP ratio: the gated MLP of a fox block has 2/3 x ratio x width hidden units (2/3 since it is
    gated, as in LLaMA). MLPs of the other kinds get as many units as make a block as large as a fox
    block"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the matrix products inside the blocks"""
    previous_action: bool = True
    """a row's input includes the action before it (0 where an episode starts)"""
    previous_reward: bool = True
    """a row's input includes the reward before it, as replay stores it"""
    context: int = Field(default=0, ge=0)
    """context rows: rows before the learnt ones, which are read but get no loss"""
    learnt: int = Field(default=0, ge=0)
    """T, learnt rows of a window, i.e. rows that get a loss; 0: as many as the longest episode of
    env (only families whose episodes have a limit)"""
    sampling: Literal["uniform", "episode_start"] = "uniform"
    """where the learnt rows of a window begin. uniform: at any row; episode_start: at the first row
    of an episode (then every episode is equally likely, and rows after its end get no loss)"""

    @property
    def from_episode_start(self) -> bool:
        return self.sampling == "episode_start"

    def rows(self, longest: int) -> tuple[int, int]:
        """Number of rows of a window before the learnt ones, and number of learnt rows.

        Args: longest, agent steps of the longest episode; 0: unknown.
        """
        # One more row at the front of a window tells whether the row after it starts an episode.
        return 1 + self.context, self.learnt or longest

    @property
    def fox_heads(self) -> int:
        """Number of heads of the fox block whose number of parameters this network's block has."""
        return self.width // FOX_HEAD if self.width % FOX_HEAD == 0 else 1

    @property
    def fox_variant(self) -> Literal["llama", "pro"]:
        """Variant of the fox block whose number of parameters this network's block has."""
        return "pro"

    @property
    def context_carries_gradient(self) -> bool:
        """Whether gradients of the loss flow into the context rows."""
        return True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """One sentence for every contradiction among the options of the encoder."""
        yield from ()


class SizedOptions(SequenceOptions):
    """Options of the sequence networks that fox is compared with; they have the size of fox."""

    sized_like: Literal["llama", "pro"] = "pro"
    """variant of encoder fox: a block has as many parameters as a block of it, within a few percent
    (kinds without attention heads: as a fox block whose heads have 32 features)"""

    @property
    def fox_variant(self) -> Literal["llama", "pro"]:
        return self.sized_like


class RefreshedOptions(SequenceOptions):
    """Options of the sequence networks that keep a memory of earlier rows while they act."""

    cache_refresh: int = Field(default=0, ge=0)
    """updates between refreshes of that memory: it is recomputed with the current parameters from
    the last layers x R rows of replay (a gru then forgets all rows before them); 0: never, so it
    keeps what older parameters computed"""

    @property
    def updates_between_refreshes(self) -> int:
        return self.cache_refresh


class AttentionOptions(RefreshedOptions):
    """Options of the sequence networks with attention."""

    heads: int = Field(default=2, ge=1)
    """H, attention heads; a head is 8, 16, 24, ... 128 features wide"""
    cache: int = Field(default=0, ge=0)
    """R, rows that a row attends to in acting and learning, its own included; 0: a whole window"""
    context_grad: bool = True
    """gradients of the loss flow into the context rows and into the first row of a window"""

    @property
    def fox_heads(self) -> int:
        return self.heads

    @property
    def context_carries_gradient(self) -> bool:
        return self.context_grad

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        head, rest = divmod(self.width, self.heads)
        if rest:
            yield (
                f"encoder.width: expected a multiple of encoder.heads ({self.heads}), "
                f"got {self.width}"
            )
        elif head % HEAD_STEP or head > WIDEST_HEAD:
            yield (
                "encoder.heads: a head is 8, 16, 24, ... 128 features wide; expected width "
                f"{self.width} over heads to be one of these, got {head} with {self.heads} heads"
            )


class MlpConfig(SizedOptions):
    """The sequence network without memory: an MLP that sees one row at a time."""

    name: Literal["mlp"] = "mlp"
    """no memory: an MLP of every row"""


class GruConfig(SizedOptions, RefreshedOptions):
    """Gated recurrent units (Cho et al. 2014)."""

    name: Literal["gru"] = "gru"
    """gated recurrent units"""
    stored_state: bool = False
    """replay stores the recurrent state before every row, and a window starts from it (R2D2,
    Kapturowski et al. 2019); only agents dqn and quantile, with one member or own batches"""

    @property
    def state_size(self) -> int:
        return self.layers * self.width if self.stored_state else 0

    @property
    def context_carries_gradient(self) -> bool:
        """False: context rows only bring the recurrent state up to date."""
        return False


class TransformerConfig(SizedOptions, AttentionOptions):
    """Softmax attention over the rows of an episode."""

    name: Literal["transformer"] = "transformer"
    """softmax attention with rotary positions"""
    attention: Literal["own", "torch"] = "own"
    """how attention is computed. own: by the kernel of encoder fox, with gates of 1 (on a CPU,
    where it does not run, by torch); torch: by torch with a mask"""


PartOfPro = Literal["output_gate", "output_norm", "qk_norm", "kv_shift"]


class FoxConfig(AttentionOptions):
    """The forgetting transformer (Lin et al. 2025), with optional pruning of its attention.

    Parts of it can be left out, for comparisons. The MLPs then get the parameters of these parts,
    so that blocks are as large as whole ones, within a few percent.
    """

    name: Literal["fox"] = "fox"
    """forgetting attention"""
    variant: Literal["llama", "pro"] = "pro"
    """llama: plain blocks; pro: with QK-norm, shifted keys and values, output norm and output
    gate"""
    gate: Literal["data", "bias_only", "fixed", "none"] = "data"
    """forget gates. data: computed from every row; bias_only: a learnt constant of a head; fixed:
    the constant of gate_scales, which is not learnt; none: no gates, i.e. softmax attention"""
    gate_scales: Scales = ()
    """shortest and longest time scale of the forget gates at initialisation, in agent steps; heads
    get scales in between. Empty: gates are 1/2, so a head forgets within a step or two"""
    without: Annotated[tuple[PartOfPro, ...], Field(strict=False)] = ()
    """parts of variant pro that are left out: output_gate, output_norm, qk_norm, kv_shift"""
    rotary: bool = False
    """rotary positions of queries and keys, with or without gates"""
    key_heads: int = Field(default=0, ge=0)
    """heads of keys and values, each read by as many of the heads; 0: as many as heads"""
    prune: float = Field(default=0.0, le=0)
    """natural logarithm of the share of a softmax that may be skipped (the paper: -10); 0: no
    pruning"""
    rule: Literal["static", "running"] = "static"
    """what pruning skips. static: what gates alone have made small enough; running: more, from what
    the softmax of a row sums to over its nearest rows (only in windows of more than 256 rows)"""

    @property
    def fox_variant(self) -> Literal["llama", "pro"]:
        return self.variant

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        scales = self.gate_scales
        if scales and not (len(scales) == 2 and 0 < scales[0] <= scales[1]):
            yield (
                "encoder.gate_scales: expected the shortest and the longest time scale in agent "
                f"steps, e.g. [1, 100], or nothing, got {list(scales)}"
            )
        if self.gate == "fixed" and not scales:
            yield (
                "encoder.gate_scales: missing; encoder.gate fixed takes its gates from them, e.g. "
                "[1, 100] for time scales of 1 to 100 agent steps"
            )
        if self.without and self.variant == "llama":
            yield (
                f"encoder.without: variant llama has no {' or '.join(self.without)} to leave out; "
                "expected nothing, or encoder.variant pro"
            )
        if len(set(self.without)) < len(self.without):
            yield f"encoder.without: expected every part once, got {list(self.without)}"
        if self.key_heads and self.heads % self.key_heads:
            fits = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            yield (
                f"encoder.key_heads: expected a divisor of encoder.heads ({', '.join(fits)}), or 0 "
                f"for as many, got {self.key_heads}"
            )


EncoderConfig = Annotated[
    FramesConfig | MlpConfig | GruConfig | TransformerConfig | FoxConfig,
    Field(discriminator="name"),
]
