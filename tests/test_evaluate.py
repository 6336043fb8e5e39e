"""The Evaluator on scripted episodes: which member plays how many episodes, and the scores."""

import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from scripted import Scripted

from cerl import draw
from cerl.agents.dqn import DQN, QNet
from cerl.agents.sac import SAC
from cerl.agents.values import expected_value
from cerl.config import (
    Config,
    DqnConfig,
    EnsembleConfig,
    EvalConfig,
    NetConfig,
    PointMassEnv,
    SacConfig,
)
from cerl.evaluate import Evaluator, evaluation_keys, lanes
from cerl.record.record import over_episodes
from cerl.report import evaluation

CPU = torch.device("cpu")


def config(*, seeds=(0, 1), members=2, **evaluation: Any):
    return Config(
        seeds=seeds,
        net=NetConfig(hidden=()),
        ensemble=EnsembleConfig(members=members),
        eval=EvalConfig(**{"epsilon": 0.0, **evaluation}),
    )


def evaluator(cfg, choices, *, length, reward=lambda s, e, k, t, a: float(a), **options):
    """Member i always prefers action choices[i]; an action's number is its reward."""
    env = Scripted(
        seeds=cfg.seeds, envs=lanes(cfg), length=length, reward=reward, actions=4, **options
    )
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    net = agent.build(keys=draw.seed_keys(cfg.seeds))
    with torch.no_grad():
        net.final.weight.zero_()
        net.final.bias.zero_()
        for i, action in enumerate(choices):
            net.final.bias[:, i, 0, action] = 1.0 + i
    return Evaluator(cfg, env, agent, net, keys=evaluation_keys(cfg.seeds, CPU))


def played(ours, number):
    """The results of an evaluation that nobody stopped."""
    results = ours.run(number)
    assert results is not None
    return results


def actions_of(ours):
    """[S, E] of every step of its environments."""
    assert isinstance(ours.player.env, Scripted)
    return ours.player.env.taken


@pytest.mark.parametrize("resident", [False, True])
def test_every_lane_plays_its_episodes_and_short_ones_are_not_favoured(resident):
    # lanes: member 0, member 0, member 1, member 1; lane 1 plays single steps, lane 2 long episodes
    def length(seed, e, k):
        return (3, 1, 40, 7)[e] + seed + k

    cfg = config(policies=("individual",), episodes=4, slots=2)
    assert lanes(cfg) == 4
    ours = evaluator(cfg, [1, 2], length=length, resident=resident)
    result = played(ours, 0)["individual"]
    assert result.returns.shape == result.lengths.shape == (2, 2, 4)
    assert result.returns.dtype == torch.float64 and result.diversity.shape == (2, 2)
    for s in range(2):
        each = [[length(s, e, k) for k in (0, 1)] for e in range(4)]
        assert result.lengths[s].tolist() == [each[0] + each[1], each[2] + each[3]]
    assert torch.equal(result.returns[:, 0], result.lengths[:, 0])
    assert torch.equal(result.returns[:, 1], 2 * result.lengths[:, 1])


def test_episodes_that_slots_do_not_divide_are_rounded_up():
    cfg = config(policies=("individual",), episodes=5, slots=2)
    ours = evaluator(cfg, [1, 2], length=lambda s, e, k: 2)
    assert played(ours, 0)["individual"].returns.shape == (2, 2, 6)
    alone = config(policies=("individual",), episodes=3)
    assert lanes(alone) == 6
    assert (
        played(evaluator(alone, [1, 2], length=lambda s, e, k: 2), 0)["individual"].returns.shape[2]
        == 3
    )


def test_policies_by_hand():
    # greedy actions 3, 0, 3, 1, 0, 0: the vote is 0; the mean Q of 0, 1, 3 is (13, 4, 4) / 6
    cfg = config(members=6, policies=("individual", "vote", "mean"), episodes=2)
    ours = evaluator(cfg, [3, 0, 3, 1, 0, 0], length=lambda s, e, k: 5)
    results = played(ours, 0)
    assert list(results) == ["individual", "vote", "mean"]
    individual = results["individual"].returns[0, :, 0].tolist()
    assert individual == [15, 0, 15, 5, 0, 0]
    assert results["vote"].returns.tolist() == [[[0, 0]]] * 2
    assert results["mean"].returns.tolist() == [[[0, 0]]] * 2
    # a strong preference moves the mean, not the vote
    net = ours.player.net
    assert isinstance(net, QNet)
    net.final.bias.data[:, 3, 0, 1] = 50.0
    results = played(ours, 0)
    assert results["vote"].returns.tolist() == [[[0, 0]]] * 2
    assert results["mean"].returns.tolist() == [[[5, 5]]] * 2
    shares = (3 / 6, 2 / 6, 1 / 6)
    want = -sum(p * math.log(p) for p in shares)
    for result in results.values():
        assert result.diversity.unique().tolist() == pytest.approx([want])


