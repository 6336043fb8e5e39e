"""Losses and updates against values computed by the authors' JAX code (tests/golden/dqn.json)."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from cerl.agents.check import from_original, run_updates, to_original
from cerl.config import Config, EnsembleConfig, LossConfig, NetConfig, OptimConfig

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dqn.json").read_text())
MEMBERS, ACTIONS = GOLDEN["hyper"]["members"], GOLDEN["hyper"]["actions"]

HEADS: dict[str, Literal["own", "cerl", "own_target", "single_actor", "multi_horizon"]] = {
    "bootstrapped_l0": "own",
    "bootstrapped_l3": "own",
    "cerl": "cerl",
    "cerl_l3": "cerl",
    "multi_horizon": "multi_horizon",
    "cerl_own_target": "own_target",
    "single_cerl": "single_actor",
}


def leaves(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy((rng.standard_normal(shapes[name]) * 0.05).astype(np.float32))
        for name in sorted(shapes)
    }


def batch():
    rng = np.random.default_rng(3)
    state = rng.integers(0, 256, (8, 84, 84, 4)).astype(np.uint8)
    following = rng.integers(0, 256, (8, 84, 84, 4)).astype(np.uint8)
    action = rng.integers(0, 4, (8,))
    reward = (rng.standard_normal(8) * 2).astype(np.float32)
    terminal = (rng.random(8) < 0.25).astype(np.float32)
    return dict(
        states=torch.from_numpy(state),
        next_states=torch.from_numpy(following),
        actions=torch.from_numpy(action),
        rewards=torch.from_numpy(reward),
        terminals=torch.from_numpy(terminal),
    )


def config(name):
    heads = HEADS[name]
    return Config(
        net=NetConfig(
            channels=(32, 64, 64),
            kernels=(8, 4, 3),
            strides=(4, 2, 1),
            hidden=(GOLDEN["hyper"]["penultimate"],),
            stack=4,
            scale=255.0,
            shared_bias=True,
        ),
        ensemble=EnsembleConfig(
            members=MEMBERS,
            shared_layers=3 if name.endswith("l3") else 0,
            heads=heads,
            duty="first" if heads == "single_actor" else "uniform",
        ),
        loss=LossConfig(gamma=0.99),
        optim=OptimConfig(name="rmsprop", lr=2.5e-4, decay=0.95, eps=9.765625e-6),
    )


def fingerprint(tensor):
    value = tensor.detach().numpy().astype(np.float64)
    probe = np.random.default_rng(99).standard_normal(value.shape)
    return np.sqrt((value**2).sum()), (value * probe).sum()


@pytest.mark.parametrize("name", HEADS)
def test_updates_reproduce_the_original(name):
    golden = GOLDEN["variants"][name]
    shapes = {key: tuple(shape) for key, shape in golden["shapes"].items()}
    heads, rotated = HEADS[name] != "own", HEADS[name] != "multi_horizon"
    shared = 3 if name.endswith("l3") else 0
    start = leaves(shapes, 1)
    options = dict(heads=heads, rotated=rotated)
    outcome = run_updates(
        from_original(start, shared=shared, **options),
        from_original(leaves(shapes, 2), shared=shared, **options),
        **batch(),
        config=config(name),
        action_count=ACTIONS,
        updates=3,
    )
    order = torch.arange(MEMBERS)
    head_count = outcome.values.shape[2]

    def theirs(x):  # [N, B, J, ...] -> [B, N, their head, ...]
        x = x.movedim(1, 0)
        if not heads:
            return x[:, :, 0]
        if not rotated:
            return x
        at = (torch.arange(head_count)[None] - order[:, None]) % MEMBERS
        return torch.stack([x[:, i, at[i]] for i in range(MEMBERS)], 1)

    q = torch.tensor(golden["q_online"])
    torch.testing.assert_close(theirs(outcome.values), q, atol=1e-5, rtol=0)
    target = torch.tensor(golden["target"])
    ours = theirs(outcome.targets)
    if target.dim() == 2 and heads:  # one scalar per head, the same for every trunk
        assert torch.equal(ours, ours[:, :1].expand_as(ours))
        ours = ours[:, 0]
    torch.testing.assert_close(ours, target.view_as(ours), atol=1e-5, rtol=0)
    for k, step in enumerate(golden["steps"]):
        assert float(outcome.losses[k].sum()) == pytest.approx(step["total_loss"], rel=1e-4)
        main = outcome.head_losses[k][:, 0].tolist()
        assert main == pytest.approx(step["member_loss"], rel=1e-4)
        after = to_original(outcome.parameters[k], shapes, **options)
        for leaf, expected in step["delta"].items():
            size, dot = fingerprint(after[leaf] - start[leaf])
            assert size == pytest.approx(expected["l2"], rel=1e-3), (k, leaf)
            assert dot == pytest.approx(expected["dot"], abs=1e-3 * expected["l2"]), (k, leaf)
        for leaf, expected in step["params_after"].items():
            size, dot = fingerprint(after[leaf])
            assert size == pytest.approx(expected["l2"], rel=1e-3), (k, leaf)
            assert dot == pytest.approx(expected["dot"], abs=1e-3 * expected["l2"]), (k, leaf)
