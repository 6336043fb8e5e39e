"""FoX's attention is compared with the paper's equations, number by number; its cache.

Every choice of the parts of a block is a case, softmax attention with rotary positions too.
"""

import math
from typing import Any

import pytest
import torch
from rounding import assert_agree
from torch import Tensor

from cerl.kernels.attention.step import Cache
from cerl.kernels.fox import shifted
from cerl.nets.fox import Fox
from cerl.nets.parts import Parts, gate_biases

S, N, B, W, D, H = 2, 2, 2, 9, 16, 2
DH = D // H


# Options of a block beside its sizes.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"variant": "llama"},
    "pro": {"variant": "pro"},
    "bias only": {"variant": "pro", "gate": "bias_only"},
    "fixed": {"variant": "llama", "gate": "fixed"},
    "no gate": {"variant": "pro", "gate": "none"},
    "transformer": {"variant": "llama", "gate": "none", "rotary": True},
    "transformer pro": {"variant": "pro", "gate": "none", "rotary": True},
    "rotary": {"variant": "pro", "rotary": True},
    "no output gate": {"variant": "pro", "without": ("output_gate",)},
    "no output norm": {"variant": "pro", "without": ("output_norm",)},
    "no qk norm": {"variant": "pro", "without": ("qk_norm",)},
    "no shift": {"variant": "pro", "without": ("kv_shift",), "rotary": True},
    "only gates": {"variant": "pro", "without": ("output_norm", "qk_norm", "kv_shift")},
    "one key head": {"variant": "pro", "key_heads": 1, "rotary": True},
    "one key head, no gate": {"variant": "llama", "gate": "none", "key_heads": 1},
}
UNGATED = [case for case, options in CASES.items() if options.get("gate") == "none"]
every_case = pytest.mark.parametrize("case", CASES)


