"""Value errors of evaluations against loops over the steps of episodes."""

import math

import pytest
import torch

from cerl.value_error import Trace, discounted, value_errors


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
def test_discounted_sums_equal_a_loop(steps):
    generator = torch.Generator().manual_seed(steps)
    reward, factor = torch.rand(2, steps, 3, generator=generator, dtype=torch.float64)
    later, wanted = torch.zeros(3, dtype=torch.float64), []
    for t in reversed(range(steps)):
        later = reward[t] + factor[t] * later
        wanted.insert(0, later)
    torch.testing.assert_close(discounted(reward, factor), torch.stack(wanted))


def test_errors_equal_a_loop_over_episodes_with_bonuses():
    """Two lanes of one member; between episodes one step that belongs to none."""
    generator = torch.Generator().manual_seed(0)
    gamma, trace = 0.9, Trace(1, 2, steps=20, device=torch.device("cpu"))
    lengths = [(4, 7), (9,)]  # of the episodes of each lane, in steps
    value, reward, bonus = torch.randn(3, 20, 2, generator=generator)
    status = torch.zeros(20, 2, dtype=torch.int64)
    errors = []
    for lane, episodes in enumerate(lengths):
        first = 0
        for length in episodes:
            last = first + length - 1
            status[first : last + 1, lane], status[last, lane] = 1, 2
            for t in range(first, last + 1):
                rest = range(t, last + 1)
                goal = sum(gamma ** (u - t) * float(reward[u, lane]) for u in rest)
                goal += sum(gamma ** (u - t) * float(bonus[u, lane]) for u in rest if u > t)
                errors.append(float(value[t, lane]) - goal)
            first = last + 2
    value[status == 0], reward[status == 0] = math.nan, math.inf  # they must not count
    for t in range(20):
        live, over = status[t : t + 1] > 0, status[t : t + 1] == 2
        trace.predict(value[t : t + 1], bonus[t : t + 1])
        trace.add(torch.tensor(3 * 20 + t), reward[t : t + 1], live, over)
    found = value_errors(trace.taken(20), gamma=gamma, members=1)
    count = len(errors)
    assert float(found["value_error"]) == pytest.approx(sum(errors) / count, rel=1e-5)
    absolute = sum(map(abs, errors)) / count
    assert float(found["value_error_absolute"]) == pytest.approx(absolute, rel=1e-5)
    rms = math.sqrt(sum(x * x for x in errors) / count)
    assert float(found["value_error_rms"]) == pytest.approx(rms, rel=1e-5)


def test_a_member_without_a_step_and_a_value_that_is_not_finite_give_nan():
    history = torch.ones(5, 3, 2, 2)  # two seeds, two members with one lane each
    history[:, 2, 0, 1] = 0.0
    history[2, 0, 1, 0] = math.nan
    found = value_errors(history, gamma=0.5, members=2)["value_error"]
    assert found.isnan().tolist() == [[False, True], [True, False]]
