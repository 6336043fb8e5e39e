"""Double DQN and its ensembles: Bootstrapped DQN, layer sharing, CERL, tandem, multi-horizon, MICo.

One network, one acting rule, one loss; which of them it is depends on sizes and on the head table
(`cerl/heads.py`). Lin et al. 2024 (arXiv:2405.04342); van Hasselt et al. 2016 for the double
target. Stateless: everything that changes lives in the network, the carry and the counters of the
callers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cerl import returns
from cerl.agent import Decision, Group, Metrics, Stage
from cerl.config import Config, DqnConfig, FramesConfig, ValueOptions, of_kind
from cerl.data import Carry, EnvSpec, Previous, Window
from cerl.explore import Noise
from cerl.heads import HeadTable, head_table, next_values
from cerl.kernels.runtime.streams import parallel
from cerl.nets import carry as carries
from cerl.nets.frames import Encoder, convolutions
from cerl.nets.layers import Conv, ForkedHeads, Heads, Linear, initialise, scale_gradient
from cerl.nets.tokens import Tokens, Whole, make_trunk, read
from cerl.nets.trunk import Trunk
from cerl.transition import Transition, masked, transition


class QNet(nn.Module):
    """Convolutions or trunk, hidden layers and J value heads of every member.

    A head has `atoms` numbers per action.
    """

    def __init__(
        self, config: Config, spec: EnvSpec, *, seeds: int, heads: int, atoms: int
    ) -> None:
        super().__init__()
        net, ensemble = config.net, config.ensemble
        options = of_kind(config.agent, ValueOptions)
        self.actions, self.atoms, self.heads = spec.actions, atoms, heads
        self.feature_norm = options.feature_norm
        frames = config.encoder if isinstance(config.encoder, FramesConfig) else None
        below = len(net.channels) if frames else 1
        depth = below + len(net.hidden)
        self.shared = ensemble.shared_layers
        members = [1 if k < self.shared else ensemble.members for k in range(depth + 1)]
        if not options.gradient_scale:
            self.share_scale = self.fork_scale = 1.0
        else:
            self.share_scale = 1.0 / ensemble.members
            self.fork_scale = 1.0 / heads
        if frames:
            self.encoder, self.trunk = Encoder(net, spec, frames=frames.frames), None
            self.convs, width = convolutions(
                net, spec, seeds=seeds, layer_members=members, frames=frames.frames
            )
        else:
            self.encoder, self.convs = Tokens(config, spec), nn.ModuleList()
            sizes = {"seeds": seeds, "members": members[0]}
            self.trunk = make_trunk(config, spec, self.encoder, **sizes)
            width = self.trunk.width
        self.hidden = nn.ModuleList()
        forked = ensemble.fork == "both" and heads > 1
        for k, size in enumerate(net.hidden[:-1] if forked else net.hidden, below):
            self.hidden.append(Linear(seeds, members[k], width, size))
            width = size
        out, bias = spec.actions * atoms, options.shared_bias
        if forked:
            self.final: Heads | ForkedHeads = ForkedHeads(
                seeds,
                members[-1],
                width,
                hidden=net.hidden[-1],
                heads=heads,
                width=out,
                shared_bias=bias,
            )
        else:
            self.final = Heads(seeds, members[-1], width, heads=heads, width=out, shared_bias=bias)

    def read(self, *wanted: Tensor | Whole) -> list[Tensor]:
        """Inputs of `layers` at the wanted rows (`cerl.nets.tokens.read`)."""
        found = read(self.encoder, self.trunk, *wanted)
        if self.trunk is not None and self.shared == 1:
            found[0] = scale_gradient(found[0], self.share_scale)
        return found

    def layers(self, x: Tensor) -> list[Tensor]:
        """Activations after every ReLU, in order; gradients scaled where layers fork."""
        outputs: list[Tensor] = []
        below = 0 if self.trunk is None else 1
        for layer in [*self.convs, *self.hidden]:
            if isinstance(layer, Linear) and x.dim() > 4:
                x = x.flatten(3)
            x = layer(x, relu=True) if isinstance(layer, Conv) else F.relu(layer(x))
            if below + len(outputs) + 1 == self.shared:
                x = scale_gradient(x, self.share_scale)
            outputs.append(x)
        return outputs

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the convolutions, and what the heads fork from, both [S, M or N, rows, D]."""
        outputs = self.layers(x)
        convs = len(self.convs)
        encoded = (outputs[convs - 1] if convs else x).flatten(3)
        return encoded, (outputs[-1] if outputs else x).flatten(3)

    def values(self, features: Tensor, heads: int) -> Tensor:
        """Values of the first `heads` heads [S, N, rows, heads, A], or [..., A, atoms]."""
        features = scale_gradient(features, self.fork_scale)
        if isinstance(self.final, ForkedHeads):
            q = self.final.output(self._normed(self.final.features(features, heads)))
        else:
            q = self.final(self._normed(features), heads)
        return q.unflatten(-1, (self.actions, self.atoms)) if self.atoms > 1 else q

    def trunks(self, evaluating: bool) -> list[Trunk]:
        """Those that act; none without memory."""
        return [] if self.trunk is None else [self.trunk]

    def _normed(self, features: Tensor) -> Tensor:
        if not self.feature_norm:
            return features
        return features / (features.norm(dim=-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor, heads: int) -> Tensor:
        """Values of what `read` or acting gave, x [S, M, rows, ...]."""
        return self.values(self.features(x)[1], heads)


class ValueKind(NamedTuple):
    """What a network's output says about a value: the number itself, or a distribution."""

    atoms: int  # numbers per action
    mean: Callable[
        [Tensor], Tensor
    ]  # output [..., atoms] (or [...] where atoms is 1) -> value [...]
    error: Callable[[Tensor, Tensor], Tensor]  # prediction, target -> loss [...] without atoms


def scalar_value(agent: DqnConfig) -> ValueKind:
    """Expected values with Huber or squared error (`mse` without the 1/2, as the original's)."""

    def error(q: Tensor, target: Tensor) -> Tensor:
        if agent.loss == "mse":
            return (q - target).square()
        return returns.huber(q - target, delta=agent.huber_delta)

    return ValueKind(1, lambda q: q, error)


class Values(NamedTuple):
    """What the loss of a batch is made of."""

    q: Tensor  # [S, N, B, T, J, A, *atoms]
    taken: Tensor  # [S, N, B, T, J, *atoms] of the action taken
    target: Tensor  # [S, N, B, T, J, *atoms]
    encoded: Tensor  # [S, N or 1, B * T, D] output of the convolutions, or the inputs


class DQN:
    """Agent of `config`: build, act, loss (`cerl/agent.py`)."""

    def __init__(
        self, config: Config, spec: EnvSpec, *, kind: ValueKind, device: torch.device | str
    ) -> None:
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.options = of_kind(config.agent, ValueOptions)
        self.kind = kind
        self.table: HeadTable = head_table(
            config.ensemble, gamma=config.loss.gamma, device=self.device
        )
        names = ("loss", "q_data", "q_pi")
        self.metrics: tuple[str, ...] = names
        if self.options.mico_weight:
            self.metrics = (*names, "mico_loss")

    def build(self, *, keys: Tensor) -> QNet:
        """A freshly initialised network for the seeds of `keys` [S]."""
        net = QNet(
            self.config, self.spec, seeds=len(keys), heads=self.table.heads, atoms=self.kind.atoms
        ).to(self.device)
        initialise(net, keys=keys.to(self.device), scheme=self.config.net.init)
        return net

    def followed(self, net: QNet) -> QNet:
        """The target network is a copy of the whole."""
        return net

    def stages(self, net: QNet) -> list[Stage]:
        """One step of all parameters."""
        return [Stage(self.loss, [Group(list(net.parameters()), self.config.optim)])]

    def dice(self, keys: Tensor, step: Tensor) -> None:
        """The loss draws nothing."""

    def act(
        self,
        net: QNet,
        obs: Tensor,
        start: Tensor,
        carry: Carry,
        member: Tensor,
        *,
        noise: Noise,
        previous: Previous | None = None,
        evaluating: Sequence[str] | None = None,
    ) -> Decision:
        """Epsilon-greedy actions of the members on duty; first-index ties.

        Args:    obs [S, E, *observation]; start [S, E] bool; member [S, E] in [0, N), or N + k for
                 the k-th of `evaluating` ("vote": the most voted greedy action, ties broken
                 uniformly; "mean": the greedy action of the mean Q); None while training.
        """
        (x,) = carries.step(
            self.config,
            net,
            obs,
            start,
            carry,
            member,
            previous=previous,
            evaluating=evaluating is not None,
        )
        envs, members = obs.shape[1], self.config.ensemble.members
        zero = torch.zeros_like(start, dtype=torch.float32)
        entropy = zero
        if evaluating is None and 3 * envs < members and len(net.convs) > 0:
            value, greedy = self._gathered(net, x, member).max(-1)  # [S, E]
        else:
            q = self.kind.mean(net(x, 1).squeeze(3))  # [S, N, E, A]
            best, arg = q.max(-1)
            mine = member.clamp(max=members - 1).unsqueeze(1)
            greedy, value = arg.gather(1, mine)[:, 0], best.gather(1, mine)[:, 0]
            if evaluating is not None:
                votes = F.one_hot(arg, self.spec.actions).sum(1).float()  # [S, E, A]
                entropy = torch.special.entr(votes / members).sum(-1)
                for k, name in enumerate(evaluating):
                    score = votes + 0.5 * noise.tie if name == "vote" else q.mean(1)
                    greedy = torch.where(member == members + k, score.argmax(-1), greedy)
        action = torch.where(noise.explore, noise.action, greedy)
        return Decision(action, value, bonus=zero, diversity=entropy)

    @torch.no_grad()
    def judge(
        self,
        net: QNet,
        obs: Tensor,
        start: Tensor,
        previous: Previous,
        carry: Carry,
        member: Tensor,
    ) -> Tensor:
        """Values of all actions for the members on duty, [S, E, A]."""
        (x,) = carries.step(
            self.config, net, obs, start, carry, member, previous=previous, evaluating=False
        )
        q = self.kind.mean(net(x, 1).squeeze(3))  # [S, N, E, A]
        return q.gather(1, member[:, None, :, None].expand(-1, 1, -1, q.shape[3]))[:, 0]

    def _gathered(self, net: QNet, x: Tensor, member: Tensor) -> Tensor:
        """Only the weights of the member on duty are read: [S, N, ...] -> [S, E, ...]."""
        leaves = {}
        for name, leaf in net.named_parameters():
            if leaf.shape[1] > 1:
                index = member.view(*member.shape, *([1] * (leaf.dim() - 2)))
                leaf = leaf.gather(1, index.expand(*member.shape, *leaf.shape[2:]))
            leaves[name] = leaf
        q = functional_call(net, leaves, (x.transpose(1, 2), 1))  # [S, E, 1, 1, A, ...]
        return self.kind.mean(q.squeeze(3)).squeeze(2)

    def transition(self, net: QNet, window: Window) -> Transition:
        """Learnt rows, their n-step return and the rows that bootstrap it."""
        return transition(net.encoder, window, n=self.config.loss.n_step, gamma=self.table.gamma)

    def targets(self, batch: Transition, value: Tensor, choose: Tensor) -> Tensor:
        """What every head regresses to.

        Args:    value [S, N, B * T, heads, A, *rest] of the target network at the bootstrap rows;
                 choose [S, N, B * T, heads, A], whose argmax is the next action.
        Returns: [S, N, B, T, J, *rest], detached.
        """
        shape = batch.action.shape[2:]
        with torch.no_grad():
            later = next_values(self.table, choose.unflatten(2, shape), value.unflatten(2, shape))
            rest = [1] * (later.dim() - 5)
            reward = batch.reward.view(*batch.reward.shape, *rest)
            return reward + batch.discount.view(*batch.discount.shape, *rest) * later

    def head_losses(self, net: QNet, target: QNet, batch: Transition) -> tuple[Tensor, Values]:
        """Mean loss of every head over the batch [S, N, J] and the values behind it."""
        table, shape = self.table, batch.action.shape[2:]

        # A sequence network reads a window once and so knows the next rows with the learnt ones.
        double, apart = self.options.double, net.trunk is None

        def now() -> tuple[Tensor, Tensor, Tensor | None]:
            x, *ahead = net.read(batch.x) if apart else net.read(batch.x, batch.x_next)
            encoded, features = net.features(x)
            q = net.values(features, table.heads).unflatten(2, shape)
            return encoded, q, choice(ahead[0]) if ahead and double else None

        @torch.no_grad()
        def choice(x_next: Tensor) -> Tensor:
            return self.kind.mean(net(x_next, table.action_heads))

        @torch.no_grad()
        def valued() -> Tensor:
            return target(*target.read(batch.x_next), table.value_heads)

        def chosen() -> Tensor:
            return choice(*net.read(batch.x_next))

        others = (valued, chosen) if double and apart else (valued,)
        (encoded, q, choose), later = parallel(batch.action.device, now, *others)
        if choose is None:
            choose = later[1] if double else self.kind.mean(later[0])
        y = self.targets(batch, later[0], choose[..., : table.action_heads, :])
        index = batch.action.view(*batch.action.shape, 1, 1, *([1] * (q.dim() - 6)))
        index = index.expand(*q.shape[:5], 1, *q.shape[6:])
        taken = q.gather(5, index).squeeze(5)  # [S, N, B, T, J, *rest]
        weight = batch.weight / batch.weight.sum((2, 3), keepdim=True).clamp(min=1.0)
        losses = (self.kind.error(taken, y) * weight.unsqueeze(-1)).sum((2, 3))
        return losses, Values(q, taken, y, encoded)

    def loss(
        self,
        net: QNet,
        target: QNet,
        window: Window,
        mask: Tensor | None = None,
        dice: None = None,
    ) -> tuple[Tensor, Metrics]:
        """Loss of every member and what the originals log.

        Args:    window with context + T + n rows; mask [S, N, B] or [S, N, B, T] float32, rows
                 that a member learns from; None: all.
        Returns: loss [S, N], summed over heads; metrics {name: [S, N]}, detached.
        """
        batch = self.transition(net, window)
        if mask is not None:
            batch = batch._replace(weight=masked(batch.weight, mask))
        losses, values = self.head_losses(net, target, batch)
        return self.member_losses(net, target, batch, losses, values)

    def member_losses(
        self, net: QNet, target: QNet, batch: Transition, losses: Tensor, values: Values
    ) -> tuple[Tensor, Metrics]:
        """What `loss` returns, from the losses of the heads: their sum, with MICo where asked."""
        loss, weight = losses.sum(-1), self.options.mico_weight
        metrics = {
            "loss": losses[..., 0].detach(),
            "q_data": self.kind.mean(values.taken.detach())[..., 0].mean((2, 3)),
            "q_pi": self.kind.mean(values.q.detach())[..., 0, :].max(-1)[0].mean((2, 3)),
        }
        if weight:
            # Layers shared above the convolutions scale only what passes them: repeat it here.
            above = net.shared > len(net.convs)
            scale = net.fork_scale * (net.share_scale if above else 1.0)
            metric = mico(
                scale_gradient(values.encoded, scale),
                *(target.features(*target.read(x))[0].detach() for x in (batch.x, batch.x_next)),
                reward=batch.reward[..., 0].flatten(2),
                weight=batch.weight.flatten(2),
                gamma=self.config.loss.gamma**self.config.loss.n_step,
                beta=self.options.mico_beta,
            )
            # Shared layers have one metric loss, spread so that the members' sum holds it once.
            loss = (1.0 - weight) * loss + weight * metric * (metric.shape[1] / loss.shape[1])
            metrics["mico_loss"] = metric.detach().expand_as(loss)
        return loss, metrics

    def activations(self, net: QNet, window: Window) -> list[Tensor]:
        """Outputs of the hidden layers, the fork's for the member's own head."""
        (x,) = net.read(self.transition(net, window).x)
        outputs = net.layers(x)
        if isinstance(net.final, ForkedHeads):
            below = (outputs[-1] if outputs else x).flatten(3)
            outputs.append(net.final.features(below, 1)[:, :, 0])
        return outputs

    def measures(self, net: QNet, window: Window, dice: None) -> Metrics:
        """Nothing beyond what every agent has."""
        return {}


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

    U(x, y) = (|x|^2 + |y|^2) / 2 + beta angle(x, y) between online features and the target
    network's is pulled, by Huber, towards |r_x - r_y| + gamma U(x', y') of the target network, over
    all pairs.

    Args:    features [S, N or 1, B, D]; reward, weight [S, M, B].
    Returns: [S, N or 1], mean over pairs.
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
