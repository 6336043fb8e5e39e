"""Given transitions as a batch and given parameters in a network, to compare implementations.

`parity_dqn.py` and `parity_sac.py` run our updates on them, and map the leaf names of the authors'
code to ours. A leaf is a parameter tensor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cerl.config import Config
from cerl.data import Window
from cerl.nets.reader import Reader
from cerl.returns import Batch

Leaves = Mapping[str, Tensor]


def check_frames(reader: Reader, config: Config) -> None:
    """Checks that a network reads single observations. Raises: ValueError if it does not."""
    if reader.whole:
        raise ValueError(
            "given transitions are of single observations; expected encoder frames, got "
            f"{config.encoder.name}"
        )


def load(module: nn.Module, leaves: Leaves, *, what: str) -> None:
    """Copies given parameters into a network.

    Args:   what, the name of the given parameters in an error message.
    Raises: ValueError if a leaf is missing, unknown or of another shape.
    """
    own = dict(module.named_parameters())
    given = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in own.items()}
    if given != wanted:
        wrong = sorted(set(given.items()) ^ set(wanted.items()))
        raise ValueError(f"{what}: expected leaves {wanted}, got {given}; different: {wrong}")
    with torch.no_grad():
        for name, leaf in own.items():
            leaf.copy_(leaves[name])


def copies(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, by leaf name."""
    return {name: leaf.detach().clone() for name, leaf in module.named_parameters()}


def given_batch(
    frames: Tensor,
    next_frames: Tensor,
    *,
    action: Tensor,
    reward: Tensor,
    terminal: Tensor,
    weight: Tensor,
    power: Tensor,
) -> Batch:
    """Given transitions as a batch of one seed, whose windows hold the frames of both states.

    Args: frames, next_frames [M, B, stack, *observation]; action [M, B] or [M, B, A]; reward
          [M, B], n-step sums; terminal [M, B], 1 where the episode terminates; weight
          [1, M, B, T] of the rows; power [J], gamma^n of every head.
    """
    obs = torch.cat([frames, next_frames], 2).unsqueeze(0)  # [1, M, B, 2 * stack, ...]
    stack, lead = frames.shape[2], obs.shape[:3]
    flags = torch.zeros(*lead, 2 * stack, dtype=torch.bool)
    row = torch.zeros(lead, dtype=torch.int64)
    window = Window(
        obs=obs,
        action=torch.zeros_like(flags, dtype=torch.int64),
        reward=torch.zeros_like(flags, dtype=torch.float32),
        terminated=flags,
        real=~flags,  # no episode begins within a stack
        member=torch.zeros_like(flags, dtype=torch.int64),
        row=row,
        weight=torch.ones(lead),
        state=torch.zeros(*lead, 0),
    )
    now = torch.full((*lead, 1), stack - 1)
    rewards = reward.float().view(*lead, 1, 1)
    return Batch(
        window=window,
        now=now,
        later=now + stack,
        action=action.view(*lead, 1, *action.shape[2:]),
        reward=rewards.expand(*lead, 1, len(power)),
        discount=(1.0 - terminal.float()).view(*lead, 1, 1) * power,
        weight=weight,
    )
