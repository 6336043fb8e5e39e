"""Space Invaders of MinAtar, compared with the package step by step."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from minatar.environments.space_invaders import Env
from minatar_tape import side_by_side

from cerl.envs.minatar import space_invaders
from cerl.envs.resident import Resident

CANNON, ALIEN, GOES_LEFT, GOES_RIGHT, SHOT, BOMB = range(6)
NOOP, LEFT, UP, RIGHT, DOWN, FIRE = range(6)
PLACE = 1 << np.arange(50, dtype=np.int64)  # bit of each cell in the word of its half


def hits_the_last(alien: np.ndarray, left: bool, x: int) -> bool:
    """Whether a shot from column x meets the last alien [10, 10], which moves on every step."""
    (row,), (column,) = alien.nonzero()
    way = -1 if left else 1
    for shot in range(8, -1, -1):
        if 0 <= column + way <= 9:
            column += way
        else:
            row, way = row + 1, -way
        if (row, column) == (shot, x):
            return True
    return False


def gunner(obs: np.ndarray, t: int, rng: np.random.Generator) -> np.ndarray:
    """Dodges bombs, shoots where an alien will be; every eighth game never shoots."""
    games = np.arange(len(obs))
    x = obs[:, CANNON, 9].argmax(1)
    after = np.clip(x[:, None] + [0, -1, 0, 1, 0, 0], 0, 9)  # [G, 6]
    falls = obs[:, BOMB, 7:9].max(1) | obs[:, ALIEN, 8:].max(1)
    columns = obs[:, ALIEN].max(1)  # [G, 10]
    away = abs(np.arange(10) - x[:, None]) + 100 * ~columns
    goal = away.argmin(1)
    value = -abs(after - goal[:, None]).astype(float)
    value[:, FIRE] += np.where(columns[games, x], 2.0, 0.0)
    value -= 100 * falls[games[:, None], after]
    for game in np.flatnonzero(obs[:, ALIEN].sum((1, 2)) == 1):
        left = bool(obs[game, GOES_LEFT].any())
        value[game, FIRE] += 50 if hits_the_last(obs[game, ALIEN], left, x[game]) else -50
    value[games % 8 == 7, FIRE] -= 100
    value += rng.random(value.shape)
    return value.argmax(1)


class Witness:
    """Counts what happened in the package's games."""

    def __init__(self, games: int) -> None:
        self.seen: Counter[str] = Counter()
        self.aliens = [24] * games

    def __call__(self, theirs: list, ours: Resident) -> None:
        for i, env in enumerate(theirs):
            aliens = int(env.alien_map.sum())
            self.seen["waves cleared"] += 0 < self.aliens[i] <= 2 and aliens == 24
            self.seen["last alien"] += aliens == 1
            self.seen[f"period {env.enemy_move_interval}"] += 1
            self.aliens[i] = 0 if env.terminal else aliens
            if env.terminal:
                hit = env.e_bullet_map[9, env.pos]
                met = env.alien_map[9, env.pos]
                self.seen["ended: " + ("bomb" if hit else "alien" if met else "landed")] += 1


@pytest.mark.slow
@pytest.mark.parametrize("ramping", [True, False])
def test_random_actions_match_the_package(ramping: bool) -> None:
    report = side_by_side("space_invaders", games=64, steps=200, ramping=ramping, seed=3)
    assert report.steps > 10_000 and report.episodes > 100 and report.rewards[1.0] > 500, report


@pytest.mark.slow
@pytest.mark.parametrize("ramping", [True, False])
def test_skilled_play_matches_the_package(ramping: bool) -> None:
    witness = Witness(64)
    report = side_by_side(
        "space_invaders",
        games=64,
        steps=800,
        ramping=ramping,
        sticky=0.05,
        policy=gunner,
        seed=4,
        watch=witness,
    )
    seen = witness.seen
    assert report.steps > 50_000 and report.rewards[1.0] > 3000, report
    assert seen["waves cleared"] > 30 and seen["last alien"] > 1000, seen
    for cause in ("bomb", "alien", "landed"):
        assert seen[f"ended: {cause}"] > 0, seen
    assert seen["period 12"] > 0 and (seen["period 9"] > 0) == ramping, seen


