"""Losses, acting and diagnostics of SAC against slow loops, one member and one row at a time."""

import math
from typing import Any

import pytest
import torch
from rounding import assert_agree
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torch.nn import functional as F

from cerl import draw, explore
from cerl.agents.sac import SAC
from cerl.agents.sac_net import log_probability
from cerl.config import (
    AdamConfig,
    Config,
    EnsembleConfig,
    EvalConfig,
    FramesConfig,
    LossConfig,
    NetConfig,
    PointMassEnv,
    ReplayConfig,
    SacConfig,
    ScheduleConfig,
    load,
    of_kind,
)
from cerl.data import ActInput, EnvSpec, Previous, Row
from cerl.diagnose import diagnose
from cerl.kernels import conv, mlp, optim, sac
from cerl.kernels.sac import sampled
from cerl.learn import Learner
from cerl.nets.frames import see
from cerl.replay import Replay

CPU = torch.device("cpu")
A, N, B, GAMMA = 2, 3, 5, 0.9
SPEC = EnvSpec(
    name="flat",
    observation=(4,),
    dtype=torch.float32,
    actions=A,
    envs=2,
    frames=1,
    resident=True,
    exact_state=True,
    continuous=True,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "single": dict(members=1),
    "ensemble": dict(),
    "cerl": dict(heads="cerl"),
    "cerl with huber": dict(heads="cerl", loss="mse_huber", huber_delta=0.3),
    "own target": dict(heads="own_target"),
    "single actor": dict(heads="single_actor"),
    "multi horizon": dict(heads="multi_horizon"),
    "mean": dict(heads="mean"),
    "mean with weighted backups": dict(heads="mean", spread_temperature=3.0, n_step=2),
    "three steps": dict(heads="cerl", n_step=3),
    "masks": dict(mask_probability=0.5),
    "independent batches": dict(batches="independent"),
    "redq": dict(members=1, critics=5, target_critics=2, actor_value="mean"),
    "random critics of an ensemble": dict(heads="cerl", critics=3, target_critics=2),
    "weighted backups": dict(spread_temperature=3.0),
    "weighted backups with heads": dict(
        spread_temperature=3.0, heads="cerl", loss="mse_huber", huber_delta=0.3
    ),
    "no entropy": dict(backup_entropy=False),
    "layer norm": dict(critic_norm="layer", heads="cerl"),
    "plain layer norm and clipped deviations": dict(
        critic_norm="layer_plain", log_std="clip", log_std_min=-1.0, log_std_max=0.1
    ),
    "stack": dict(stack=2, heads="cerl"),
    "three hidden layers": dict(hidden=(8, 7, 6), heads="cerl"),
    "one hidden layer": dict(hidden=(6,), batches="independent"),
    "convolutions": dict(heads="cerl", stack=2, channels=(3, 2), kernels=(2, 2), strides=(1, 1)),
    "convolutions, layer norm": dict(
        channels=(3,), kernels=(2,), strides=(1,), critic_norm="layer", batches="independent"
    ),
    "convolutions, own target": dict(
        heads="own_target", channels=(3,), kernels=(2,), strides=(1,), hidden=(8, 7, 6)
    ),
}


def config(*, seeds=(0, 1), heads: Any = "own", members=N, **options: Any) -> Config:
    in_net = ("hidden", "init", "channels", "kernels", "strides")
    net = {k: options.pop(k) for k in in_net if k in options}
    frames = FramesConfig(frames=options.pop("stack", 1))
    agent: dict[str, Any] = {"target_entropy": -0.5, "temperature": 0.7}
    agent |= {k: options.pop(k) for k in [*options] if k in SacConfig.model_fields}
    return Config(
        agent=SacConfig(**agent),
        encoder=frames,
        seeds=seeds,
        env=PointMassEnv(),
        net=NetConfig(**{"hidden": (8, 6), "init": "orthogonal"} | net),
        ensemble=EnsembleConfig(
            members=members,
            heads=heads,
            horizons=4,
            duty="first" if heads == "single_actor" else "uniform",
        ),
        loss=LossConfig(gamma=GAMMA, **options),
        optim=AdamConfig(lr=2e-3),
        replay=ReplayConfig(capacity=200, batch=B, start=100),
        schedule=ScheduleConfig(target_rate=0.1),
        eval=EvalConfig(policies=("individual",)),
    )


def seen(cfg) -> EnvSpec:
    """What the networks of a config look at: four numbers, or images."""
    return SPEC._replace(observation=(3, 4)) if cfg.net.channels else SPEC


