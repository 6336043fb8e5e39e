"""Parallel CUDA streams: results come in order and equal those of sequential execution."""

import pytest
import torch

from cerl.graph import captured
from cerl.kernels.runtime.streams import parallel


def test_results_come_in_order():
    own, others = parallel(torch.device("cpu"), lambda: 1, lambda: "a", lambda: "b")
    assert own == 1 and others == ["a", "b"]
    assert parallel(torch.device("cpu"), lambda: 1) == (1, [])


@pytest.mark.gpu
@pytest.mark.parametrize("patient", [False, True])
def test_branches_of_a_graph_wait_for_what_they_read_and_are_waited_for(patient):
    device = torch.device("cuda")
    x, out = torch.zeros(1 << 20, device=device), torch.zeros(4, device=device)

    def step() -> None:
        x.add_(1.0)
        own, (once, twice) = parallel(
            device, x.sum, lambda: x * 2.0, lambda: (x * 2.0) * 2.0, patient=patient
        )
        out.copy_(torch.stack([own, once.sum(), twice.sum(), own + once[0]]))

    run = captured(step, device)
    for k in range(1, 8):
        run()
        n = 1 << 20
        assert out.tolist() == [k * n, 2 * k * n, 4 * k * n, k * n + 2 * k]
