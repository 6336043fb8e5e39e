from collections import Counter

import numpy as np
import pytest
import torch
from minatar_tape import side_by_side

from cerl.envs.minatar import seaquest
from cerl.envs.resident import Resident

SECTIONS = {"_spawn_enemy": 0, "_spawn_diver": 3}
BOW, STERN, TORPEDO, TRAIL, MISSILE, FISH, SUB, AIR, CREW, DIVER = range(10)
NOOP, LEFT, UP, RIGHT, DOWN, FIRE = range(6)
MOVES = np.array([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1], [0, 0]])  # columns, rows


def hunter(obs: np.ndarray, t: int, rng: np.random.Generator) -> np.ndarray:
    """Keeps away from enemies, shoots at what is ahead, fetches divers, surfaces in time."""
    games = np.arange(len(obs))
    y, x = np.divmod(obs[:, BOW].reshape(len(obs), 100).argmax(1), 10)
    after = np.clip(np.stack([x, y], 1)[:, None] + MOVES, 0, [9, 8])  # [G, 6, 2]
    crew, air = obs[:, CREW].sum((1, 2)), obs[:, AIR].sum((1, 2))
    threat = obs[:, MISSILE] | obs[:, FISH] | obs[:, SUB]
    wide = threat.copy()
    wide[:, :, 1:] |= threat[:, :, :-1]
    wide[:, :, :-1] |= threat[:, :, 1:]
    unsafe = wide[games[:, None], after[..., 1], after[..., 0]]

    rows, columns = np.mgrid[:10, :10]
    away = abs(rows - y[:, None, None]) + abs(columns - x[:, None, None]) + 100 * ~obs[:, DIVER]
    nearest = away.reshape(len(obs), 100).argmin(1)
    near = np.stack([nearest % 10, nearest // 10], 1)
    goal = np.where(away.min((1, 2))[:, None] < 100, near, 5)
    # Some games fill the boat before they surface, some take each diver up, some stay below.
    home = (crew >= np.where(games % 2 == 0, 6, 1 + games // 2 % 6)) | ((crew > 0) & (air <= 3))
    home &= games % 16 != 15
    goal = np.where(home[:, None], np.stack([x, np.zeros_like(x)], 1), goal)
    value = -abs(after - goal[:, None]).sum(2).astype(float)
    ahead = np.where(
        obs[games, STERN, y, np.maximum(x - 1, 0)][:, None],
        np.arange(10) > x[:, None],
        np.arange(10) < x[:, None],
    )
    value[:, FIRE] += 1.5 * ((obs[:, FISH] | obs[:, SUB])[games, y] & ahead).any(1)
    value -= 100 * unsafe + 50 * ((after[..., 1] == 0) & ~home[:, None])
    action = (value + rng.random(value.shape)).argmax(1)
    return np.where(rng.random(len(obs)) < 0.02, rng.integers(0, 6, len(obs)), action)


class Witness:
    """Counts what happened in the package's games and checks what our layout takes for granted."""

    def __init__(self, games: int) -> None:
        self.seen: Counter[str] = Counter()
        self.before = [(0, 0, 1)] * games

    def __call__(self, theirs: list, ours: Resident) -> None:
        for i, env in enumerate(theirs):
            y, crew, _ = self.before[i]
            if y > 0 and env.sub_y == 0:
                self.seen[f"surfaced with {max(crew, -1)}"] += 1
            if env.terminal:
                self.seen["ended: " + self._cause(env, y, crew)] += 1
            self.before[i] = (env.sub_y, env.diver_count, env.oxygen)
            self._check(env)

    def _cause(self, env, y: int, crew: int) -> str:
        at = [env.sub_x, env.sub_y]
        if env.oxygen < 0:
            return "no oxygen"
        if any(enemy[:2] == at for enemy in env.e_fish):
            return "fish"
        if any(enemy[:2] == at for enemy in env.e_subs):
            return "submarine"
        if y > 0 and env.sub_y == 0 and crew == 0:
            return "nobody on board"
        back = [[b[0] - (1 if b[2] else -1), b[1]] for b in env.e_bullets]
        if at in back or any(b[:2] == at for b in env.e_bullets):
            return "missile"
        return "left behind"  # swam on in the step in which it met the boat

    def _check(self, env) -> None:
        enemies = [tuple(e[:4]) for e in env.e_fish + env.e_subs]
        assert len(set(enemies)) == len(enemies), f"two enemies are the same: {enemies}"
        heading = {}
        for _, row, right, _ in enemies:
            assert heading.setdefault(row, right) == right, f"row {row} swims both ways: {enemies}"
        for group in (env.e_fish, env.e_subs):
            for n, older in enumerate(group):
                for newer in group[n + 1 :]:
                    assert newer[:2] != older[:2] or older[3] < newer[3], f"overtaken: {group}"
        assert len(env.f_bullets) <= 2 and len(env.divers) <= 2
        self.seen["level"] = max(self.seen["level"], env.ramp_index)
        self.seen["most enemies"] = max(self.seen["most enemies"], len(enemies))
        self.seen["cells shared"] += len({e[:2] for e in enemies}) < len(enemies)
        self.seen["missiles"] += len(env.e_bullets)


@pytest.mark.parametrize("ramping", [True, False])
def test_random_actions_match_the_package(ramping: bool) -> None:
    report = side_by_side(
        "seaquest", games=64, steps=200, ramping=ramping, sections=SECTIONS, seed=3
    )
    assert report.steps > 10_000 and report.episodes > 100


@pytest.mark.parametrize("ramping", [True, False])
def test_skilled_play_matches_the_package(ramping: bool) -> None:
    witness = Witness(64)
    report = side_by_side(
        "seaquest",
        games=64,
        steps=1000,
        ramping=ramping,
        sticky=0.05,
        policy=hunter,
        sections=SECTIONS,
        seed=4,
        watch=witness,
    )
    seen = witness.seen
    assert report.steps > 60_000
    for crew in range(-1, 7):
        assert seen[f"surfaced with {crew}"] > 0, seen
    for cause in ("no oxygen", "fish", "submarine", "missile", "nobody on board"):
        assert seen[f"ended: {cause}"] > 0, seen
    assert report.rewards[1.0] > 1000 and max(report.rewards) >= 8, report.rewards
    assert seen["missiles"] > 10_000
    if ramping:
        assert seen["level"] == 19 and seen["most enemies"] > 20, seen
        assert seen["cells shared"] > 500, seen
    else:
        assert seen["level"] == 0 and seen["most enemies"] > 2, seen


def test_crowded_water_matches_the_package() -> None:
    """Crews of -1, as after a rescue, surface at will until an enemy comes on every step."""
    witness = Witness(64)

    def crew_of_minus_one(theirs: list, ours: Resident) -> None:
        witness(theirs, ours)
        state = ours.state_dict()
        for game, env in enumerate(theirs):
            if env.ramp_index == 0 and env.diver_count == 0 and not env.terminal:
                env.diver_count = -1
                state["game.crew"][game] = -1
        ours.load_state_dict(state)

    def bounce(obs: np.ndarray, t: int, rng: np.random.Generator) -> np.ndarray:
        y = obs[:, BOW].any(2).argmax(1)
        action = np.select([y == 0, y == 1], [DOWN, UP], FIRE)
        eager = rng.random(len(obs)) < np.select([y == 0, y == 1], [0.95, 0.9], 0.3)
        return np.where(eager, action, rng.integers(0, 6, len(obs)))

    report = side_by_side(
        "seaquest",
        games=64,
        steps=500,
        sticky=0.0,
        policy=bounce,
        sections=SECTIONS,
        seed=5,
        watch=crew_of_minus_one,
    )
    seen = witness.seen
    assert report.steps > 25_000 and report.episodes > 100, report
    assert seen["surfaced with -1"] > 1000 and seen["level"] == 19, seen
    assert seen["cells shared"] > 1000 and seen["most enemies"] > 20, seen


def test_compiled_step_traces_and_agrees() -> None:
    compiled = torch.compile(seaquest.step, fullgraph=True, dynamic=False, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    state = seaquest.State(*(x.contiguous() for x in seaquest.reset(torch.empty(16, 0))))
    met = ("fish", "subs", "missiles_left", "missiles_right", "newer", "older")
    seen = dict.fromkeys(met, False)
    for t in range(80):
        # Down first, so that enemies, divers and torpedoes meet the boat.
        action = torch.randint(0, 6, (16,), generator=generator)
        action = torch.full_like(action, DOWN) if t < 4 else action
        u = torch.rand(16, seaquest.DRAWS, generator=generator)
        want = seaquest.step(state, action, u, ramping=True)
        got = compiled(state, action, u, ramping=True)
        for name, a, b in zip(state._fields, want[0], got[0], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), f"step {t}: {name}"
        assert torch.equal(want[1], got[1]) and torch.equal(want[2], got[2])
        state = want[0]
        seen = {name: was or bool(getattr(state, name).any()) for name, was in seen.items()}
    assert all(seen.values()), seen
