"""`captured`: the k-th call is the k-th step, on a CPU and on a GPU."""

import pytest
import torch

from cerl.graph import WARM_UP, captured


def test_on_the_cpu_every_call_is_one_step_and_python_runs_for_the_first_few_only():
    count, calls = torch.zeros((), dtype=torch.int64), []

    def step():
        calls.append(None)
        count.add_(1)

    run = captured(step, torch.device("cpu"))
    for k in range(10):
        run()
        assert int(count) == k + 1
    assert len(calls) < 10


@pytest.mark.gpu
def test_every_call_is_one_step_whether_warming_up_capturing_or_replaying():
    device = torch.device("cuda")
    count = torch.zeros((), dtype=torch.int64, device=device)
    trace = torch.full((20,), -1, dtype=torch.int64, device=device)
    calls = []

    def step():
        calls.append(None)
        trace.scatter_(0, count.view(1), count.view(1) * count)
        count.add_(1)

    run = captured(step, device)
    for k in range(10):
        run()
        assert int(count) == k + 1
    assert trace[:10].tolist() == [k * k for k in range(10)]
    assert len(calls) == WARM_UP + 1  # Python ran for the warm-up and for the capture


@pytest.mark.gpu
def test_two_captured_functions_share_state_in_order():
    device = torch.device("cuda")
    x = torch.ones(3, device=device)

    def twice():
        x.mul_(2)

    def plus_one():
        x.add_(1)

    double, add = captured(twice, device), captured(plus_one, device)
    want = 1.0
    for k in range(12):
        double()
        want *= 2
        if k % 2:
            add()
            want += 1
    assert x.tolist() == [want] * 3


@pytest.mark.gpu
def test_restoring_in_place_between_replays_is_seen_by_the_graph():
    device = torch.device("cuda")
    x = torch.zeros(2, device=device)

    def step():
        x.add_(1)

    run = captured(step, device)
    for _ in range(6):
        run()
    x.copy_(torch.tensor([10.0, 20.0], device=device))
    run()
    assert x.tolist() == [11, 21]
