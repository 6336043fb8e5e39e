"""Samplers against slow loops: who is drawn how often, what it weighs, what updates report back."""

import math
from functools import partial
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from draws import draws

from cerl import draw, training
from cerl.bench import runs
from cerl.config import PrioritisedConfig, load, of_kind
from cerl.config.contradictions import MOST_PRIORITIES
from cerl.data import EnvSpec, Row
from cerl.replay import Replay
from cerl.returns import averaging, row_errors
from cerl.sampler import (
    LARGEST,
    MOST_ROWS,
    UNIT,
    Prioritised,
    Ring,
    Sampling,
    Uniform,
    sampler_of,
)

CPU = torch.device("cpu")
SPEC = EnvSpec("numbers", (2,), torch.float32, 3, 2, 1, True, True)
MINATAR = EnvSpec("random", (4, 10, 10), torch.bool, 3, 8, 1, True, True)
ROBOT = EnvSpec("random", (17,), torch.float32, 6, 1, 1, True, False, continuous=True)
OPTIONS = PrioritisedConfig(alpha=0.7, beta=0.5, eps=0.01)


def made(seeds=(0, 1), *, rows=30, device=CPU, options=OPTIONS, **more) -> Replay:
    keys = draw.seed_keys(seeds, device=device)
    sampler = partial(Prioritised, options=options)
    return Replay(SPEC, keys=keys, capacity=2 * rows, device=device, sampler=sampler, **more)


def fill(replay: Replay, count: int, *, end=0.2, first=0, seeds: Any = slice(None)) -> Replay:
    """Adds rows that are the same for a seed whichever others there are."""
    generator = torch.Generator().manual_seed(first)
    for _ in range(count):
        real = (torch.rand(3, 2, generator=generator) >= end)[seeds]
        zero = torch.zeros(real.shape)
        row = Row(zero.unsqueeze(-1).expand(-1, -1, 2), zero.long(), zero, ~real, real, zero.long())
        replay.add(Row(*(x.to(replay.device) for x in row)))
    return replay


def prioritised(replay: Replay) -> Prioritised:
    assert isinstance(replay.sampler, Prioritised)
    return replay.sampler


def errors_at(replay: Replay, row: torch.Tensor, errors: torch.Tensor, found: Any = True) -> None:
    """Reports errors [S, K] of rows with absolute ids [S, K]."""
    window = draws(replay, step=torch.tensor(0), batch=row.shape[1], context=0, ahead=1)
    weight = torch.ones(row.shape) * torch.as_tensor(found)
    window = window._replace(row=row.unsqueeze(1), weight=weight.unsqueeze(1))
    prioritised(replay).update(window, errors.unsqueeze(1))


def with_errors(replay: Replay, *, seed=5, seeds: Any = slice(None)) -> Replay:
    """Every row of the ring was learnt from once; a row of 20 has a large error."""
    total, rows, envs = int(replay.total), replay.rows, SPEC.envs
    ids = torch.arange(max(0, total - rows) * envs, total * envs)
    errors = torch.rand(3, len(ids), generator=torch.Generator().manual_seed(seed))
    errors[:, ::20] += 3.0
    errors_at(replay, ids.expand(len(replay.keys), -1), errors[seeds])
    return replay


def priority(replay: Replay, s: int, t: int, e: int) -> float:
    place = (t % replay.rows) * SPEC.envs + e
    return float(prioritised(replay).units.flatten(1)[s, place]) / UNIT


def slow_shares(
    replay: Replay, s: int, *, context: int, ahead: int
) -> dict[tuple[int, int], float]:
    """Probability of every (time, environment), from a loop over all rows."""
    total = int(replay.total)
    oldest, found = max(0, total - replay.rows), {}
    for t in range(oldest, total):
        for e in range(SPEC.envs):
            inside = t - context >= oldest and t + ahead < total
            if inside and bool(replay.real[s, t % replay.rows, e]):
                found[t, e] = priority(replay, s, t, e)
    return {place: p / sum(found.values()) for place, p in found.items()}


