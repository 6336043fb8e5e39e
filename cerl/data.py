"""The tuples that cross joints, with their shapes; the dims are in `cerl/__init__.py`.

Rows, not transitions: environments reset on the step *after* an episode's last one, so the true
last observation is already the next row and `real` masks it. n-step returns, frame stacks and
sequence context are then only a matter of how many rows a window has.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# What acting remembers: whoever calls `act` owns it, `act` writes it in place.
Carry = tuple[Tensor, ...]


class EnvSpec(NamedTuple):
    """What an environment is, as far as anything outside it may know."""

    name: str
    observation: tuple[int, ...]  # shape of one observation, e.g. (84, 84) or (4, 10, 10)
    dtype: torch.dtype  # of an observation, as stored in replay
    actions: int  # number of discrete actions, or components of a continuous one
    envs: int  # E, environments per seed
    frames: int  # emulator frames of one agent step
    resident: bool  # steps on the device without host sync (may be captured in a CUDA graph)
    exact_state: bool  # state_dict() restores it bit for bit
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
    terminated: Tensor  # [S, E] bool, the value of what follows is 0
    truncated: Tensor  # [S, E] bool, cut off: what follows still has a value

    def copy_(self, other: "Step") -> None:
        """Takes over the values of another step, in place."""
        for mine, new in zip(self, other, strict=True):
            mine.copy_(new)

    def clone(self) -> "Step":
        """A step of its own memory."""
        return Step(*(tensor.clone() for tensor in self))


class Previous(NamedTuple):
    """What led to an observation, for networks that look at it; anything at an episode's start."""

    action: Tensor  # [S, E] int64, or [S, E, A] float32
    reward: Tensor  # [S, E] float32, as replay stores it


class ActInput(NamedTuple):
    """What acting sees of one moment."""

    obs: Tensor  # [S, E, *observation]
    start: Tensor  # [S, E] bool, the row begins an episode
    previous: Previous  # what led here, as replay stores it; networks without memory ignore it
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
    """Consecutive rows of one environment; M is 1 (one batch for all) or N (one a member)."""

    obs: Tensor  # [S, M, B, W, *observation]
    action: Tensor  # [S, M, B, W], or [S, M, B, W, A]
    reward: Tensor  # [S, M, B, W]
    terminated: Tensor  # [S, M, B, W]
    real: Tensor  # [S, M, B, W]
    member: Tensor  # [S, M, B, W]
    row: Tensor  # [S, M, B] int64, absolute id of the learnt row, stable for its whole life
    weight: Tensor  # [S, M, B] float32, factor of the loss; 0 where no valid start was found
    state: Tensor  # [S, M, B, K] float32, what acting remembered before row 1; K is 0 if not stored

    def starts(self) -> Tensor:
        """Rows that begin an episode, [S, M, B, W] bool; that the first one does is not known."""
        return F.pad(~self.real[..., :-1], (1, 0), value=False)
