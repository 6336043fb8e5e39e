"""FoX without populations: against the authors' equations, and a cache against whole sequences."""

import copy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_agree
from torch import Tensor, nn
from torch.nn import functional as F

from cerl.fox import FoxAttention, FoxBlock
from cerl.fox.modules import Variant

ROOT = Path(__file__).resolve().parent.parent
B, T, D, H = 2, 11, 48, 3
DH = D // H
VARIANTS = ("llama", "pro")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shift(nn.Module):
    """A projection, and the share of the row before it, as the authors name them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False)
        self.shift_proj = nn.Linear(D, H, bias=False)


class Scale(nn.Module):
    """The scales of a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """The attention of Lin et al. 2025, with the parameters of the authors' layer, pair by pair."""

    def __init__(self, variant: str, *, shared_norm: bool = False):
        super().__init__()
        self.pro = variant == "pro"
        self.q_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(2))
        project = Shift if self.pro else lambda: nn.Linear(D, D, bias=False)
        self.k_proj, self.v_proj = project(), project()
        self.fgate_proj = nn.Linear(D, H)
        if self.pro:
            self.ogate_proj = nn.Linear(D, D, bias=False)
            self.q_norm, self.k_norm = (Scale(DH if shared_norm else D) for _ in range(2))
            self.output_norm = Scale(D)

    def forward(self, x: Tensor, begins: Tensor) -> Tensor:
        """x [B, T, D]; begins [B, T]: no row sees, or is mixed with, a row before such a row."""
        q, log_f = self.q_proj(x), F.logsigmoid(self.fgate_proj(x))
        k, v = (self.moved(part, x, begins) for part in (self.k_proj, self.v_proj))
        if self.pro:
            q, k = (unit(z, s.weight, 1e-5) for z, s in ((q, self.q_norm), (k, self.k_norm)))
        q, k, v = (z.unflatten(2, (H, DH)) for z in (q, k, v))
        rows = []
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                first = max(j for j in range(i + 1) if j == 0 or begins[b, j])
                for h in range(H):
                    scores = torch.stack(
                        [
                            q[b, i, h] @ k[b, j, h] / DH**0.5 + log_f[b, j + 1 : i + 1, h].sum()
                            for j in range(first, i + 1)
                        ]
                    )
                    rows.append(scores.softmax(0) @ v[b, first : i + 1, h])
        o = torch.stack(rows).view(*x.shape)
        if self.pro:
            o = unit(o, self.output_norm.weight, 1e-6) * torch.sigmoid(self.ogate_proj(x))
        return self.o_proj(o)

    def moved(self, part: nn.Module, x: Tensor, begins: Tensor) -> Tensor:
        if not isinstance(part, Shift):
            return part(x)
        z = part.linear(x).unflatten(2, (H, DH))
        before = F.pad(z[:, :-1], (0, 0, 0, 0, 1, 0)).masked_fill(begins[:, :, None, None], 0.0)
        share = torch.sigmoid(part.shift_proj(x)).unsqueeze(3)
        return (share * before + (1.0 - share) * z).flatten(2)


def unit(z: Tensor, scale: Tensor, eps: float) -> Tensor:
    heads = z.unflatten(2, (H, DH))
    heads = heads / (heads.square().mean(3, keepdim=True) + eps).sqrt()
    return (heads * scale.view(-1, DH)).flatten(2)


class Block(nn.Module):
    """The authors' block, by their names."""

    def __init__(self, variant: str, units: int):
        super().__init__()
        self.attn_norm, self.mlp_norm = Scale(D), Scale(D)
        self.attn = Attention(variant)
        gate, down = (nn.Linear(*sizes, bias=False) for sizes in ((D, 2 * units), (units, D)))
        self.mlp = nn.ModuleDict({"gate_proj": gate, "down_proj": down})

    def forward(self, x: Tensor, begins: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x, self.attn_norm), begins)
        gate, up = self.mlp["gate_proj"](self.norm(x, self.mlp_norm)).chunk(2, 2)
        return x + self.mlp["down_proj"](F.silu(gate) * up)

    def norm(self, x: Tensor, scale: Scale) -> Tensor:
        return x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt() * scale.weight


