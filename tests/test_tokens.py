"""Sequence networks in agents are compared with slow loops: reading, learning, acting."""

import itertools
import math
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from draws import draws
from options import encoder
from rounding import assert_agree
from torch import nn

from cerl import draw, training, wiring
from cerl.bench import runs as bench
from cerl.collect import Collector
from cerl.config import Config, ValueOptions, load, of_kind
from cerl.data import ActInput, EnvSpec, Previous, Row
from cerl.diagnose import diagnose, staleness
from cerl.envs import make
from cerl.graph import captured
from cerl.learn import Learner
from cerl.replay import Replay
from cerl.returns import learnt

CPU = torch.device("cpu")
KINDS = ("mlp", "gru", "transformer", "fox")
S, N, E, A = 2, 3, 4, 3
FLAT = EnvSpec("flat", (5,), torch.float32, A, E, 1, True, True)
IMAGE = EnvSpec("image", (2, 6, 6), torch.uint8, A, E, 1, True, True)
FORCES = EnvSpec("forces", (5,), torch.float32, A, E, 1, True, True, continuous=True)
CONV: dict[str, Any] = {"channels": (4,), "kernels": (3,), "strides": (2,), "scale": 255.0}


def config(kind: str, spec: EnvSpec = FLAT, **changes: Any) -> Config:
    base = "point_mass/sac" if spec.continuous else "catch/ddqn"
    own = {key[8:]: changes.pop(key) for key in [*changes] if key.startswith("encoder.")}
    sizes = {"width": 16, "heads": 2, "context": 2, "learnt": 4, "gate_scales": (2.0, 9.0)}
    options = {
        "device": "cpu",
        "seeds": (0, 1),
        "env.envs": E,
        "net.hidden": (8,),
        "ensemble.members": N,
        "encoder": encoder(kind, **sizes | own),
        "replay": {"capacity": 400, "batch": 5, "start": 100, "candidates": 16},
        "eval.policies": ("individual",),
    }
    if len(spec.observation) == 3:
        options |= {f"net.{name}": value for name, value in CONV.items()}
    return load(base, options | changes)


def random_rows(spec: EnvSpec, count: int, *, seed: int = 0, members: int = N) -> list[Row]:
    """Rows of episodes of random lengths, each acted by one member."""
    g = torch.Generator().manual_seed(seed)
    rows, last = [], torch.zeros(S, E, dtype=torch.bool)
    member = torch.randint(0, members, (S, E), generator=g)
    for _ in range(count):
        ended = (torch.rand(S, E, generator=g) < 0.25) & ~last
        terminated = ended & (torch.rand(S, E, generator=g) < 0.5)
        shape = (S, E, *spec.observation)
        obs = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        if spec.dtype.is_floating_point:
            obs = torch.randn(shape, generator=g)
        action = torch.randint(0, A, (S, E), generator=g)
        if spec.continuous:
            action = torch.rand(S, E, A, generator=g) * 2 - 1
        reward = torch.randn(S, E, generator=g)
        rows.append(Row(obs, action, reward, terminated, ~last, member))
        drawn = torch.randint(0, members, (S, E), generator=g)
        member, last = torch.where(last, drawn, member), ended
    return rows


def filled(cfg: Config, spec: EnvSpec, rows: list[Row]) -> Replay:
    keys = draw.seed_keys(cfg.seeds)
    replay = Replay(spec, keys=keys, capacity=cfg.replay.capacity, device=CPU)
    for row in rows:
        replay.add(row)
    return replay


def built(cfg: Config, spec: EnvSpec, *, seed: int = 0):
    """Agent and network whose parameters are random everywhere, scales of norms included."""
    agent = wiring.make_agent(cfg, spec, CPU)
    net = agent.build(keys=draw.seed_keys([seed + s for s in cfg.seeds]))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in net.parameters():
            leaf.add_(0.2 * torch.randn(leaf.shape, generator=g))
    return agent, net


def acted(net, rows: list[Row], *, evaluating: bool) -> list[torch.Tensor]:
    """Features of every row, one step after the other: [S, 1 or N, E, D] each."""
    held = net.carry(envs=E, evaluating=evaluating)
    places = [part.data_ptr() for part in held]
    start = torch.ones(S, E, dtype=torch.bool)
    # What is before an episode must not matter.
    previous = Previous(torch.full_like(rows[0].action, 1), torch.full((S, E), math.nan))
    features: list[torch.Tensor] = []
    for row in rows:
        seen = ActInput(row.obs, start, previous, row.member)
        features += net.step(seen, held, evaluating=evaluating)
        start, previous = ~row.real, Previous(row.action, row.reward)
    assert [part.data_ptr() for part in held] == places
    return features


def everything(part, window) -> torch.Tensor:
    """Features of all rows of a window, [S, N, B, W, D], of a network with one trunk or a part."""
    start = window.starts()
    return part.trunk(part.reader.tokens(window, start), start)


