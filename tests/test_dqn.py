"""The loss and its gradients against slow loops in plain torch, one member and one row at a time.

The loops know nothing of the head table, of batched layers or of gradient hooks: they follow the
definitions (one `conv2d` and `linear` for each member, one target for each head and row) and apply
the originals' factors to the finished gradients.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from rounding import ROUNDINGS, assert_agree
from torch.nn import functional as F

from cerl import draw, explore
from cerl.agents import dqn
from cerl.agents.dqn import DQN
from cerl.agents.parity_dqn import run_updates
from cerl.agents.values import value_kind
from cerl.config import (
    Config,
    DqnConfig,
    EnsembleConfig,
    FramesConfig,
    LossConfig,
    NetConfig,
    QuantileConfig,
    ReplayConfig,
    RmsPropConfig,
    SacConfig,
    ValueOptions,
    of_kind,
)
from cerl.data import ActInput, EnvSpec, Previous, Row, Window
from cerl.learn import Learner
from cerl.optim import Optimiser
from cerl.replay import Replay

CPU = torch.device("cpu")
SPEC = EnvSpec("image", (2, 8, 8), torch.uint8, 4, 2, 1, True, True)
GAMMA, N, B = 0.9, 3, 5


def config(
    *,
    seeds=(0, 1),
    heads: Any = "own",
    shared=0,
    fork: Any = "final",
    members=N,
    agent: Any = "dqn",
    net: Any = (),
    **loss: Any,
):
    shape: dict[str, Any] = dict(
        channels=(3, 4, 4),
        kernels=(3, 3, 2),
        strides=(1, 1, 1),
        hidden=(8,),
        scale=255.0,
    )
    batches = loss.get("batches", "shared")
    shape |= dict(net)
    kind = {"dqn": DqnConfig, "quantile": QuantileConfig}[agent]
    own = {name: loss.pop(name) for name in [*loss] if name in kind.model_fields}
    own |= {name: shape.pop(name) for name in [*shape] if name in kind.model_fields}
    return Config(
        agent=kind(**own),
        seeds=seeds,
        encoder=FramesConfig(frames=shape.pop("stack", 2)),
        net=NetConfig(**shape),
        ensemble=EnsembleConfig(
            members=members,
            heads=heads,
            shared_layers=shared,
            fork=fork,
            horizons=4,
            duty="first" if heads == "single_actor" else "uniform",
        ),
        loss=LossConfig(**{"gamma": GAMMA, **loss}),
        optim=RmsPropConfig(lr=2e-3, eps=1e-4),
        replay=ReplayConfig(
            capacity=200,
            batch=B,
            start=100,
            candidates=64 if batches in ("own", "disjoint") else 8,
        ),
    )


def make_agent(cfg, spec=SPEC):
    assert not isinstance(cfg.agent, SacConfig)
    return DQN(cfg, spec, kind=value_kind(cfg.agent), device=CPU)


def random_rows(count, seed, *, reward=1.0):
    """Rows of one seed and two environments, ends of episodes included, [count, 2, ...]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 2)
    ended = torch.rand(shape, generator=generator) < 0.3
    ended[0] = False
    ended &= ~ended.roll(1, 0)  # an episode has at least one step
    terminal = ended & (torch.rand(shape, generator=generator) < 0.6)
    real = ~ended.roll(1, 0)
    value = torch.randn(shape, generator=generator) * reward * real
    obs = torch.randint(0, 256, (*shape, 2, 8, 8), generator=generator, dtype=torch.uint8)
    action = torch.randint(0, 4, shape, generator=generator)
    member = torch.randint(0, N, shape, generator=generator)
    return Row(obs, action, value, terminal, real, member)


def filled_replay(keys, data, *, capacity=200):
    """data: Rows of each seed."""
    replay = Replay(SPEC, keys=keys, capacity=capacity, device=CPU)
    for t in range(len(data[0].real)):
        replay.add(Row(*(torch.stack([d[k][t] for d in data]) for k in range(len(Row._fields)))))
    return replay


def make_learner(cfg, *, data=None, target_seed=100):
    """A Learner whose target network differs from the online one."""
    keys = draw.seed_keys(cfg.seeds)
    data = data or [random_rows(70, seed) for seed in cfg.seeds]
    agent = make_agent(cfg)
    net = agent.build(keys=keys)
    learner = Learner(cfg, agent, net, filled_replay(keys, data), keys=keys)
    other = agent.build(keys=draw.seed_keys([target_seed + seed for seed in cfg.seeds]))
    learner.target.load_state_dict(other.state_dict())
    return learner


