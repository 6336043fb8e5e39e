"""The protocols of an agent: its network, how it acts, and the gradient steps of one update.

The Learner, the Collector and the Evaluator use an agent only through these protocols, so they need
not know whether it is a DQN, a quantile DQN or a SAC agent.
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
    """The network of an agent; its parameters lead with [S, N], or with [S, 1] if shared.

    While learning, the agent's loss computes the features of a window's rows by calling `look` of
    the network, or of each of its parts that has an encoder of its own (SAC's actor and critics).
    `cerl.nets.reader.Reader` describes that method.
    """

    @property
    def reader(self) -> Reader:
        """Says how many rows a window needs, and which of them get a loss (the learnt rows)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def carry(self, *, envs: int, evaluating: bool) -> Carry:
        """The carry (memory of past rows while acting) before the first row, on the network's
        device.

        Args: envs, E; evaluating, whether it is for an evaluation, in which every member keeps a
              carry. In training one for the member on duty is enough where members share no layer
              of the sequence network.
        """
        ...

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> list[Tensor]:
        """Features of one new row; updates the carry in place.

        Returns: a tensor for each part of the network that acts, [S, 1, E, ...] of the members that
                 act, or [S, N, E, ...] of all members.
        """
        ...

    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Recomputes a carry in place from past rows, with the current parameters.

        Args: window [S, 1, E, W], the newest rows of replay; carry, or () to compute and write
              nothing; member [S, E], who acts.
        """
        ...


# Net: an agent's network. Followed: the part of it that has a target network. Drawn: the random
# numbers that the agent draws for an update.
Net = TypeVar("Net", bound=Network)
Followed = TypeVar("Followed", bound=nn.Module)
Drawn = TypeVar("Drawn")
# A protocol that only takes such values as arguments needs contravariant type variables.
_Net = TypeVar("_Net", bound=Network, contravariant=True)
_Followed = TypeVar("_Followed", bound=nn.Module, contravariant=True)
_Drawn = TypeVar("_Drawn", contravariant=True)


class Decision(NamedTuple):
    """What acting returns."""

    action: Tensor  # [S, E] int64, or [S, E, A] float32 in [-1, 1]
    # [S, E] return that the acting member expects: its largest Q, or Q of its action; undefined
    # where an aggregate acts
    value: Tensor
    bonus: Tensor  # [S, E] reward beside the environment's that values include (SAC's entropy)
    diversity: Tensor  # [S, E] how much the members' actions differ; 0 while training


class Group(NamedTuple):
    """Parameters that one optimiser updates."""

    leaves: list[nn.Parameter]
    optim: OptimConfig
    name: str = ""  # what the parameters belong to, in names of metrics; "": the values


class Losses(NamedTuple):
    """The result of the loss of a stage."""

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

        Args:    mask [S, N, B] or [S, N, B, T] float32, 1 for rows that a member learns from, None:
                 all rows; dice, random numbers from `Agent.dice`; prepared, the result of the
                 stage's `prepare`, None: the loss calls `prepare` itself.
        """
        ...


class Stage(NamedTuple, Generic[Net, Followed, Drawn]):
    """One gradient step of an update, e.g. that of SAC's critics, or that of its policies.

    Stages run in order, and each loss uses the parameters that the stage before has updated.
    `prepare` computes a part of the loss that depends on no parameter of an earlier stage, so a GPU
    can run it at the same time as the optimiser step of the stage before.
    """

    loss: StageLoss[Net, Followed, Drawn]
    groups: list[Group]
    prepare: Callable[[Net, Window, Drawn], Any] | None = None


class Agent(Protocol[Net, Followed, Drawn]):
    """The maths of an algorithm.

    An agent has no state that changes: parameters live in the network, counters in the caller.
    """

    @property
    def table(self) -> HeadTable:
        """The regression target of every value head; acting uses head 0, the member's own."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that the losses of the stages return."""
        ...

    def build(self, *, keys: Tensor) -> Net:
        """A freshly initialised network. Args: keys [S] int64, random keys of the seeds."""
        ...

    def followed(self, net: Net) -> Followed:
        """The part of a network that has a target network."""
        ...

    def stages(self, net: Net) -> list[Stage[Net, Followed, Drawn]]:
        """The gradient steps of an update, in order."""
        ...

    def dice(self, keys: Tensor, step: Tensor) -> Drawn:
        """Random numbers for one update, shared by all of its stages.

        Args: keys [S] int64, random keys of the seeds; step int64 [], the number of the update.
        """
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
        """Actions of the members that `seen.member` names.

        Args: carry, updated in place; evaluating, names of the aggregate policies: a member number
              N + k means the k-th of them; None while training.
        """
        ...

    def judge(self, net: Net, seen: ActInput, carry: Carry) -> Tensor:
        """Values that the acting members predict for what they see; updates the carry in place.

        Returns: [S, E, K], the values of K = A discrete actions, or that of the policy's mode.
        """
        ...

    def activations(self, net: Net, window: Window) -> list[Tensor]:
        """Outputs of the value network's hidden layers [S, N or 1, rows, ..., units], in order."""
        ...

    def measures(self, net: Net, target: Followed, window: Window, dice: Drawn) -> Metrics:
        """Diagnostics of one batch, which all members look at.

        Args:    window [S, 1, B, W].
        Returns: {name: [S, N], or [S] if it is one number for all members}.
        """
        ...