@pytest.mark.parametrize("spec", [FLAT, IMAGE], ids=["flat", "image"])
@pytest.mark.parametrize("kind", KINDS)
def test_acting_sees_what_learning_sees_beyond_twice_the_cache(kind, spec):
    cfg = config(kind, spec, **{"encoder.cache": 7})
    _, net = built(cfg, spec)
    rows = random_rows(spec, 30)
    window = filled(cfg, spec, rows).last(30)
    with torch.no_grad():
        every = everything(net, window)
        single = acted(net, rows, evaluating=False)
        for t, (own, all_) in enumerate(
            zip(single, acted(net, rows, evaluating=True), strict=True)
        ):
            assert_agree(all_, every[:, :, :, t])
            for s, e in itertools.product(range(S), range(E)):
                want = every[s, rows[t].member[s, e], e, t]
                assert_agree(own[s, 0, e], want)


@pytest.mark.parametrize("spec", [FLAT, IMAGE, FORCES], ids=["flat", "image", "forces"])
@pytest.mark.parametrize("inputs", [(True, True), (True, False), (False, True), (False, False)])
def test_a_token_is_observation_previous_action_and_previous_reward(spec, inputs):
    names = ("encoder.previous_action", "encoder.previous_reward")
    cfg = config(
        "mlp",
        spec,
        **dict(zip(names, inputs, strict=True)),
        **{"net.channels": (), "net.kernels": (), "net.strides": ()},
    )
    _, net = built(cfg, spec)
    window = filled(cfg, spec, random_rows(spec, 12)).last(12)
    trunk, start = net.actor.trunk if spec.continuous else net.trunk, window.starts()
    tokens = net.reader.tokens(window, start)
    assert trunk.embed.fan_in == tokens.shape[-1]
    for s, e, t in itertools.product(range(S), range(E), range(12)):
        scale = 255.0 if spec is IMAGE else 1.0
        parts = [window.obs[s, 0, e, t].flatten().float() / scale]
        known = t > 0 and bool(window.real[s, 0, e, t - 1])
        if inputs[0]:
            action = window.action[s, 0, e, t - 1]
            vector = action if spec.continuous else torch.eye(A)[int(action)]
            parts.append(vector if known else torch.zeros(A))
        if inputs[1]:
            reward = window.reward[s, 0, e, t - 1 : t] if known else torch.zeros(1)
            parts.append(reward)
        torch.testing.assert_close(tokens[s, 0, e, t], torch.cat(parts))
    assert not start[..., 0].any()
    assert torch.equal(start[..., 1:], ~window.real[..., :-1])


LOSSES: dict[str, dict[str, Any]] = {
    "cerl": {"ensemble.heads": "cerl"},
    "three steps": {"loss.n_step": 3},
    "single": {"ensemble.members": 1, "agent.double": False},
    "shared trunk": {"ensemble.shared_layers": 1, "ensemble.heads": "cerl"},
    "own batches": {"loss.batches": "own", "replay.candidates": 64, "loss.mask_probability": 0.6},
    "disjoint": {"loss.batches": "disjoint", "replay.candidates": 64},
    "episode start": {
        "encoder.sampling": "episode_start",
        "replay.candidates": 64,
        "env": {"family": "gym", "envs": E},
    },
    "images": {},
}


def q_values(net, window, m: int, heads: int) -> torch.Tensor:
    """Values of batch m's rows by acting on them one after the other, [S, N, B, W, heads, A]."""
    agent_rows = []
    s, b, w = window.reward.shape[0], window.reward.shape[2], window.reward.shape[3]
    held = net.carry(envs=b, evaluating=True)  # streams of all members
    member = torch.zeros(s, b, dtype=torch.int64)
    start = torch.ones(s, b, dtype=torch.bool)
    previous = Previous(window.action[:, m, :, 0], window.reward[:, m, :, 0])
    with torch.no_grad():
        for t in range(w):
            seen = ActInput(window.obs[:, m, :, t], start, previous, member)
            (x,) = net.step(seen, held, evaluating=True)
            agent_rows.append(net(x, heads))
            start = ~window.real[:, m, :, t]
            previous = Previous(window.action[:, m, :, t], window.reward[:, m, :, t])
    return torch.stack(agent_rows, 3)


