"""The encoders of cerl and their options: one model a kind, a union by `name`.

An encoder makes features of what an environment showed: of the last frames, or of a window of rows
that a sequence network reads in order. It answers what the rest of a run asks of it: which rows of
a window it needs, what replay keeps for it, how long it can do with what acting remembers.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from cerl.config.model import Model

Scales = Annotated[tuple[float, ...], Field(strict=False)]

# Learnt rows of a window that nobody asked for by number, at most.
MOST_ROWS = 4096
HEAD_STEP, WIDEST_HEAD = 8, 128  # a head of attention is 8, 16, ... 128 features wide
TWIN_HEAD = 32  # features of a head of the fox block that networks without heads are sized like


class WindowRows(NamedTuple):
    """How the rows of a window are used, from the first to the last; their sum is W."""

    context: int  # rows before the learnt ones, without loss
    learnt: int  # T, rows that a loss is computed for
    ahead: int  # n, rows after the learnt ones, for their n-step returns

    @property
    def total(self) -> int:
        """W, rows of a window."""
        return sum(self)


class EncoderOptions(Model):
    """What can be asked of every encoder."""

    name: Any  # one word, a type of its own in every kind
    """kind of the encoder"""

    @property
    def from_episode_start(self) -> bool:
        """Whether the learnt rows of a window begin with an episode."""
        return False

    @property
    def state_size(self) -> int:
        """Numbers of a recurrent state that replay keeps beside a row."""
        return 0

    @property
    def updates_between_refreshes(self) -> int:
        """Updates between recomputations of what acting remembers; 0: it is never recomputed."""
        return 0


class FramesConfig(EncoderOptions):
    """The last frames side by side, and nothing of what came before them."""

    name: Literal["frames"] = "frames"
    """a stack of the last observations"""
    frames: int = Field(default=1, ge=1)
    """frames of a stack, built from replay; frames before an episode's start are zero"""

    def rows(self, longest: int) -> tuple[int, int]:
        """Rows of a window before the learnt one, and 1, however long episodes are."""
        return self.frames - 1, 1


class SequenceOptions(EncoderOptions):
    """What the encoders have that read windows of rows: a stack of residual blocks."""

    layers: int = Field(default=1, ge=1, le=1000)
    """blocks"""
    width: int = Field(default=64, ge=1)
    """D, features of a row"""
    ratio: float = Field(default=3.5, gt=0)
    """hidden units of the gated perceptron of a fox block, over 2/3 of `width`; other kinds have
    as many units as make their blocks as large"""
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
    sampling: Literal["uniform", "episode_start"] = "uniform"
    """where the learnt rows of a window begin: at any row, or with an episode (then all episodes
    are drawn alike, and each is learnt up to its end)"""

    @property
    def from_episode_start(self) -> bool:
        return self.sampling == "episode_start"

    def rows(self, longest: int) -> tuple[int, int]:
        """Rows of a window before the learnt ones, and learnt ones.

        Args: longest, agent steps of the longest episode; 0: unknown.
        """
        # One more row leads a window, to tell whether the next one begins an episode.
        return 1 + self.context, self.learnt or longest

    @property
    def fox_heads(self) -> int:
        """Heads of the fox block that a block of this network has the size of."""
        return self.width // TWIN_HEAD if self.width % TWIN_HEAD == 0 else 1

    @property
    def fox_variant(self) -> Literal["llama", "pro"]:
        """Variant of the fox block that a block of this network has the size of."""
        return "pro"

    @property
    def context_carries_gradient(self) -> bool:
        """Whether gradients flow into the context rows."""
        return True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """One sentence for every contradiction among the options of the encoder."""
        yield from ()


class TwinOptions(SequenceOptions):
    """What the sequence networks have that are compared with fox at fox's size."""

    sized_like: Literal["llama", "pro"] = "pro"
    """variant of encoder fox whose number of parameters a block has, within a few percent (fox
    with heads of 32 features where this network has none)"""

    @property
    def fox_variant(self) -> Literal["llama", "pro"]:
        return self.sized_like


class RefreshedOptions(SequenceOptions):
    """What the sequence networks have that remember earlier rows while they act."""

    cache_refresh: int = Field(default=0, ge=0)
    """updates between recomputations of what acting remembers, from the last layers x R rows of
    replay (of gru: nothing before them is remembered then); 0: never, it then holds what older
    parameters made of older rows"""

    @property
    def updates_between_refreshes(self) -> int:
        return self.cache_refresh


class AttentionOptions(RefreshedOptions):
    """What the sequence networks have that attend to earlier rows."""

    heads: int = Field(default=2, ge=1)
    """H, attention heads; a head is 8, 16, 24, ... 128 features wide"""
    cache: int = Field(default=0, ge=0)
    """R, rows that acting and windows look back on, their own included; 0: a whole window"""
    context_grad: bool = True
    """gradients flow into the context rows, and into the one that leads every window"""

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


class MlpConfig(TwinOptions):
    """A perceptron of every row by itself: the sequence network without memory."""

    name: Literal["mlp"] = "mlp"
    """no memory: a perceptron of every row"""


class GruConfig(TwinOptions, RefreshedOptions):
    """Gated recurrent units (Cho et al. 2014)."""

    name: Literal["gru"] = "gru"
    """gated recurrent units"""
    stored_state: bool = False
    """replay keeps the state that acting was in before every row, and windows begin with it
    (Kapturowski et al. 2019); agents dqn and quantile, with one member or own batches"""

    @property
    def state_size(self) -> int:
        return self.layers * self.width if self.stored_state else 0

    @property
    def context_carries_gradient(self) -> bool:
        """The context only warms the state up."""
        return False


class TransformerConfig(TwinOptions, AttentionOptions):
    """Softmax attention over the rows of an episode."""

    name: Literal["transformer"] = "transformer"
    """softmax attention"""


class FoxConfig(AttentionOptions):
    """The forgetting transformer (Lin et al. 2025), its attention pruned if asked."""

    name: Literal["fox"] = "fox"
    """forgetting attention"""
    variant: Literal["llama", "pro"] = "pro"
    """plain blocks, or with QK-norm, shifted keys and values, output norm and output gate"""
    gate_scales: Scales = ()
    """shortest and longest time scale of the forget gates at the start, agent steps, spread over
    the heads; empty: gates of 1/2, which forget in a step or two"""
    prune: float = Field(default=0.0, le=0)
    """log of the share of a softmax that may be left out (the paper: -10); 0: nothing is"""

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


EncoderConfig = Annotated[
    FramesConfig | MlpConfig | GruConfig | TransformerConfig | FoxConfig,
    Field(discriminator="name"),
]
