"""The authors' signature on our kernel, against a slow loop in float64; arguments that do not fit.

The kernel runs in Triton's interpreter where there is no GPU. An error may be twice that of plain
torch in the same type, plus 1e-5 of the largest value.
"""

import functools
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from cerl.bench.other_attention import load_official
from cerl.kernels import Impl
from cerl.kernels.attention.official import forgetting_attention

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "dq", "dk", "dv", "dlog_fgate")


class Case(NamedTuple):
    """Sizes of one call; padding, positions on the left of each sequence that are no data."""

    shape: tuple[int, int, int, int, int]  # B, M, N, H, D
    padding: tuple[int, ...] | None = None
    head_first: bool = False
    scale: float | None = None
    threshold: float | Literal["auto"] | None = None
    dtype: torch.dtype = torch.float32
    key_heads: int | None = None


CASES = {
    "whole sequences": Case((2, 20, 20, 2, 16)),
    "heads first": Case((2, 20, 20, 3, 16), head_first=True),
    "given scale": Case((1, 20, 20, 2, 32), scale=0.5),
    "padding on the left": Case((3, 33, 33, 2, 16), padding=(0, 9, 32)),
    "padding, heads first": Case((2, 33, 33, 3, 16), padding=(0, 20), head_first=True),
    "a sequence of padding alone": Case((2, 17, 17, 2, 16), padding=(17, 3)),
    "one query": Case((2, 1, 40, 3, 16)),
    "one query, padding": Case((3, 1, 40, 2, 16), padding=(0, 7, 39)),
    "one query, pruned": Case((2, 1, 300, 2, 16), threshold=-30.0),
    "fewer queries, padding among them": Case((2, 12, 30, 2, 16), padding=(0, 25)),
    "12 heads": Case((1, 16, 16, 12, 16)),
    "5 heads of 24": Case((2, 30, 30, 5, 24), dtype=torch.float16),
    "7 heads of 48": Case((1, 19, 19, 7, 48)),
    "3 heads of 96": Case((1, 70, 70, 3, 96), padding=(11,)),
    "half, 3 heads of 128": Case((1, 70, 70, 3, 128), padding=(5,), dtype=torch.float16),
    "half, heads of 64": Case((2, 65, 65, 3, 64), padding=(0, 30), dtype=torch.float16),
    "half, 130 positions": Case((1, 130, 130, 2, 32), padding=(70,), dtype=torch.float16),
    "grouped heads": Case((2, 20, 20, 6, 16), key_heads=2),
    "threshold": Case((1, 130, 130, 3, 16), padding=(3,), threshold=-35.0),
    "measured threshold": Case((1, 130, 130, 3, 16), padding=(66,), threshold="auto"),
}
LARGE = {
    "long": Case((2, 1000, 1000, 3, 64), padding=(0, 333), threshold="auto", dtype=torch.float16),
    "bf16": Case((2, 300, 700, 12, 96), padding=(5, 600), dtype=torch.bfloat16),
    "decode": Case((5, 1, 1025, 7, 128), padding=(0, 1, 512, 1000, 1024), dtype=torch.bfloat16),
    "heads first": Case((2, 257, 257, 6, 48), head_first=True, dtype=torch.bfloat16),
}


def draw(case: Case) -> tuple[list[Tensor], Tensor]:
    """q, k, v and log_fgate in the order of axes of the case, then the gradient of the output."""
    batch, queries, keys, heads, width = case.shape
    g = torch.Generator().manual_seed(keys)
    sizes = ((queries, heads), *[(keys, case.key_heads or heads)] * 2, (queries, heads))
    q, k, v, do = (torch.randn(batch, t, h, width, generator=g) for t, h in sizes)
    log_fgate = torch.nn.functional.logsigmoid(torch.randn(batch, keys, heads, generator=g) + 1.0)
    tensors = [*(x.to(case.dtype) for x in (q, k, v)), log_fgate]
    if case.head_first:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
        do = do.transpose(1, 2)
    return [x.to(DEVICE) for x in tensors], do.to(case.dtype).to(DEVICE)


