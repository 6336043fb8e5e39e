"""Seaquest of MinAtar, compared with the package step by step on shared random numbers."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from minatar.environments.seaquest import Env
from minatar_tape import Tape, side_by_side

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


@pytest.mark.slow
@pytest.mark.parametrize("ramping", [True, False])
def test_random_actions_match_the_package(ramping: bool) -> None:
    report = side_by_side(
        "seaquest", games=64, steps=200, ramping=ramping, sections=SECTIONS, seed=3
    )
    assert report.steps > 10_000 and report.episodes > 100


@pytest.mark.slow
@pytest.mark.parametrize("ramping", [True, False])
def test_skilled_play_matches_the_package(ramping: bool) -> None:
    witness, steps = Witness(64), 1000 if ramping else 500  # the last ramp takes its time
    report = side_by_side(
        "seaquest",
        games=64,
        steps=steps,
        ramping=ramping,
        sticky=0.05,
        policy=hunter,
        sections=SECTIONS,
        seed=4,
        watch=witness,
    )
    seen = witness.seen
    assert report.steps > 60 * steps
    for crew in range(-1, 7):
        assert seen[f"surfaced with {crew}"] > 0, seen
    for cause in ("no oxygen", "fish", "submarine", "missile", "nobody on board"):
        assert seen[f"ended: {cause}"] > 0, seen
    assert report.rewards[1.0] > steps and max(report.rewards) >= 8, report.rewards
    assert seen["missiles"] > 10 * steps
    if ramping:
        assert seen["level"] == 19 and seen["most enemies"] > 20, seen
        assert seen["cells shared"] > 500, seen
    else:
        assert seen["level"] == 0 and seen["most enemies"] > 2, seen


@pytest.mark.slow
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


class Waters(NamedTuple):
    """One position, as the rules allow it, for the package and for ours."""

    theirs: Env
    scalars: dict[str, int]
    words: dict[str, list[int]]


def waters(rng: np.random.Generator, *, ramping: bool) -> Waters:
    """A position that play reaches seldom or never: crowded, often with something at the boat."""
    level = int(rng.integers(6, 20)) if ramping else 0
    speed = max(2, 5 - level // 2)
    env = Env(ramping=ramping)
    env.ramp_index, env.move_speed, env.e_spawn_speed = level, speed, 20 - level
    env.e_spawn_timer, env.d_spawn_timer = int(rng.integers(3)), int(rng.integers(30))
    env.oxygen, env.diver_count = int(rng.choice([0, 1, 90, 195, 200])), int(rng.integers(-2, 7))
    clock = int(rng.integers(11))
    heading = rng.random(10) < 0.5
    words = {name: [0] * 10 for name in seaquest.State._fields[13:]}

    swimmers = []  # age, kind, row, column, wait
    for _ in range(rng.integers(60)):
        column, wait = int(rng.integers(10)), int(rng.integers(speed + 1))
        age = column * (speed + 1) + speed - wait
        row, kind = int(rng.integers(1, 9)), int(rng.integers(3))
        # Who has not swum yet would be the twin of the next to appear.
        if age > 0 and not any(other[0] == age and other[2] == row for other in swimmers):
            swimmers.append((age, kind, row, column if heading[row] else 9 - column, wait))
    for _, kind, row, column, wait in sorted(swimmers, reverse=True):
        bit, right = 1 << (6 * column + wait), bool(heading[row])
        if kind:
            env.e_fish.append([column, row, right, wait])
            words["fish"][row] |= bit
        else:
            shot = int(rng.integers(11))
            env.e_subs.append([column, row, right, wait, shot])
            words["subs"][row] |= bit
            for digit in range(4):
                words[f"phase_{digit}"][row] |= bit * ((clock + shot) % 11 >> digit & 1)

    scalars = {}
    for name, age in (("older", 60 - env.d_spawn_timer), ("newer", 30 - env.d_spawn_timer)):
        row, right = int(rng.integers(1, 9)), bool(rng.integers(2))
        column = age // 6 if right else 9 - age // 6
        scalars[name] = 0
        if age < 60 and rng.random() < 0.8:
            env.divers.append([column, row, right, 5 - age % 6])
            scalars[name] = row + 16 * right
    if len(env.divers) == 2 and rng.random() < 0.5:  # both in one row, so that they may meet
        env.divers[1][1] = env.divers[0][1]
        scalars["newer"] = scalars["newer"] & 16 | env.divers[0][1]

    targets = 4 * env.divers + env.e_fish + env.e_subs + [[5, 0], [5, 4]]
    env.sub_x, env.sub_y = targets[rng.integers(len(targets))][:2]
    env.sub_or = bool(rng.integers(2)) if 0 < env.sub_x < 9 else env.sub_x == 9
    env.surface = env.sub_y == 0
    for _ in range(rng.integers(3)):
        row, column = int(rng.integers(9)), int(rng.integers(10))
        right = column > env.sub_x  # a torpedo is always ahead of the boat
        if column != env.sub_x and not any(b[1] == row for b in env.f_bullets):
            env.f_bullets.append([column, row, right])
            words["torpedoes_right" if right else "torpedoes_left"][row] |= 1 << 6 * column
    env.shot_timer = 4 if env.f_bullets else int(rng.integers(2))
    for _ in range(rng.integers(8)):
        row, column, right = int(rng.integers(1, 9)), int(rng.integers(10)), bool(rng.integers(2))
        env.e_bullets.append([column, row, right])
        words["missiles_right" if right else "missiles_left"][row] |= 1 << 6 * column

    scalars |= {"x": env.sub_x, "y": env.sub_y, "right": env.sub_or, "cooldown": env.shot_timer}
    scalars |= {"oxygen": env.oxygen, "crew": env.diver_count, "level": level, "clock": clock}
    scalars |= {"spawn_wait": env.e_spawn_timer, "diver_wait": env.d_spawn_timer}
    words["heading"] = heading.tolist()
    return Waters(env, scalars, words)


@pytest.mark.slow
@pytest.mark.parametrize("ramping", [True, False])
def test_steps_from_any_position_match_the_package(ramping: bool) -> None:
    rng, games = np.random.default_rng(8), 1000
    positions = [waters(rng, ramping=ramping) for _ in range(games)]
    fields = {}
    for name, like in seaquest.reset(torch.empty(1, 0))._asdict().items():
        values = [{**position.scalars, **position.words}[name] for position in positions]
        fields[name] = torch.tensor(values, dtype=like.dtype)
    state = seaquest.State(**fields)
    tapes = [Tape(SECTIONS) for _ in positions]
    for position, tape in zip(positions, tapes, strict=True):
        position.theirs.random = tape  # type: ignore[assignment]
    alive, rewards = np.ones(games, bool), 0.0

    def check(where: str) -> None:
        got = seaquest.observe(state).numpy()
        for game in np.flatnonzero(alive):
            want = positions[game].theirs.state().transpose(2, 0, 1)
            assert np.array_equal(got[game], want), f"{where}, game {game}: observation"
        for digit in (state.phase_0, state.phase_1, state.phase_2, state.phase_3):
            assert not (digit & ~state.subs).any(), f"{where}: a clock without its submarine"

    check("start")
    for t in range(13):
        action = rng.integers(0, 6, games)
        u = rng.random((games, 1 + seaquest.DRAWS), dtype=np.float32)
        state, reward, terminal = seaquest.step(
            state, torch.from_numpy(action), torch.from_numpy(u[:, 1:]), ramping=ramping
        )
        for game in np.flatnonzero(alive):
            tapes[game].put(u[game], at=1)
            want = positions[game].theirs.act(int(action[game]))
            got = reward[game].item(), terminal[game].item()
            assert got == want, f"step {t}, game {game}: ours {got}, package {want}"
            rewards += got[0]
        check(f"step {t}")
        alive &= ~terminal.numpy()
    assert rewards > 100 and 20 < alive.sum() < games - 100, (rewards, alive.sum())


@pytest.mark.slow
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
