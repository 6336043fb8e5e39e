"""Every shipped preset builds its environment, network and replay, and learns from them."""

import pytest
import torch

from cerl import preset, train
from cerl.config import Config, load

UPDATES = 3


def small(name: str) -> Config:
    """A preset with everything of its own but sizes: replay, batch, evaluation, Atari's members."""
    run = load(name)
    start = (64 if run.loss.batches == "own" else 16) * run.env.envs
    sizes = {"replay.capacity": 4 * start, "replay.start": start, "replay.batch": 2}
    sizes |= {"seeds": [5], "device": "cpu", "eval.episodes": 1, "eval.slots": 1}
    if run.env.family == "atari":
        sizes |= {"ensemble.members": min(run.ensemble.members, 2)}
    if run.loss.batches == "own":
        sizes |= {"ensemble.switch": "step"}  # every member owns rows after a few steps
    return load(name, sizes)


def distinct() -> list[str]:
    """One name for each configuration; short names of others are left out."""
    kept: dict[str, str] = {}
    for name in sorted(preset.presets(), key=len, reverse=True):
        kept.setdefault(load(name).model_copy(update={"preset": ""}).model_dump_json(), name)
    return sorted(kept.values())


@pytest.mark.parametrize("name", distinct())
def test_preset_runs_updates(name):
    if name.startswith("atari/"):
        pytest.importorskip("ale_py")
    config = small(name)
    parts = train.assemble(config)
    try:
        for _ in range(config.replay.start // config.env.envs + 1):
            parts.collector.step()
        before = [leaf.detach().clone() for leaf in parts.learner.leaves]
        for _ in range(UPDATES):
            parts.learner.update()
        assert int(parts.learner.updates) == UPDATES
        for leaf, old in zip(parts.learner.leaves, before, strict=True):
            assert torch.isfinite(leaf).all()
            # Every member of every seed has moved, in every layer.
            assert (leaf != old).flatten(2).any(-1).all()
    finally:
        train.close(parts)
