"""POPGym's games on the device: compared with the package step by step; returns of perfect play."""

import numpy as np
import pytest
import torch

from cerl.config import MemoryEnv
from cerl.config.memory_tasks import POPGYM, TASKS
from cerl.envs import make_resident
from cerl.envs.memory import deck
from cerl.envs.resident import Resident

LEVELS = ("Easy", "Medium", "Hard")
each_level = pytest.mark.parametrize(
    "level", ["Easy", *(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[1:])]
)
CARDS = ("RepeatPrevious", "RepeatFirst", "CountRecall", "Autoencode", "HigherLower")
BOARDS = ("Concentration", "MineSweeper", "Battleship", "MultiarmedBandit")
CONTROL = (
    "PositionOnlyCartPole",
    "VelocityOnlyCartPole",
    "NoisyPositionOnlyCartPole",
    "PositionOnlyPendulum",
    "NoisyPositionOnlyPendulum",
)


def build(name: str, *, envs: int = 4, seeds=(0,), device="cpu", **options) -> Resident:
    config = MemoryEnv.model_validate({"name": name, "envs": envs, **options})
    return make_resident(config, seeds=seeds, salt=0, device=device)


def pick(values: torch.Tensor, index: torch.Tensor) -> np.ndarray:
    """One value of every row, by a loop."""
    return np.array([int(row[i]) for row, i in zip(values.numpy(), index.tolist(), strict=True)])


def wise(ours: Resident) -> np.ndarray:
    """What a player does who sees everything, from the state of the rules."""
    name, state = ours.spec.name, ours._state
    if name.startswith("RepeatPrevious"):
        k = {"Easy": 4, "Medium": 32, "Hard": 64}[name.removeprefix("RepeatPrevious")]
        return pick(state.suit, (state.shown + 1 - k).clamp(0))
    if name.startswith("RepeatFirst"):
        return state.suit[:, 0].numpy()
    if name.startswith("CountRecall"):
        rows = zip(state.value.tolist(), state.query.tolist(), state.shown.tolist(), strict=True)
        return np.array([value[: t + 1].count(query[t]) for value, query, t in rows])
    if name.startswith("Autoencode"):
        cards = state.suit.shape[1]
        return pick(state.suit, (2 * (cards - 1) - state.time).clamp(0, cards - 1))
    if name.startswith("HigherLower"):
        shown = state.shown.clamp(max=state.rank.shape[1] - 2)
        return (pick(state.rank, shown + 1) < pick(state.rank, shown)).astype(np.int64)
    if name.startswith("Concentration"):
        rows = zip(state.kind.numpy(), state.up.numpy(), state.first.tolist(), strict=True)
        return np.array([_partner(kind, up, first) for kind, up, first in rows])
    if name.startswith("MineSweeper"):
        return (state.mine | state.viewed).int().argmin(-1).numpy()
    if name.startswith("Battleship"):
        return (state.ship & ~state.guessed).int().argmax(-1).numpy()
    return state.chance.argmax(-1).numpy()


def _partner(kind: np.ndarray, up: np.ndarray, first: int) -> int:
    """The first card that is down, or the one that matches the card just turned."""
    for place in range(len(kind)):
        fits = first < 0 or (place != first and kind[place] == kind[first])
        if fits and not up[place]:
            return place
    return 0


def mostly_wise(share: float):
    def policy(ours: Resident, t: int, rng: np.random.Generator) -> np.ndarray:
        blind = rng.integers(0, ours.spec.actions, ours.spec.envs)
        return np.where(rng.random(ours.spec.envs) < share, wise(ours), blind).astype(np.int64)

    return policy


@pytest.fixture
def side_by_side():
    pytest.importorskip("popgym")
    import popgym_tape

    return popgym_tape.side_by_side


