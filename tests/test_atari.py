"""Atari: the two back ends are compared with each other, and with an emulator stepped by hand."""

import io
import sys

import numpy as np
import pytest
import torch

from cerl import envs
from cerl.config import AtariEnv
from cerl.data import EnvSpec, Step
from cerl.envs import ale as ale_module
from cerl.envs import atari as pool_module
from cerl.envs.ale import TWO_PLAYERS, AleGames, camel_case, fire_action
from cerl.envs.atari import Atari, EnvPoolGames
from cerl.envs.host import Outbox, simulator_seeds
from cerl.state import CheckpointError

ale_py = pytest.importorskip("ale_py")
pytest.importorskip("envpool")


def build(seeds=(0,), salt=0, **options) -> Atari:
    config = AtariEnv(**{"name": "Breakout", "threads": 1, **options})
    return Atari(config, seeds=seeds, salt=salt, device="cpu")


def random_actions(pool: Atari, steps: int, seeds: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(0)
    shape = (steps, seeds, pool.spec.envs)
    return torch.from_numpy(rng.integers(0, pool.spec.actions, shape))


def play(pool: Atari, actions: torch.Tensor, *, close: bool = True) -> list[Step]:
    """The reset's Step and the one of every action."""
    steps = [pool.reset(), *(pool.step(action) for action in actions)]
    if close:
        pool.close()
    return steps


def same(a: Step, b: Step, *, frames: bool = True) -> bool:
    return all(torch.equal(x, y) for x, y in list(zip(a, b, strict=True))[not frames :])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"name": "Breakout"},
        {"name": "Pong", "frame_skip": 2},
        {"name": "SpaceInvaders", "sticky": 0.25, "full_actions": True},
        {"name": "Seaquest", "life_loss": True, "time_limit": 150},
        {"name": "Qbert", "frame_skip": 1, "noop_max": 0},
        {"name": "MsPacman", "full_actions": True, "sticky": 0.25},
    ],
    ids=lambda options: options["name"],
)
def test_the_back_ends_agree_on_every_frame_reward_and_end(options):
    # FIRE starts an episode at the same emulator frame in both; without no-ops nothing is random.
    common = {"envs": 2, "fire_reset": True, **options}
    ale, envpool = build(backend="ale", **common), build(backend="envpool", **common)
    assert ale.spec._replace(exact_state=False) == envpool.spec
    actions = random_actions(ale, 600)
    rewards, ends = 0.0, 0
    for one, two in zip(play(ale, actions), play(envpool, actions), strict=True):
        # The last frame of a game is the one thing that they fill differently.
        last = one.terminated[..., None, None]
        assert torch.equal(one.obs.where(~last, 0), two.obs.where(~last, 0))
        assert same(one, two, frames=False)
        rewards += one.reward.abs().sum().item()
        ends += int((one.terminated | one.truncated).sum())
    assert rewards > 0
    assert ends > 0 or common.get("frame_skip", 4) < 4 or options["name"] == "Pong"


@pytest.mark.slow
def test_a_game_without_fire_starts_after_the_same_no_ops_in_both():
    # ale-py draws 0 or 1 no-ops here, EnvPool's least is 1: where ale-py drew 1 they are equal.
    config, seeds = AtariEnv(name="Freeway", noop_max=1), range(100, 106)
    ale = AleGames(config, seeds=seeds, threads=1)
    envpool = EnvPoolGames(config, seeds=seeds, threads=1)
    rng = np.random.default_rng(0)
    frames = [(ale.reset(None)[0], envpool.reset(None)[0])]
    for _ in range(100):
        action = rng.integers(0, ale.actions, 6)
        frames.append((ale.step(action)[0], envpool.step(action)[0]))
    ale.close()
    envpool.close()
    drew = (frames[1][0] == frames[1][1]).all(axis=(1, 2))
    assert 0 < drew.sum() < 6
    for one, two in frames:
        assert np.array_equal(one[drew], two[drew])