def call(case: Case, *, impl: Impl) -> dict[str, Tensor]:
    x, do = draw(case)
    leaves = [leaf.requires_grad_() for leaf in x]
    o = forgetting_attention(
        *leaves,
        head_first=case.head_first,
        seq_start=None if case.padding is None else torch.tensor(case.padding, device=DEVICE),
        sm_scale=case.scale,
        adaptive_threshold=case.threshold,
        impl=impl,
    )
    assert o.shape == x[0].shape and o.dtype == case.dtype
    return dict(zip(NAMES, (o, *torch.autograd.grad(o, leaves, do)), strict=True))


def by_loop(case: Case) -> dict[str, Tensor]:
    """Row by row in float64: each query sees the keys from the first that is no padding to itself.

    Nothing is pruned. With the thresholds of the cases, pruning moves an output by far less than
    the rounding of float32.
    """
    x, do = draw(case)
    leaves = [leaf.cpu().double().requires_grad_() for leaf in x]
    q, k, v, log_f = leaves
    if case.head_first:
        q, k, v, log_f = (leaf.transpose(1, 2) for leaf in leaves)
    batch, queries, keys, heads, width = case.shape
    scale, group = case.scale or width**-0.5, heads // (case.key_heads or heads)
    rows: list[Tensor] = []
    for b in range(batch):
        first = 0 if case.padding is None else case.padding[b]
        for m in range(queries):
            for h in range(heads):
                i, key_head = keys - queries + m, h // group
                if i < first:
                    rows.append(torch.zeros(width, dtype=torch.float64))
                    continue
                # Decay of key j: the sum of log_f over the steps j + 1 to i.
                later = log_f[b, first + 1 : i + 1, h].flip(0).cumsum(0).flip(0)
                decay = torch.cat([later, later.new_zeros(1)])
                seen = slice(first, i + 1)
                scores = k[b, seen, key_head] @ q[b, m, h] * scale + decay
                rows.append(scores.softmax(0) @ v[b, seen, key_head])
    o = torch.stack(rows).view(batch, queries, heads, width)
    if case.head_first:
        o = o.transpose(1, 2)
    grads = torch.autograd.grad(o, leaves, do.cpu().double(), allow_unused=True)
    full = (
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    )
    return dict(zip(NAMES, (o, *full), strict=True))


