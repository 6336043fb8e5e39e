"""What an agent is to the rest: networks, acting, and the stages of one update.

The Learner, the Collector and the Evaluator know an agent only by this protocol; what a value or an
action is stays behind it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from cerl.config import OptimConfig
from cerl.data import ActInput, Carry, Window
from cerl.explore import Noise
from cerl.heads import HeadTable
from cerl.nets.reader import Reader

Metrics = dict[str, Tensor]  # {name: [S, N]}, detached


class Network(Protocol):
    """What everyone may ask of an agent's network; its parameters lead with [S, N] or [S, 1].

    Learning asks for rows of windows through the `look` of the network, or of its parts where each
    sees by itself (`cerl.nets.reader.Reader`).
    """

    @property
    def reader(self) -> Reader:
        """Says how many rows a window needs, and which of them are learnt."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def carry(self, *, envs: int, evaluating: bool) -> Carry:
        """What acting remembers before the first row, on the network's device."""
        ...

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> list[Tensor]:
        """Features of one new row, one of every part that acts; carry moves on in place.

        Returns: [S, 1, E, ...] of the members that act, or [S, N, E, ...] of all members.
        """
        ...

    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Recomputes a carry in place from rows acted on, with the parameters of now.

        Args: window [S, 1, E, W]; carry, or () to compute and write nothing; member [S, E].
        """
        ...


# An agent's network; the part of it that target networks copy; what it draws for an update.
Net = TypeVar("Net", bound=Network)
Followed = TypeVar("Followed", bound=nn.Module)
Drawn = TypeVar("Drawn")
# The same for what only takes them.
_Net = TypeVar("_Net", bound=Network, contravariant=True)
_Followed = TypeVar("_Followed", bound=nn.Module, contravariant=True)
_Drawn = TypeVar("_Drawn", contravariant=True)


class Decision(NamedTuple):
    """What acting returns."""

    action: Tensor  # [S, E] int64, or [S, E, A] float32 in [-1, 1]
    value: Tensor  # [S, E] what the acting member expects: its largest Q, or Q of its action
    bonus: Tensor  # [S, E] reward that the value counts beside the environment's, from then on
    diversity: Tensor  # [S, E] how much the members differ; 0 while training


class Group(NamedTuple):
    """Parameters that one optimiser moves."""

    leaves: list[nn.Parameter]
    optim: OptimConfig


class Losses(NamedTuple):
    """What the loss of a stage gives."""

    members: Tensor  # [S, N], which the optimisers minimise
    metrics: Metrics
    # [S, M, B] |temporal-difference error| of the first learnt row of every window, detached, for
    # samplers that want them (`cerl.returns.row_errors`); None: not asked for, or not of this stage
    errors: Tensor | None = None


class StageLoss(Protocol[_Net, _Followed, _Drawn]):
    """The loss of a stage, for one batch."""

    def __call__(
        self,
        net: _Net,
        target: _Followed,
        window: Window,
        *,
        mask: Tensor | None,
        dice: _Drawn,
        prepared: Any,
    ) -> Losses:
        """Loss of every member, metrics, errors of rows.

        Args:    mask [S, N, B] or [S, N, B, T] float32, rows that a member learns from, None: all;
                 dice of `Agent.dice`; prepared, what the stage's `prepare` gave, None: the loss
                 computes it itself.
        """
        ...


class Stage(NamedTuple, Generic[Net, Followed, Drawn]):
    """One gradient step of an update; each stage sees what the stages before it left.

    `prepare` may compute a part of the loss that depends on no parameter which an earlier stage
    moves. A GPU then runs it beside the optimisers of the stage before.
    """

    loss: StageLoss[Net, Followed, Drawn]
    groups: list[Group]
    prepare: Callable[[Net, Window, Drawn], Any] | None = None


class Agent(Protocol[Net, Followed, Drawn]):
    """The maths; stateless, since what changes lives in networks and the callers' counters."""

    @property
    def table(self) -> HeadTable:
        """What every value head regresses to; acting reports values of head 0, the member's own."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names that the stages' losses give together."""
        ...

    def build(self, *, keys: Tensor) -> Net:
        """A freshly initialised network for the seeds of `keys` [S]."""
        ...

    def followed(self, net: Net) -> Followed:
        """The part of a network that the target network is a copy of."""
        ...

    def stages(self, net: Net) -> list[Stage[Net, Followed, Drawn]]:
        """The gradient steps of an update, in order."""
        ...

    def dice(self, keys: Tensor, step: Tensor) -> Drawn:
        """Random numbers of update `step` (int64 []), the same for all of its stages."""
        ...

    def act(
        self,
        net: Net,
        seen: ActInput,
        carry: Carry,
        *,
        noise: Noise,
        evaluating: Sequence[str] | None = None,
    ) -> Decision:
        """Actions of the members named in `seen`.

        Args: carry, brought up to date in place; evaluating, names of the aggregates that
              `seen.member` counts from N on; None while training.
        """
        ...

    def judge(self, net: Net, seen: ActInput, carry: Carry) -> Tensor:
        """Values [S, E, K] that the acting members expect in the next row; moves the carry on."""
        ...

    def activations(self, net: Net, window: Window) -> list[Tensor]:
        """Outputs of the value network's hidden layers [S, N or 1, rows, ..., units], in order."""
        ...

    def measures(self, net: Net, window: Window, dice: Drawn) -> Metrics:
        """Diagnostics of one batch that only this kind of agent has, {name: [S, N]}."""
        ...