class Member:
    """Network of one member of one seed, one head at a time."""

    def __init__(self, leaves, s, i, cfg):
        self.leaf = {k: v[s, i if v.shape[1] > 1 else 0].double() for k, v in leaves.items()}
        self.cfg = cfg

    def encoded(self, stack):
        """stack [stack * C, h, w] -> flat output of the last convolution: h, w, channel."""
        x = (stack.double() / self.cfg.net.scale).unsqueeze(0)
        for k, (kernel, stride) in enumerate(
            zip(self.cfg.net.kernels, self.cfg.net.strides, strict=True)
        ):
            weight = self.leaf[f"convs.{k}.weight"]
            weight = weight.view(kernel, kernel, -1, weight.shape[-1]).permute(3, 2, 0, 1)
            x = F.conv2d(x, weight, self.leaf[f"convs.{k}.bias"], stride=stride).relu()
        return x[0].permute(1, 2, 0).flatten()

    def q(self, stack, head):
        """[A] or [A, atoms]."""
        x, leaf, net = self.encoded(stack), self.leaf, self.cfg.net
        if "final.hidden" in leaf:
            x = F.linear(x, leaf["final.hidden"][head].T, leaf["final.hidden_bias"][head]).relu()
            weight = leaf["final.weight"][head]
        else:
            for k in range(len(net.hidden)):
                weight, bias = leaf[f"hidden.{k}.weight"], leaf[f"hidden.{k}.bias"]
                x = F.linear(x, weight.T, bias).relu()
            weight = leaf["final.weight"][:, head]
        if self.cfg.agent.feature_norm:
            x = x / (x.square().sum().sqrt() + 1e-6)
        y = F.linear(x, weight.T) + leaf["final.bias"][head]
        return y.view(SPEC.actions, -1) if self.cfg.agent.name == "quantile" else y


def loss_of(learner, window, mask=None):
    agent: Any = learner.agent
    return agent.loss(learner.net, learner.target, window, mask=mask)


def slow_stack(window, s, m, b, row, stack):
    """Frames of one row of a window, zero before the last start; [stack * C, h, w]."""
    frames, alive = [], True
    for at in range(row, row - stack, -1):
        frames.insert(0, window.obs[s, m, b, at] * alive)
        alive = alive and at > 0 and bool(window.real[s, m, b, at - 1])
    return torch.cat(frames)


def slow_n_step(window, s, m, b, first, n, gamma):
    reward, total, k = window.reward[s, m, b].tolist(), 0.0, 0
    while True:
        total += gamma**k * reward[first + k]
        k += 1
        if bool(window.terminated[s, m, b, first + k - 1]):
            return total, 0.0, k
        if k == n or not bool(window.real[s, m, b, first + k]):
            return total, gamma**k, k


def slow_error(cfg, prediction, target):
    """Loss of one head on one row."""
    if cfg.agent.name == "quantile":
        loss, count = 0.0, len(prediction)
        for m, sample in itertools.product(range(count), target):
            u = sample - prediction[m]
            huber = 0.5 * u**2 if abs(u.item()) <= 1 else abs(u) - 0.5
            loss = loss + abs((m + 0.5) / count - (1.0 if u < 0 else 0.0)) * huber / count
        return loss
    e = prediction - target
    if cfg.agent.loss == "mse":
        return e**2
    delta = cfg.agent.huber_delta
    return 0.5 * e**2 if abs(e.item()) <= delta else delta * (abs(e) - 0.5 * delta)


def heads_of(cfg):
    ens = cfg.ensemble
    fixed = {"own": 1, "mean": 1, "multi_horizon": ens.horizons}
    return fixed.get(ens.heads, ens.members)