def random_rows(count, seed, observation=(4,)):
    """Rows of one seed and two environments, ends of episodes included, [count, 2, ...]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 2)

    def normal(*rest):
        return torch.randn(*shape, *rest, generator=generator)

    ended = torch.rand(shape, generator=generator) < 0.3
    ended[0] = False
    ended &= ~ended.roll(1, 0)
    terminal = ended & (torch.rand(shape, generator=generator) < 0.6)
    real = ~ended.roll(1, 0)
    member = torch.randint(0, N, shape, generator=generator)
    return Row(normal(*observation), torch.tanh(normal(A)), normal() * real, terminal, real, member)


def make_learner(cfg, *, data=None):
    """A Learner whose target critics differ from the online ones."""
    keys = draw.seed_keys(cfg.seeds)
    spec = seen(cfg)
    data = data or [random_rows(70, seed, spec.observation) for seed in cfg.seeds]
    replay = Replay(spec, keys=keys, capacity=200, device=CPU)
    for t in range(70):
        replay.add(Row(*(torch.stack([d[k][t] for d in data]) for k in range(len(Row._fields)))))
    agent = SAC(cfg, spec, device=CPU)
    learner = Learner(cfg, agent, agent.build(keys=keys), replay, keys=keys)
    other = agent.build(keys=draw.seed_keys([100 + seed for seed in cfg.seeds]))
    learner.target.load_state_dict(other.critic.state_dict())
    with torch.no_grad():  # biases and temperatures that differ
        for leaf in (*learner.net.parameters(), *learner.target.parameters()):
            u = draw.normal(keys, draw.TIE, leaf[0].numel(), leaf.shape[1:])
            leaf += 0.1 * u
    return learner


def linear(leaves, name, x, at):
    return F.linear(x, leaves[f"{name}.weight"][at].T, leaves[f"{name}.bias"][at])


def slow_sight(cfg, leaves, name, at, x):
    """Flat features of an image [stack, height, width]; at = (seed, member)."""
    for k, filters in enumerate(cfg.net.channels):
        weight, size = leaves[f"{name}{k}.weight"][at], cfg.net.kernels[k]
        weight = weight.view(size, size, -1, filters).permute(3, 2, 0, 1)
        x = F.conv2d(x, weight, leaves[f"{name}{k}.bias"][at], stride=cfg.net.strides[k]).relu()
    return x.permute(1, 2, 0).flatten() if cfg.net.channels else x


def slow_policy(cfg, leaves, s, i, x):
    """Mean and log standard deviation [A] of member i."""
    x = slow_sight(cfg, leaves, "actor.convs.", (s, i), x)
    for k in range(len(cfg.net.hidden)):
        x = linear(leaves, f"actor.hidden.{k}", x, (s, i)).relu()
    mean, raw = linear(leaves, "actor.moments", x, (s, i)).chunk(2, -1)
    low, high = cfg.agent.log_std_min, cfg.agent.log_std_max
    clipped = raw.clamp(low, high)
    squashed = low + (high - low) * (torch.tanh(raw) + 1) / 2
    return mean, clipped if cfg.agent.log_std == "clip" else squashed


def slow_q(cfg, leaves, at, x, action):
    """Values of all heads [J] of one critic, at = (seed, member, critic)."""
    y = torch.cat([slow_sight(cfg, leaves, "convs.", at[:2], x), action])
    for k in range(len(cfg.net.hidden)):
        y = linear(leaves, f"hidden.{k}", y, at)
        if cfg.agent.critic_norm != "none":
            y = (y - y.mean()) / (y.var(correction=0) + 1e-6).sqrt()
        if cfg.agent.critic_norm == "layer":
            y = y * leaves[f"norms.{k}.scale"][at] + leaves[f"norms.{k}.offset"][at]
        y = y.relu()
    return linear(leaves, "final", y, at)


def slow_sample(mean, log_std, noise):
    """Action and its log-probability by torch's own transformed distribution."""
    u = mean + log_std.exp() * noise
    tanh = TanhTransform(cache_size=1)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [tanh])
    action = tanh(u)
    assert isinstance(action, torch.Tensor)
    log_p = squashed.log_prob(action)
    assert log_p is not None
    return action, log_p.sum()