def area_weights(source: int, target: int) -> np.ndarray:
    """Share of each source pixel in each target pixel, [target, source]."""
    edges = np.arange(target + 1) * source / target
    low, high = np.arange(source), np.arange(1, source + 1)
    overlap = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    return np.maximum(overlap, 0) * target / source


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "noops"), [("ale", 0), ("envpool", 1)])
def test_frames_and_rewards_equal_an_emulator_stepped_by_hand(backend, noops):
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.loadROM(ale_py.roms.get_rom_path("ms_pacman"))
    rows, columns = area_weights(210, 84), area_weights(160, 84)
    for _ in range(noops):
        emulator.act(0)

    pool = build(name="MsPacman", backend=backend, noop_max=noops)
    minimal = emulator.getMinimalActionSet()
    actions = random_actions(pool, 200)
    steps = play(pool, actions)
    assert pool.spec.actions == len(minimal)
    screens = [emulator.getScreenGrayscale()] * 2
    total = 0
    for index, step in enumerate(steps):
        if index:
            reward = 0
            for _ in range(4):
                reward += emulator.act(minimal[int(actions[index - 1])])
                screens = [screens[1], emulator.getScreenGrayscale()]
            assert step.reward.item() == reward
            total += reward
        expected = rows @ np.maximum(*screens).astype(float) @ columns.T
        # Half a level for rounding, and the resizer's own arithmetic.
        assert np.abs(step.obs[0, 0].numpy() - expected).max() <= 1
    assert total > 0


@pytest.mark.parametrize("backend", ["ale", "envpool"])
def test_the_time_limit_truncates_shows_the_true_last_frame_and_starts_anew(backend):
    common = {"backend": backend, "fire_reset": True}
    free, limited = build(**common), build(time_limit=30, **common)
    actions = random_actions(free, 70)
    unlimited, steps = play(free, actions), play(limited, actions)
    assert [t for t, step in enumerate(steps) if step.truncated.any()] == [30, 61]
    assert not any(step.terminated.any() for step in steps)
    assert torch.equal(steps[30].obs, unlimited[30].obs)
    assert torch.equal(steps[31].obs, steps[0].obs)
    assert steps[31].reward.item() == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ale", "envpool"])
def test_a_game_that_ends_on_the_time_limit_is_terminated_and_not_truncated(backend):
    common = {"backend": backend, "fire_reset": True}
    free = build(**common)
    actions = random_actions(free, 300)
    steps = play(free, actions)
    end = next(t for t, step in enumerate(steps) if step.terminated.any())

    at_limit = play(build(time_limit=end, **common), actions[: end + 1])
    assert at_limit[end].terminated.all() and not at_limit[end].truncated.any()
    assert torch.equal(at_limit[end + 1].obs, steps[0].obs)

    # One step less: the emulator reaches its game over while it waits for the reset.
    before = build(time_limit=end - 1, **common)
    cut = play(before, torch.cat([actions[:end], actions[:20]]))
    assert cut[end - 1].truncated.all() and not cut[end - 1].terminated.any()
    for fresh, first in zip(cut[end:], steps[:20], strict=False):
        assert same(fresh, first)


@pytest.mark.slow
@pytest.mark.parametrize("fire_reset", [False, True])
def test_a_lost_life_ends_the_episode_and_the_game_plays_one_step_of_its_own(fire_reset):
    options = {"noop_max": 0, "fire_reset": fire_reset}
    pool = build(life_loss=True, **options)
    actions = random_actions(pool, 400)
    steps = play(pool, actions)

    seeds = simulator_seeds([0], salt=0, envs=1)
    games = AleGames(AtariEnv(name="Breakout", **options), seeds=seeds, threads=1)
    frame, lives = games.reset(None)
    ended, lost, over = False, 0, False
    for step, action in zip(steps[1:], actions, strict=True):
        played = np.array([int(fire_reset) if ended else int(action)])
        before = 0 if over else lives[0]
        frame, reward, now_over, lives = games.step(played)
        life = not ended and 0 < lives[0] < before
        assert step.terminated.item() == (now_over[0] or life)
        assert not step.truncated.item()
        assert step.reward.item() == (0 if ended else reward[0])
        assert torch.equal(step.obs[0, 0], torch.from_numpy(frame[0].copy()))
        lost += life
        ended, over = bool(now_over[0] or life), bool(now_over[0])
    games.close()
    assert lost >= 4


class Scripted:
    """A back end whose game loses a life on its step 2 and ends on a given step."""

    ends_at = 3
    actions, fire = 4, 1
    observation, meanings = (84, 84), ()

    def __init__(self, config, *, seeds, threads, colour=False):
        self.games, self.time, self.log = len(seeds), 0, []

    def reseed(self, seeds):
        pass

    def _now(self):
        lives = 3 if self.time < 2 else 2
        return np.full((self.games, 84, 84), self.time, np.uint8), np.full(self.games, lives)

    def reset(self, which):
        self.log.append("reset")
        self.time = 0
        frame, lives = self._now()
        return (frame, lives) if which is None else (frame[which], lives[which])

    def step(self, action):
        self.log.append(int(action[0]))
        self.time = 0 if self.time == self.ends_at else self.time + 1
        frame, lives = self._now()
        over = np.full(self.games, self.time == self.ends_at)
        return frame, np.full(self.games, 5.0), over, lives

    def close(self):
        pass


