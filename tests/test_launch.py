"""Which launches bypass Triton's own, tested with a kernel that records its arguments."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from cerl.kernels.attention import forgetting_attention
from cerl.kernels.runtime import launch as launch_triton
from cerl.kernels.runtime.launch import Launcher


class Binary:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid):
        return lambda *given: self.calls.append((grid, *given))


class Kernel:
    """Takes two tensors, two integers, a float, A and B; as in Triton or in its interpreter."""

    def __init__(self, compiles: bool = True) -> None:
        self.arg_names = ["p_x", "p_y", "s_x", "size", "scale", "A", "B"]
        self.compiles = compiles
        self.calls: list[tuple[Any, ...]] = []
        self.binaries: list[Binary] = []

    def __getitem__(self, grid):
        def run(*given, **options):
            self.calls.append((grid, *given, options))
            if self.compiles:
                self.binaries.append(Binary())
                return self.binaries[-1]

        return run


def tensors(dtype: torch.dtype = torch.float32, begin: int = 0) -> tuple[Tensor, Tensor]:
    return torch.zeros(40, dtype=dtype)[begin:], torch.zeros(40)


def launcher(kernel: Any) -> Launcher:
    return Launcher(kernel, B=7, A=5, num_warps=4)


def test_launch_like_one_before_goes_to_its_binary():
    kernel = Kernel()
    launch, (x, y) = launcher(kernel), tensors()
    launch(3, (x, y), (1, 40), 0.5)
    assert kernel.calls == [((3, 1, 1), x, y, 1, 40, 0.5, {"B": 7, "A": 5, "num_warps": 4})]
    x, y = tensors()
    launch(9, (x, y), (1, 40), 2)
    assert len(kernel.calls) == 1
    given = (9, 1, 1), x.data_ptr(), y.data_ptr(), 1, 40, 2.0, 5, 7
    assert kernel.binaries[0].calls == [given]
    assert all(type(a) is type(b) for a, b in zip(kernel.binaries[0].calls[0], given, strict=True))


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (tensors(torch.float16), (1, 40)),
        (tensors(torch.int32), (1, 40)),
        (tensors(), (1, 48)),
        (tensors(), (2, 40)),
        (tensors(begin=1), (1, 40)),
        (tensors(), ((1, 2), 40)),
    ],
    ids=["another type", "a type of the same size", "size", "stride", "not on 16 bytes", "a tuple"],
)
def test_other_launches_go_through_triton(given, sizes):
    kernel = Kernel()
    launch = launcher(kernel)
    launch(3, tensors(), (1, 40), 0.5)
    launch(3, given, sizes, 0.5)
    launch(3, tensors(), (1, 40), 0.5)
    assert len(kernel.calls) == 2
    assert [len(binary.calls) for binary in kernel.binaries] == [1, 0]


def test_tuples_of_strides_find_the_binary_of_the_same_strides():
    kernel = Kernel()
    launch, given = launcher(kernel), tensors()
    for strides in ((64, 16, 1), (64, 16, 2), (64, 16, 1)):
        launch(3, given, (strides, 40), 0.5)
    assert [call[3] for call in kernel.calls] == [(64, 16, 1), (64, 16, 2)]
    assert [[call[3] for call in binary.calls] for binary in kernel.binaries] == [[(64, 16, 1)], []]


# Compiles one kernel for sm_90, which takes no GPU, and prints what of it depends on the strides.
COMPILE = """
import sys
import types

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cerl.kernels.attention import short_triton

driver.set_active(
    types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
)
kernel, binaries = short_triton._forward, []


class Compiled:
    def __init__(self):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def run(*given, **options):
            binaries.append(kernel.warmup(*given, grid=grid, **options))
            return binaries[-1]

        return run


short_triton._forward = Compiled()
for row, head in ((32, 32), (48, 48), (35, 32), (32, 1)):
    q = torch.zeros(2048, dtype=torch.bfloat16).as_strided((2, 16, 1, 32), (16 * row, row, head, 1))
    short_triton.forward(q, q, q, torch.zeros(2, 16, 1), None, window=0, scale=1.0)
    ptx = binaries[-1].asm["ptx"]
    print("ld.global.v4" in ptx, ptx.count(".param "), hash(ptx))
assert len(binaries) == 4
"""


def test_strides_choose_the_kernel_that_is_compiled(tmp_path):
    """Rows of 32 entries lie 32, 48 or 35 entries apart: only the last are not aligned.

    A stride of 1, here that of the only head, is a constant instead of a parameter.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    found = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    aligned, spaced, odd, constant = (line.split() for line in found.stdout.splitlines())
    assert aligned == spaced and aligned[0] == constant[0] == "True" and odd[0] == "False"
    assert int(aligned[1]) == int(odd[1]) == int(constant[1]) + 3


def test_tensors_that_do_not_begin_on_16_bytes_leave_nothing_behind():
    kernel = Kernel()
    launch = launcher(kernel)
    launch(3, tensors(begin=1), (1, 40), 0.5)
    launch(3, tensors(), (1, 40), 0.5)
    launch(3, tensors(begin=1), (1, 40), 0.5)
    assert len(kernel.calls) == 3 and not any(binary.calls for binary in kernel.binaries)


def test_an_integer_for_the_float_is_no_constant():
    kernel = Kernel()
    launcher(kernel)(3, tensors(), (1, 40), 1)
    assert type(kernel.calls[0][5]) is float


def test_interpreter_is_called_each_time():
    kernel = Kernel(compiles=False)
    launch = launcher(kernel)
    for _ in range(3):
        launch(3, tensors(), (1, 40), 0.5)
    assert len(kernel.calls) == 3


def test_no_more_launches_are_remembered_than_given(monkeypatch):
    monkeypatch.setattr(launch_triton, "MANY", 2)
    kernel = Kernel()
    launch = launcher(kernel)
    for size in (1, 2, 3, 3, 1):
        launch(3, tensors(), (1, size), 0.5)
        assert len(launch.binaries) <= 2
    assert len(kernel.calls) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [64, 200])
def test_attention_called_again_gives_the_same_where_tensors_begin_anywhere(keys):
    torch.manual_seed(0)
    size = 2 * keys * 4 * 32
    q, k, v, do = (torch.randn(size + 1, device="cuda").bfloat16() for _ in range(4))
    log_f = -torch.rand(2, keys, 4, device="cuda")

    def results(begin: int) -> tuple[Tensor, ...]:
        moved = [torch.empty_like(x)[begin : begin + size].copy_(x[:size]) for x in (q, k, v, do)]
        a, b, c, given = (x.view(2, keys, 4, 32) for x in moved)
        leaves = [x.requires_grad_() for x in (a, b, c, log_f.clone())]
        o = forgetting_attention(a, b, c, leaves[3], impl="triton")
        return o.detach(), *torch.autograd.grad(o, leaves, given)

    first = results(0)
    assert all(torch.equal(a, b) for a, b in zip(first, results(0), strict=True))
    for begin in (1, 0, 1):
        torch.testing.assert_close(results(begin), first)