def check(case: Case) -> None:
    ours, torchs, exact = call(case, impl="triton"), call(case, impl="reference"), by_loop(case)
    for name in NAMES:
        want = exact[name].detach()
        error, allowed = (
            float((x[name].detach().cpu().double() - want).abs().max()) for x in (ours, torchs)
        )
        limit = 2.0 * allowed + 1e-5 * float(want.abs().max()) + 1e-12
        assert error <= limit, f"{name}: error {error:.2e}, at most {limit:.2e}"
        scale = float(want.abs().max()) + 1e-6
        assert allowed <= 128.0 * torch.finfo(case.dtype).eps * scale, f"{name}: {allowed:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_the_loop(name):
    check(CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_kernel_agrees_with_the_loop_at_real_sizes(name):
    check(LARGE[name])


def test_padding_gets_no_output_and_no_gradient_and_its_gates_do_not_matter():
    case = Case((2, 40, 40, 2, 16), padding=(0, 23))
    got = call(case, impl="triton")
    for name in NAMES:
        assert not bool(got[name][1, :23].any()), name
        assert bool(got[name][1, 24:].any()) and bool(got[name][0, 1:].any()), name
    x, _ = draw(case)
    starts = torch.tensor(case.padding, device=DEVICE)
    x[3][1, :24] = torch.tensor([math.nan, 7.0, -math.inf], device=DEVICE).repeat(8)[:, None]
    x[3][1, 23] = -1.0
    again = forgetting_attention(*x, seq_start=starts, impl="triton")
    assert torch.equal(again, got["o"])


def test_a_padded_sequence_is_the_sequence_alone():
    case = Case((1, 50, 50, 3, 32), padding=(13,))
    x, _ = draw(case)
    starts = torch.tensor(case.padding, device=DEVICE)
    padded = forgetting_attention(*x, seq_start=starts, impl="triton")
    alone = forgetting_attention(*(leaf[:, 13:] for leaf in x), impl="triton")
    torch.testing.assert_close(padded[:, 13:], alone, atol=1e-6, rtol=0.0)


THEIRS = {
    "whole sequences": Case((2, 33, 33, 2, 16)),
    "padding": Case((2, 33, 33, 3, 32), padding=(0, 9)),
    "padding alone": Case((2, 33, 33, 2, 16), padding=(0, 33)),
    "heads first": Case((2, 33, 33, 3, 32), padding=(9, 0), head_first=True, scale=0.3),
    "fewer queries": Case((2, 12, 40, 2, 16), padding=(3, 30)),
    "one query": Case((3, 1, 40, 2, 16), padding=(0, 3, 39)),
    "threshold": Case((1, 150, 150, 3, 16), threshold=-25.0),
    "measured threshold": Case((1, 150, 150, 3, 16), padding=(20,), threshold="auto"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in rows of padding alone
@pytest.mark.skipif("CERL_OFFICIAL" not in os.environ, reason="needs the authors' file")
@pytest.mark.parametrize("name", THEIRS)
def test_the_authors_own_kernel_gives_the_same(name, monkeypatch):
    """CERL_OFFICIAL is the folder of their forgetting_attention.py. One query has no gradient."""
    module: Any = load_official(Path(os.environ["CERL_OFFICIAL"]))
    if DEVICE == "cpu":  # their file asks which GPU there is, for its block sizes
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        for kernel in ("fwd", "bwd_kv", "bwd_q"):
            monkeypatch.setattr(module, f"get_{kernel}_config", lambda *sizes: (16, 16, 1, 4))
    case = THEIRS[name]._replace(dtype=torch.float16)
    x, do = draw(case)
    options: dict[str, Any] = dict(head_first=case.head_first, sm_scale=case.scale)
    options["adaptive_threshold"] = case.threshold
    if case.padding is not None:
        options["seq_start"] = torch.tensor(case.padding, device=DEVICE)
    results = []
    ours = functools.partial(forgetting_attention, impl="triton")
    for function in (ours, module.forgetting_attention):
        leaves = [leaf.detach().requires_grad_(case.shape[1] > 1) for leaf in x]
        o = function(*leaves, **options)
        results.append((o, *(torch.autograd.grad(o, leaves, do) if o.requires_grad else ())))
    for got, theirs in zip(*results, strict=True):
        error = float((got.float() - theirs.float()).detach().abs().max())
        assert error < 2e-3 * float(theirs.detach().abs().max())


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)])
def test_a_threshold_broadcasts_over_heads(shape):
    """With a threshold of -0.5 all blocks but the nearest are skipped, so values must differ."""
    case = Case((2, 320, 320, 3, 16))
    x, _ = draw(case)
    given = torch.full(shape, -0.5, device=DEVICE)
    with torch.no_grad():
        pruned, as_number, whole = (
            forgetting_attention(*x, adaptive_threshold=limit) for limit in (given, -0.5, None)
        )
    assert torch.equal(pruned, as_number)
    assert float((pruned - whole).abs().max()) > 1e-3


CPU_ONLY = pytest.mark.skipif(DEVICE == "cuda", reason="values on a GPU are read if asked for")