@pytest.mark.parametrize(("ends_at", "limit"), [(3, 100), (9, 3)])
def test_a_game_that_ends_in_the_step_after_a_lost_life_starts_at_once(monkeypatch, ends_at, limit):
    monkeypatch.setattr(pool_module, "AleGames", Scripted)
    monkeypatch.setattr(Scripted, "ends_at", ends_at)
    pool = build(life_loss=True, fire_reset=True, time_limit=limit)
    steps = play(pool, torch.full((4, 1, 1), 3), close=False)
    assert [int(step.obs[0, 0, 0, 0]) for step in steps] == [0, 1, 2, 0, 1]
    assert [step.reward.item() for step in steps] == [0, 5, 5, 0, 5]
    assert [step.terminated.item() for step in steps] == [False, False, True, False, False]
    assert not any(step.truncated.item() for step in steps)
    assert pool._games.log == ["reset", 3, 3, 1, "reset", 3]  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ale", "envpool"])
def test_a_seed_plays_the_same_alone_or_among_others_and_no_two_play_alike(backend):
    options = {"backend": backend, "envs": 2, "sticky": 0.25, "fire_reset": True}
    among, alone = build(seeds=[3, 5], **options), build(seeds=[5], **options)
    # Same actions for all: only the sticky draws differ.
    actions = random_actions(alone, 40)[..., :1]
    several = play(among, actions.expand(-1, 2, 2))
    single = play(alone, actions.expand(-1, 1, 2))
    for both, one in zip(several, single, strict=True):
        assert all(torch.equal(x[1:], y) for x, y in zip(both, one, strict=True))
    last = several[-1].obs.flatten(0, 1)
    assert all(not torch.equal(last[i], last[j]) for i in range(4) for j in range(i))


def test_seeds_of_simulators_depend_on_value_salt_environment_and_generation():
    seeds = simulator_seeds([3, 5], salt=0, envs=4)
    assert np.array_equal(seeds[4:], simulator_seeds([5], salt=0, envs=4))
    assert np.array_equal(seeds[:2], simulator_seeds([3], salt=0, envs=2))
    other = [
        simulator_seeds([3, 5], salt=1, envs=4),
        simulator_seeds([3, 5], salt=0, envs=4, generation=1),
    ]
    assert len(np.unique(np.concatenate([seeds, *other]))) == 24
    assert seeds.min() > 0 and seeds.max() < 2**31


def test_envpool_starts_new_episodes_with_new_random_numbers_and_says_so():
    pool = build(backend="envpool", sticky=0.5, fire_reset=True)
    assert not pool.spec.exact_state and pool.note == ""
    actions = random_actions(pool, 30)
    before = play(pool, actions, close=False)
    first = pool.load_state_dict(pool.state_dict())
    assert first is not None and torch.equal(first.obs, before[0].obs)
    assert not first.terminated.any() and first.reward.item() == 0
    after = [pool.step(action) for action in actions]
    assert pool.state_dict() == {"generation": 1} and "EnvPool" in pool.note
    assert not all(same(a, b) for a, b in zip(after, before[1:], strict=True))
    pool.close()


def saved(pool: Atari) -> dict:
    """The pool's state as it comes from a file."""
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"name": "Pong", "noop_max": 30},
        {"name": "Breakout", "noop_max": 9, "fire_reset": True, "life_loss": True},
        {"name": "Breakout", "fire_reset": True, "time_limit": 70, "noop_max": 3},
        {"name": "Breakout", "fire_reset": True, "life_loss": True, "time_limit": 55},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_ale_s_games_go_on_bit_for_bit(monkeypatch, options):
    # Emulators are seeded anew by different games at different times.
    monkeypatch.setattr(ale_module, "_STRETCH", 60)
    options = {"envs": 2, "sticky": 0.25, "frame_skip": 8, "threads": 2, **options}
    pool, restored = build(**options), build(**options)
    actions = random_actions(pool, 180)
    play(pool, actions[:110], close=False)
    state = saved(pool)
    assert restored.spec.exact_state and restored.load_state_dict(state) is None
    steps = len(state["games"]["given"])
    assert f"replayed {steps:,} agent steps of 2 games in " in restored.note
    ends = 0
    for action in actions[110:]:
        step = pool.step(action)
        assert same(step, restored.step(action))
        ends += int((step.terminated | step.truncated).sum())
    assert ends > 0 or options["name"] == "Pong"
    # Games lie behind: their emulators were seeded again, or the record holds a game's reset.
    games = state["games"]
    assert options["name"] == "Pong" or games["seedings"].max() > 1 or games["given"].max() >= 128
    pool.close()
    restored.close()