def noisy(net: nn.Module) -> nn.Module:
    """Gives all parameters values that matter, those of norms and biases too."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in net.parameters():
            middle = 0.0 if leaf.dim() == 2 else 0.5
            leaf.copy_(middle + 0.2 * torch.randn(leaf.shape, generator=g))
    return net.double()


def rows(count: int = T) -> Tensor:
    return torch.randn(B, count, D, generator=torch.Generator().manual_seed(2))


def begins(*places: tuple[int, int]) -> Tensor:
    marks = torch.zeros(B, T, dtype=torch.bool)
    for b, t in places:
        marks[b, t] = True
    return marks


def pair(kind: str, variant: Variant) -> tuple[FoxAttention | FoxBlock, nn.Module]:
    """Our module with the weights of the authors', and theirs in float64."""
    if kind == "attention":
        ours, theirs = FoxAttention(D, H, variant=variant), noisy(Attention(variant))
    else:
        ours, theirs = FoxBlock(D, H, variant=variant, units=40), noisy(Block(variant, 40))
    ours.load_official(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_outputs_and_gradients_are_those_of_the_authors_equations(kind, variant):
    ours, theirs = pair(kind, variant)
    marks = begins((0, 4), (1, 9))
    x, exact = rows().requires_grad_(), rows().double().requires_grad_()
    y, want = ours(x, start=marks), theirs(exact, marks)
    assert_agree(y, want)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(dy)
    want.backward(dy.double())
    assert_agree(x.grad, exact.grad)
    # Gradients of our parameters, named and placed as theirs are, are compared as weights are.
    moved = copy.deepcopy(ours)
    named = {name: torch.as_tensor(leaf.grad) for name, leaf in theirs.named_parameters()}
    moved.load_official(named)
    for (name, leaf), grads in zip(ours.named_parameters(), moved.parameters(), strict=True):
        assert_agree(leaf.grad, grads, where=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_padding_on_the_left_is_seen_by_no_row(kind, variant):
    ours, theirs = pair(kind, variant)
    x = rows()
    y = ours(x, seq_start=torch.tensor([0, 5]))
    assert_agree(y[0], theirs(x.double(), begins())[0])
    assert_agree(y[1, 5:], theirs(x[:, 5:].double(), begins()[:, 5:])[1])
    if kind == "attention":
        assert not bool(y[1, :5].any())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [(1,) * T, (4, 1, 1, 5), (T,), (1, 10)])
def test_a_cache_continues_where_the_rows_before_ended(variant, cuts):
    block, _ = pair("block", variant)
    x = rows()
    whole = block(x)
    cache = block.cache(B, T)
    parts = [block(part, cache=cache) for part in x.split(cuts, 1)]
    assert not any(part.requires_grad for part in parts)
    assert_agree(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match=f"place for {T} rows, has read {T} and was given 2 more"):
        block(x[:, :2], cache=cache)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", [(0, 5), (7, 7), (0, 6)])
def test_a_cache_may_begin_with_padding(variant, padding):
    """Six or seven rows are read at first, in some cases padding alone, and the rest one by one."""
    ours, _ = pair("attention", variant)
    x, first = rows(), max(6, *padding)
    cache = ours.cache(B, 20)
    starts = torch.tensor(padding)
    parts = [ours(x[:, :first], seq_start=starts, cache=cache)]
    parts += [ours(row, cache=cache) for row in x[:, first:].split(1, 1)]
    got = torch.cat(parts, 1)
    for b, begin in enumerate(padding):
        assert_agree(got[b, begin:], ours(x[b : b + 1, begin:])[0])
        assert not bool(got[b, :begin].any())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [1, 3, 9])