@pytest.mark.parametrize("count", [9, 30, 97])
@pytest.mark.parametrize(("context", "ahead"), [(0, 1), (3, 2)])
def test_rows_are_drawn_in_proportion_to_their_priorities(count, context, ahead):
    replay = with_errors(fill(made(seeds=(0, 1, 2)), count))
    options: dict[str, Any] = dict(batch=50, context=context, ahead=ahead, candidates=64)
    windows = [draws(replay, step=torch.tensor(k), **options) for k in range(40)]
    for s in range(3):
        shares = slow_shares(replay, s, context=context, ahead=ahead)
        drawn = [divmod(k, 2) for w in windows for k in w.row[s, 0][w.weight[s, 0] > 0].tolist()]
        assert set(drawn) <= set(shares) and len(drawn) == 2_000
        chi = sum(
            (drawn.count(place) - len(drawn) * p) ** 2 / (len(drawn) * p)
            for place, p in shares.items()
        )
        freedom = len(shares) - 1
        assert abs(chi - freedom) < 4.5 * math.sqrt(2 * freedom) + 1
    assert replay.misses.tolist() == [0, 0, 0]


@pytest.mark.parametrize("members", [1, 3])
def test_weights_correct_for_the_probability_up_to_the_largest_of_the_batch(members):
    replay = with_errors(fill(made(), 50, seeds=slice(2)), seeds=slice(2))
    options: dict[str, Any] = dict(batch=32, context=1, ahead=1, members=members)
    for k in range(5):
        window = draws(replay, step=torch.tensor(k), **options, batches="independent")
        assert window.weight.shape == (2, members, 32)
        for s in range(2):
            shares = slow_shares(replay, s, context=1, ahead=1)
            for m in range(members):
                places = [divmod(row, 2) for row in window.row[s, m].tolist()]
                # (N P(i)) ** -beta, as the paper has it; N is the number of rows to draw from.
                weights = [(len(shares) * shares[place]) ** -OPTIONS.beta for place in places]
                want = torch.tensor([w / max(weights) for w in weights])
                assert (window.weight[s, m] - want).abs().max() < 1e-6


def test_slots_that_find_no_row_weigh_nothing_and_change_nothing():
    replay = fill(made((0,)), 30, seeds=slice(1))
    replay.real[0, 3:] = False  # their priorities are as they were
    window = draws(replay, step=torch.tensor(0), batch=200, context=0, ahead=1, candidates=2)
    missed = window.weight[0, 0] == 0
    assert 0 < int(missed.sum()) < 200 and replay.misses.tolist() == [int(missed.sum())]
    before = prioritised(replay).units.clone()
    prioritised(replay).update(window, torch.full((1, 1, 200), 7.0))
    changed = (prioritised(replay).units != before).flatten(1).nonzero()[:, 1]
    assert set(changed.tolist()) == set((window.row[0, 0][~missed] % 60).tolist())
    empty = draws(made((0,)), step=torch.tensor(0), batch=9, context=0, ahead=1)
    assert float(empty.weight.sum()) == 0


def test_new_rows_have_the_largest_priority_and_rows_that_are_not_real_none():
    replay = fill(made(), 40, seeds=slice(2))
    for s in range(2):
        for t in range(10, 40):
            for e in range(2):
                real = bool(replay.real[s, t % 30, e])
                assert priority(replay, s, t, e) == float(real)
    errors_at(replay, torch.tensor([[60], [61]]), torch.tensor([[4.0], [0.0]]))
    assert priority(replay, 0, 30, 0) == pytest.approx(4.01**0.7, rel=1e-6)
    assert priority(replay, 1, 30, 1) == pytest.approx(0.01**0.7, rel=1e-5)
    fill(replay, 1, end=0.0, first=1, seeds=slice(2))  # over the row of time 10
    assert [priority(replay, s, 40, 0) for s in range(2)] == [
        pytest.approx(4.01**0.7, rel=1e-6),
        1.0,
    ]


