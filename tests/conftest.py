"""Settings of all tests: one thread, uninitialised memory is NaN, GPU tests only with a GPU.

CERL_TEST_THREADS=2 runs the tests with two threads instead. All of them must still pass.
"""

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest
import torch
from interpreter import spare_repeated_work

torch.set_num_threads(int(os.environ.get("CERL_TEST_THREADS", "1")))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if find_spec("triton") is not None:
        spare_repeated_work()
# The key that seals runs is kept in XDG_STATE_HOME. Tests must not use the user's own key.
_STATE = tempfile.TemporaryDirectory(prefix="cerl-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode requires it


def signals_are_heard() -> None:
    """Makes sure that this process, and those that it starts, do not ignore the signals of tests.

    If the tests run as a job that a script started with `&`, or under `nohup`, they inherit that
    interrupts or hangups are ignored, and their child processes would inherit it too. If this
    process has a handler for a signal, a new program starts with the default action instead.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_IGN:
            interrupt = number == signal.SIGINT
            # A handler that does nothing, and not the default action: a hangup that was to be
            # ignored must not end the tests themselves.
            signal.signal(number, signal.default_int_handler if interrupt else lambda *_: None)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Worker processes of `-n auto`: one more than pytest-xdist counts cores.

    Tests of clusters mostly wait. A number that the environment asks for stays as it is.
    """
    return (yield) + ("PYTEST_XDIST_AUTO_NUM_WORKERS" not in os.environ)


def pytest_sessionstart() -> None:
    signals_are_heard()


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
    """Fills uninitialised tensors with NaN (integers with their largest value).

    On the CPU, torch does this for every allocation in deterministic mode. That mode refuses
    operations that the GPU path uses, so in GPU tests only `torch.empty` and its relatives are
    replaced, which Python code calls.
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
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(1).isnan()), (
        "torch.utils.deterministic.fill_uninitialized_memory is off"
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _poisoned(allocate):
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

    def empty(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                tensor.fill_(float("nan"))
            elif tensor.dtype in integers:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            elif tensor.dtype == torch.bool:
                tensor.fill_(True)
        return tensor

    return empty
