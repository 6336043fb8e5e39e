"""Soft actor-critic and its ensembles: SAC, Ensemble SAC, CERL, tandem, REDQ, weighted backups.

Every member has a policy, C critics and a temperature of its own. Under CERL the critics have J
heads, of which all but the first regress to other members' targets (`cerl/heads.py`); a policy is
trained on the first alone, its member's own. Haarnoja et al. 2018 (arXiv:1812.05905); Lin et al.
2024 (arXiv:2405.04342), whose code sums the losses of heads without the gradient scaling of the
discrete agents; Chen et al. 2021 (REDQ, arXiv:2101.05982) for targets of randomly chosen critics;
Lee et al. 2021 (SUNRISE, arXiv:2007.04938) for weighted backups.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cerl import draw, returns
from cerl.agent import Decision, Group, Losses, Metrics, Stage
from cerl.agents.measures import by_owner, own_rows, row_mean, value_spread
from cerl.agents.sac_net import Critic, SACNet, log_probability
from cerl.config import Config, SacConfig, of_kind
from cerl.data import ActInput, Carry, EnvSpec, Window
from cerl.explore import Noise
from cerl.heads import head_table, next_action_values, of_choosers
from cerl.kernels import sac
from cerl.kernels.pointwise import sigmoid
from cerl.kernels.runtime.streams import parallel
from cerl.kernels.sac import density, sampled
from cerl.nets.layers import initialise
from cerl.returns import Batch, masked


class Dice(NamedTuple):
    """Random numbers of one update."""

    later: Tensor  # [S, N, rows, A] standard normal, for the next actions of targets
    now: Tensor  # [S, N, rows, A] standard normal, for the policies' actions at the learnt rows
    # [S, N, C] uniform: targets use the critics with the largest numbers; None: all critics.
    critics: Tensor | None


class CriticLosses(NamedTuple):
    """The critics' losses, and the values and targets behind them."""

    heads: Tensor  # [S, N, C, J] mean over the batch
    q: Tensor  # [S, N, C, rows, J] values of the actions taken
    target: Tensor  # [S, N, rows, J]


class Samples(NamedTuple):
    """Actions that the policies sample at the learnt rows."""

    now: Tensor  # [S, M, B, T] positions of those rows in W
    weight: Tensor  # [S, M, B, T], 0 where a row is not learnt from
    action: Tensor  # [S, N, rows, A]
    log_p: Tensor  # [S, N, rows]


class PolicyLosses(NamedTuple):
    """The losses of policies and temperatures, means over the batch [S, N]."""

    actor: Tensor
    temperature: Tensor
    entropy: Tensor  # nats, detached
    value: Tensor  # of the policies' actions, detached