def test_a_row_learnt_twice_in_a_batch_gets_the_larger_priority():
    for order in ([0, 1, 2], [2, 1, 0]):
        replay = fill(made((0,)), 30, end=0.0, seeds=slice(1))
        rows, errors = torch.tensor([[20, 20, 21]]), torch.tensor([[0.5, 2.0, 0.1]])
        errors_at(replay, rows[:, order], errors[:, order])
        assert priority(replay, 0, 10, 0) == pytest.approx(2.01**0.7, rel=1e-6)
        assert priority(replay, 0, 10, 1) == pytest.approx(0.11**0.7, rel=1e-6)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_errors_that_are_not_finite_count_as_the_largest_and_stay_with_their_seed(error):
    replay = fill(made(), 30, end=0.0, seeds=slice(2))
    rows = torch.tensor([[20, 21], [20, 21]])
    errors_at(replay, rows, torch.tensor([[1.0, 0.3], [error, 2.0]]))
    assert priority(replay, 1, 10, 0) == 1.0
    errors_at(replay, rows[:, :1], torch.tensor([[1.0], [error]]))
    assert priority(replay, 1, 10, 0) == pytest.approx(2.01**0.7, rel=1e-6)
    assert priority(replay, 0, 10, 0) == pytest.approx(1.01**0.7, rel=1e-6)
    errors_at(replay, rows[:, :1], torch.full((2, 1), 1e30))
    assert priority(replay, 1, 10, 0) == LARGEST / UNIT


def test_a_seed_draws_the_same_rows_alone_and_among_others():
    together, alone = made((4, 7, 1)), made((7,))
    with_errors(fill(together, 50))
    with_errors(fill(alone, 50, seeds=slice(1, 2)), seeds=slice(1, 2))
    for k in range(4):
        options: dict[str, Any] = dict(step=torch.tensor(k), batch=16, context=1, ahead=2)
        ours, theirs = draws(together, **options), draws(alone, **options)
        assert torch.equal(ours.row[1:2], theirs.row)
        assert torch.equal(ours.weight[1:2], theirs.weight)


def test_a_sampler_without_rows_forgets_and_one_with_rows_takes_over_what_was_saved():
    first = with_errors(fill(made(), 50, seeds=slice(2)), seeds=slice(2))
    saved = {name: value.clone() for name, value in first.sampler.state_dict().items()}
    second = fill(made(), 50, seeds=slice(2))
    places = [value.data_ptr() for value in second.sampler.state_dict().values()]
    second.load_sampler(saved)
    assert places == [value.data_ptr() for value in second.sampler.state_dict().values()]
    assert torch.equal(prioritised(first).units, prioritised(second).units)
    assert torch.equal(prioritised(first).largest, prioritised(second).largest)
    empty = made()
    empty.load_sampler(saved)
    assert not prioritised(empty).units.any()
    assert prioritised(empty).largest.tolist() == [UNIT, UNIT]


def test_host_memory_samples_the_same():
    rings = [made(placement="device"), made(placement="host")]
    for ring in rings:
        with_errors(fill(ring, 50, seeds=slice(2)), seeds=slice(2))
    windows = [draws(ring, step=torch.tensor(3), batch=32, context=1, ahead=1) for ring in rings]
    assert all(torch.equal(a, b) for a, b in zip(*windows, strict=True))


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws():
    device = torch.device("cuda")
    plain, ring = made(), made(device=device)
    with_errors(fill(plain, 50, seeds=slice(2)), seeds=slice(2))
    fill(ring, 50, seeds=slice(2))
    ring.load_sampler(plain.sampler.state_dict())
    for k in range(8):
        options: dict[str, Any] = dict(batch=64, context=1, ahead=2)
        ours = draws(ring, step=torch.tensor(k, device=device), **options)
        theirs = draws(plain, step=torch.tensor(k), **options)
        assert torch.equal(ours.row.cpu(), theirs.row)
        assert (ours.weight.cpu() - theirs.weight).abs().max() < 1e-6