def slow_target(cfg, online, target, i, j, stack, reward, discount):
    """What head j of member i regresses to in one row; `online`, `target`: Members of the seed."""
    kind, m = cfg.ensemble.heads, (i + j) % len(online)
    if kind == "mean":
        own = cfg.model_copy(update={"ensemble": cfg.ensemble.model_copy(update={"heads": "own"})})
        each = (
            slow_target(own, online, target, k, 0, stack, reward, discount)
            for k in range(len(online))
        )
        return sum(each) / len(online)
    chooser = {"single_actor": 0, "multi_horizon": i}.get(kind, m)
    own_value = kind in ("own_target", "multi_horizon")
    valuer, head = (i, j) if own_value else (m, 0)
    with torch.no_grad():
        choice = (online if cfg.agent.double else target)[chooser].q(stack, 0)
        choice = choice.mean(-1) if cfg.agent.name == "quantile" else choice
        best = choice.tolist().index(max(choice.tolist()))
        return reward + discount * target[valuer].q(stack, head)[best]


def horizons(cfg):
    """Discount of every head."""
    if cfg.ensemble.heads != "multi_horizon":
        return [GAMMA] * heads_of(cfg)
    longest, count = 1 / (1 - GAMMA), cfg.ensemble.horizons
    return [1 - 1 / (longest * (count - h) / count) for h in range(count)]


def angle_distance(x, y, beta):
    cosine = (x @ y) / (x.norm() * y.norm())
    return 0.5 * (x @ x + y @ y) + beta * torch.acos(cosine.clamp(-1 + 1e-9, 1 - 1e-9))


def slow_mico(cfg, online, target, rows):
    """Mean over all pairs; rows: (stack, next stack, reward) of each element of the batch."""
    here = [online.encoded(stack) for stack, _, _ in rows]
    with torch.no_grad():
        there = [target.encoded(stack) for stack, _, _ in rows]
        later = [target.encoded(stack) for _, stack, _ in rows]
    total, gamma = 0.0, GAMMA**cfg.loss.n_step
    for a, b in itertools.product(range(len(rows)), repeat=2):
        with torch.no_grad():
            goal = abs(rows[a][2] - rows[b][2])
            goal = goal + gamma * angle_distance(later[a], later[b], cfg.agent.mico_beta)
        e = angle_distance(here[a], there[b], cfg.agent.mico_beta) - goal
        total = total + (0.5 * e**2 if abs(e.item()) <= 1 else abs(e) - 0.5)
    return total / len(rows) ** 2


def slow_loss(cfg, leaves, target_leaves, window, mask):
    """Loss of every member [S][N] as the definitions say it, and the sum that is minimised."""
    first, n, losses, total = cfg.encoder.frames - 1, cfg.loss.n_step, [], torch.zeros(())
    gammas, weight = horizons(cfg), cfg.agent.mico_weight
    for s in range(len(cfg.seeds)):
        online = [Member(leaves, s, i, cfg) for i in range(cfg.ensemble.members)]
        target = [Member(target_leaves, s, i, cfg) for i in range(cfg.ensemble.members)]
        losses.append([])
        for i in range(cfg.ensemble.members):
            m = i if window.obs.shape[1] > 1 else 0
            td, used, rows = torch.zeros(()), 0, []
            for b in range(window.obs.shape[2]):
                learns = bool(window.weight[s, m, b]) and (mask is None or bool(mask[s, i, b]))
                if not learns:
                    continue
                used += 1
                stack = slow_stack(window, s, m, b, first, cfg.encoder.frames)
                for j, gamma in enumerate(gammas):
                    reward, discount, k = slow_n_step(window, s, m, b, first, n, gamma)
                    later = slow_stack(window, s, m, b, first + k, cfg.encoder.frames)
                    y = slow_target(cfg, online, target, i, j, later, reward, discount)
                    prediction = online[i].q(stack, j)[window.action[s, m, b, first]]
                    td = td + slow_error(cfg, prediction, y)
                    if j == 0:
                        rows.append((stack, later, reward))
            td = td / max(used, 1)
            if weight:
                shared = cfg.ensemble.shared_layers >= len(cfg.net.channels)
                metric = slow_mico(cfg, online[i], target[i], rows)
                # one metric loss for a common encoder, one for each member otherwise
                share = 1 / cfg.ensemble.members if shared else 1.0
                td = (1 - weight) * td + weight * metric * share
            losses[-1].append(td)
            total = total + td
    return losses, total