def slow_losses(cfg, learner, window, mask, dice):
    """Losses and metrics [S, N], loops over everything in double precision."""
    net = {k: v.double() for k, v in learner.net.named_parameters()}
    critic = {k.removeprefix("critic."): v for k, v in net.items() if k.startswith("critic.")}
    target = {k: v.double() for k, v in learner.target.named_parameters()}
    window, dice = (
        type(x)(*(y.double() if y is not None and y.is_floating_point() else y for y in x))
        for x in (window, dice)
    )
    seeds, members, critics = len(cfg.seeds), cfg.ensemble.members, cfg.agent.critics
    table, n, first = learner.agent.table, cfg.loss.n_step, cfg.encoder.frames - 1
    names = ("critic", "actor", "temperature", "own", "q_data", "q_pi", "entropy", "alpha")
    out = {name: torch.zeros(seeds, members, dtype=torch.float64) for name in names}
    for s in range(seeds):
        alpha = [net["log_alpha"][s, i, 0].exp() for i in range(members)]

        def stacked(m, b, row, s=s):
            frames = []
            for at in range(row, row - cfg.encoder.frames, -1):
                fresh = any(not bool(window.real[s, m, b, k - 1]) for k in range(at + 1, row + 1))
                frames.insert(0, window.obs[s, m, b, at] * (not fresh))
            return torch.stack(frames) if cfg.net.channels else torch.cat(frames)

        for i in range(members):
            m = i if window.reward.shape[1] > 1 else 0
            weight = [
                float(window.weight[s, m, b] * window.real[s, m, b, first])
                * (1.0 if mask is None else float(mask[s, i, b]))
                for b in range(B)
            ]
            total = max(sum(weight), 1.0)
            entropy = torch.zeros((), dtype=torch.float64)
            for b in range(B):
                share = weight[b] / total
                x = stacked(m, b, first)
                mean, log_std = slow_policy(cfg, net, s, i, x)
                action, log_p = slow_sample(mean, log_std, dice.now[s, i, b])
                own = [slow_q(cfg, critic, (s, i, c), x, action)[0] for c in range(critics)]
                value = sum(own) / critics if cfg.agent.actor_value == "mean" else min(own)
                out["actor"][s, i] += share * (alpha[i].detach() * log_p - value)
                out["q_pi"][s, i] += share * value
                entropy -= share * log_p.detach()
                k = 1
                while (
                    k < n
                    and bool(window.real[s, m, b, first + k])
                    and not bool(window.terminated[s, m, b, first + k - 1])
                ):
                    k += 1
                ended = bool(window.terminated[s, m, b, first + k - 1])
                x_next = stacked(m, b, first + k)
                for j in range(table.heads):
                    gamma = float(table.gamma[j])
                    reward = sum(
                        gamma**t * float(window.reward[s, m, b, first + t]) for t in range(k)
                    )
                    with torch.no_grad():
                        later, trust = slow_next(
                            cfg, learner, net, target, dice, s, i, j, b, x_next
                        )
                        y = reward + (0.0 if ended else gamma**k) * later
                    for c in range(critics):
                        q = slow_q(cfg, critic, (s, i, c), x, window.action[s, m, b, first])[j]
                        e = q - y
                        loss = e**2
                        delta = cfg.agent.huber_delta
                        if cfg.agent.loss == "mse_huber" and j > 0 and abs(e.item()) > delta:
                            loss = 2 * delta * abs(e) - delta**2
                        out["critic"][s, i] += share * trust * loss
                        if j == 0:
                            out["own"][s, i] += share * trust * loss / critics
                            out["q_data"][s, i] += q / (B * critics)
            goal = cfg.agent.target_entropy * A
            out["entropy"][s, i], out["alpha"][s, i] = entropy, alpha[i]
            out["temperature"][s, i] = alpha[i] * (entropy - goal)
    return out


