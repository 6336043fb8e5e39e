"""Replay is compared with a list of all rows; sampling with the set of all valid starts."""

import math
from typing import Any

import pytest
import torch
from draws import draws

from cerl import draw
from cerl.data import EnvSpec, Row
from cerl.replay import Replay

CPU = torch.device("cpu")
MEMBERS = 4


def spec(envs, *observation, dtype=torch.int32):
    return EnvSpec("scripted", observation or (3,), dtype, 5, envs, 1, True, True)


def make(seeds, envs, rows, **options):
    keys = draw.seed_keys(seeds)
    return Replay(spec(envs), keys=keys, capacity=rows * envs, device=CPU, **options)


def history(seeds, envs, count, *, end=0.2, member=None, seed=0):
    """Rows of `count` time indices; an observation is (seed, time, environment)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (seeds, envs)
    rows = []
    for t in range(count):
        place = [[(s, t, e) for e in range(envs)] for s in range(seeds)]
        drawn = torch.randint(0, MEMBERS, shape, generator=generator)
        rows.append(
            Row(
                obs=torch.tensor(place, dtype=torch.int32),
                action=torch.randint(0, 5, shape, generator=generator),
                reward=torch.randn(shape, generator=generator),
                terminated=torch.rand(shape, generator=generator) < 0.1,
                real=torch.rand(shape, generator=generator) >= end,
                member=drawn if member is None else member(t, shape),
            )
        )
    return rows


def fill(ring, rows):
    for row in rows:
        ring.add(row)
    return ring


def valid_starts(rows, s, *, capacity, context, ahead):
    """(time, environment) of every row whose window lies in a ring of `capacity` time indices."""
    total = len(rows)
    oldest = max(0, total - capacity)
    return {
        (t, e)
        for t in range(oldest, total)
        for e in range(rows[t].real.shape[1])
        if bool(rows[t].real[s, e]) and t - context >= oldest and t + ahead < total
    }


def sampled(ring, steps, **options):
    return [draws(ring, step=torch.tensor(k), **options) for k in range(steps)]


def starts(windows, s, m, envs):
    """(time, environment) of every slot that found a row, from the windows' row ids."""
    ids = torch.cat([w.row[s, m][w.weight[s, m] > 0] for w in windows]).tolist()
    return [divmod(k, envs) for k in ids]


@pytest.mark.parametrize("count", [6, 7, 8, 40])
@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("context, ahead", [(0, 1), (2, 3)])
def test_windows_hold_the_rows_that_were_added(count, envs, context, ahead):
    rows = history(2, envs, count)
    ring = fill(make((0, 1), envs, 7), rows)
    window = draws(ring, step=torch.tensor(3), batch=64, context=context, ahead=ahead, members=2)
    assert window.obs.shape == (2, 2, 64, context + 1 + ahead, 3)
    assert window.row.shape == window.weight.shape == (2, 2, 64)
    for s in range(2):
        valid = valid_starts(rows, s, capacity=7, context=context, ahead=ahead)
        assert bool((window.weight[s] > 0).any()) == bool(valid)
        for m in range(2):
            for b in range(64):
                if not float(window.weight[s, m, b]):
                    continue
                t, e = divmod(int(window.row[s, m, b]), envs)
                for w in range(context + 1 + ahead):
                    model = rows[t - context + w]
                    for name in Row._fields:
                        got, want = getattr(window, name)[s, m, b, w], getattr(model, name)[s, e]
                        assert torch.equal(got, want), (name, s, m, b, w)


