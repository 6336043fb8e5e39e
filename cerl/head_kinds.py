"""The kinds of value heads: what every head of every member regresses to, one function each.

A kind gets the next values of a batch and says which of them each head takes, or what it makes of
them. Its name and its line of help are those of the option `ensemble.heads`, so a new kind is a
function and an entry of `HEAD_KINDS`, and nothing else. The options are read without torch, which
is why this file does not import it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Source(NamedTuple):
    """A next value: that of a member's head, at the next action of the same or another member."""

    chooser: Any  # the member whose next action is valued: greedy, or drawn from its policy
    owner: Any  # the member whose head values it
    head: Any = 0  # which of its heads; head 0 is the one that the member acts by


class NextValues(Protocol):
    """The values of the next row of a batch, by all members' heads."""

    members: int  # N
    heads: int  # J, value heads of a member under this kind

    def take(self, source: Callable[[Any, Any], Source]) -> "Tensor":
        """The next values that `source(i, j)` names for head j of member i.

        i and j are tensors of numbers, for all members and heads at once, so `source` may do
        arithmetic with them and has no branch on them. Every call of a kind takes the same values
        in the same order.

        Returns: [S, N, ..., J, *rest]: the axes between are those of the batch, `rest` that of a
                 distribution. Every element is one of the values, without arithmetic.
        """
        ...


class HeadKind(NamedTuple):
    """A kind of value heads."""

    text: str  # its line of help
    # What the heads regress to beside the reward, of the shape that `NextValues.take` returns. Each
    # seed and row has to be treated by itself, and the function must not depend on tensor values.
    target: Callable[[NextValues], "Tensor"]
    # How many heads a member has: one, as many as there are members, or `ensemble.horizons`, of
    # which each has a discount of its own.
    heads: Literal["one", "members", "horizons"] = "members"


def own(values: NextValues) -> "Tensor":
    """Double DQN and SAC: the member chooses, the member values."""
    return values.take(lambda i, j: Source(i, i))


def cerl(values: NextValues) -> "Tensor":
    """CERL (Lin et al. 2024, arXiv:2405.04342): head j learns the target of the j-th next member.

    Head 0 is the member's own.
    """

    def source(i: Any, j: Any) -> Source:
        other = (i + j) % values.members
        return Source(other, other)

    return values.take(source)


def own_target(values: NextValues) -> "Tensor":
    """As `cerl`, but the head itself values what the other member chooses (Lin et al. 2024)."""
    return values.take(lambda i, j: Source((i + j) % values.members, i, j))


def single_actor(values: NextValues) -> "Tensor":
    """As `cerl`, but member 0, which alone acts, makes the choices (Lin et al. 2024)."""
    return values.take(lambda i, j: Source(0, (i + j) % values.members))


def multi_horizon(values: NextValues) -> "Tensor":
    """Every head values what head 0 chooses (Fedus et al. 2019, arXiv:1902.06865)."""
    return values.take(lambda i, j: Source(i, i, j))


def mean(values: NextValues) -> "Tensor":
    """Every head regresses to the mean over members of the next values."""
    every = own(values)
    return every.mean(1, keepdim=True).expand_as(every)


HEAD_KINDS: dict[str, HeadKind] = {
    "own": HeadKind("one head, to the member's own next value", own, heads="one"),
    "cerl": HeadKind("a head for each member, to that member's next value", cerl),
    "own_target": HeadKind(
        "a head for each member, to its own value of what that member would do next", own_target
    ),
    "single_actor": HeadKind(
        "a head for each member, to that member's value of what member 0 would do next",
        single_actor,
    ),
    "multi_horizon": HeadKind(
        "ensemble.horizons heads, each to its own next value with a discount of its own",
        multi_horizon,
        heads="horizons",
    ),
    "mean": HeadKind("one head, to the mean over members of their next values", mean, heads="one"),
}


def in_words() -> str:
    """The help of the option that chooses a kind."""
    listed = "; ".join(f"{name}: {kind.text}" for name, kind in HEAD_KINDS.items())
    return (
        f"what the value heads of a member regress to. {listed}; MODULE:NAME: a `HeadKind` of a "
        "module of yours"
    )
