"""The ledger of tensors without memory: what it counts, and the shapes that operations have."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.footprint.ledger import META, Ledger


def test_tensors_count_from_their_making_until_nothing_holds_them():
    ledger = Ledger()
    with ledger:
        ledger.account = "kept"
        x = torch.zeros(10, 10, device=META)
        view = x.view(100)[3:]
        ledger.account = "passing"
        y = (x + 1.0).sum()
        del x
        assert ledger.live == {"kept": 400, "passing": 4} and ledger.total == 404
        del view
        assert ledger.total == 4
    assert ledger.peak == {"kept": 400, "passing": 404}
    assert (ledger.highest, ledger.highest_in) == (804, "passing") and y.is_meta


def test_what_backward_keeps_counts():
    ledger = Ledger()
    with ledger:
        w = torch.zeros(8, 8, device=META, requires_grad=True)
        x = torch.zeros(4, 8, device=META)
        ledger.account = "activations"
        loss = F.relu(x @ w).square().sum()
        kept = ledger.live["activations"]
        torch.autograd.grad(loss, w)
        assert kept >= 4 * 8 * 4 and ledger.peak["activations"] >= kept + w.nbytes


def _foreach(x: Tensor) -> Tensor:
    roots = torch._foreach_sqrt([x])  # pyright: ignore[reportPrivateImportUsage]
    return torch._foreach_div(roots, [x.double()])[0]  # pyright: ignore


OPERATIONS = {
    "broadcast": lambda x: x.unsqueeze(1) * x.long().unsqueeze(2),
    "compared": lambda x: (x > 0) & (x < 3),
    "divided": lambda x: x.long() / 2,
    "floored": lambda x: x.long() // 2,
    "chosen": lambda x: torch.where(x > 0, x, 0.0),
    "clamped": lambda x: x.clamp(min=1.0).clamp_(max=2.0),
    "sigmoid": lambda x: F.logsigmoid(x),
    "softplus": lambda x: F.softplus(x),
    "mean": lambda x: x.mean((0, 2), keepdim=True),
    "any": lambda x: (x > 0).any(1),
    "all": lambda x: (x > 0).all(),
    "cumsum": lambda x: (x > 0).cumsum(2),
    "cumprod": lambda x: x.cumprod(-1),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "std": lambda x: x.std(1, correction=0),
    "softmax": lambda x: x.softmax(-1),
    "cat": lambda x: torch.cat([x, x.long(), x[:1]]),
    "cat of nothing": lambda x: torch.cat([x[0, 0, :0], x[0, 0]]),
    "stack": lambda x: torch.stack([x, x], -1),
    "arange": lambda x: x.new_zeros(5) + torch.arange(7, 2, -1, device=x.device),
    "arange of fractions": lambda x: torch.arange(0.5, 3.0, device=x.device),
    "foreach": _foreach,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_results_have_the_shape_and_type_that_torch_gives_them(operation):
    expected = operation(torch.ones(2, 1, 3))
    with Ledger():
        got = operation(torch.ones(2, 1, 3, device=META))
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, META)


def test_gradients_have_the_shape_of_what_they_are_of():
    with Ledger():
        x = torch.ones(2, 3, device=META, requires_grad=True)
        y = F.logsigmoid(x) + F.softplus(x) + x.softmax(-1) + x.cumsum(1) + x.std(1, keepdim=True)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape and grad.is_meta


def test_tensors_with_memory_pass_as_they_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import of it would raise
    with Ledger() as ledger:
        assert torch.equal(torch.arange(3) + torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
        assert (torch.zeros(3, device=META) + 1).is_meta
    assert ledger.highest == 24
