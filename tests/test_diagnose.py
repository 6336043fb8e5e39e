"""Diagnostics against numbers worked out by hand and against loops over rows."""

import math
import statistics
from typing import Any

import pytest
import torch

from cerl import draw, wiring
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
    load,
)
from cerl.data import EnvSpec, Row
from cerl.diagnose import (
    attention,
    diagnose,
    dormant_share,
    feature_rank,
    measurements,
    shared_batch,
)
from cerl.learn import Learner
from cerl.replay import Replay, fill_randomly

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
    assert {"own_data_share", "feature_rank", "dormant_share"} <= set(found)
    alone = {name for name, value in found.items() if value.shape == (2,)}
    shared = {"gradient_norm_shared"} if "shared" in options else set()
    assert alone == {"value_spread"} | shared
    assert all(value.shape == (2, 3) for name, value in found.items() if name not in alone)
    assert torch.equal(found["own_data_share"], ours.replay.shares(3))
    window = shared_batch(ours)
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


def test_a_network_without_layers_has_no_features():
    agent, ours = learner(FLAT, hidden=())
    found = diagnose(agent, ours)
    assert "own_data_share" in found and not {"feature_rank", "dormant_share"} & set(found)


@pytest.mark.parametrize("batches", ["shared", "own"])
def test_errors_agreement_and_disagreement_equal_a_loop_over_rows(batches):
    agent, ours = learner(FLAT, hidden=(8,), batches=batches)
    with torch.no_grad():
        for leaf in ours.target.parameters():
            leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    found, window = diagnose(agent, ours), shared_batch(ours)
    assert window.obs.shape[:3] == (2, 1, 16)
    q, target, heads = ours.net, ours.target, agent.table.heads
    x = window.obs[:, :, :, :, :].flatten(2, 3)  # every row of every window
    with torch.no_grad():
        values, next_values = (
            net(x, heads).unflatten(2, (16, -1)) for net in (q, target)
        )  # [S, N, B, W, J, A]
    for s in range(2):
        spread = []
        for i in range(3):
            errors: dict[bool, list[float]] = {True: [], False: []}
            agreed: dict[bool, list[float]] = {True: [], False: []}
            goals, minority = [], []
            for b in range(16):
                if not (window.real[s, 0, b, 0] and window.weight[s, 0, b]):
                    continue
                own = int(window.member[s, 0, b, 0]) == i
                action = int(window.action[s, 0, b, 0])
                best = int(values[s, i, b, 1, 0].argmax())
                goal = float(window.reward[s, 0, b, 0])
                if not window.terminated[s, 0, b, 0]:
                    goal += ours.config.loss.gamma * float(next_values[s, i, b, 1, 0, best])
                goals.append(goal)
                errors[own].append(abs(goal - float(values[s, i, b, 0, 0, action])))
                votes = [int(values[s, k, b, 0, 0].argmax()) for k in range(3)]
                agreed[own].append(float(votes[i] == action))
                most = max(votes.count(a) for a in votes)
                minority.append(float(votes.count(votes[i]) < most))
                if i == 0:
                    each = [float(values[s, k, b, 0, 0, action]) for k in range(3)]
                    spread.append(statistics.stdev(each))
            for name, each in (("td_error", errors), ("greedy_agreement", agreed)):
                assert each[True] and each[False]  # the batch has rows of both kinds
                whole = each[True] + each[False]
                wanted = [statistics.fmean(x) for x in (whole, each[True], each[False])]
                got = [float(found[name + end][s, i]) for end in ("", "_own", "_others")]
                assert got == pytest.approx(wanted, rel=1e-5)
            assert float(found["target_value"][s, i]) == pytest.approx(
                statistics.fmean(goals), rel=1e-5
            )
            assert float(found["vote_disagreement"][s, i]) == pytest.approx(
                statistics.fmean(minority)
            )
        assert float(found["value_spread"][s]) == pytest.approx(statistics.fmean(spread), rel=1e-4)


