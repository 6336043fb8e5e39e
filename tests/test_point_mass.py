"""The point mass: its motion worked out by hand, walls, rewards, and that it can be steered."""

import pytest
import torch

from cerl import envs
from cerl.config import PointMassEnv
from cerl.envs import make_resident
from cerl.envs.resident import Game, Resident


def build(seeds=(0,), *, fuse=None, **options) -> Resident:
    return make_resident(PointMassEnv(**options), seeds=seeds, salt=0, device="cpu", fuse=fuse)


def put(env: Resident, place, speed) -> None:
    """Sets every mass to a place and a speed."""
    state = env.state_dict()
    state["game.place"][:], state["game.speed"][:] = torch.tensor(place), torch.tensor(speed)
    env.load_state_dict(state)


def push(*components: float) -> torch.Tensor:
    return torch.tensor([[components]])


def test_a_mass_moves_as_computed_by_hand():
    env = build()
    env.reset()
    put(env, [0.5, -0.2], [1.0, 0.0])
    step = env.step(push(-1.0, 0.5))
    # v = 1 + 0.1 (-5 - 2) = 0.3 and 0.25; x = 0.5 + 0.03 and -0.2 + 0.025
    expected = torch.tensor([0.53, -0.175, 0.3, 0.25])
    torch.testing.assert_close(step.obs[0, 0], expected)
    distance = (0.53**2 + 0.175**2) ** 0.5
    assert step.reward.item() == pytest.approx(1 - distance / 2**0.5, abs=1e-6)


def test_a_wall_stops_a_mass_and_an_open_border_ends_its_episode():
    for walls in (True, False):
        env = build(walls=walls)
        env.reset()
        put(env, [0.95, 0.0], [1.0, 0.3])
        step = env.step(push(1.0, 0.0))
        torch.testing.assert_close(step.obs[0, 0], torch.tensor([1.0, 0.024, 0.0, 0.24]))
        assert step.terminated.item() is not walls and not step.truncated.item()
        after = env.step(push(0.0, 0.0))
        assert (after.reward.item() == 0) is not walls


def test_episodes_start_at_rest_all_over_the_square_and_are_truncated():
    env = build(envs=500, time_limit=3)
    actions = torch.zeros(1, 500, 2)
    steps = [env.reset(), *(env.step(actions) for _ in range(4))]
    for first in (steps[0], steps[4]):
        place, speed = first.obs.split(2, -1)
        assert not speed.any() and place.abs().max() <= 1
        assert place.mean().abs() < 0.1 and abs(place.std().item() - 3**-0.5) < 0.05
    assert [bool(step.truncated.all()) for step in steps] == [False, False, False, True, False]
    assert not torch.equal(steps[0].obs, steps[4].obs)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_steering_policy_earns_more_than_a_lazy_or_random_one(dimensions):
    env = build(envs=64, dimensions=dimensions)
    assert env.spec.actions == dimensions and env.spec.observation == (2 * dimensions,)

    def returned(policy) -> float:
        obs, total = env.reset().obs, 0.0
        for _ in range(50):
            step = env.step(policy(obs))
            obs, total = step.obs, total + step.reward.mean().item()
        return total

    def steer(obs):
        place, speed = obs.split(dimensions, -1)
        return (-4 * place - 2 * speed).clamp(-1, 1)

    best = returned(steer)
    assert 45 < best <= 50
    assert best > 10 + returned(lambda obs: torch.zeros_like(obs[..., :dimensions]))
    assert best > 10 + returned(lambda obs: torch.rand_like(obs[..., :dimensions]) * 2 - 1)


def test_nan_stays_in_its_environment_until_the_episode_ends():
    bad, good = build(seeds=(1, 2), time_limit=6), build(seeds=(1, 2), time_limit=6)
    bad.reset()
    good.reset()
    for t in range(14):
        action = torch.full((2, 1, 2), 0.1)
        healthy = good.step(action)
        action = action.clone()
        if t == 1:
            action[1] = torch.nan
        step = bad.step(action)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(step, healthy, strict=True))
        assert step.obs[1].isfinite().all().item() == (not 1 <= t < 6)
        assert torch.equal(step.truncated, healthy.truncated)


def test_actions_of_another_shape_type_or_range_are_refused():
    env = build(envs=2)
    env.reset()
    with pytest.raises(ValueError, match=r"\[S, E, A\] = \[1, 2, 2\] of torch.float32, got \[1, 2"):
        env.step(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got .* of torch.float64"):
        env.step(torch.zeros(1, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected actions in \[-1, 1\], got -1..1.5"):
        env.step(torch.tensor([[[0.0, 1.5], [-1.0, 0.0]]]))


@pytest.mark.slow  # compiles
def test_the_compiled_step_is_the_same_to_rounding():
    plain, fused = build(envs=5, walls=False), build(envs=5, walls=False, fuse=True)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(plain.reset(), fused.reset())
    for _ in range(60):
        action = torch.rand(1, 5, 2, generator=generator) * 2 - 1
        torch.testing.assert_close(plain.step(action), fused.step(action))


def test_a_game_has_either_ids_or_components():
    for actions, components in (((), 0), ((0, 1), 2)):
        game = Game(lambda u: u, lambda s, a, u: (s, u, u), lambda s: s, 0, 0, (1,), actions)
        with pytest.raises(ValueError, match="either action ids or components"):
            Resident(
                game._replace(components=components),
                name="odd",
                envs=1,
                sticky=0.0,
                time_limit=0,
                seeds=(0,),
                salt=0,
                device="cpu",
            )


def test_make_builds_it_and_the_list_has_it():
    env = envs.make(PointMassEnv(), seeds=[0], salt=0, device="cpu")
    assert isinstance(env, Resident) and env.spec.resident and env.spec.continuous
    assert envs.available()["point_mass"] == ["point_mass"]
