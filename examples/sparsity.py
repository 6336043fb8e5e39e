"""A metric of one's own: the share of hidden units that are 0 after the ReLU.

It is computed for every seed and member whenever the run logs. It becomes rows of `metrics.parquet`
and the curve `Diagnostics/zero_share` in TensorBoard.

    cerl train catch/bootdqn --log.measures sparsity:zero_share
"""

from torch import Tensor

from cerl.data import Window
from cerl.learn import Learner


def zero_share(learner: Learner, batch: Window) -> dict[str, Tensor]:
    """Metrics of a batch [S, 1, B, W], {name: [S, N], or [S, 1] where members share}."""
    last = learner.agent.activations(learner.net, batch)[-1]  # [S, N or 1, rows, ..., units]
    return {"zero_share": (last == 0).float().flatten(2).mean(2)}