def slow_next(cfg, learner, net, target, dice, s, i, j, b, x_next):
    """Soft next value that head (i, j) regresses to, and the weight of the row."""
    kind, members = cfg.ensemble.heads, cfg.ensemble.members
    if kind == "mean":
        own = cfg.model_copy(update={"ensemble": cfg.ensemble.model_copy(update={"heads": "own"})})
        every = range(members)
        each = [slow_next(own, learner, net, target, dice, s, k, 0, b, x_next) for k in every]
        return tuple(sum(numbers) / members for numbers in zip(*each, strict=True))
    m = (i + j) % members
    actor = {"single_actor": 0, "multi_horizon": i}.get(kind, m)
    owner, head = (i, j) if kind in ("own_target", "multi_horizon") else (m, 0)
    action, log_p = slow_sample(*slow_policy(cfg, net, s, actor, x_next), dice.later[s, actor, b])

    def least(member, h):
        chosen = range(cfg.agent.critics)
        if cfg.agent.target_critics:
            order = sorted(chosen, key=lambda c: -float(dice.critics[s, member, c]))
            chosen = order[: cfg.agent.target_critics]
        return min(slow_q(cfg, target, (s, member, c), x_next, action)[h] for c in chosen)

    value = least(owner, head)
    if cfg.agent.backup_entropy:
        value = value - net["log_alpha"][s, actor, 0].exp() * log_p
    if not cfg.agent.spread_temperature:
        return value, 1.0
    every = [float(least(k, 0)) for k in range(members)]
    mean = sum(every) / members
    std = math.sqrt(sum((v - mean) ** 2 for v in every) / members)
    return value, 1 / (1 + math.exp(cfg.agent.spread_temperature * std)) + 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_slow_loops(variant):
    cfg = config(**VARIANTS[variant])
    learner = make_learner(cfg)
    learner.updates += 7
    agent, window = learner.agent, learner.sample()
    mask, dice = learner.mask(window), agent.dice(learner.keys, learner.updates)
    slow = slow_losses(cfg, learner, window, mask, dice)
    (critic, metrics, _), (policy, others, _) = (
        stage.loss(learner.net, learner.target, window, mask=mask, dice=dice, prepared=None)
        for stage in learner.stages
    )
    names = {"loss": "own", "actor_loss": "actor", "temperature_loss": "temperature"}
    assert set(metrics | others) == set(SAC.metrics)
    for name, value in (metrics | others).items():
        assert not value.requires_grad
        wanted = slow[names.get(name, name)].detach()
        assert_agree(value, wanted, where=name)
    assert_agree(critic, slow["critic"])
    wanted = slow["actor"] + slow["temperature"]
    assert_agree(policy, wanted)
    for stage, loss, other in ((0, critic, slow["critic"]), (1, policy, wanted)):
        leaves = [leaf for group in learner.stages[stage].groups for leaf in group.leaves]
        ours = torch.autograd.grad(loss.sum(), leaves)
        theirs = torch.autograd.grad(other.sum(), leaves)
        for a, b in zip(ours, theirs, strict=True):
            assert_agree(a, b)


def test_a_mistake_of_a_thousandth_in_one_gradient_or_weight_is_seen():
    cfg = config(**VARIANTS["convolutions"])
    learner = make_learner(cfg)
    window, dice = learner.sample(), learner.agent.dice(learner.keys, learner.updates)
    slow = slow_losses(cfg, learner, window, None, dice)["critic"].sum()
    leaves = [leaf for group in learner.stages[0].groups for leaf in group.leaves]
    theirs = torch.autograd.grad(slow, leaves)

    def ours() -> tuple[torch.Tensor, ...]:
        loss, *_ = learner.stages[0].loss(
            learner.net, learner.target, window, mask=None, dice=dice, prepared=None
        )
        return torch.autograd.grad(loss.sum(), leaves)

    for a, b in zip(ours(), theirs, strict=True):
        median = a[a != 0].abs().median()
        wrong = torch.where(a.abs() == median, 1.001 * a, a)
        assert_agree(a, b)
        with pytest.raises(AssertionError):
            assert_agree(wrong, b)
    for leaf in leaves:
        with torch.no_grad():
            place = leaf.flatten().abs().argmax()
            right = leaf.flatten()[place].clone()
            leaf.view(-1)[place] *= 1.001
        with pytest.raises(AssertionError):
            for a, b in zip(ours(), theirs, strict=True):
                assert_agree(a, b)
        with torch.no_grad():
            leaf.view(-1)[place] = right


def test_log_probability_is_that_of_the_sample():
    generator = torch.Generator().manual_seed(0)
    mean, log_std, normal = torch.randn(3, 50, A, generator=generator)
    action, log_p = sampled(mean * 0.3, log_std * 0.3 - 1, normal)
    again = log_probability(mean * 0.3, log_std * 0.3 - 1, action)
    assert_agree(log_p, again)
    assert log_probability(mean, log_std, torch.ones_like(mean)).isfinite().all()
    far, dense = sampled(torch.full((1, 1), 30.0), torch.zeros(1, 1), torch.zeros(1, 1))
    # 1 - tanh(30)^2 is 4 exp(-60): its logarithm is finite though it rounds to 0.
    assert float(far) == 1.0
    assert float(dense) == pytest.approx(60 - math.log(4) - 0.5 * math.log(2 * math.pi), rel=1e-5)