@pytest.mark.parametrize("count, capacity", [(9, 30), (30, 30), (31, 30), (97, 30)])
@pytest.mark.parametrize("context, ahead", [(0, 1), (3, 2)])
def test_learnt_rows_are_exactly_the_valid_starts_uniformly(count, capacity, context, ahead):
    envs = 2
    rows = history(2, envs, count)
    ring = fill(make((0, 1), envs, capacity), rows)
    windows = sampled(ring, 20, batch=500, context=context, ahead=ahead, candidates=16)
    for s in range(2):
        valid = valid_starts(rows, s, capacity=capacity, context=context, ahead=ahead)
        drawn = starts(windows, s, 0, envs)
        assert set(drawn) == valid
        expected = len(drawn) / len(valid)
        chi = sum((drawn.count(place) - expected) ** 2 / expected for place in valid)
        freedom = len(valid) - 1
        assert abs(chi - freedom) < 4.5 * math.sqrt(2 * freedom) + 1


def share(ids, truth):
    return sum(truth[k] for k in ids) / len(ids)


@pytest.mark.parametrize("count", [25, 30, 95], ids=["filling", "full", "overwritten"])
@pytest.mark.parametrize("batches", ["own", "disjoint"])
def test_owner_restricted_batches_hold_only_their_owners_rows(count, batches):
    envs, context, ahead, capacity = 2, 1, 2, 30
    rows = history(2, envs, count)
    ring = fill(make((0, 1), envs, capacity), rows)
    options: dict[str, Any] = dict(batch=60, context=context, ahead=ahead, candidates=128)
    windows = sampled(ring, 20, members=MEMBERS, batches=batches, **options)
    for s in range(2):
        valid = valid_starts(rows, s, capacity=capacity, context=context, ahead=ahead)
        mine = [set(starts(windows, s, m, envs)) for m in range(MEMBERS)]
        assert set().union(*mine) == valid
        assert sum(map(len, mine)) == len(valid)  # no row has two owners
        if batches == "own":
            for m in range(MEMBERS):
                assert mine[m] == {(t, e) for t, e in valid if int(rows[t].member[s, e]) == m}
    assert all(float(w.weight.mean()) == 1 for w in windows)


@pytest.mark.slow
def test_disjoint_owners_are_fixed_for_a_rows_life_and_even():
    envs, capacity = 2, 400
    rows = history(1, envs, 900, end=0.0)
    options: dict[str, Any] = dict(batch=400, context=0, ahead=1, candidates=64, members=MEMBERS)
    owners: dict[tuple[int, int], int] = {}
    ring = make((0,), envs, capacity)
    for t, row in enumerate(rows):
        ring.add(row)
        if t % 100 == 99:
            for window in sampled(ring, 4, batches="disjoint", **options):
                for m in range(MEMBERS):
                    for place in starts([window], 0, m, envs):
                        assert owners.setdefault(place, m) == m
    for (t, e), m in owners.items():
        zero = torch.zeros(1, 1, dtype=torch.int64)
        hashed = draw.bits(ring.keys, draw.OWNER, t * envs + e, zero)
        assert int(hashed) * MEMBERS // 2**32 == m
    sizes = [list(owners.values()).count(m) / len(owners) for m in range(MEMBERS)]
    limit = 4.5 * math.sqrt(3 / 16 / len(owners))
    assert sizes == pytest.approx([0.25] * MEMBERS, abs=limit)


def test_independent_batches_differ_and_shared_ones_are_one():
    ring = fill(make((0, 1), 2, 50), history(2, 2, 50))
    options: dict[str, Any] = dict(batch=32, context=0, ahead=1, step=torch.tensor(0))
    apart = draws(ring, members=3, batches="independent", **options)
    assert not torch.equal(apart.row[:, 0], apart.row[:, 1])
    assert not torch.equal(apart.row[0], apart.row[1])
    assert draws(ring, members=1, **options).row.shape == (2, 1, 32)
    later = draws(ring, members=3, batches="independent", **{**options, "step": torch.tensor(1)})
    assert not torch.equal(apart.row, later.row)