def test_auxiliary_loss_is_that_of_all_heads_but_the_own():
    agent, ours = learner(FLAT, hidden=(8,))
    for leaf in ours.net.parameters():  # heads that differ
        leaf.data += 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2))
    found = diagnose(agent, ours)
    loss = ours.grads(ours.sample(), stage=0, dice=None)[1]
    # CERL's loss is the sum over heads, of which `loss` shows the first.
    rest = (loss.members - loss.metrics["loss"]).detach() / 2
    torch.testing.assert_close(found["auxiliary_loss"], rest)
    assert bool((found["auxiliary_loss"] > 0).all())
    agent, ours = learner(FLAT, hidden=(8,), members=1)
    assert not {"auxiliary_loss", "value_spread", "vote_disagreement"} & set(diagnose(agent, ours))


@pytest.mark.parametrize("options", [{}, {"shared": 1, **CONV}, {"batches": "own"}], ids=str)
def test_gradient_norms_are_those_of_each_members_parameters(options):
    agent, ours = learner(IMAGE if "channels" in options else FLAT, hidden=(8,), **options)
    found = diagnose(agent, ours)
    loss = ours.loss(
        0, ours.sample(), mask=ours.mask(ours.sample()), dice=None, prepared=None
    ).members
    for s in range(2):
        own, shared = [0.0] * 3, 0.0
        for leaf in ours.net.parameters():
            (grad,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
            if leaf.shape[1] == 1:
                shared += float(grad[s].double().square().sum())
            for i in range(3 if leaf.shape[1] == 3 else 0):
                own[i] += float(grad[s, i].double().square().sum())
        wanted = pytest.approx([math.sqrt(square) for square in own], rel=1e-5)
        assert found["gradient_norm"][s].tolist() == wanted
        if "shared" in options:
            assert float(found["gradient_norm_shared"][s]) == pytest.approx(math.sqrt(shared))
    assert ("gradient_norm_shared" in found) == ("shared" in options)


@pytest.mark.parametrize("batches", ["shared", "own"])
def test_looking_changes_nothing_that_is_learnt(batches):
    _, ours = learner(FLAT, hidden=(8,), batches=batches)
    ours.sampling = ours.sampling._replace(candidates=1)  # so that rows are missed
    ours.update()
    seen = ours.replay.misses.clone()
    assert bool(seen.any())
    state = {name: leaf.clone() for name, leaf in ours.net.state_dict().items()}
    optimiser = [moment.clone() for moment in ours.optimisers[0][0].moments]
    found = measurements(ours, None)  # pyright: ignore[reportArgumentType]
    assert torch.equal(found["misses"], seen) and torch.equal(ours.replay.misses, seen)
    assert int(ours.updates) == 1
    assert all(torch.equal(state[k], v) for k, v in ours.net.state_dict().items())
    assert all(map(torch.equal, optimiser, ours.optimisers[0][0].moments))


GAUGES = (
    "prunable_share",
    "skipped_share",
    "gate_half_life",
    "gate_half_life_spread",
    "self_share",
)


def sequence_learner(preset: str, **options: Any) -> Learner:
    """A learner of two seeds on random rows, with two layers of two heads."""
    sizes: dict[str, Any] = {"encoder.layers": 2, "encoder.width": 16, "net.hidden": (8,)}
    sizes |= {} if preset == "memory/gru" else {"encoder.heads": 2}
    sizes |= {"encoder.learnt": 12, "encoder.sampling": "uniform", "encoder.context": 0}
    rows = {"replay.capacity": 4_000, "replay.start": 1_000, "replay.batch": 6}
    cfg = load(preset, {"seeds": (0, 1), "env.envs": 2, **sizes, **rows, **options})
    continuous = cfg.agent.name == "sac"
    spec = EnvSpec("flat", (7,), torch.float32, 3, 2, 1, True, True, continuous=continuous)
    keys = draw.seed_keys(cfg.seeds)
    agent = wiring.make_agent(cfg, spec, CPU)
    replay = Replay(spec, keys=keys, capacity=4_000, device=CPU)
    fill_randomly(replay, spec, cfg.ensemble.members)
    return Learner(cfg, agent, agent.build(keys=keys), replay, keys=keys)


@pytest.mark.parametrize("shared", [0, 1])
def test_gates_are_measured_in_every_layer_and_head_and_their_mean_over_all(shared):
    ours = sequence_learner(
        "memory/fox-ensemble", **{"ensemble.members": 3, "ensemble.shared_layers": shared}
    )
    window = shared_batch(ours)
    found = attention(ours.net, window)
    layers = ours.net.reader.measured(window)
    assert len(layers) == 2 and layers[0].keys() == set(GAUGES)
    assert len(found) == 5 * (1 + 2 * 2)
    for name in GAUGES:
        heads = [
            found[f"{name}/layer{layer}/head{head}"] for layer in range(2) for head in range(2)
        ]
        assert torch.equal(heads[2], layers[1][name][:, :, 0])
        assert heads[0].shape == (2, 1 if shared else 3)
        torch.testing.assert_close(found[name], torch.stack(heads).mean(0))
    everything = diagnose(ours.agent, ours)
    assert all(everything[name].isfinite().all() for name in GAUGES)


def test_the_measured_rows_are_those_of_learning():
    """The second layer reads what the first one gives, as in `forward`."""
    ours = sequence_learner("memory/fox")
    window = shared_batch(ours)
    trunk, start = ours.net.trunk, window.starts()
    tokens = ours.net.reader.tokens(window, start)
    with torch.no_grad():
        first, second = trunk.blocks
        h = trunk._embed(tokens, None)
        mixed, gauges = first.mix.measured(first.inputs(h, None), start)
        again, _ = first.mix(first.inputs(h, None), start, None, None)
        torch.testing.assert_close(mixed, again)
        h = first.update(h + mixed, None)
        _, later = second.mix.measured(second.inputs(h, None), start)
    for want, got in zip((gauges, later), trunk.measured(tokens, start), strict=True):
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_policies_of_sac_have_measurements_of_their_own():
    ours = sequence_learner("popgym/sac-fox")
    found = attention(ours.net, shared_batch(ours))
    assert {"gate_half_life", "actor_gate_half_life", "actor_self_share/layer1/head0"} <= {*found}
    assert len(found) == 2 * 5 * (1 + 2 * 2)
    assert not torch.equal(found["self_share"], found["actor_self_share"])


def test_attention_without_gates_has_no_half_life_and_other_kinds_have_nothing():
    for preset, names in (("memory/transformer", {"self_share"}), ("memory/gru", set())):
        ours = sequence_learner(preset)
        found = attention(ours.net, shared_batch(ours))
        assert {name.partition("/")[0] for name in found} == names


def test_networks_of_frames_have_no_attention_to_measure():
    _, ours = learner(FLAT, hidden=(8,))
    assert attention(ours.net, shared_batch(ours)) == {}


def test_pruning_skips_much_of_a_long_window_and_changes_no_gradient():
    found, grads = [], []
    for prune in (0.0, -10.0):
        options = {"encoder.learnt": 340, "encoder.gate_scales": (1.0, 3.0), "replay.batch": 2}
        ours = sequence_learner("memory/fox", **options, **{"encoder.prune": prune})
        ours.replay.terminated.fill_(False)
        ours.replay.real.fill_(True)
        window = shared_batch(ours)
        found.append(attention(ours.net, window))
        dice = ours.agent.dice(ours.keys, ours.updates)
        grads.append(ours.grads(window, stage=0, dice=dice)[0])
    whole, pruned = found
    assert (whole["skipped_share"] == 0).all() and (whole["prunable_share"] > 0.5).all()
    assert (pruned["skipped_share"] > 0.3).all()
    torch.testing.assert_close(pruned["prunable_share"], whole["prunable_share"])
    for mine, want in zip(grads[1], grads[0], strict=True):
        assert (mine - want).abs().max() <= 1e-4 * want.abs().max()