def test_initial_means_and_deviations_are_orthogonal_blocks_of_one_layer():
    net = make_learner(config()).agent.build(keys=draw.seed_keys((0, 1)))
    weight = net.actor.moments.weight.detach()  # [S, N, 6, 2 A]
    products = weight.mT @ weight
    eye = torch.eye(A).expand(2, N, A, A)
    torch.testing.assert_close(products[..., :A, :A], 2.0 * eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(products[..., A:, A:], eye, atol=1e-5, rtol=0)
    across = products[..., :A, A:].abs()
    # Neither orthogonal to each other nor the same numbers twice.
    assert ((across * (1.0 - eye)).amax((2, 3)) > 1e-2).all()


@pytest.mark.parametrize("variant", ["cerl", "convolutions"])
def test_policy_loss_keeps_nothing_for_the_critics(variant):
    learner = make_learner(config(**VARIANTS[variant]))
    window, dice = learner.sample(), learner.agent.dice(learner.keys, learner.updates)
    loss, *_ = learner.stages[1].loss(
        learner.net, learner.target, window, mask=None, dice=dice, prepared=None
    )
    grads = torch.autograd.grad(
        loss.sum(), list(learner.net.critic.parameters()), allow_unused=True
    )
    assert all(grad is None for grad in grads)


FEW = ("single", "cerl with huber", "own target", "redq")


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's; test_learn.py compares GPU and CPU"
)
@pytest.mark.parametrize("variant", [*FEW, "masks", "convolutions"])
def test_update_by_kernels_is_that_of_the_definitions(variant, monkeypatch):
    pytest.importorskip("triton")
    cfg = config(**VARIANTS[variant])
    theirs, ours = make_learner(cfg), make_learner(cfg)
    theirs.update()
    for module in (conv, mlp, sac, optim):
        monkeypatch.setattr(module, "runs_triton", lambda impl, device: True)
    ours.update()
    for name, leaf in theirs.net.state_dict().items():
        moved = ours.net.state_dict()[name]
        assert_agree(moved, leaf, where=name)
    for name, leaf in theirs.target.state_dict().items():
        assert_agree(ours.target.state_dict()[name], leaf)
    for name, value in theirs.metrics.items():
        assert_agree(ours.metrics[name], value, where=name)
    window, dice = ours.sample(), ours.agent.dice(ours.keys, ours.updates)
    theirs.load_state_dict(ours.state_dict())
    by_kernels = [ours.grads(window, stage=stage, dice=dice)[0] for stage in (0, 1)]
    monkeypatch.undo()
    for stage, grads in enumerate(by_kernels):
        for mine, other in zip(grads, theirs.grads(window, stage=stage, dice=dice)[0], strict=True):
            assert_agree(mine, other)


def test_update_is_two_stages_and_the_target_follows():
    cfg = config(heads="cerl")
    learner, again = make_learner(cfg), make_learner(cfg)
    before = {k: v.clone() for k, v in again.target.named_parameters()}
    window, dice = again.sample(), again.agent.dice(again.keys, again.updates)
    learner.update()
    for stage, optimisers in enumerate(again.optimisers):
        grads, _ = again.grads(window, stage=stage, dice=dice)
        at = 0
        for optimiser in optimisers:
            optimiser.step(grads[at : at + len(optimiser.leaves)])
            at += len(optimiser.leaves)
    for mine, theirs in zip(learner.leaves, again.leaves, strict=True):
        assert torch.equal(mine, theirs)
    online = dict(learner.net.critic.named_parameters())
    for name, leaf in learner.target.named_parameters():
        torch.testing.assert_close(leaf, 0.9 * before[name] + 0.1 * online[name])
    assert set(learner.metrics) == set(SAC.metrics)


def test_first_stage_alone_leaves_policies_and_temperatures():
    learner = make_learner(config())
    actor = [leaf.clone() for leaf in learner.net.actor.parameters()]
    alpha, critic = learner.net.log_alpha.clone(), learner.leaves[0].clone()
    learner.update_first()
    assert int(learner.updates) == 1 and not torch.equal(critic, learner.leaves[0])
    assert torch.equal(alpha, learner.net.log_alpha)
    assert all(map(torch.equal, actor, learner.net.actor.parameters()))
    counts = [int(o.count) for stage in learner.optimisers for o in stage]
    assert counts == [1, 0, 0]


def test_learning_rates_of_policy_and_temperature():
    cfg = config()
    agent = cfg.agent.model_copy(update={"actor_lr": 0.02, "temperature_lr": 0.03})
    learner = make_learner(cfg.model_copy(update={"agent": agent}))
    before = [leaf.clone() for leaf in learner.leaves]
    learner.update()
    moved = [(a - b).detach().abs().max() for a, b in zip(learner.leaves, before, strict=True)]
    # Adam's first step has the size of its learning rate.
    groups = [len(group.leaves) for stage in learner.stages for group in stage.groups]
    rates = [lr for lr, count in zip((2e-3, 0.02, 0.03), groups, strict=True) for _ in range(count)]
    assert [float(m) for m in moved] == pytest.approx(rates, rel=2e-2)


def after_updates(cfg, data):
    learner = make_learner(cfg, data=data)
    for _ in range(4):
        learner.update()
    state = {f"net {k}": v.detach() for k, v in learner.net.named_parameters()}
    state |= {f"target {k}": v for k, v in learner.target.named_parameters()}
    return state | {f"metric {k}": v for k, v in learner.metrics.items()}