def test_only_the_asked_share_of_updates_is_owner_restricted():
    envs, count = 2, 60
    # member 0 generated all but the rows of environment 1
    rows = history(1, envs, count, member=lambda t, shape: torch.tensor([[0, 1]]))
    ring = fill(make((0,), envs, 40), rows)
    options: dict[str, Any] = dict(batch=16, context=0, ahead=1, members=2, candidates=32)
    restricted = 0
    for window in sampled(ring, 600, batches="own", probability=0.3, **options):
        acted = window.member[0, :, :, 0]
        if torch.equal(window.row[0, 0], window.row[0, 1]):
            assert {0, 1} == set(acted.flatten().tolist())
            continue
        restricted += 1
        assert bool((acted[0] == 0).all()) and bool((acted[1] == 1).all())
    assert restricted / 600 == pytest.approx(0.3, abs=4.5 * 0.458 / math.sqrt(600))


def test_slots_that_find_no_row_weigh_nothing_and_are_counted():
    rows = history(
        2, 1, 40, end=0.0, member=lambda t, shape: torch.tensor([[0], [t % 10 == 3]]).long()
    )
    ring = fill(make((0, 1), 1, 40), rows)
    options: dict[str, Any] = dict(batch=50, context=0, ahead=1, candidates=2)
    windows = sampled(ring, 10, members=2, batches="own", **options)
    lost = torch.stack([(w.weight == 0).sum((1, 2)) for w in windows]).sum(0)
    assert ring.misses.tolist() == lost.tolist()
    assert int(lost[0]) == 500  # member 1 of seed 0 never acted
    # member 1 owns 4 of the 39 starts, member 0 the others: both draws miss 403 and 5 of 500 slots
    assert int(lost[1]) == pytest.approx(408, abs=4.5 * 9.2)
    for window in windows:
        found = window.weight > 0
        assert bool((window.member[..., 0] == torch.arange(2).view(1, 2, 1))[found].all())
    blank = fill(make((0,), 1, 20), history(1, 1, 20, end=1.1))
    assert float(draws(blank, step=torch.tensor(0), **options).weight.sum()) == 0
    assert blank.misses.tolist() == [50]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_nothing_is_learnt_before_a_whole_window_is_there(count):
    ring = fill(make((0,), 1, 20), history(1, 1, count, end=0.0))
    window = draws(ring, step=torch.tensor(0), batch=10, context=2, ahead=1)
    assert float(window.weight.mean()) == (1.0 if count == 4 else 0.0)
    assert window.row.tolist() == [[[2] * 10]] or count < 4


def test_row_ids_are_the_absolute_place_of_a_row_for_its_whole_life():
    rows, ring, ids = history(1, 2, 90, end=0.0), make((0,), 2, 30), {}
    for t, row in enumerate(rows):
        ring.add(row)
        if t < 10:
            continue
        window = draws(ring, step=torch.tensor(t), batch=64, context=1, ahead=1)
        for k, place in zip(
            window.row[0, 0].tolist(), window.obs[0, 0, :, 1].tolist(), strict=True
        ):
            assert ids.setdefault(k, place) == place
    assert len(ids) > 100 and len({tuple(p) for p in ids.values()}) == len(ids)


def test_a_seed_samples_the_same_rows_alone_and_among_others():
    rows = history(3, 2, 60)
    together = fill(make((4, 7, 1), 2, 40), rows)
    alone = fill(make((7,), 2, 40), [Row(*(x[1:2] for x in row)) for row in rows])
    options: dict[str, Any] = dict(
        batch=32, context=1, ahead=2, members=2, batches="own", probability=0.5, candidates=16
    )
    for a, b in zip(sampled(together, 6, **options), sampled(alone, 6, **options), strict=True):
        assert torch.equal(a.row[1:2], b.row) and torch.equal(a.weight[1:2], b.weight)
        assert torch.equal(a.reward[1:2], b.reward)