@pytest.mark.slow
def test_short_waves_match_the_package() -> None:
    """New blocks lose all but three aliens on both sides: many waves, to the fastest."""
    witness = Witness(64)
    rng = np.random.default_rng(6)

    def thin_out(theirs: list, ours: Resident) -> None:
        witness(theirs, ours)
        state = ours.state_dict()
        for game, env in enumerate(theirs):
            if env.alien_map.sum() == 24 and not env.terminal:
                taken = rng.permutation(env.alien_map.nonzero(), axis=1)[:, 3:]
                env.alien_map[tuple(taken)] = 0
                witness.aliens[game] = 3
                upper, lower = env.alien_map.astype(np.int64).reshape(2, 50) @ PLACE
                state["game.upper_aliens"][game] = int(upper)
                state["game.lower_aliens"][game] = int(lower)
        ours.load_state_dict(state)

    report = side_by_side(
        "space_invaders",
        games=64,
        steps=400,
        sticky=0.0,
        policy=gunner,
        seed=5,
        watch=thin_out,
    )
    assert report.steps > 20_000 and witness.seen["waves cleared"] > 150, (report, witness.seen)
    assert witness.seen["period 6"] > 200 and witness.seen["period 5"] == 0, witness.seen


@pytest.mark.parametrize("ramping", [True, False])
def test_one_step_from_any_board_matches_the_package(ramping: bool) -> None:
    """Boards filled at random, most out of reach of play: many hits at once, any bomber."""
    rng = np.random.default_rng(7)
    games = 2000
    theirs = [Env(ramping=ramping) for _ in range(games)]
    for env in theirs:
        env.pos, env.shot_timer = int(rng.integers(10)), int(rng.integers(3))
        env.alien_dir = int(rng.choice([-1, 1]))
        env.alien_move_timer, env.alien_shot_timer = (int(rng.integers(2)) for _ in range(2))
        env.enemy_move_interval = int(rng.integers(6, 13))
        fill = rng.choice([0.002, 0.02, 0.1, 0.5], size=3)
        maps = (rng.random((3, 10, 10)) < fill[:, None, None]).astype(float)
        # Never without aliens; often only in the columns that are farthest apart.
        maps[0, rng.integers(10, size=2), rng.choice([0, 0, *range(10), 9, 9], size=2)] = 1
        env.alien_map, env.f_bullet_map, env.e_bullet_map = maps

    def each(read: Callable[[Env], Any]) -> torch.Tensor:
        return torch.tensor([int(read(env)) for env in theirs])

    def words(name: str) -> torch.Tensor:  # [2, G]
        maps = np.stack([getattr(env, name) for env in theirs]).astype(np.int64)
        return torch.from_numpy(maps.reshape(games, 2, 50) @ PLACE).T

    state = space_invaders.State(
        each(lambda env: env.pos),
        each(lambda env: env.shot_timer),
        each(lambda env: env.alien_dir < 0).bool(),
        each(lambda env: env.alien_move_timer),
        each(lambda env: env.enemy_move_interval),
        each(lambda env: env.alien_shot_timer),
        *words("alien_map"),
        *words("f_bullet_map"),
        *words("e_bullet_map"),
    )
    action = torch.from_numpy(rng.integers(0, 6, games))
    got, reward, terminal = space_invaders.step(
        state, action, torch.empty(games, 0), ramping=ramping
    )
    results = [env.act(int(a)) for env, a in zip(theirs, action, strict=True)]
    assert torch.equal(reward, torch.tensor([float(r) for r, _ in results]))
    assert torch.equal(terminal, torch.tensor([bool(t) for _, t in results]))
    boards = np.stack([env.state() for env in theirs]).transpose(0, 3, 1, 2)
    assert np.array_equal(space_invaders.observe(got).numpy(), boards)
    assert torch.equal(got.cooldown, each(lambda env: env.shot_timer))
    assert torch.equal(got.move_wait, each(lambda env: env.alien_move_timer))
    assert torch.equal(got.move_period, each(lambda env: env.enemy_move_interval))
    assert torch.equal(got.bomb_wait, each(lambda env: env.alien_shot_timer))
    assert reward.max() > 20 and 100 < terminal.sum() < games - 100


@pytest.mark.slow
def test_compiled_step_traces_and_agrees() -> None:
    rules = space_invaders
    compiled = torch.compile(rules.step, fullgraph=True, dynamic=False, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    state = rules.reset(torch.empty(32, 0))
    rewards = torch.zeros(32)
    for t in range(116):
        # Only noop, left, right and fire matter; fire more often, so that aliens are hit.
        action = torch.randint(0, 8, (32,), generator=generator)
        action = torch.where(action > 5, FIRE, action)
        u = torch.empty(32, 0)
        want = rules.step(state, action, u, ramping=True)
        got = compiled(state, action, u, ramping=True)
        for name, a, b in zip(state._fields, want[0], got[0], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), f"step {t}: {name}"
        assert torch.equal(want[1], got[1]) and torch.equal(want[2], got[2])
        state = want[0]
        rewards += want[1]
    assert (rewards > 0).all() and state.lower_bombs.any() and state.lower_aliens.any()
