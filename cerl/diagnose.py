"""Diagnostics of every member, computed from sampled batches when a run logs.

Own-data share, feature rank and dormant units as in the paper (Lin et al. 2024); norms of
gradients; forget gates and attention of sequence networks; and what an agent measures itself, such
as errors on rows of other members. They are computed between updates and never inside one, and
change nothing that is learnt. `docs/runs.md` lists their names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cerl.agent import Agent
from cerl.collect import Collector
from cerl.data import Window
from cerl.device.precision import precision
from cerl.learn import Learner
from cerl.nets.tokens import Tokens
from cerl.own_code import imported_callable

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


# A measure of the user's own: it gets the learner and a batch of the rows of all members, which is
# [S, 1, B, W], and returns {name: [S, N], [S, 1] or [S]}.
Measure = Callable[[Learner, Window], Mapping[str, Tensor]]


def measures_of(names: Sequence[str]) -> dict[str, Measure]:
    """The functions that log.measures names. Raises: ImportError, RuntimeError or ValueError."""
    return {name: imported_callable(name, key="log.measures") for name in names}


def own_measures(learner: Learner, *, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of the functions that log.measures names, {name: [S, N] or [S]} float32.

    Args:   taken, the metrics that are there already.
    Raises: ValueError if a function returns metrics of other shapes, or of names that are taken.
    """
    shape = (len(learner.keys), learner.config.ensemble.members)
    found: dict[str, Tensor] = {}
    for name, measure in measures_of(learner.config.log.measures).items():
        with torch.no_grad(), precision(learner.config.precision, learner.keys.device):
            values = measure(learner, shared_batch(learner))
        for metric, value in values.items():
            if metric in found or metric in taken:
                raise ValueError(f"log.measures: {name} measures {metric!r}, a name that is taken")
            if tuple(value.shape) not in (shape, (shape[0], 1), shape[:1]):
                raise ValueError(
                    f"log.measures: expected {metric!r} of {name} as [S, N] {list(shape)}, [S, 1] "
                    f"or [S], got {list(value.shape)}"
                )
            found[metric] = (value if value.dim() == 1 else value.expand(shape)).float()
    return found


def measurements(learner: Learner, collector: Collector) -> dict[str, Tensor]:
    """Training metrics and diagnostics, {name: [S, N] or [S]}, on the training device."""
    misses = learner.replay.misses.clone()
    metrics = {**learner.metrics, "misses": misses}
    if int(learner.updates) > 0:
        metrics |= diagnose(learner.agent, learner)
        if learner.net.reader.whole:  # only sequence networks have a carry
            metrics |= staleness(learner.agent, collector)
        metrics |= own_measures(learner, taken=metrics)
        learner.replay.misses.copy_(misses)  # those of the batches of diagnostics do not count
    return metrics


@torch.no_grad()
def diagnose(agent: Agent[Any, Any, Any], learner: Learner) -> dict[str, Tensor]:
    """Diagnostics of newly sampled batches. Returns: {name: [S, N], or [S]}."""
    net, window = learner.net, shared_batch(learner)
    shape = (window.obs.shape[0], learner.config.ensemble.members)
    outputs = agent.activations(net, window)
    result = {"own_data_share": learner.replay.shares(shape[1])}
    if outputs:
        features = outputs[-1].flatten(3)  # [S, N or 1, rows, D]
        # Eigenvalues are slow to compute, so at most RANK_ROWS evenly spaced rows are used.
        every = -(-features.shape[2] // RANK_ROWS)
        result["feature_rank"] = feature_rank(features[:, :, ::every])
        result["dormant_share"] = dormant_share(outputs)
    dice = agent.dice(learner.keys, learner.updates)
    with precision(learner.config.precision, learner.keys.device):
        result |= agent.measures(net, learner.target, window, dice)
    result |= gradient_norms(agent, learner)
    result |= attention(net, window)
    return {
        name: (value if value.dim() == 1 else value.expand(shape)).float()
        for name, value in result.items()
    }


def attention(net: Any, window: Window) -> dict[str, Tensor]:
    """Measurements of gates and attention of sequence networks (`cerl/nets/gates.py`).

    Args:    net, of an agent; window [S, 1, B, W].
    Returns: {NAME/layerL/headH: [S, N or 1]} of every layer with attention and every head, and
             {NAME: [S, N or 1]}, the mean over all of these. Parts of a network that read rows on
             their own have names of their own: `actor_NAME` are those of SAC's policies.
    """
    found: dict[str, Tensor] = {}
    for prefix, reader in _readers(net).items():
        layers: dict[str, list[Tensor]] = {}
        for layer, gauges in enumerate(reader.measured(window)):
            for name, heads in gauges.items():  # [S, N or 1, H]
                layers.setdefault(f"{prefix}{name}", []).append(heads)
                for head, value in enumerate(heads.unbind(2)):
                    found[f"{prefix}{name}/layer{layer}/head{head}"] = value
        for name, values in layers.items():
            found[name] = torch.cat(values, 2).mean(2)
    return found


def _readers(net: Any) -> dict[str, Tokens]:
    """The readers of a network that run a trunk, by the prefix of their measurements.

    A network reads rows itself or has parts that do; of its critics the prefix is empty, since
    their values are what other diagnostics are of.
    """
    parts = {name: part for name, part in net.named_children() if hasattr(part, "reader")}
    parts = parts or {"": net}
    found = {
        "" if name in ("", "critic") else f"{name}_": part.reader for name, part in parts.items()
    }
    return {prefix: reader for prefix, reader in found.items() if isinstance(reader, Tokens)}


def shared_batch(learner: Learner) -> Window:
    """A batch of the rows of all members, [S, 1, B, W], also where members learn from their own.

    There its stored states are dropped, since a recurrent state is of no use to another member's
    network.
    """
    if learner.sampling.members == 1:
        return learner.sample()
    every = learner.sampling._replace(members=1, batches="shared")
    window = learner.replay.sample(every, step=learner.updates)
    return window._replace(state=window.state[..., :0])


def gradient_norms(agent: Agent[Any, Any, Any], learner: Learner) -> dict[str, Tensor]:
    """L2 norm of every member's gradient in the next update's batch, before it is clipped.

    Parameters that all members share have a norm of their own, as when they are clipped.

    Returns: {"gradient_norm": [S, N]} of the values, and with the names of `cerl.agent.Group` of
             other parameters, such as "actor_gradient_norm"; "..._shared" [S] of shared parameters.
    """
    window, members = learner.sample(), learner.config.ensemble.members
    dice = agent.dice(learner.keys, learner.updates)
    found: dict[str, Tensor] = {}
    for number, stage in enumerate(learner.stages):
        grads, _ = learner.grads(window, stage=number, dice=dice)
        for group in stage.groups:
            mine, grads = grads[: len(group.leaves)], grads[len(group.leaves) :]
            name = f"{group.name}_gradient_norm".removeprefix("_")
            norms = [grad.flatten(2).norm(dim=2) for grad in mine]  # [S, N or 1] each
            own = [norm for norm in norms if norm.shape[1] == members]
            shared = [norm[:, 0] for norm in norms if norm.shape[1] != members]
            if own:
                found[name] = torch.stack(own).norm(dim=0)
            if shared:
                found[f"{name}_shared"] = torch.stack(shared).norm(dim=0)
    return found


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
