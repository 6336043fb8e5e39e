"""Double DQN and its ensembles: Bootstrapped DQN, layer sharing, CERL, tandem, multi-horizon, MICo.

All of them are one network, one acting rule and one loss: sizes in the config and the head table
(`cerl/heads.py`) say which algorithm it is. Lin et al. 2024 (arXiv:2405.04342); van Hasselt et al.
2016 for the double target. The agent is stateless: all that changes lives in the network, the carry
and the callers' counters.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cerl import returns
from cerl.agent import Decision, Group, Losses, Metrics, Stage
from cerl.agents.measures import by_owner, own_rows, row_mean, value_spread, vote_disagreement
from cerl.agents.mico import mico
from cerl.agents.values import ValueKind
from cerl.config import Config, ValueOptions, of_kind
from cerl.data import ActInput, Carry, EnvSpec, Window
from cerl.explore import Noise
from cerl.heads import HeadTable, double_q, head_table
from cerl.kernels.pointwise import one_hot
from cerl.kernels.runtime.streams import parallel
from cerl.nets.acting import gathered, worth_gathering
from cerl.nets.layers import Conv, ForkedHeads, Heads, Linear, initialise, scale_gradient
from cerl.nets.reader import sights
from cerl.returns import Batch, masked


class QNet(nn.Module):
    """Convolutions or a trunk, hidden layers and J value heads of every member.

    A head gives `atoms` numbers for every action (`cerl/agents/values.py`).
    """

    def __init__(
        self, config: Config, spec: EnvSpec, *, seeds: int, heads: int, atoms: int
    ) -> None:
        super().__init__()
        net, ensemble = config.net, config.ensemble
        options = of_kind(config.agent, ValueOptions)
        members, shared = ensemble.members, ensemble.shared_layers
        self.actions, self.atoms, self.heads = spec.actions, atoms, heads
        self.feature_norm, self.shared = options.feature_norm, shared
        self.share_scale = 1.0 / members if options.gradient_scale else 1.0
        self.fork_scale = 1.0 / heads if options.gradient_scale else 1.0
        (sight,) = sights(config, spec, seeds=seeds, members=members, shared=shared)
        self.reader, self.convs, self.trunk = sight.reader, sight.convs, sight.trunk
        width = sight.width
        self.hidden = nn.ModuleList()
        forked = ensemble.fork == "both" and heads > 1
        for k, size in enumerate(net.hidden[:-1] if forked else net.hidden, sight.layers):
            self.hidden.append(Linear(seeds, 1 if k < shared else members, width, size))
            width = size
        out, bias = spec.actions * atoms, options.shared_bias
        last = 1 if sight.layers + len(net.hidden) < shared else members
        if forked:
            self.final: Heads | ForkedHeads = ForkedHeads(
                seeds,
                last,
                width,
                hidden=net.hidden[-1],
                heads=heads,
                width=out,
                shared_bias=bias,
            )
        else:
            self.final = Heads(seeds, last, width, heads=heads, width=out, shared_bias=bias)

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Inputs of `layers` at positions in a window (`cerl.nets.reader.Reader.look`)."""
        found = self.reader.look(window, *places)
        if self.shared and self.reader.layers == self.shared:
            found[0] = scale_gradient(found[0], self.share_scale)
        return found

    def carry(self, *, envs: int, evaluating: bool) -> Carry:
        """The empty recurrent state for acting, before any row, on the network's device."""
        device = next(self.parameters()).device
        return self.reader.carry(envs=envs, evaluating=evaluating, device=device)

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> list[Tensor]:
        """Input of `layers` for one new row, in a list of one; `carry` is written in place."""
        return [self.reader.step(seen, carry, evaluating=evaluating)]

    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Recomputes a carry in place (`cerl.nets.reader.Reader.refill`)."""
        self.reader.refill(window, carry, member, evaluating=evaluating)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Activations after every ReLU, in order.

        With agent.gradient_scale the gradient is multiplied by 1/N at the output of the last layer
        that all members share.
        """
        outputs: list[Tensor] = []
        for layer in [*self.convs, *self.hidden]:
            if isinstance(layer, Linear) and x.dim() > 4:
                x = x.flatten(3)
            x = layer(x, relu=True) if isinstance(layer, Conv) else F.relu(layer(x))
            if self.reader.layers + len(outputs) + 1 == self.shared:
                x = scale_gradient(x, self.share_scale)
            outputs.append(x)
        return outputs

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the convolutions (without any: x) and input of the heads.

        Both are [S, M or N, rows, D], with a D of their own.
        """
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

    def _normed(self, features: Tensor) -> Tensor:
        if not self.feature_norm:
            return features
        return features / (features.norm(dim=-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor, heads: int) -> Tensor:
        """Values of the first `heads` heads; x [S, M, rows, ...] from `look` or `step`."""
        return self.values(self.features(x)[1], heads)


class Values(NamedTuple):
    """The values behind the loss of a batch."""

    q: Tensor  # [S, N, B, T, J, A, *atoms]
    taken: Tensor  # [S, N, B, T, J, *atoms] of the action taken
    target: Tensor  # [S, N, B, T, J, *atoms]
    encoded: Tensor  # [S, N or 1, B * T, D] output of the convolutions (without any: their input)


class DQN:
    """The agent of a config with discrete actions: build, act and loss (`cerl.agent.Agent`)."""

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
        """The target network is a copy of the whole network."""
        return net

    def stages(self, net: QNet) -> list[Stage[QNet, QNet, None]]:
        """An update is one gradient step of all parameters."""
        return [Stage(self.loss, [Group(list(net.parameters()), self.config.optim)])]

    def dice(self, keys: Tensor, step: Tensor) -> None:
        """None: the loss draws no random numbers."""

    def act(
        self,
        net: QNet,
        seen: ActInput,
        carry: Carry,
        *,
        noise: Noise,
        evaluating: Sequence[str] | None = None,
    ) -> Decision:
        """Epsilon-greedy actions of the acting members; of equally good actions the first.

        Args: evaluating, names of the aggregates, or None while training. `seen.member` = N + k
              stands for aggregate k: "vote" takes the action that is greedy for most members, ties
              broken uniformly; "mean" takes the greedy action of the members' mean Q.
        """
        (x,) = net.step(seen, carry, evaluating=evaluating is not None)
        envs, members = seen.start.shape[1], self.config.ensemble.members
        zero = torch.zeros_like(seen.start, dtype=torch.float32)
        entropy = zero
        few = worth_gathering(envs=envs, members=members) and len(net.convs) > 0
        if evaluating is None and few:
            value, greedy = self._own_values(net, x, seen.member).max(-1)  # [S, E]
        else:
            q = self.kind.mean(net(x, 1).squeeze(3))  # [S, N, E, A]
            best, arg = q.max(-1)
            mine = seen.member.clamp(max=members - 1).unsqueeze(1)
            greedy, value = arg.gather(1, mine)[:, 0], best.gather(1, mine)[:, 0]
            if evaluating is not None:
                votes = one_hot(arg, self.spec.actions).sum(1).float()  # [S, E, A]
                entropy = torch.special.entr(votes / members).sum(-1)
                for k, name in enumerate(evaluating):
                    score = votes + 0.5 * noise.tie if name == "vote" else q.mean(1)
                    greedy = torch.where(seen.member == members + k, score.argmax(-1), greedy)
        action = torch.where(noise.explore, noise.action, greedy)
        return Decision(action, value, bonus=zero, diversity=entropy)

    @torch.no_grad()
    def judge(self, net: QNet, seen: ActInput, carry: Carry) -> Tensor:
        """Q-values of all actions by the acting members, [S, E, A]; `carry` is written in place."""
        (x,) = net.step(seen, carry, evaluating=False)
        q = self.kind.mean(net(x, 1).squeeze(3))  # [S, N, E, A]
        return q.gather(1, seen.member[:, None, :, None].expand(-1, 1, -1, q.shape[3]))[:, 0]

    def _own_values(self, net: QNet, x: Tensor, member: Tensor) -> Tensor:
        """The acting members' Q-values, computed with their weights alone.

        Args:    x [S, 1, E, ...]; member [S, E].
        Returns: [S, E, A].
        """
        leaves = gathered(net, member)
        q = functional_call(net, leaves, (x.transpose(1, 2), 1))  # [S, E, 1, 1, A, ...]
        return self.kind.mean(q.squeeze(3)).squeeze(2)

    def batch(self, net: QNet, window: Window) -> Batch:
        """Learnt rows, their n-step returns and the later rows that these bootstrap from."""
        reader = net.reader
        return returns.batch(
            window,
            first=reader.context,
            n=self.config.loss.n_step,
            gamma=self.table.gamma,
            begins=reader.begins,
        )

    def head_losses(self, net: QNet, target: QNet, batch: Batch) -> tuple[Tensor, Values]:
        """Mean loss of every head over the batch [S, N, J], and the values behind it."""
        encoded, q, choose, value = self._values(net, target, batch)
        y = double_q(
            self.table, reward=batch.reward, discount=batch.discount, choose=choose, value=value
        )
        index = batch.action.view(*batch.action.shape, 1, 1, *([1] * (q.dim() - 6)))
        index = index.expand(*q.shape[:5], 1, *q.shape[6:])
        taken = q.gather(5, index).squeeze(5)  # [S, N, B, T, J, *atoms]
        weight = returns.averaging(batch.weight).unsqueeze(-1)
        losses = (self.kind.error(taken, y) * weight).sum((2, 3))
        return losses, Values(q, taken, y, encoded)

    def _values(
        self, net: QNet, target: QNet, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs both networks at the learnt rows and at the later rows, in parallel on a GPU.

        The later rows are those that the learnt rows bootstrap from (`batch.later`).

        Returns: the convolutions' output at the learnt rows; values there [S, N, B, T, J, A,
                 *atoms]; and, without gradient, two kinds of values at the later rows: those that
                 choose the next action [S, N, B, T, 1, A], and the target network's
                 [S, N, B, T, heads, A, *atoms].
        """
        device, double = batch.action.device, self.options.double
        valued = partial(self._later, target, batch, heads=self.table.value_heads)
        if not double:
            (encoded, q, _), (value,) = parallel(device, partial(self._now, net, batch), valued)
            return encoded, q, self.kind.mean(value)[..., :1, :], value
        if net.reader.whole:  # one pass over the window gives the learnt and the later rows
            now = partial(self._now, net, batch, choose=True)
            (encoded, q, choose), (value,) = parallel(device, now, valued)
            assert choose is not None, "_now returns the choice if asked to"
            return encoded, q, choose, value
        chosen = partial(self._choice, net, batch)
        (encoded, q, _), (value, choose) = parallel(
            device, partial(self._now, net, batch), valued, chosen
        )
        return encoded, q, choose, value

    def _now(
        self, net: QNet, batch: Batch, *, choose: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The convolutions' output and the values at the learnt rows.

        With `choose` also the values at the later rows by which the next actions are chosen.
        """
        x, *x_later = net.look(batch.window, batch.now, *([batch.later] if choose else []))
        encoded, features = net.features(x)
        q = net.values(features, self.table.heads).unflatten(2, batch.action.shape[2:])
        if not choose:
            return encoded, q, None
        with torch.no_grad():
            choice = self.kind.mean(net(x_later[0], 1))
        return encoded, q, choice.unflatten(2, batch.action.shape[2:])

    @torch.no_grad()
    def _later(self, net: QNet, batch: Batch, *, heads: int) -> Tensor:
        """Values of the first `heads` heads at the later rows, [S, N, B, T, heads, A, *atoms]."""
        (x_later,) = net.look(batch.window, batch.later)
        return net(x_later, heads).unflatten(2, batch.action.shape[2:])

    @torch.no_grad()
    def _choice(self, net: QNet, batch: Batch) -> Tensor:
        """Values at the later rows by which the next actions are chosen, [S, N, B, T, 1, A]."""
        return self.kind.mean(self._later(net, batch, heads=1))

    def loss(
        self,
        net: QNet,
        target: QNet,
        window: Window,
        *,
        mask: Tensor | None,
        dice: None = None,
        prepared: None = None,
    ) -> Losses:
        """Loss of every member, its metrics, and the errors of rows.

        The error of a row is that of expected values, also where values are distributions.

        Args:    window of context + T + n rows; mask as in `cerl.agent.StageLoss`; dice and
                 prepared are not used.
        Returns: loss [S, N], summed over heads; metrics {name: [S, N]}, detached: of head 0 the
                 loss, and the mean values of the actions taken (q_data) and of the greedy ones
                 (q_pi).
        """
        batch = self.batch(net, window)
        batch = batch._replace(weight=masked(batch.weight, mask))
        losses, values = self.head_losses(net, target, batch)
        loss, metrics = self.member_losses(net, target, batch, losses, values)
        if not self.config.replay.sampler.wants_errors:
            return Losses(loss, metrics)
        error = self.kind.mean(values.target) - self.kind.mean(values.taken)
        errors = returns.row_errors(error, batches=window.weight.shape[1])
        return Losses(loss, metrics, errors)

    def member_losses(
        self, net: QNet, target: QNet, batch: Batch, losses: Tensor, values: Values
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics of every member from the losses of its heads.

        The loss is their sum, or with agent.mico_weight w it is (1 - w) sum + w MICo loss.
        """
        loss, weight = losses.sum(-1), self.options.mico_weight
        metrics = {
            "loss": losses[..., 0].detach(),
            "q_data": self.kind.mean(values.taken.detach())[..., 0].mean((2, 3)),
            "q_pi": self.kind.mean(values.q.detach())[..., 0, :].max(-1)[0].mean((2, 3)),
        }
        if weight:
            # The metric's gradient enters at the convolutions' output. It skips the factor 1/J
            # where heads fork, and 1/N where the last shared layer comes after the convolutions, so
            # both are applied here.
            above = net.shared > len(net.convs)
            scale = net.fork_scale * (net.share_scale if above else 1.0)
            seen = target.look(batch.window, batch.now, batch.later)
            metric = mico(
                scale_gradient(values.encoded, scale),
                *(target.features(x)[0].detach() for x in seen),
                reward=batch.reward[..., 0].flatten(2),
                weight=batch.weight.flatten(2),
                gamma=self.table.own_gamma**self.config.loss.n_step,
                beta=self.options.mico_beta,
            )
            # If members share the convolutions there is one metric loss for all of them. Each gets
            # 1/N of it, so that the sum over members counts it once.
            loss = (1.0 - weight) * loss + weight * metric * (metric.shape[1] / loss.shape[1])
            metrics["mico_loss"] = metric.detach().expand_as(loss)
        return loss, metrics

    def activations(self, net: QNet, window: Window) -> list[Tensor]:
        """Outputs of the hidden layers; a layer that forks gives the output of head 0, the own."""
        (x,) = net.look(window, self.batch(net, window).now)
        outputs = net.layers(x)
        if isinstance(net.final, ForkedHeads):
            below = (outputs[-1] if outputs else x).flatten(3)
            outputs.append(net.final.features(below, 1)[:, :, 0])
        return outputs

    def measures(self, net: QNet, target: QNet, window: Window, dice: None) -> Metrics:
        """How wrong the members' values are, how far off-policy the rows are, how members differ.

        All but `auxiliary_loss` are of the members' own heads.

        Returns: td_error, mean |target - value of the action taken|, and greedy_agreement, the
                 share of rows whose action is the member's greedy one, both also over the rows that
                 the member acted in (`_own`) and over all others (`_others`; NaN where the batch
                 has no such row); target_value, mean target; auxiliary_loss, mean loss of the other
                 heads, if there are any. With several members also vote_disagreement, the share of
                 rows in which the member's greedy action has fewer votes than another one, and
                 value_spread [S], the deviation of the members' values of the action taken.
        """
        batch, members = self.batch(net, window), self.config.ensemble.members
        losses, values = self.head_losses(net, target, batch)
        q = self.kind.mean(values.q)[..., 0, :].flatten(2, 3)  # [S, N, rows, A]
        taken, goal = (
            self.kind.mean(x)[..., 0].flatten(2, 3) for x in (values.taken, values.target)
        )  # [S, N, rows]
        greedy, weight = q.argmax(-1), batch.weight.flatten(2)
        own = own_rows(window, batch, members=members, context=net.reader.context)
        agreed = (greedy == batch.action.flatten(2)).float()
        found = by_owner("td_error", (goal - taken).abs(), weight, own)
        found |= by_owner("greedy_agreement", agreed, weight, own)
        found["target_value"] = row_mean(goal, weight.expand_as(goal))
        if losses.shape[-1] > 1:
            found["auxiliary_loss"] = losses[..., 1:].mean(-1)
        if members > 1:
            actions = self.spec.actions
            found["vote_disagreement"] = vote_disagreement(greedy, weight, actions=actions)
            found["value_spread"] = value_spread(taken, weight)
        return found
