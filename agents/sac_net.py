"""Networks of soft actor-critic: the policies, critics and temperatures of all members.

Policies and critics have convolutions or trunks of their own, because they have optimisers of their
own and only the critics are copied for targets. With sequence networks that means two trunks, which
take twice the parameters and twice the time to act. An update then runs trunks over the window five
times, two of them with gradients (a value network: twice, once with gradients).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerl.config import Config, NetConfig, SacConfig, of_kind
from cerl.data import ActInput, Carry, EnvSpec, Window
from cerl.kernels import sac
from cerl.kernels.mlp import fits, mlp
from cerl.kernels.pointwise import atanh
from cerl.nets import carry as carries
from cerl.nets.frames import see
from cerl.nets.layers import Critics, LayerNorm, Linear
from cerl.nets.reader import Reader, Sight, sights


class Actor(nn.Module):
    """Every member's policy: hidden layers, then mean and log deviation of a tanh Gaussian."""

    def __init__(
        self,
        net: NetConfig,
        sight: Sight,
        *,
        options: SacConfig,
        seeds: int,
        members: int,
        actions: int,
    ) -> None:
        super().__init__()
        self.reader, self.convs, self.trunk = sight.reader, sight.convs, sight.trunk
        width = sight.width
        self.clip = options.log_std == "clip"
        self.low, self.high = options.log_std_min, options.log_std_max
        self.hidden = nn.ModuleList()
        for size in net.hidden:
            self.hidden.append(Linear(seeds, members, width, size))
            width = size
        # One layer for A means and A log standard deviations, so that one product computes both.
        blocks = ((actions, math.sqrt(2.0)), (actions, 1.0))
        self.moments = Linear(seeds, members, width, 2 * actions, blocks=blocks)
        self.fused = fits(net.hidden)

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Features at positions in a window (`Reader.look`), [S, M or N, B * T, D] each."""
        return [see(self.convs, x) for x in self.reader.look(window, *places)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [S, M, rows, D] -> mean and log standard deviation [S, N, rows, A]."""
        return sac.moments(self.raw(x), low=self.low, high=self.high, clip=self.clip)

    def sample(self, x: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [S, N, rows, A] and their log-probabilities [S, N, rows].

        Args: x [S, M, rows, D]; normal [S, N, rows, A], standard normal noise.
        """
        return sac.squashed(self.raw(x), normal, low=self.low, high=self.high, clip=self.clip)

    def raw(self, x: Tensor) -> Tensor:
        """Output of the last layer [S, N, rows, 2 A]: means and unbounded log deviations."""
        if self.fused:
            layers = [*self.hidden, self.moments]
            return mlp(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.moments(x)


class Critic(nn.Module):
    """C critics of every member, which value an action in a state with J value heads each.

    The critics of a member share their convolutions or trunk.
    """

    def __init__(
        self,
        net: NetConfig,
        sight: Sight,
        *,
        options: SacConfig,
        seeds: int,
        members: int,
        actions: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.reader, self.convs, self.trunk = sight.reader, sight.convs, sight.trunk
        width = sight.width + actions
        lead = (seeds, members, options.critics)
        self.hidden, self.norms = nn.ModuleList(), nn.ModuleList()
        for size in net.hidden:
            self.hidden.append(Critics(*lead, width, size))
            if options.critic_norm != "none":
                self.norms.append(LayerNorm(*lead, size, affine=options.critic_norm == "layer"))
            width = size
        self.final = Critics(*lead, width, heads)
        self.fused = fits(net.hidden) and not self.norms

    def look(self, window: Window, *places: Tensor) -> list[Tensor]:
        """Features at positions in a window (`Reader.look`), [S, M or N, B * T, D] each."""
        return [see(self.convs, x) for x in self.reader.look(window, *places)]

    def layers(self, x: Tensor, action: Tensor) -> list[Tensor]:
        """The joined input [S, N, 1, rows, D], then activations after ReLUs [S, N, C, rows, D].

        Args: x [S, M, rows, D]; action [S, 1 or N, rows, A].
        """
        x = x.expand(-1, max(x.shape[1], action.shape[1]), -1, -1)
        action = action.expand(-1, x.shape[1], -1, -1)
        outputs = [torch.cat([x, action], -1).unsqueeze(2)]
        for k, layer in enumerate(self.hidden):
            y = layer(outputs[-1])
            outputs.append(F.relu(self.norms[k](y) if self.norms else y))
        return outputs

    def activations(self, x: Tensor, action: Tensor) -> list[Tensor]:
        """Outputs of convolutions and of the first critic's hidden layers, in order.

        Args: x as the reader gives it, before the convolutions; action [S, 1 or N, rows, A].
        """
        images = []
        for conv in self.convs:
            x = conv(x, relu=True)
            images.append(x)
        return [*images, *(output[:, :, 0] for output in self.layers(x.flatten(3), action)[1:])]

    def forward(self, x: Tensor, action: Tensor, heads: int, *, frozen: bool = False) -> Tensor:
        """Values of the first `heads` heads [S, N, C, rows, heads].

        Args: x, action as in `layers`; frozen: the parameters of fused layers count as constants,
              so that no activations are stored for their gradient.
        """
        if not self.fused:
            return self.final(self.layers(x, action)[-1], heads)
        layers = [*self.hidden, self.final]
        weights, biases = ([getattr(k, name) for k in layers] for name in ("weight", "bias"))
        if frozen:
            weights, biases = ([leaf.detach() for leaf in leaves] for leaves in (weights, biases))
        weights[-1], biases[-1] = weights[-1][..., :heads], biases[-1][..., :heads]
        return mlp(x.unsqueeze(2), weights, biases, tail=action.unsqueeze(2))

    def crossed(self, x: Tensor, action: Tensor, heads: int) -> Tensor:
        """Values of every member's critics at every member's action, [S, N, C, N, rows, heads].

        Args: x [S, M, rows, D]; action [S, N, rows, A].
        """
        if len(self.convs):  # features of images are too wide to repeat for every member
            each = [self(x, taken.unsqueeze(1), heads) for taken in action.unbind(1)]
            return torch.stack(each, 3)
        members, rows = action.shape[1:3]
        repeated = x.unsqueeze(2).expand(-1, -1, members, -1, -1).flatten(2, 3)
        q = self(repeated, action.flatten(1, 2).unsqueeze(1), heads)  # [S, N, C, N * rows, heads]
        return q.unflatten(3, (members, rows))


def log_probability(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density [...] of actions [..., A] in [-1, 1]; a bound counts as a number just inside."""
    u = atanh(action.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    return sac.density(u, log_std, (u - mean) * (-log_std).exp())


class SACNet(nn.Module):
    """Policies, critics and log temperatures [S, N, 1] of all members."""

    def __init__(self, config: Config, spec: EnvSpec, *, seeds: int, heads: int) -> None:
        super().__init__()
        net, members = config.net, config.ensemble.members
        policy, critics = sights(config, spec, seeds=seeds, members=members, shared=0, parts=2)
        options = of_kind(config.agent, SacConfig)
        sizes = {"seeds": seeds, "members": members, "actions": spec.actions}
        self.actor = Actor(net, policy, options=options, **sizes)
        self.critic = Critic(net, critics, options=options, **sizes, heads=heads)
        start = math.log(options.temperature)
        self.log_alpha = nn.Parameter(torch.full((seeds, members, 1), start))

    @property
    def reader(self) -> Reader:
        """The policies' reader; the critics' reader needs the same rows of a window."""
        return self.actor.reader

    def carry(self, *, envs: int, evaluating: bool) -> Carry:
        """The empty recurrent state for acting, before any row, on the network's device."""
        readers, device = self._readers(), self.log_alpha.device
        return carries.empty(readers, envs=envs, evaluating=evaluating, device=device)

    def step(self, seen: ActInput, carry: Carry, *, evaluating: bool) -> list[Tensor]:
        """Features [S, 1 or N, E, D] of one new row, for the policies and for the critics, which
        value the actions; `carry` is written in place."""
        readers = self._readers()
        inputs = carries.step(readers, seen, carry, evaluating=evaluating)
        found = dict(zip(readers, inputs, strict=True))
        return [see(part.convs, found[part.reader]) for part in (self.actor, self.critic)]

    def refill(
        self, window: Window, carry: Carry, member: Tensor, *, evaluating: bool = False
    ) -> None:
        """Recomputes a carry in place (`cerl.nets.reader.Reader.refill`)."""
        readers = self._readers()
        carries.refill(readers, window, carry, member, evaluating=evaluating)

    def _readers(self) -> list[Reader]:
        """Readers of policies and critics; parts without memory share one."""
        return list(dict.fromkeys(part.reader for part in (self.actor, self.critic)))
