"""How wrong the values are that members predict while they play episodes of an evaluation.

The error of a step is the predicted value minus the Monte Carlo return from there on: the
discounted sum of rewards, clipped as in training, with the agent's bonuses (SAC's entropy) of all
later steps. Rewards after the end of an episode count as 0, also where a time limit cut it off.
Positive errors are values that are too high. What the code of Lin et al. 2024 logs as
`Overestimation` has the opposite sign.
"""

import torch
from torch import Tensor

FIELDS = ("value", "reward", "status")  # status: 0, no step of an episode; 1; 2, its last step


class Trace:
    """What the lanes of an evaluation predicted and got, for a fixed number of steps.

    It stays on the device and changes in place, so that a CUDA graph can write it.
    """

    def __init__(self, seeds: int, lanes: int, *, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.value, self.bonus = (torch.zeros(seeds, lanes, device=device) for _ in range(2))
        self.rows = torch.zeros(steps, len(FIELDS), seeds, lanes, device=device)

    def predict(self, value: Tensor, bonus: Tensor) -> None:
        """Keeps what the members predict for a step, and its bonus, until `add`; [S, lanes]."""
        self.value.copy_(value)
        self.bonus.copy_(bonus)

    def add(self, step: Tensor, reward: Tensor, live: Tensor, over: Tensor) -> None:
        """Writes a step.

        Args: step int64 [], its number; reward [S, lanes]; live, over bool [S, lanes], whether the
              step belongs to an episode that counts, and whether it is its last one.
        """
        # With the bonus on both sides the bonus of a step drops out of its own error.
        row = torch.stack([self.value + self.bonus, reward + self.bonus, live.float() + over])
        self.rows.index_copy_(0, (step % self.steps).view(1), row.unsqueeze(0))

    def taken(self, count: int) -> Tensor:
        """The first `count` steps, [count, FIELDS, S, lanes] float32 on the CPU; waits for it."""
        return self.rows[:count].to("cpu", copy=True)


def value_errors(history: Tensor, *, gamma: float, members: int) -> dict[str, Tensor]:
    """Errors of predicted values over all steps of every member's episodes.

    Args:    history [steps, FIELDS, S, lanes] on the CPU; the lanes of member i are the i-th of N
             equal parts; gamma, the discount of a step.
    Returns: {"value_error": mean error, "value_error_absolute": mean |error|, "value_error_rms":
             root of the mean squared error, "mc": mean Monte Carlo return}, float64 [S, N]; NaN for
             a member that played no step.
    """
    # One seed at a time, since the numbers of all steps are needed in double precision. Only up to
    # its own last step, since sums over more zeros, while other seeds play on, may round otherwise.
    each = []
    for seed in history.unbind(2):
        steps = int((seed[:, 2] > 0).any(1).cumsum(0).argmax()) + 1
        own = seed[:steps].double().contiguous()
        each.append(_errors(own, gamma=gamma, members=members))
    mean, absolute, square, later = torch.stack(each, 1)  # [S, N] each
    return {
        "value_error": mean,
        "value_error_absolute": absolute,
        "value_error_rms": square.sqrt(),
        "mc": later,
    }


def _errors(history: Tensor, *, gamma: float, members: int) -> Tensor:
    """Means over the steps of one seed: error, |error|, error squared, Monte Carlo return, [4, N].

    Args: history [steps, FIELDS, lanes] float64.
    """
    value, reward, status = history.unbind(1)
    live = status > 0
    later = discounted(torch.where(live, reward, 0.0), gamma * (status == 1).double())
    error = value - later
    numbers = torch.stack([error, error.abs(), error.square(), later])  # [4, steps, lanes]
    # A step of no episode does not count, whatever its numbers are.
    total = torch.where(live, numbers, 0.0).sum(1).unflatten(1, (members, -1)).sum(2)
    return total / live.sum(0).unflatten(0, (members, -1)).sum(1)


def discounted(reward: Tensor, factor: Tensor) -> Tensor:
    """Sums from every step on, y_t = reward_t + factor_t y_(t + 1), with y = 0 after the last step.

    Args: reward, factor [steps, ...]. Each pass doubles the number of rewards in every sum.
    """
    total, factor, reach = reward.clone(), factor.clone(), 1
    while reach < len(total):
        total[:-reach] += factor[:-reach] * total[reach:]
        factor[:-reach] = factor[:-reach] * factor[reach:]
        reach *= 2
    return total