STANDING = ("ensemble", "cerl with huber", "own target", "redq", "weighted backups", "layer norm")
STANDING += ("convolutions",)


@pytest.mark.parametrize("variant", STANDING)
def test_nan_in_one_seed_leaves_the_others_bitwise_alone(variant):
    cfg = config(seeds=(0, 1, 2), **VARIANTS[variant])
    data = [random_rows(70, seed, seen(cfg).observation) for seed in cfg.seeds]
    clean = after_updates(cfg, data)
    data[1] = data[1]._replace(reward=torch.full_like(data[1].reward, float("nan")))
    spoilt = after_updates(cfg, data)
    for name, leaf in clean.items():
        assert torch.equal(leaf[[0, 2]], spoilt[name][[0, 2]]), name
    assert any(leaf[1].isnan().any() for leaf in spoilt.values())


@pytest.mark.parametrize("variant", ["ensemble", "masks", "independent batches"])
@pytest.mark.parametrize("leaf", ["critic.final.bias", "actor.hidden.0.weight", "log_alpha"])
def test_nan_in_one_member_leaves_the_others_bitwise_alone(variant, leaf):
    learners = [make_learner(config(**VARIANTS[variant])) for _ in range(2)]
    with torch.no_grad():
        dict(learners[1].net.named_parameters())[leaf][0, 1] = torch.nan
    for learner in learners:
        learner.update()
        learner.update()
    clean, spoilt = (
        [*learner.leaves, *learner.target.parameters(), *learner.metrics.values()]
        for learner in learners
    )
    for mine, theirs in zip(clean, spoilt, strict=True):
        assert torch.equal(mine[1], theirs[1])
        assert torch.equal(mine[0, [0, 2]], theirs[0, [0, 2]])
    assert any(theirs[0, 1].isnan().any() for theirs in spoilt)


@pytest.mark.parametrize("variant", STANDING)
def test_a_seed_alone_learns_what_it_learns_among_others(variant):
    together = config(seeds=(0, 1, 2), **VARIANTS[variant])
    data = [random_rows(70, seed, seen(together).observation) for seed in (0, 1, 2)]
    alone = config(seeds=(1,), **VARIANTS[variant])
    both = [make_learner(cfg, data=d) for cfg, d in ((together, data), (alone, data[1:2]))]
    a, b = (learner.agent.dice(learner.keys, learner.updates) for learner in both)
    for among, own in zip(a, b, strict=True):
        assert own is None if among is None else torch.equal(among[1:2], own)
    for among, own in zip(*(learner.net.parameters() for learner in both), strict=True):
        assert torch.equal(among[1:2], own)
    many, one = after_updates(together, data), after_updates(alone, data[1:2])
    for name, leaf in one.items():  # products of other batch sizes round differently
        assert_agree(many[name][1:2], leaf)


def acting(cfg, *, samples, policies, envs=40, eps=0.0):
    learner = make_learner(cfg)
    step = torch.tensor(3)
    noise = explore.continuous_noise(
        learner.keys, step, envs=envs, actions=A, eps=eps, samples=samples, policies=policies
    )
    obs = draw.normal(learner.keys, draw.ENV, 0, (envs, *seen(cfg).observation))
    return learner, obs, noise


def act(learner, obs, member, *, noise, evaluating=None):
    """A decision at episodes' starts."""
    start = torch.ones(obs.shape[:2], dtype=torch.bool)
    previous = Previous(noise.action, torch.zeros(obs.shape[:2]))
    carry = learner.net.carry(envs=obs.shape[1], evaluating=evaluating is not None)
    seen = ActInput(obs, start, previous, member)
    return learner.agent.act(learner.net, seen, carry, noise=noise, evaluating=evaluating)


@pytest.mark.parametrize("variant", ["cerl", "convolutions, own target"])
def test_training_action_is_a_sample_of_the_member_on_duty(variant):
    cfg = config(**VARIANTS[variant])
    learner, obs, noise = acting(cfg, samples=1, policies=1, eps=0.4)
    member = draw.randint(learner.keys, draw.MEMBER, 1, (40,), high=N)
    decision = act(learner, obs, member, noise=noise)
    net = {k: v.double() for k, v in learner.net.named_parameters()}
    critic = {k.removeprefix("critic."): v for k, v in net.items() if k.startswith("critic.")}
    obs, noise = obs.double(), noise._replace(normal=noise.normal.double())
    assert 0 < int(noise.explore.sum()) < noise.explore.numel()
    actions, bonuses, values = [], [], []
    for s in range(2):
        for e in range(40):
            i = int(member[s, e])
            x = obs[s, e].unsqueeze(0) if cfg.net.channels else obs[s, e]
            policy = slow_policy(cfg, net, s, i, x)
            action, log_p = slow_sample(*policy, noise.normal[s, e, 0, 0])
            bonus = -net["log_alpha"][s, i, 0].exp() * log_p
            if noise.explore[s, e]:
                action, bonus = noise.action[s, e].double(), torch.zeros(()).double()
            actions.append(action)
            bonuses.append(bonus)
            values.append(min(slow_q(cfg, critic, (s, i, c), x, action)[0] for c in range(2)))
    assert_agree(decision.action.flatten(0, 1), torch.stack(actions))
    assert_agree(decision.bonus.flatten(), torch.stack(bonuses))
    assert_agree(decision.value.flatten(), torch.stack(values))