def test_what_the_emulators_played_before_does_not_matter_to_a_restored_state():
    pool = build(sticky=0.25, fire_reset=True)
    actions = random_actions(pool, 60)
    play(pool, actions[:20], close=False)
    state = saved(pool)
    for _ in range(2):
        want = [pool.step(action) for action in actions[20:]]
        assert pool.load_state_dict(state) is None
    got = [pool.step(action) for action in actions[20:]]
    pool.close()
    assert all(same(a, b) for a, b in zip(want, got, strict=True))


def test_a_record_longer_than_its_memory_is_kept():
    games = AleGames(AtariEnv(name="Pong", frame_skip=1), seeds=[5], threads=1)
    games.reset(None)
    actions = np.random.default_rng(0).integers(0, 6, 1030)
    for action in actions:
        games.step(np.array([action]))
    assert np.array_equal(games.state()["given"], actions.astype(np.uint8))
    games.close()


def test_games_that_play_otherwise_than_they_did_start_anew_and_the_note_says_so():
    pool = build(fire_reset=True)
    play(pool, random_actions(pool, 20), close=False)
    state = saved(pool)
    state["games"]["frames"] += 1
    first = pool.load_state_dict(state)
    assert first is not None and "ended differently from those saved" in pool.note
    assert pool.state_dict()["generation"] == 1
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["games"]["given"].fill_(200), r"given: expected actions below 4, got 72"),
        (lambda s: s["games"]["lengths"].fill_(2**40), "expected lengths whose sum is the 5 act"),
        (lambda s: s["games"]["lengths"].fill_(-1), "expected lengths whose sum"),
        (lambda s: s["games"].update(given=[0] * 5), r"given: expected a tensor \[-1\] of uint8"),
        (lambda s: s.update(games=None), "Breakout.games: expected a dict of"),
        (lambda s: s.pop("lives"), "Breakout: expected elapsed, ended, games, generation, lives"),
        (lambda s: s.update(generation=-1), "generation: expected a whole number from 0"),
        (lambda s: s.update(ended=torch.zeros(3, 2, dtype=torch.bool)), r"tensor \[3, 1\] of bool"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_games_go_on_as_they_were(change, message):
    pool = build(fire_reset=True)
    actions = random_actions(pool, 20)
    want = play(pool, actions, close=False)[6:]
    pool.restart(0)
    for action in actions[:5]:
        pool.step(action)
    state = saved(pool)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        pool.load_state_dict(state)
    assert all(
        same(pool.step(action), step) for action, step in zip(actions[5:], want, strict=True)
    )
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ale", "envpool"])
def test_a_restart_depends_on_its_number_and_not_on_what_was_played(backend):
    options = {"backend": backend, "sticky": 0.25, "fire_reset": True, "life_loss": True}
    used, fresh = build(**options), build(**options)
    actions = random_actions(used, 60)
    play(used, actions[:33], close=False)
    seven, eight, again = (
        [pool.restart(number), *(pool.step(action) for action in actions)]
        for pool, number in ((used, 7), (used, 8), (fresh, 7))
    )
    assert all(same(a, b) for a, b in zip(seven, again, strict=True))
    assert not all(same(a, b) for a, b in zip(seven, eight, strict=True))
    used.close()
    fresh.close()


@pytest.mark.slow
def test_longest_limits_an_episode_where_the_time_limit_is_above_it():
    config = AtariEnv(name="Breakout", threads=1, time_limit=50, fire_reset=True)
    ends = []
    for longest in (0, 20, 80):
        pool = Atari(config, seeds=[0], salt=0, device="cpu", longest=longest)
        steps = play(pool, random_actions(pool, 60))
        ends.append(next(t for t, step in enumerate(steps) if step.truncated.any()))
    assert ends == [50, 20, 50]


def test_a_step_keeps_its_values_while_the_games_go_on():
    pool = build(fire_reset=True)
    first = pool.reset()
    copy = [field.clone() for field in first]
    for action in random_actions(pool, 5):
        pool.step(action)
    pool.close()
    assert all(torch.equal(field, old) for field, old in zip(first, copy, strict=True))


@pytest.mark.slow  # loads every game, a tenth of a second each
def test_fire_has_the_emulator_s_place_among_the_actions_of_every_game():
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    for rom in ale_py.roms.get_all_rom_ids():
        name = camel_case(rom)
        if name in TWO_PLAYERS:
            continue
        emulator = ale_py.ALEInterface()
        emulator.loadROM(ale_py.roms.get_rom_path(rom))
        minimal = [action.value for action in emulator.getMinimalActionSet()]
        full = [action.value for action in emulator.getLegalActionSet()]
        for ids, wide in ((minimal, False), (full, True)):
            place = ids.index(1) if 1 in ids else None
            assert fire_action(AtariEnv(name=name, full_actions=wide)) == place
        # Where action 0 is no no-op there is no life to lose, so none is asked for after it.
        assert minimal[0] == 0 or emulator.lives() <= 1


@pytest.mark.slow
def test_ale_plays_no_no_ops_when_none_are_allowed():
    # With a no-op frame in some of the games, the cars of Freeway would be elsewhere in these.
    config = AtariEnv(name="Freeway", noop_max=0, fire_reset=True)
    games = AleGames(config, seeds=range(100, 104), threads=1)
    frames = [games.reset(None)[0], *(games.step(np.zeros(4))[0] for _ in range(10))]
    games.close()
    assert all((frame == frame[:1]).all() for frame in frames)


@pytest.mark.parametrize("backend", ["ale", "envpool"])
def test_an_unknown_game_is_refused_with_its_nearest_names(backend):
    with pytest.raises(
        ValueError, match=r"'space-invader' \(did you mean SpaceInvaders.*cerl list"
    ):
        build(name="space-invader", backend=backend, noop_max=1)


def test_envpool_refuses_a_start_without_no_ops_and_names_the_other_back_end():
    with pytest.raises(ValueError, match="env.noop_max to 1 or more, or env.backend to 'ale'"):
        build(backend="envpool", noop_max=0)
    with pytest.raises(ValueError, match="env.backend to 'ale'"):
        build(name="Freeway", backend="envpool", noop_max=0, fire_reset=True)


@pytest.mark.parametrize(("backend", "module"), [("ale", "ale_py"), ("envpool", "envpool")])
def test_a_missing_back_end_names_the_pip_command(monkeypatch, backend, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'cerl\[atari\]'"):
        build(backend=backend, noop_max=1)


def test_bad_actions_are_refused_by_shape_type_and_range():
    pool = build(envs=2, fire_reset=True)
    pool.reset()
    with pytest.raises(ValueError, match=r"expected actions of shape \(1, 2\)"):
        pool.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="got .* of torch.float32"):
        pool.step(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"in \[0, 4\), got 4 at seed row 0, environment 1"):
        pool.step(torch.tensor([[0, 4]]))
    pool.close()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_arrive_on_the_device_as_they_were_sent(dtype, device):
    spec = EnvSpec("odd", (3, 5), dtype, 2, 3, 1, False, False)
    outbox = Outbox(spec, seeds=2, device=device)
    rng = np.random.default_rng(0)
    sent, received = [], []
    for _ in range(5):
        obs = rng.integers(0, 2, (6, 3, 5)).astype(torch.empty(0, dtype=dtype).numpy().dtype)
        flags = rng.integers(0, 2, (2, 6)).astype(bool)
        sent.append((obs, rng.normal(size=6).astype(np.float32), *flags))
        received.append(outbox.send(*sent[-1]))
    for values, step in zip(sent, received, strict=True):
        assert [f.dtype for f in step] == [dtype, torch.float32, torch.bool, torch.bool]
        assert step.obs.shape == (2, 3, 3, 5) and step.reward.shape == (2, 3)
        assert all(f.device.type == device for f in step)
        for value, field in zip(values, step, strict=True):
            assert np.array_equal(value.reshape(field.shape), field.cpu().numpy())


def test_the_list_of_games_is_what_the_back_ends_know():
    from envpool.registration import registry

    games, registered = envs.available()["atari"], registry.specs
    theirs = [name[:-3] for name, spec in registered.items() if spec[0] == "envpool.atari"]
    assert games == sorted(theirs)


def test_the_list_says_how_to_install_the_missing_back_ends(monkeypatch):
    monkeypatch.setattr(envs, "_package_folder", lambda name: None)
    monkeypatch.delenv("ENVPOOL_ASSETS_PATH", raising=False)
    assert envs.available()["atari"] == ["none: pip install 'cerl[atari]'"]
