"""Seeds whose numbers went wrong: losses, parameters or moments of an optimiser are not finite.

The watch looks wherever the loop waits for the device anyway. A seed that diverged is said
once and marked from then on; it learns no more, and the other seeds do not notice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cerl.config import Config
from cerl.learn import Learner
from cerl.state import CheckpointError

Quantities = Mapping[str, Sequence[Tensor]]


def quantities(learner: Learner) -> Quantities:
    """The tensors that an update changes, by name; each is [S, N or 1, ...]."""
    optimisers = [one for stage in learner.optimisers for one in stage]
    return {
        "parameters": [leaf.detach() for leaf in learner.leaves],
        "moments of the optimiser": [moment for one in optimisers for moment in one.moments],
    }


def unsound(tensors: Sequence[Tensor], *, members: int) -> Tensor:
    """Which seeds and members have a NaN or an infinity, [S, N] bool on their device.

    What all members share is every member's. One pass without temporaries: the smallest or the
    largest element is not finite where any is not.
    """
    found = torch.zeros(len(tensors[0]), members, dtype=torch.bool, device=tensors[0].device)
    for tensor in tensors:
        low, high = tensor.reshape(*tensor.shape[:2], -1).aminmax(dim=-1)
        found |= ~(low.isfinite() & high.isfinite())
    return found


def tally(tensors: Sequence[Tensor], *, seed: int, members: Sequence[int]) -> tuple[int, int]:
    """How many elements of some members of a seed are not finite, and of how many; waits for the
    device. What all members share counts once."""
    own = [tensor[seed, [0] if tensor.shape[1] == 1 else list(members)] for tensor in tensors]
    return sum(int((~x.isfinite()).sum()) for x in own), sum(x.numel() for x in own)


class Watch:
    """Looks at every seed and member of a learner; what it found is part of a checkpoint.


    `diverged` {index of a seed: agent steps of one seed when it was seen} changes in place.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.diverged: dict[int, int] = {}

    def look(self, step: int, metrics: Mapping[str, Tensor]) -> list[str]:
        """Seeds that were sound at the last look and are not any more.

        They learn no more, so an update that is captured has to be captured anew.

        Args:    step, agent steps of one seed; metrics {name: [S, N] or [S]}, of which those of
                 the losses count.
        Returns: a sentence on each.
        Raises:  RuntimeError with these sentences where config.diverged is "error".
        """
        members, watched = self.config.ensemble.members, quantities(self.learner)
        found_in = [unsound(tensors, members=members) for tensors in watched.values()]
        losses = {name: metrics[name] for name in self.learner.metrics if name in metrics}
        found_in += [~values.isfinite() for values in losses.values()]
        wrong = torch.stack(found_in).any(0).cpu()  # [S, N]
        found = {
            seed: wrong[seed].nonzero().flatten().tolist()
            for seed in wrong.any(1).nonzero().flatten().tolist()
            if seed not in self.diverged
        }
        words = [self._words(step, seed, own, watched, losses) for seed, own in found.items()]
        self.diverged.update(dict.fromkeys(found, step))
        if words and self.config.diverged == "error":
            raise RuntimeError("\n".join(words))
        if found:
            self.learner.freeze(list(found))
        return words

    def _words(
        self,
        step: int,
        seed: int,
        members: list[int],
        watched: Quantities,
        losses: Mapping[str, Tensor],
    ) -> str:
        """Who, when, what, what happens to it, what to do."""
        config, what = self.config, []
        for name, tensors in watched.items():
            bad, total = tally(tensors, seed=seed, members=members)
            if bad:
                what.append(f"{bad:,} of {total:,} {name}")
        for name, values in losses.items():
            own = values[seed, members]
            if not own.isfinite().all():
                what.append(f"{name} {float(own[~own.isfinite()][0])}")
        advice = [f"lower optim.lr ({config.optim.lr:g})"]
        if not config.optim.clip_norm:
            advice.append("set optim.clip_norm")
        if not config.replay.reward_clip:
            advice.append("set replay.reward_clip where rewards are large")
        happens = {
            "freeze": "it learns no more, and its rows go on with a mark (diverged: freeze)",
            "cut": "it learns no more, and its rows end here (diverged: cut)",
            "error": "the run stops (diverged: error; freeze or cut go on with the other seeds)",
        }[config.diverged]
        who = f"member{'s'[: len(members) - 1]} {' '.join(map(str, members))}"
        return (
            f"seed {config.seeds[seed]}, {who} diverged at {step:,} agent steps: not finite are "
            f"{', '.join(what)}; {happens}. Try to {', or '.join(advice)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """For every seed the agent steps at which it was seen to diverge, [S]; -1: it is sound."""
        seeds = range(len(self.config.seeds))
        return {"diverged": torch.tensor([self.diverged.get(seed, -1) for seed in seeds])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores in place.

        Raises: CheckpointError if the state is of another number of seeds; RuntimeError if the run
                stopped because seeds diverged, and config.diverged still is "error".
        """
        steps = state["diverged"].tolist()
        if len(steps) != len(self.config.seeds):
            raise CheckpointError(
                f"checkpoint: expected watch.diverged of {len(self.config.seeds)} seeds, got "
                f"{len(steps)}; it belongs to a run with other options"
            )
        self.diverged.clear()
        self.diverged.update({seed: step for seed, step in enumerate(steps) if step >= 0})
        if self.diverged and self.config.diverged == "error":
            who = ", ".join(
                f"seed {self.config.seeds[seed]} at {step:,} agent steps"
                for seed, step in self.diverged.items()
            )
            raise RuntimeError(
                f"the run stopped because seeds diverged ({who}; diverged: error); expected "
                "diverged freeze or cut to go on with the other seeds, or a new run"
            )
        if self.diverged:
            self.learner.freeze(list(self.diverged))
