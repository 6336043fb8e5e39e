"""What an agent is to the rest: networks, acting, and the stages of one update.

The Learner, the Collector and the Evaluator know an agent only by this protocol; what a value or an
action is stays behind it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from cerl.config import OptimConfig
from cerl.data import ActInput, Carry, Window
from cerl.explore import Noise
from cerl.heads import HeadTable

Metrics = dict[str, Tensor]  # {name: [S, N]}, detached


class Decision(NamedTuple):
    """What acting returns."""

    action: Tensor  # [S, E] int64, or [S, E, A] float32 in [-1, 1]
    value: Tensor  # [S, E] what the member on duty expects: its largest Q, or Q of its action
    bonus: Tensor  # [S, E] reward that the value counts beside the environment's, from then on
    diversity: Tensor  # [S, E] how much the members differ; 0 while training


class Group(NamedTuple):
    """Parameters that one optimiser moves."""

    leaves: list[nn.Parameter]
    optim: OptimConfig


class Stage(NamedTuple):
    """One gradient step of an update; each stage sees what the stages before it left.

    `loss(net, target, window, mask, dice)` gives the loss [S, N] and metrics. A stage may have an
    `early(net, window, dice)`, of parameters that no stage before it moves, which a GPU runs beside
    their optimisers: the loss then takes the result as `early`, or else computes it itself.
    """

    loss: Callable[..., tuple[Tensor, Metrics]]
    groups: list[Group]
    early: Callable[[Any, Window, Any], Any] | None = None


class Agent(Protocol):
    """Stateless: everything that changes lives in the network and in the counters of the callers.

    A network is a module with an `encoder` (`cerl/nets/frames.py`, `cerl/nets/tokens.py`) and the
    `trunks` that act (`cerl/nets/carry.py`).
    """

    @property
    def table(self) -> HeadTable:
        """What every value head regresses to."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names that the stages' losses give together."""
        ...

    def build(self, *, keys: Tensor) -> Any:
        """A freshly initialised network for the seeds of `keys` [S]."""
        ...

    def followed(self, net: Any) -> nn.Module:
        """The part of a network that the target network is a copy of."""
        ...

    def stages(self, net: Any) -> list[Stage]:
        """The gradient steps of an update, in order."""
        ...

    def dice(self, keys: Tensor, step: Tensor) -> Any:
        """Random numbers of update `step` (int64 []), the same for all of its stages."""
        ...

    def act(
        self,
        net: Any,
        seen: ActInput,
        carry: Carry,
        *,
        noise: Noise,
        evaluating: Sequence[str] | None = None,
    ) -> Decision:
        """Actions of the members on duty.

        Args: carry, moves on in place; evaluating, names of the aggregates that may act (None
              while training).
        """
        ...

    def judge(self, net: Any, seen: ActInput, carry: Carry) -> Tensor:
        """Values [S, E, K] that the members on duty expect in the next row; moves the carry on."""
        ...

    def activations(self, net: Any, window: Window) -> list[Tensor]:
        """Outputs of the value network's hidden layers [S, N or 1, rows, ..., units], in order."""
        ...

    def measures(self, net: Any, window: Window, dice: Any) -> Metrics:
        """Diagnostics of one batch that only this kind of agent has, {name: [S, N]}."""
        ...
