"""The Collector on scripted episodes, compared with the rows it must have written; learning."""

from typing import Any

import pytest
import torch
from draws import draws
from scripted import Chain, Scripted

from cerl import draw, explore, wiring
from cerl.agents.dqn import DQN
from cerl.agents.sac import SAC
from cerl.agents.values import expected_value
from cerl.collect import Collector
from cerl.config import (
    AdamConfig,
    Config,
    DqnConfig,
    EnsembleConfig,
    EvalConfig,
    ExploreConfig,
    LossConfig,
    NetConfig,
    PointMassEnv,
    ReplayConfig,
    SacConfig,
    load,
)
from cerl.learn import Learner
from cerl.replay import Replay

CPU = torch.device("cpu")
E, N, GAMMA = 2, 3, 0.5


def length(seed, e, k):
    return 1 + (2 * seed + 3 * e + k) % 4


def reward(seed, e, k, t, action):
    return (seed + 1) * (t + 1) * 0.25 - e + 2.0 * action


def terminal(seed, e, k):
    return k % 3 != 1


def config(seeds=(0, 1), *, clip=0.0, **ensemble: Any):
    return Config(
        seeds=seeds,
        net=NetConfig(hidden=()),
        ensemble=EnsembleConfig(**{"members": N, **ensemble}),
        loss=LossConfig(gamma=GAMMA),
        replay=ReplayConfig(capacity=200, start=10, reward_clip=clip),
        explore=ExploreConfig(start=1.0, end=0.0, hold=10, decay=80),
    )


def collector(cfg, *, exact=True, resident=False):
    env = Scripted(
        seeds=cfg.seeds,
        envs=E,
        length=length,
        reward=reward,
        terminal=terminal,
        resident=resident,
        exact=exact,
    )
    keys = draw.seed_keys(cfg.seeds)
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    net = agent.build(keys=keys)
    replay = Replay(env.spec, keys=keys, capacity=cfg.replay.capacity, device=CPU)
    return Collector(cfg, env, agent, net, replay, keys=keys)


def drawn(cfg, step):
    """Noise of one acting step and the member it would put on duty."""
    eps = explore.epsilon(cfg.explore, torch.tensor(step * E))
    noise = explore.noise(
        draw.seed_keys(cfg.seeds), torch.tensor(step), envs=E, actions=3, eps=eps, votes=False
    )
    return noise, explore.duty(cfg.ensemble, noise.member)


@torch.no_grad()
def slow_run(cfg, net, steps):
    """Rows by time, finished episodes: what a loop over one environment at a time does."""
    rows = [dict() for _ in range(steps)]
    episodes = []
    for s, seed in enumerate(cfg.seeds):
        for e in range(E):
            k, t, member, rewards, best = 0, 0, 0, [], []
            for step in range(steps):
                noise, duty = drawn(cfg, step)
                if t == 0 or cfg.ensemble.switch == "step":
                    member = int(duty[s, e])
                place = torch.tensor([seed, e, k, t], dtype=torch.float32)
                q = place @ net.final.weight[s, member, :, 0] + net.final.bias[s, member, 0]
                action = int(noise.action[s, e]) if noise.explore[s, e] else int(q.argmax())
                real = t < length(seed, e, k)
                if real:
                    gain = reward(seed, e, k, t, action)
                    last = t + 1 == length(seed, e, k)
                    rewards.append(gain)
                    best.append(float(q.max()))
                else:
                    gain, last = 0.0, False
                ended = last and terminal(seed, e, k)
                rows[step][s, e] = (place.tolist(), action, gain, ended, real, member)
                if last:
                    episodes.append((s, member, rewards, best))
                    rewards, best = [], []
                k, t = (k, t + 1) if real else (k + 1, 0)
    return rows, episodes


