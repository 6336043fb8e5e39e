"""The faster interpreter of Triton computes the same numbers, and leaves nothing replaced."""

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _doubled(p, times, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(p + i)
    for _ in range(times):
        x = _twice(x)
    tl.store(p + i, x + tl.sum(x, 0))


def test_operations_are_replaced_once_a_launch_and_put_back(monkeypatch):
    load, replaced = tl.load, []
    original = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda *args: (replaced.append(args), original(*args))[1]
    )
    counts = []
    for times in (0, 1, 5):
        x = torch.arange(4.0)
        want = x * 2**times
        _doubled[1,](x, times, N=4)  # pyright: ignore[reportArgumentType]
        assert torch.equal(x, want + want.sum())
        assert tl.load is load
        counts.append(len(replaced))
        replaced.clear()
    assert counts[1] == counts[2] > 0


def test_types_are_told_apart():
    kinds = (tl.float16, tl.float32, tl.int32, tl.uint8, tl.bfloat16, tl.pointer_type(tl.float32))
    names = ["float16", "float32", "int32", "uint8", "uint16", "uint64"]
    for kind, name in zip(kinds, names, strict=True):
        for dtype in (kind, tl.block_type(kind, [4])):
            assert str(interpreter._get_np_dtype(dtype)) == name
