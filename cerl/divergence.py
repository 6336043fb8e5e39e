"""Finds seeds that diverged: a loss, a parameter or a moment of an optimiser is not finite.

The watch looks when metrics are logged, since the loop then waits for the device anyway. A seed
that diverged is reported once, its later result rows are marked, and it is trained no further. The
other seeds go on as if nothing had happened.
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
    """All tensors that an update changes, by what they are; each is [S, N or 1, ...]."""
    optimisers = [one for stage in learner.optimisers for one in stage]
    return {
        "parameters": [leaf.detach() for leaf in learner.leaves],
        "moments of the optimiser": [moment for one in optimisers for moment in one.moments],
    }


def unsound(tensors: Sequence[Tensor], *, members: int) -> Tensor:
    """Which seeds and members have a NaN or an infinity.

    A tensor shared by all members ([S, 1, ...]) counts for each of them. Only the smallest and the
    largest element are looked at: one of them is not finite if any element is not. That needs one
    pass and no temporary tensors.

    Args:    tensors, each [S, N or 1, ...].
    Returns: [S, N] bool on the device of the tensors.
    """
    found = torch.zeros(len(tensors[0]), members, dtype=torch.bool, device=tensors[0].device)
    for tensor in tensors:
        low, high = tensor.reshape(*tensor.shape[:2], -1).aminmax(dim=-1)
        found |= ~(low.isfinite() & high.isfinite())
    return found


def tally(tensors: Sequence[Tensor], *, seed: int, members: Sequence[int]) -> tuple[int, int]:
    """Counts elements that are not finite. Tensors shared by all members count once.

    Waits for the device.

    Args:    tensors, each [S, N or 1, ...]; seed, an index in [0, S); members, those to look at.
    Returns: the number of elements that are not finite, and the number of all elements.
    """
    own = [tensor[seed, [0] if tensor.shape[1] == 1 else list(members)] for tensor in tensors]
    return sum(int((~x.isfinite()).sum()) for x in own), sum(x.numel() for x in own)


class Watch:
    """Watches all seeds and members of a learner; what it found is part of a checkpoint.

    `diverged` maps the index of a diverged seed to the agent steps of one seed at which this was
    noticed; it changes in place.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.diverged: dict[int, int] = {}

    def look(self, step: int, metrics: Mapping[str, Tensor]) -> list[str]:
        """Finds seeds that have diverged since the last look, and stops training them.

        If any were found, the caller has to capture the update as a CUDA graph again.

        Args:    step, agent steps of one seed; metrics {name: [S, N] or [S]}, of which only the
                 metrics of the losses are looked at.
        Returns: one sentence for each seed found.
        Raises:  RuntimeError with these sentences if config.diverged is "error".
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
        """The report on one seed: which members diverged, when, in which tensors, what happens to
        the seed, and what the user can do."""
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
            "freeze": "it is trained no further, and its later rows are marked (diverged: freeze)",
            "cut": "it is trained no further, and its rows end here (diverged: cut)",
            "error": "the run stops (diverged: error; freeze or cut go on with the other seeds)",
        }[config.diverged]
        who = f"member{'s'[: len(members) - 1]} {' '.join(map(str, members))}"
        return (
            f"seed {config.seeds[seed]}, {who} diverged at {step:,} agent steps: not finite are "
            f"{', '.join(what)}; {happens}. Try to {', or '.join(advice)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The agent steps at which each seed was found diverged, [S] int64; -1: it has not."""
        seeds = range(len(self.config.seeds))
        return {"diverged": torch.tensor([self.diverged.get(seed, -1) for seed in seeds])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores in place.

        Raises: CheckpointError if the state has another number of seeds; RuntimeError if seeds had
                diverged and config.diverged is (still) "error".
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