def test_a_window_is_the_size_of_the_cache(variant, first):
    block = FoxBlock(D, H, variant=variant, units=40, window=4)
    theirs = noisy(Block(variant, 40))
    block.load_official(theirs.state_dict())
    x = rows()
    whole, cache = block(x), block.cache(B)
    parts = [block(x[:, :first], cache=cache), block(x[:, first:], cache=cache)]
    assert_agree(torch.cat(parts, 1), whole)
    assert float((whole - theirs(x.double(), begins())).detach().abs().max()) > 1e-3


def test_norms_may_be_shared_by_heads():
    theirs = noisy(Attention("pro", shared_norm=True))
    ours = FoxAttention(D, H)
    ours.load_official(
        {f"layer.{n}": leaf for n, leaf in theirs.state_dict().items()}, prefix="layer."
    )
    assert_agree(ours(rows()), theirs(rows().double(), begins()))


def test_parameters_begin_as_the_authors():
    block = FoxBlock(768, 12)
    leaf = dict(block.named_parameters())
    assert (
        leaf["net.up.weight"].shape == (768, 2 * 1792) and leaf["net.down.weight"].shape[0] == 1792
    )
    assert FoxBlock(768, 12, variant="llama").net.up.weight.shape == (768, 2 * 2048)
    assert leaf["net.mix.wide.weight"].shape == (768, 4 * 768 + 3 * 12)
    for name, value in leaf.items():
        if name.endswith("weight"):
            assert float(value.detach().std()) == pytest.approx(0.02, rel=0.01)
        else:
            assert bool((value == (0.0 if name.endswith("bias") else 1.0)).all()), name
    gates = FoxAttention(D, H, gate_scales=(2.0, 50.0)).net.bias
    assert_agree(-1.0 / F.logsigmoid(gates.detach()), torch.tensor([2.0, 10.0, 50.0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_types_are_those_of_the_parameters_or_of_autocast(variant):
    block, theirs = pair("block", variant)
    x = rows()
    want = theirs(x.double(), begins())
    scale = float(want.detach().abs().max())
    half = copy.deepcopy(block).bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed, cache = block(x), block.cache(B, T)
        steps = torch.cat([block(row, cache=cache) for row in x.split(1, 1)], 1)
    assert mixed.dtype == torch.float32 and cache.tensors[0].dtype == torch.bfloat16
    for got in (y, mixed, steps):
        error = float((got.double() - want).detach().abs().max())
        assert 1e-5 * scale < error < 0.03 * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_can_be_stored_and_copied(variant, tmp_path):
    block, _ = pair("block", variant)
    x = rows()
    y = block(x)
    torch.save(block.state_dict(), tmp_path / "block.pt")
    other = FoxBlock(D, H, variant=variant, units=40)
    other.load_state_dict(torch.load(tmp_path / "block.pt"))
    assert torch.equal(other(x), y)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for leaf in block.parameters():
            leaf.zero_()
    assert torch.equal(twin(x), y) and torch.equal(block(x), x)


# Torch makes a function of autograd itself while it traces one.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_can_be_compiled(variant):
    block, _ = pair("block", variant)
    x = rows()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    grads = (
        torch.autograd.grad(net(x).sum(), list(block.parameters())) for net in (compiled, block)
    )
    for got, want in zip(*grads, strict=True):
        assert_agree(got, want)


def by_impl(block: FoxBlock, x: Tensor, starts: Tensor, dy: Tensor) -> list[Tensor]:
    """Outputs of whole sequences and of a cache, 0 in the padding; gradients of the parameters.

    The cache reads all but the last five rows at once. In float64, which caches do not take, the
    outputs of whole sequences stand for its own.
    """
    real = torch.arange(x.shape[1], device=x.device) >= starts[:, None]
    whole = cached = block(x, seq_start=starts)
    if x.dtype != torch.float64:
        cache, first = block.cache(*x.shape[:2]), x.shape[1] - 5
        parts = [block(x[:, :first], seq_start=starts, cache=cache)]
        cached = torch.cat([*parts, block(x[:, first:], cache=cache)], 1)
    outputs = [y * real.unsqueeze(2) for y in (whole, cached)]
    grads = torch.autograd.grad(outputs[0], list(block.parameters()), dy)
    return [leaf.detach().cpu().double() for leaf in (*outputs, *grads)]


def check_kernels(variant: Variant, *, width: int, heads: int, padding: list[int], length: int):
    """The error of the kernels is at most twice that of the definitions, plus 1e-5 of the largest.

    The definitions in float64 are exact. The gradients of the gates' leaves may differ by 1e-4: the
    kernels add up columns from the last position, so that a rounding error at row j is in j + 1 of
    the terms, while in the definitions it is in as many as attention reaches back.
    """
    torch.manual_seed(4)
    sizes: dict[str, Any] = dict(variant=variant, units=2 * width, gate_scales=(4.0, 100.0))
    made = {impl: FoxBlock(width, heads, **sizes, impl=impl) for impl in ("triton", "reference")}
    made["triton"].load_state_dict(made["reference"].state_dict())
    exact = copy.deepcopy(made["reference"]).double()
    g = torch.Generator().manual_seed(4)
    x, dy = (torch.randn(len(padding), length, width, generator=g) for _ in range(2))
    starts = torch.tensor(padding)
    want = by_impl(exact, x.double(), starts, dy.double())
    ours, theirs = (
        by_impl(block.to(DEVICE), x.to(DEVICE), starts.to(DEVICE), dy.to(DEVICE))
        for block in made.values()
    )
    names = ("whole", "cached", *(name for name, _ in exact.named_parameters()))
    for name, got, plain, exactly in zip(names, ours, theirs, want, strict=True):
        error, allowed = (float((leaf - exactly).abs().max()) for leaf in (got, plain))
        share = 1e-4 if name in ("net.mix.bias", "net.mix.wide.weight") else 1e-5
        assert error <= 2.0 * allowed + share * float(exactly.abs().max()), name
        assert allowed <= 1e-3 * float(exactly.abs().max()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_give_what_the_definitions_give(variant):
    pytest.importorskip("triton")
    check_kernels(variant, width=48, heads=3, padding=[0, 7], length=20)


@pytest.mark.gpu
@pytest.mark.parametrize("width, heads", [(256, 4), (288, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_give_what_the_definitions_give_at_real_sizes(
    variant, width, heads, monkeypatch
):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check_kernels(variant, width=width, heads=heads, padding=[0, 1, 300], length=700)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph_serves_all_steps_of_decoding(variant):
    block = FoxBlock(128, 2, variant=variant, units=128, gate_scales=(4.0, 100.0)).cuda()
    x = torch.randn(3, 30, 128, device="cuda")
    with torch.no_grad():
        whole = block(x)
    cache, row = block.cache(3, 30), x[:, 10:11].clone()
    block(x[:, :10], cache=cache)
    block(row, cache=cache)  # compiles the kernels of a step, which cannot be done in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(row, cache=cache)
    for t in range(11, 30):
        row.copy_(x[:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(y[:, 0], whole[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(width=50, heads=3), r"width: expected a multiple of heads \(3\), got 50"),
        (dict(width=60, heads=3), "over heads to be one of these, got 20 with 3 heads"),
        (dict(width=272, heads=2), "got 136 with 2 heads"),
        (dict(width=48, heads=0), "width: expected a multiple"),
        (dict(width=48, heads=3, variant="max"), "expected llama or pro, got 'max'"),
        (dict(width=48, heads=3, window=0), "window counts rows from 1 on, got 0"),
        (dict(width=48, heads=3, prune=0.0), "prune must be below 0, got 0.0"),
        (dict(width=48, heads=3, gate_scales=(9.0, 2.0)), "shortest and the longest"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    for kind in (FoxAttention, FoxBlock):
        with pytest.raises(ValueError, match=message):
            kind(**options)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((B, T, 40), {}, r"FoxBlock: expected x .* D = 48, got \[2, 11, 40\]"),
        ((B, T), {}, "expected x"),
        ((B, 0, D), {}, "expected x"),
        ((B, T, D), {"start": torch.zeros(B, T)}, "expected start .* of torch.float32"),
        ((B, T, D), {"seq_start": torch.tensor([0, 12])}, "FoxBlock: seq_start .* got 12"),
        ((B, T, D), {"seq_start": torch.tensor([0])}, "must be int32 or int64"),
        ((3, T, D), {"cache": (B, 20)}, r"holds \[2, 3, 20, 16\] .* expected \[3, 3"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(shape, options, message):
    block = FoxBlock(D, H)
    if "cache" in options:
        options = {"cache": block.cache(*options["cache"])}
    with pytest.raises(ValueError, match=message):
        block(torch.zeros(shape), **options)


def test_caches_that_cannot_be_made_and_padding_that_comes_late_are_named():
    block = FoxBlock(D, H)
    with pytest.raises(ValueError, match="got 2 and None; rows may be left out only by a module"):
        block.cache(B)
    with pytest.raises(ValueError, match="holds float32, float16 or bfloat16, got .*float64"):
        copy.deepcopy(block).double().cache(B, 20)
    cache = block.cache(B, 20)
    block(rows(), cache=cache)
    with pytest.raises(ValueError, match="has read 11 rows; pass it with the first call only"):
        block(rows(1), cache=cache, seq_start=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "ours, theirs, message",
    [
        ("llama", "pro", "no k_proj.weight among 12 weights"),
        ("pro", "llama", "no k_proj.linear.weight among"),
    ],
)
def test_weights_of_another_variant_are_refused(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        FoxAttention(D, H, variant=ours).load_official(Attention(theirs).state_dict())


def test_weights_of_other_sizes_or_left_over_are_refused():
    state = Attention("llama").state_dict()
    with pytest.raises(
        ValueError, match=r"other sizes; expected wide.weight \[96, 291\], got \[48, 147\]"
    ):
        FoxAttention(96, 3, variant="llama").load_official(state)
    with pytest.raises(
        ValueError, match="has no rotary.inv_freq below ''; expected fgate_proj.bias"
    ):
        FoxAttention(D, H, variant="llama").load_official(
            state | {"rotary.inv_freq": torch.ones(2)}
        )
    shared = Attention("pro", shared_norm=True).state_dict()
    with pytest.raises(ValueError, match=r"q_scale \[2, 24\], got \[16\]"):
        FoxAttention(D, 2).load_official(shared)


def test_the_examples_of_the_page_run():
    text = (ROOT / "docs/from-forgetting-transformer.md").read_text()
    examples = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(examples) == 3
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(examples[0], names)
    assert not bool(names["o"][3, :500].any()) and bool(names["q"].grad[3, 501:].any())
    exec("\n".join(examples[1:]), names)
    assert all(leaf.grad is not None for leaf in names["blocks"].parameters())
    written, x = names["text"], names["embed"](names["text"][:, :-1])
    for block in names["blocks"]:
        x = block(x)
    assert torch.equal(names["output"](x).argmax(2)[:, 99:], written[:, 100:])


def test_torch_and_triton_are_enough():
    """All other packages that cerl depends on are hidden, and the modules train and decode."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {name.split(">")[0].lower() for name in needed} - {"torch", "numpy", "filelock"}
    assert {"pydantic", "tyro", "gymnasium", "scipy"} <= names
    names = names - {"pyyaml"} | {"yaml"}
    program = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(names)}:
            raise ImportError("hidden: " + name)
sys.meta_path.insert(0, Hidden())
import torch
from cerl.fox import FoxAttention, FoxBlock, forgetting_attention
block = FoxBlock(32, 2, units=16)
block(torch.randn(2, 5, 32)).sum().backward()
cache = block.cache(2, 9)
block(torch.randn(2, 3, 32), cache=cache)
block(torch.randn(2, 1, 32), cache=cache)
q = torch.randn(1, 3, 2, 16)
forgetting_attention(q, q, q, torch.zeros(1, 3, 2))
ours = {{name.split(".")[1] for name in sys.modules if name.startswith("cerl.")}}
print(*sorted(ours))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"data", "draw", "fox", "kernels", "nets"}
