"""The definition of forgetting attention is compared with a slow loop; errors of its arguments."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_agree
from torch import Tensor

from cerl.kernels import attention
from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.definition import forgetting_attention as definition
from cerl.kernels.attention.plan import Tiles, make_plan
from cerl.kernels.attention.pruning import decayed_sums, visited

FLOAT64 = torch.float64


class Inputs(NamedTuple):
    q: Tensor  # [B, M, Hq, D]
    k: Tensor  # [B, N, Hkv, D]
    v: Tensor
    log_f: Tensor  # [B, N, Hq]
    start: Tensor  # [B, N]


def draw(
    *,
    queries: int = 9,
    keys: int = 9,
    heads: int = 2,
    key_heads: int = 1,
    width: int = 3,
    gate: float = 0.5,
    resets: float = 0.2,
    dtype: torch.dtype = FLOAT64,
) -> Inputs:
    """Two rows of random inputs; `gate` is the mean of -log_f, `resets` the share of starts."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, t, h, width, generator=g, dtype=FLOAT64).to(dtype)
        for t, h in ((queries, heads), (keys, key_heads), (keys, key_heads))
    )
    log_f = -2.0 * gate * torch.rand(2, keys, heads, generator=g)
    log_f = log_f.masked_fill(torch.rand(2, keys, heads, generator=g) < resets / 2, -math.inf)
    start = torch.rand(2, keys, generator=g) < resets
    return Inputs(q, k, v, log_f.to(torch.promote_types(dtype, torch.float32)), start)


def leaves(x: Inputs) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in x[:4]]


def decay(x: Inputs, b: int, h: int, i: int, window: int | None) -> dict[int, float]:
    """D of every key that position i sees, walking back from it."""
    found, total = {}, 0.0
    for j in range(i, -1, -1):
        found[j] = total
        if j == 0 or x.start[b, j] or x.log_f[b, j, h] == -math.inf or i - j + 1 == window:
            break
        total += float(x.log_f[b, j, h])
    return found