def test_ties_of_the_vote_are_broken_anew_at_every_step():
    cfg = config(seeds=(0,), members=2, policies=("vote",), episodes=1)
    ours = evaluator(cfg, [1, 3], length=lambda s, e, k: 400)
    score = float(played(ours, 0)["vote"].returns)
    taken = torch.stack(actions_of(ours)).flatten().tolist()[:400]
    assert set(taken) == {1, 3} and sum(taken) == score
    assert taken.count(1) == pytest.approx(200, abs=45)


@pytest.mark.slow
def test_the_random_policy_draws_a_member_for_each_episode_and_keeps_it():
    cfg = config(members=3, policies=("random",), episodes=150, slots=1)
    ours = evaluator(cfg, [1, 2, 3], length=lambda s, e, k: 4)
    first, second = played(ours, 0)["random"], played(ours, 1)["random"]
    assert first.returns.shape == (2, 1, 150)
    assert set(first.returns.unique().tolist()) == {4, 8, 12}  # one member a whole episode
    for result in (first, second):
        for score in (4, 8, 12):
            for s in range(2):
                assert int((result.returns[s] == score).sum()) == pytest.approx(50, abs=4.5 * 5.8)
    assert not torch.equal(first.returns[0], first.returns[1])
    assert not torch.equal(first.returns, second.returns)


def test_a_step_budget_is_whole_episodes_until_it_is_spent():
    # slots 2 of a budget of 10: each lane plays until 5 steps are done
    def length(seed, e, k):
        return ((4, 5), (1, 3))[seed][e % 2]

    cfg = config(members=1, policies=("individual", "vote"), steps=10, slots=2)
    results = played(evaluator(cfg, [1], length=length), 0)
    for result in results.values():
        lengths = result.lengths[:, 0].tolist()
        known = [[x for x in row if x == x] for row in lengths]
        assert known == [[4, 4, 5], [1, 1, 1, 1, 1, 3, 3]]
        assert torch.equal(result.lengths.isnan(), result.returns.isnan())
        assert not result.returns.isnan().all(0).any()  # no column that nobody played


def test_a_budget_below_an_episode_plays_one_episode():
    cfg = config(seeds=(0,), members=1, policies=("individual",), steps=3, slots=1)
    result = played(evaluator(cfg, [2], length=lambda s, e, k: 9), 0)["individual"]
    assert result.lengths.tolist() == [[[9]]] and result.returns.tolist() == [[[18]]]


def test_truncated_episodes_count_like_terminal_ones():
    cfg = config(seeds=(0,), members=1, policies=("individual",), episodes=3, slots=1)
    ours = evaluator(cfg, [2], length=lambda s, e, k: k + 1, terminal=lambda s, e, k: k % 2 == 1)
    assert played(ours, 0)["individual"].lengths.tolist() == [[[1, 2, 3]]]


@pytest.mark.slow
def test_epsilon_of_the_evaluation_is_the_share_of_random_actions():
    cfg = config(seeds=(0,), members=1, policies=("individual",), episodes=1, epsilon=0.4)
    ours = evaluator(cfg, [3], length=lambda s, e, k: 2_000)
    played(ours, 0)
    taken = torch.stack(actions_of(ours)).flatten()[:2_000]
    limit = 4.5 * 0.5 / math.sqrt(2_000)
    assert float((taken == 3).double().mean()) == pytest.approx(0.6 + 0.1, abs=limit)
    assert float((taken == 0).double().mean()) == pytest.approx(0.1, abs=limit)


def test_noise_is_not_that_of_training():
    assert not torch.equal(evaluation_keys((0, 1), CPU), draw.seed_keys((0, 1)))


