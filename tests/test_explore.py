"""The schedule of epsilon, noise when acting, and which member is on duty."""

import math

import pytest
import torch

from cerl import draw, explore
from cerl.config import ConfigError, EnsembleConfig, ExploreConfig, load

PAPER = ExploreConfig(start=1.0, end=0.01, hold=50_000, decay=1_000_000)


@pytest.mark.parametrize(
    "step, want",
    [
        (0, 1.0),
        (50_000, 1.0),
        (50_001, 1.0 - 0.99e-6),
        (550_000, 0.505),
        (1_049_999, 0.01 + 0.99e-6),
        (1_050_000, 0.01),
        (50_000_000, 0.01),
        (2**40, 0.01),
    ],
)
def test_epsilon_of_the_paper(step, want):
    assert float(explore.epsilon(PAPER, torch.tensor(step))) == pytest.approx(want, abs=1e-7)


def test_epsilon_equals_the_originals_formula_everywhere():
    for step in range(0, 1_200_000, 7_919):
        want = 0.01 + min(max(0.99 * (1e6 + 50_000 - step) / 1e6, 0), 0.99)
        assert float(explore.epsilon(PAPER, torch.tensor(step))) == pytest.approx(want, abs=1e-6)


def test_epsilon_resolves_single_steps_beyond_the_integers_of_float32():
    config = ExploreConfig(start=1.0, end=0.0, hold=50_000_000, decay=4)
    steps = [50_000_000 + k for k in range(5)]
    got = [float(explore.epsilon(config, torch.tensor(step))) for step in steps]
    assert got == [1.0, 0.75, 0.5, 0.25, 0.0]


def noise(seeds=(0,), step=0, *, envs=4, actions=3, eps=0.3, votes=False):
    at = torch.tensor(step)
    return explore.noise(
        draw.seed_keys(seeds), at, envs=envs, actions=actions, eps=eps, votes=votes
    )


def test_noise_has_the_promised_shapes_and_ranges():
    plain, voting = noise((0, 1)), noise((0, 1), votes=True)
    assert plain.tie.shape == (2, 4, 0) and voting.tie.shape == (2, 4, 3)
    for n in (plain, voting):
        assert n.explore.shape == n.action.shape == n.member.shape == (2, 4)
        assert n.explore.dtype == torch.bool and n.action.dtype == torch.int64


def test_exploration_and_actions_have_their_frequencies_and_do_not_depend_on_each_other():
    n = noise(envs=100_000, actions=5, eps=0.3)
    root = math.sqrt(100_000)
    assert float(n.explore.double().mean()) == pytest.approx(0.3, abs=4.5 * 0.46 / root)
    for action in range(5):
        mine = n.action == action
        assert float(mine.double().mean()) == pytest.approx(0.2, abs=4.5 * 0.4 / root)
        assert float(n.explore[mine].double().mean()) == pytest.approx(0.3, abs=4.5 * 1.03 / root)
        assert float(n.member[mine].double().mean()) == pytest.approx(0.5, abs=4.5 * 0.65 / root)
    assert not noise(envs=50_000, eps=0.0).explore.any()
    assert noise(envs=50_000, eps=1.0).explore.all()


def test_largest_draw_still_gives_an_action_and_a_member():
    top = torch.tensor([[1.0 - 2.0**-24]])
    for count in range(1, 65):
        assert int((top * count).long()) == count - 1
        config = EnsembleConfig(members=count)
        assert int(explore.duty(config, top)) == count - 1


def test_an_environments_noise_depends_on_its_seed_step_and_index_alone():
    few, many = noise((3,), 7, envs=2), noise((1, 3), 7, envs=9)
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a[0], b[1, :2])
    assert not torch.equal(noise(step=1).member, noise(step=2).member)


def test_members_on_duty_have_their_frequencies():
    u = draw.uniform(draw.seed_keys([1]), draw.MEMBER, 0, (100_000,))
    limit = 4.5 * 0.5 / math.sqrt(100_000)
    uniform = explore.duty(EnsembleConfig(members=4), u)
    for k in range(4):
        assert float((uniform == k).double().mean()) == pytest.approx(0.25, abs=limit)
    tandem = explore.duty(EnsembleConfig(members=2, duty="tandem", active_probability=0.9), u)
    assert set(tandem.unique().tolist()) == {0, 1}
    assert float((tandem == 0).double().mean()) == pytest.approx(0.9, abs=limit)
    alone = explore.duty(EnsembleConfig(members=2, duty="tandem", active_probability=1.0), u)
    assert int(alone.max()) == 0
    passive = explore.duty(EnsembleConfig(members=2, duty="tandem", active_probability=0.0), u)
    assert int(passive.min()) == 1
    first = explore.duty(EnsembleConfig(members=3, duty="first"), u)
    assert first.dtype == torch.int64 and int(first.max()) == 0


def test_continuous_noise_has_the_promised_shapes_ranges_and_streams():
    def drawn(seeds, step):
        return explore.continuous_noise(
            draw.seed_keys(seeds),
            torch.tensor(step),
            envs=500,
            actions=3,
            eps=0.3,
            samples=2,
            policies=4,
        )

    n = drawn((0, 1), 5)
    assert n.explore.shape == n.member.shape == (2, 500) and n.action.shape == (2, 500, 3)
    assert n.normal.shape == (2, 500, 2, 4, 3) and n.tie.numel() == 0
    assert -1 <= float(n.action.min()) < -0.99 and 0.99 < float(n.action.max()) < 1
    assert float(n.explore.float().mean()) == pytest.approx(0.3, abs=0.06)
    assert float(n.normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(n.normal.std()) == pytest.approx(1, abs=0.03)
    # Whether it explores says nothing about where to: the draws are of different columns.
    assert abs(float(n.action[n.explore].mean())) < 0.1
    for mine, alone in zip(n, drawn((1,), 5), strict=True):
        assert torch.equal(mine[1:], alone)
    later = drawn((0, 1), 6)
    assert not torch.equal(n.normal, later.normal) and not torch.equal(n.action, later.action)


def test_without_an_end_one_action_of_the_longest_episode_is_random():
    for overrides, steps in (({}, 51), ({"env.length": 200}, 201), ({"env.time_limit": 20}, 20)):
        config = load("memory/fox", overrides)
        assert config.explore.end is None
        decayed = torch.tensor(config.schedule.steps)
        got = float(explore.epsilon(config.epsilon_schedule, decayed))
        assert got == pytest.approx(1 / steps, rel=1e-6)
    assert load("memory/fox", {"explore.end": 0.02}).epsilon_schedule.end == 0.02


def test_without_an_end_episodes_need_one():
    with pytest.raises(ConfigError, match="explore.end: none means .* gym set no limit; expected"):
        load("gym/cartpole", {"explore.end": None})
