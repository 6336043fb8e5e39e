"""Adam and centred RMSProp over parameters that are stacked along the axes [S, N].

Both work element by element, so one optimiser equals S x N independent ones. Their state is on the
device and changes in place, so a CUDA graph can capture `step`. Centred RMSProp adds epsilon inside
the square root (Graves 2013, equations 38 to 45), whereas `torch.optim.RMSprop` adds it outside.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerl.config import OptimConfig, RmsPropConfig
from cerl.kernels import optim as kernels
from cerl.state import put


class Optimiser:
    """Centred RMSProp or Adam.

    State: first and second moment of every leaf (parameter tensor), the momentum buffer if
    config.momentum is above 0, and the number of steps.

    Args of the constructor: leaves, the parameters to update; targets, parameters of target
    networks, one for each leaf or none at all: each step moves a target by the share `rate` of the
    way towards the leaf's new value (soft update).
    """

    def __init__(
        self,
        config: OptimConfig,
        leaves: Sequence[Tensor],
        *,
        targets: Sequence[Tensor] = (),
        rate: float = 0.0,
    ) -> None:
        if targets and len(targets) != len(leaves):
            raise ValueError(
                f"targets: expected one of each of {len(leaves)} leaves or none, got {len(targets)}"
            )
        self.config, self.leaves = config, list(leaves)
        self.targets, self.rate = list(targets), rate
        self.first = [torch.zeros_like(leaf) for leaf in self.leaves]
        self.second = [torch.zeros_like(leaf) for leaf in self.leaves]
        momentum = isinstance(config, RmsPropConfig) and config.momentum > 0
        self.velocity = [torch.zeros_like(leaf) for leaf in self.leaves if momentum]
        self.count = torch.zeros((), dtype=torch.int64, device=self.leaves[0].device)

    @property
    def moments(self) -> list[Tensor]:
        """All running averages of gradients, tensors of the leaves' shapes."""
        return [*self.first, *self.second, *self.velocity]

    @torch.no_grad()
    def forget(self, seeds: Sequence[int]) -> None:
        """Sets the moments of some seeds to zero, so that a gradient of zero changes nothing.

        Args: seeds, indices in [0, S).
        """
        for moment in self.moments:
            moment[list(seeds)] = 0.0

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        """One update in place. Args: grads, one for each leaf, same shapes."""
        config = self.config
        self.count += 1
        if config.clip_norm:
            grads = clip_members(grads, config.clip_norm)
        if isinstance(config, RmsPropConfig):
            kernels.rmsprop(
                self.leaves,
                grads,
                self.first,
                self.second,
                self.velocity,
                lr=config.lr,
                decay=config.decay,
                eps=config.eps,
                momentum=config.momentum,
            )
            if self.targets:
                kernels.follow(self.targets, self.leaves, rate=self.rate)
            return
        kernels.adam(
            self.leaves,
            grads,
            self.first,
            self.second,
            self.targets,
            count=self.count,
            lr=config.lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            rate=self.rate,
        )

    def state_dict(self) -> dict:
        return {
            "first": self.first,
            "second": self.second,
            "velocity": self.velocity,
            "count": self.count,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("first", "second", "velocity"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                put(mine, saved, what=f"optimiser.{name}")
        put(self.count, state["count"], what="optimiser.count")


def clip_members(grads: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Scales the gradient of every member down to an L2 norm of at most `limit`.

    Parameters shared by all members ([S, 1, ...]) have a norm of their own, as if they were one
    more member.

    Args:    grads, each [S, N or 1, ...].
    Returns: gradients of the same shapes.
    """
    result: list[Tensor] = [grads[0]] * len(grads)
    for shared in (False, True):
        group = [k for k, g in enumerate(grads) if (g.shape[1] == 1) == shared]
        if not group:
            continue
        norms = torch.stack([grads[k].flatten(2).square().sum(-1) for k in group]).sum(0).sqrt()
        factor = limit / norms.clamp(min=limit)  # [S, N or 1]
        for k in group:
            result[k] = grads[k] * factor.view(*factor.shape, *([1] * (grads[k].dim() - 2)))
    return result
