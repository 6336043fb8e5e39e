"""Acting steps of forgetting attention: equal to the sequence operator; what a step may write."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_agree
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention import step as attention_step
from cerl.kernels.attention.step import BLOCK, Cache, forgetting_attention_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    ring: int
    width: int
    steps: int


# Rings are filled more than twice; the interpreter takes its time for every step.
if DEVICE == "cuda":
    GROUPED, UNEVEN = Shape(1, 6, 2, 37, 24, 80), Shape(1, 2, 1, 100, 8, 205)
else:
    GROUPED, UNEVEN = Shape(1, 4, 2, 20, 24, 45), Shape(1, 2, 1, 70, 8, 145)
SHAPES = {
    "odd width, short ring": Shape(2, 2, 2, 5, 13, 23),
    "grouped heads, ring shorter than a block": GROUPED,
    "ring of no whole blocks": UNEVEN,
    "ring of one key": Shape(1, 1, 1, 1, 4, 4),
}


class Inputs(NamedTuple):
    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, T, Hkv, D]
    v: Tensor
    log_f: Tensor  # [B, T, Hq]
    start: Tensor  # [B, T]


def draw(shape: Shape, *, forget: float = 0.3, dtype: torch.dtype = torch.float32) -> Inputs:
    """Numbers of `dtype`; the last row begins episodes, and one head of the first."""
    generator = torch.Generator().manual_seed(5)
    batch, heads, key_heads, _, width, steps = shape
    sizes = (heads, key_heads, key_heads)
    q, k, v = (torch.randn(batch, steps, h, width, generator=generator).to(dtype) for h in sizes)
    log_f = -forget * torch.rand(batch, steps, heads, generator=generator)
    start = torch.zeros(batch, steps, dtype=torch.bool)
    if steps > 20:
        log_f[0, steps // 3, -1] = -math.inf
        start[-1, [0, steps // 2, steps - 4]] = True
    return Inputs._make(x.to(DEVICE) for x in (q, k, v, log_f, start))


def new_cache(shape: Shape, dtype: torch.dtype) -> Cache:
    sizes = {name: getattr(shape, name) for name in ("batch", "heads", "key_heads", "ring")}
    return Cache.new(**sizes, width=shape.width, dtype=dtype, device=DEVICE)


def at(inputs: Inputs, t: int) -> Inputs:
    """One step, without the axis of time."""
    return Inputs._make(x[:, t] for x in inputs)


def step(inputs: Inputs, cache: Cache, **options: Any) -> Tensor:
    q, k, v, log_f, start = inputs
    return forgetting_attention_step(q, k, v, log_f, cache, start=start, **options)


def stepped(inputs: Inputs, cache: Cache, **options: Any) -> Tensor:
    """Outputs of all steps [B, T, Hq, D]."""
    outputs = [step(at(inputs, t), cache, **options) for t in range(inputs.q.shape[1])]
    return torch.stack(outputs, 1)


def copied(cache: Cache) -> Cache:
    return Cache._make(x.clone() for x in cache)


def exact(inputs: Inputs) -> Inputs:
    return Inputs._make([*(x.double() for x in inputs[:3]), *inputs[3:]])


def sequence(inputs: Inputs, window: int) -> Tensor:
    q, k, v, log_f, start = exact(inputs)
    return forgetting_attention(q, k, v, log_f, start=start, window=window, impl="reference")


def assert_as_good(ours: Tensor, theirs: Tensor, want: Tensor) -> None:
    error, allowed = ((x.double() - want).abs().max() for x in (ours, theirs))
    assert error <= 2.0 * allowed + 1e-5 * want.abs().max()


@pytest.mark.parametrize("log_eps", [None, -10.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_definition_equals_the_sequence(shape, log_eps):
    inputs = draw(shape)
    got = stepped(exact(inputs), new_cache(shape, torch.float64), log_eps=log_eps, impl="reference")
    error = 1e-12 if log_eps is None else 2.0 * math.exp(log_eps) * inputs.v.abs().max()
    assert (got - sequence(inputs, shape.ring)).abs().max() <= error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SHAPES), ("odd width, short ring", torch.float16)],
)
def test_kernel_equals_the_sequence_and_leaves_the_cache_of_the_definition(name, dtype):
    shape = SHAPES[name]
    inputs = draw(shape, dtype=dtype)
    ours, theirs = new_cache(shape, dtype), new_cache(shape, dtype)
    got = stepped(inputs, ours, log_eps=None, impl="triton")
    other = stepped(inputs, theirs, log_eps=None, impl="reference")
    assert got.dtype == dtype
    assert_as_good(got, other, sequence(inputs, shape.ring))
    for name in ("k", "v", "position", "length"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert_agree(ours.norm, theirs.norm)
    sums = (cache.decay.double().sum(2) for cache in (ours, theirs))
    torch.testing.assert_close(*sums, rtol=2.0**-44, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_window_may_be_shorter_than_the_ring(impl):
    shape = SHAPES["grouped heads, ring shorter than a block"]
    inputs = draw(shape)
    options: dict[str, Any] = dict(window=11, log_eps=None)
    got = stepped(inputs, new_cache(shape, torch.float32), **options, impl=impl)
    theirs = stepped(inputs, new_cache(shape, torch.float32), **options, impl="reference")
    assert_as_good(got, theirs, sequence(inputs, 11))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "until", "checked"),
    [(-1e9, 48, range(57, 64)), (-1e5, 51, range(53, 56))],
    ids=["in earlier laps", "in the same lap"],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_decay_is_exact_however_much_an_episode_has_forgotten(impl, gate, until, checked):
    shape = Shape(1, 2, 1, 8, 4, checked.stop)
    inputs = draw(shape, forget=1e-2)
    inputs.start.zero_()
    inputs.log_f[:, :until] = gate
    kind = torch.float32 if impl == "triton" else torch.float64
    given = inputs if impl == "triton" else exact(inputs)
    got = stepped(given, new_cache(shape, kind), log_eps=None, impl=impl)
    log_f = inputs.log_f.double()
    for t in checked:
        keys = slice(t - 7, t + 1)
        decay = log_f[0, keys].flip(0).cumsum(0).flip(0) - log_f[0, keys]  # [8, Hq]
        q, k, v = (x.double()[0] for x in inputs[:3])
        p = ((k[keys, 0] @ q[t].T) * 0.5 + decay).softmax(0)  # [8, Hq]
        want = p.T @ v[keys, 0]
        assert (got[0, t] - want).abs().max() < (1e-8 if impl == "reference" else 1e-6)


def prefilled(shape: Shape, *, forget: float) -> tuple[Inputs, Cache]:
    """All inputs, and the cache after all steps but the last, of one long episode."""
    inputs = draw(shape, forget=forget)
    inputs.start.zero_()
    inputs.log_f.clamp_(min=-forget)
    cache = new_cache(shape, torch.float32)
    stepped(Inputs._make(x[:, :-1] for x in inputs), cache, log_eps=None, impl="reference")
    return inputs, cache


def last(inputs: Inputs, cache: Cache, **options: Any) -> Tensor:
    """Output of the last step; the cache stays as it is."""
    return step(at(inputs, -1), copied(cache), **options)


LONG = Shape(2, 4, 2, 300, 16, 450)  # the newest key lies in slot 149


def keys_read(inputs: Inputs, log_eps: float) -> Tensor:
    """The keys (by age) that each head reads at the last step, by a loop: [B, Hq]."""
    batch, heads, key_heads, ring, width, steps = LONG
    read = torch.zeros(batch, heads, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            longest = inputs.k[b, :, h // (heads // key_heads)].norm(dim=1).max()
            bound = float(inputs.q[b, -1, h].norm() * longest) * width**-0.5
            threshold = log_eps - math.log(ring) - 2.0 * bound
            age = 0
            while age < ring:
                first = steps - age
                if float(inputs.log_f[b, first:, h].double().sum()) < threshold:
                    break
                age += BLOCK
            read[b, h] = min(age, ring)
    return read


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_keys_that_cannot_matter_are_not_read_and_are_not_lost(impl):
    inputs, cache = prefilled(LONG, forget=0.5)
    read = keys_read(inputs, -10.0)
    assert 0 < int(read.min()) < int(read.max()) < LONG.ring
    whole = last(inputs, cache, log_eps=None, impl=impl)
    pruned = last(inputs, cache, log_eps=-10.0, impl=impl)
    assert (pruned - whole).abs().max() <= 2.0 * math.exp(-10.0) * inputs.v.abs().max() + 1e-6
    # Past what any query head of a key head reads, keys and values may be anything.
    poisoned = copied(cache)
    age = (LONG.steps - 1 - torch.arange(LONG.ring, device=DEVICE)) % LONG.ring
    furthest = read.unflatten(1, (LONG.key_heads, -1)).amax(2).to(DEVICE)  # [B, Hkv]
    skipped = age >= furthest.unsqueeze(2)
    poisoned.k[skipped], poisoned.v[skipped] = math.nan, math.nan
    assert skipped.any()
    assert torch.equal(last(inputs, poisoned, log_eps=-10.0, impl=impl), pruned)
    # Nor is more than that skipped: one key further and the output is lost.
    edge = age == (furthest - 1).unsqueeze(2)
    poisoned.v[edge] = math.nan
    assert last(inputs, poisoned, log_eps=-10.0, impl=impl).isnan().any(2).any(1).all()
    # What is left out stays in the cache, for a query that asks louder: one along a key that
    # leads all others in its own direction.
    dots = cache.k[1, 0] @ cache.k[1, 0].T
    lead = dots.diagonal().clone() - dots.fill_diagonal_(-math.inf).amax(1)
    slot = int(lead.masked_fill(~skipped[1, 0] | (age > LONG.ring - 3), -math.inf).argmax())
    key, value = cache.k[1, 0, slot].clone(), cache.v[1, 0, slot].clone()
    step(at(inputs, -1), cache, log_eps=-10.0, impl=impl)
    loud = at(inputs, -1)._replace(q=(1e3 * key).expand(LONG.batch, LONG.heads, -1))
    assert torch.equal(step(loud, cache, log_eps=-10.0, impl=impl)[1, :2], value.expand(2, -1))


def test_kernel_prunes_the_keys_of_the_definition():
    inputs, cache = prefilled(LONG, forget=0.5)
    exactly = Cache._make([*(x.double() for x in cache[:2]), *cache[2:]])
    for log_eps in (-1e-3, -3.0, -60.0):
        ours, theirs = (
            last(inputs, cache, log_eps=log_eps, impl=impl) for impl in ("triton", "reference")
        )
        want = last(exact(inputs), exactly, log_eps=log_eps, impl="reference")
        assert_as_good(ours, theirs, want)


def test_prunable_keys_equal_a_loop():
    ring, at = 150, 40
    generator = torch.Generator().manual_seed(1)
    age = ((at - torch.arange(ring)) % ring).expand(1, 2, ring)
    decay = torch.zeros(1, 2, ring)
    total = torch.zeros(1, 2)
    for a in range(ring):
        decay[..., (at - a) % ring] = total
        total = total - torch.rand(1, 2, generator=generator)
    threshold = torch.tensor([[-20.0, -45.0]])
    got = attention_step.prunable(decay, age, threshold)
    for h in range(2):
        for a in range(ring):
            newest = decay[0, h, (at - a // BLOCK * BLOCK) % ring]
            assert got[0, h, (at - a) % ring] == (newest < threshold[0, h])
    assert 0 < int(got[0, 1].sum()) < int(got[0, 0].sum())


# The interpreter takes maxima with numpy, which warns where there is nothing but NaN.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_row_forgets_even_nan_when_an_episode_starts_and_never_harms_another(impl):
    shape = Shape(2, 4, 2, 12, 8, 30) if DEVICE == "cuda" else Shape(2, 2, 1, 6, 8, 25)
    clean = draw(shape)
    clean.start[1, 20] = True
    dirty = Inputs._make(x.clone() for x in clean)
    for x in dirty[:4]:
        x[1, 3:20] = math.nan
    options: dict[str, Any] = dict(log_eps=-10.0, impl=impl)
    want = stepped(clean, new_cache(shape, torch.float32), **options)
    got = stepped(dirty, new_cache(shape, torch.float32), **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, 20:], want[1, 20:])
    assert got[1, 3:20].isnan().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_reset_of_one_head_leaves_the_other_heads_their_keys(impl):
    shape = Shape(1, 2, 1, 8, 4, 10)
    inputs = draw(shape, forget=0.1)
    inputs.log_f[0, -1, 1] = -math.inf
    want = sequence(inputs, shape.ring)[0, -1]
    assert not torch.allclose(want[0], want[1])
    cache = new_cache(shape, torch.float32)
    stepped(Inputs._make(x[:, :-1] for x in inputs), cache, log_eps=None, impl=impl)
    out = step(at(inputs, -1), cache, log_eps=None, impl=impl)[0]
    assert (out - want).abs().max() < 1e-6
    assert_agree(out[1], inputs.v[0, -1, 0])
    assert cache.length.tolist() == [[8, 1]]
    assert cache.position.tolist() == [[2]]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_inputs_may_be_strided(impl):
    shape = Shape(2, 4, 2, 6, 8, 9)
    inputs = draw(shape)
    turned = Inputs._make(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs)
    assert turned.k[:, 0].stride(2) != 1
    caches = [new_cache(shape, torch.float32) for _ in range(2)]
    a, b = (stepped(x, c, impl=impl) for x, c in zip((inputs, turned), caches, strict=True))
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(*caches, strict=True))


def test_cache_says_what_it_takes():
    cache = Cache.new(
        batch=3, heads=4, key_heads=2, ring=10, width=8, dtype=torch.float16, device="cpu"
    )
    assert cache.nbytes == 2 * 3 * 10 * (2 * 8 * 2 + 4 * 4) + 4 * 3 * (2 * 2 + 4)
    assert cache.nbytes == sum(x.numel() * x.element_size() for x in cache)


@pytest.mark.slow
def test_operator_passes_the_checks_of_torch():
    shape = Shape(2, 4, 2, 6, 8, 1)
    q, k, v, log_f, start = (x[:, 0] for x in draw(shape))
    arguments = q, k, v, log_f, start, *new_cache(shape, torch.float32), 6, -10.0, 0.5
    torch.library.opcheck(torch.ops.cerl.forgetting_attention_step.default, arguments)


@pytest.mark.slow
def test_compiled_step_writes_the_cache_in_place():
    shape = Shape(2, 4, 2, 6, 8, 9)
    inputs = draw(shape)
    caches = [new_cache(shape, torch.float32) for _ in range(2)]
    addresses = [x.data_ptr() for x in caches[0]]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    rows = [Inputs._make(x.contiguous() for x in at(inputs, t)) for t in range(shape.steps)]
    first, code = run_and_get_code(compiled, rows[0], caches[0], impl="triton")
    assert torch.equal(first, step(rows[0], caches[1], impl="triton"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for row in rows[1:]:
            ours, theirs = (
                f(row, c, impl="triton") for f, c in zip((compiled, step), caches, strict=True)
            )
            assert torch.equal(ours, theirs)
    assert [x.data_ptr() for x in caches[0]] == addresses
    assert all(torch.equal(x, y) for x, y in zip(*caches, strict=True))
    # The operator is called once, and nothing besides it allocates, copies or computes.
    assert len(code) == 1
    call = code[0].partition("def call(")[2].partition("return (")[0]
    assert call.count("cerl.forgetting_attention_step.default(") == 1
    for other in ("clone", "copy_", "empty_strided", "cpp_fused", "triton_", "torch.ops.aten"):
        assert other not in call, call


def test_gradients_are_refused():
    shape = Shape(1, 2, 2, 4, 8, 1)
    inputs = at(draw(shape), 0)
    cache = new_cache(shape, torch.float32)
    inputs.k.requires_grad_()
    with pytest.raises(ValueError, match=r"has no gradient .* torch.no_grad"):
        step(inputs, cache)
    with torch.no_grad():
        o = step(inputs, cache)
    assert not o.requires_grad
    assert not cache.k.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 1, 8)}, r"expected q \[B, Hq, D\] and k, v"),
        ({"v": (2, 2, 7)}, r"and k, v \[B, Hkv, D\], got"),
        ({"q": (2, 4, 9)}, "q and k must share B and D"),
        ({"q": (2, 3, 8), "log_f": (2, 3)}, "Hq a multiple of Hkv"),
        ({"log_f": (2, 2)}, r"expected log_f \[2, 4\] of torch.float32, got \[2, 2\]"),
        ({"start": (3,)}, r"expected start \[2\] of torch.bool, got \[3\]"),
        ({"q": torch.float16}, "must share float32, float16 or bfloat16"),
        ({"log_f": torch.float16}, r"expected log_f \[2, 4\] of torch.float32, got .*float16"),
        ({"start": torch.int64}, r"expected start \[2\] of torch.bool, got .*int64"),
        ({"k": "meta"}, "q is on .* and k on meta"),
        ({"log_f": "meta"}, "q is on .* and log_f on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    sizes = dict(q=(2, 4, 8), k=(2, 2, 8), v=(2, 2, 8), log_f=(2, 4), start=(2,))
    sizes |= {name: x for name, x in change.items() if isinstance(x, tuple)}
    tensors = {name: torch.zeros(size, device=DEVICE) for name, size in sizes.items()}
    tensors["start"] = tensors["start"].bool()
    for name, x in change.items():
        if not isinstance(x, tuple):
            tensors[name] = tensors[name].to(x)
    cache = new_cache(Shape(2, 4, 2, 6, 8, 1), torch.float32)
    with pytest.raises(ValueError, match=message):
        step(Inputs(**tensors), cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 7}, "got 7 with a cache of 6; make the cache longer"),
        ({"window": 0}, "window counts steps from 1"),
        ({"log_eps": 0.5}, "log_eps must be below 0, got 0.5"),
        ({"check": True}, "log_f must be at most 0, got 2 values above it or NaN"),
        ({"impl": "cuda"}, "expected auto, reference or triton, got 'cuda'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    shape = Shape(2, 4, 2, 6, 8, 1)
    inputs = at(draw(shape), 0)
    inputs.log_f[0, 1], inputs.log_f[1, 2] = math.nan, 0.1
    with pytest.raises(ValueError, match=message):
        step(inputs, new_cache(shape, torch.float32), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch=3), r"expected cache.k \[2, 2, 6, 8\] of torch.float32, got \[3, 2, 6, 8\]"),
        (dict(heads=2), r"expected cache.decay \[2, 4, 2, 6\]"),
        (dict(dtype=torch.float16), r"expected cache.k .* of torch.float32, got .*float16"),
        (dict(device="meta"), "q is on .* and cache.k on meta; move one of them"),
    ],
)
def test_cache_that_does_not_fit_is_named(change, message):
    shape = Shape(2, 4, 2, 6, 8, 1)
    sizes: dict[str, Any] = shape._asdict() | dict(dtype=torch.float32, device=DEVICE) | change
    del sizes["steps"]
    inputs = at(draw(shape), 0)
    with pytest.raises(ValueError, match=message):
        step(inputs, Cache.new(**sizes))
    cache = new_cache(shape, torch.float32)
    turned = cache._replace(v=cache.v.mT.contiguous().mT)
    with pytest.raises(ValueError, match="cache.v must be contiguous"):
        step(inputs, turned)


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(ring=0), r"got \{'ring': 0\}"), (dict(heads=3), "a multiple of key_heads")],
)
def test_cache_of_impossible_sizes_is_refused(change, message):
    sizes: dict[str, Any] = dict(batch=1, heads=2, key_heads=2, ring=4, width=8) | change
    with pytest.raises(ValueError, match=message):
        Cache.new(**sizes, dtype=torch.float32, device="cpu")


def test_impl_must_fit_the_device_and_the_type(monkeypatch):
    shape = Shape(1, 2, 2, 4, 8, 1)
    inputs = Inputs._make(x.cpu() for x in at(draw(shape), 0))
    cache = Cache._make(x.cpu() for x in new_cache(shape, torch.float32))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        step(inputs, cache, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = Cache._make([*(x.double() for x in cache[:2]), *cache[2:]])
    with pytest.raises(ValueError, match=r"the kernel takes .* got float64"):
        step(exact(inputs), wide, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("forget", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(
    "shape",
    [Shape(64, 8, 8, 1024, 64, 6), Shape(3, 8, 2, 257, 40, 600), Shape(2, 16, 2, 100, 128, 230)],
)
def test_kernel_agrees_with_the_definition_at_real_sizes_in_one_graph(shape, forget):
    inputs = draw(shape, forget=forget, dtype=torch.bfloat16)
    caches = [new_cache(shape, torch.bfloat16) for _ in range(2)]
    wide = new_cache(shape, torch.float64)
    if shape.steps < shape.ring:  # as if the ring had been full
        filled = draw(shape._replace(steps=shape.ring), forget=forget)
        for cache in (*caches, wide):
            cache.k.copy_(filled.k.transpose(1, 2).bfloat16())
            cache.v.copy_(filled.v.transpose(1, 2).bfloat16())
            cache.norm.copy_(caches[0].k.float().norm(dim=3).amax(2))
            gates = filled.log_f.clamp(min=-forget).transpose(1, 2)
            cache.decay[:, :, 0].copy_(gates.cumsum(2))
            cache.length.fill_(shape.ring)
    given = Inputs._make(x.clone() for x in at(inputs, 0))
    step(given, copied(caches[0]))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(given, caches[0])
    for t in range(shape.steps):
        for x, y in zip(given, at(inputs, t), strict=True):
            x.copy_(y)
        graph.replay()
        theirs = step(given, caches[1], impl="reference")
        want = step(exact(given), wide, impl="reference")
        assert_as_good(out, theirs, want)
    for name in ("k", "v", "position", "length"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name
