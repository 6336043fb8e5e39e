"""Soft actor-critic and its ensembles: SAC, Ensemble SAC, CERL, tandem, REDQ, weighted backups.

Every member has a policy, C critics and a temperature of its own. Under CERL the critics have J
heads that regress to the other members' targets (`cerl/heads.py`); policies only ever see a
member's own head. Haarnoja et al. 2018 (arXiv:1812.05905); Lin et al. 2024 (arXiv:2405.04342),
whose code sums the losses of heads without the gradient scaling of the discrete agents; Chen et al.
2021 (REDQ, arXiv:2101.05982); Lee et al. 2021 (SUNRISE, arXiv:2007.04938) for the weights.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl import draw
from cerl.agent import Decision, Group, Metrics, Stage
from cerl.config import Config, FramesConfig, NetConfig, SacConfig, of_kind
from cerl.data import Carry, EnvSpec, Previous, Window
from cerl.explore import Noise
from cerl.heads import HeadTable, head_table, next_action_values, of_actors
from cerl.kernels import sac
from cerl.kernels.mlp import fits, mlp
from cerl.kernels.pointwise import atanh, sigmoid
from cerl.kernels.runtime.streams import parallel
from cerl.kernels.sac import density, sampled
from cerl.nets import carry as carries
from cerl.nets.frames import Encoder, convolutions, see
from cerl.nets.layers import Critics, LayerNorm, Linear, initialise
from cerl.nets.tokens import Tokens, Whole, make_trunk, read
from cerl.nets.trunk import Trunk
from cerl.transition import Transition, learnt, masked, transition


class Eyes(NamedTuple):
    """What a policy or the critics of a member see rows by, before their hidden layers."""

    convs: nn.ModuleList  # of a network without memory
    trunk: Trunk | None
    width: int  # features of a row


class Actor(nn.Module):
    """Hidden layers, mean and log standard deviation of every member's policy before the tanh."""

    def __init__(
        self,
        net: NetConfig,
        eyes: Eyes,
        *,
        options: SacConfig,
        seeds: int,
        members: int,
        actions: int,
    ) -> None:
        super().__init__()
        self.convs, self.trunk, width = eyes
        self.clip = options.log_std == "clip"
        self.low, self.high = options.log_std_min, options.log_std_max
        self.hidden = nn.ModuleList()
        for size in net.hidden:
            self.hidden.append(Linear(seeds, members, width, size))
            width = size
        # One layer, of A means and A log deviations, so that one product computes both.
        self.moments = Linear(seeds, members, width, 2 * actions)
        self.moments.gain, self.moments.fan_out = (math.sqrt(2.0), 1.0), actions
        self.fused = fits(net.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [S, M, rows, D] -> mean and log standard deviation [S, N, rows, A]."""
        return sac.moments(self.raw(x), low=self.low, high=self.high, clip=self.clip)

    def sample(self, x: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [S, N, rows, A] and their log-probabilities [S, N, rows].

        Args: x [S, M, rows, D]; normal [S, N, rows, A], standard normal noise.
        """
        return sac.squashed(self.raw(x), normal, low=self.low, high=self.high, clip=self.clip)

    def raw(self, x: Tensor) -> Tensor:
        """What the last layer puts out [S, N, rows, 2 A]."""
        if self.fused:
            layers = [*self.hidden, self.moments]
            return mlp(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.moments(x)


class Critic(nn.Module):
    """C critics of every member on observation and action, with J value heads each.

    The critics of a member see by the same convolutions or trunk.
    """

    def __init__(
        self,
        net: NetConfig,
        eyes: Eyes,
        *,
        options: SacConfig,
        seeds: int,
        members: int,
        actions: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.convs, self.trunk, width = eyes
        width += actions
        lead = (seeds, members, options.critics)
        self.hidden, self.norms = nn.ModuleList(), nn.ModuleList()
        for size in net.hidden:
            self.hidden.append(Critics(*lead, width, size))
            if options.critic_norm != "none":
                self.norms.append(LayerNorm(*lead, size, affine=options.critic_norm == "layer"))
            width = size
        self.final = Critics(*lead, width, heads)
        self.fused = fits(net.hidden) and not self.norms

    def layers(self, x: Tensor, action: Tensor) -> list[Tensor]:
        """Inputs, then activations after every ReLU [S, N, C, rows, D].

        Args: x [S, M, rows, D]; action [S, 1 or N, rows, A].
        """
        x = x.expand(-1, max(x.shape[1], action.shape[1]), -1, -1)
        action = action.expand(-1, x.shape[1], -1, -1)
        outputs = [torch.cat([x, action], -1).unsqueeze(2)]
        for k, layer in enumerate(self.hidden):
            y = layer(outputs[-1])
            outputs.append(F.relu(self.norms[k](y) if self.norms else y))
        return outputs

    def forward(self, x: Tensor, action: Tensor, heads: int, *, frozen: bool = False) -> Tensor:
        """Values of the first `heads` heads [S, N, C, rows, heads].

        Args: x, action as in `layers`; frozen, nobody asks for the gradient of the critics'
              parameters, and a fused perceptron keeps nothing for it.
        """
        if not self.fused:
            return self.final(self.layers(x, action)[-1], heads)
        layers = [*self.hidden, self.final]
        weights, biases = ([getattr(k, name) for k in layers] for name in ("weight", "bias"))
        if frozen:
            weights, biases = ([leaf.detach() for leaf in leaves] for leaves in (weights, biases))
        weights[-1], biases[-1] = weights[-1][..., :heads], biases[-1][..., :heads]
        return mlp(x.unsqueeze(2), weights, biases, tail=action.unsqueeze(2))


class SACNet(nn.Module):
    """Policies, critics and log temperatures [S, N, 1] of all members.

    Policies and critics have convolutions or a trunk each, as each has its optimiser, and the
    critics' are followed by their targets: twice the parameters and the acting of one, and five
    runs over a window in an update, two with gradients (a value network: two and one).
    """

    def __init__(self, config: Config, spec: EnvSpec, *, seeds: int, heads: int) -> None:
        super().__init__()
        net, members = config.net, config.ensemble.members
        options, encoder = of_kind(config.agent, SacConfig), config.encoder
        if isinstance(encoder, FramesConfig):
            self.encoder = Encoder(net, spec, frames=encoder.frames)
        else:
            self.encoder = Tokens(config, spec)
        sizes = {"seeds": seeds, "members": members, "actions": spec.actions}
        self.actor = Actor(net, self._eyes(config, spec, seeds), options=options, **sizes)
        self.critic = Critic(
            net, self._eyes(config, spec, seeds), options=options, **sizes, heads=heads
        )
        start = math.log(options.temperature)
        self.log_alpha = nn.Parameter(torch.full((seeds, members, 1), start))

    def _eyes(self, config: Config, spec: EnvSpec, seeds: int) -> Eyes:
        members = config.ensemble.members
        if isinstance(self.encoder, Tokens):
            trunk = make_trunk(config, spec, self.encoder, seeds=seeds, members=members)
            return Eyes(nn.ModuleList(), trunk, trunk.width)
        lead = [members] * len(config.net.channels)
        frames = of_kind(config.encoder, FramesConfig).frames
        convs, width = convolutions(
            config.net, spec, seeds=seeds, layer_members=lead, frames=frames
        )
        return Eyes(convs, None, width)

    def read(self, part: Actor | Critic, inputs: Tensor | Whole) -> Tensor:
        """Features of a part at the wanted rows, [S, M or N, rows, D]."""
        (x,) = read(self.encoder, part.trunk, inputs)
        return see(part.convs, x)

    def trunks(self, evaluating: bool) -> list[Trunk]:
        """Those that act, the policies' and while training the critics'; none without memory."""
        both = (self.actor.trunk, None if evaluating else self.critic.trunk)
        return [trunk for trunk in both if trunk is not None]


class Dice(NamedTuple):
    """Random numbers of one update."""

    later: Tensor  # [S, N, rows, A] standard normal, of the next actions
    now: Tensor  # [S, N, rows, A] standard normal, of the policies' actions at the learnt rows
    critics: Tensor | None  # [S, N, C] uniform, the largest pick a target's critics; None: all do


class CriticLosses(NamedTuple):
    """What the critics' loss is made of."""

    heads: Tensor  # [S, N, C, J] mean over the batch
    q: Tensor  # [S, N, C, rows, J] values of the actions taken
    target: Tensor  # [S, N, rows, J]


class Samples(NamedTuple):
    """The policies' actions at the learnt rows."""

    inputs: Tensor | Whole  # at those rows; see `cerl.nets.tokens.read`
    action: Tensor  # [S, N, rows, A]
    log_p: Tensor  # [S, N, rows]


class PolicyLosses(NamedTuple):
    """What the policies' and temperatures' loss is made of, means over the batch [S, N]."""

    actor: Tensor
    temperature: Tensor
    entropy: Tensor  # nats, detached
    value: Tensor  # of the policies' actions, detached


def log_probability(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density of actions [..., A] in [-1, 1]; those at the bounds count as just inside."""
    u = atanh(action.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    return density(u, log_std, (u - mean) * (-log_std).exp())


class SAC:
    """Agent of `config`: build, act, the losses of critics and policies (`cerl/agent.py`)."""

    metrics = ("loss", "q_data", "q_pi", "actor_loss", "temperature_loss", "entropy", "alpha")

    def __init__(self, config: Config, spec: EnvSpec, *, device: torch.device | str) -> None:
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.options = of_kind(config.agent, SacConfig)
        self.table: HeadTable = head_table(
            config.ensemble, gamma=config.loss.gamma, device=self.device
        )
        # Every critic is asked about every member's next action.
        self.crossed = self.table.crossed or self.options.spread_temperature > 0

    def build(self, *, keys: Tensor) -> SACNet:
        """A freshly initialised network for the seeds of `keys` [S]."""
        net = SACNet(self.config, self.spec, seeds=len(keys), heads=self.table.heads)
        net = net.to(self.device)
        initialise(net, keys=keys.to(self.device), scheme=self.config.net.init)
        return net

    def followed(self, net: SACNet) -> Critic:
        """Only critics have targets."""
        return net.critic

    def stages(self, net: SACNet) -> list[Stage]:
        """The critics; then policies and temperatures, which see the new critics."""
        optim = self.config.optim
        policy = optim.model_copy(update={"lr": self.options.actor_lr or optim.lr})
        alpha = optim.model_copy(update={"lr": self.options.temperature_lr or optim.lr})
        return [
            Stage(self.critic_loss, [Group(list(net.critic.parameters()), optim)]),
            Stage(
                self.policy_loss,
                [Group(list(net.actor.parameters()), policy), Group([net.log_alpha], alpha)],
                early=self.policy_samples,
            ),
        ]

    def dice(self, keys: Tensor, step: Tensor) -> Dice:
        """Noise of the next and of the present actions, and the choice of target critics."""
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
        obs: Tensor,
        start: Tensor,
        carry: Carry,
        member: Tensor,
        *,
        noise: Noise,
        previous: Previous | None = None,
        evaluating: Sequence[str] | None = None,
    ) -> Decision:
        """Samples of the policies on duty; the aggregate `mean` is the mean of all members'.

        Diversity is the variance across members of an action component, each member's action a mean
        of K samples: unbiased, 0 for a single member.
        """
        x, *others = carries.step(
            self.config,
            net,
            obs,
            start,
            carry,
            member,
            previous=previous,
            evaluating=evaluating is not None,
        )
        mean, log_std = net.actor(see(net.actor.convs, x))
        mean, log_std = mean.transpose(1, 2), log_std.transpose(1, 2)  # [S, E, N, A]
        members = mean.shape[2]
        mine = member.clamp(max=members - 1)
        zero = torch.zeros_like(start, dtype=torch.float32)
        if evaluating is None:
            taken, log_p = sampled(_of(mean, mine), _of(log_std, mine), noise.normal[:, :, 0, 0])
            action = torch.where(noise.explore.unsqueeze(-1), noise.action, taken)
            seen = see(net.critic.convs, others[0] if others else x)
            value = self._value(net.critic(seen, action.unsqueeze(1), 1)[..., 0])  # [S, N, E]
            value = value.gather(1, mine.unsqueeze(1))[:, 0]
            alpha = net.log_alpha[..., 0].exp().gather(1, mine)
            counts = ~noise.explore if self.options.backup_entropy else zero.bool()
            bonus = torch.where(counts, -alpha * log_p, zero)
            return Decision(action, value, bonus, diversity=zero)
        samples = torch.tanh(mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise.normal)
        first = samples[:, :, 0]  # [S, E, N, A]
        together = (member >= members).unsqueeze(-1)
        taken = torch.where(together, first.mean(2), _of(first, mine))
        action = torch.where(noise.explore.unsqueeze(-1), noise.action, taken)
        spread = samples.mean(2).var(2).mean(-1) if members > 1 else zero
        return Decision(action, zero, zero, diversity=spread)

    @torch.no_grad()
    def judge(
        self,
        net: SACNet,
        obs: Tensor,
        start: Tensor,
        previous: Previous,
        carry: Carry,
        member: Tensor,
    ) -> Tensor:
        """Value of the policy's mode for the members on duty, [S, E, 1]."""
        x, *others = carries.step(
            self.config, net, obs, start, carry, member, previous=previous, evaluating=False
        )
        seen = see(net.critic.convs, others[0] if others else x)
        mine = member.unsqueeze(1)
        mean, _ = net.actor(see(net.actor.convs, x))
        mode = torch.tanh(mean).transpose(1, 2)  # [S, E, N, A]
        q = net.critic(seen, _of(mode, member).unsqueeze(1), 1)[..., 0]  # [S, N, C, E]
        return self._value(q).gather(1, mine).transpose(1, 2)

    def next_values(
        self, net: SACNet, target: Critic, batch: Transition, dice: Dice
    ) -> tuple[Tensor, Tensor | None]:
        """Soft value of the next action that every head regresses to, and the weight of its row.

        Returns: [S, N, rows, J] each; the weights are None without `agent.spread_temperature`.
        """
        heads = self.table.value_heads
        x, seen = (net.read(part, batch.x_next) for part in (net.actor, target))
        action, log_p = net.actor.sample(x, dice.later)  # [S, N, rows, A]
        rows = action.shape[2]
        if self.crossed and len(target.convs):  # features of images are too wide to repeat
            each = [target(seen, taken.unsqueeze(1), heads) for taken in action.unbind(1)]
            q = torch.stack(each, 3)
        elif self.crossed:
            actions = action.flatten(1, 2).unsqueeze(1)  # [S, 1, N * rows, A]
            q = target(_repeated(seen, action.shape[1]), actions, heads)
            q = q.unflatten(3, (action.shape[1], rows))
        else:
            q = target(seen, action, heads).unsqueeze(3)  # [S, N, C, K, rows, heads]
        if dice.critics is not None:
            chosen = dice.critics.topk(self.options.target_critics, dim=2).indices
            q = q.gather(2, chosen[..., None, None, None].expand(-1, -1, -1, *q.shape[3:]))
        q = own = q.amin(2)  # [S, N, K, rows, heads]
        alpha = net.log_alpha.exp()  # [S, N, 1]
        if self.options.backup_entropy and not self.crossed:
            own = torch.addcmul(q, alpha[..., None, None], log_p[:, :, None, :, None], value=-1)
        value = next_action_values(self.table, own)
        if self.options.backup_entropy and self.crossed:
            value = value - of_actors(self.table, alpha * log_p)
        if not self.options.spread_temperature:
            return value, None
        # std over the critics' owners; one number for every member's action.
        spread = q[..., 0].std(1, correction=0)  # [S, N, rows]
        weight = sigmoid(-self.options.spread_temperature * spread) + 0.5
        return value, of_actors(self.table, weight)

    def critic_losses(
        self, net: SACNet, target: Critic, batch: Transition, dice: Dice
    ) -> CriticLosses:
        """Regression of all heads of all critics to the soft target of their member."""

        def now() -> Tensor:
            x = net.read(net.critic, batch.x)
            return net.critic(x, batch.action.flatten(2, 3), self.table.heads)

        @torch.no_grad()
        def next_() -> tuple[Tensor, Tensor | None]:
            return self.next_values(net, target, batch, dice)

        q, ((later, trust),) = parallel(batch.action.device, now, next_)
        y = torch.addcmul(batch.reward.flatten(2, 3), batch.discount.flatten(2, 3), later)
        delta = self.options.huber_delta if self.options.loss == "mse_huber" else 0.0
        weight = batch.weight.flatten(2)  # [S, M, rows]
        if trust is None:
            return CriticLosses(sac.regression(q, y, weight, delta=delta), q, y)
        trusted = sac.normalised(weight).unsqueeze(-1) * trust  # [S, N, rows, J]
        each = sac.errors(q, y, delta=delta)  # [S, N, C, rows, J]
        return CriticLosses((each * trusted.unsqueeze(2)).sum(3), q, y)

    def critic_loss(
        self, net: SACNet, target: Critic, window: Window, mask: Tensor | None, dice: Dice
    ) -> tuple[Tensor, Metrics]:
        """First stage. Args as in `cerl/agent.py`. Returns: the sum over critics and heads."""
        batch = transition(net.encoder, window, n=self.config.loss.n_step, gamma=self.table.gamma)
        batch = batch._replace(weight=masked(batch.weight, mask))
        losses = self.critic_losses(net, target, batch, dice)
        metrics = {
            "loss": losses.heads[..., 0].detach().mean(2),
            "q_data": losses.q[..., 0].detach().mean((2, 3)),
        }
        return losses.heads.sum((2, 3)), metrics

    def samples(self, net: SACNet, inputs: Tensor | Whole, dice: Dice) -> Samples:
        """Actions of all policies. Args: inputs at the learnt rows (`cerl.nets.tokens.read`)."""
        return Samples(inputs, *net.actor.sample(net.read(net.actor, inputs), dice.now))

    def policy_losses(self, net: SACNet, samples: Samples, weight: Tensor) -> PolicyLosses:
        """Policies climb the soft value of their own head; temperatures hold their entropy.

        Args: weight of the learnt rows [S, M or N, B, T].
        """
        inputs, action, log_p = samples
        with torch.no_grad():
            seen = net.read(net.critic, inputs)
        q = net.critic(seen, action, 1, frozen=True).squeeze(-1)  # [S, N, C, rows]
        losses = sac.objective(
            q,
            log_p,
            net.log_alpha,
            weight.flatten(2),
            goal=self.options.target_entropy * self.spec.actions,
            mean=self.options.actor_value == "mean",
        )
        return PolicyLosses(*losses)

    def policy_samples(self, net: SACNet, window: Window, dice: Dice) -> tuple[Samples, Tensor]:
        """What of the second stage the critics' step does not move: actions; weights of rows."""
        rows = learnt(net.encoder, window, n=self.config.loss.n_step)
        return self.samples(net, rows.inputs(net.encoder, window), dice), rows.weight

    def policy_loss(
        self,
        net: SACNet,
        target: Critic,
        window: Window,
        mask: Tensor | None,
        dice: Dice,
        early: tuple[Samples, Tensor] | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Second stage, as the first; the critics get no gradient from it."""
        samples, weight = early or self.policy_samples(net, window, dice)
        losses = self.policy_losses(net, samples, masked(weight, mask))
        metrics = {
            "q_pi": losses.value,
            "actor_loss": losses.actor.detach(),
            "temperature_loss": losses.temperature.detach(),
            "entropy": losses.entropy,
            "alpha": net.log_alpha[..., 0].detach().exp(),
        }
        return losses.actor + losses.temperature, metrics

    def activations(self, net: SACNet, window: Window) -> list[Tensor]:
        """Outputs of the hidden layers of every member's first critic, convolutions first."""
        batch = self._transition(net, window)
        (x,) = read(net.encoder, net.critic.trunk, batch.x)
        images = []
        for conv in net.critic.convs:
            x = conv(x, relu=True)
            images.append(x)
        outputs = net.critic.layers(x.flatten(3), batch.action.flatten(2, 3))[1:]
        return [*images, *(output[:, :, 0] for output in outputs)]

    def measures(self, net: SACNet, window: Window, dice: Dice) -> Metrics:
        """Off-policyness and diversity at the replayed states.

        Returns: log_prob, mean log-density of the replayed actions under each member's own policy;
                 log_prob_own and log_prob_others, over what the member generated and what it did
                 not (NaN where the batch has no such row); action_variance, as `act` defines
                 diversity, of one sample each; alike for all members.
        """
        batch = self._transition(net, window)
        mean, log_std = net.actor(net.read(net.actor, batch.x))
        action = batch.action.flatten(2, 3)  # [S, 1, rows, A]
        log_p = log_probability(mean, log_std, action)  # [S, N, rows]
        first, last = net.encoder.context, net.encoder.context + batch.action.shape[3]
        ids = torch.arange(mean.shape[1], device=mean.device).view(1, -1, 1)
        own = window.member[..., first:last].flatten(2) == ids  # [S, N, rows]
        weight = batch.weight.flatten(2).expand_as(log_p)
        result = {"log_prob": _mean(log_p, weight)}
        result["log_prob_own"] = _mean(log_p, weight * own)
        result["log_prob_others"] = _mean(log_p, weight * ~own)
        if mean.shape[1] > 1:
            actions, _ = sampled(mean, log_std, dice.now)
            spread = _mean(actions.var(1).mean(-1).unsqueeze(1), batch.weight.flatten(2))
            result["action_variance"] = spread.expand(-1, mean.shape[1])
        return result

    def _value(self, q: Tensor) -> Tensor:
        """What a member takes its C critics [S, N, C, rows] to say, [S, N, rows]."""
        return q.mean(2) if self.options.actor_value == "mean" else q.amin(2)

    def _transition(self, net: SACNet, window: Window) -> Transition:
        return transition(net.encoder, window, n=self.config.loss.n_step, gamma=self.table.gamma)


def _of(values: Tensor, member: Tensor) -> Tensor:
    """values [S, E, N, A] of the members named, member [S, E] -> [S, E, A]."""
    index = member[..., None, None].expand(-1, -1, 1, values.shape[3])
    return values.gather(2, index)[:, :, 0]


def _repeated(x: Tensor, actions: int) -> Tensor:
    """Rows [S, M, rows, D], once for each member's action, [S, M, actions * rows, D]."""
    return x.unsqueeze(2).expand(-1, -1, actions, -1, -1).flatten(2, 3)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over rows [S, N, rows] -> [S, N]; NaN without weight."""
    return (values * weight).sum(2) / weight.sum(2)