def clipped(x, clip):
    return max(-clip, min(clip, x)) if clip else x


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(clip=1.0),
        dict(switch="step"),
        dict(members=2, duty="tandem", active_probability=0.5),
        dict(duty="first"),
        dict(heads="cerl"),
    ],
    ids=str,
)
def test_rows_and_returns_equal_a_loop_over_single_environments(options):
    cfg, steps = config(**options), 60
    ours = collector(cfg)
    assert isinstance(ours.player.env, Scripted)
    for _ in range(steps):
        ours.step()
    rows, episodes = slow_run(cfg, ours.player.net, steps)
    ring, clip = ours.replay, cfg.replay.reward_clip
    for step, model in enumerate(rows):
        for (s, e), (place, action, gain, ended, real, member) in model.items():
            at = (s, step, e)
            assert ring.obs[at].tolist() == place
            assert bool(ring.real[at]) == real and bool(ring.terminated[at]) == ended, at
            assert int(ring.member[at]) == member, at
            if real:
                assert int(ring.action[at]) == action, at
                assert int(ours.player.env.taken[step][s, e]) == action
            assert float(ring.reward[at]) == pytest.approx(clipped(gain, clip))
    done = ours.take_finished()
    for s in range(2):
        for i in range(cfg.ensemble.members):
            mine = [(rewards, best) for a, m, rewards, best in episodes if (a, m) == (s, i)]
            assert int(done["episodes"][s, i]) == len(mine)
            if not mine:
                assert all(bool(done[x][s, i].isnan()) for x in ("return", "length", "value", "mc"))
                continue

            def later(rewards, t):
                tail = [clipped(r, clip) for r in rewards[t:]]
                return sum(GAMMA**k * r for k, r in enumerate(tail))

            want = {
                "return": [sum(r) for r, _ in mine],
                "length": [len(r) for r, _ in mine],
                "value": [sum(b) / len(b) for _, b in mine],
                "mc": [sum(later(r, t) for t in range(len(r))) / len(r) for r, _ in mine],
            }
            for name, numbers in want.items():
                got = float(done[name][s, i])
                assert got == pytest.approx(sum(numbers) / len(numbers), abs=1e-4), name
    counts = [sum(real for (a, _), (*_, real, _) in _all(rows) if a == s) for s in range(2)]
    assert ours.real_steps.tolist() == counts
    assert float(ours.take_finished()["episodes"].sum()) == 0
    assert int(ours.player.steps) == steps


def _all(rows):
    return [item for model in rows for item in model.items()]


def test_a_monte_carlo_value_by_hand():
    # one episode of rewards 1, 2, 4 at gamma 1/2: returns to go 3, 4, 4
    env = Scripted(
        seeds=[0], envs=1, length=lambda *_: 3, reward=lambda s, e, k, t, a: 2.0**t, actions=3
    )
    cfg = config((0,), members=1)
    keys = draw.seed_keys([0])
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    net = agent.build(keys=keys)
    with torch.no_grad():
        net.final.weight.zero_()
        net.final.bias.fill_(5.0)
    replay = Replay(env.spec, keys=keys, capacity=50, device=CPU)
    ours = Collector(cfg, env, agent, net, replay, keys=keys)
    for _ in range(4):
        ours.step()
    done = {name: float(value) for name, value in ours.take_finished().items()}
    assert done["episodes"] == 1 and done["return"] == 7 and done["length"] == 3
    assert done["mc"] == pytest.approx((3 + 4 + 4) / 3) and done["value"] == pytest.approx(5)


