"""Feature rank, dormant units and own-data share against numbers worked out by hand."""

from typing import Any

import pytest
import torch

from cerl import draw
from cerl.agents.dqn import DQN
from cerl.agents.values import expected_value
from cerl.config import (
    Config,
    DqnConfig,
    EnsembleConfig,
    FramesConfig,
    LossConfig,
    NetConfig,
    ReplayConfig,
)
from cerl.data import EnvSpec, Row
from cerl.diagnose import diagnose, dormant_share, feature_rank
from cerl.learn import Learner
from cerl.replay import Replay

CPU = torch.device("cpu")
IMAGE = EnvSpec("image", (6, 6), torch.uint8, 3, 2, 1, True, True)
FLAT = EnvSpec("flat", (7,), torch.float32, 3, 2, 1, True, True)


def with_singular_values(values, rows=12, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    k = len(values)
    scaled = left[:, :k] * torch.tensor(values, dtype=torch.float64)
    return (scaled @ right[:, :k].T).float()


@pytest.mark.parametrize(
    "values, rank",
    [
        ([5.0], 1),
        ([1.0, 1.0, 1.0], 3),
        ([99.5, 0.5], 1),  # 99.5% in one
        ([98.0, 1.5, 0.5], 2),  # 98%, 99.5%
        ([50.0, 49.5, 0.5], 2),
        ([60.0, 20.0, 10.0, 8.0, 1.5, 0.5], 5),  # 98% after four
    ],
)
def test_feature_rank_counts_the_singular_values_that_hold_99_percent(values, rank):
    features = with_singular_values(values)
    assert float(feature_rank(features)) == rank
    assert float(feature_rank(features * 1e-6)) == rank


def test_feature_rank_of_dead_and_of_broken_features():
    alive = with_singular_values([1.0, 1.0])
    broken = alive.clone()
    broken[3, 2] = float("nan")
    ranks = feature_rank(torch.stack([alive, torch.zeros_like(alive), broken]).view(3, 1, 12, 9))
    assert ranks.shape == (3, 1)
    assert ranks[:2, 0].tolist() == [2, 0] and bool(ranks[2, 0].isnan())


def test_dormant_share_by_hand():
    # mean |activation| of four units: 4, 4, 0.05, 0 -> mean 2.0125; 2.5% of it is 0.0503
    first = torch.tensor([[4.0, 3.0, 0.1, 0.0], [4.0, 5.0, 0.0, 0.0]]).view(1, 1, 2, 4)
    # filters of an image, mean over rows and places: 1, 0.03, 2 -> mean 1.01; 2.5% is 0.02525
    second = torch.tensor([1.0, 0.03, 2.0]).expand(1, 1, 2, 5, 5, 3)
    assert dormant_share([first]).tolist() == [[0.5]]
    assert dormant_share([second]).tolist() == [[0.0]]
    assert dormant_share([second, first]).tolist() == [[pytest.approx(2 / 7)]]
    assert dormant_share([torch.zeros(1, 1, 4, 6)]).tolist() == [[1.0]]


def test_dormant_share_counts_a_shared_layer_for_every_member():
    shared = torch.tensor([1.0, 0.0]).expand(2, 1, 3, 2)
    own = torch.ones(2, 3, 3, 2)
    own[:, 1, :, 0] = 0.0
    want = pytest.approx([1 / 4, 2 / 4, 1 / 4])
    assert dormant_share([shared, own]).tolist() == [want, want]


def learner(spec, *, members=3, fork: Any = "final", shared=0, batches: Any = "shared", **net: Any):
    cfg = Config(
        seeds=(0, 1),
        encoder=FramesConfig(frames=net.pop("stack", 1)),
        net=NetConfig(**net),
        ensemble=EnsembleConfig(
            members=members,
            heads="own" if batches != "shared" else "cerl",
            fork=fork,
            shared_layers=shared,
        ),
        loss=LossConfig(batches=batches),
        replay=ReplayConfig(batch=16, candidates=64, capacity=200, start=10),
    )
    keys = draw.seed_keys(cfg.seeds)
    agent = DQN(cfg, spec, kind=expected_value(DqnConfig()), device=CPU)
    replay = Replay(spec, keys=keys, capacity=200, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(130):
        shape = (2, spec.envs)
        obs = torch.rand(*shape, *spec.observation, generator=generator) * 255
        replay.add(
            Row(
                obs.to(spec.dtype),
                torch.randint(0, 3, shape, generator=generator),
                torch.randn(shape, generator=generator),
                torch.zeros(shape, dtype=torch.bool),
                torch.rand(shape, generator=generator) > 0.1,
                torch.randint(0, members, shape, generator=generator),
            )
        )
    return agent, Learner(cfg, agent, agent.build(keys=keys), replay, keys=keys)


CONV = dict(channels=(4,), kernels=(3,), strides=(1,), scale=255.0)


@pytest.mark.parametrize(
    "spec, options",
    [
        (IMAGE, dict(hidden=(8,), stack=2, **CONV)),
        (IMAGE, dict(hidden=(8,), stack=2, shared=1, **CONV)),
        (IMAGE, dict(hidden=(8,), fork="both", **CONV)),
        (IMAGE, dict(hidden=(), **CONV)),
        (FLAT, dict(hidden=(8, 5))),
        (FLAT, dict(hidden=(8, 5), fork="both")),
        (FLAT, dict(hidden=(8,), fork="both")),
        (FLAT, dict(hidden=(8,), batches="own")),
    ],
    ids=str,
)
def test_diagnostics_are_those_of_each_members_layers_on_the_batch(spec, options):
    agent, ours = learner(spec, **options)
    found = diagnose(agent, ours)
    assert set(found) == {"own_data_share", "feature_rank", "dormant_share"}
    assert all(value.shape == (2, 3) for value in found.values())
    assert torch.equal(found["own_data_share"], ours.replay.shares(3))
    window = ours.sample()
    (inputs,) = ours.net.look(window, agent.batch(ours.net, window).now)
    for s in range(2):
        for i in range(3):
            leaf = {
                k: v[s, i if v.shape[1] > 1 else 0].detach() for k, v in ours.net.named_parameters()
            }
            x, layers = inputs[s, 0], []
            for conv in ours.net.convs:
                weight = leaf["convs.0.weight"].view(3, 3, -1, 4).permute(3, 2, 0, 1)
                y = torch.nn.functional.conv2d(x.movedim(-1, 1), weight)
                assert conv.stride == 1
                x = (y.movedim(1, -1) + leaf["convs.0.bias"]).relu()
                layers.append(x)
            x = x.flatten(1)
            for k in range(len(ours.net.hidden)):
                x = (x @ leaf[f"hidden.{k}.weight"] + leaf[f"hidden.{k}.bias"]).relu()
                layers.append(x)
            if "final.hidden" in leaf:
                x = (x @ leaf["final.hidden"][0] + leaf["final.hidden_bias"][0]).relu()
                layers.append(x)
            assert float(found["feature_rank"][s, i]) == float(feature_rank(x))
            share = dormant_share([y.unsqueeze(0).unsqueeze(0) for y in layers])
            assert float(found["dormant_share"][s, i]) == pytest.approx(float(share))


def test_a_network_without_layers_has_only_a_data_share():
    agent, ours = learner(FLAT, hidden=())
    assert set(diagnose(agent, ours)) == {"own_data_share"}


def test_looking_changes_nothing_that_is_learnt():
    agent, ours = learner(FLAT, hidden=(8,))
    before = ours.sample()
    state = {name: leaf.clone() for name, leaf in ours.net.state_dict().items()}
    diagnose(agent, ours)
    assert int(ours.updates) == 0 and torch.equal(before.row, ours.sample().row)
    assert all(torch.equal(state[k], v) for k, v in ours.net.state_dict().items())