class SAC:
    """The agent of a config with continuous actions: build, act and losses (`cerl.agent.Agent`)."""

    metrics = ("loss", "q_data", "q_pi", "actor_loss", "temperature_loss", "entropy", "alpha")

    def __init__(self, config: Config, spec: EnvSpec, *, device: torch.device | str) -> None:
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.options = of_kind(config.agent, SacConfig)
        gamma = config.loss.gamma
        self.table = head_table(config.ensemble, gamma=gamma, device=self.device)
        # Whether a critic values the next actions of all members, or only its own member's action.
        self.crossed = self.table.crossed or self.options.spread_temperature > 0

    def build(self, *, keys: Tensor) -> SACNet:
        """A freshly initialised network for the seeds of `keys` [S]."""
        net = SACNet(self.config, self.spec, seeds=len(keys), heads=self.table.heads)
        initialise(net.to(self.device), keys=keys.to(self.device), scheme=self.config.net.init)
        return net

    def followed(self, net: SACNet) -> Critic:
        """Only the critics have target networks."""
        return net.critic

    def stages(self, net: SACNet) -> list[Stage[SACNet, Critic, Dice]]:
        """A step of the critics; then one of policies and temperatures, with the new critics."""
        optim = self.config.optim
        policy = optim.model_copy(update={"lr": self.options.actor_lr or optim.lr})
        alpha = optim.model_copy(update={"lr": self.options.temperature_lr or optim.lr})
        return [
            Stage(self.critic_loss, [Group(list(net.critic.parameters()), optim)]),
            Stage(
                self.policy_loss,
                [
                    Group(list(net.actor.parameters()), policy, "actor"),
                    Group([net.log_alpha], alpha, "temperature"),
                ],
                prepare=self.policy_samples,
            ),
        ]

    def dice(self, keys: Tensor, step: Tensor) -> Dice:
        """Noise for the actions at later and at learnt rows, and the choice of target critics."""
        members, critics = self.config.ensemble.members, self.options.critics
        rows = self.config.replay.batch * self.config.rows_of_window.learnt
        shape = (2, members, rows, self.spec.actions)
        normal = draw.normal(keys, draw.POLICY, step, shape)
        some = 0 < self.options.target_critics < critics
        subset = draw.uniform(keys, draw.SUBSET, step, (members, critics)) if some else None
        return Dice(normal[:, 0], normal[:, 1], subset)

    def act(
        self,
        net: SACNet,
        seen: ActInput,
        carry: Carry,
        *,
        noise: Noise,
        evaluating: Sequence[str] | None = None,
    ) -> Decision:
        """Actions sampled from the acting members' policies; `mean` averages those of all members.

        While evaluating, diversity is the unbiased variance of actions across members, averaged
        over action components; a member's action is the mean of its K samples. It is 0 for a single
        member.
        """
        x, critics = net.step(seen, carry, evaluating=evaluating is not None)
        mean, log_std = net.actor(x)
        mean, log_std = mean.transpose(1, 2), log_std.transpose(1, 2)  # [S, E, N, A]
        members = mean.shape[2]
        mine = seen.member.clamp(max=members - 1)
        zero = torch.zeros_like(seen.start, dtype=torch.float32)
        if evaluating is None:
            taken, log_p = sampled(_of(mean, mine), _of(log_std, mine), noise.normal[:, :, 0, 0])
            action = torch.where(noise.explore.unsqueeze(-1), noise.action, taken)
            value, bonus = self._worth(net, critics, action, log_p, mine, noise.explore)
            return Decision(action, value, bonus, diversity=zero)
        samples = torch.tanh(mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise.normal)
        first = samples[:, :, 0]  # [S, E, N, A]
        together = (seen.member >= members).unsqueeze(-1)
        taken = torch.where(together, first.mean(2), _of(first, mine))
        action = torch.where(noise.explore.unsqueeze(-1), noise.action, taken)
        spread = samples.mean(2).var(2).mean(-1) if members > 1 else zero
        own_std, normal = _of(log_std, mine), _of(noise.normal[:, :, 0], mine)
        log_p = density(_of(mean, mine) + own_std.exp() * normal, own_std, normal)
        value, bonus = self._worth(net, critics, action, log_p, mine, noise.explore)
        return Decision(action, value, bonus, diversity=spread)

    def _worth(
        self,
        net: SACNet,
        seen: Tensor,
        action: Tensor,
        log_p: Tensor,
        member: Tensor,
        explore: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The acting members' values of their actions, and the entropy bonus of this step.

        Args:    seen, the critics' features [S, 1 or N, E, D]; action [S, E, A]; log_p, member,
                 explore [S, E].
        Returns: value, bonus [S, E]; a random action has no bonus.
        """
        value = self._value(net.critic(seen, action.unsqueeze(1), 1)[..., 0])  # [S, N, E]
        value = value.gather(1, member.unsqueeze(1))[:, 0]
        if not self.options.backup_entropy:
            return value, torch.zeros_like(value)
        alpha = net.log_alpha[..., 0].exp().gather(1, member)
        return value, torch.where(explore, 0.0, -alpha * log_p)

    @torch.no_grad()
    def judge(self, net: SACNet, seen: ActInput, carry: Carry) -> Tensor:
        """The acting members' values of their policies' modes, [S, E, 1]; writes `carry`."""
        x, critics = net.step(seen, carry, evaluating=False)
        mean, _ = net.actor(x)
        mode = torch.tanh(mean).transpose(1, 2)  # [S, E, N, A]
        q = net.critic(critics, _of(mode, seen.member).unsqueeze(1), 1)[..., 0]  # [S, N, C, E]
        return self._value(q).gather(1, seen.member.unsqueeze(1)).transpose(1, 2)

    def critic_loss(
        self,
        net: SACNet,
        target: Critic,
        window: Window,
        *,
        mask: Tensor | None,
        dice: Dice,
        prepared: None = None,
    ) -> Losses:
        """Loss of the first stage (`cerl.agent.StageLoss`): the sum over critics and heads.

        The error of a row is the mean over a member's critics.
        """
        batch = self.batch(net, window)
        batch = batch._replace(weight=masked(batch.weight, mask))
        losses = self.critic_losses(net, target, batch, dice)
        metrics = {
            "loss": losses.heads[..., 0].detach().mean(2),
            "q_data": losses.q[..., 0].detach().mean((2, 3)),
        }
        members = losses.heads.sum((2, 3))
        if not self.config.replay.sampler.wants_errors:
            return Losses(members, metrics)
        error = (losses.q - losses.target.unsqueeze(2)).abs().mean(2)  # [S, N, rows, J]
        error = error.unflatten(2, batch.action.shape[2:4])
        errors = returns.row_errors(error, batches=window.weight.shape[1])
        return Losses(members, metrics, errors)

    def critic_losses(self, net: SACNet, target: Critic, batch: Batch, dice: Dice) -> CriticLosses:
        """(Q(s, a) - y)^2 with y = r + gamma^k V'(s'), for every head of every critic."""
        options, device = self.options, batch.action.device
        valued = partial(self.next_values, net, target, batch, dice)
        q, ((later, trust),) = parallel(device, partial(self._values, net, batch), valued)
        y = torch.addcmul(batch.reward.flatten(2, 3), batch.discount.flatten(2, 3), later)
        delta = options.huber_delta if options.loss == "mse_huber" else 0.0
        weight = batch.weight.flatten(2)  # [S, M, rows]
        if trust is None:
            heads = sac.regression(q, y, weight, delta=delta)
        else:
            trusted = sac.normalised(weight).unsqueeze(-1) * trust  # [S, N, rows, J]
            each = sac.errors(q, y, delta=delta)  # [S, N, C, rows, J]
            heads = (each * trusted.unsqueeze(2)).sum(3)
        if self.config.replay.sampler.wants_errors:
            # Weights of a sampler lower the loss, as in `returns.averaging`; the regression divides
            # by their sum instead of the number of rows.
            rows = (weight > 0).sum(2).clamp(min=1)
            heads = heads * (weight.sum(2).clamp(min=1.0) / rows)[..., None, None]
        return CriticLosses(heads, q, y)

    def _values(self, net: SACNet, batch: Batch) -> Tensor:
        """Values of the actions taken, [S, N, C, rows, J]."""
        (x,) = net.critic.look(batch.window, batch.now)
        return net.critic(x, batch.action.flatten(2, 3), self.table.heads)

    @torch.no_grad()
    def next_values(
        self, net: SACNet, target: Critic, batch: Batch, dice: Dice
    ) -> tuple[Tensor, Tensor | None]:
        """V'(s') = min over critics of Q'(s', a') - alpha log pi(a' | s'), with a' of the policies.

        Returns: V' of every head [S, N, rows, J]; weights of the rows [S, N, rows, J], which are
                 smaller where critics of different members disagree, or None if
                 agent.spread_temperature is 0.
        Source:  Haarnoja et al. 2018, equation 3; weights: Lee et al. 2021, equation 5.
        """
        options = self.options
        (x,) = net.actor.look(batch.window, batch.later)
        (seen,) = target.look(batch.window, batch.later)
        action, log_p = net.actor.sample(x, dice.later)  # [S, N, rows, A], [S, N, rows]
        heads = self.table.value_heads
        if self.crossed:
            q = target.crossed(seen, action, heads)  # [S, N, C, K, rows, heads], K is N
        else:
            q = target(seen, action, heads).unsqueeze(3)  # K is 1, the member's own action
        if dice.critics is not None:
            chosen = dice.critics.topk(options.target_critics, dim=2).indices
            q = q.gather(2, chosen[..., None, None, None].expand(-1, -1, -1, *q.shape[3:]))
        q = soft = q.amin(2)  # [S, N, K, rows, heads]
        if options.backup_entropy:
            # Axis K holds the actions of all members, or only the action of the critics' owner.
            actor = 1 if self.crossed else 2
            alpha, log_p = (x.unsqueeze(actor) for x in (net.log_alpha.exp(), log_p))
            soft = torch.addcmul(q, alpha.unsqueeze(-1), log_p.unsqueeze(-1), value=-1)
        value = next_action_values(self.table, soft)
        if not options.spread_temperature:
            return value, None
        # How much the members' critics disagree about the action of each member.
        spread = q[..., 0].std(1, correction=0)  # [S, N, rows]
        weight = sigmoid(-options.spread_temperature * spread) + 0.5
        return value, of_choosers(self.table, weight)

    def policy_loss(
        self,
        net: SACNet,
        target: Critic,
        window: Window,
        *,
        mask: Tensor | None,
        dice: Dice,
        prepared: Samples | None = None,
    ) -> Losses:
        """Loss of the second stage (`cerl.agent.StageLoss`); the critics get no gradient of it."""
        samples = prepared or self.policy_samples(net, window, dice)
        samples = samples._replace(weight=masked(samples.weight, mask))
        losses = self.policy_losses(net, window, samples)
        metrics = {
            "q_pi": losses.value,
            "actor_loss": losses.actor.detach(),
            "temperature_loss": losses.temperature.detach(),
            "entropy": losses.entropy,
            "alpha": net.log_alpha[..., 0].detach().exp(),
        }
        return Losses(losses.actor + losses.temperature, metrics)

    def policy_samples(self, net: SACNet, window: Window, dice: Dice) -> Samples:
        """Actions of all policies at the learnt rows.

        They do not depend on the critics, so that a GPU can compute them beside the critics' step.
        """
        reader, n = net.reader, self.config.loss.n_step
        now, weight = returns.learnt(window, first=reader.context, n=n, begins=reader.begins)
        return self.samples(net, window, now, weight, dice)

    def samples(
        self, net: SACNet, window: Window, now: Tensor, weight: Tensor, dice: Dice
    ) -> Samples:
        """Actions of all policies at rows `now` [S, M, B, T] of the window, with their weights."""
        (x,) = net.actor.look(window, now)
        return Samples(now, weight, *net.actor.sample(x, dice.now))

    def policy_losses(self, net: SACNet, window: Window, samples: Samples) -> PolicyLosses:
        """Losses of policies, alpha log pi(a | s) - Q(s, a), and of temperatures.

        Q is the value of the member's own head. The temperature's loss is alpha (entropy - goal),
        which keeps the entropy, the mean of -log pi, near its goal. `cerl.kernels.sac.objective`
        defines both losses.

        Source: Haarnoja et al. 2018, equations 7 and 18.
        """
        with torch.no_grad():
            (seen,) = net.critic.look(window, samples.now)
        q = net.critic(seen, samples.action, 1, frozen=True).squeeze(-1)  # [S, N, C, rows]
        losses = sac.objective(
            q,
            samples.log_p,
            net.log_alpha,
            samples.weight.flatten(2),
            goal=self.options.target_entropy * self.spec.actions,
            mean=self.options.actor_value == "mean",
        )
        return PolicyLosses(*losses)

    def activations(self, net: SACNet, window: Window) -> list[Tensor]:
        """Outputs of the hidden layers of every member's first critic, convolutions first."""
        batch = self.batch(net, window)
        (x,) = net.critic.reader.look(window, batch.now)
        return net.critic.activations(x, batch.action.flatten(2, 3))

    def measures(self, net: SACNet, target: Critic, window: Window, dice: Dice) -> Metrics:
        """How wrong the members' values are, how far off-policy the rows are, how members differ.

        Returns: td_error, mean |target - value of the action taken| over rows and critics, and
                 log_prob, mean log-density of the action taken under the member's own policy, both
                 also over the rows that the member acted in (`_own`) and over all others
                 (`_others`; NaN where the batch has no such row); target_value, mean target;
                 auxiliary_loss, mean loss of the heads that are not the member's own, if there are
                 any. With several members also action_variance, the diversity as in `act` from one
                 sample a member, the same number for all members, and value_spread [S], the
                 deviation of the members' values of the action taken.
        """
        batch, members = self.batch(net, window), self.config.ensemble.members
        (x,) = net.actor.look(batch.window, batch.now)
        mean, log_std = net.actor(x)
        log_p = log_probability(mean, log_std, batch.action.flatten(2, 3))  # [S, N, rows]
        losses, weight = self.critic_losses(net, target, batch, dice), batch.weight.flatten(2)
        q, goal = losses.q[..., 0], losses.target[..., 0]  # [S, N, C, rows], [S, N, rows]
        own = own_rows(window, batch, members=members, context=net.reader.context)
        found = by_owner("log_prob", log_p, weight, own)
        found |= by_owner("td_error", (goal.unsqueeze(2) - q).abs().mean(2), weight, own)
        found["target_value"] = row_mean(goal, weight.expand_as(goal))
        if losses.heads.shape[-1] > 1:
            found["auxiliary_loss"] = losses.heads[..., 1:].mean((2, 3))
        if members > 1:
            actions, _ = sampled(mean, log_std, dice.now)
            spread = row_mean(actions.var(1).mean(-1).unsqueeze(1), weight)
            found["action_variance"] = spread.expand(-1, members)
            found["value_spread"] = value_spread(self._value(q), weight)
        return found

    def _value(self, q: Tensor) -> Tensor:
        """Members' values [S, N, rows] from those of their C critics [S, N, C, rows]."""
        return q.mean(2) if self.options.actor_value == "mean" else q.amin(2)

    def batch(self, net: SACNet, window: Window) -> Batch:
        """Learnt rows, their n-step returns and the later rows that these bootstrap from."""
        reader = net.reader
        return returns.batch(
            window,
            first=reader.context,
            n=self.config.loss.n_step,
            gamma=self.table.gamma,
            begins=reader.begins,
        )


def _of(values: Tensor, member: Tensor) -> Tensor:
    """Selects members: values [S, E, N, A], member [S, E] -> [S, E, A]."""
    index = member[..., None, None].expand(-1, -1, 1, values.shape[3])
    return values.gather(2, index)[:, :, 0]
