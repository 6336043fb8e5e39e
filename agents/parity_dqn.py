"""DQN updates on given parameters and one given batch, to compare with other implementations.

No run is needed: parameters and target parameters are given by leaf name, transitions as arrays and
options as a `Config`. `from_original` maps the leaf names of the authors' JAX code
(zhixuan-lin/ensemble-rl-discrete) to ours, `to_original` maps them back:

    theirs (member axis first; absent where shared)          ours (leading [S, N] or [S, 1])
    params/Encoder/DQNZooConv_k/Conv_0/kernel [N,h,w,c,out]  convs.k.weight [1,N,h*w*c,out]
    params/Encoder/DQNZooConv_k/Conv_0/bias   [N,out]        convs.k.bias   [1,N,out]
    params/Penult/Dense_0/kernel              [N,in,out]     hidden.0.weight        [1,N,in,out]
    params/Penult/Dense_0/bias                [N,out]        hidden.0.bias          [1,N,out]
    params/Final/Dense_0/kernel               [J,N,in,A]     final.weight           [1,N,in,J,A]
    params/Final/bias                         [J,N,1]        final.bias             [1,N,J,1]
    where the hidden layer forks too (`both`):
    params/Penult/Dense_0/kernel              [J,N,in,out]   final.hidden           [1,N,J,in,out]
    params/Penult/Dense_0/bias                [J,N,out]      final.hidden_bias      [1,N,J,out]
    params/Final/Dense_0/kernel               [J,N,in,A]     final.weight           [1,N,J,in,A]
    quantile regression, K quantiles:
    params/VmapQuantileNetwork_0/Conv_k/...   as DQNZooConv_k, Dense_0 as Penult
    params/VmapQuantileNetwork_0/Dense_1/...  [N,in,A*K]     final.weight, [N,A*K] final.bias

Without CERL their Final leaf has no head axis. With CERL, head m of theirs predicts the value of
member m, while head j of our member i predicts that of member (i + j) mod N: ours[i, j] =
theirs[(i + j) mod N, i]. Multi-horizon heads have the same order: ours[i, h] = theirs[h, i].
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cerl import draw
from cerl.agent import Metrics
from cerl.agents.dqn import DQN
from cerl.agents.parity import Leaves, check_frames, copies, given_batch, load
from cerl.agents.values import value_kind
from cerl.config import Config, SacConfig
from cerl.data import EnvSpec
from cerl.optim import Optimiser
from cerl.returns import masked


class Outcome(NamedTuple):
    """Results of k updates on one batch; values and targets are those of the first update."""

    values: Tensor  # [N, B, J, A] (or [..., A, atoms]) of the given parameters at the states
    targets: Tensor  # [N, B, J] (or [..., atoms]) regression target of every head
    head_losses: list[Tensor]  # of each update: [N, J] mean over the batch, before the update
    losses: list[Tensor]  # of each update: [N], sum over heads (with MICo), before the update
    metrics: list[Metrics]  # of each update: {name: [N]} that a run logs, before the update
    parameters: list[dict[str, Tensor]]  # after each update, by leaf name


def run_updates(
    parameters: Leaves,
    target_parameters: Leaves,
    *,
    states: Tensor,
    actions: Tensor,
    rewards: Tensor,
    terminals: Tensor,
    next_states: Tensor,
    mask: Tensor | None = None,
    config: Config,
    action_count: int,
    updates: int = 1,
) -> Outcome:
    """Runs `updates` gradient steps of one seed on one batch; the target parameters stay fixed.

    With config.loss.batches other than shared, every member has a batch of its own, and the five
    arrays of transitions lead with N.

    Args:    parameters, target_parameters {leaf name: [1, N or 1, ...]} as in the table above;
             states, next_states [B, height, width, stack] or [B, features], not yet divided by
             config.net.scale; actions [B] int64; rewards [B], n-step sums where n_step > 1;
             terminals [B], 1 where the episode terminates; mask [N, B], 1 where a member learns
             from a row, which takes the place of random draws and is given exactly if
             loss.mask_probability is below 1; action_count, A.
    Raises:  ValueError if a leaf is missing, unknown or of another shape, if updates < 1, if
             batches or mask do not fit the config, or if the config asks for a sequence network
             or for agent sac.
    Source:  Lin et al. 2024 (arXiv:2405.04342); the loss is that of `DQN.loss`.
    """
    apart = config.loss.batches != "shared"
    _check_rows(config, actions, mask)
    image = states.dim() - apart == 4
    shape = tuple(states.shape[1 + apart :][: 2 if image else None])
    spec = EnvSpec("batch", shape, states.dtype, action_count, actions.shape[-1], 1, True, True)
    if isinstance(config.agent, SacConfig):
        raise ValueError("agent.name: expected dqn or quantile, got sac")
    agent = DQN(config, spec, kind=value_kind(config.agent), device="cpu")
    keys = draw.seed_keys([0])
    net, target = agent.build(keys=keys), agent.build(keys=keys)
    load(net, parameters, what="parameters")
    load(target, target_parameters, what="target_parameters")
    check_frames(net.reader, config)

    def frames(raw: Tensor) -> Tensor:
        """States as [N or 1, B, stack, ...]: the axis of the stack comes before the pixels."""
        rows = raw if apart else raw.unsqueeze(0)
        return rows.movedim(-1, 2) if image else rows.unsqueeze(2)

    lead = (actions.shape[0] if apart else 1, actions.shape[-1])
    batch = given_batch(
        frames(states),
        frames(next_states),
        action=actions.long().view(lead),
        reward=rewards.view(lead),
        terminal=terminals.view(lead),
        weight=masked(torch.ones(1, *lead, 1), None if mask is None else mask.float()[None]),
        power=agent.table.gamma**config.loss.n_step,
    )
    optimiser = Optimiser(config.optim, list(net.parameters()))
    outcome: Outcome | None = None
    for _ in range(updates):
        losses, values = agent.head_losses(net, target, batch)
        loss, metrics = agent.member_losses(net, target, batch, losses, values)
        if outcome is None:
            q, y = values.q[0].squeeze(2).detach(), values.target[0].squeeze(2)
            outcome = Outcome(q, y, [], [], [], [])
        outcome.head_losses.append(losses[0].detach())
        outcome.losses.append(loss[0].detach())
        outcome.metrics.append({name: value[0].detach() for name, value in metrics.items()})
        optimiser.step(torch.autograd.grad(loss.sum(), list(net.parameters())))
        outcome.parameters.append(copies(net))
    if outcome is None:
        raise ValueError(f"updates: expected at least 1, got {updates}")
    return outcome


def _check_rows(config: Config, actions: Tensor, mask: Tensor | None) -> None:
    """Checks a batch and its mask. Raises: ValueError if the config asks for another kind."""
    loss, members = config.loss, config.ensemble.members
    lead = [] if loss.batches == "shared" else [members]
    expected = [*lead, actions.shape[-1] if actions.dim() else "B"]
    if list(actions.shape) != expected:
        raise ValueError(
            f"actions: expected {expected} with loss.batches {loss.batches}, got "
            f"{list(actions.shape)}"
        )
    if (mask is None) != (loss.mask_probability == 1.0):
        raise ValueError(
            "mask: expected one exactly where loss.mask_probability is below 1, got "
            f"{'none' if mask is None else 'one'} and {loss.mask_probability:g}"
        )
    if mask is not None and list(mask.shape) != [members, actions.shape[-1]]:
        raise ValueError(
            f"mask: expected {[members, actions.shape[-1]]}, members x rows, got {list(mask.shape)}"
        )


_QUANTILE = "params/VmapQuantileNetwork_0"
_NAMES = {
    "params/Penult/Dense_0/kernel": "hidden.0.weight",
    "params/Penult/Dense_0/bias": "hidden.0.bias",
    "params/Final/Dense_0/kernel": "final.weight",
    "params/Final/bias": "final.bias",
    f"{_QUANTILE}/Dense_0/kernel": "hidden.0.weight",
    f"{_QUANTILE}/Dense_0/bias": "hidden.0.bias",
    f"{_QUANTILE}/Dense_1/kernel": "final.weight",
    f"{_QUANTILE}/Dense_1/bias": "final.bias",
} | {
    f"{layer}/{theirs}": f"convs.{k}.{ours}"
    for k in range(3)
    for layer in (f"params/Encoder/DQNZooConv_{k}/Conv_0", f"{_QUANTILE}/Conv_{k}")
    for theirs, ours in (("kernel", "weight"), ("bias", "bias"))
}
_FORKED = {"hidden.0.weight": "final.hidden", "hidden.0.bias": "final.hidden_bias"}


def _our_name(theirs: str, *, forked: bool) -> str:
    name = _NAMES[theirs]
    return _FORKED.get(name, name) if forked else name


def _heads_axis(member: int, heads: int, *, rotated: bool) -> list[int]:
    """For each of our heads of a member, the index of the same head in the original."""
    return [(member + j) % heads if rotated else j for j in range(heads)]


def from_original(
    leaves: Leaves, *, heads: bool, rotated: bool, shared: int = 0, forked: bool = False
) -> dict[str, Tensor]:
    """Leaves of the original by our names, with our axes.

    Args: heads: whether their Final has a head axis; rotated: whether heads are CERL's, whose order
          differs from ours (False: multi-horizon, whose order does not); shared: how many of the
          first layers (three convolutions, then the hidden layer) all members share, whose leaves
          have no member axis there; forked: whether their Penult has a head axis too (`both`).
    """
    result = {}
    for name, leaf in leaves.items():
        ours = _our_name(name, forked=forked)
        layer = int(ours.split(".")[1]) if ours.startswith("convs") else 3
        if not ours.startswith("final") and layer < shared:
            leaf = leaf.unsqueeze(0)
        if ours.startswith("convs") and leaf.dim() == 5:
            leaf = leaf.flatten(1, 3)
        if ours.startswith("final"):
            if not heads:
                leaf = leaf.unsqueeze(0)
            count, members = leaf.shape[:2]
            order = [_heads_axis(i, count, rotated=rotated) for i in range(members)]
            leaf = torch.stack([leaf[order[i], i] for i in range(members)])  # [N, J, ...]
            if ours == "final.weight" and not forked:
                leaf = leaf.transpose(1, 2)
        result[ours] = leaf.unsqueeze(0)
    return result


def to_original(
    leaves: Leaves,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    heads: bool,
    rotated: bool,
    forked: bool = False,
) -> dict[str, Tensor]:
    """Our leaves by the original's names, with its axes; options as in `from_original`.

    Args: shapes {name: shape} of the original's leaves.
    """
    result = {}
    for name, shape in shapes.items():
        ours = _our_name(name, forked=forked)
        leaf = leaves[ours][0]
        if ours.startswith("final"):
            if ours == "final.weight" and not forked:
                leaf = leaf.transpose(1, 2)  # [N, J, in, A]
            theirs = torch.empty_like(leaf.transpose(0, 1))
            for i in range(leaf.shape[0]):
                theirs[_heads_axis(i, leaf.shape[1], rotated=rotated), i] = leaf[i]
            leaf = theirs if heads else theirs[0]
        result[name] = leaf.reshape(tuple(shape))
    return result
