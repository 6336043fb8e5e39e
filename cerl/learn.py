"""The Learner: parameters, targets, optimisers and one nullary update, captured as a CUDA graph."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cerl import draw
from cerl.agent import Agent, Group, Losses, Metrics
from cerl.config import Config
from cerl.data import Window
from cerl.device.precision import precision
from cerl.graph import fused
from cerl.kernels.runtime.streams import parallel
from cerl.optim import Optimiser
from cerl.replay import Replay
from cerl.sampler import Sampling
from cerl.state import put, put_net


class Learner:
    """One update of every seed and member a call; no arguments, no host sync."""

    def __init__(
        self,
        config: Config,
        agent: Agent[Any, Any, Any],
        net: Any,
        replay: Replay,
        *,
        keys: Tensor,
    ) -> None:
        self.config, self.agent, self.net, self.replay, self.keys = config, agent, net, replay, keys
        self.followed = agent.followed(net)
        self.target: Any = copy.deepcopy(self.followed).requires_grad_(False)
        self.stages = agent.stages(net)
        self.optimisers = [
            [self._optimiser(group) for group in stage.groups] for stage in self.stages
        ]
        groups = [group for stage in self.stages for group in stage.groups]
        self.leaves = [leaf for group in groups for leaf in group.leaves]
        self.updates = torch.zeros((), dtype=torch.int64, device=keys.device)
        self.one = torch.ones((), device=keys.device)
        shape = (len(keys), config.ensemble.members)
        self.metrics = {name: torch.zeros(shape, device=keys.device) for name in agent.metrics}
        self.compiled = config.compile and keys.device.type == "cuda"
        self.loss = fused(self._loss) if self.compiled else self._loss
        self.sampling = self._sampling()
        # [S, N] bool, seeds and members that learn; None: all do
        self.learning: Tensor | None = None
        if frozen := config.ensemble.frozen:
            self._learning()[:, list(frozen)] = False
        self.sync()

    def _learning(self) -> Tensor:
        if self.learning is None:
            shape = (len(self.keys), self.config.ensemble.members)
            self.learning = torch.ones(shape, dtype=torch.bool, device=self.keys.device)
        return self.learning

    def freeze(self, seeds: Sequence[int]) -> None:
        """From now on parameters and moments of these seeds (indices) stay as they are.

        Moments are set to zero first. The bits of other seeds stay what they would be. Targets go
        on following. An update that was captured has to be captured anew.
        """
        self._learning()[list(seeds)] = False
        for optimiser in (one for stage in self.optimisers for one in stage):
            optimiser.forget(seeds)

    @torch.no_grad()
    def sync(self) -> None:
        """Hard copy of the online parameters to the target network."""
        pairs = zip(self.target.parameters(), self.followed.parameters(), strict=True)
        for theirs, mine in pairs:
            theirs.copy_(mine)

    def _optimiser(self, group: Group) -> Optimiser:
        """The optimiser of a group; with a `schedule.target_rate` below 1 it also moves targets."""
        rate = self.config.schedule.target_rate
        pairs = zip(self.followed.parameters(), self.target.parameters(), strict=True)
        theirs = {id(mine): target for mine, target in pairs} if rate < 1.0 else {}
        targets = [theirs[id(leaf)] for leaf in group.leaves if id(leaf) in theirs]
        return Optimiser(group.optim, group.leaves, targets=targets, rate=rate)

    def _sampling(self) -> Sampling:
        """Which windows an update learns from."""
        loss, reader = self.config.loss, self.net.reader
        return Sampling(
            batch=self.config.replay.batch,
            context=reader.context,
            ahead=reader.learnt - 1 + loss.n_step,
            begins=reader.begins,
            members=1 if loss.batches == "shared" else self.config.ensemble.members,
            batches=loss.batches,
            probability=loss.batches_probability,
            candidates=self.config.replay.candidates,
        )

    def sample(self) -> Window:
        """The batch of the current update, from its counter alone."""
        return self.replay.sample(self.sampling, step=self.updates)

    def mask(self, window: Window) -> Tensor | None:
        """Rows that a member learns from, float32; None where each learns from all.

        A bootstrap mask is recomputed from the row's absolute id (Osband et al. 2016). Windows of
        own and disjoint batches hold rows of other members, which are masked too.

        Returns: [S, N, B], or [S, N, B, T] for windows of more than one learnt row.
        """
        loss, learnt = self.config.loss, self.net.reader.learnt
        apart = learnt > 1 and loss.batches in ("own", "disjoint")
        if loss.mask_probability == 1.0 and not apart:
            return None
        members = self.config.ensemble.members
        member, row = torch.arange(members, device=self.keys.device).view(1, -1, 1), window.row
        if learnt > 1:
            steps = torch.arange(learnt, device=self.keys.device)
            member, row = member.unsqueeze(-1), row.unsqueeze(-1) + steps * self.replay.envs
        mask = torch.ones((), device=self.keys.device)
        if loss.mask_probability < 1.0:
            u = draw.bits(self.keys, draw.MASK, row, member)
            mask = (u < loss.mask_probability * 2.0**32).float()
        if apart:
            first = self.net.reader.context
            acted = window.member[..., first : first + learnt]
            if loss.batches == "disjoint":
                drawn = draw.bits(self.keys, draw.OWNER, row, torch.zeros_like(row[:1]))
                acted = (drawn * members) >> 32
            mask = mask * (acted == member)
        return mask

    def _loss(
        self, stage: int, window: Window, *, mask: Tensor | None, dice: Any, prepared: Any
    ) -> Losses:
        return self.stages[stage].loss(
            self.net, self.target, window, mask=mask, dice=dice, prepared=prepared
        )

    def prepare(self, window: Window, stage: int, dice: Any) -> Any:
        """What a stage prepares for its loss; None where the loss computes that itself.

        A compiled loss is one graph, of which no part can be prepared.
        """
        prepare = self.stages[stage].prepare
        if prepare is None or self.compiled:
            return None
        with precision(self.config.precision, self.keys.device), torch.enable_grad():
            return prepare(self.net, window, dice)

    def grads(
        self, window: Window, *, stage: int, dice: Any, prepared: Any = None
    ) -> tuple[tuple[Tensor, ...], Losses]:
        """Gradient of every leaf of a stage, in the order of its groups; what its loss gave.

        Args: dice as `agent.dice` gives them for the current update; prepared as `prepare` gives
              it.
        """
        leaves = [leaf for group in self.stages[stage].groups for leaf in group.leaves]
        with precision(self.config.precision, self.keys.device), torch.enable_grad():
            mask = self.mask(window)
            losses = self.loss(stage, window, mask=mask, dice=dice, prepared=prepared)
            # The gradient of the sum over seeds and members, without computing that.
            ones = self.one.to(losses.members.dtype).expand_as(losses.members)
            return torch.autograd.grad(losses.members, leaves, ones), losses

    def update(self) -> None:
        """Samples a batch, takes the gradient step of every stage, tells the sampler, counts.

        With a `schedule.target_rate` below 1 the optimiser step also moves the target network.
        """
        self._update(len(self.stages))

    def update_first(self) -> None:
        """An update of which only the first stage is due."""
        self._update(1)

    def _update(self, stages: int) -> None:
        device, prepared = self.keys.device, None
        with torch.no_grad():
            draw_dice = partial(self.agent.dice, self.keys, self.updates)
            window, (dice,) = parallel(device, self.sample, draw_dice)
        for stage in range(stages):
            grads, losses = self.grads(window, stage=stage, dice=dice, prepared=prepared)
            if losses.errors is not None:
                self.replay.sampler.update(window, losses.errors)
            step = partial(self._step, stage, grads, losses.metrics)
            if stage + 1 < stages:
                coming = partial(self.prepare, window, stage + 1, dice)
                prepared, _ = parallel(device, coming, step, patient=True)
            else:
                step()
        self.updates += 1

    def _step(self, stage: int, grads: tuple[Tensor, ...], metrics: Metrics) -> None:
        """The optimisers of a stage; keeps its metrics."""
        if self.learning is not None:
            grads = tuple(torch.where(_of_leaf(self.learning, grad), grad, 0.0) for grad in grads)
        for optimiser in self.optimisers[stage]:
            count = len(optimiser.leaves)
            optimiser.step(grads[:count])
            grads = grads[count:]
        mine = [self.metrics[name] for name in metrics]
        torch._foreach_copy_(mine, list(metrics.values()))  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict:
        return {
            "net": dict(self.net.state_dict()),
            "target": dict(self.target.state_dict()),
            "optimisers": [[one.state_dict() for one in stage] for stage in self.optimisers],
            "updates": self.updates,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores in place; nothing is rebound, so captured graphs stay valid.

        Raises: CheckpointError if the state belongs to another network or optimiser.
        """
        put_net(self.net, state["net"], what="learner.net")
        put_net(self.target, state["target"], what="learner.target")
        for stage, saved in zip(self.optimisers, state["optimisers"], strict=True):
            for one, values in zip(stage, saved, strict=True):
                one.load_state_dict(values)
        if self.config.ensemble.frozen and self.learning is not None:
            # Without a gradient, moments that are not zero would go on moving a parameter.
            for one in (one for stage in self.optimisers for one in stage):
                for moment in one.moments:
                    moment.masked_fill_(~_of_leaf(self.learning, moment), 0.0)
        put(self.updates, state["updates"], what="learner.updates")
        for name, mine in self.metrics.items():
            put(mine, state["metrics"][name], what=f"learner.metrics.{name}")


def _of_leaf(learning: Tensor, leaf: Tensor) -> Tensor:
    """The mask of the seeds and members that learn, in a shape that broadcasts over a leaf.

    Parameters that all members share learn as long as a member does.

    Args: learning [S, N]; leaf [S, N or 1, ...].
    """
    own = learning if leaf.shape[1] == learning.shape[1] else learning.any(1, keepdim=True)
    return own.view(*own.shape, *[1] * (leaf.dim() - 2))