@each_level
@pytest.mark.parametrize("game", CARDS)
def test_card_games_equal_the_package(side_by_side, game, level):
    name = game + level
    cards = {"Easy": 52, "Medium": 104, "Hard": 208}[level]
    steps = 2 * cards + 30
    if game == "RepeatFirst":
        steps = {"Easy": 134, "Medium": 446, "Hard": 850}[level]
    games = -(-2000 // steps) + 2
    for policy in (None, mostly_wise(0.7)):
        more = {} if policy is None else {"policy": policy}
        report = side_by_side(name, games=games, steps=steps, **more)
        assert report.steps >= 2000 and report.terminals >= games and report.truncations == 0
        assert {np.sign(reward) for reward in report.rewards} >= {-1, 1}


@pytest.mark.slow
@each_level
@pytest.mark.parametrize("game", BOARDS)
def test_boards_and_bandits_equal_the_package(side_by_side, game, level):
    name = game + level
    blind = side_by_side(name, games=16, steps=220)
    assert blind.steps >= 2000 and len(blind.rewards) >= 2
    games, steps = (4, 620) if game == "MultiarmedBandit" else (8, 310)
    seeing = side_by_side(name, games=games, steps=steps, policy=mostly_wise(0.97), seed=1)
    assert seeing.steps >= 2000
    if game == "MultiarmedBandit":
        assert seeing.terminals == 0 and seeing.truncations >= 4
    else:
        assert seeing.terminals >= 4 and blind.truncations + seeing.truncations >= 1


@each_level
@pytest.mark.parametrize("game", CONTROL)
def test_physics_equals_the_package_s_step_by_step(side_by_side, game, level):
    report = side_by_side(game + level, games=16, steps=210, tolerance=5e-6, resync=True)
    assert report.steps >= 2000
    assert (report.truncations >= 16) if "Pendulum" in game else (report.terminals >= 100)


@pytest.mark.slow
@pytest.mark.parametrize("game", CONTROL)
def test_physics_stays_near_the_package_s_without_help(side_by_side, game):
    # A pendulum that swings over the top is chaotic: float32 and float64 part after 100 steps.
    steps = 50 if "Pendulum" in game else 300
    report = side_by_side(game + "Easy", games=3000 // steps, steps=steps, tolerance=1e-4)
    assert report.steps >= 2000


@pytest.mark.slow
def test_cart_poles_are_truncated_where_the_package_s_are(side_by_side):
    def balance(ours, t, rng):
        place, speed = ours._state.place, ours._state.speed
        lean = place[:, 1] + 0.3 * speed[:, 1] + 0.05 * place[:, 0] + 0.1 * speed[:, 0]
        return (lean > 0).long().numpy()

    for name in ("VelocityOnlyCartPoleEasy", "PositionOnlyCartPoleMedium"):
        report = side_by_side(name, games=8, steps=410, tolerance=2e-6, resync=True, policy=balance)
        assert report.truncations >= 8 and report.terminals == 0


def episode(env: Resident) -> tuple[torch.Tensor, int]:
    """Returns of perfect play after a reset, [G], and its length; all games end together."""
    total = torch.zeros(env.spec.envs)
    for t in range(2000):
        step = env.step(torch.from_numpy(wise(env)).long()[None])
        total += step.reward[0]
        if (step.terminated | step.truncated).all():
            return total, t + 1
    raise AssertionError("the episode did not end")


@pytest.mark.parametrize(
    ("game", "lengths"),
    [
        ("RepeatPrevious", (51, 103, 155)),
        ("RepeatFirst", (51, 415, 831)),
        ("CountRecall", (51, 103, 207)),
        ("Autoencode", (103, 207, 311)),
        ("Concentration", (52, 104, 52)),
        ("MineSweeper", (14, 30, 54)),
        ("Battleship", (12, 12, 12)),
    ],
)
def test_perfect_play_earns_1(game, lengths):
    for level, length in zip(LEVELS, lengths, strict=True):
        env = build(game + level)
        env.reset()
        total, steps = episode(env)
        assert total.tolist() == pytest.approx([1.0] * 4, abs=1e-4) and steps == length


def test_higher_lower_with_foresight_earns_a_card_for_every_unequal_pair():
    env = build("HigherLowerEasy")
    env.reset()
    rank = env._state.rank.int()
    total, steps = episode(env)
    pairs = (rank[:, 1:] != rank[:, :-1]).sum(-1)
    assert total.tolist() == pytest.approx((pairs / 52).tolist(), abs=1e-5) and steps == 51


def test_decks_are_shuffled_evenly():
    env = build("CountRecallHard", envs=3000, decks=1)
    env.reset()
    for pile in (env._state.value, env._state.query):
        assert (torch.nn.functional.one_hot(pile.long(), 13).sum(1) == 4).all()
        # The first card's rank: 3000 draws of 13 kinds, 5 standard deviations.
        first = torch.bincount(pile[:, 0].long(), minlength=13) / 3000
        assert float((first - 1 / 13).abs().max()) < 5 * (1 / 13 / 3000) ** 0.5
    assert not torch.equal(env._state.value, env._state.query)


def test_ships_lie_evenly_over_their_places():
    env = build("BattleshipEasy", envs=6000)
    env.reset()
    ship = env._state.ship.view(-1, 8, 8)
    assert (ship.flatten(1).sum(-1) == 12).all()
    share = ship.float().mean(0)
    # Transposed and mirrored boards are as likely; a square's share has a deviation of 0.005.
    for other in (share.T, share.flip(0), share.flip(1)):
        assert float((share - other).abs().max()) < 0.04


def test_options_make_other_levels():
    env = build("RepeatPreviousEasy", decks=2, k=7)
    env.reset()
    for t in range(200):
        state = env._state
        answer = pick(state.suit, (state.shown - 6).clamp(0))
        step = env.step(torch.from_numpy(answer).long()[None])
        assert step.reward[0].tolist() == pytest.approx([0.0 if t < 6 else 1 / 97] * 4)
        if bool(step.terminated.all()):
            break
    assert t + 1 == 103 and env.spec.name == "RepeatPreviousEasy-decks2-k7"
    # A limit of one's own only shortens an episode.
    for limit, steps in ((None, 30), (9, 9), (90, 30)):
        env = build("MultiarmedBanditEasy", length=30, time_limit=limit)
        env.reset()
        ends = [bool(env.step(torch.zeros(1, 4).long()).truncated.all()) for _ in range(steps)]
        assert ends == [False] * (steps - 1) + [True]
    quiet, loud = (build("NoisyPositionOnlyPendulumEasy", noise=noise) for noise in (1e-9, 0.5))
    assert not torch.equal(quiet.reset().obs, loud.reset().obs)


@pytest.mark.parametrize("name", POPGYM)
def test_every_task_is_saved_and_restored_bit_for_bit(name):
    one, two = build(name, seeds=(3, 4)), build(name, seeds=(3, 4))
    generator = torch.Generator().manual_seed(0)

    def act():
        if one.spec.continuous:
            return torch.rand(2, 4, 1, generator=generator) * 2 - 1
        return torch.randint(0, one.spec.actions, (2, 4), generator=generator)

    one.reset()
    for _ in range(20):
        one.step(act())
    two.load_state_dict(one.state_dict())
    for _ in range(20):
        action = act()
        for mine, other in zip(one.step(action), two.step(action), strict=True):
            assert torch.equal(mine, other)


# Compiled, and inside a CUDA graph.


def plan(env: Resident, steps: int, *, seeds: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (steps, seeds, env.spec.envs)
    if env.spec.continuous:
        return torch.rand((*shape, env.spec.actions), generator=generator) * 2 - 1
    return torch.randint(0, env.spec.actions, shape, generator=generator)


def test_places_are_those_of_a_stable_sort():
    u = torch.randint(0, 30, (50, 104), generator=torch.Generator().manual_seed(5)) / 30.0
    sorted_by_place = torch.empty_like(u).scatter(-1, deck.places(u), u)
    assert torch.equal(sorted_by_place, u.sort(dim=-1).values)
    assert torch.equal(deck.places(u).argsort(-1), u.argsort(dim=-1, stable=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if not name.endswith(("Medium", "Hard"))])
def test_the_step_is_one_graph_and_equals_eager(name):
    one, two = build(name, seeds=(0, 1)), build(name, seeds=(0, 1))
    torch._dynamo.reset()  # every instance is a variant of one function
    traced = torch.compile(two._advance_once, fullgraph=True, dynamic=False, backend="aot_eager")
    one.reset()
    two.reset()
    for action in plan(one, 30, seeds=2):
        for mine, other in zip(one.step(action), traced(action), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_fused_on_the_gpu_inside_a_graph_equals_eager_on_the_cpu(name):
    """Every step begins in the same state, so float32 physics shows only a step's rounding."""
    cpu, gpu = (build(name, seeds=(0, 4), envs=50, device=d) for d in ("cpu", "cuda"))
    exact = cpu.spec.dtype == torch.bool or name.startswith("tmaze")

    def agree(mine, other):
        pairs = list(zip(mine, (field.cpu() for field in other), strict=True))
        (obs, seen), (reward, paid), *flags = pairs
        assert all(torch.equal(a, b) for a, b in flags)
        torch.testing.assert_close(paid, reward, rtol=0, atol=1e-6)
        if exact:
            assert torch.equal(obs, seen)
        else:
            torch.testing.assert_close(seen, obs, rtol=0, atol=1e-5)

    agree(cpu.reset(), gpu.reset())
    actions = plan(cpu, 230, seeds=2)
    given, graph = torch.zeros_like(actions[0]).cuda(), torch.cuda.CUDAGraph()
    for action in actions[:3]:
        gpu.load_state_dict(cpu.state_dict())
        agree(cpu.step(action), gpu.step(action.cuda()))
    with torch.cuda.graph(graph):
        out = gpu.step(given)
    for action in actions[3:]:
        if not exact:
            gpu.load_state_dict(cpu.state_dict())
        given.copy_(action)
        graph.replay()
        agree(cpu.step(action), out)