def test_a_seed_scores_the_same_alone_and_among_others():
    options: dict[str, Any] = dict(members=3, policies=("random", "vote"), episodes=6, epsilon=0.3)

    def run(seeds):
        cfg = config(seeds=seeds, **options)
        return played(evaluator(cfg, [1, 2, 3], length=lambda s, e, k: 3 + k % 2), 0)

    together, alone = run((4, 9)), run((9,))
    for name, result in alone.items():
        for got, want in zip(together[name][:3], result[:3], strict=True):
            assert torch.equal(got[1:], want), name


@pytest.mark.parametrize("resident", [False, True])
def test_value_errors_of_members_equal_a_loop_over_their_episodes(resident):
    # Member i predicts 1 + i at every step. Some episodes are longer than the steps between two
    # copies to the host.
    def length(seed, e, k):
        return 5 + 30 * e + 3 * seed + 20 * k

    def reward(seed, e, k, t, action):
        return float(action) * (t % 3 - 1) * 0.5

    options: dict[str, Any] = dict(policies=("vote", "individual"), episodes=4, slots=2)
    cfg = config(**options)
    ours = evaluator(cfg, [1, 2], length=length, reward=reward, resident=resident)
    results = played(ours, 0)
    assert results["vote"].errors == {}
    gamma = cfg.loss.gamma
    for seed in range(2):
        for i in range(2):
            errors, later = [], []
            for e in (2 + 2 * i, 3 + 2 * i):  # the first two lanes play the vote
                for k in (0, 1):
                    end = length(seed, e, k)
                    for t in range(end):
                        rest = [reward(seed, e, k, u, i + 1) for u in range(t, end)]
                        later.append(sum(gamma**n * r for n, r in enumerate(rest)))
                        errors.append(1.0 + i - later[-1])
            count = len(errors)
            wanted = {
                "value_error": sum(errors) / count,
                "value_error_absolute": sum(map(abs, errors)) / count,
                "value_error_rms": math.sqrt(sum(x * x for x in errors) / count),
                "mc": sum(later) / count,
            }
            found = results["individual"].errors
            assert {name: float(v[seed, i]) for name, v in found.items()} == pytest.approx(wanted)
    again = played(ours, 0)["individual"].errors  # nothing is left of the evaluation before
    assert all(torch.equal(again[name], found[name]) for name in found)
    alone = evaluator(
        config(seeds=(1,), **options), [1, 2], length=length, reward=reward, resident=resident
    )
    errors = played(alone, 0)["individual"].errors
    assert all(torch.equal(errors[name], found[name][1:]) for name in found)


def test_an_evaluation_is_its_number_s_whatever_was_played_before():
    options: dict[str, Any] = dict(members=3, policies=("random",), episodes=20, epsilon=0.3)
    first, second = (
        evaluator(config(**options), [1, 2, 3], length=lambda s, e, k: 3) for _ in range(2)
    )
    played(first, 4)
    played(first, 9)
    again, other = played(first, 5)["random"], played(first, 6)["random"]
    assert torch.equal(again.returns, played(second, 5)["random"].returns)
    assert not torch.equal(again.returns, other.returns)


def test_seeds_that_play_longer_change_nothing_for_the_others():
    """Seed 4 has the longest episodes, or so short ones that its budget takes many of them."""
    options: dict[str, Any] = dict(members=2, policies=("random", "vote"), epsilon=0.3, slots=2)

    for budget, slow in (({"episodes": 3}, 97), ({"steps": 60}, 1)):

        def run(seeds, budget=budget, slow=slow):
            cfg = config(seeds=seeds, **options, **budget)
            # Thirds: sums of returns depend on the order in which they are added.
            ours = evaluator(
                cfg,
                [1, 3],
                length=lambda s, e, k: slow if s == 4 else 3 + k % 2,
                reward=lambda s, e, k, t, a: a / 3,
            )
            played(ours, 1)
            return {
                k: over_episodes(r.returns.numpy(), r.lengths.numpy())
                for k, r in played(ours, 2).items()
            }

        together, alone = run((4, 9)), run((9,))
        for name, scores in alone.items():
            for key, want in scores.items():
                assert np.array_equal(together[name][key][1:], want), (name, key)


def test_a_stopped_evaluation_ends_at_once_and_leaves_nothing_behind():
    ours, fresh = (
        evaluator(config(episodes=2), [1, 2], length=lambda s, e, k: 10**9 if k == 1000 else 3)
        for _ in range(2)
    )
    asked = iter([False] * 5 + [True])
    assert ours.run(1, stopped=lambda: next(asked)) is None
    assert len(actions_of(ours)) == 5
    for got, want in zip(played(ours, 2).values(), played(fresh, 2).values(), strict=True):
        assert torch.equal(got.returns, want.returns)