def test_the_limit_of_rows_is_that_of_the_options():
    assert MOST_PRIORITIES == MOST_ROWS and MOST_ROWS * LARGEST < 2**63


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("name", ["dqn", "quantile", "sac"])
def test_a_loss_with_errors_is_one_graph_for_the_compiler(name):
    learner = learner_of(name)
    window, dice = learner.sample(), learner.agent.dice(learner.keys, learner.updates)
    compiled = torch.compile(losses_of, fullgraph=True, dynamic=False, backend="eager")
    ours, theirs = compiled(learner, window, dice), losses_of(learner, window, dice)
    assert ours.errors is not None and theirs.errors is not None
    assert torch.equal(ours.members, theirs.members) and torch.equal(ours.errors, theirs.errors)


@pytest.mark.slow
def test_a_million_rows_are_drawn_in_proportion_too():
    rows, envs = 125_000, 8
    real = torch.ones(1, rows, envs, dtype=torch.bool)
    ring = Ring(draw.seed_keys([0]), torch.tensor(rows), real, torch.zeros_like(real).short())
    sampler = sampler_of(OPTIONS)(ring)
    assert isinstance(sampler, Prioritised)
    sampler.added(torch.arange(rows))
    sampler.units.flatten(1)[:, : rows * envs].copy_(torch.arange(1, rows * envs + 1))
    sampling = Sampling(50_000, 0, 1, False, 1, "shared", 1.0, 1)
    drawn = sampler.pick(sampling, step=torch.tensor(0))
    place = (drawn.row * envs + drawn.env)[drawn.hit].double() / (rows * envs)
    # Of a density that grows like x on [0, 1] the median is the root of a half.
    assert float((place < math.sqrt(0.5)).double().mean()) == pytest.approx(
        0.5, abs=4.5 * 0.5 / math.sqrt(50_000)
    )


# The loss, and the errors that go back.

LEARNERS = {
    "dqn": ("minatar/prioritised", MINATAR, {"agent.loss": "mse"}),
    "dqn of an ensemble": ("minatar/prioritised", MINATAR, {"ensemble.members": 3}),
    "cerl": ("minatar/prioritised", MINATAR, {"ensemble": {"members": 3, "heads": "cerl"}}),
    "independent batches": (
        "minatar/prioritised",
        MINATAR,
        {"ensemble.members": 3, "loss.batches": "independent"},
    ),
    "quantile": (
        "minatar/qrdqn",
        MINATAR,
        {"replay.sampler.name": "prioritised", "agent.quantiles": 5, "ensemble.members": 2},
    ),
    "sac": ("mujoco/cerl", ROBOT, {"replay.sampler.name": "prioritised", "ensemble.members": 2}),
    "weighted backups": (
        "mujoco/sunrise",
        ROBOT,
        {"replay.sampler.name": "prioritised", "ensemble.members": 2},
    ),
}
GRU = {"name": "gru", "width": 8, "context": 2, "learnt": 4}
WINDOWS = {"encoder": GRU, "net": {"channels": [], "kernels": [], "strides": [], "hidden": [12]}}
LEARNERS["windows"] = ("minatar/prioritised", MINATAR, WINDOWS)
SIX: dict[str, Any] = {
    "seeds": (0, 1),
    "replay.batch": 6,
    "replay.capacity": 2_000,
    "replay.start": 1_000,
}


def learner_of(name, **more):
    preset, spec, changes = LEARNERS[name]
    changes = {**SIX, **changes, **more, "env.envs": spec.envs}
    return runs.filled_learner(load(preset, changes), spec, CPU)


