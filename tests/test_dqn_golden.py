"""Losses and updates against values of the authors' JAX code (tests/golden/dqn*.json)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from cerl.agents.parity_dqn import from_original, run_updates, to_original
from cerl.agents.values import quantile_value
from cerl.config import QuantileConfig, ValueOptions, of_kind
from cerl.config.load import sections

FOLDER = Path(__file__).parent / "golden"
FIRST, MORE = (json.loads((FOLDER / name).read_text()) for name in ("dqn.json", "dqn_more.json"))
GOLDEN = FIRST["variants"] | MORE["variants"]
MEMBERS, ACTIONS, BATCH = (FIRST["hyper"][name] for name in ("members", "actions", "batch"))

CERL = {"ensemble.heads": "cerl"}
L3 = {"ensemble.shared_layers": 3}
OWN = {"loss.batches": "own", "replay.candidates": 33}

# What a variant changes of the configuration that all have.
OPTIONS: dict[str, dict[str, Any]] = {
    "bootstrapped_l0": {},
    "bootstrapped_l3": L3,
    "bootstrapped_l4": {"ensemble.shared_layers": 4},
    "cerl": CERL,
    "cerl_l3": CERL | L3,
    "cerl_both": CERL | {"ensemble.fork": "both"},
    "cerl_own_target": {"ensemble.heads": "own_target"},
    "single_cerl": {"ensemble.heads": "single_actor", "ensemble.duty": "first"},
    "multi_horizon": {"ensemble.heads": "multi_horizon"},
    "mico_001": {"agent.mico_weight": 0.01},
    "mico_05": {"agent.mico_weight": 0.5},
    "mico_05_l3": {"agent.mico_weight": 0.5} | L3,
    "mask": {"loss.mask_probability": 0.5},
    "mask_l3": {"loss.mask_probability": 0.5} | L3,
    "own_batches": OWN,
    "own_batches_l3": OWN | L3,
    "feature_norm": {"agent.feature_norm": True},
    "not_double": {"agent.double": False},
    "mse": {"agent.loss": "mse"},
    "no_gradient_scale_l3": {"agent.gradient_scale": False} | L3,
    "n_step_3": {"loss.n_step": 3},
    "quantile": {
        "agent.name": "quantile",
        "agent.quantiles": 11,
        "loss.n_step": 3,
        "agent.double": False,
        "net.padding": "same",
        "agent.shared_bias": False,
        "optim": {"name": "adam", "lr": 5e-5, "eps": 3.125e-4},
    },
}


def config(name):
    tree: dict[str, Any] = {
        "net": {
            "channels": (32, 64, 64),
            "kernels": (8, 4, 3),
            "strides": (4, 2, 1),
            "hidden": (FIRST["hyper"]["penultimate"],),
            "scale": 255.0,
        },
        "encoder": {"frames": 4},
        "agent": {"shared_bias": True},
        "ensemble": {"members": MEMBERS},
        "loss": {"gamma": 0.99},
        "replay": {},
        "optim": {"name": "rmsprop", "lr": 2.5e-4, "decay": 0.95, "eps": 9.765625e-6},
    }
    for key, value in OPTIONS[name].items():
        group, _, leaf = key.partition(".")
        if leaf:
            tree[group][leaf] = value
        else:
            tree[group] = value
    return sections(tree, where="golden")


def leaves(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy((rng.standard_normal(shapes[name]) * 0.05).astype(np.float32))
        for name in sorted(shapes)
    }


def drawn(rng, *lead):
    """Transitions [*lead, ...] in the order in which the file's recipe draws them."""
    image = (*lead, 84, 84, 4)
    states, next_states = (rng.integers(0, 256, image).astype(np.uint8) for _ in range(2))
    batch = dict(
        states=states,
        next_states=next_states,
        actions=rng.integers(0, ACTIONS, lead),
        rewards=(rng.standard_normal(lead) * 2).astype(np.float32),
        terminals=(rng.random(lead) < 0.25).astype(np.float32),
    )
    return {name: torch.from_numpy(value) for name, value in batch.items()}