def slow_factor(cfg, name):
    """The originals' factor of a parameter's gradient (their table, by group of layers)."""
    ens, convs = cfg.ensemble, len(cfg.net.channels)
    kind, leaf = name.rsplit(".", 1)
    heads = heads_of(cfg)
    if kind == "final":
        return 1.0
    layer = int(kind.split(".")[1]) if kind.startswith("convs") else convs
    factor = 1 / ens.members if layer < ens.shared_layers else 1.0
    return factor / heads


VARIANTS = {
    "own": dict(),
    "cerl": dict(heads="cerl"),
    "own_target": dict(heads="own_target"),
    "single_actor": dict(heads="single_actor"),
    "multi_horizon": dict(heads="multi_horizon"),
    "mean": dict(heads="mean"),
    "mean_l3": dict(heads="mean", shared=3, n_step=2),
    "both": dict(heads="cerl", fork="both"),
    "both_own_target": dict(heads="own_target", fork="both"),
    "own_l1": dict(shared=1),
    "own_l2": dict(shared=2),
    "own_l3": dict(shared=3),
    "own_l4": dict(shared=4),
    "cerl_l1": dict(heads="cerl", shared=1),
    "cerl_l2": dict(heads="cerl", shared=2),
    "cerl_l3": dict(heads="cerl", shared=3),
    "single_net": dict(members=1),
    "no_double": dict(double=False),
    "no_double_cerl": dict(heads="cerl", double=False),
    "mse": dict(loss="mse"),
    "mse_cerl": dict(heads="cerl", loss="mse"),
    "huber_delta": dict(huber_delta=0.2),
    "n_step": dict(n_step=3),
    "n_step_cerl": dict(heads="cerl", n_step=3),
    "n_step_horizons": dict(heads="multi_horizon", n_step=2),
    "mask": dict(mask_probability=0.5),
    "mask_l3": dict(mask_probability=0.5, shared=3),
    "independent": dict(batches="independent"),
    "own_batches": dict(batches="own"),
    "own_batches_l3": dict(batches="own", shared=3),
    "disjoint": dict(batches="disjoint"),
    "mico": dict(mico_weight=0.3),
    "mico_cerl": dict(mico_weight=0.3, heads="cerl"),
    "mico_l1": dict(mico_weight=0.3, shared=1),
    "mico_l3": dict(mico_weight=0.3, shared=3),
    "mico_l4": dict(mico_weight=0.3, shared=4),
    "mico_cerl_l3": dict(mico_weight=0.3, heads="cerl", shared=3),
    "mico_both": dict(mico_weight=0.3, heads="cerl", fork="both"),
    "mico_n_step": dict(mico_weight=0.3, n_step=2),
    "quantile": dict(agent="quantile", quantiles=4, double=False, n_step=3),
    "quantile_double": dict(agent="quantile", quantiles=4),
    "quantile_cerl": dict(agent="quantile", quantiles=3, heads="cerl", fork="both"),
    "quantile_mean": dict(agent="quantile", quantiles=3, heads="mean"),
    "shared_bias": dict(heads="cerl", net=dict(shared_bias=True)),
    "feature_norm": dict(heads="cerl", net=dict(feature_norm=True)),
    "feature_norm_both": dict(heads="cerl", fork="both", net=dict(feature_norm=True)),
    "no_stack_two_hidden": dict(heads="cerl", net=dict(stack=1, hidden=(6, 5))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_slow_loops(variant):
    cfg = config(**VARIANTS[variant])
    learner = make_learner(cfg)
    learner.updates += 7
    window = learner.sample()
    mask = learner.mask(window)
    loss, *_ = loss_of(learner, window, mask)
    grads = torch.autograd.grad(loss.sum(), learner.leaves)

    copies = {k: v.detach().clone().requires_grad_() for k, v in learner.net.named_parameters()}
    wanted, total = slow_loss(cfg, copies, dict(learner.target.named_parameters()), window, mask)
    want = torch.tensor([[x.item() for x in row] for row in wanted], dtype=torch.float64)
    assert_agree(loss.detach(), want)
    slow = torch.autograd.grad(total, list(copies.values()))
    # Small angles between features enlarge the rounding of their cosines.
    roundings = 1_000 if of_kind(cfg.agent, ValueOptions).mico_weight else ROUNDINGS
    for name, ours, theirs in zip(copies, grads, slow, strict=True):
        theirs = theirs * slow_factor(cfg, name)
        size = float(theirs.abs().max())
        assert size > 0, name
        assert_agree(ours, theirs, roundings=roundings, where=name)


def test_a_masked_out_batch_gives_zero_loss_and_finite_gradients():
    learner = make_learner(config(mask_probability=0.5))
    mask = torch.ones(2, N, B)
    mask[0, 1] = 0
    loss, *_ = loss_of(learner, learner.sample(), mask)
    assert loss[0, 1].item() == 0 and bool((loss.detach() > 0).sum() == 2 * N - 1)
    grads = torch.autograd.grad(loss.sum(), learner.leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert all(float(g[0, 1].abs().sum()) == 0 for g in grads)
    assert all(float(g[0, 0].abs().sum()) > 0 for g in grads)


def test_slots_without_a_valid_row_do_not_count():
    learner = make_learner(config(heads="cerl"))
    window = learner.sample()
    weight = window.weight.clone()
    weight[:, :, :2] = 0
    whole, *_ = loss_of(learner, window._replace(weight=weight))
    rest = type(window)(*(x[:, :, 2:] for x in window))
    part, *_ = loss_of(learner, rest)
    assert_agree(whole, part)


def test_bootstrap_masks_belong_to_row_and_member_and_have_their_share():
    cfg = config(mask_probability=0.25)
    learner = make_learner(cfg)
    window = learner.sample()
    rows = torch.arange(40_000).view(1, 1, -1).expand(2, 1, -1)
    mask = learner.mask(window._replace(row=rows))
    assert mask is not None and mask.shape == (2, N, 40_000)
    limit = 4.5 * 0.433 / 200
    for s, i in itertools.product(range(2), range(N)):
        assert float(mask[s, i].mean()) == pytest.approx(0.25, abs=limit)
        for other in range(i):
            both = float((mask[s, i] * mask[s, other]).mean())
            assert both == pytest.approx(1 / 16, abs=limit)
    again = learner.mask(window._replace(row=rows[..., 100:200]))
    assert again is not None and torch.equal(again, mask[..., 100:200])
    one_each = learner.mask(window._replace(row=rows.expand(2, N, -1)))
    assert one_each is not None and torch.equal(one_each, mask)
    assert make_learner(config()).mask(window) is None


def test_metrics_are_the_main_heads_loss_and_values():
    cfg = config(heads="cerl")
    learner = make_learner(cfg)
    window = learner.sample()
    _, metrics, _ = loss_of(learner, window)
    leaves = dict(learner.net.named_parameters())
    for s, i in itertools.product(range(2), range(N)):
        member = Member(leaves, s, i, cfg)
        rows = [slow_stack(window, s, 0, b, 1, 2) for b in range(B)]
        q = torch.stack([member.q(stack, 0).detach() for stack in rows])
        taken = q.gather(1, window.action[s, 0, :, 1:2])
        assert metrics["q_pi"][s, i].item() == pytest.approx(q.max(1)[0].mean().item(), abs=1e-5)
        assert metrics["q_data"][s, i].item() == pytest.approx(taken.mean().item(), abs=1e-5)
    alone, *_ = loss_of(learner, window)
    assert bool((metrics["loss"] < alone.detach()).all())  # one of N heads


# The loss for checking from outside.


@pytest.mark.parametrize(
    "options",
    [
        dict(heads="cerl", shared=3),
        dict(heads="multi_horizon"),
        dict(mico_weight=0.3),
        dict(agent="quantile", quantiles=4),
        dict(heads="cerl", fork="both", double=False, loss="mse"),
    ],
    ids=str,
)
def test_updates_on_given_transitions_equal_those_of_a_window_that_holds_them(
    options: dict[str, Any],
):
    cfg = config(seeds=(0,), net=dict(stack=1), **options)
    spec = SPEC._replace(observation=(8, 8))
    agent, generator = make_agent(cfg, spec), torch.Generator().manual_seed(2)
    online, target = (agent.build(keys=draw.seed_keys([k])) for k in (0, 9))
    given = [{k: v.detach().clone() for k, v in n.named_parameters()} for n in (online, target)]
    frames = torch.randint(0, 256, (1, 1, B, 2, 8, 8), generator=generator, dtype=torch.uint8)
    action = torch.randint(0, 4, (1, 1, B, 2), generator=generator)
    reward = torch.randn(1, 1, B, 2, generator=generator)
    ended = torch.zeros(1, 1, B, 2, dtype=torch.bool)
    ended[..., 1, 0] = True
    window = Window(
        obs=frames,
        action=action,
        reward=reward,
        terminated=ended,
        real=torch.cat([torch.ones_like(ended[..., :1]), ~ended[..., :1]], -1),
        member=torch.zeros_like(action),
        row=torch.arange(B).view(1, 1, B),
        weight=torch.ones(1, 1, B),
        state=torch.zeros(1, 1, B, 0),
    )
    outcome = run_updates(
        *given,
        states=frames[0, 0, :, 0].unsqueeze(-1),
        actions=action[0, 0, :, 0],
        rewards=reward[0, 0, :, 0],
        terminals=ended[0, 0, :, 0].float(),
        next_states=frames[0, 0, :, 1].unsqueeze(-1),
        config=cfg,
        action_count=4,
        updates=2,
    )
    leaves = list(online.parameters())
    optimiser = Optimiser(cfg.optim, leaves)
    for k in range(2):
        loss, *_ = agent.loss(online, target, window, mask=None)
        assert_agree(outcome.losses[k], loss[0].detach())
        optimiser.step(torch.autograd.grad(loss.sum(), leaves))
        for name, leaf in online.named_parameters():
            assert_agree(outcome.parameters[k][name], leaf.detach(), where=name)


def test_given_transitions_must_be_those_that_the_config_asks_for():
    states, actions = torch.zeros(1, 8, 8, 1), torch.zeros(1)
    own = dict(batches="own")
    refused: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor | None, str]] = [
        (own, actions, None, r"actions: expected \[3, 1\] with loss.batches own, got \[1\]"),
        ({}, actions[None], None, r"actions: expected \[1\] with loss.batches shared"),
        (dict(mask_probability=0.5), actions, None, "mask: expected one exactly where .* got none"),
        ({}, actions, torch.ones(3, 1), "mask: expected one exactly where .* got one and 1"),
        (dict(mask_probability=0.5), actions, torch.ones(1, 3), r"mask: expected \[3, 1\], .*3\]"),
    ]
    for options, given, mask, words in refused:
        with pytest.raises(ValueError, match=words):
            run_updates(
                {},
                {},
                states=states,
                next_states=states,
                actions=given,
                rewards=given,
                terminals=given,
                mask=mask,
                config=config(**options),
                action_count=4,
            )


# Seeds do not touch each other.

STANDING = {
    "own": dict(),
    "cerl_l3": dict(heads="cerl", shared=3),
    "mean": dict(heads="mean"),
    "both": dict(heads="cerl", fork="both"),
    "mico": dict(mico_weight=0.3),
    "quantile": dict(agent="quantile", quantiles=4, n_step=3),
    "own_batches": dict(batches="own", mask_probability=0.5),
}


def after_updates(cfg, data, *, clip=0.0, updates=5):
    """Parameters, target and optimiser state by name after a few updates and a target copy."""
    optim = cfg.optim.model_copy(update={"clip_norm": clip})
    learner = make_learner(cfg.model_copy(update={"optim": optim}), data=data)
    for k in range(updates):
        learner.update()
        if k == 2:
            learner.sync()
    state = {f"net {k}": v.detach() for k, v in learner.net.named_parameters()}
    state |= {f"target {k}": v for k, v in learner.target.named_parameters()}
    for moment in ("first", "second"):
        values = getattr(learner.optimisers[0][0], moment)
        state |= {f"{moment} {k}": v for k, v in enumerate(values)}
    return state


@pytest.mark.parametrize("variant", STANDING)
def test_nan_in_one_seed_leaves_the_others_bitwise_alone(variant):
    cfg = config(**STANDING[variant])
    data = [random_rows(70, 0), random_rows(70, 1)]
    broken = [data[0], data[1]._replace(reward=torch.full_like(data[1].reward, float("nan")))]
    clean, sick = (after_updates(cfg, d, clip=1.0) for d in (data, broken))
    start = dict(make_agent(cfg).build(keys=draw.seed_keys((0, 1))).named_parameters())
    for name, value in clean.items():
        assert torch.equal(value[0], sick[name][0]), name
        if name.startswith("net "):
            assert bool(sick[name][1].isnan().any()), name
            assert not torch.equal(value[0], start[name[4:]][0]), name


@pytest.mark.parametrize("variant", STANDING)
def test_seeds_learn_the_same_alone_and_among_others(variant):
    options = STANDING[variant]
    data = [random_rows(70, seed) for seed in range(3)]
    runs = {
        seeds: after_updates(config(seeds=seeds, **options), [data[s] for s in seeds])
        for seeds in ((0, 1, 2), (0, 1), (2,))
    }
    for seeds in ((0, 1), (2,)):
        for at, seed in enumerate(seeds):
            for name, value in runs[seeds].items():
                assert_agree(value[at], runs[0, 1, 2][name][seed], where=name)


@pytest.mark.parametrize("variant", STANDING)
def test_seeds_draw_bitwise_the_same_batches_and_masks_alone_and_among_others(variant):
    options = STANDING[variant]
    data = [random_rows(70, seed) for seed in range(3)]
    together = make_learner(config(seeds=(0, 1, 2), **options), data=data)
    alone = make_learner(config(seeds=(2,), **options), data=data[2:])
    for step in range(4):
        for learner in (together, alone):
            learner.updates.fill_(step)
        ours, theirs = together.sample(), alone.sample()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a[2:], b)
        masks = together.mask(ours), alone.mask(theirs)
        assert (masks[0] is None) == (masks[1] is None)
        if masks[0] is not None and masks[1] is not None:
            assert torch.equal(masks[0][2:], masks[1])


