"""Samples windows from replay; tests give only the options that matter to them."""

from typing import Any

from torch import Tensor

from cerl.data import Window
from cerl.replay import Replay
from cerl.sampler import Sampling

PLAIN: dict[str, Any] = {
    "begins": False,
    "members": 1,
    "batches": "shared",
    "probability": 1.0,
    "candidates": 8,
}


def draws(replay: Replay, *, step: Tensor, **options: Any) -> Window:
    """Calls `Replay.sample`. Args: options, fields of `Sampling` that differ from `PLAIN`."""
    return replay.sample(Sampling(**(PLAIN | options)), step=step)