@pytest.mark.parametrize("variant", ["ensemble", "convolutions, own target"])
def test_aggregate_is_the_mean_of_samples_and_noise_off_gives_modes(variant):
    learner, obs, noise = acting(config(**VARIANTS[variant]), samples=10, policies=N)
    actor = learner.net.actor
    member = torch.arange(40).expand(2, 40) % (N + 1)
    still = noise._replace(normal=torch.zeros_like(noise.normal))
    x = see(actor.convs, obs[:, None, ..., None] if len(actor.convs) else obs.unsqueeze(1))
    mean, log_std = (y.transpose(1, 2) for y in actor(x))
    for drawn in (noise, still):
        decision = act(learner, obs, member, noise=drawn, evaluating=("mean",))
        samples = torch.tanh(mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * drawn.normal)
        for e in range(40):
            i = int(member[0, e])
            want = samples[:, e, 0].mean(1) if i == N else samples[:, e, 0, i]
            assert_agree(decision.action[:, e], want)
        x = samples.mean(2)  # [S, E, N, A]
        pairs = (x.unsqueeze(2) - x.unsqueeze(3)).square().sum((-1, -2, -3))
        assert_agree(decision.diversity, pairs / (2 * N * (N - 1)) / A)
    alone = acting(config(members=1), samples=10, policies=1)
    learner, obs, noise = alone
    decision = act(learner, obs, member * 0, noise=noise, evaluating=())
    assert not decision.diversity.any()


@pytest.mark.parametrize(
    "variant", [{}, {"backup_entropy": False}, {"actor_value": "mean"}], ids=str
)
def test_evaluations_value_an_action_as_training_does(variant):
    cfg = config(**variant)
    learner = make_learner(cfg)
    net, agent, keys = learner.net, learner.agent, draw.seed_keys(cfg.seeds)
    obs = draw.normal(keys, draw.ENV, 0, (3, 4))
    member = torch.tensor([[0, 1, 2], [2, 2, 1]])
    start, step = torch.zeros(2, 3, dtype=torch.bool), torch.tensor(5)
    seen = ActInput(obs, start, Previous(torch.zeros(2, 3, A), torch.zeros(2, 3)), member)
    noise = explore.continuous_noise(keys, step, envs=3, actions=A, eps=0.4, samples=2, policies=N)
    assert bool(noise.explore.any()) and not bool(noise.explore.all())
    index = member.view(2, 3, 1, 1, 1).expand(-1, -1, 1, -1, A)
    own = noise._replace(normal=noise.normal[:, :, :1].gather(3, index))
    trained = agent.act(net, seen, net.carry(envs=3, evaluating=False), noise=own)
    carry = net.carry(envs=3, evaluating=True)
    tested = agent.act(net, seen, carry, noise=noise, evaluating=("mean",))
    for name in ("action", "value", "bonus"):
        assert_agree(getattr(tested, name), getattr(trained, name).double())
    assert bool(tested.bonus.any()) == of_kind(cfg.agent, SacConfig).backup_entropy


def test_diagnostics_of_replayed_actions():
    learner = make_learner(config())
    measures = diagnose(learner.agent, learner)
    window = learner.sample()
    mean, log_std = learner.net.actor(window.obs[..., 0, :])
    wanted = log_probability(mean, log_std, window.action[..., 0, :])
    assert_agree(measures["log_prob"], wanted.mean(2))
    own = window.member[..., 0] == torch.arange(N).view(1, -1, 1)
    split = [torch.where(m, wanted, 0).sum(2) / m.sum(2) for m in (own, ~own)]
    assert_agree(measures["log_prob_own"], split[0])
    assert_agree(measures["log_prob_others"], split[1])
    assert measures["action_variance"].shape == (2, N) and (measures["action_variance"] > 0).all()
    assert {"own_data_share", "feature_rank", "dormant_share"} <= set(measures)
    single = make_learner(config(members=1))
    several = {"action_variance", "value_spread", "auxiliary_loss"}
    assert not several & set(diagnose(single.agent, single))


