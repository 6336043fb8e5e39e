"""Counter-based draws against a plain-Python hash, stored values, moments."""

import math

import pytest
import torch

from cerl import draw
from cerl.kernels import random

M64 = (1 << 64) - 1


def mixed(z):
    """Finaliser of splitmix64 (Steele et al. 2014) on Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def slow_bits(seed, salt, purpose, step, index):
    key = mixed((mixed((seed + 1) & M64) + salt * 0xA0761D6478BD642F) & M64)
    z = key + step * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95
    z += mixed(purpose + 1) * 0xA0761D6478BD642F
    return mixed(z & M64) >> 32


@pytest.mark.parametrize("seed, salt", [(0, 0), (7, 1), (2**63 - 1, 5)])
def test_bits_equal_the_hash_on_python_integers(seed, salt):
    key = draw.seed_keys([seed], salt=salt)
    index = torch.tensor([[0, 1, 2, 99, 12_345_678, 2**40]])
    for purpose in (draw.INIT, draw.SAMPLE, draw.NOISE):
        for step in (0, 1, 50_000_000, 2**50):
            got = draw.bits(key, purpose, step, index)[0].tolist()
            assert got == [slow_bits(seed, salt, purpose, step, k) for k in index[0].tolist()]


def test_stored_values_so_that_the_streams_can_never_change_silently():
    keys = draw.seed_keys([0, 1], salt=1)
    assert keys.tolist() == PINNED["keys"]
    index = torch.arange(3).view(1, 3)
    assert draw.bits(keys, draw.SAMPLE, 5, index).tolist() == PINNED["bits"]
    assert draw.uniform(keys, draw.EXPLORE, 0, (2,)).tolist() == PINNED["uniform"]
    assert draw.randint(keys, draw.OWNER, 9, (4,), high=1_000_000).tolist() == PINNED["randint"]
    torch.testing.assert_close(
        draw.normal(keys, draw.NOISE, 1, (2,)), torch.tensor(PINNED["normal"]), atol=1e-6, rtol=0
    )


PINNED = {
    "keys": [-542917162946457667, -7183880976137089157],
    "bits": [[3284088234, 3011901420, 3592496390], [866409996, 2426182005, 1962409054]],
    "uniform": [
        [0.08540862798690796, 0.8845019340515137],
        [0.8243724703788757, 0.42596209049224854],
    ],
    "randint": [[417007, 108590, 801480, 143409], [425, 69426, 19410, 808831]],
    "normal": [
        [0.9070646166801453, 0.024590177461504936],
        [-0.23100948333740234, -0.5511112809181213],
    ],
}


@pytest.mark.parametrize(
    "numbers",
    [
        lambda keys: draw.uniform(keys, draw.SAMPLE, 3, (4, 5)),
        lambda keys: draw.normal(keys, draw.NOISE, 3, (4, 5)),
        lambda keys: draw.randint(keys, draw.ACTION, 3, (4, 5), high=11),
        lambda keys: draw.bits(keys, draw.MASK, torch.tensor(8), torch.arange(6).view(1, 6)),
    ],
)
def test_a_seed_draws_the_same_numbers_alone_and_among_others(numbers):
    together = numbers(draw.seed_keys([4, 2, 9]))
    for position, seed in enumerate((4, 2, 9)):
        assert torch.equal(together[position : position + 1], numbers(draw.seed_keys([seed])))


def test_the_step_may_be_an_int_a_tensor_or_one_per_coordinate():
    keys, index = draw.seed_keys([1, 2]), torch.arange(5).view(1, 5)
    plain = draw.bits(keys, draw.OWNER, 77, index)
    assert torch.equal(plain, draw.bits(keys, draw.OWNER, torch.tensor(77), index))
    steps = torch.tensor([77, 78, 79]).view(1, 3, 1)
    each = draw.bits(keys, draw.OWNER, steps, index.view(1, 1, 5))
    assert each.shape == (2, 3, 5)
    assert torch.equal(each[:, 0], plain)
    assert torch.equal(each[:, 2], draw.bits(keys, draw.OWNER, 79, index))


@pytest.mark.parametrize("step", [0, 7, 50_000_123, 2**45])
def test_uniform_randint_and_normal_are_made_of_the_bits_of_their_place(step):
    keys, shape = draw.seed_keys([1, 2]), (3, 4)
    bits = draw.bits(keys, draw.SAMPLE, step, torch.arange(12).view(1, *shape))
    for at in (step, torch.tensor(step)):
        assert torch.equal(draw.uniform(keys, draw.SAMPLE, at, shape), (bits >> 8).float() / 2**24)
        assert torch.equal(draw.randint(keys, draw.SAMPLE, at, shape, high=10), bits * 10 // 2**32)
        u = (bits >> 8).double()[..., 0::2] / 2**24, (bits >> 8).double()[..., 1::2] / 2**24
        normal = (-2 * torch.log(1 - u[0])).sqrt() * torch.cos(2 * math.pi * u[1])
        got = draw.normal(keys, draw.SAMPLE, at, (3, 2))
        torch.testing.assert_close(got.double(), normal, atol=2e-6, rtol=1e-5)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_seeds_salts_purposes_steps_and_indices_are_uncorrelated():
    count = 40_000
    limit = 4.5 / math.sqrt(count)

    def stream(seed=0, salt=0, purpose=draw.EXPLORE, step=0):
        return draw.uniform(draw.seed_keys([seed], salt=salt), purpose, step, (count,))[0].double()

    base = stream()
    others = [stream(seed=1), stream(salt=1), stream(step=1)]
    others += [stream(purpose=p) for p in range(12) if p != draw.EXPLORE]
    for other in others:
        assert abs(correlation(base, other)) < limit
    for lag in (1, 2, 3, 8, 64):
        assert abs(correlation(base[:-lag], base[lag:])) < limit
    zero, steps = torch.zeros(1, 1, dtype=torch.int64), torch.arange(count).view(1, count)
    over_steps = draw.bits(draw.seed_keys([0]), draw.EXPLORE, steps, zero)[0].double()
    assert abs(correlation(over_steps[:-1], over_steps[1:])) < limit


def test_every_bit_is_fair_and_flips_with_every_coordinate():
    keys, count = draw.seed_keys([3]), 40_000
    grid = torch.arange(count).view(1, count)
    base = draw.bits(keys, draw.SAMPLE, 10, grid)
    assert int(base.min()) >= 0 and int(base.max()) < 2**32
    limit = 4.5 * 0.5 / math.sqrt(count)
    for other in (
        torch.zeros_like(base),
        draw.bits(keys, draw.SAMPLE, 11, grid),
        draw.bits(keys, draw.SAMPLE, 10, grid + 1),
        draw.bits(draw.seed_keys([2]), draw.SAMPLE, 10, grid),
    ):
        flipped = base ^ other
        for bit in range(32):
            assert abs(float((flipped >> bit & 1).double().mean()) - 0.5) < limit, bit


def test_no_two_coordinates_of_a_run_share_a_hash_input():
    # Gauss reduction of the lattice {(a, b): a STEP + b INDEX = 0 mod 2**64}: its shortest vector
    # is the smallest change of (step, index) that draws the same number again.
    step, index = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
    u, v = (2**64, 0), (-index * pow(step, -1, 2**64) % 2**64, 1)

    def dot(a, b):
        return a[0] * b[0] + a[1] * b[1]

    while True:
        if dot(u, u) < dot(v, v):
            u, v = v, u
        turns = (2 * dot(u, v) + dot(v, v)) // (2 * dot(v, v))  # nearest integer of u.v / v.v
        if turns == 0:
            break
        u = (u[0] - turns * v[0], u[1] - turns * v[1])
    shortest = min(u, v, key=lambda w: dot(w, w))
    assert (shortest[0] * step + shortest[1] * index) % 2**64 == 0
    assert max(abs(shortest[0]), abs(shortest[1])) > 2**30  # above any step and index of a run


def test_uniform_is_uniform_in_0_1_on_a_grid_of_24_bits():
    u = draw.uniform(draw.seed_keys([5]), draw.EXPLORE, 2, (100, 1000))
    assert u.shape == (1, 100, 1000) and u.dtype == torch.float32
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert float(u.mean()) == pytest.approx(0.5, abs=4.5 * 0.2887 / math.sqrt(u.numel()))
    observed = torch.histc(u, 100, 0, 1).double()
    chi = float(((observed - 1000) ** 2 / 1000).sum())
    assert 99 - 4.5 * 14.1 < chi < 99 + 4.5 * 14.1


@pytest.mark.parametrize("high", [1, 2, 7, 1_000_000, 2**31])
def test_randint_is_the_top_of_bits_times_high_and_uniform(high):
    keys, count = draw.seed_keys([6]), 100_000
    value = draw.randint(keys, draw.SAMPLE, 4, (count,), high=high)
    bits = draw.bits(keys, draw.SAMPLE, 4, torch.arange(count).view(1, count))
    some = range(0, count, 997)
    assert [int(value[0, k]) for k in some] == [int(bits[0, k]) * high // 2**32 for k in some]
    assert int(value.min()) >= 0 and int(value.max()) < high
    assert torch.equal(value, draw.randint(keys, draw.SAMPLE, 4, (count,), high=torch.tensor(high)))
    bins = min(high, 50)
    if bins == 1:
        return
    counts = torch.bincount(value[0] * bins // high, minlength=bins).double()
    expected = torch.tensor(
        [-(-(k + 1) * high // bins) - -(-k * high // bins) for k in range(bins)]
    ).double() * (count / high)
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - (bins - 1)) < 4.5 * math.sqrt(2 * (bins - 1)) + 1


def test_normal_has_the_moments_and_tails_of_a_standard_normal():
    x = draw.normal(draw.seed_keys([8]), draw.NOISE, 0, (200_000,))[0].double()
    root = math.sqrt(x.numel())
    assert bool(x.isfinite().all())
    assert float(x.mean()) == pytest.approx(0, abs=4.5 / root)
    assert float(x.square().mean()) == pytest.approx(1, abs=4.5 * math.sqrt(2) / root)
    assert float((x**3).mean()) == pytest.approx(0, abs=4.5 * math.sqrt(15) / root)
    assert float((x**4).mean()) == pytest.approx(3, abs=4.5 * math.sqrt(96) / root)
    assert float((x.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=0.0006)
    assert abs(correlation(x[:-1], x[1:])) < 4.5 / root


@pytest.mark.parametrize("count", [1, 7, 1500])
def test_normal_kernel_agrees_with_the_definition(count):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys, step = draw.seed_keys([3, 2**40], device=device), torch.tensor(12_345, device=device)
    options = dict(offset=draw.purpose_offset(draw.POLICY), count=count)
    want = random.normal_grid(keys, step, **options, impl="reference")
    got = random.normal_grid(keys, step, **options, impl="triton")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