# Acting.


def table_agent(q, **options):
    """An agent whose members' values are a table q [S, N, E, A]: observations are one-hot in E."""
    seeds, members, envs, actions = q.shape
    spec = EnvSpec("table", (envs,), torch.float32, actions, envs, 1, True, True)
    cfg = Config(
        seeds=tuple(range(seeds)),
        net=NetConfig(hidden=()),
        ensemble=EnsembleConfig(members=members, **options),
    )
    agent = make_agent(cfg, spec)
    net = agent.build(keys=draw.seed_keys(cfg.seeds))
    with torch.no_grad():
        for leaf in net.parameters():
            leaf.fill_(100.0)  # other heads must not matter
        net.final.weight[..., 0, :] = q  # [S, N, in, J, A]
        net.final.bias[:, :, 0] = 0.0
    return agent, net


def act(agent, net, member, *, eps=0.0, step=0, evaluating=None):
    seeds, envs = member.shape
    obs = torch.eye(envs).expand(seeds, envs, envs)
    start = torch.ones(seeds, envs, dtype=torch.bool)
    carry = net.carry(envs=envs, evaluating=evaluating is not None)
    seen = ActInput(obs, start, Previous(torch.zeros_like(member), obs[..., 0]), member)
    noise = explore.noise(
        draw.seed_keys(range(seeds)),
        torch.tensor(step),
        envs=envs,
        actions=agent.spec.actions,
        eps=eps,
        votes=evaluating is not None and "vote" in evaluating,
    )
    with torch.no_grad():
        decision = agent.act(net, seen, carry, noise=noise, evaluating=evaluating)
    return decision, noise