def change(**options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of a good call, with some of them replaced."""
    x, _ = draw(Case((2, 5, 8, 3, 16)))
    named = dict(zip(("q", "k", "v", "log_fgate"), x, strict=True)) | options
    return [named.pop(name) for name in ("q", "k", "v", "log_fgate")], named


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adaptive_threshold": 0.5}, "adaptive_threshold must be at most 0, got 0.5"),
        ({"adaptive_threshold": math.nan}, "at most 0, got nan"),
        ({"adaptive_threshold": torch.tensor([-1.0, 2.0, -3.0])}, "at most 0, got .*2.0"),
        ({"adaptive_threshold": torch.zeros(2)}, r"broadcast to \[B, H\] = \[2, 3\], got \[2\]"),
        ({"adaptive_threshold": torch.zeros(1, 2, 3)}, r"broadcast to .* got \[1, 2, 3\]"),
        ({"adaptive_threshold": torch.zeros(3).long()}, "must be of floats"),
        ({"adaptive_threshold": "best"}, "must be 'auto', a number or a tensor, got 'best'"),
        ({"seq_start": torch.tensor([0, 9])}, "0 and the 8 positions .* got 9 for sequence 1"),
        ({"seq_start": torch.tensor([-1, 0])}, "got -1 for sequence 0"),
        ({"seq_start": torch.tensor([1.0, 2.0])}, "must be int32 or int64 .* torch.float32"),
        ({"seq_start": torch.tensor([1])}, r"of \[B\] = \[2\], got \[1\]"),
        ({"head_first": True}, "read as .B, H, time, D.; .* pass head_first=False"),
        ({"log_fgate": torch.zeros(2, 3, 8)}, r"\[B, N, H\] = \[2, 8, 3\], got \[2, 3, 8\]"),
        ({"log_fgate": torch.zeros(2, 8, 3).half()}, "must be float32, got torch.float16"),
        ({"log_fgate": torch.ones(2, 8, 3)}, "at most 0"),
        ({"k": torch.zeros(2, 8, 2, 16), "v": torch.zeros(2, 8, 2, 16)}, "a multiple of H of k"),
        ({"k": torch.zeros(2, 8, 3, 8), "v": torch.zeros(2, 8, 3, 8)}, "must share B and D"),
        ({"v": torch.zeros(2, 8, 3, 8)}, r"expected q \[B, M, H, D\]"),
        ({"q": torch.zeros(2, 5, 3, 16).half()}, "must share float32, float16 or bfloat16"),
    ],
)  # fmt: skip
@CPU_ONLY
def test_arguments_that_do_not_fit_are_named(options, message):
    x, named = change(**options)
    with pytest.raises(ValueError, match=message):
        forgetting_attention(*x, **named)


def test_heads_that_are_too_wide_are_named():
    x, _ = draw(Case((1, 3, 3, 1, 160)))
    with pytest.raises(ValueError, match="at most 128 wide, got D = 160; use more, narrower heads"):
        forgetting_attention(*x)


@pytest.mark.gpu
def test_values_on_a_gpu_are_read_if_asked_for():
    x, _ = draw(Case((2, 5, 8, 3, 16)))
    late, high = torch.tensor([0, 9], device=DEVICE), torch.tensor([0.5] * 3, device=DEVICE)
    with pytest.raises(ValueError, match="got 9 for sequence 1"):
        forgetting_attention(*x, seq_start=late, check=True)
    with pytest.raises(ValueError, match="at most 0"):
        forgetting_attention(*x, adaptive_threshold=high, check=True)
    assert not bool(forgetting_attention(*x, seq_start=late)[1].any())


@pytest.mark.gpu
def test_a_call_with_padding_can_be_captured_in_a_graph():
    x, _ = draw(Case((2, 130, 130, 2, 64), dtype=torch.bfloat16))
    starts = torch.tensor([0, 7], device=DEVICE)
    eager = forgetting_attention(*x, seq_start=starts, adaptive_threshold="auto")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = forgetting_attention(*x, seq_start=starts, adaptive_threshold="auto")
    starts.copy_(torch.tensor([40, 0], device=DEVICE))
    graph.replay()
    wanted = forgetting_attention(*x, seq_start=starts, adaptive_threshold="auto")
    assert torch.equal(o, wanted) and not torch.equal(o, eager)