def test_diagnostics_of_critics_and_gradients():
    cfg = config(**VARIANTS["cerl with huber"])
    learner = make_learner(cfg)
    found, window = diagnose(learner.agent, learner), learner.sample()
    dice = learner.agent.dice(learner.keys, learner.updates)
    slow = slow_losses(cfg, learner, window, None, dice)
    options, agent = of_kind(cfg.agent, SacConfig), SAC(cfg, seen(cfg), device=CPU)
    heads, critics = agent.table.heads, options.critics
    rest = (slow["critic"] - critics * slow["own"]) / (critics * (heads - 1))
    assert_agree(found["auxiliary_loss"], rest.detach())
    net = learner.net
    losses = agent.critic_losses(net, learner.target, agent.batch(net, window), dice)
    error = (losses.q - losses.target.unsqueeze(2))[..., 0].detach().abs().mean(2)  # [S, N, rows]
    assert_agree(found["td_error"], error.mean(2))
    own = window.member[..., 0] == torch.arange(N).view(1, -1, 1)
    assert_agree(found["td_error_own"], (error * own).sum(2) / own.sum(2))
    assert_agree(found["td_error_others"], (error * ~own).sum(2) / (~own).sum(2))
    assert_agree(found["target_value"], losses.target[..., 0].mean(2))
    q = losses.q[..., 0].detach()
    value = q.mean(2) if options.actor_value == "mean" else q.amin(2)
    assert_agree(found["value_spread"], value.std(1).mean(1))
    for name, sum_, part in (
        ("gradient_norm", "critic", "critic."),
        ("actor_gradient_norm", "actor", "actor."),
        ("temperature_gradient_norm", "temperature", "log_alpha"),
    ):
        leaves = [leaf for key, leaf in net.named_parameters() if key.startswith(part)]
        grads = torch.autograd.grad(slow[sum_].sum(), leaves, retain_graph=True)
        square = sum(grad.double().flatten(2).square().sum(2) for grad in grads)
        assert_agree(found[name], torch.as_tensor(square).sqrt())


# Torch's compiler makes an instance of the function that cuts images into patches.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("variant", ["cerl with huber", "redq", "convolutions"])
def test_losses_compile_as_one_graph(variant):
    cfg = config(**VARIANTS[variant])
    eager, traced = make_learner(cfg), make_learner(cfg)
    traced.compiled = True
    traced.loss = torch.compile(traced._loss, fullgraph=True, dynamic=False, backend="eager")
    for learner in (eager, traced):
        learner.update()
    assert all(map(torch.equal, eager.leaves, traced.leaves))


def test_every_action_and_every_update_has_noise_of_its_own():
    agent, keys = SAC(config(critics=5, target_critics=2), SPEC, device=CPU), draw.seed_keys((0, 1))
    first, second = (agent.dice(keys, torch.tensor(step)) for step in (0, 1))
    normal = torch.stack([first.later, first.now, second.later, second.now])
    assert first.later.shape == first.now.shape == (2, N, B, A)
    assert normal.unique().numel() == normal.numel()
    assert first.critics is not None and second.critics is not None
    both = torch.stack([first.critics, second.critics])
    assert both.shape == (2, 2, N, 5) and both.unique().numel() == both.numel()


def test_temperatures_start_as_configured():
    net = SAC(config(temperature=0.2), SPEC, device=CPU).build(keys=draw.seed_keys((0, 1)))
    torch.testing.assert_close(net.log_alpha.exp(), torch.full((2, N, 1), 0.2))


def test_paper_networks_have_the_originals_size_and_initial_deviations():
    counts = {"mujoco/sac": (73_484, 144_386), "mujoco/ensemble": (734_840, 1_443_860)}
    counts["mujoco/cerl"] = (734_840, 1_490_120)
    robot = SPEC._replace(observation=(17,), actions=6)
    for name, wanted in counts.items():
        agent = SAC(load(name, {"seeds": (0,)}), robot, device=CPU)
        net = agent.build(keys=draw.seed_keys((0,)))
        sizes = [sum(p.numel() for p in part.parameters()) for part in (net.actor, net.critic)]
        assert tuple(sizes) == wanted
    states = draw.normal(draw.seed_keys((0,)), draw.ENV, 0, (1, 500, 17))
    _, log_std = net.actor(states)
    low, median, high = torch.quantile(
        log_std.detach().exp().flatten(), torch.tensor([0.05, 0.5, 0.95])
    )
    # Median 0.020, and 0.002 to 0.20 between the 5th and 95th percentile, in the original.
    assert 0.015 < float(median) < 0.027 and 0.001 < float(low) < 0.003 < 0.15 < float(high) < 0.26