def make(
    case: str,
    *,
    cache: int = 4,
    prune: float | None = None,
    heads: int = H,
    impl: Any = "auto",
    **more: Any,
) -> Fox:
    fox = Fox(
        S,
        N,
        width=D,
        heads=heads,
        cache=cache,
        gate_bias=(2.0, 9.0),
        prune=prune,
        impl=impl,
        **CASES[case],
        **more,
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in fox.parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            leaf.copy_(
                noise * 0.4 if leaf.dim() == 4 and leaf.shape[2] == D else leaf + noise * 0.2
            )
    return fox


def inputs(rows: int = W, often: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(S, N, B, rows, D, generator=generator)
    return x, torch.rand(S, 1, B, rows, generator=generator) < often


def by_loops(fox: Fox, x: Tensor, start: Tensor) -> Tensor:
    """Lin et al. 2025, one query and key at a time, in float64."""
    leaf = {name: part.detach().double() for name, part in fox.named_parameters()}
    y = torch.zeros(x.shape, dtype=torch.float64)
    for s in range(S):
        for n in range(N):
            own = {name: part[s, n] for name, part in leaf.items()}
            for b in range(B):
                y[s, n, b] = sequence(fox, own, x[s, n, b].double(), start[s, 0, b])
    return y


def unit(z: Tensor, scale: Tensor, eps: float) -> Tensor:
    return z / (z.square().mean() + eps).sqrt() * scale


def turned(z: Tensor, at: int) -> Tensor:
    """Pairs (i, i + Dh / 2) as complex numbers, turned by at * 10000^(-2 i / Dh)."""
    half = len(z) // 2
    angle = torch.tensor([at * 10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(half, dtype=torch.float64), angle)
    y = torch.complex(z[:half], z[half:]) * turn
    return torch.cat([y.real, y.imag])


def sequence(fox: Fox, own: dict[str, Tensor], x: Tensor, start: Tensor) -> Tensor:
    rows, parts, group = x.shape[0], fox.parts, fox.heads // fox.key_heads
    sizes = list(fox.columns.values())
    part = dict(zip(fox.columns, (x @ own["wide.weight"]).split(sizes, 1), strict=True))
    o = torch.zeros(rows, D, dtype=torch.float64)
    for h in range(H):
        cut, g = slice(h * DH, (h + 1) * DH), h // group
        key_cut = slice(g * DH, (g + 1) * DH)
        log_f = torch.zeros(rows, dtype=torch.float64)
        if parts.gate != "none":
            bias = fox.fixed.double() if parts.gate == "fixed" else own["bias"]
            logit = part["forget"][:, h] if parts.gate == "data" else log_f
            log_f = torch.log(torch.sigmoid(logit + bias[h]))
        q, k, v = [], [], []
        for t in range(rows):
            q_t, k_t, v_t = part["q"][t, cut], part["k"][t, key_cut], part["v"][t, key_cut]
            if parts.kv_shift:
                none = t == 0 or bool(start[t])
                a_k, a_v = (torch.sigmoid(part[f"shift_{name}"][t, g]) for name in "kv")
                old_k, old_v = (
                    torch.zeros(DH) if none else part[name][t - 1, key_cut] for name in "kv"
                )
                k_t, v_t = a_k * old_k + (1 - a_k) * k_t, a_v * old_v + (1 - a_v) * v_t
            if parts.qk_norm:
                q_t, k_t = unit(q_t, own["q_scale"][h], 1e-5), unit(k_t, own["k_scale"][g], 1e-5)
            if parts.rotary:  # any number may be added to positions
                q_t, k_t = turned(q_t, t + 5), turned(k_t, t + 5)
            q.append(q_t)
            k.append(k_t)
            v.append(v_t)
        for i in range(rows):
            first = max(j for j in range(i + 1) if j == 0 or start[j])
            seen = range(max(first, i - fox.cache + 1), i + 1)
            scores = torch.stack(
                [q[i] @ k[j] / math.sqrt(DH) + log_f[j + 1 : i + 1].sum() for j in seen]
            )
            mixed = scores.softmax(0) @ torch.stack([v[j] for j in seen])
            o[i, cut] = unit(mixed, own["o_scale"][h], 1e-6) if parts.output_norm else mixed
    if parts.output_gate:
        o = o * torch.sigmoid(part["gate"])
    return o @ own["output.weight"]


@every_case
@pytest.mark.parametrize("cache", [1, 4, 20])
def test_rows_follow_the_papers_equations(case, cache):
    fox = make(case, cache=cache)
    x, start = inputs()
    with torch.no_grad():
        y, _ = fox(x, start, None, None)
    assert_agree(y, by_loops(fox, x, start))


@pytest.mark.parametrize("case", UNGATED)
def test_our_operator_and_torch_attend_alike_without_gates(case, monkeypatch):
    """On a CPU a block without gates attends by torch; here it does by our operator too."""
    fox = make(case)
    x, start = inputs()
    carry = {own: fox.carry(S * N * B, torch.float32, "cpu") for own in (False, True)}
    found, acting = {}, {}
    for own, held in carry.items():
        monkeypatch.setattr(fox, "_runs_own", lambda device, own=own: own)
        leaf = x.clone().requires_grad_()
        y, past = fox(leaf, start, None, None)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *fox.parameters()])
        found[own] = [y.detach(), *grads]
        with torch.no_grad():
            fox.refill(past, held)
            acting[own] = [
                fox.step(x[:, :, :, t : t + 1], start[..., t : t + 1], held, None) for t in range(W)
            ]
    for mine, theirs in zip(found[True] + acting[True], found[False] + acting[False], strict=True):
        assert_agree(mine, theirs)
    for mine, theirs in zip(carry[True], carry[False], strict=True):
        assert_agree(mine.float(), theirs.float())


def test_attention_of_torch_is_never_our_operator(monkeypatch):
    from cerl.nets import fox as module

    monkeypatch.setattr(module, "runs_triton", lambda impl, device: True)
    monkeypatch.setattr(module, "forgetting_attention", None)
    x, start = inputs()
    with torch.no_grad():
        y, _ = make("transformer", attention="torch")(x, start, None, None)
        with pytest.raises(TypeError):
            make("transformer")(x, start, None, None)
    assert_agree(y, by_loops(make("transformer"), x, start))


@every_case
def test_rows_in_pieces_are_the_whole(case):
    fox = make(case)
    x, start = inputs()
    with torch.no_grad():
        y, _ = fox(x, start, None, None)
        past, pieces = None, []
        for cut in (slice(0, 1), slice(1, 6), slice(6, 9)):
            piece, past = fox(x[:, :, :, cut], start[..., cut], past, None)
            pieces.append(piece)
    assert_agree(torch.cat(pieces, 3), y)


def test_gate_forgets_with_its_time_scales():
    f = torch.sigmoid(gate_biases(3, (2.0, 50.0)).double())
    want = [math.exp(-1 / 2), math.exp(-1 / 10), math.exp(-1 / 50)]
    torch.testing.assert_close(f, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert not gate_biases(3, None).any()
    assert gate_biases(1, (5.0, 50.0)).isfinite().all()


def test_shift_mixes_with_the_row_before_of_the_same_episode():
    z = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    logit = torch.tensor([0.0, math.log(3.0), 0.0, math.log(3.0)]).view(1, 4, 1)  # 1/2 3/4 1/2 3/4
    begins = torch.tensor([[False, False, True, False]])
    y = shifted(z, torch.full((1, 1, 1), 10.0), logit, begins)
    torch.testing.assert_close(y.flatten(), torch.tensor([5.5, 1.25, 2.0, 5.0]))


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNGATED])
@pytest.mark.parametrize("rows", [3, 6, 17])
def test_refill_leaves_the_cache_that_steps_leave(case, rows):
    fox, ring = make(case, cache=6), 6
    x, start = inputs(rows, often=0.1)
    ours, theirs = (fox.carry(S * N * B, torch.float32, "cpu") for _ in range(2))
    with torch.no_grad():
        _, past = fox(x, start, None, None)
        fox.refill(past, ours)
        for t in range(rows):
            fox.step(x[:, :, :, t : t + 1], start[..., t : t + 1], theirs, None)
    mine, other = Cache(*ours[:6]), Cache(*theirs[:6])
    assert torch.equal(mine.length, other.length)
    assert_agree(mine.norm, other.norm)
    shift, rotary = 2 * fox.parts.kv_shift, fox.parts.rotary
    for part, want in zip(ours[6 : 6 + shift], theirs[6 : 6 + shift], strict=True):
        assert_agree(part, want)
    assert len(ours) == len(theirs) == 6 + shift + rotary

    def newest(cache: Cache, name: str) -> Tensor:  # age 0 first
        slots = (cache.position.long().unsqueeze(2) - 1 - torch.arange(ring)) % ring  # [G, H, R]
        field: Any = getattr(cache, name)
        return field.gather(2, slots.unsqueeze(3).expand(-1, -1, -1, DH))

    seen = (torch.arange(ring) < mine.length[:, : fox.key_heads].unsqueeze(2)).unsqueeze(3)
    if rotary:  # rows are counted on across episodes by a refill, so keys are turned otherwise
        mine, other = (
            mine._replace(k=mine.k.norm(dim=3, keepdim=True).expand_as(mine.k)),
            (other._replace(k=other.k.norm(dim=3, keepdim=True).expand_as(other.k))),
        )
    for name in ("k", "v"):
        assert_agree(newest(mine, name) * seen, newest(other, name) * seen)