def loop(x: Inputs, *, tiles: Tiles, window: int | None, threshold: Tensor | None, scale: float):
    """o, lse, visited: pair by pair. A tile is dropped if none of its pairs reaches the limit."""
    batch, queries, heads, _ = x.q.shape
    keys, group = x.k.shape[1], heads // x.k.shape[2]
    offset = keys - queries
    o, lse = torch.zeros_like(x.q), x.q.new_zeros(batch, queries, heads)
    rows, columns = -(-queries // tiles.rows), -(-keys // tiles.columns)
    seen = torch.zeros(batch, heads, rows, columns, dtype=torch.bool)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        pairs = [decay(x, b, h, offset + m, window) for m in range(queries)]
        limit = -math.inf if threshold is None else float(threshold[b, h])
        for m, row in enumerate(pairs):
            for j, d in row.items():
                if d >= limit:
                    seen[b, h, m // tiles.rows, j // tiles.columns] = True
        for m, row in enumerate(pairs):
            visible = [j for j in row if seen[b, h, m // tiles.rows, j // tiles.columns]]
            dots = {j: float(x.q[b, m, h] @ x.k[b, j, h // group]) for j in visible}
            scores = {j: scale * dots[j] + row[j] for j in visible}
            total = math.fsum(math.exp(s) for s in scores.values())
            lse[b, m, h] = math.log(total)
            for j in visible:
                o[b, m, h] += math.exp(scores[j]) / total * x.v[b, j, h // group]
    return o, lse, seen


@pytest.mark.parametrize("tiles", [Tiles(4, 3), Tiles(2, 5), Tiles(64, 64)])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 2**40])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(queries=23, keys=23, resets=0.05),
        dict(queries=5, keys=17, heads=4, key_heads=2, resets=0.1),
        dict(queries=1, keys=9, resets=0.0),
        dict(resets=2.0),
    ],
)
def test_definition_is_the_sum_over_pairs(sizes, window, pruned, tiles):
    x = draw(**sizes)
    heads = x.q.shape[2]
    threshold = -torch.linspace(0.3, 3.0, 2 * heads, dtype=FLOAT64).view(2, heads)
    options: dict[str, Any] = dict(
        tiles=tiles, window=window, threshold=threshold if pruned else None
    )
    o, lse, seen = loop(x, **options, scale=0.7)
    got = definition(*x[:4], start=x.start, **options, scale=0.7)
    assert_agree(got[0], o)
    assert_agree(got[1], lse)
    mask = visited(x.log_f, queries=x.q.shape[1], start=x.start, **options)
    assert torch.equal(mask, seen)
    offset = x.k.shape[1] - x.q.shape[1]
    causal = [
        (m, n)
        for m in range(seen.shape[2])
        for n in range(seen.shape[3])
        if n * tiles.columns < min(offset + (m + 1) * tiles.rows, x.k.shape[1])
    ]
    dropped = sum((~seen[:, :, m, n]).double() for m, n in causal) / len(causal)
    torch.testing.assert_close(got[2], dropped)


def test_visited_tiles_are_a_run_up_to_the_diagonal():
    x = draw(queries=150, keys=230, resets=0.01, gate=0.03)
    mask = visited(x.log_f, queries=150, tiles=Tiles(16, 8), start=x.start, threshold=-2.0)
    last = ((80 + torch.arange(16, 176, 16)).clamp(max=230) - 1) // 8  # tile of m's last row
    for m, row in enumerate(mask.unbind(2)):
        want = torch.arange(29) <= last[m]
        assert torch.equal(row, row.cummax(2).values & want)
        assert bool(row[..., last[m]].all())
    assert 0.2 < float(mask.float().mean()) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [None, -1.5])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_finite_differences(window, threshold):
    x = draw(queries=7, keys=10, heads=4, key_heads=2)
    limit = None if threshold is None else torch.full((2, 4), threshold, dtype=FLOAT64)

    def outputs(*tensors: Tensor):
        options: dict[str, Any] = dict(start=x.start, window=window, threshold=limit)
        return definition(*tensors, **options, tiles=Tiles(3, 2))[:2]

    assert x.start.any()
    assert (x.log_f == -math.inf).any()
    assert torch.autograd.gradcheck(outputs, leaves(x))


def test_gate_at_a_reset_gets_no_gradient_and_the_others_do():
    x = draw(queries=30, keys=30, heads=2, gate=0.3)
    q, k, v, log_f = leaves(x)
    o, lse = forgetting_attention(q, k, v, log_f, start=x.start, return_lse=True)
    grads = torch.autograd.grad(o.sum() + lse.square().sum(), (q, k, v, log_f))
    assert all(grad.isfinite().all() for grad in grads)
    reset = x.start[:, :, None] | (x.log_f == -math.inf)
    reset[:, 0] = True
    assert 0 < reset.float().mean() < 1
    assert torch.equal(grads[3] == 0.0, reset)


def test_episodes_are_those_of_separate_calls_however_much_the_one_before_forgot():
    x = draw(queries=40, keys=40, resets=0.0)
    x.log_f[:, 3:9] = -3e38
    x.start[:, 16] = True
    whole = forgetting_attention(*x[:4], start=x.start, return_lse=True)
    alone = forgetting_attention(*(t[:, 16:] for t in x[:4]), return_lse=True)
    for got, want in zip(whole, alone, strict=True):
        assert_agree(got[:, 16:], want)
    by_gate = x.log_f.clone()
    by_gate[:, 16] = -math.inf
    assert torch.equal(forgetting_attention(x.q, x.k, x.v, by_gate), whole[0])


@pytest.mark.parametrize("gate", [0.69, 5.0])
def test_sums_are_exact_for_near_pairs_of_long_sequences(gate):
    keys = 131072
    x = draw(queries=1, keys=keys, width=1, gate=gate, resets=2e-5, dtype=torch.float32)
    sums, left = decayed_sums(x.log_f, x.start)
    assert float(sums.min()) < -0.2 * keys * gate
    high = sums.float()
    low = (sums - high).float()
    for lag in (1, 7, 128):
        pairs = left[..., lag:] <= torch.arange(keys - lag)
        steps = x.log_f.transpose(1, 2)[..., 1:].double().unfold(2, lag, 1)
        want = torch.where(pairs, steps.sum(3), 0.0)
        for two in (sums, high.double() + low.double()):
            got = two[..., lag:] - two[..., :-lag]
            assert float(torch.where(pairs, got - want, 0.0).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_definition_in_a_lower_precision_is_near(dtype):
    x = draw(queries=50, keys=70, heads=4, key_heads=2, width=24, resets=0.02, dtype=dtype)
    exact = x._replace(**{name: getattr(x, name).double() for name in ("q", "k", "v", "log_f")})
    results = []
    for inputs in (x, exact):
        tensors = leaves(inputs)
        o, lse = forgetting_attention(*tensors, start=x.start, return_lse=True)
        assert o.dtype == inputs.q.dtype
        assert lse.dtype == inputs.log_f.dtype
        grads = torch.autograd.grad(o.double().square().sum() + lse.sum(), tensors)
        assert [g.dtype for g in grads] == [t.dtype for t in tensors]
        results.append((o, lse, *grads))
    for got, want in zip(*results, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 8 * torch.finfo(dtype).eps


def test_pruning_by_a_bound_changes_the_output_by_less_than_it_says():
    x = draw(queries=600, keys=700, heads=4, key_heads=2, width=8, gate=0.3, resets=0.0005)
    options: dict[str, Any] = dict(start=x.start, return_skipped=True)
    full, few = forgetting_attention(*x[:4], **options)
    for log_eps in (-10.0, -4.0):
        o, skipped = forgetting_attention(*x[:4], **options, bound="measured", log_eps=log_eps)
        assert float((skipped - few).mean()) > 0.2
        error = float((o - full).abs().max())
        assert 0.0 < error <= 2.0 * math.exp(log_eps) * float(x.v.abs().max())


def test_bound_gives_the_threshold_that_keeps_the_dropped_share_small():
    # 2 x 8 + ln 16384 + 10, and the same per head
    x = draw(queries=1, keys=16384, width=1, resets=0.0, dtype=torch.float32)
    x = x._replace(log_f=torch.full_like(x.log_f, -1.0))
    hand = -(16.0 + 9.704060527839234) - 10.0

    def skipped(**options: Any) -> Tensor:
        return forgetting_attention(*x[:4], return_skipped=True, **options)[1]

    # The last key of the tile before the query's is as many steps away as a tile is wide: gates by
    # which its D is within 0.01 of the threshold by hand.
    columns = make_plan(16384, 1, torch.float32).tiles.columns
    x = x._replace(log_f=x.log_f * (-hand / columns * (1 - 3e-4)))
    tiles = 16384 // columns
    kept = skipped(bound=8.0)
    assert torch.allclose(kept, torch.full((2, 2), 1 - 2 / tiles))
    assert torch.equal(kept, skipped(bound=torch.tensor([8.0, 8.0])))
    assert torch.equal(kept, skipped(threshold=hand))
    x = x._replace(log_f=x.log_f * (1 + 6e-4))
    dropped = skipped(bound=8.0)
    assert torch.allclose(dropped, torch.full((2, 2), 1 - 1 / tiles))
    assert torch.equal(kept[:, 1], skipped(bound=torch.tensor([[8.0, 8.1]]))[:, 1])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_bound_holds_for_rounded_rows_and_is_nearly_reached(dtype, scale):
    width, g = 48, torch.Generator().manual_seed(0)
    w_q, w_k = (torch.rand(6, width, generator=g) + 0.5 for _ in range(2))
    # All of a row on the component of the largest weight reaches the bound if that is shared.
    w_k[:, w_q.argmax(1)] = 1.6
    rows = torch.nn.functional.one_hot(w_q.argmax(1), width) + 1e-3
    rows = rows * math.sqrt(width) / rows.norm(dim=1, keepdim=True)
    q, k = ((rows.to(dtype) * w).to(dtype).double() for w in (w_q, w_k))
    logits = (q * k).sum(1) * (width**-0.5 if scale is None else scale)
    bound = attention.norm_bound(w_q, w_k, width=width, dtype=dtype, scale=scale)
    assert bound.shape == (6,)
    assert bool((logits <= bound).all())
    assert bool((logits >= 0.97 * bound).all())
    with pytest.raises(ValueError, match="expected weights of 24 entries a row, got w_q"):
        attention.norm_bound(w_q, w_k, width=24, dtype=dtype)


def test_autocast_casts_the_products_only():
    x = draw(queries=20, keys=20, width=16, dtype=torch.float32)
    tensors = leaves(x)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = forgetting_attention(*tensors, start=x.start, return_lse=True)
    q, k, v = (t.bfloat16() for t in x[:3])
    low = forgetting_attention(q, k, v, x.log_f, start=x.start)
    assert torch.equal(o, low)
    assert lse.dtype == torch.float32
    grads = torch.autograd.grad(o.float().sum(), tensors)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_what_is_returned_follows_what_is_asked():
    x = draw(queries=3, keys=5, heads=2)
    o = forgetting_attention(*x[:4])
    both = forgetting_attention(*x[:4], return_lse=True, return_skipped=True)
    assert isinstance(o, Tensor)
    assert [t.shape for t in both] == [(2, 3, 2, 3), (2, 3, 2), (2, 2)]
    _, lse = forgetting_attention(*x[:4], return_lse=True)
    _, skipped = forgetting_attention(*x[:4], return_skipped=True)
    assert torch.equal(lse, both[1])
    assert torch.equal(skipped, both[2])


# Torch makes such a function itself while it traces one.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_definition_can_be_compiled():
    x = draw(queries=6, keys=9, heads=2)

    def loss(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        options: dict[str, Any] = dict(start=x.start, window=5, threshold=-3.0)
        o, lse = forgetting_attention(2.0 * q, k, v, log_f, **options, return_lse=True)
        return o.square().sum() + lse.sum()

    traced = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    tensors = leaves(x)
    eager, compiled = (torch.autograd.grad(f(*tensors), tensors) for f in (loss, traced))
    for got, want in zip(compiled, eager, strict=True):
        assert_agree(got, want)


def test_gradient_is_not_differentiated_again():
    tensors = leaves(draw())
    o = forgetting_attention(*tensors)
    grads = torch.autograd.grad(o.square().sum(), tensors, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="its gradient cannot be differentiated again"):
            torch.autograd.grad(grad.sum(), tensors, retain_graph=True, allow_unused=True)


GOOD: dict[str, Any] = dict(
    q=(2, 3, 4, 5), k=(2, 6, 2, 5), v=(2, 6, 2, 5), log_f=(2, 6, 4), start=(2, 6)
)


def arguments(**change: Any) -> dict[str, Any]:
    """Arguments that fit, but for `change`: shapes, tensors or options."""
    made = {}
    for name, value in {**GOOD, **change}.items():
        if name in GOOD and isinstance(value, tuple):
            value = torch.zeros(value, dtype=torch.bool if name == "start" else torch.float32)
        made[name] = value
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=(2, 3, 5)), r"expected q \[B, M, Hq, D\]"),
        (
            dict(v=(2, 7, 2, 5)),
            r"expected q .* got \[2, 3, 4, 5\], \[2, 6, 2, 5\] and \[2, 7, 2, 5",
        ),
        (dict(k=(3, 6, 2, 5), v=(3, 6, 2, 5)), "q and k must share B and D"),
        (dict(k=(2, 6, 2, 4), v=(2, 6, 2, 4)), "q and k must share B and D"),
        (dict(q=(2, 0, 4, 5)), "an axis is empty"),
        (
            dict(q=(2, 3, 4, 129), k=(2, 6, 2, 129), v=(2, 6, 2, 129)),
            "heads may be 128 wide, got D = 129",
        ),
        (dict(q=(2, 7, 4, 5)), "got M = 7 > N = 6"),
        (dict(q=(2, 3, 5, 5), log_f=(2, 6, 5)), "got Hq = 5 and Hkv = 2"),
        (dict(log_f=(2, 6, 2)), r"expected log_f \[B, N, Hq\] = \[2, 6, 4\], got \[2, 6, 2\]"),
        (dict(log_f=(2, 3, 4)), r"expected log_f \[B, N, Hq\] = \[2, 6, 4\], got \[2, 3, 4\]"),
        (dict(log_f=torch.zeros(2, 6, 4).double()), "log_f must be float32, got torch.float64"),
        (dict(log_f=torch.zeros(2, 6, 4).half()), "log_f must be float32, got torch.float16"),
        (dict(start=(6, 2)), r"expected start \[B, N\] = \[2, 6\] of torch.bool"),
        (dict(start=torch.zeros(2, 6)), "of torch.bool, got .* of torch.float32"),
        (dict(window=0), "window counts steps from 1 on, got 0"),
        (dict(q=torch.zeros(2, 3, 4, 5).half()), "q, k and v must share .* got torch.float16"),
        (
            {name: torch.zeros(GOOD[name], dtype=torch.int32) for name in "qkv"},
            "q, k and v must share .* got torch.int32",
        ),
        (dict(k=torch.zeros(2, 6, 2, 5, device="meta")), "q is on cpu and k on meta"),
        (dict(start=torch.zeros(2, 6, dtype=torch.bool, device="meta")), "and start on meta"),
        (dict(threshold=-1.0, bound=1.0), "got threshold and bound"),
        (dict(threshold=0.5), "threshold must be at most 0, got 0.5"),
        (dict(threshold=math.nan), "threshold must be at most 0, got nan"),
        (dict(threshold=torch.zeros(2, 3)), r"threshold must .* \[B, Hq\] = \[2, 4\], got \[2, 3"),
        (dict(threshold=torch.zeros(1, 2, 4)), "threshold must be of floats and broadcast"),
        (dict(threshold=torch.zeros(4).int()), "threshold must be of floats"),
        (dict(threshold=torch.zeros(4, device="meta")), "q is on cpu and threshold on meta"),
        (dict(bound=-1.0), "at least 0 and finite, got -1.0"),
        (dict(bound=math.inf), "at least 0 and finite, got inf"),
        (dict(bound="norms"), "bound must be a float, a tensor or 'measured', got 'norms'"),
        (
            dict(bound=torch.zeros(5)),
            r"bound must be of floats and broadcast to \[B, Hq\] = \[2, 4",
        ),
        (dict(bound=1.0, log_eps=0.0), "log_eps must be below 0, got 0.0"),
        (dict(rule="running"), "rule='running' needs a bound"),
        (dict(rule="running", threshold=-1.0), "rule='running' needs a bound"),
        (dict(rule="tight", bound=1.0), "rule must be static or running, got 'tight'"),
        (dict(impl="cuda"), "expected auto, reference or triton, got 'cuda'"),
        (dict(log_f=torch.full((2, 6, 4), 0.1), check=True), "got 48 values above it or NaN"),
        (dict(log_f=torch.full((2, 6, 4), math.nan), check=True), "got 48 values above it or NaN"),
        (dict(threshold=torch.ones(4), check=True), r"threshold must be at most 0, got \[1.0, 1.0"),
        (dict(bound=-torch.ones(2, 1), check=True), "bound must be at least 0 and finite, got"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    forgetting_attention(**arguments(check=True, threshold=torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=message):
        forgetting_attention(**arguments(**change))


def test_positive_entries_of_a_threshold_count_as_zero():
    x = draw(queries=200, keys=200, gate=0.1, resets=0.0)
    zero, one = (
        forgetting_attention(*x[:4], threshold=torch.tensor([value]), return_skipped=True)
        for value in (0.0, 1.0)
    )
    assert torch.equal(one[0], zero[0])
    assert torch.equal(one[1], zero[1])
    assert bool((one[1] > 0.3).all())


def test_kernel_refuses_the_cpu_and_float64(monkeypatch):
    pytest.importorskip("triton")
    x = arguments(impl="triton")
    for name in ("q", "k", "v"):
        x[name] = x[name].double()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="the kernel takes .* got float64"):
        forgetting_attention(**x)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        forgetting_attention(**arguments(impl="triton"))
