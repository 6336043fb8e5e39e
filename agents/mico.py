"""The MICo metric: features of states are as far apart as the states' rewards and futures."""

import torch
from torch import Tensor

from cerl import returns


def mico(
    online: Tensor,
    target: Tensor,
    target_next: Tensor,
    *,
    reward: Tensor,
    weight: Tensor,
    gamma: float,
    beta: float,
) -> Tensor:
    """MICo metric loss of the encoder (Castro et al. 2021, arXiv:2106.08229, section 5).

    The distance of two states is U(x, y) = (|x|^2 + |y|^2) / 2 + beta angle(x, y) of their
    features: the online network gives the features of x, the target network the features of y. The
    Huber loss regresses U to |r_x - r_y| + gamma U(x', y') at the next states x' and y', whose
    features both come from the target network.

    Args:    online, target, target_next: features [S, N or 1, B, D]; reward, weight [S, M, B];
             gamma, discount between a state and its next.
    Returns: [S, N or 1], the mean over all pairs of the batch, by the product of their weights.
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)  # [S, N, B]
        size = norm_x.unsqueeze(-1) * norm_y.unsqueeze(-2)
        cosine = (x @ y.transpose(-1, -2)) / (size + 1e-9)
        sine = (1.0 - cosine.square()).clamp(min=1e-9).sqrt()
        squares = norm_x.square().unsqueeze(-1) + norm_y.square().unsqueeze(-2)
        return 0.5 * squares + beta * torch.atan2(sine, cosine)

    goal = (reward.unsqueeze(-1) - reward.unsqueeze(-2)).abs()
    goal = goal + gamma * distance(target_next, target_next)
    pairs = weight.unsqueeze(-1) * weight.unsqueeze(-2)
    error = returns.huber(distance(online, target) - goal, delta=1.0) * pairs
    return error.sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1.0)