@pytest.mark.parametrize("rule", ["static", "running"])
@pytest.mark.parametrize("case", ["llama", "pro", "rotary", "one key head", "bias only"])
def test_pruning_skips_blocks_and_keeps_the_output(case, rule, monkeypatch):
    from cerl.nets import fox as module

    shares, operator = [], module.forgetting_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        o, skipped = operator(*args, **options, return_skipped=True)
        shares.append(skipped)
        return o

    x, start = inputs(400, often=0.0)
    outputs = []
    for prune in (None, -10.0):
        fox = make(case, cache=400, prune=prune, rule=rule)
        with torch.no_grad():
            fox.bias.sub_(2.0)
            if prune is not None:
                monkeypatch.setattr(module, "forgetting_attention", watched)
            outputs.append(fox(x, start, None, None)[0])
    assert (shares[0] > 0.2).all()
    assert_agree(outputs[1], outputs[0])
    assert fox.prune == -10.0


def test_the_running_rule_reaches_the_operator(monkeypatch):
    from cerl.nets import fox as module

    rules, operator = [], module.forgetting_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        rules.append(options["rule"])
        return operator(*args, **options)

    monkeypatch.setattr(module, "forgetting_attention", watched)
    x, start = inputs()
    with torch.no_grad():
        make("pro", prune=-10.0, rule="running")(x, start, None, None)
        make("pro", prune=-10.0)(x, start, None, None)
        make("pro", rule="running")(x, start, None, None)
    assert rules == ["running", "static", "static"]


@every_case
def test_sizes_are_numbers_of_parameters(case):
    fox = make(case)
    count = Fox.size(D, heads=H, key_heads=fox.key_heads, parts=fox.parts)
    assert sum(leaf[0, 0].numel() for leaf in fox.parameters()) == count


def test_parts_of_variants():
    whole = Parts.of("pro", gate="data", rotary=False, without=("qk_norm",))
    assert whole == Parts("data", False, True, True, False, True)
    assert Parts.of("llama", gate="none", rotary=True, without=()) == Parts(
        "none", True, False, False, False, False
    )


def test_fixed_gates_are_learnt_by_nobody_and_constants_are():
    x, start = inputs()
    for case, names in (("fixed", {"wide.weight", "output.weight"}), ("bias only", {"bias"})):
        fox = make(case)
        found = {name for name, _ in fox.named_parameters()}
        assert names <= found and ("bias" in found) == (case == "bias only")
        y, _ = fox(x, start, None, None)
        grads = torch.autograd.grad(y.square().sum(), list(fox.parameters()))
        assert all((grad != 0).any() for grad in grads)
    assert "fixed" not in make("fixed").state_dict()


@pytest.mark.parametrize("case", ["llama", "pro"])
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_of_heads_in_16_bits_start_on_16_bytes(case, heads, monkeypatch):
    from cerl.nets import fox as module

    fox, operator, seen = make(case, heads=heads), module.forgetting_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.extend((part.stride(1) * part.element_size(), part.data_ptr()) for part in (q, k, v))
        return operator(q, k, v, *rest, **options)

    monkeypatch.setattr(module, "forgetting_attention", watched)
    x, start = inputs()
    with torch.no_grad():
        fox(x.bfloat16(), start, None, None)
    assert len(seen) == 3 and all(number % 16 == 0 for pair in seen for number in pair)