@pytest.mark.parametrize("heads", ["own", "cerl"])
def test_the_member_on_duty_acts_greedily_with_its_own_head(heads):
    q = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    agent, net = table_agent(q, heads=heads)
    member = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(1))
    decision, _ = act(agent, net, member)
    for s, e in itertools.product(range(2), range(50)):
        mine = q[s, member[s, e], e].tolist()
        assert int(decision.action[s, e]) == mine.index(max(mine))
        assert float(decision.value[s, e]) == pytest.approx(max(mine), abs=1e-6)
    assert float(decision.diversity.sum()) == 0


def test_ties_go_to_the_first_action():
    q = torch.tensor([[0.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]])
    agent, net = table_agent(q.view(1, 1, 3, 4))
    decision, _ = act(agent, net, torch.zeros(1, 3, dtype=torch.int64))
    assert decision.action.tolist() == [[1, 0, 3]]


def test_random_actions_replace_greedy_ones_where_the_noise_says_so():
    q = torch.zeros(2, 1, 400, 3)
    q[..., 1] = 1.0
    agent, net = table_agent(q)
    decision, noise = act(agent, net, torch.zeros(2, 400, dtype=torch.int64), eps=0.5)
    assert 300 < int(noise.explore.sum()) < 500
    assert torch.equal(decision.action, torch.where(noise.explore, noise.action, 1))
    assert float(decision.value.min()) == 1.0