class Batches(NamedTuple):
    shared: dict[str, torch.Tensor]  # [B, ...]
    own: dict[str, torch.Tensor]  # [N, B, ...]
    mask: torch.Tensor  # [N, B]

    def of(self, cfg):
        masked = {"mask": self.mask} if cfg.loss.mask_probability < 1 else {}
        return (self.shared if cfg.loss.batches == "shared" else self.own) | masked


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(3)
    shared = drawn(rng, BATCH)
    mask = rng.random((BATCH, MEMBERS)) < 0.5
    mask[0] = True
    own = {name: value.transpose(0, 1) for name, value in drawn(rng, BATCH, MEMBERS).items()}
    return Batches(shared, own, torch.from_numpy(mask).T)


def fingerprint(tensor):
    value = tensor.detach().numpy().astype(np.float64)
    probe = np.random.default_rng(99).standard_normal(value.shape)
    return np.sqrt((value**2).sum()), (value * probe).sum()


def in_their_order(x, kind):
    """[N, B, J, ...] -> [B, N, their head, ...], without the head axis where a member has one."""
    x = x.movedim(1, 0)
    if kind == "own":
        return x[:, :, 0]
    if kind == "multi_horizon":
        return x
    theirs = torch.arange(MEMBERS)
    return torch.stack([x[:, i, (theirs - i) % MEMBERS] for i in range(MEMBERS)], 1)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_updates_reproduce_the_original(name, batches):
    golden, cfg = GOLDEN[name], config(name)
    shapes = {key: tuple(shape) for key, shape in golden["shapes"].items()}
    kind = cfg.ensemble.heads
    order = dict(
        heads=kind != "own", rotated=kind != "multi_horizon", forked=cfg.ensemble.fork == "both"
    )
    start = leaves(shapes, 1)
    outcome = run_updates(
        from_original(start, shared=cfg.ensemble.shared_layers, **order),
        from_original(leaves(shapes, 2), shared=cfg.ensemble.shared_layers, **order),
        **batches.of(cfg),
        config=cfg,
        action_count=ACTIONS,
        updates=3,
    )

    values = golden["logits" if name == "quantile" else "q_online"]
    close(in_their_order(outcome.values, kind), torch.tensor(values))
    target, ours = torch.tensor(golden["target"]), in_their_order(outcome.targets, kind)
    if name == "quantile" or kind == "own" or target.dim() == 3:
        close(ours, target)
    else:  # one scalar per head, the same for every trunk
        assert torch.equal(ours, ours[:, :1].expand_as(ours))
        close(ours[:, 0], target)
    for k, step in enumerate(golden["steps"]):
        total = step["mean_loss" if name == "quantile" else "total_loss"]
        assert float(outcome.losses[k].sum()) == pytest.approx(total, rel=1e-4)
        if name != "quantile":
            main = outcome.head_losses[k][:, 0].tolist()
            assert main == pytest.approx(step["member_loss"], rel=1e-4)
        if of_kind(cfg.agent, ValueOptions).mico_weight:
            mico = outcome.metrics[k]["mico_loss"]  # shared: one loss, shown for every member
            mico = mico[0] if cfg.ensemble.shared_layers else mico.sum()
            assert float(mico) == pytest.approx(step["mico_loss"], rel=1e-4)
        after = to_original(outcome.parameters[k], shapes, **order)
        for leaf in shapes:
            for tensor, wanted in (
                (after[leaf] - start[leaf], step["delta"][leaf]),
                (after[leaf], step["params_after"][leaf]),
            ):
                size, dot = fingerprint(tensor)
                assert size == pytest.approx(wanted["l2"], rel=1e-3), (k, leaf)
                assert dot == pytest.approx(wanted["dot"], abs=1e-3 * wanted["l2"]), (k, leaf)


def test_the_quantile_loss_of_every_transition_is_the_originals(batches):
    golden, agent = GOLDEN["quantile"], of_kind(config("quantile").agent, QuantileConfig)
    logits, target = torch.tensor(golden["logits"]), torch.tensor(golden["target"])
    taken = logits[torch.arange(BATCH), :, batches.shared["actions"]]  # [B, N, atoms]
    ours = quantile_value(agent).error(taken, target).sum(1)
    assert ours.tolist() == pytest.approx(golden["steps"][0]["batch_loss"], rel=1e-4)


def test_every_variant_of_the_files_is_compared():
    assert set(OPTIONS) == set(GOLDEN)
    assert not set(FIRST["variants"]) & set(MORE["variants"])
