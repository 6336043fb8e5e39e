"""The kernels of forgetting attention against the definition in float64.

Without a CUDA device a part of it runs in Triton's interpreter (conftest.py asks for it). An error
may be twice that of the definition in the same precision, plus 1e-5 of the largest value.
"""

import functools
import itertools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from rounding import ROUNDINGS, assert_agree
from torch import Tensor
from torch.autograd import forward_ad

from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.check import check_placement
from cerl.kernels.attention.definition import forgetting_attention as definition
from cerl.kernels.attention.operator import attend, attend_backward
from cerl.kernels.attention.plan import make_plan
from cerl.kernels.attention.pruning import decayed_sums, visited

pytest.importorskip("triton")
# Torch says so when the first matrix product of a process is one of a backward pass.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

GPU = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "lse", "dq", "dk", "dv", "dlog_f")
FACTORS: dict[str, tuple] = dict(
    keys=(1, 15, 63, 100, 257, 1024, 4097),
    queries=("all", "half", "one"),
    heads=((2, 2), (4, 2), (3, 1)),
    width=(17, 24, 32, 40, 48, 64, 128),
    gates=("zero", "slow", "by head", "fast", "instant"),
    resets=("none", "random", "of heads", "ends", "everywhere", "two in a tile", "edges", "both"),
    window=(None, 7, 64, 500),
    pruned=(False, True),
    dtype=(torch.bfloat16, torch.float16, torch.float32),
    dlse=(True, False),
)


class Case(NamedTuple):
    """One choice of every factor; heads are (Hq, Hkv)."""

    keys: int
    queries: str
    heads: tuple[int, int]
    width: int
    gates: str
    resets: str
    window: int | None
    pruned: bool
    dtype: torch.dtype
    dlse: bool


def covering() -> list[Case]:
    """Cases in which any two factors take every pair of values; greedy, always the same."""
    rng = random.Random(0)
    columns = list(FACTORS.values())
    spots = list(itertools.combinations(range(len(columns)), 2))
    missing = {(a, x, b, y) for a, b in spots for x in columns[a] for y in columns[b]}

    def gain(row: dict) -> int:
        return sum((a, row[a], b, row[b]) in missing for a, b in spots if a in row and b in row)

    def candidate() -> dict:
        a, x, b, y = rng.choice(order)
        row = {a: x, b: y}
        for c in rng.sample(range(len(columns)), len(columns)):
            if c not in row:
                values = rng.sample(columns[c], len(columns[c]))
                row[c] = max(values, key=lambda value: gain({**row, c: value}))
        return row

    rows = []
    while missing:
        order = sorted(missing, key=str)
        best = max((candidate() for _ in range(20)), key=gain)
        missing -= {(a, best[a], b, best[b]) for a, b in spots}
        rows.append(Case(*(best[c] for c in range(len(columns)))))
    return rows


HALF, SINGLE = torch.float16, torch.float32
FEW = [
    Case(1, "all", (2, 2), 17, "slow", "none", None, False, HALF, True),
    Case(15, "half", (4, 2), 48, "by head", "of heads", 7, True, SINGLE, False),
    Case(15, "one", (3, 1), 40, "zero", "both", 500, False, HALF, False),
    Case(63, "all", (3, 1), 24, "fast", "both", None, False, SINGLE, True),
    Case(100, "all", (2, 2), 40, "instant", "two in a tile", 64, False, HALF, False),
    Case(100, "one", (2, 1), 64, "slow", "random", None, False, SINGLE, True),
    Case(63, "all", (2, 1), 128, "by head", "edges", None, False, SINGLE, False),
    Case(100, "half", (1, 1), 72, "zero", "everywhere", None, True, HALF, True),
    Case(200, "all", (2, 1), 24, "by head", "both", None, True, SINGLE, True),
    Case(257, "all", (2, 1), 24, "by head", "random", None, True, SINGLE, True),
    Case(257, "half", (2, 2), 48, "slow", "of heads", 64, False, HALF, False),
    Case(257, "all", (2, 2), 64, "fast", "ends", None, True, HALF, True),
    Case(257, "one", (2, 1), 17, "instant", "none", 500, True, SINGLE, True),
    Case(257, "all", (1, 1), 40, "instant", "edges", None, True, SINGLE, False),
    Case(1024, "all", (1, 1), 24, "slow", "two in a tile", None, True, HALF, True),
]