def greedy_table(choices, actions, envs):
    """q [1, N, E, A] in which member i prefers action choices[i] in every environment."""
    q = torch.zeros(1, len(choices), envs, actions)
    for i, action in enumerate(choices):
        q[0, i, :, action] = 1.0 + i
    return q


def test_the_vote_takes_the_most_frequent_greedy_action():
    agent, net = table_agent(greedy_table([2, 0, 2, 1, 2], 4, 30))
    decision, _ = act(agent, net, torch.full((1, 30), 5), evaluating=("vote",))
    assert decision.action.tolist() == [[2] * 30]
    want = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert decision.diversity[0].tolist() == pytest.approx([want] * 30, abs=1e-6)


def test_ties_of_the_vote_are_broken_uniformly_among_the_tied():
    envs = 3_000
    agent, net = table_agent(greedy_table([3, 1, 0, 3, 1, 0, 2], 4, envs))
    decision, _ = act(agent, net, torch.full((1, envs), 7), evaluating=("vote",))
    limit = 4.5 * math.sqrt(2 / 9 * envs)
    for action in (0, 1, 3):
        assert abs(int((decision.action == action).sum()) - envs / 3) < limit
    assert int((decision.action == 2).sum()) == 0
    other, _ = act(agent, net, torch.full((1, envs), 7), step=1, evaluating=("vote",))
    assert not torch.equal(other.action, decision.action)


