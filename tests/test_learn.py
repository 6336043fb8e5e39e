"""The update: captured equals eager, seeds do not touch each other, loading keeps storage."""

import pytest
import torch

from cerl import bench, train
from cerl.config import load
from cerl.data import EnvSpec
from cerl.graph import captured

ATARI = EnvSpec("random", (84, 84), torch.uint8, 6, 1, 4, True, False)
MINATAR = EnvSpec("random", (4, 10, 10), torch.bool, 3, 8, 1, True, True)


def learner(name, spec, device, **changes):
    small = {"replay": {"capacity": 2_000, "start": 1_000}, "env": {"envs": spec.envs}}
    return bench.filled_learner(load(name, {**small, **changes}), spec, torch.device(device))


CASES = [
    ("atari/paper-cerl", ATARI, {"ensemble": {"members": 3}}),
    ("atari/paper-bootdqn-l3", ATARI, {"ensemble": {"members": 3}}),
    ("atari/paper-ddqn", ATARI, {}),
    ("minatar/cerl", MINATAR, {"seeds": (0, 1)}),
    ("minatar/mico", MINATAR, {"seeds": (0, 1)}),
    ("minatar/own-batches", MINATAR, {"seeds": (0, 1)}),
    ("minatar/young-tian", MINATAR, {"seeds": (0, 1)}),
    ("minatar/qrdqn", MINATAR, {"seeds": (0,), "ensemble": {"members": 3}}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(("name", "spec", "changes"), CASES)
def test_captured_update_equals_eager_bitwise(name, spec, changes, precision):
    device = torch.device("cuda")
    changes = {"precision": precision, **changes}
    eager, graph = (learner(name, spec, device, **changes) for _ in range(2))
    replayed, sync = captured(graph.update, device), captured(graph.sync, device)
    for k in range(10):
        eager.update()
        replayed()
        if k % 4 == 3:
            eager.sync()
            sync()
    for mine, theirs in zip(eager.leaves, graph.leaves, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    assert int(graph.updates) == 10
    for key, value in eager.metrics.items():
        assert torch.equal(value, graph.metrics[key])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "spec", "changes"), CASES)
def test_gpu_update_agrees_with_the_cpu(name, spec, changes):
    changes = {"precision": "fp32", **changes}
    gpu, cpu = learner(name, spec, "cuda", **changes), learner(name, spec, "cpu", **changes)
    cpu.replay.load_state_dict(gpu.replay.state_dict())
    windows = gpu.sample(), cpu.sample()
    for mine, theirs in zip(*windows, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    cpu.load_state_dict(gpu.state_dict())
    for mine, theirs in zip(gpu.grads(windows[0])[0], cpu.grads(windows[1])[0], strict=True):
        scale = theirs.abs().max()
        assert (mine.cpu() - theirs).abs().max() <= 1e-4 * scale + 1e-9


@pytest.mark.gpu
def test_gpu_run_resumes_bitwise(tmp_path):
    changes = {
        "seeds": (0, 1),
        "device": "cuda",
        "env": {"envs": 8},
        "ensemble": {"members": 3},
        "replay": {"capacity": 4_000, "start": 200},
        "schedule": {"steps": 1_600},
        "eval": {"every": 800, "episodes": 2, "time_limit": 200},
        "log": {"every": 400, "checkpoint_every": 800},
    }
    from test_train import assert_same, final_state, stop_at_first_checkpoint

    config = load("minatar/cerl", {**changes, "out": str(tmp_path / "whole")})
    whole = train.train(config)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_first_checkpoint(patch)
        train.train(config.model_copy(update={"out": str(tmp_path / "halves")}))
    (half,) = (tmp_path / "halves").iterdir()
    train.resume(half)
    assert_same(final_state(whole), final_state(half))


@pytest.mark.parametrize("name", ["minatar/cerl", "minatar/bootdqn-l1", "minatar/mico"])
def test_nan_in_one_seed_leaves_the_others_bitwise_alone(name):
    changes = {"seeds": (0, 1), "ensemble": {"members": 3}, "replay": {"batch": 8}}
    clean, poisoned = (learner(name, MINATAR, "cpu", **changes) for _ in range(2))
    poisoned.replay.reward[1] = float("nan")
    for part in (clean, poisoned):
        for _ in range(3):
            part.update()
    for mine, theirs in zip(clean.leaves, poisoned.leaves, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert theirs[1].isnan().any()


def test_loading_copies_in_place():
    changes = {"seeds": (0,), "ensemble": {"members": 2}}
    first, second = (learner("minatar/cerl", MINATAR, "cpu", **changes) for _ in range(2))
    first.update()
    before = [leaf.data_ptr() for leaf in second.leaves]
    second.load_state_dict(first.state_dict())
    assert [leaf.data_ptr() for leaf in second.leaves] == before
    first.update()
    second.update()
    for mine, theirs in zip(first.leaves, second.leaves, strict=True):
        assert torch.equal(mine, theirs)


def test_mask_is_a_function_of_row_and_member():
    changes = {"seeds": (0, 1), "loss": {"mask_probability": 0.5}}
    part = learner("minatar/bootdqn", MINATAR, "cpu", **changes)
    window = part.sample()
    mask = part.mask(window)
    assert mask is not None and mask.shape == (2, 10, 32)
    again, moved = part.mask(window), part.mask(window._replace(row=window.row.flip(-1)))
    assert again is not None and torch.equal(mask, again)
    assert moved is not None and torch.equal(moved, mask.flip(-1))
    assert 0.4 < float(mask.mean()) < 0.6
    assert not torch.equal(mask[:, 0], mask[:, 1])