def gates_of(case: Case, g: torch.Generator, batch: int) -> Tensor:
    size = batch, case.keys, case.heads[0]
    noise = torch.rand(size, generator=g)
    if case.gates == "by head":
        return -2.0 * noise * torch.logspace(-3.0, 0.5, case.heads[0])
    if case.gates == "instant":  # now and then, so that something is remembered in between
        return torch.where(torch.rand(size, generator=g) < 0.05, -1e4 * noise, -0.02 * noise)
    if case.gates == "fast":
        return torch.nn.functional.logsigmoid(torch.randn(size, generator=g))
    return -noise * {"zero": 0.0, "slow": 0.04}[case.gates]


def resets_of(case: Case, g: torch.Generator, batch: int, log_f: Tensor) -> Tensor | None:
    """start [B, N] or None; log_f is changed where heads reset on their own."""
    share = 3.0 / case.keys
    if case.resets in ("of heads", "both"):
        log_f[torch.rand(log_f.shape, generator=g) < share] = -math.inf
    start = torch.zeros(batch, case.keys, dtype=torch.bool)
    if case.resets in ("none", "of heads"):
        return None
    if case.resets in ("random", "both"):
        start = torch.rand(start.shape, generator=g) < share
    places = {
        "ends": (0, case.keys - 1),
        "everywhere": range(case.keys),
        "two in a tile": [t for t in (5, 17, 140, 150) if t < case.keys],
        "edges": range(0, case.keys, 64 if case.keys > 64 else 16),
    }
    start[:, list(places.get(case.resets, ()))] = True
    return start


class Inputs(NamedTuple):
    q: Tensor  # [B, M, Hq, D]
    k: Tensor  # [B, N, Hkv, D]
    v: Tensor
    log_f: Tensor  # [B, N, Hq]
    start: Tensor | None
    threshold: Tensor | None
    do: Tensor
    dlse: Tensor | None