def losses_of(learner, window, dice):
    return learner.stages[0].loss(
        learner.net, learner.target, window, mask=None, dice=dice, prepared=None
    )


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "windows"])
def test_the_loss_is_the_mean_over_rows_each_times_its_weight(name):
    learner = learner_of(name)
    for target in learner.target.parameters():
        target.mul_(0.9)
    window, dice = learner.sample(), learner.agent.dice(learner.keys, learner.updates)
    weight = torch.rand(window.weight.shape) * 0.3
    weight[:, :, 2] = 0.0
    got = losses_of(learner, window._replace(weight=weight), dice).members
    want = torch.zeros_like(got)
    for b in range(6):
        alone = torch.zeros_like(weight)
        alone[:, :, b] = 1.0
        row = losses_of(learner, window._replace(weight=alone), dice).members
        real = window.real[..., learner.net.reader.context].float()
        count = (real * (weight > 0)).sum(2).clamp(min=1)
        want = want + row * weight[:, :, b] / count
    assert (got - want).detach().abs().max() < 1e-5 * want.detach().abs().max()


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("batches", ["shared", "independent"])
def test_reported_errors_are_the_roots_of_squared_losses(members, batches):
    learner = learner_of("dqn", **{"ensemble.members": members, "loss.batches": batches})
    window = learner.sample()
    errors = losses_of(learner, window, None).errors
    assert errors is not None and errors.shape == window.weight.shape
    for b in range(6):
        alone = torch.zeros_like(window.weight)
        alone[:, :, b] = 1.0
        own = losses_of(learner, window._replace(weight=alone), None).members.sqrt()  # [S, N]
        want = own if window.weight.shape[1] > 1 else own.mean(1, keepdim=True)
        assert (errors[:, :, b] - want).abs().max() < 1e-5


def test_errors_of_rows_by_hand():
    # Two members, two slots, two learnt rows, two heads; only the first learnt row counts.
    error = torch.tensor([[[1.0, -3.0], [9.0, 9.0]], [[5.0, 0.0], [9.0, 9.0]]])
    error = torch.stack([error, -2 * error]).unsqueeze(0)
    assert row_errors(error, batches=2).tolist() == [[[2.0, 2.5], [4.0, 5.0]]]
    assert row_errors(error, batches=1).tolist() == [[[3.0, 3.75]]]
    weight = torch.tensor([0.5, 0.0, 1.0]).view(1, 1, 3, 1)
    assert averaging(weight).flatten().tolist() == [0.25, 0.0, 0.5]


@pytest.mark.parametrize("name", ["cerl", "quantile", "independent batches", "sac", "windows"])
def test_an_update_tells_the_sampler_how_wrong_its_rows_were(name):
    learner = learner_of(name)
    options = of_kind(learner.config.replay.sampler, PrioritisedConfig)
    with torch.no_grad():
        window = learner.sample()
        dice = learner.agent.dice(learner.keys, learner.updates)
        errors = losses_of(learner, window, dice).errors
    assert errors is not None
    learner.update()
    units = prioritised(learner.replay).units.flatten(1)
    size = learner.replay.rows * learner.replay.envs
    want = torch.zeros(2, size, dtype=torch.float64)
    for s in range(2):
        for m in range(window.row.shape[1]):
            for b in range(6):
                place = int(window.row[s, m, b]) % size
                p = (float(errors[s, m, b]) + options.eps) ** options.alpha
                want[s, place] = max(float(want[s, place]), p)
    learnt = want > 0
    assert (units[:, :size].double() / UNIT - want)[learnt].abs().max() < 1e-5
    real = learner.replay.real.flatten(1)
    assert bool((units[:, :size] == UNIT * real)[~learnt].all())


def test_uniform_updates_report_nothing():
    learner = learner_of("dqn", **{"replay.sampler": {"name": "uniform"}})
    assert isinstance(learner.replay.sampler, Uniform)
    assert losses_of(learner, learner.sample(), None).errors is None
    assert not learner.replay.sampler.state_dict()


@pytest.mark.slow
def test_prioritised_double_dqn_learns_catch(tmp_path):
    changes = {
        **{"replay.sampler.name": "prioritised", "seeds": (0, 1), "device": "cpu"},
        **{"out": str(tmp_path), "schedule.steps": 12_000, "eval.every": 12_000},
    }
    folder = training.train(load("catch/ddqn", changes))
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    scores = [
        row["return"] for row in rows if (row["step"], row["policy"]) == (12_000, "individual")
    ]
    assert len(scores) == 2 and min(scores) > 0.8  # chance is about -0.6
