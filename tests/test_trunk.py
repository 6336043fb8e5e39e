"""The stack of blocks of every kind: acting against windows, refills, gradients, sizes, errors."""

from typing import Any, Literal, NamedTuple

import pytest
import torch
from rounding import assert_agree
from torch import Tensor

from cerl import draw
from cerl.nets.layers import initialise
from cerl.nets.parts import PRO, Gate
from cerl.nets.trunk import Trunk, make_trunk


class Options(NamedTuple):
    kind: str
    layers: int
    width: int
    heads: int
    variant: str
    ratio: float
    cache: int
    gate_bias: tuple[float, float] | None
    prune: float | None
    precision: str
    gate: Gate = "data"
    without: tuple[str, ...] = ()
    rotary: bool = False
    key_heads: int = 0
    rule: Literal["static", "running"] = "static"
    attention: Literal["own", "torch"] = "own"


OPTIONS = Options(
    kind="fox",
    layers=2,
    width=32,
    heads=2,
    variant="pro",
    ratio=3.5,
    cache=7,
    gate_bias=(2.0, 20.0),
    prune=None,
    precision="fp32",
)
KINDS = {
    "mlp": OPTIONS._replace(kind="mlp"),
    "gru": OPTIONS._replace(kind="gru"),
    "transformer": OPTIONS._replace(kind="transformer"),
    "fox llama": OPTIONS._replace(variant="llama"),
    "fox pro": OPTIONS,
    "fox bias only": OPTIONS._replace(gate="bias_only"),
    "fox fixed, llama": OPTIONS._replace(gate="fixed", variant="llama"),
    "fox rotary": OPTIONS._replace(rotary=True),
    "transformer pro": OPTIONS._replace(gate="none", rotary=True),
    "fox in parts": OPTIONS._replace(without=("qk_norm", "output_gate"), key_heads=1),
    "fox without shift": OPTIONS._replace(without=("kv_shift",), rotary=True),
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
memory_kinds = pytest.mark.parametrize(
    "options", [o for n, o in KINDS.items() if n != "mlp"], ids=[n for n in KINDS if n != "mlp"]
)
S, N, E, D_IN = 2, 3, 4, 5


def make(options: Options, *, seeds: int = S, members: int = N, impl: Any = "auto") -> Trunk:
    """A trunk in which no parameter is at its first value."""
    trunk = make_trunk(**options._asdict(), seeds=seeds, members=members, inputs=D_IN, impl=impl)
    keys = draw.seed_keys(range(seeds))
    initialise(trunk, keys=keys, scheme="fan_in")
    with torch.no_grad():
        for number, leaf in enumerate(trunk.parameters()):
            noise = draw.normal(keys, draw.NOISE, number, leaf.shape[1:])
            leaf.add_(0.3 * noise if leaf.dim() != 4 else 0.05 * noise)
    return trunk


def rows(count: int, *, streams: int = 1, envs: int = E, often: float = 0.08) -> tuple[Any, Any]:
    """Inputs [S, streams, envs, count, D_IN] and starts, the same for all streams."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(S, streams, envs, count, D_IN, generator=generator)
    start = torch.rand(S, 1, envs, count, generator=generator) < often
    return x, start


def one_by_one(trunk: Trunk, x: Tensor, start: Tensor, member: Tensor | None) -> Tensor:
    """Every row through `step`, [S, 1 or N, E, W, D]."""
    streams = 1 if member is not None else max(trunk.members, x.shape[1])
    carry = trunk.carry(seeds=S, members=streams, envs=x.shape[2], device="cpu")
    where = [part.data_ptr() for part in carry]
    outputs = []
    for t in range(x.shape[3]):
        duty = None if member is None else member[..., t]
        outputs.append(trunk.step(x[:, :, :, t], start[:, 0, :, t], carry, member=duty))
    assert where == [part.data_ptr() for part in carry]
    return torch.stack(outputs, 3)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert_agree(ours, theirs)


@every_kind
@pytest.mark.parametrize("streams", [1, N])
def test_steps_of_all_members_are_the_rows_of_a_window(options, streams):
    trunk = make(options)
    x, start = rows(24, streams=streams)
    with torch.no_grad():
        y = trunk(x, start)
    assert y.shape == (S, N, E, 24, 32) and y.dtype == torch.float32
    same(one_by_one(trunk, x, start, None), y)


@every_kind
@pytest.mark.parametrize("members", [N, 40])  # 40: weights of the rows are gathered
def test_steps_on_duty_are_the_window_of_the_member(options, members):
    trunk = make(options, members=members)
    x, start = rows(24)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(members, (S, E, 24), generator=generator)
    # Another member takes over where an episode begins, and nowhere else.
    since = (start[:, 0] * torch.arange(24)).cummax(2).values
    member = drawn.gather(2, since)
    assert (member[..., 1:] != member[..., :-1]).any()
    with torch.no_grad():
        y = trunk(x, start)
    mine = y.gather(1, member[:, None, ..., None].expand(-1, -1, -1, -1, 32))
    same(one_by_one(trunk, x, start, member), mine)


@every_kind
def test_shared_trunk_serves_whoever_is_on_duty(options):
    trunk = make(options, members=1)
    x, start = rows(12)
    with torch.no_grad():
        y = trunk(x, start)
    member = torch.randint(N, (S, E, 12), generator=torch.Generator().manual_seed(1))
    same(one_by_one(trunk, x, start, member), y)


@every_kind
def test_shared_trunk_takes_rows_of_each_member(options):
    trunk = make(options, members=1)
    x, start = rows(12, streams=N)
    with torch.no_grad():
        y = trunk(x, start)
        for n in range(N):
            same(y[:, n : n + 1], trunk(x[:, n : n + 1], start))
    same(one_by_one(trunk, x, start, None), y)


@pytest.mark.parametrize("variant", ["llama", "pro"])
def test_pruning_leaves_out_no_more_than_it_may(variant):
    options = OPTIONS._replace(variant=variant, gate_bias=(0.2, 0.5), cache=160)
    x, start = rows(160, envs=1, often=0.0)
    whole, pruned = make(options), make(options._replace(prune=-10.0))
    with torch.no_grad():
        y, z = whole(x, start), pruned(x, start)
    torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one_by_one(pruned, x, start, None), y, rtol=1e-3, atol=1e-3)


@memory_kinds
@pytest.mark.parametrize("count", [5, 7, 19])
@pytest.mark.parametrize("duty", [True, False])
def test_refill_is_steps_through_its_rows(options, count, duty):
    trunk = make(options)
    x, start = rows(count + 9)
    start[1, 0, 2, 1] = True
    member = torch.randint(N, (S, E), generator=torch.Generator().manual_seed(2)) if duty else None
    sizes: Any = dict(seeds=S, members=1 if duty else N, envs=E, device="cpu")
    ours, theirs = trunk.carry(**sizes), trunk.carry(**sizes)
    noise, begin = rows(11)
    for t in range(11):  # what a refill overwrites
        trunk.step(noise[:, :, :, t], begin[:, 0, :, t], ours, member=member)
    held = [part.clone() for part in ours]
    z = trunk.refill(x[:, :, :, :count], start[..., :count], (), member=member)
    assert all(a.equal(b) for a, b in zip(ours, held, strict=True))
    y = trunk.refill(x[:, :, :, :count], start[..., :count], ours, member=member)
    same(z, y)
    for t in range(count):
        last = trunk.step(x[:, :, :, t], start[:, 0, :, t], theirs, member=member)
    same(y, last)
    for t in range(count, count + 9):
        step = [
            trunk.step(x[:, :, :, t], start[:, 0, :, t], carry, member=member)
            for carry in (ours, theirs)
        ]
        same(*step)


@every_kind
def test_context_carries_no_gradient_and_changes_no_number(options):
    trunk = make(options)
    x, start = rows(14, often=0.05)
    start[..., 5:8] = False
    whole = trunk(x, start)
    for context in (0, 6):
        leaf = x.clone().requires_grad_()
        y = trunk(leaf, start, context=context)
        same(y, whole)
        (grad,) = torch.autograd.grad(y[:, :, :, 6:].square().sum(), leaf)
        assert (grad[:, :, :, 6:] != 0).all()
        reached = (grad[:, :, :, :6] != 0).any().item()
        assert reached == (context == 0 and options.kind != "mlp")


def test_context_gives_no_gradient_to_weights_either():
    """The gradient is that of learnt rows alone where an episode begins with them."""
    for options in KINDS.values():
        trunk = make(options)
        x, start = rows(14, often=0.05)
        start[..., 6] = True
        y = trunk(x, start, context=6)
        alone = trunk(x[:, :, :, 6:], start[..., 6:])
        ours = torch.autograd.grad(y.square().sum(), list(trunk.parameters()))
        theirs = torch.autograd.grad(alone.square().sum(), list(trunk.parameters()))
        for mine, want in zip(ours, theirs, strict=True):
            assert_agree(mine, want)


@memory_kinds
def test_no_row_sees_another_episode_or_beyond_the_window(options):
    trunk = make(options)
    x, start = rows(24, often=0.0)
    start[..., 4] = True
    leaf = x.clone().requires_grad_()
    y = trunk(leaf, start)

    def reach(t: int) -> list[int]:
        (grad,) = torch.autograd.grad(y[:, :, :, t].sum(), leaf, retain_graph=True)
        return (grad != 0).flatten(0, 2).any(0).any(1).nonzero().flatten().tolist()

    assert reach(3) == [0, 1, 2, 3] and reach(6) == [4, 5, 6]
    # A layer of attention sees 6 rows back, the shift of the oldest key one more.
    shift = options.variant == "pro" and "kv_shift" not in options.without
    back = 7 if options.kind == "fox" and shift else 6
    first = 4 if options.kind == "gru" else 23 - options.layers * back
    assert reach(23) == list(range(first, 24))


@every_kind
def test_seeds_never_touch_each_other(options):
    x, start = rows(9)
    member = torch.randint(N, (S, E, 9), generator=torch.Generator().manual_seed(2))
    results = []
    for broken in (False, True):
        trunk = make(options)
        if broken:
            with torch.no_grad():
                for leaf in trunk.parameters():
                    leaf[1] = torch.nan
        y = trunk(x, start, context=3)
        grads = torch.autograd.grad(y[0].square().sum(), list(trunk.parameters()))
        acting = [one_by_one(trunk, x, start, duty) for duty in (None, member)]
        results.append([y.detach()[0], *(grad[0] for grad in grads), *(a[0] for a in acting)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_kind
def test_bf16_blocks_are_near_fp32_and_keep_their_stream(options):
    exact, rough = make(options), make(options._replace(precision="bf16"))
    x, start = rows(12)
    with torch.no_grad():
        y, z = exact(x, start), rough(x, start)
        acting = one_by_one(rough, x, start, None)
    assert z.dtype == torch.float32 and not torch.equal(y, z)
    assert (z - y).abs().mean() < 0.03 and (acting - y).abs().mean() < 0.03


@every_kind
def test_autocast_around_it_changes_nothing(options):
    trunk = make(options)
    x, start = rows(8)
    with torch.no_grad():
        y = trunk(x, start)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(trunk(x, start), y)
            same(one_by_one(trunk, x, start, None), y)
            coarse = trunk(x.bfloat16(), start)
    torch.testing.assert_close(coarse, y, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("width, heads", [(64, 2), (64, 8), (128, 4), (256, 8), (96, 3)])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("variant, ratio", [("llama", 4.0), ("pro", 3.5)])
def test_kinds_of_one_size_have_parameters_within_five_percent(
    width, heads, layers, variant, ratio
):
    size = OPTIONS._replace(
        width=width, heads=heads, layers=layers, variant=variant, ratio=ratio, cache=9
    )
    twins = {kind: size._replace(kind=kind) for kind in ("fox", "mlp", "gru", "transformer")}
    for gate in ("bias_only", "fixed", "none"):
        twins[gate] = size._replace(gate=gate, rotary=True)
    for part in PRO if variant == "pro" else ():
        twins[part] = size._replace(without=(part,))
    twins["key heads"] = size._replace(key_heads=1)
    if variant == "pro":
        twins["bare"] = size._replace(without=PRO, key_heads=1, gate="none")
    whole = 0
    for name, options in twins.items():
        with torch.device("meta"):
            trunk = make_trunk(**options._asdict(), seeds=1, members=2, inputs=20)
        count = sum(leaf.numel() for leaf in trunk.parameters())
        whole = whole or count
        block: Any = trunk.blocks[0]
        assert block.down.fan_in % 16 == 0
        assert abs(count / whole - 1.0) < 0.05, name
        if name == "gru":
            mine = sum(leaf.numel() for leaf in block.mix.parameters())
            assert mine == 2 * type(block.mix).size(width)


def test_the_mlp_of_a_twin_gets_what_its_mixing_lacks():
    size = OPTIONS._replace(width=64, heads=2, layers=1)

    def units(**changes: Any) -> int:
        options = size._replace(**changes)
        trunk = make_trunk(**options._asdict(), seeds=1, members=1, inputs=4)
        block: Any = trunk.blocks[0]
        return block.down.fan_in

    # 2/3 * 3.5 * 64 = 149.3 -> 160 units; one unit has 3 * 64 numbers.
    assert units() == 160
    assert units(without=("output_gate",)) == 176  # 64 * 64 / 192 = 21.3 -> 16 more
    assert units(key_heads=1) == 176  # 2 * 64 * 32 / 192 = 21.3 -> 16 more
    assert units(rotary=True) == units(gate="bias_only") == 160


def test_sizes_of_the_papers_blocks():
    options = OPTIONS._replace(width=128, heads=4, layers=2)
    trunk = make_trunk(**options._asdict(), seeds=1, members=1, inputs=10)
    # 2/3 * 3.5 * 128 = 298.7 -> 304 units; five products of 128 x 128; three heads of 4 numbers.
    block: Any = trunk.blocks[0]
    assert block.down.fan_in == 304
    layer = 5 * 128 * 128 + 128 * 12 + 4 + 3 * 128 + 3 * 128 * 304 + 2 * 128
    count = sum(leaf.numel() for leaf in trunk.parameters())
    assert count == 10 * 128 + 128 + 2 * layer + 128


@every_kind
def test_a_carry_leads_with_the_streams(options):
    carry = make(options).carry(seeds=2, members=3, envs=4, device="cpu")
    assert all(part.shape[0] == 24 and not part.any() for part in carry)


@pytest.mark.parametrize("scheme", ["fan_in", "xavier", "variance", "orthogonal"])
def test_initialisation_keeps_norms_and_gates(scheme):
    for options in KINDS.values():
        trunk = make_trunk(**options._asdict(), seeds=S, members=N, inputs=D_IN)
        first = {name: leaf.clone() for name, leaf in trunk.named_parameters()}
        initialise(trunk, keys=draw.seed_keys(range(S)), scheme=scheme)
        for name, leaf in trunk.named_parameters():
            assert leaf.isfinite().all(), name
            if "scale" in name:
                assert (leaf == 1).all()
            elif name.endswith(("mix.bias",)):
                assert torch.equal(leaf, first[name])
            elif "weight" in name:
                assert 0.01 < leaf.std() < 0.7
                assert not torch.equal(leaf[0, 0], leaf[1, 0])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be mlp, gru, transformer or fox, got 'lstm'"):
        make(OPTIONS._replace(kind="lstm"))


def test_context_must_leave_rows():
    x, start = rows(5)
    with pytest.raises(ValueError, match="got 5 of 5 rows"):
        make(OPTIONS)(x, start, context=5)


KERNELS = {name: options for name, options in KINDS.items() if name != "mlp"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what other tests run on a GPU")
@pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS.keys())
def test_kernels_in_the_interpreter_give_the_same(options):
    pytest.importorskip("triton")
    x, start = rows(9, envs=2)
    member = torch.randint(N, (S, 2), generator=torch.Generator().manual_seed(2))
    duty, results = member.unsqueeze(2).expand(-1, -1, 5), []
    for impl in ("reference", "triton"):
        trunk = make(options._replace(layers=1), impl=impl)
        y = trunk(x, start, context=3)
        grads = torch.autograd.grad(y.square().sum(), list(trunk.parameters()))
        acting = one_by_one(trunk, x[:, :, :, :5], start[..., :5], duty)
        carry = trunk.carry(seeds=S, members=1, envs=2, device="cpu")
        last = trunk.refill(x, start, carry, member=member)
        results.append([y.detach(), acting, last, *carry, *grads])
    for want, ours in zip(*results, strict=True):
        assert_agree(ours, want)


@pytest.mark.slow
@every_kind
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_rows_compile_into_one_graph(options):
    trunk = make(options._replace(prune=-10.0, layers=1))
    x, start = rows(9)
    torch._dynamo.reset()  # every instance is a variant of one function
    compiled = torch.compile(trunk, fullgraph=True, backend="aot_eager")
    y = compiled(x, start, context=4)
    same(y, trunk(x, start, context=4))
    y.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in trunk.parameters())


@pytest.mark.gpu
@every_kind
def test_steps_in_a_cuda_graph_are_the_rows_of_a_window(options):
    from cerl.graph import captured

    device = torch.device("cuda")
    trunk = make(options._replace(width=128, heads=4, cache=32)).to(device)
    x, start = (part.to(device) for part in rows(80))
    member = torch.randint(N, (S, E), generator=torch.Generator().manual_seed(2)).to(device)
    sizes: Any = dict(seeds=S, envs=E, device=device)
    for duty, streams in ((member, 1), (None, N)):
        carry = trunk.carry(members=streams, **sizes)
        row, begins = torch.zeros_like(x[:, :, :, 0]), torch.zeros_like(start[:, 0, :, 0])
        out = torch.empty(S, streams, E, 128, device=device)

        def step(duty=duty, carry=carry, row=row, begins=begins, out=out) -> None:
            out.copy_(trunk.step(row, begins, carry, member=duty))

        replay, outputs = captured(step, device), []
        for t in range(80):
            row.copy_(x[:, :, :, t])
            begins.copy_(start[:, 0, :, t])
            replay()
            outputs.append(out.clone())
        with torch.no_grad():
            y = trunk(x, start)
        if duty is not None:
            y = y.gather(1, duty[:, None, :, None, None].expand(-1, 1, -1, *y.shape[3:]))
        torch.testing.assert_close(torch.stack(outputs, 3), y, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@every_kind
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # what fp32 means
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [65, 257])
def test_compiled_windows_and_gradients_are_those_of_the_cpu(options, precision, window):
    options = options._replace(width=128, heads=4, cache=200, precision=precision)
    reference, trunk = make(options._replace(precision="fp32")), make(options).cuda()
    x, start = rows(window, often=0.02)
    wanted = torch.randn(S, N, E, window, 128, generator=torch.Generator().manual_seed(1))
    want = reference(x, start, context=9)
    (want * wanted).sum().backward()
    torch._dynamo.reset()  # every instance is a variant of one function
    compiled = torch.compile(trunk, fullgraph=True)
    y = compiled(x.cuda(), start.cuda(), context=9)
    (y * wanted.cuda()).sum().backward()
    allowed = 1e-4 if precision == "fp32" else 1.2e-2
    assert (y.cpu() - want).norm() < allowed * want.norm()
    for (name, ours), theirs in zip(trunk.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        error = (ours.grad.cpu() - theirs.grad).norm()
        assert error < 5 * allowed * theirs.grad.norm() + 1e-6, name