@pytest.mark.parametrize("kind", ["gru", "fox"])
@pytest.mark.parametrize("variant", LOSSES)
def test_the_loss_is_that_of_rows_looked_at_one_by_one(kind, variant):
    spec = IMAGE if variant == "images" else FLAT
    cfg = config(kind, spec, **{"loss.gamma": 0.9, **LOSSES[variant]})
    members, heads = cfg.ensemble.members, N if cfg.ensemble.heads == "cerl" else 1
    agent, net = built(cfg, spec)
    _, target = built(cfg, spec, seed=50)
    learner = Learner(
        cfg,
        agent,
        net,
        filled(cfg, spec, random_rows(spec, 60, members=members)),
        keys=draw.seed_keys(cfg.seeds),
    )
    learner.target.load_state_dict(target.state_dict())
    window, (first, count, n) = learner.sample(), (3, 4, cfg.loss.n_step)
    assert window.reward.shape[3] == first + count + n
    mask = learner.mask(window)
    loss, metrics, _ = agent.stages(net)[0].loss(
        net, learner.target, window, mask=mask, dice=None, prepared=None
    )
    assert loss.shape == (S, members) and set(metrics) == {"loss", "q_data", "q_pi"}
    want, learnt_rows = torch.zeros(S, members), 0
    for i in range(members):
        m = i if window.reward.shape[1] > 1 else 0
        online = q_values(net, window, m, heads)
        later = q_values(learner.target, window, m, 1)
        for s in range(S):
            total, weight = 0.0, 0
            for b, t in itertools.product(range(5), range(first, first + count)):
                at = (s, m, b)
                learns = bool(window.weight[at]) and bool(window.real[at][t])
                if variant == "episode start":
                    learns &= bool(window.real[at][first : t + 1].all())
                row = int(window.row[at]) // E + t - first
                env = int(window.row[at]) % E
                if cfg.loss.batches == "own":
                    learns &= int(window.member[at][t]) == i
                if cfg.loss.batches == "disjoint":
                    bits = draw.bits(
                        draw.seed_keys([s]), draw.OWNER, row * E + env, torch.zeros(1, 1).long()
                    )
                    learns &= int((bits * members) >> 32) == i
                if cfg.loss.mask_probability < 1:
                    bits = draw.bits(
                        draw.seed_keys([s]), draw.MASK, row * E + env, torch.tensor([[i]])
                    )
                    learns &= bool(bits < cfg.loss.mask_probability * 2**32)
                if not learns:
                    continue
                weight += 1
                reward, steps, ended = 0.0, 0, False
                while steps < n:
                    reward += 0.9**steps * float(window.reward[at][t + steps])
                    ended |= bool(window.terminated[at][t + steps])
                    steps += 1
                    if not window.real[at][t + steps]:
                        break
                for j in range(heads):
                    who = (i + j) % members
                    chooser = online if of_kind(cfg.agent, ValueOptions).double else later
                    best = int(chooser[s, who, b, t + steps, 0].argmax())
                    value = 0.0 if ended else float(later[s, who, b, t + steps, 0, best])
                    y = reward + 0.9**steps * value
                    error = abs(float(online[s, i, b, t, j, int(window.action[at][t])]) - y)
                    total += 0.5 * error**2 if error < 1 else error - 0.5
            want[s, i] = total / max(weight, 1)
            learnt_rows += weight
    assert learnt_rows > 20
    assert_agree(loss.detach(), want)