def draw(case: Case, *, batch: int | None = None) -> Inputs:
    """Random inputs in the type of the case, the same numbers on every device."""
    g = torch.Generator().manual_seed(11)
    batch = batch or (1 if case.keys > (1000 if DEVICE == "cuda" else 128) else 2)
    heads, key_heads = case.heads
    queries = {"all": case.keys, "half": -(-case.keys // 2), "one": 1}[case.queries]
    at_q, at_k = (batch, queries, heads, case.width), (batch, case.keys, key_heads, case.width)
    q, k, v, do = (
        torch.randn(size, generator=g).to(case.dtype) for size in (at_q, at_k, at_k, at_q)
    )
    dlse = torch.randn(batch, queries, heads, generator=g)
    log_f = gates_of(case, g, batch)
    start = resets_of(case, g, batch, log_f)
    # A query alone with itself passes a gradient to its score by lse only; the rest is rounding.
    left = decayed_sums(log_f, start, case.window)[1][..., case.keys - queries :]
    alone = bool((left == torch.arange(case.keys - queries, case.keys)).all())
    # So tight that what is dropped shows.
    threshold = -torch.linspace(1.0, 6.0, batch * heads).view(batch, heads)
    limit, wanted = threshold if case.pruned else None, dlse if case.dlse or alone else None
    q, k, v, log_f, do = (t.to(DEVICE) for t in (q, k, v, log_f, do))
    start, limit, wanted = (None if t is None else t.to(DEVICE) for t in (start, limit, wanted))
    return Inputs(q, k, v, log_f, start, limit, do, wanted)


def differentiate(x: Inputs, call: Any, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What `call` gives for (q, k, v, log_f), and its gradients; skipped if it gives that."""
    tensors = [t.detach().clone() if dtype is None else t.to(dtype) for t in x[:4]]
    tensors = [t.requires_grad_() for t in tensors]
    o, lse, *skipped = call(*tensors)
    outputs, grads = [o], [x.do.to(o.dtype)]
    if x.dlse is not None:
        outputs, grads = [o, lse], [*grads, x.dlse.to(lse.dtype)]
    got = (o.detach(), lse.detach(), *torch.autograd.grad(outputs, tensors, grads))
    return dict(zip((*NAMES, "skipped"), (*got, *skipped), strict=False))


def by_definition(case: Case, x: Inputs, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """In `dtype`, or in the types of x; on the tiles that the case has in its own type."""
    tile = make_plan(case.keys, case.width, case.dtype).tiles
    options = dict(start=x.start, window=case.window, threshold=x.threshold, tiles=tile)
    return differentiate(x, lambda *t: definition(*t, **options), dtype=dtype)


def by_kernel(case: Case, x: Inputs) -> dict[str, Tensor]:
    options: dict[str, Any] = dict(start=x.start, window=case.window, threshold=x.threshold)
    options.update(return_lse=True, return_skipped=True, impl="triton")
    return differentiate(x, lambda *t: forgetting_attention(*t, **options))


def assert_as_good(ours: dict, theirs: dict, exact: dict) -> None:
    for name in NAMES:
        want = exact[name]
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (float((x[name].double() - want).abs().max()) for x in (ours, theirs))
        limit = 2.0 * allowed + 1e-5 * float(want.abs().max())
        assert error <= limit, (
            f"{name}: error {error:.2e}, at most {limit:.2e} ({error / limit:.2f})"
        )


def check(case: Case) -> None:
    x = draw(case)
    ours = by_kernel(case, x)
    exact = by_definition(case, x, dtype=torch.float64)
    assert_as_good(ours, by_definition(case, x), exact)
    torch.testing.assert_close(ours["skipped"].double(), exact["skipped"].double())
    reset = torch.zeros_like(x.log_f, dtype=torch.bool) if x.start is None else x.start[..., None]
    reset = reset | (x.log_f == -math.inf)
    assert not bool(ours["dlog_f"][reset.expand_as(x.log_f)].any())
    assert not bool(ours["dlog_f"][:, 0].any())


def name(case: Case) -> str:
    return "-".join(str(value).replace("torch.", "") for value in case)


@pytest.mark.skipif(DEVICE == "cuda", reason="all cases run on the device")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case.keys > 40 else case for case in FEW],
    ids=name,
)
def test_kernel_agrees_with_the_definition(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", covering(), ids=name)
def test_kernel_agrees_with_the_definition_over_all_pairs_of_factors(case):
    check(case)


# Tiles through the copy engine, over both loops, from positions that are no multiple of 16 bytes.
UNEVEN = [
    Case(700, "half", (2, 2), 64, "slow", "random", None, True, torch.bfloat16, True),
    Case(700, "half", (4, 2), 128, "by head", "both", 500, True, torch.float16, False),
    Case(1027, "half", (2, 2), 32, "slow", "none", None, False, torch.bfloat16, True),
    Case(1024, "all", (3, 1), 64, "slow", "none", None, True, torch.bfloat16, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", UNEVEN, ids=name)
def test_copy_engine_loads_from_any_position(case):
    check(case)


def test_tensors_out_of_reach_are_refused():
    x = torch.zeros(1, 40, 2, 16, device="meta").as_strided((1, 40, 2, 16), (0, 2**26, 0, 1))
    with pytest.raises(ValueError, match="32 bits wide"):
        check_placement(x)


def test_launches_that_do_not_fit_each_other_are_refused(monkeypatch):
    from cerl.kernels.attention import long_triton

    x = torch.zeros(1, 300, 1, 64, device=DEVICE)
    other = long_triton.Launch(64, 16, 4, 1)
    monkeypatch.setitem(long_triton.CONFIGS, ("queries", 64, 4), other)
    with pytest.raises(ValueError, match="columns of forward and queries"):
        forgetting_attention(x, x, x, torch.zeros(1, 300, 1, device=DEVICE), impl="triton")


def test_cases_hold_every_pair_of_factors():
    rows = covering()
    assert len(rows) <= 80
    for a, b in itertools.combinations(FACTORS, 2):
        want = set(itertools.product(FACTORS[a], FACTORS[b]))
        assert {(getattr(row, a), getattr(row, b)) for row in rows} == want


SHORT = Case(40, "all", (2, 1), 24, "slow", "random", None, False, SINGLE, True)
MEDIUM = Case(150, "half", (2, 1), 24, "slow", "both", None, True, HALF, True)
LONG = Case(70, "half", (2, 1), 72, "slow", "both", None, True, SINGLE, True)


def draw_one_head(case: Case) -> Inputs:
    """Inputs where numbers do not matter: in the interpreter a program or two are enough."""
    return draw(case) if DEVICE == "cuda" else draw(case._replace(heads=(1, 1)), batch=1)


@functools.cache
def by_kernel_on_two(case: Case) -> tuple[Inputs, dict[str, Tensor]]:
    """Two sequences and what the kernel makes of them."""
    x = draw(case, batch=2)
    return x, by_kernel(case, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [SINGLE, HALF, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("alone", ["window", "gates"])
@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_query_alone_with_itself_copies_its_value(case, alone, dtype):
    case = case._replace(dtype=dtype, queries="all", pruned=False, resets="none")
    batch = None if DEVICE == "cuda" else 1
    x = draw(case._replace(window=1 if alone == "window" else None), batch=batch)
    if alone == "gates":
        x = x._replace(log_f=torch.full_like(x.log_f, -1e4))
    got = by_kernel(case._replace(window=1 if alone == "window" else None), x)
    heads = case.heads[0] // case.heads[1]
    k, v = (t.double().repeat_interleave(heads, 2) for t in (x.k, x.v))
    assert x.dlse is not None
    scale, dlse = case.width**-0.5, x.dlse.double()[..., None]
    exact: dict[str, Any] = dict(rtol=1e-5, atol=1e-5)
    close: dict[str, Any] = dict(rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    close = max(exact, close, key=lambda tolerance: tolerance["rtol"])
    torch.testing.assert_close(got["o"].double(), v, **close)
    torch.testing.assert_close(got["lse"].double(), (x.q.double() * scale * k).sum(3), **exact)
    torch.testing.assert_close(got["dq"].double(), scale * dlse * k, **close)
    dk = (scale * dlse * x.q.double()).unflatten(2, (-1, heads)).sum(3)
    dv = x.do.double().unflatten(2, (-1, heads)).sum(3)
    torch.testing.assert_close(got["dk"].double(), dk, **close)
    torch.testing.assert_close(got["dv"].double(), dv, **close)
    assert float(got["dlog_f"].abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_inputs_may_have_any_strides(case):
    x, want = by_kernel_on_two(case)

    def head_first(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def time_last(t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    for turn in (head_first, time_last):
        assert x.dlse is not None
        turned = x._replace(do=turn(x.do), dlse=turn(x.dlse))
        if turned.start is not None:
            turned = turned._replace(start=turned.start.t().contiguous().t())
        got = differentiate(
            turned,
            lambda *t, turn=turn, turned=turned: forgetting_attention(
                *(turn(tensor) for tensor in t),
                start=turned.start,
                threshold=turned.threshold,
                return_lse=True,
                impl="triton",
            ),
        )
        assert all(torch.equal(got[name], want[name]) for name in NAMES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_sequence_with_nan_leaves_the_other_bitwise_alone(case):
    clean, one = by_kernel_on_two(case)
    dirty = clean._replace(**{name: getattr(clean, name).clone() for name in ("q", "k", "v", "do")})
    for t in (dirty.q, dirty.k, dirty.v, dirty.do):
        t[1] = math.nan
    two = by_kernel(case, dirty)
    for name in NAMES:
        assert torch.equal(one[name][0], two[name][0])
        assert bool(two[name][1].isnan().any())


@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_gradient_asks_for_no_more_than_what_is_used(case, monkeypatch):
    from cerl.kernels.attention import (
        long_backward_triton,
        medium_backward_triton,
        short_triton,
    )

    asked = []
    for module in (short_triton, medium_backward_triton, long_backward_triton):

        def spy(do, dlse, *rest, call=module.backward, **options):
            asked.append(dlse is not None)
            return call(do, dlse, *rest, **options)

        monkeypatch.setattr(module, "backward", spy)
    x = draw_one_head(case)
    q, k, v, log_f = (t.requires_grad_() for t in x[:4])
    o, lse = forgetting_attention(q, k, v, log_f, start=x.start, return_lse=True, impl="triton")
    (only_o,) = torch.autograd.grad(o, q, x.do, retain_graph=True)
    (only_lse,) = torch.autograd.grad(lse, q, x.dlse, retain_graph=True)
    (both,) = torch.autograd.grad((o, lse), q, (x.do, x.dlse))
    assert asked == [False, True, True]
    few = 8 if case.dtype == HALF else ROUNDINGS  # sums are in float32
    assert_agree(only_o + only_lse, both, roundings=few)


# The first dual tensor makes torch script its own formulas.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("graph", [True, False])
def test_derivatives_that_go_forward_are_refused(graph):
    q, k, v, log_f = draw(SHORT)[:4]
    with forward_ad.dual_level(), torch.set_grad_enabled(graph):
        q = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            forgetting_attention(q, k, v, log_f, impl="triton")


@pytest.mark.parametrize("graph", ["no", "none wanted", "inference"])
def test_call_without_gradient_gives_the_same(graph):
    x = draw(MEDIUM)
    wanted = forgetting_attention(
        *(t.clone().requires_grad_() for t in x[:4]),
        impl="triton",
        return_lse=True,
        return_skipped=True,
    )
    mode = {"no": torch.no_grad, "none wanted": torch.enable_grad}.get(graph, torch.inference_mode)
    with mode():
        given = forgetting_attention(*x[:4], impl="triton", return_lse=True, return_skipped=True)
    assert not any(t.requires_grad for t in given)
    assert all(torch.equal(a, b) for a, b in zip(wanted, given, strict=True))


@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_gradient_is_not_differentiated_again(case):
    tensors = [t.requires_grad_() for t in draw_one_head(case)[:4]]
    o = forgetting_attention(*tensors, impl="triton")
    grads = torch.autograd.grad(o.square().sum(), tensors, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="its gradient cannot be differentiated again"):
            torch.autograd.grad(grad.sum(), tensors, retain_graph=True, allow_unused=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_torch_compile_traces_over_the_kernel(case):
    x = draw_one_head(case)

    def loss(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        options: dict[str, Any] = dict(start=x.start, bound="measured", window=90)
        o, lse, skipped = forgetting_attention(
            2.0 * q, k, v, log_f, **options, return_lse=True, return_skipped=True, impl="triton"
        )
        return o.square().sum() + lse.sum() * (1.0 + skipped.sum())

    fused = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    tensors = [t.requires_grad_() for t in x[:4]]
    eager, traced = (torch.autograd.grad(f(*tensors), tensors) for f in (loss, fused))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", [SHORT, MEDIUM, LONG], ids=["short", "medium", "long"])
def test_operators_keep_the_rules_of_torch(case):
    x = draw_one_head(case)
    tensors = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in x[:3]]
    options = x.start, x.threshold, None, 0, 0.2
    inputs = [t.detach().requires_grad_() for t in (*tensors, x.log_f)]
    torch.library.opcheck(attend.registered, (*inputs, *options))
    o, lse, _, sums, left = attend.registered(*tensors, x.log_f, *options)
    args = *tensors, x.log_f, x.start, o, lse, sums, left, 0, 0.2
    torch.library.opcheck(attend_backward.registered, (x.do, x.dlse, *args))
    torch.library.opcheck(attend_backward.registered, (x.do, None, *args))


def near_pairs(sums: Tensor, log_f: Tensor, left: Tensor) -> float:
    """Largest error of D over pairs 1, 7 and 128 steps apart, sums [2, B, H, N] two floats."""
    worst = 0.0
    keys = log_f.shape[1]
    for lag in (1, 7, 128):
        far = left[..., lag:] > torch.arange(keys - lag, device=left.device)
        want = log_f.transpose(1, 2)[..., 1:].double().unfold(2, lag, 1).sum(3)
        parts = sums[..., lag:] - sums[..., :-lag]
        error = (parts[0] + parts[1]).double() - want
        worst = max(worst, float(error.masked_fill(far, 0.0).abs().max()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("keys", [3000, pytest.param(131072, marks=pytest.mark.gpu)])
def test_sums_of_the_kernel_are_exact_for_near_pairs(keys):
    from cerl.kernels.attention.scan_triton import prepare

    g = torch.Generator().manual_seed(2)
    log_f = torch.nn.functional.logsigmoid(torch.randn(2, keys, 2, generator=g))
    log_f[torch.rand(log_f.shape, generator=g) < 1e-4] = -math.inf
    start = torch.rand(2, keys, generator=g) < 1e-4
    log_f, start = log_f.to(DEVICE), start.to(DEVICE)
    plan = make_plan(keys, 64, SINGLE)
    sums, left, _ = prepare(
        log_f, start, None, plan=plan, queries=keys, window=700, block=plan.tiles.columns
    )
    sums, left = sums[:2, ..., :keys], left[..., :keys]
    want = decayed_sums(log_f, start, 700)
    assert torch.equal(left, want[1])
    assert near_pairs(sums, log_f.masked_fill(log_f == -math.inf, 0.0), left) < 1e-5
    torch.testing.assert_close(sums[0].double() + sums[1].double(), want[0], rtol=1e-10, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "queries", "window", "start"),
    [
        (500, 500, 0, True),
        (700, 333, 150, False),
        (4200, 4150, 0, True),
        pytest.param(20000, 20000, 0, False, marks=pytest.mark.gpu),
        pytest.param(9001, 5000, 900, True, marks=pytest.mark.gpu),
    ],
)
def test_scan_finds_the_tiles_that_the_definition_visits(keys, queries, window, start):
    from cerl.kernels.attention.scan_triton import prepare

    g = torch.Generator().manual_seed(keys)
    log_f = -0.02 * torch.rand(1, keys, 3, generator=g) * torch.tensor([0.05, 0.5, 10.0])
    log_f[torch.rand(log_f.shape, generator=g) < 2e-4] = -math.inf
    threshold = torch.tensor([[-0.3, -5.0, -500.0]])
    first = (torch.rand(1, keys, generator=g) < 5e-4) if start else None
    log_f, threshold = log_f.to(DEVICE), threshold.to(DEVICE)
    first = None if first is None else first.to(DEVICE)
    plan = make_plan(keys, 64, SINGLE)
    tile = plan.tiles
    _, left, count = prepare(
        log_f, first, threshold, plan=plan, queries=queries, window=window, block=tile.columns
    )
    mask = visited(
        log_f, queries=queries, tiles=tile, start=first, window=window or None, threshold=threshold
    )
    begin = mask.int().argmax(3)
    starts = torch.arange(keys - queries, keys, tile.rows, device=left.device)
    assert torch.equal(left[:, :, starts] // tile.columns, begin)
    assert torch.equal(count, begin.sum(2).float())
    # Nobody but the first row of a tile is told.
    rest = torch.ones(keys, dtype=torch.bool, device=left.device)
    rest[starts] = False
    assert torch.equal(
        left[:, :, :keys][..., rest], decayed_sums(log_f, first, window or None)[1][..., rest]
    )


LATER = Case(520, "all", (2, 1), 24, "slow", "none", None, False, SINGLE, True)
RUNNING = [
    pytest.param(LATER, marks=GPU),
    LATER._replace(queries="half", dtype=HALF, resets="two in a tile"),
    *(
        pytest.param(LATER._replace(keys=2100, width=width, dtype=dtype, **rest), marks=GPU)
        for width, dtype, rest in (
            (64, torch.bfloat16, {}),
            (64, torch.bfloat16, dict(resets="two in a tile", queries="half")),
            (128, HALF, dict(resets="random", window=1000)),
            (40, SINGLE, dict(heads=(3, 1))),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNNING, ids=name)
def test_running_rule_skips_the_tiles_of_the_definition_and_more_than_the_static_one(case):
    x = draw(case, batch=1)
    x = x._replace(log_f=torch.where(x.log_f == -math.inf, x.log_f, 8.0 * x.log_f))

    def by(impl: Any, rule: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return differentiate(
            x,
            lambda *t: forgetting_attention(
                *t,
                start=x.start,
                window=case.window,
                bound="measured",
                rule=rule,
                return_lse=True,
                return_skipped=True,
                impl=impl,
            ),
            dtype=dtype,
        )

    ours, exact = by("triton", "running"), by("reference", "running", torch.float64)
    assert_as_good(ours, by("reference", "running"), exact)
    torch.testing.assert_close(ours["skipped"].double(), exact["skipped"].double())
    static = by("triton", "static")
    assert bool((ours["skipped"] >= static["skipped"]).all())
    assert float((ours["skipped"] - static["skipped"]).max()) > 0.02
    most = 2.0 * math.exp(-10.0) * float(x.v.abs().max())
    rounding = 2.0 * torch.finfo(case.dtype).eps * float(static["o"].abs().max())
    assert float((ours["o"].double() - static["o"].double()).abs().max()) <= most + rounding
    if DEVICE == "cuda":
        again = by("triton", "running")
        assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [100, 200, 256, 2048])
def test_gradients_are_bitwise_the_same_every_time(keys):
    case = Case(keys, "all", (8, 2), 64, "by head", "both", None, True, torch.bfloat16, True)
    x = draw(case, batch=8)
    first = by_kernel(case, x)
    for _ in range(19):
        again = by_kernel(case, x)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pruning_by_a_bound_changes_the_output_by_less_than_it_says(dtype):
    case = Case(4096, "all", (4, 2), 64, "by head", "random", None, False, dtype, False)
    x = draw(case)
    options: dict[str, Any] = dict(start=x.start, return_skipped=True, impl="triton")
    full, few = forgetting_attention(*x[:4], **options)
    for log_eps in (-10.0, -4.0):
        o, skipped = forgetting_attention(*x[:4], **options, bound="measured", log_eps=log_eps)
        assert float((skipped - few).max()) > 0.3
        rounding = 2 * torch.finfo(dtype).eps * float(full.abs().max())
        largest = 2.0 * math.exp(log_eps) * float(x.v.abs().max())
        assert float((o.double() - full.double()).abs().max()) <= largest + rounding


@pytest.mark.gpu
def test_gradients_of_a_very_long_sequence():
    """dO lives on four runs of 16 rows, each computed alone in float64."""
    keys, runs = 131072, (0, 40000, 99990, 131072 - 16)
    case = Case(keys, "all", (1, 1), 64, "slow", "none", None, False, torch.bfloat16, True)
    x = draw(case, batch=1)
    assert x.dlse is not None
    start = torch.zeros(1, keys, dtype=torch.bool, device=DEVICE)
    start[:, 70000] = True
    rows = torch.cat([torch.arange(run, run + 16) for run in runs]).to(DEVICE)
    mask = torch.zeros(keys, dtype=torch.bool, device=DEVICE)
    mask[rows] = True
    x = x._replace(
        log_f=x.log_f * 1e-3,  # so that keys a whole sequence away count
        start=start,
        do=x.do * mask[:, None, None],
        dlse=x.dlse * mask[:, None],
    )
    ours = by_kernel(case, x)

    def by_runs(dtype: torch.dtype | None) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(ours[name], dtype=torch.float64) for name in NAMES}
        kinds = {}
        for run in runs:
            end = run + 16
            part = x._replace(
                start=start[:, :end],
                **{name: getattr(x, name)[:, :end] for name in ("k", "v", "log_f")},
                **{name: getattr(x, name)[:, run:end] for name in ("q", "do", "dlse")},
            )
            tile = make_plan(end, case.width, case.dtype).tiles
            got = differentiate(
                part,
                lambda *t, part=part, tile=tile: definition(*t, start=part.start, tiles=tile),
                dtype=dtype,
            )
            for name in NAMES:
                total[name][:, run if name in ("o", "lse", "dq") else 0 : end] += got[name]
                kinds[name] = got[name].dtype
        return {name: total[name].to(kinds[name]) for name in NAMES}

    ours["o"], ours["lse"] = ours["o"] * mask[:, None, None], ours["lse"] * mask[:, None]
    assert_as_good(ours, by_runs(None), by_runs(torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("pruning", [dict(), dict(threshold=-3.0), dict(bound="measured")])
@pytest.mark.parametrize("keys", [100, 200, 700])
def test_graph_replays_what_eager_computes(keys, pruning):
    case = Case(keys, "all", (4, 2), 64, "by head", "both", 300, False, torch.bfloat16, True)
    x = draw(case)
    fresh = draw(case._replace(gates="fast", resets="of heads"))
    assert x.start is not None
    options: dict[str, Any] = dict(start=x.start, window=300, impl="triton", **pruning)

    def step() -> dict[str, Tensor]:
        return differentiate(
            x,
            lambda *t: forgetting_attention(*t, **options, return_lse=True, return_skipped=True),
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for to, source in zip(x, fresh, strict=True):
        if to is not None and source is not None:
            to.copy_(source)
    graph.replay()
    eager = step()
    assert all(torch.equal(captured[name], eager[name]) for name in eager)


@pytest.mark.gpu
def test_kernels_are_not_compiled_again_for_other_lengths():
    from cerl.kernels.attention import (
        long_backward_triton,
        long_triton,
        medium_backward_triton,
        medium_triton,
        scan_triton,
        short_triton,
    )

    modules = (
        scan_triton,
        long_triton,
        long_backward_triton,
        medium_triton,
        medium_backward_triton,
        short_triton,
    )

    def compiled() -> int:
        kernels = [
            kernel
            for module in modules
            for kernel in vars(module).values()
            if hasattr(kernel, "device_caches")
        ]
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    def run(keys: int, queries: str, batch: int, window: int) -> None:
        case = Case(keys, queries, (4, 2), 64, "fast", "random", window, True, torch.bfloat16, True)
        by_kernel(case, draw(case, batch=batch))

    # Scans of long ones take 512, 1024 or 4096 keys at a time, and queries may begin off a multiple
    # of four; a short kernel's queries fill a
    # power of two.
    short, medium, longer, long = (100, 65), (200, 201), (400, 402), (1000, 1002)
    for known, others in (
        (short, (80, 112, 128)),
        (medium, (129, 150, 240, 256)),
        (longer, (300, 333, 512)),
        (long, (513, 640, 1024)),
        ((2000, 2002), (1025, 3000, 5000)),
    ):
        for keys in known:
            for queries in ("all", "half"):
                run(keys, queries, 2, 90)
        before = compiled()
        assert before > 0
        for keys in others:
            for queries, batch, window in (("all", 1, 64), ("half", 3, 1), ("all", 16, 77)):
                run(keys, queries, batch, window)
        assert compiled() == before
