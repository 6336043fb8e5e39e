"""The tuples that environments, players, replay and agents exchange, with their shapes.

The letters of the shapes are explained in `cerl/__init__.py`. Replay stores rows, one per time
index, and no transitions. An environment resets itself on the step *after* an episode's last one,
so the last observation of an episode is a row of its own, marked `real = False`. n-step returns,
frame stacks and sequence context then only differ in how many consecutive rows a window has.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The memory of past rows that a sequence network keeps while acting, e.g. an attention cache. The
# caller of `act` owns it, and `act` updates it in place. Networks without memory have none: ().
Carry = tuple[Tensor, ...]


class EnvSpec(NamedTuple):
    """Everything that the rest of cerl knows about an environment."""

    name: str
    observation: tuple[int, ...]  # shape of one observation, e.g. (84, 84) or (4, 10, 10)
    dtype: torch.dtype  # of an observation, as stored in replay
    actions: int  # number of discrete actions, or components of a continuous one
    envs: int  # E, environments per seed
    frames: int  # emulator frames of one agent step
    resident: bool  # steps on the device without host sync (may be captured in a CUDA graph)
    exact_state: bool  # load_state_dict() restores what state_dict() saved, bit for bit
    continuous: bool = False  # actions are [S, E, actions] float32 in [-1, 1]

    def action(self, *lead: int, device: torch.device | str) -> Tensor:
        """Zeros of the shape and type of an action, [*lead] int64 or [*lead, A] float32."""
        if self.continuous:
            return torch.zeros(*lead, self.actions, device=device)
        return torch.zeros(lead, dtype=torch.int64, device=device)


class Step(NamedTuple):
    """What `env.step` returns, for every seed and environment."""

    obs: Tensor  # [S, E, *observation]
    reward: Tensor  # [S, E] float32, of the action that led here; 0 after a reset
    terminated: Tensor  # [S, E] bool, the episode ended: the value of this observation is 0
    truncated: Tensor  # [S, E] bool, the episode was cut off: this observation still has a value

    def copy_(self, other: "Step") -> None:
        """Copies the values of another step into this one, in place."""
        for mine, new in zip(self, other, strict=True):
            mine.copy_(new)

    def clone(self) -> "Step":
        """A copy that shares no memory with this step."""
        return Step(*(tensor.clone() for tensor in self))


class Previous(NamedTuple):
    """The action and reward that led to an observation; meaningless where an episode starts."""

    action: Tensor  # [S, E] int64, or [S, E, A] float32
    reward: Tensor  # [S, E] float32, as replay stores it


class ActInput(NamedTuple):
    """What an agent sees when it chooses the actions of one agent step."""

    obs: Tensor  # [S, E, *observation]
    start: Tensor  # [S, E] bool, True where the observation is the first of an episode
    previous: Previous  # as replay stores it; only sequence networks use it
    member: Tensor  # [S, E] int64 who acts: in [0, N), or N + k for an evaluation's k-th aggregate


class Row(NamedTuple):
    """One time index of every seed and environment, as replay stores it."""

    obs: Tensor  # [S, E, *observation]
    action: Tensor  # [S, E] int64, or [S, E, A] float32
    reward: Tensor  # [S, E] float32, result of `action`
    terminated: Tensor  # [S, E] bool, result of `action`
    real: Tensor  # [S, E] bool; False: obs is an episode's last, its action was ignored
    member: Tensor  # [S, E] int64, who acted


class Window(NamedTuple):
    """A batch of windows, each of W consecutive rows of one environment.

    M is 1 (all members learn from one batch) or N (every member has a batch of its own).
    """

    obs: Tensor  # [S, M, B, W, *observation]
    action: Tensor  # [S, M, B, W], or [S, M, B, W, A]
    reward: Tensor  # [S, M, B, W]
    terminated: Tensor  # [S, M, B, W]
    real: Tensor  # [S, M, B, W]
    member: Tensor  # [S, M, B, W]
    row: Tensor  # [S, M, B] int64, id of the first learnt row, counted over the whole run
    weight: Tensor  # [S, M, B] float32, factor of the loss; 0 where no valid window was found
    state: Tensor  # [S, M, B, K] float32, recurrent state before row 1; K is 0 if not stored

    def starts(self) -> Tensor:
        """Rows that are the first of an episode, [S, M, B, W] bool.

        Row 0 is always False: whether it starts an episode depends on the row before the window.
        """
        return F.pad(~self.real[..., :-1], (1, 0), value=False)
