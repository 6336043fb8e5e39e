"""Diagnostics of the paper (Lin et al. 2024): own-data share, feature rank and dormant units.

They are computed for every member from one sampled batch, between updates and never inside one.
"""

from typing import Any

import torch
from torch import Tensor

from cerl.agent import Agent
from cerl.collect import Collector
from cerl.data import Window
from cerl.learn import Learner

RANK_SHARE = 0.99  # share of the sum of singular values that counts (Kumar et al. 2021, srank)
RANK_ROWS = 1024  # most rows that a feature rank is computed from
DORMANT = 0.025  # a unit below this share of its layer's mean activation is dormant (Sokar 2023)


def feature_rank(features: Tensor) -> Tensor:
    """Effective rank of a batch of features (Kumar et al. 2021, arXiv:2010.14498).

    How many of the largest singular values make up 99% of their sum; 0 if all features are 0.

    Args:    features [..., rows, D].
    Returns: [...] float32; NaN if a feature is not finite.
    """
    finite = features.isfinite().all(-1).all(-1)
    x = torch.where(finite[..., None, None], features, 0.0).double()
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    # Singular values as roots of the eigenvalues of x x^T, which a GPU computes in batches. Their
    # error is 1e-8 of the largest one.
    values = torch.linalg.eigvalsh(x @ x.mT).clamp(min=0.0).sqrt().flip(-1)
    total = values.sum(-1)
    held = values.cumsum(-1) / total.clamp(min=1e-30).unsqueeze(-1)
    rank = ((held < RANK_SHARE).sum(-1) + 1) * (total > 0)
    return torch.where(finite, rank.float(), float("nan"))


def dormant_share(layers: list[Tensor]) -> Tensor:
    """Share of units whose mean |activation| is at most 0.025 of their layer's (Sokar et al. 2023).

    Args: layers, activations after the ReLU [S, N or 1, rows, ..., units], a unit being one entry
          of the last axis (a filter or a hidden unit). Returns: [S, N or 1] over all layers.
    """
    dormant, units = [], 0
    for layer in layers:
        size = layer.abs().flatten(2, -2).mean(2)  # [S, N, units]
        score = size / size.mean(-1, keepdim=True).clamp(min=1e-30)
        dormant.append((score <= DORMANT).sum(-1).float())
        units += size.shape[-1]
    members = max(d.shape[1] for d in dormant)
    return torch.stack([d.expand(-1, members) for d in dormant]).sum(0) / units


def measurements(learner: Learner, collector: Collector) -> dict[str, Tensor]:
    """Training metrics and diagnostics, {name: [S, N] or [S]}, on the training device."""
    # Copied before `diagnose` samples a batch, which may add to the misses.
    metrics = {**learner.metrics, "misses": learner.replay.misses.clone()}
    if int(learner.updates) > 0:
        metrics |= diagnose(learner.agent, learner)
        if learner.net.reader.whole:  # only sequence networks have a carry
            metrics |= staleness(learner.agent, collector)
    return metrics


@torch.no_grad()
def diagnose(agent: Agent[Any, Any, Any], learner: Learner) -> dict[str, Tensor]:
    """Diagnostics of a newly sampled batch. Returns: {name: [S, N]}."""
    net, window = learner.net, learner.sample()
    if window.obs.shape[1] > 1:
        # All members look at the first member's batch. Its stored states are dropped, since a
        # recurrent state is of no use to another member's network.
        window = Window(*(field[:, :1] for field in window))
        window = window._replace(state=window.state[..., :0])
    shape = (window.obs.shape[0], learner.config.ensemble.members)
    outputs = agent.activations(net, window)
    result = {"own_data_share": learner.replay.shares(shape[1])}
    if outputs:
        features = outputs[-1].flatten(3)  # [S, N or 1, rows, D]
        # Eigenvalues are slow to compute, so at most RANK_ROWS evenly spaced rows are used.
        every = -(-features.shape[2] // RANK_ROWS)
        result["feature_rank"] = feature_rank(features[:, :, ::every])
        result["dormant_share"] = dormant_share(outputs)
    result |= agent.measures(net, window, agent.dice(learner.keys, learner.updates))
    return {name: value.expand(shape).float() for name, value in result.items()}


@torch.no_grad()
def staleness(agent: Agent[Any, Any, Any], collector: Collector) -> dict[str, Tensor]:
    """How much predicted values change if the carry is recomputed with the current parameters.

    The carry was built row by row while the parameters changed, so parts of it are out of date. For
    comparison it is recomputed from the last layers x `encoder.cache` rows of replay. A recurrent
    network whose episode is longer than that differs also because earlier rows are missing.

    Returns: {"cache_error", "cache_error_largest"} [S], mean and largest |difference| of a value
             over environments that are inside an episode; NaN if none is.
    """
    player = collector.player
    seen, carry = player.seen(), tuple(tensor.clone() for tensor in player.carry)
    live = agent.judge(player.net, seen, carry)
    player.net.refill(collector.replay.last(collector.recent_rows()), carry, player.member)
    error = (agent.judge(player.net, seen, carry) - live).abs()  # [S, E, K]
    inside = ~player.start.unsqueeze(-1).expand_as(error)
    count = inside.sum((1, 2))
    mean = torch.where(inside, error, 0.0).sum((1, 2)) / count
    largest = torch.where(inside, error, -torch.inf).amax((1, 2))
    largest = torch.where(count > 0, largest, torch.nan)
    return {"cache_error": mean, "cache_error_largest": largest}
