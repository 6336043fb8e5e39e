"""MinAtar: Breakout, Asterix and Freeway against the package, and what all games have in common.

The package steps beside ours on the same random numbers (`minatar_tape`); Seaquest and Space
Invaders have files of their own.
"""

import math

import numpy as np
import pytest
import torch
from minatar_tape import Tape, side_by_side

from cerl import draw
from cerl.config import MinAtarEnv
from cerl.envs import make_resident
from cerl.envs.resident import Resident

GAMES = ["asterix", "breakout", "freeway"]
# Inductor's import meets a deprecated decorator of torch itself.
inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def build(name="breakout", *, seeds=(0,), salt=0, device="cpu", fuse=None, **options) -> Resident:
    options = {"envs": 4, **options}
    config = MinAtarEnv.model_validate({"name": name, **options})
    return make_resident(config, seeds=seeds, salt=salt, device=device, fuse=fuse)


def actions(env: Resident, steps: int, *, seeds: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, seeds, env.spec.envs)
    return torch.randint(0, env.spec.actions, shape, generator=generator)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def cells(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the one cell that is set in each [G, 10, 10]."""
    at = plane.reshape(len(plane), 100).argmax(1)
    return at // 10, at % 10


# Against the package.


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("ramping", [True, False])
@pytest.mark.parametrize("sticky", [pytest.param(0.0, marks=pytest.mark.slow), 0.25])
def test_random_play_equals_the_package(name, ramping, sticky):
    report = side_by_side(name, games=64, steps=200, ramping=ramping, sticky=sticky)
    assert report.steps >= 10_000
    if name != "freeway":
        assert report.episodes > 64 and report.rewards[1.0] > 50


@pytest.mark.slow
def test_breakout_equals_the_package_over_cleared_walls():
    def follow(obs, t, rng):
        (_, paddle), (_, ball), (_, trail) = (cells(obs[:, i]) for i in range(3))
        # Sometimes take the ball on the corner, or it bounces in a loop.
        aim = ball + np.where(rng.random(len(obs)) < 0.3, np.sign(ball - trail), 0)
        return np.where(aim < paddle, 1, np.where(aim > paddle, 3, 0))

    walls = []

    def watch(envs, ours):
        walls.append(np.array([env.brick_map.sum() for env in envs]))

    report = side_by_side("breakout", games=32, steps=700, sticky=0.0, policy=follow, watch=watch)
    left = np.stack(walls)
    rebuilt = (left[:-1] < 3) & (left[1:] == 30)
    assert rebuilt.sum() >= 32 and report.rewards[1.0] > 32 * 40


@pytest.mark.slow
def test_asterix_equals_the_package_up_to_the_last_ramp():
    def dodge(obs, t, rng):
        row, column = cells(obs[:, 0])
        enemy = np.pad(obs[:, 1], ((0, 0), (0, 0), (3, 3)))
        weights = {0: 9, 1: 6, -1: 6, 2: 2, -2: 2, 3: 1, -3: 1}
        danger = np.zeros((len(obs), 10, 10))
        for k, weight in weights.items():
            danger += enemy[:, :, 3 + k : 13 + k] * weight
        rows = np.clip(row[:, None] + np.array([0, 0, -1, 0, 1]), 1, 8)
        columns = np.clip(column[:, None] + np.array([0, -1, 0, 1, 0]), 0, 9)
        cost = danger[np.arange(len(obs))[:, None], rows, columns] + 0.02 * abs(columns - 4.5)
        return (cost + 0.1 * rng.random(cost.shape)).argmin(1)

    seen = {"full": 0, "spawn": 99, "move": 99}

    def watch(envs, ours):
        for env in envs:
            full = all(entity is not None for entity in env.entities)
            seen["full"] += full and env.spawn_timer == 0
            seen["spawn"] = min(seen["spawn"], env.spawn_speed)
            seen["move"] = min(seen["move"], env.move_speed)

    report = side_by_side("asterix", games=24, steps=1300, sticky=0.0, policy=dodge, watch=watch)
    # A spawn that finds no free slot, and the fastest game there is.
    assert seen["full"] > 50 and seen["spawn"] == 1 and seen["move"] == 1
    assert report.episodes > 5


@pytest.mark.slow
def test_freeway_equals_the_package_over_whole_games():
    def hurry(obs, t, rng):
        return rng.choice(6, len(obs), p=[0.03, 0.03, 0.83, 0.03, 0.05, 0.03])

    report = side_by_side("freeway", games=4, steps=2700, policy=hurry)
    # 2501 steps, one reset, and the next game goes on.
    assert report.episodes == 4 and report.steps == 4 * 2699
    assert report.rewards[1.0] > 4 * 10


def test_the_tape_hands_out_columns_by_section_and_refuses_undeclared_draws():
    tape = Tape({"diver": 2})

    def diver():
        return tape.rand(), tape.randint(1, 9)

    row = np.array([0.5, 0.1, 0.2, 0.3, 0.75], dtype=np.float32)
    tape.put(row, at=1)
    assert tape.rand() == pytest.approx(0.1)
    assert diver() == (pytest.approx(0.3), 1 + 6) and diver() == (pytest.approx(0.3), 1 + 6)
    with pytest.raises(AssertionError, match="drew 5 numbers"):
        tape.rand()


# Hand-computed boards.


def test_breakout_breaks_a_brick_and_bounces():
    env = build(envs=1, sticky=0.0)
    first = env.reset()
    board = first.obs[0, 0]
    assert board[3].sum() == 30 and board[0, 9, 4] and board[1, 3].sum() == 1
    # Row 3 to row 8 in five steps; the paddle at 4 or 5 waits for column 5 or 4.
    from_left = bool(board[1, 3, 0])
    move = 2 if from_left else 0
    for _ in range(5):
        step = env.step(torch.full((1, 1), move))
        move = 1 if bool(step.obs[0, 0, 0, 9, 5 if from_left else 4]) else move
        if (from_left and step.obs[0, 0, 0, 9, 5]) or (not from_left and step.obs[0, 0, 0, 9, 4]):
            move = 0
    assert step.reward.item() == 0 and not step.terminated.any()
    assert step.obs[0, 0, 1, 8].nonzero().item() == (5 if from_left else 4)
    step = env.step(torch.zeros(1, 1, dtype=torch.int64))
    assert not step.terminated.any()
    up = [int(step.obs[0, 0, 1].any(1).nonzero())]
    while step.reward.item() == 0:
        step = env.step(torch.zeros(1, 1, dtype=torch.int64))
        up.append(int(step.obs[0, 0, 1].any(1).nonzero()))
    # It returns to row 8, climbs to row 4, meets the brick in row 3 and stays in row 4.
    assert up == [8, 7, 6, 5, 4, 4]
    assert step.reward.item() == 1 and step.obs[0, 0, 3].sum() == 29


@pytest.mark.parametrize(("full", "right"), [(False, 2), (True, 3)])
def test_minimal_actions_are_indices_into_the_minimal_set(full, right):
    env = build(envs=1, sticky=0.0, full_actions=full)
    assert env.spec.actions == (6 if full else 3)
    env.reset()
    step = env.step(torch.full((1, 1), right))
    assert step.obs[0, 0, 0, 9].nonzero().item() == 5
    step = env.step(torch.full((1, 1), 1))
    assert step.obs[0, 0, 0, 9].nonzero().item() == 4


def test_every_minimal_set_is_the_packages():
    import minatar

    for name in ("asterix", "breakout", "freeway", "seaquest", "space_invaders"):
        env, theirs = build(name, full_actions=False), minatar.Environment(name)
        assert env._game.actions == tuple(theirs.minimal_action_set())
        channels = theirs.state_shape()[2]
        assert env.spec.observation == (channels, 10, 10)


# What the framework adds.


def test_draws_are_those_of_the_counter():
    env = build("freeway", seeds=(3, 8), salt=2)
    env.reset()
    env.step(torch.zeros(2, 4, dtype=torch.int64))
    keys = draw.seed_keys((3, 8), salt=2)
    want = draw.uniform(keys, draw.ENV, 2, (4, env.columns))
    assert torch.equal(env.draws(), want) and env.columns == 17


def test_sticky_actions_repeat_what_was_executed_and_survive_a_reset():
    env = build(envs=200, sticky=0.25, full_actions=True)
    env.reset()
    last = torch.zeros(200, dtype=torch.int64)
    repeats = steps = 0
    for action in actions(env, 60):
        over, u = env._episode.done.clone(), env.draws()[0, :, 0]
        env.step(action)
        want = torch.where(over, last, torch.where(u < 0.25, last, action[0]))
        assert torch.equal(env._episode.last_action, want)
        last = want
        repeats, steps = repeats + int(((u < 0.25) & ~over).sum()), steps + int((~over).sum())
    spread = 4 * math.sqrt(0.25 * 0.75 / steps)
    assert abs(repeats / steps - 0.25) < spread


@pytest.mark.parametrize("name", GAMES)
def test_time_limit_truncates_and_a_terminal_wins(name):
    limit, free = build(name, envs=64, time_limit=12), build(name, envs=64)
    age, done = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.bool)
    limit.reset()
    free.reset()
    terminals = truncations = 0
    for t, action in enumerate(actions(limit, 60)):
        step = limit.step(action)
        if t < 12:  # up to the limit the game is the same as without it
            assert same(step[:3], free.step(action)[:3])
        age = torch.where(done, 0, age + 1)
        terminal, cut = step.terminated[0], step.truncated[0]
        assert torch.equal(cut, (age == 12) & ~terminal & ~done)
        done = terminal | cut
        terminals, truncations = terminals + int(terminal.sum()), truncations + int(cut.sum())
    assert truncations > 50 and (terminals > 50 or name != "breakout")


@pytest.mark.parametrize("name", GAMES)
def test_a_restored_game_goes_on_bit_for_bit(name):
    env = build(name, seeds=(1, 5), envs=3, time_limit=25)
    env.reset()
    plan = actions(env, 90, seeds=2)
    for action in plan[:30]:
        env.step(action)
    saved = env.state_dict()
    want = [env.step(action) for action in plan[30:]]
    other = build(name, seeds=(2, 9), envs=3, time_limit=25)
    other.reset()
    pointers = [tensor.data_ptr() for tensor in other._tensors().values()]
    assert other.load_state_dict(saved) is None
    for action, step in zip(plan[30:], want, strict=True):
        assert same(other.step(action), step)
    assert pointers == [tensor.data_ptr() for tensor in other._tensors().values()]


def test_state_of_another_shape_is_refused_and_nothing_is_changed():
    env = build(envs=3)
    env.reset()
    before = env.state_dict()
    wrong = build(envs=5).state_dict()
    with pytest.raises(ValueError, match=r"saved last_action is \[5\].*expected \[3\]"):
        env.load_state_dict(wrong)
    with pytest.raises(ValueError, match="another game"):
        env.load_state_dict(build("freeway", envs=3).state_dict())
    after = env.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", GAMES)
def test_a_seed_plays_the_same_alone_and_among_others(name):
    alone, among = build(name, seeds=(7,)), build(name, seeds=(3, 7, 11))
    pairs = [(alone.reset(), among.reset())]
    for action in actions(among, 80, seeds=3):
        pairs.append((alone.step(action[1:2]), among.step(action)))
    assert all(same(a, [field[1:2] for field in b]) for a, b in pairs)


@pytest.mark.parametrize(("option", "value"), [("seeds", (8,)), ("salt", 1)])
def test_other_seeds_and_salts_play_other_games(option, value):
    one, two = build("freeway"), build("freeway", **{option: value})
    assert not torch.equal(one.reset().obs, two.reset().obs)


def test_wrong_actions_are_refused():
    env = build(seeds=(0, 1), envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"\[S, E\] = \[2, 3\] of torch.int64, got \[6\]"):
        env.step(torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="got .* of torch.int32"):
        env.step(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected actions in 0..2, got 0..3"):
        env.step(torch.tensor([[0, 1, 2], [3, 0, 0]]))
    with pytest.raises(ValueError, match="at least one seed"):
        build(seeds=())


# Compiled.


@pytest.mark.slow
@pytest.mark.parametrize("name", GAMES)
def test_the_step_is_one_graph_and_equals_eager(name):
    one, two = build(name, seeds=(0, 1)), build(name, seeds=(0, 1))
    traced = torch.compile(two._advance_once, fullgraph=True, dynamic=False, backend="aot_eager")
    assert same(one.reset(), two.reset())
    for action in actions(one, 40, seeds=2):
        assert same(one.step(action), traced(action))
    left, right = one.state_dict(), two.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.slow
def test_many_instances_do_not_exhaust_the_compiler(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend="eager", **k))
    # The compiler gives up on a function after this many variants.
    with torch._dynamo.config.patch(recompile_limit=1):
        for envs in (1, 2, 3):
            env = build(envs=envs, fuse=True)
            assert env.reset().obs.shape == (1, envs, 4, 10, 10)


@inductor
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
@pytest.mark.parametrize("envs", [1, 300])
def test_fused_on_the_gpu_equals_eager_on_the_cpu_also_inside_a_graph(name, envs):
    cpu, gpu = (build(name, seeds=(0, 4), envs=envs, device=d) for d in ("cpu", "cuda"))
    assert same(cpu.reset(), [field.cpu() for field in gpu.reset()])
    plan = actions(cpu, 330, seeds=2)
    for action in plan[:30]:
        assert same(cpu.step(action), [field.cpu() for field in gpu.step(action.cuda())])
    given, graph = torch.zeros_like(plan[0]).cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu.step(given)
    for action in plan[30:]:
        given.copy_(action)
        graph.replay()
        assert same(cpu.step(action), [field.cpu() for field in out])
    saved = gpu.state_dict()
    assert all(torch.equal(value, saved[key].cpu()) for key, value in cpu.state_dict().items())
