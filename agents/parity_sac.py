"""SAC updates on given parameters, batch and noise, to compare with other implementations.

The counterpart of `cerl/agents/parity_dqn.py`. `from_original` maps the leaf names of the authors'
JAX code (zhixuan-lin/ensemble-rl-continuous) to ours, `to_original` maps them back:

    theirs (member axis first)                          ours (leading [S, N])
    actor, below VmapNormalTanhPolicyParams_0/
      MLP_0/Dense_k/kernel [N,in,out], bias [N,out]     actor.hidden.k.{weight,bias} [1,N,...]
      Dense_0/..., Dense_1/...                          actor.moments..., in this order
    critic, below VmapDoubleCritic_0/VmapCritic_0/
      MLP_0/Dense_k/kernel [N,2,in,out], bias [N,2,out] critic.hidden.k.{weight,bias} [1,N,...]
      MLP_0/Dense_K, the last                           critic.final.{weight,bias}
    log temperature [N]                                 log_alpha [1,N,1]

Output m of their last layer predicts the value of member m, while output j of our member i predicts
that of member (i + j) mod N: ours[i, ..., j] = theirs[i, ..., (i + j) mod N].
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from cerl import draw
from cerl.agents.parity import Leaves, check_frames, copies, given_batch, load
from cerl.agents.sac import SAC, Dice
from cerl.config import Config, SacConfig, of_kind
from cerl.data import EnvSpec
from cerl.kernels import optim as kernels
from cerl.optim import Optimiser


class Update(NamedTuple):
    """Results of one update.

    Values, targets and critics' losses are those before the update; the losses of policies and
    temperatures are computed with the updated critics.
    """

    values: Tensor  # [N, C, B, J] of the critics at the actions taken
    targets: Tensor  # [N, B, J] regression target of every head
    head_losses: Tensor  # [N, C, J] mean over the batch
    actor_losses: Tensor  # [N]
    temperature_losses: Tensor  # [N]
    entropy: Tensor  # [N] nats
    critic_gradient: float  # L2 norm over all leaves
    actor_gradient: float
    parameters: dict[str, Tensor]  # after the update, by leaf name
    target_parameters: dict[str, Tensor]


def run_sac_updates(
    parameters: Leaves,
    target_parameters: Leaves,
    *,
    states: Tensor,
    actions: Tensor,
    rewards: Tensor,
    terminals: Tensor,
    next_states: Tensor,
    next_noise: Tensor,
    noise: Tensor,
    config: Config,
    updates: int = 1,
) -> list[Update]:
    """Runs `updates` updates of one seed on one batch, all with the same noise.

    An update steps the critics, moves their targets, and then steps policies and temperatures.

    Args:    parameters {leaf name: [1, N, ...]} as in the table above; target_parameters, those of
             the critics without the leading `critic.`; states, next_states [B, features]; actions
             [B, A] in [-1, 1]; rewards [B], n-step sums where n_step > 1; terminals [B], 1 where
             the episode terminates; next_noise, noise [N, B, A] standard normal, for the policies'
             actions at the next states and at the states.
    Raises:  ValueError if a leaf is missing, unknown or of another shape, if updates < 1, or if the
             config asks for targets of randomly chosen critics (this noise chooses none), a
             sequence network or convolutions.
    Source:  Lin et al. 2024 (arXiv:2405.04342); the losses are those of `SAC`.
    """
    if updates < 1:
        raise ValueError(f"updates: expected at least 1, got {updates}")
    critics = of_kind(config.agent, SacConfig).target_critics
    if critics:
        raise ValueError(
            "agent.target_critics: given transitions come without the random numbers that choose "
            f"the critics of a target; expected 0, all critics, got {critics}"
        )
    if config.net.channels:
        raise ValueError(
            "net.channels: given transitions are of flat states; expected no convolutions, got "
            f"{list(config.net.channels)}"
        )
    spec = EnvSpec(
        name="batch",
        observation=tuple(states.shape[1:]),
        dtype=states.dtype,
        actions=actions.shape[1],
        envs=len(states),
        frames=1,
        resident=True,
        exact_state=True,
        continuous=True,
    )
    agent = SAC(config, spec, device="cpu")
    keys = draw.seed_keys([0])
    net, target = agent.build(keys=keys), agent.build(keys=keys).critic
    load(net, parameters, what="parameters")
    load(target, target_parameters, what="target_parameters")
    check_frames(net.reader, config)
    batch = given_batch(
        states[None].unsqueeze(2),
        next_states[None].unsqueeze(2),
        action=actions.float().unsqueeze(0),
        reward=rewards.unsqueeze(0),
        terminal=terminals.unsqueeze(0),
        weight=torch.ones(1, 1, len(states), 1),
        power=agent.table.gamma**config.loss.n_step,
    )
    dice = Dice(next_noise.unsqueeze(0), noise.unsqueeze(0), critics=None)
    groups = [group for stage in agent.stages(net) for group in stage.groups]
    critics, actors, alphas = (Optimiser(group.optim, group.leaves) for group in groups)
    done = []
    for _ in range(updates):
        critic = agent.critic_losses(net, target, batch, dice)
        critic_grads = torch.autograd.grad(critic.heads.sum(), critics.leaves)
        critics.step(critic_grads)
        with torch.no_grad():
            rate = config.schedule.target_rate
            kernels.follow(list(target.parameters()), critics.leaves, rate=rate)
        samples = agent.samples(net, batch.window, batch.now, batch.weight, dice)
        policy = agent.policy_losses(net, batch.window, samples)
        loss = policy.actor.sum() + policy.temperature.sum()
        grads = torch.autograd.grad(loss, [*actors.leaves, *alphas.leaves])
        actors.step(grads[:-1])
        alphas.step(grads[-1:])
        done.append(
            Update(
                values=critic.q[0].detach(),
                targets=critic.target[0],
                head_losses=critic.heads[0].detach(),
                actor_losses=policy.actor[0].detach(),
                temperature_losses=policy.temperature[0].detach(),
                entropy=policy.entropy[0],
                critic_gradient=_norm(critic_grads),
                actor_gradient=_norm(grads[:-1]),
                parameters=copies(net),
                target_parameters=copies(target),
            )
        )
    return done


def _norm(grads: tuple[Tensor, ...]) -> float:
    return float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())


_NAME = re.compile(r".*/Dense_(\d)/(kernel|bias)")


def _ours(name: str, depth: int) -> str:
    """Our name of one of their leaves, without `actor.` or `critic.`; depth, hidden layers."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"expected a leaf of an MLP's Dense layer, got {name!r}")
    number, kind = int(match[1]), match[2]
    layer = f"hidden.{number}" if number < depth else "final"
    if "MLP_0" not in name:
        layer = "moments"
    return f"{layer}.{'weight' if kind == 'kernel' else 'bias'}"


