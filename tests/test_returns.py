"""n-step returns and losses are compared with loops over single rows and numbers by hand."""

import random
from typing import Any

import pytest
import torch

from cerl import returns


def episodes(rows, seed):
    """One row after another as an environment gives them; what must not be read holds NaN."""
    rng, reward, terminated, real = random.Random(seed), [], [], []
    while len(reward) < rows:
        length, terminal = rng.randint(1, 6), rng.random() < 0.5
        for k in range(length):
            reward.append(rng.gauss(0, 1))
            terminated.append(terminal and k == length - 1)
            real.append(True)
        reward.append(float("nan"))
        terminated.append(False)
        real.append(False)
    return reward[:rows], terminated[:rows], real[:rows]


def slow_return(reward, terminated, real, t, *, n, gamma):
    """(sum, discount, k) of the row t, straight from the definition."""
    total, k = 0.0, 0
    while True:
        total += gamma**k * reward[t + k]
        k += 1
        if terminated[t + k - 1]:
            return total, 0.0, k
        if k == n or not real[t + k]:
            return total, gamma**k, k


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("learnt", [1, 4])
def test_n_step_equals_a_loop_over_rows(n, learnt):
    gammas, first, batch = [0.99, 0.9, 0.5, 1.0], 2, 60
    width = first + learnt + n
    data = [episodes(width, seed) for seed in range(batch)]
    reward, terminated, real = (
        torch.tensor([d[k] for d in data]).view(2, 1, 30, width) for k in range(3)
    )
    total, discount, steps = returns.n_step(
        reward, terminated, real, first=first, learnt=learnt, n=n, gamma=torch.tensor(gammas)
    )
    assert total.shape == discount.shape == (2, 1, 30, learnt, 4) and steps.shape == (
        2,
        1,
        30,
        learnt,
    )
    checked, ks = 0, set()
    for b, (r, ended, alive) in enumerate(data):
        for t in range(learnt):
            if not alive[first + t]:
                continue
            for j, gamma in enumerate(gammas):
                want = slow_return(r, ended, alive, first + t, n=n, gamma=gamma)
                at = (b // 30, 0, b % 30, t)
                got = float(total[at][j]), float(discount[at][j]), int(steps[at])
                assert got == pytest.approx(want, abs=1e-5), (b, t, j)
                checked += 1
                ks.add(got[2])
    assert checked > 100 and ks == set(range(1, n + 1))


def test_n_step_by_hand():
    # rewards 1, 2, 4; the third ends the episode; then the last observation and a new episode
    reward = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0, 16.0])
    real = torch.tensor([True, True, True, False, True, True])
    terminal = torch.tensor([False, False, True, False, False, False])
    half = torch.tensor([0.5])

    def at(row, n, ended=terminal):
        answer = returns.n_step(reward, ended, real, first=row, learnt=1, n=n, gamma=half)
        return tuple(x.item() for x in answer)

    assert at(0, 1) == (1.0, 0.5, 1)
    assert at(0, 2) == (2.0, 0.25, 2)
    assert at(0, 3) == (3.0, 0.0, 3)
    assert at(0, 5) == (3.0, 0.0, 3)
    truncated = torch.zeros_like(terminal)
    assert at(0, 3, truncated) == (3.0, 0.125, 3)
    assert at(1, 3, truncated) == (4.0, 0.25, 2)
    assert at(2, 3, truncated) == (4.0, 0.5, 1)


@pytest.mark.parametrize("n", [1, 3])
def test_a_window_without_the_bootstrap_row_is_refused(n):
    rows = torch.zeros(4 + n)
    flags = torch.zeros(4 + n, dtype=torch.bool)
    options: dict[str, Any] = dict(first=1, n=n, gamma=torch.tensor([0.9]))
    returns.n_step(rows, flags, ~flags, learnt=3, **options)
    with pytest.raises(ValueError, match=f"{4 + n} rows, needs {5 + n}"):
        returns.n_step(rows, flags, ~flags, learnt=4, **options)


def test_huber_by_hand():
    error = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    one = torch.tensor([2.5, 0.5, 0.125, 0.0, 0.125, 0.5, 2.5])
    torch.testing.assert_close(returns.huber(error, delta=1.0), one)
    two = torch.tensor([4.0, 0.5, 0.125, 0.0, 0.125, 0.5, 4.0])
    torch.testing.assert_close(returns.huber(error, delta=2.0), two)


@pytest.mark.parametrize("delta", [0.3, 1.0, 10.0])
def test_huber_and_its_gradient_equal_the_definition(delta):
    error = torch.linspace(-12, 12, 401, dtype=torch.float64, requires_grad=True)
    value = returns.huber(error, delta=delta)
    for e, v in zip(error.tolist(), value.tolist(), strict=True):
        want = 0.5 * e * e if abs(e) <= delta else delta * (abs(e) - 0.5 * delta)
        assert v == pytest.approx(want, abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), error)
    torch.testing.assert_close(slope, error.detach().clamp(-delta, delta))


def slow_quantile_huber(theta, target, kappa):
    total = 0.0
    for m, quantile in enumerate(theta):
        tau, mean = (m + 0.5) / len(theta), 0.0
        for sample in target:
            u = sample - quantile
            loss = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
            mean += abs(tau - (1.0 if u < 0 else 0.0)) * loss / len(target)
        total += mean
    return total


@pytest.mark.parametrize("kappa", [1.0, 0.25])
def test_quantile_huber_equals_a_loop(kappa):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4, 3, 7, generator=generator)
    target = torch.randn(4, 3, 5, generator=generator) * 2
    got = returns.quantile_huber(theta, target, kappa=kappa)
    assert got.shape == (4, 3)
    for a in range(4):
        for b in range(3):
            want = slow_quantile_huber(theta[a, b].tolist(), target[a, b].tolist(), kappa)
            assert float(got[a, b]) == pytest.approx(want, rel=1e-5)


def test_quantile_huber_by_hand():
    # quantiles at tau 1/4 and 3/4; one target 1: u = 1 -> 1/4 * 1/2; u = -1 -> |3/4 - 1| * 1/2
    loss = returns.quantile_huber(torch.tensor([0.0, 2.0]), torch.tensor([1.0]), kappa=1.0)
    assert float(loss) == pytest.approx(0.125 + 0.125)
    # target far above both: slope tau per unit, 1/4 * (10 - 1/2) + 3/4 * (8 - 1/2)
    loss = returns.quantile_huber(torch.tensor([0.0, 2.0]), torch.tensor([10.0]), kappa=1.0)
    assert float(loss) == pytest.approx(0.25 * 9.5 + 0.75 * 7.5)