def test_bonuses_count_in_the_returns_of_the_steps_before_their_own():
    # Rewards 1, 2, 4 and a bonus of 10 a step at gamma 1/2: the last return is 4, the one before
    # 2 + (4 + 10) / 2 = 9, the first 1 + (2 + 10) / 2 + (4 + 10) / 4 = 10.5.
    env = Scripted(
        seeds=[0], envs=1, length=lambda *_: 3, reward=lambda s, e, k, t, a: 2.0**t, actions=3
    )
    cfg = config((0,), members=1)
    keys = draw.seed_keys([0])
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    replay = Replay(env.spec, keys=keys, capacity=50, device=CPU)
    ours = Collector(cfg, env, agent, agent.build(keys=keys), replay, keys=keys)
    plain = agent.act
    agent.act = lambda *a, **k: plain(*a, **k)._replace(bonus=torch.full((1, 1), 10.0))
    for _ in range(4):
        ours.step()
    done = ours.take_finished()
    assert float(done["mc"]) == pytest.approx((10.5 + 9 + 4) / 3)
    assert float(done["return"]) == 7


def test_continuous_actions_go_where_the_discrete_ones_go():
    env = Scripted(
        seeds=[3, 5],
        envs=E,
        length=length,
        reward=lambda s, e, k, t, a: a[0] - a[1],
        actions=2,
        continuous=True,
    )
    cfg = Config(
        agent=SacConfig(),
        seeds=(3, 5),
        env=PointMassEnv(envs=E),
        net=NetConfig(hidden=(8,)),
        ensemble=EnsembleConfig(members=N),
        replay=ReplayConfig(capacity=100, start=10),
        explore=ExploreConfig(start=1.0, end=0.0, hold=19, decay=1),
        eval=EvalConfig(policies=("individual",)),
    )
    keys = draw.seed_keys(cfg.seeds)
    agent = SAC(cfg, env.spec, device=CPU)
    replay = Replay(env.spec, keys=keys, capacity=100, device=CPU)
    ours = Collector(cfg, env, agent, agent.build(keys=keys), replay, keys=keys)
    for _ in range(30):
        ours.step()
    assert replay.action.shape == (2, 50, E, 2) and replay.action.dtype == torch.float32
    for step in range(30):
        assert torch.equal(replay.action[:, step], env.taken[step])
        gained = torch.where(
            replay.real[:, step], env.taken[step][..., 0] - env.taken[step][..., 1], 0.0
        )
        torch.testing.assert_close(replay.reward[:, step], gained)
        noise = explore.continuous_noise(
            keys, torch.tensor(step), envs=E, actions=2, eps=0.5, samples=1, policies=1
        )
        drawn = bool((replay.action[:, step] == noise.action).all())
        assert drawn == (step * E < 20)
    window = draws(replay, step=torch.tensor(0), batch=7, context=1, ahead=2)
    assert window.action.shape == (2, 1, 7, 4, 2)
    at = window.row // E - replay.total + 30, window.row % E
    for s in range(2):
        for b in range(7):
            time, e = int(at[0][s, 0, b]), int(at[1][s, 0, b])
            assert torch.equal(window.action[s, 0, b], replay.action[s, time - 1 : time + 3, e])


def test_actions_that_are_not_finite_do_not_reach_replay():
    env = Scripted(
        seeds=[3], envs=E, length=length, reward=lambda *_: 0.0, actions=2, continuous=True
    )
    cfg = Config(
        agent=SacConfig(),
        seeds=(3,),
        env=PointMassEnv(envs=E),
        net=NetConfig(hidden=(8,)),
        replay=ReplayConfig(capacity=100, start=10),
        explore=ExploreConfig(start=0.0, end=0.0, hold=0, decay=1),
        eval=EvalConfig(policies=("individual",)),
    )
    keys = draw.seed_keys(cfg.seeds)
    agent = SAC(cfg, env.spec, device=CPU)
    net = agent.build(keys=keys)
    with torch.no_grad():
        net.actor.moments.weight[0, 0, :, 1] = float("nan")
    replay = Replay(env.spec, keys=keys, capacity=100, device=CPU)
    ours = Collector(cfg, env, agent, net, replay, keys=keys)
    for _ in range(5):
        ours.step()
    assert bool(env.taken[0][..., 1].isnan().all())  # the environment is told
    assert bool(replay.action[:, :5].isfinite().all())
    assert not bool(replay.action[:, :5, :, 1].any()) and bool(replay.action[:, :5, :, 0].any())


