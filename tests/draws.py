"""Windows drawn from a replay buffer by a few options, the others at their plainest."""

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
    """`Replay.sample`; options as of `Sampling`."""
    return replay.sample(Sampling(**(PLAIN | options)), step=step)