def _rotated(leaf: Tensor, sign: int) -> Tensor:
    """Rolls the outputs of every member (the last axis of [N, ...]) by `sign` times its number."""
    return torch.stack([leaf[i].roll(sign * i, -1) for i in range(len(leaf))])


def from_original(leaves: Leaves, *, depth: int) -> dict[str, Tensor]:
    """Leaves of the original's actor or critic by our names, with our axes.

    Args: depth, number of hidden layers.
    """
    result: dict[str, Tensor] = {}
    for name, leaf in sorted(leaves.items()):
        ours = _ours(name, depth)
        if ours.startswith("final") and leaf.shape[-1] > 1:
            leaf = _rotated(leaf, -1)
        leaf = leaf.unsqueeze(0)
        result[ours] = torch.cat([result[ours], leaf], -1) if ours in result else leaf
    return result


def to_original(leaves: Leaves, names: list[str], *, depth: int) -> dict[str, Tensor]:
    """Our leaves of an actor or critic by the original's names, with its axes."""
    result = {}
    for name in names:
        ours = _ours(name, depth)
        leaf = leaves[ours][0]
        if ours.startswith("final") and leaf.shape[-1] > 1:
            leaf = _rotated(leaf, 1)
        if ours.startswith("moments"):
            leaf = leaf.chunk(2, -1)[1 if "Dense_1" in name else 0]
        result[name] = leaf
    return result