class Identity(nn.Module):
    """A trunk that mixes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList()

    def forward(self, x, start, *, context=0):
        return x


@pytest.mark.parametrize("agent", ["dqn", "quantile", "sac"])
@pytest.mark.parametrize("heads", ["own", "cerl", "own_target"])
def test_a_trunk_that_changes_nothing_leaves_the_losses_of_single_rows(agent, heads):
    spec = FORCES if agent == "sac" else FLAT
    changes = {"ensemble.heads": heads}
    if agent != "sac":
        changes |= {"agent": {"name": agent} | ({"quantiles": 4} if agent == "quantile" else {})}
    plain = {"encoder.previous_action": False, "encoder.previous_reward": False}
    sequence = config("mlp", spec, **changes, **plain, **{"encoder.width": 8})
    frames = config("frames", spec, **changes, **{"replay.batch": 5 * 4})
    with_trunk, net = built(sequence, spec)
    without, other = built(frames, spec, seed=9)
    # The trunk's place is taken, and what follows it is as wide as an observation.
    for part, own in (
        ((net, other),)
        if agent != "sac"
        else (
            (net.actor, other.actor),
            (net.critic, other.critic),
        )
    ):
        part.hidden, part.trunk = own.hidden, Identity()
        part.reader.trunk = part.trunk
        for name in ("final", "mean", "log_std", "moments"):
            if hasattr(own, name):
                setattr(part, name, getattr(own, name))
    if agent == "sac":
        net.log_alpha = other.log_alpha
    window = draws(
        filled(sequence, spec, random_rows(spec, 60)),
        step=torch.tensor(3),
        batch=5,
        context=3,
        ahead=4,
    )
    assert window.reward.shape == (S, 1, 5, 3 + 4 + 1)
    # The same rows as windows of one learnt row.
    at = torch.arange(4).view(-1, 1) + torch.arange(2) + 3
    single = window._replace(
        **{
            name: getattr(window, name)[:, :, :, at].flatten(2, 3)
            for name in ("obs", "action", "reward", "terminated", "real", "member")
        },
        weight=(window.weight.unsqueeze(-1) * window.real[..., 3:7]).flatten(2),
        state=window.state.repeat_interleave(4, 2),
    )
    keys = draw.seed_keys(sequence.seeds)
    dice = with_trunk.dice(keys, torch.tensor(0))
    drawn: dict[str, Any] = {"mask": None, "dice": dice, "prepared": None}
    for ours, theirs in zip(with_trunk.stages(net), without.stages(other), strict=True):
        loss, *_ = ours.loss(net, with_trunk.followed(net), window, **drawn)
        want, *_ = theirs.loss(other, without.followed(other), single, **drawn)
        assert_agree(loss, want)


def test_gradients_below_a_shared_trunk_are_scaled_by_members_and_heads():
    changes = {"ensemble.shared_layers": 1, "ensemble.heads": "cerl"}
    grads = []
    for scale in (True, False):
        cfg = config("fox", FLAT, **changes, **{"agent.gradient_scale": scale})
        agent, net = built(cfg, FLAT)
        window = draws(
            filled(cfg, FLAT, random_rows(FLAT, 60)),
            step=torch.tensor(0),
            batch=5,
            context=3,
            ahead=4,
        )
        loss, *_ = agent.stages(net)[0].loss(net, net, window, mask=None, dice=None, prepared=None)
        leaves = [*net.trunk.parameters(), *net.hidden.parameters()]
        grads.append(torch.autograd.grad(loss.sum(), leaves))
    below = len(list(net.trunk.parameters()))
    assert all(leaf.shape[1] == 1 for leaf in net.trunk.parameters())
    for k, (scaled, plain) in enumerate(zip(*grads, strict=True)):
        factor = 1 / N**2 if k < below else 1 / N
        assert_agree(scaled, plain * factor)


@pytest.mark.parametrize("kind", ["gru", "fox"])
@pytest.mark.parametrize("flows", [True, False])
def test_context_rows_get_gradient_only_where_asked_and_never_with_gru(kind, flows):
    cfg = config(kind, IMAGE, **{"encoder.context_grad": flows})
    agent, net = built(cfg, IMAGE)
    window = draws(
        filled(cfg, IMAGE, random_rows(IMAGE, 60)),
        step=torch.tensor(0),
        batch=5,
        context=3,
        ahead=4,
    )
    window = window._replace(obs=window.obs.float().requires_grad_())
    loss, *_ = agent.stages(net)[0].loss(net, net, window, mask=None, dice=None, prepared=None)
    (grad,) = torch.autograd.grad(loss.sum(), [window.obs])
    size = grad.flatten(4).abs().amax((0, 1, 2, 4))
    assert bool((size[:3] > 0).all()) == (flows and kind == "fox")
    assert not size[:3].any() or (flows and kind == "fox")
    assert bool((size[3:7] > 0).all()) and not size[7].any()


@pytest.mark.parametrize("name", ["dqn", "sac"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_one_seed_leaves_the_others_bitwise_alone(kind, name):
    spec = FORCES if name == "sac" else FLAT
    cfg = config(kind, spec, **{"ensemble.heads": "cerl"})
    after = []
    for poison in (False, True):
        agent, net = built(cfg, spec)
        replay = filled(cfg, spec, random_rows(spec, 60))
        if poison:
            replay.reward[1] = float("nan")
        learner = Learner(cfg, agent, net, replay, keys=draw.seed_keys(cfg.seeds))
        for _ in range(3):
            learner.update()
        after.append([leaf.detach().clone() for leaf in learner.leaves])
    for clean, sick in zip(*after, strict=True):
        assert torch.equal(clean[0], sick[0]) and clean[0].isfinite().all()
        assert sick[1].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_learns_the_same_alone_and_among_others(kind):
    rows, after = random_rows(FLAT, 60), []
    for chosen in ([0, 1], [1]):
        cfg = config(kind, seeds=tuple(chosen))
        agent = wiring.make_agent(cfg, FLAT, CPU)
        keys = draw.seed_keys(cfg.seeds)
        mine = [Row(*(field[chosen] for field in row)) for row in rows]
        replay = Replay(FLAT, keys=keys, capacity=400, device=CPU)
        for row in mine:
            replay.add(row)
        learner = Learner(cfg, agent, agent.build(keys=keys), replay, keys=keys)
        for _ in range(3):
            learner.update()
        after.append([leaf.detach() for leaf in learner.leaves])
    for among, alone in zip(*after, strict=True):
        assert_agree(among[1], alone[0])


def test_the_last_rows_are_those_written_last():
    cfg = config("fox", FLAT, **{"replay.capacity": 40, "replay.start": 40})
    rows = random_rows(FLAT, 26)
    for count in (3, 10, 26):
        window = filled(cfg, FLAT, rows[:count]).last(8)
        assert window.obs.shape == (S, 1, E, 8, 5)
        for t in range(8):
            at = count - 8 + t
            if at < 0:
                assert not window.real[..., t].any()
                continue
            for name in Row._fields:
                mine = getattr(window, name)[:, 0, :, t]
                assert torch.equal(mine, getattr(rows[at], name).to(mine.dtype)), name


def test_windows_that_begin_with_an_episode_do_and_never_cross_the_write_head():
    cfg = config("fox", FLAT, **{"replay.capacity": 80, "replay.start": 80})
    rows = random_rows(FLAT, 47)
    replay = filled(cfg, FLAT, rows)  # a ring of 20 rows, so 27 to 46 are left
    found = set()
    for step in range(30):
        window = draws(
            replay,
            step=torch.tensor(step),
            batch=16,
            context=3,
            ahead=4,
            begins=True,
            candidates=32,
        )
        for s, b in itertools.product(range(S), range(16)):
            if not window.weight[s, 0, b]:
                continue
            row, env = divmod(int(window.row[s, 0, b]), E)
            assert 27 + 3 <= row <= 46 - 4
            assert not rows[row - 1].real[s, env] and rows[row].real[s, env]
            assert torch.equal(window.obs[s, 0, b, 0], rows[row - 3].obs[s, env])
            assert torch.equal(window.obs[s, 0, b, 7], rows[row + 4].obs[s, env])
            found.add((s, row, env))
    wanted = {
        (s, t, e)
        for s, t, e in itertools.product(range(S), range(30, 43), range(E))
        if not rows[t - 1].real[s, e]
    }
    assert found == wanted


@pytest.mark.parametrize("members", [1, 2])
def test_windows_that_begin_with_a_stored_state_go_on_as_acting_did(members):
    options = {
        "seeds": (0, 1),
        "env": {"rows": 14, "envs": 3},
        "net": {"hidden": (8,)},
        "ensemble.members": members,
        "loss.batches": "own" if members > 1 else "shared",
        "encoder": encoder("gru", width=16, layers=2, learnt=3, context=1, stored_state=True),
        "replay": {"capacity": 300, "start": 100, "candidates": 64},
    }
    cfg = load("catch/ddqn", options | {"device": "cpu"})
    agent, net, collector = collector_of(cfg)
    for _ in range(50):
        collector.step()
    replay = collector.replay
    every = replay.last(50)
    with torch.no_grad():
        want = everything(net, every)  # [S, N, E, 50, D]
        window = draws(
            replay,
            step=torch.tensor(1),
            batch=40,
            context=2,
            ahead=3,
            members=members,
            batches=cfg.loss.batches,
            candidates=64,
        )
        now, _ = learnt(window, first=net.reader.context, n=1, begins=False)
        (got,) = net.look(window, now)
        (without,) = net.look(window._replace(state=window.state[..., :0]), now)
    got, without = got.unflatten(2, (40, 3)), without.unflatten(2, (40, 3))
    compared = 0
    for s, m, b, t in itertools.product(range(2), range(members), range(40), range(3)):
        row, env = divmod(int(window.row[s, m, b]), 3)
        if int(window.member[s, m, b, 2 + t]) != m:
            continue
        compared += 1
        assert_agree(got[s, m, b, t], want[s, m, env, row + t])
    assert compared > 100
    assert not torch.allclose(got, without)


def collector_of(cfg: Config):
    keys = draw.seed_keys(cfg.seeds)
    env = make(cfg.env, seeds=cfg.seeds, salt=0, device=CPU)
    agent = wiring.make_agent(cfg, env.spec, CPU)
    net = agent.build(keys=keys)
    size: dict[str, Any] = {"capacity": cfg.replay.capacity, "remembered": cfg.encoder.state_size}
    replay = Replay(env.spec, keys=keys, device=CPU, **size)
    return agent, net, Collector(cfg, env, agent, net, replay, keys=keys)


@pytest.mark.parametrize("switch", ["episode", "step"])
@pytest.mark.parametrize("kind", ["gru", "transformer", "fox"])
@pytest.mark.parametrize("preset", ["catch/ddqn", "point_mass/sac"])
def test_a_refresh_leaves_what_todays_parameters_would_have_remembered(preset, kind, switch):
    options = {
        "seeds": (0, 1),
        "env.envs": 3,
        "net.hidden": (8,),
        "ensemble": {"members": 2, "switch": switch},
        "encoder": encoder(kind, width=16, heads=2, learnt=12, cache=12),
        "replay": {"capacity": 300, "start": 100},
    }
    options["env"] = {"rows": 9} if preset == "catch/ddqn" else {"time_limit": 9}
    agent, net, collector = collector_of(load(preset, options))
    for steps in (5, 37):
        for _ in range(steps):
            collector.step()
        # Nothing has been learnt since the episodes began.
        clean = staleness(agent, collector)
        assert (clean["cache_error"] < 1e-5).all() and (clean["cache_error_largest"] < 1e-4).all()
        with torch.no_grad():
            for leaf in net.parameters():
                leaf.mul_(1.5)
        stale = staleness(agent, collector)
        assert (stale["cache_error"] > 1e-4).all()
        assert (stale["cache_error_largest"] >= stale["cache_error"]).all()
        places = [part.data_ptr() for part in collector.player.carry]
        collector.refresh()
        assert [part.data_ptr() for part in collector.player.carry] == places
        assert (staleness(agent, collector)["cache_error_largest"] < 1e-4).all()


@pytest.mark.parametrize("kind", ["transformer", "fox"])
def test_a_refresh_looks_back_as_far_as_layers_on_layers_do(kind):
    options = {
        "seeds": (0, 1),
        "env": {"rows": 30, "envs": 3},
        "net": {"hidden": (8,)},
        "encoder": encoder(kind, width=16, heads=2, layers=3, learnt=5, cache=4),
        "replay": {"capacity": 300, "start": 100},
    }
    _, acting, collector = collector_of(load("catch/ddqn", options))
    agent, net = built(collector.config, collector.player.env.spec)
    acting.load_state_dict(net.state_dict())
    for _ in range(25):
        collector.step()
    assert not collector.player.start.any()
    assert (staleness(agent, collector)["cache_error_largest"] < 1e-4).all()


@pytest.mark.parametrize("preset", ["catch/ddqn", "point_mass/sac"])
def test_streams_of_caches_are_of_the_member_on_duty_or_of_all(preset):
    options = {"encoder.name": "fox", "ensemble.members": 3, "encoder.learnt": 4}
    cfg = load(preset, {**options, "device": "cpu"})
    _, net, _ = collector_of(cfg)
    for evaluating, streams in ((False, 1), (True, 3)):
        held = net.carry(envs=cfg.env.envs, evaluating=evaluating)
        assert held and all(len(part) == len(cfg.seeds) * streams * cfg.env.envs for part in held)


@pytest.mark.parametrize("name", ["memory/fox", "mujoco/velocity-fox"])
def test_diagnostics_of_sequence_networks_are_finite(name):
    spec = FORCES if name.startswith("mujoco") else FLAT
    sizes = {"width": 16, "heads": 2, "context": 2, "learnt": 4, "sampling": "uniform"}
    options = {"seeds": (0, 1), "env.envs": E, "encoder": sizes, "ensemble.members": 2}
    options["replay"] = {"capacity": 2_000, "start": 1_000, "batch": 8}
    learner = bench.filled_learner(load(name, options), spec, CPU)
    found = diagnose(learner.agent, learner)
    assert {"feature_rank", "dormant_share", "own_data_share"} <= set(found)
    alone = found.pop("value_spread")
    assert alone.shape == (2,) and alone.isfinite().all()
    assert all(value.shape == (2, 2) and value.isfinite().all() for value in found.values())


ENDLESS = {"env": {"family": "gym", "envs": E}}
BASE: dict[str, Any] = {
    "ensemble.members": N,
    "net.hidden": (8,),
    "replay": {"capacity": 400, "batch": 5, "start": 100, "candidates": 16},
}
NINE = {"env": {"family": "point_mass", "time_limit": 9}, "agent": {"name": "sac"}}
REFUSED = [
    ({"encoder.learnt": 0}, "encoder.learnt: 0 means the longest episode"),
    ({"encoder.heads": 3}, r"encoder.width: expected a multiple of encoder.heads \(3\), got 16"),
    ({"encoder.heads": 4}, "encoder.heads: a head is 8, 16.*got 4 with 4 heads"),
    ({"encoder.width": 256, "encoder.heads": 1}, "encoder.heads: a head is .* got 256"),
    ({"encoder.cache": -1}, "encoder.cache: expected greater than or equal to 0, got -1"),
    ({"encoder.gate_scales": (9.0, 2.0)}, r"encoder.gate_scales: expected the shortest.*\[9"),
    ({"encoder.frames": 2}, "encoder.frames: no such key; encoder fox has none, frames does"),
    ({"encoder.learnt": 200}, "replay.capacity: expected at least 820 rows, a window .*205"),
    ({"encoder.learnt": 40}, "replay.start: expected at least 180, i.e. 45 .a window and a"),
    ({"encoder.stored_state": True}, "encoder.stored_state: no such key; .* fox has none, gru"),
    (
        {"encoder": {"name": "gru", "learnt": 4, "stored_state": True}},
        "encoder.stored_state: a stored state is of use .* got shared and episode with 3 members",
    ),
    ({"agent.mico_weight": 0.5}, "agent.mico_weight: the MICo loss .* encoder fox"),
    (
        {"loss.batches": "own", "loss.batches_probability": 0.5, "replay.candidates": 64},
        "loss.batches_probability: a sequence network cannot use own",
    ),
    ({"ensemble.shared_layers": 3}, r"shared_layers: expected at most 2 \(the sequence network"),
    (
        {"encoder.sampling": "episode_start", **NINE},
        "replay.candidates: one row in 10 starts an episode, so none of 16 candidates does with",
    ),
    (
        {"encoder.sampling": "episode_start", **NINE, "replay.candidates": 64}
        | {"encoder.learnt": 9, "loss.batches": "own"},
        "replay.candidates: one row in 30 starts an episode .*of 3., so none of 64 .* "
        "probability 0.11; .* at least 89 candidates",
    ),
    (
        {"encoder.sampling": "episode_start", **NINE, "replay.candidates": 64},
        "encoder.learnt: with sampling episode_start .* last up to 9 agent steps; expected at",
    ),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_does_not_fit_together_is_refused(override, message):
    named = {"name": "fox", "width": 16, "learnt": 4, "context": 2}
    own = {key[8:]: value for key, value in override.items() if key.startswith("encoder.")}
    rest = {key: value for key, value in override.items() if not key.startswith("encoder.")}
    with pytest.raises(ValueError, match=message):
        load("catch/ddqn", BASE | ENDLESS | {"encoder": named | own} | rest)


def test_episodes_without_an_end_need_a_number_of_learnt_rows():
    assert load("memory/fox", {"env.length": 200}).rows_of_window == (1, 201, 1)
    assert (
        load("memory/fox", {"env.name": "tmaze_active", "env.length": 20}).rows_of_window.learnt
        == 23
    )
    assert load("memory/fox", {"env.length": 20, "env.time_limit": 9}).rows_of_window.learnt == 9
    assert load("memory/fox", {"env.name": "RepeatPreviousEasy"}).rows_of_window.learnt == 51
    with pytest.raises(ValueError, match="encoder.learnt: 0 means"):
        load("memory/fox", {"env": {"family": "gym", "name": "CartPole-v1"}})


TWINS = {
    "memory/": FLAT._replace(observation=(2,), actions=4),
    "popgym/": FLAT,
    "popgym/sac-": FORCES._replace(observation=(2,), actions=1),
    "atari/flicker-": IMAGE._replace(observation=(84, 84), actions=6),
    "mujoco/velocity-": FORCES._replace(observation=(9,), actions=6),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TWINS)
def test_twins_differ_in_their_encoder_and_by_less_than_5_percent_of_the_parameters(family):
    sizes, fox = {}, load(family + "fox", {"seeds": (0,), "device": "cpu"})
    for kind in KINDS:
        cfg = load(family + kind, {"seeds": (0,), "device": "cpu"})
        assert cfg.encoder.name == kind
        assert cfg == fox.model_copy(update={"preset": family + kind, "encoder": cfg.encoder})
        same = {k: v for k, v in fox.encoder if k in cfg.encoder.model_dump() and k != "name"}
        assert same == {k: getattr(cfg.encoder, k) for k in same}
        agent = wiring.make_agent(cfg, TWINS[family], CPU)
        leaves = agent.build(keys=draw.seed_keys((0,))).parameters()
        sizes[kind] = sum(leaf.numel() for leaf in leaves)
    assert all(0.95 < size / sizes["fox"] < 1.05 for size in sizes.values()), sizes


def tmaze_scores(tmp_path, kind: str) -> list[float]:
    """Returns of the last evaluation, by seed."""
    options = {
        "device": "cpu",
        "out": str(tmp_path),
        "seeds": (0,),
        "env": {"length": 5},
        "net": {"hidden": (32,)},
        "encoder": encoder(kind, width=32, sampling="episode_start"),
        "optim": {"lr": 1e-3},
        "replay": {"capacity": 20_000, "batch": 16, "start": 400, "candidates": 128},
        "schedule": {"steps": 6_000, "target_rate": 0.01},
        "explore": {"end": 0.1, "hold": 400, "decay": 2_000},
        "eval": {"every": 6_000, "episodes": 40},
        "log": {"every": 6_000},
    }
    folder = training.train(load("memory/fox", options))
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    return [row["return"] for row in rows if row["policy"] == "individual"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fox", "gru"])
def test_memory_solves_a_short_t_maze(tmp_path, kind):
    assert tmaze_scores(tmp_path, kind) == [1.0]


@pytest.mark.slow
def test_sac_with_memory_learns_the_point_mass_from_its_position(tmp_path):
    """Random forces score about 23 of 50, a mass that is in the middle at once 50."""
    options = {
        "device": "cpu",
        "out": str(tmp_path),
        "env.observe.keep": "position",
        "net": {"hidden": (64,)},
        "encoder": {"name": "gru", "width": 32, "context": 4, "learnt": 8},
        "replay.batch": 16,
        "schedule.steps": 2_000,
        "eval.every": 2_000,
    }
    folder = training.train(load("point_mass/sac", options))
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    (score,) = [row["return"] for row in rows if row["policy"] == "individual_mode"]
    assert score > 40


@pytest.mark.parametrize("kind", ["mlp", "fox"])
def test_policies_and_critics_of_sac_see_images_by_convolutions_of_their_own(kind):
    spec = IMAGE._replace(continuous=True)
    cfg = config(kind, spec, **{"agent.name": "sac", "ensemble.heads": "cerl", "encoder.cache": 7})
    agent, net = built(cfg, spec)
    rows = random_rows(spec, 60)
    replay = filled(cfg, spec, rows)
    window = draws(
        replay, step=torch.tensor(3), batch=5, context=cfg.rows_of_window.context, ahead=4
    )
    keys = draw.seed_keys((0, 1))
    dice = agent.dice(keys, torch.tensor(0))
    parts: dict[str, Any] = {"actor": net.actor.trunk.convs, "critic": net.critic.trunk.convs}
    for stage, own, other in ((0, "critic", "actor"), (1, "actor", "critic")):
        loss, *_ = agent.stages(net)[stage].loss(
            net, net.critic, window, mask=None, dice=dice, prepared=None
        )
        found = {
            name: torch.autograd.grad(
                loss.sum(), list(part.parameters()), allow_unused=True, retain_graph=True
            )
            for name, part in parts.items()
        }
        assert all(grad is not None and bool(grad.any()) for grad in found[own])
        assert all(grad is None for grad in found[other])
    # Acting sees what learning sees.
    last = replay.last(20)
    with torch.no_grad():
        every = everything(net.actor, last)
        steps = acted(net, rows[-20:], evaluating=True)
        duty = acted(net, rows[-20:], evaluating=False)
        critics = everything(net.critic, last)
    for got, want in zip(steps[-2:], (every, critics), strict=True):
        assert_agree(got, want[:, :, :, -1])
    for s, e in itertools.product(range(S), range(E)):
        member = rows[-1].member[s, e]
        for got, want in zip(duty[-2:], (every, critics), strict=True):
            assert_agree(got[s, 0, e], want[s, member, e, -1])


@pytest.mark.slow
def test_without_memory_a_t_maze_is_a_coin(tmp_path):
    (score,) = tmaze_scores(tmp_path, "mlp")
    assert 0.5 - 4 * math.sqrt(0.25 / 40) < score < 0.5 + 4 * math.sqrt(0.25 / 40)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["memory/fox", "memory/gru", "memory/mlp"])
def test_gpu_runs_resume_bitwise(tmp_path, name):
    from test_train import assert_same, final_state, stop_at_first_checkpoint

    options = {
        "seeds": (0, 1),
        "device": "cuda",
        "env": {"envs": 8, "length": 10},
        "ensemble": {"members": 3, "heads": "cerl"},
        **({} if name == "memory/mlp" else {"encoder": {"cache_refresh": 25}}),
        "replay": {"capacity": 4_000, "start": 200, "candidates": 64},
        "schedule": {"steps": 1_600},
        "eval": {"every": 800, "episodes": 2},
        "log": {"every": 400, "checkpoint_every": 800},
    }
    config = load(name, {**options, "out": str(tmp_path / "whole")})
    whole = training.train(config)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_first_checkpoint(patch)
        training.train(config.model_copy(update={"out": str(tmp_path / "halves")}))
    (half,) = (tmp_path / "halves").iterdir()
    training.resume(half)
    assert_same(final_state(whole), final_state(half))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["memory/fox", "memory/gru", "memory/mlp", "mujoco/velocity-fox"])
def test_captured_updates_and_steps_equal_eager_ones_bitwise(name, precision):
    device = torch.device("cuda")
    options = {
        "seeds": (0, 1),
        "env": {"family": "point_mass", "envs": 8} if "mujoco" in name else {"length": 10},
        "ensemble": {"members": 3, "heads": "cerl"},
        "encoder": {"learnt": 12, "precision": precision},
        "replay": {"capacity": 4_000, "start": 400},
    }
    cfg = load(name, options)
    runs = []
    for _ in range(2):
        keys = draw.seed_keys(cfg.seeds, device=device)
        env = make(cfg.env, seeds=cfg.seeds, salt=0, device=device)
        agent = wiring.make_agent(cfg, env.spec, device)
        net = agent.build(keys=keys)
        replay = Replay(env.spec, keys=keys, capacity=4_000, device=device)
        learner = Learner(cfg, agent, net, replay, keys=keys)
        runs.append((learner, Collector(cfg, env, agent, net, replay, keys=keys)))
    (eager, walk), (graph, jump) = runs
    update = captured(graph.update, device)
    for k in range(120):
        walk.player.halves.decide()
        walk.player.next.copy_(walk.player.env.step(walk.player.action))
        walk.player.halves.record()
        jump.step()
        if k >= 60 and k % 4 == 0:
            eager.update()
            update()
        if k == 90:
            walk.refresh()
            jump.refresh()
    for mine, theirs in zip(eager.leaves, graph.leaves, strict=True):
        assert torch.equal(mine, theirs) and mine.isfinite().all()
    for mine, theirs in zip(walk.player.carry, jump.player.carry, strict=True):
        assert torch.equal(mine, theirs)
    assert int(eager.updates) == int(graph.updates) == 15
