"""The Learner: parameters, targets, optimiser and one nullary update, captured as a CUDA graph."""

import torch
from torch import Tensor

from cerl import draw
from cerl.agents.dqn import DQN, QNet
from cerl.checkpoint import put
from cerl.config import Config
from cerl.data import Window
from cerl.graph import fused
from cerl.optim import Optimiser
from cerl.precision import precision
from cerl.replay import Replay


class Learner:
    """One update of every seed and member a call; no arguments, no host sync."""

    def __init__(
        self, config: Config, agent: DQN, net: QNet, replay: Replay, *, keys: Tensor
    ) -> None:
        self.config, self.agent, self.net, self.replay, self.keys = config, agent, net, replay, keys
        self.target = agent.build(keys=keys).requires_grad_(False)
        self.leaves = list(net.parameters())
        self.optimiser = Optimiser(config.optim, self.leaves)
        self.updates = torch.zeros((), dtype=torch.int64, device=keys.device)
        shape = (len(keys), config.ensemble.members)
        names = ["loss", "q_data", "q_pi"] + (["mico_loss"] if config.loss.mico_weight else [])
        self.metrics = {name: torch.zeros(shape, device=keys.device) for name in names}
        fuse = config.compile and keys.device.type == "cuda"
        self.loss = fused(self._loss) if fuse else self._loss
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Hard copy of the online parameters to the target network."""
        for theirs, mine in zip(self.target.parameters(), self.leaves, strict=True):
            theirs.copy_(mine)

    def sample(self) -> Window:
        """The batch of the current update, from its counter alone."""
        loss, replay = self.config.loss, self.config.replay
        return self.replay.sample(
            step=self.updates,
            batch=replay.batch,
            context=self.net.encoder.context,
            ahead=loss.n_step,
            members=1 if loss.batches == "shared" else self.config.ensemble.members,
            batches=loss.batches,
            probability=loss.batches_probability,
            candidates=replay.candidates,
        )

    def mask(self, window: Window) -> Tensor | None:
        """Bootstrap mask [S, N, B], recomputed from the row's absolute id (Osband et al. 2016)."""
        if self.config.loss.mask_probability == 1.0:
            return None
        member = torch.arange(self.config.ensemble.members, device=self.keys.device).view(1, -1, 1)
        u = draw.bits(self.keys, draw.MASK, window.row, member)
        return (u < self.config.loss.mask_probability * 2.0**32).float()

    def _loss(self, window: Window, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.agent.loss(self.net, self.target, window, mask)
        return loss.sum(), metrics

    def grads(self, window: Window) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Gradient of every leaf, and the metrics of the loss."""
        with precision(self.config.precision, self.keys.device), torch.enable_grad():
            loss, metrics = self.loss(window, self.mask(window))
            return torch.autograd.grad(loss, self.leaves), metrics

    def update(self) -> None:
        """Samples a batch, takes one gradient step, counts."""
        with torch.no_grad():
            window = self.sample()
        grads, metrics = self.grads(window)
        self.optimiser.step(grads)
        for name, mine in self.metrics.items():
            mine.copy_(metrics[name])
        self.updates += 1

    def state_dict(self) -> dict:
        return {
            "net": dict(self.net.state_dict()),
            "target": dict(self.target.state_dict()),
            "optimiser": self.optimiser.state_dict(),
            "updates": self.updates,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores in place; nothing is rebound, so captured graphs stay valid."""
        self.net.load_state_dict(state["net"])
        self.target.load_state_dict(state["target"])
        self.optimiser.load_state_dict(state["optimiser"])
        put(self.updates, state["updates"], what="learner.updates")
        for name, mine in self.metrics.items():
            put(mine, state["metrics"][name], what=f"learner.metrics.{name}")