def test_shares_are_the_members_part_of_the_real_rows_in_the_ring():
    for count in (12, 20, 53):
        rows = history(2, 3, count)
        ring = fill(make((0, 1), 3, 20), rows)
        got = ring.shares(MEMBERS)
        for s in range(2):
            kept = [
                int(row.member[s, e])
                for row in rows[-20:]
                for e in range(3)
                if bool(row.real[s, e])
            ]
            want = [kept.count(m) / len(kept) for m in range(MEMBERS)]
            assert got[s].tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reward=torch.zeros(2, 1)), r"expected reward of shape \[2, 2\].* got \[2, 1\]"),
        (dict(obs=torch.zeros(2, 2, 3)), "expected obs of torch.int32, got torch.float32"),
        (dict(real=torch.zeros(2, 2)), "expected real of torch.bool, got torch.float32"),
        (dict(member=torch.zeros(2, 2)), "expected member of torch.int16, got torch.float32"),
    ],
)
def test_a_first_row_that_does_not_fit_is_refused(change, message):
    ring, row = make((0, 1), 2, 5), history(2, 2, 1)[0]
    with pytest.raises(ValueError, match=message):
        ring.add(row._replace(**change))
    ring.add(row)
    assert int(ring.total) == 1


def test_a_capacity_below_two_steps_is_refused():
    with pytest.raises(ValueError, match="7 rows hold fewer than 2 steps of 4 envs"):
        Replay(spec(4), keys=draw.seed_keys([0]), capacity=7, device=CPU)


def test_rows_in_host_memory_sample_the_same():
    rows = history(2, 2, 60)
    rings = [fill(make((0, 1), 2, 40, placement=place), rows) for place in ("device", "host")]
    options: dict[str, Any] = dict(
        batch=32, context=1, ahead=2, members=2, batches="disjoint", candidates=32
    )
    for a, b in zip(*(sampled(ring, 3, **options) for ring in rings), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_a_saved_ring_is_restored_in_place():
    rows = history(2, 2, 60)
    first = fill(make((0, 1), 2, 40), rows[:50])
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second = make((0, 1), 2, 40)
    places = {name: value.data_ptr() for name, value in second.state_dict().items()}
    second.load_state_dict(saved)
    assert places == {name: value.data_ptr() for name, value in second.state_dict().items()}
    for ring in (first, second):
        fill(ring, rows[50:])
    options: dict[str, Any] = dict(batch=32, context=1, ahead=2)
    for a, b in zip(sampled(first, 3, **options), sampled(second, 3, **options), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_gpu_samples_what_the_cpu_samples(placement):
    rows, device = history(2, 2, 60), torch.device("cuda")
    plain = fill(make((0, 1), 2, 40), rows)
    ring = Replay(
        spec(2),
        keys=draw.seed_keys((0, 1), device=device),
        capacity=80,
        device=device,
        placement=placement,
    )
    fill(ring, [Row(*(x.to(device) for x in row)) for row in rows])
    assert ring.obs.is_pinned() == (placement == "host")
    for batches in ("independent", "own", "disjoint"):
        options: dict[str, Any] = dict(batch=32, context=1, ahead=2, members=2, candidates=32)
        options |= dict(batches=batches, probability=0.5)
        for k in range(4):
            ours = draws(ring, step=torch.tensor(k, device=device), **options)
            for x, y in zip(ours, draws(plain, step=torch.tensor(k), **options), strict=True):
                assert x.is_cuda and torch.equal(x.cpu(), y)


def test_continuous_actions_are_checked():
    flat = spec(2, 1, dtype=torch.float32)._replace(continuous=True, actions=6)
    ring = Replay(flat, keys=draw.seed_keys([0, 1]), capacity=22, device=CPU)
    assert ring.action.shape == (2, 11, 2, 6)
    zeros = torch.zeros(2, 2)
    action, never = flat.action(2, 2, device=CPU), zeros.bool()
    row = Row(zeros.unsqueeze(2), action, zeros, never, never, zeros.long())
    with pytest.raises(ValueError, match=r"action of shape \[2, 2, 6\].* got \[2, 2\]"):
        ring.add(row._replace(action=zeros))
    with pytest.raises(ValueError, match="action of torch.float32, got torch.int64"):
        ring.add(row._replace(action=row.action.long()))
    ring.add(row)