def test_members_change_between_episodes_only_or_at_every_step():
    for switch, changes in (("episode", False), ("step", True)):
        ours = collector(config(members=3, switch=switch))
        for _ in range(60):
            ours.step()
        ring, within, between = ours.replay, 0, 0
        for s in range(2):
            for e in range(E):
                for t in range(1, 60):
                    differs = bool(ring.member[s, t, e] != ring.member[s, t - 1, e])
                    if bool(ring.real[s, t - 1, e]):
                        within += differs
                    else:
                        between += differs
        assert (within > 0) == changes and between > 0


def test_a_seed_collects_the_same_alone_and_among_others():
    together, alone = collector(config((3, 8))), collector(config((8,)))
    for _ in range(50):
        together.step()
        alone.step()
    for name in ("obs", "action", "reward", "terminated", "real", "member"):
        a, b = getattr(together.replay, name)[1], getattr(alone.replay, name)[0]
        assert torch.equal(a, b), name


@pytest.mark.parametrize("resident", [True, False])
def test_updates_run_before_simulators_of_the_host_and_behind_those_of_the_device(resident):
    ours, order = collector(config(), resident=resident), []
    simulate = ours.player.env.step

    def step(action):
        order.append("simulate")
        return simulate(action)

    def learn():
        order.append(f"learn from {int(ours.replay.total)} rows")
        for leaf in ours.player.net.parameters():
            leaf.data.add_(1.0)

    ours.player.env.step = step
    before = [leaf.clone() for leaf in ours.player.net.parameters()]
    ours.step(learn)
    ours.step(learn)
    ours.step()
    lines = [["simulate", "learn from 1 rows", "simulate", "learn from 2 rows", "simulate"]]
    lines += [["learn from 0 rows", "simulate", "learn from 1 rows", "simulate", "simulate"]]
    assert order == lines[not resident]
    for leaf, old in zip(ours.player.net.parameters(), before, strict=True):
        assert torch.equal(leaf, old + 1.0 + 1.0)


def test_what_simulators_answer_changes_no_batch_of_the_same_step():
    def batches(gain):
        ours, sampled = collector(config()), []
        assert isinstance(ours.player.env, Scripted)
        taken = ours.player.env.taken
        ours.player.env.reward = lambda *where: gain * (len(taken) == 12)

        def learn():
            window = draws(ours.replay, step=ours.player.steps, batch=64, context=0, ahead=1)
            sampled.append(window.reward.clone())

        for _ in range(13):
            ours.step(learn)
        return sampled

    (*calm, last), (*shaken, other) = batches(0.0), batches(100.0)
    assert all(torch.equal(a, b) for a, b in zip(calm, shaken, strict=True))
    assert not torch.equal(last, other)


def test_a_saved_collector_goes_on_bitwise():
    whole, first, second = (collector(config()) for _ in range(3))
    for _ in range(40):
        whole.step()
    for _ in range(17):
        first.step()
    second.replay.load_state_dict(first.replay.state_dict())
    assert second.load_state_dict(first.state_dict()) is True
    for _ in range(23):
        second.step()
    for name, value in whole.replay.state_dict().items():
        assert torch.equal(value, second.replay.state_dict()[name]), name
    assert torch.equal(whole.finished, second.finished)
    for a, b in zip(whole.running, second.running, strict=True):
        assert torch.equal(a, b)


def test_where_a_simulator_is_lost_the_episodes_under_way_are_cut():
    first, second = (collector(config(), exact=False) for _ in range(2))
    for _ in range(17):
        first.step()
    second.replay.load_state_dict(first.replay.state_dict())
    pending = first.player.last.obs.clone()
    assert second.load_state_dict(first.state_dict()) is False
    ring = second.replay
    assert int(ring.total) == 18 and int(second.player.steps) == 17
    assert torch.equal(ring.obs[:, 17], pending)
    assert not ring.real[:, 17].any() and not ring.terminated[:, 17].any()
    assert bool(second.player.start.all()) and all(
        float(x.abs().sum()) == 0 for x in second.running
    )
    second.step()
    assert int(ring.real[:, 18].sum()) == 4
    assert ring.obs[:, 18, :, 3].tolist() == [[0, 0], [0, 0]]


