"""What every test runs under: one thread, NaN for memory that nobody filled, no CUDA device no GPU test."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def unfilled_memory_is_nan(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`torch.empty` holds NaN (the largest integer where there is none).

    On the CPU every allocation does. Deterministic mode, which that needs, refuses operations that the
    GPU path uses, so GPU tests replace only what Python code calls.
    """
    if request.node.get_closest_marker("gpu"):
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
        return
    assert (
        deterministic.fill_uninitialized_memory
    )  # torch's default; without it the mode fills nothing
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _poisoned(allocate):
    def empty(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(
                True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
            )

    return empty