def test_the_mean_policy_is_greedy_in_the_mean_q_and_members_beside_it_are_not():
    # members prefer 0, 0 and 2; the third's preference is so strong that the mean's is 2
    agent, net = table_agent(greedy_table([0, 0, 2], 3, 5))
    net.final.weight.data[0, 2, :, 0, 2] = 10.0
    member = torch.tensor([[0, 1, 2, 3, 4]])
    decision, _ = act(agent, net, member, evaluating=("vote", "mean"))
    assert decision.action.tolist() == [[0, 0, 2, 0, 2]]
    swapped, _ = act(agent, net, member, evaluating=("mean", "vote"))
    assert swapped.action.tolist() == [[0, 0, 2, 2, 0]]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(shared=1),
        dict(shared=4),
        dict(heads="cerl"),
        dict(heads="cerl", shared=3),
        dict(heads="cerl", fork="both", net=dict(feature_norm=True)),
        dict(agent="quantile", quantiles=5),
        dict(net=dict(shared_bias=True)),
    ],
    ids=str,
)
def test_gathering_the_weights_of_the_acting_member_gives_the_same_decision(options, monkeypatch):
    cfg = config(members=8, **options)
    agent = make_agent(cfg)
    net = agent.build(keys=draw.seed_keys((0, 1)))
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (2, 2, 2, 8, 8), generator=generator, dtype=torch.uint8)
    member = torch.tensor([[3, 0], [7, 3]])
    start = torch.ones(2, 2, dtype=torch.bool)
    carry = net.carry(envs=2, evaluating=False)
    previous = Previous(torch.zeros_like(member), torch.zeros(2, 2))
    seen = ActInput(obs, start, previous, member)
    noise = explore.noise(
        draw.seed_keys((0, 1)), torch.tensor(0), envs=2, actions=4, eps=0.0, votes=False
    )
    calls = []
    original = dqn.gathered

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(dqn, "gathered", counted)
    with torch.no_grad():
        gathered = agent.act(net, seen, carry, noise=noise)
        assert len(calls) == 1  # 3 E < N
        full = agent.act(net, seen, carry, noise=noise, evaluating=())
        assert len(calls) == 1
    assert torch.equal(gathered.action, full.action)
    assert_agree(gathered.value, full.value)
    leaves = dict(net.named_parameters())
    for s, e in itertools.product(range(2), range(2)):
        stack = torch.cat([torch.zeros_like(obs[s, e]), obs[s, e]])
        q = Member(leaves, s, int(member[s, e]), cfg).q(stack, 0).detach()
        q = q.mean(-1) if cfg.agent.name == "quantile" else q
        assert float(gathered.value[s, e]) == pytest.approx(float(q.max()), abs=1e-5)