def test_a_step_in_which_simulators_fail_becomes_the_cut_of_all_episodes():
    first, whole, second = (collector(config()) for _ in range(3))
    updates: list[int] = []
    for _ in range(13):
        first.step(lambda: updates.append(1))
        whole.step()
    take = first.player.env.step

    def fail(action):
        take(action)  # some of them have moved on
        raise KeyError("wind")

    first.player.env.step = fail
    with pytest.raises(KeyError, match="wind"):
        first.step(lambda: updates.append(1))
    assert first.player.lost and len(updates) == 14
    second.replay.load_state_dict(first.replay.state_dict())
    assert second.load_state_dict(first.state_dict()) is False
    # The step counts like every other one, and its row is the cut.
    assert int(second.player.steps) == int(second.replay.total) == 14 and not second.player.lost
    assert not second.replay.real[:, 13].any()
    for name in ("obs", "reward", "terminated", "real", "member"):
        mine, theirs = (getattr(c.replay, name)[:, :13] for c in (second, whole))
        assert torch.equal(mine, theirs), name
    assert torch.equal(second.replay.obs[:, 13], whole.player.last.obs)
    assert second.player.start.all() and not any(part.any() for part in second.running)
    assert torch.equal(second.player.last.obs[0, 0], torch.tensor([0.0, 0.0, 14_000.0, 0.0]))
    assert torch.equal(second.real_steps, whole.real_steps)
    second.step()
    assert second.replay.real[:, 14].all()


@pytest.mark.slow
def test_double_dqn_learns_a_chain():
    cfg = Config(
        seeds=(0, 1),
        net=NetConfig(hidden=(16,)),
        ensemble=EnsembleConfig(members=2),
        loss=LossConfig(gamma=0.9),
        optim=AdamConfig(lr=1e-2),
        replay=ReplayConfig(capacity=2_000, batch=16, start=200),
        explore=ExploreConfig(start=1.0, end=0.2, hold=0, decay=400),
    )
    env, keys = Chain(seeds=2, envs=2), draw.seed_keys(cfg.seeds)
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    net = agent.build(keys=keys)
    replay = Replay(env.spec, keys=keys, capacity=2_000, device=CPU)
    learner = Learner(cfg, agent, net, replay, keys=keys)
    player = Collector(cfg, env, agent, net, replay, keys=keys)
    for step in range(700):
        player.step()
        if step >= 100:
            learner.update()
            if step % 25 == 0:
                learner.sync()
    with torch.no_grad():
        q = net(torch.eye(5).expand(2, 1, 5, 5), 1)[:, :, :, 0]  # [S, N, cell, A]
    assert bool((q.argmax(-1) == 1).all())
    best = torch.tensor([0.9**k for k in (4, 3, 2, 1, 0)])
    torch.testing.assert_close(q[..., 1], best.expand(2, 2, 5), atol=0.08, rtol=0)
    left = 0.9 * torch.tensor([0.9**k for k in (4, 4, 3, 2, 1)])
    torch.testing.assert_close(q[..., 0], left.expand(2, 2, 5), atol=0.12, rtol=0)


@pytest.mark.slow
def test_acting_and_recording_are_traced_whole():
    options = {"env.length": 5, "seeds": (0,), "replay.capacity": 5_000, "device": "cpu"}
    ours = wiring.assemble(load("memory/fox", options)).collector
    assert ours.config.explore.end is None
    for part in (ours.decide, ours.record):
        torch.compile(part, fullgraph=True, dynamic=False, backend="eager")()
    assert int(ours.player.steps) == 1