def test_an_episode_whose_return_is_not_finite_was_played():
    cfg = config(seeds=(0,), members=1, policies=("individual",), episodes=2)
    ours = evaluator(cfg, [1], length=lambda s, e, k: 3, reward=lambda s, e, k, t, a: float("nan"))
    result = played(ours, 0)["individual"]
    assert result.returns.isnan().all() and result.lengths.tolist() == [[[3, 3]]]


def test_environments_of_the_wrong_number_are_refused():
    cfg, ours = config(episodes=3), None
    env = Scripted(seeds=(0, 1), envs=4, length=lambda *_: 2, reward=lambda *_: 0.0)
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    net = agent.build(keys=draw.seed_keys(cfg.seeds))
    with pytest.raises(ValueError, match="evaluation needs 9 environments per seed, got 4"):
        ours = Evaluator(cfg, env, agent, net, keys=evaluation_keys(cfg.seeds, CPU))
    assert ours is None


def test_samples_modes_and_means_of_continuous_actions():
    """An action is its reward. Members' modes are 0.2 and 0.6, their deviations are tiny or 1."""
    modes, deviations = torch.tensor([0.2, 0.6]), torch.tensor([-9.0, 0.0])
    cfg = Config(
        agent=SacConfig(log_std="clip"),
        seeds=(0, 1),
        env=PointMassEnv(),
        net=NetConfig(hidden=()),
        ensemble=EnsembleConfig(members=2),
        eval=EvalConfig(
            policies=("individual", "individual_mode", "mean", "mean_mode", "random"),
            episodes=4,
            epsilon=0.0,
            share=True,
        ),
    )
    assert lanes(cfg) == 2 * 2 + 2 * 2 + 4 + 4 + 4
    env = Scripted(
        seeds=cfg.seeds,
        envs=lanes(cfg),
        length=lambda *_: 50,
        reward=lambda s, e, k, t, a: a[0] / 50,
        actions=1,
        continuous=True,
    )
    agent = SAC(cfg, env.spec, device=CPU)
    net = agent.build(keys=draw.seed_keys(cfg.seeds))
    with torch.no_grad():
        for leaf in net.actor.parameters():
            leaf.zero_()
        bias = torch.stack([torch.atanh(modes), deviations], -1)  # [N, 2]
        net.actor.moments.bias.copy_(bias.expand(2, 2, 2))
    results = played(Evaluator(cfg, env, agent, net, keys=evaluation_keys(cfg.seeds, CPU)), 0)
    returns = {name: result.returns for name, result in results.items()}
    assert {name: tuple(x.shape) for name, x in returns.items()} == {
        "individual": (2, 2, 2),
        "individual_mode": (2, 2, 2),
        "mean": (2, 1, 4),
        "mean_mode": (2, 1, 4),
        "random": (2, 1, 4),
    }
    want = modes.double().view(1, 2, 1).expand(2, 2, 2)
    torch.testing.assert_close(returns["individual_mode"], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns["individual"][:, 0], want[:, 0], rtol=0, atol=1e-3)
    noisy = returns["individual"][:, 1].flatten()
    assert len(noisy.unique()) == 4 and float((noisy - 0.6).abs().min()) > 1e-4
    flat = torch.full((2, 1, 4), 0.4).double()
    torch.testing.assert_close(returns["mean_mode"], flat, rtol=1e-5, atol=1e-5)
    assert len(returns["mean"].flatten().unique()) == 8
    members = returns["random"].flatten()
    assert bool(((members - 0.2).abs() < 1e-3).any()) and bool(((members - 0.2).abs() > 1e-2).any())
    # Modes differ by 0.4: their unbiased variance is 0.08.
    torch.testing.assert_close(results["mean_mode"].diversity, torch.full((2, 1), 0.08))
    assert bool((results["mean"].diversity != results["mean_mode"].diversity).all())


def test_the_table_of_an_evaluation_names_policies_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = types.SimpleNamespace(returns=torch.zeros(1, 1, 2), lengths=torch.ones(1, 1, 2))
    evaluation.show({"individual_mode": result})
    assert "individual_mode" in capsys.readouterr().out
