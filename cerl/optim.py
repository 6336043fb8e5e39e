"""Optimisers over stacked parameters: elementwise, so one of them is N x S independent ones.

State and step live on the device and change in place (a CUDA graph may capture `step`). Centred
RMSProp keeps epsilon inside the root (Graves 2013, equations 38 to 45), which `torch.optim.RMSprop`
does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerl.config import OptimConfig, RmsPropConfig
from cerl.kernels import optim as kernels
from cerl.state import put


class Optimiser:
    """Centred RMSProp or Adam.

    State: first and second moment of every leaf, the momentum buffer where asked, the update count.
    Args of the constructor: leaves; targets, one of every leaf or none, which each step moves by a
    share `rate` of the way to the leaf's new value.
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
        """All that it remembers of gradients, shaped as the leaves."""
        return [*self.first, *self.second, *self.velocity]

    @torch.no_grad()
    def forget(self, seeds: Sequence[int]) -> None:
        """Sets the moments of seeds (indices) to zero: a gradient of zero then changes nothing."""
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
    """Scales every member's gradient down to an L2 norm of `limit`.

    Leaves shared by all members ([S, 1, ...]) count as a member of their own.
    Args:    grads, each [S, N or 1, ...].
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
