"""Optimisers are compared with loops in float64 and torch's Adam; members are independent."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_agree

from cerl.config import AdamConfig, RmsPropConfig
from cerl.kernels import optim as kernels
from cerl.optim import Optimiser, clip_members

SHAPES = [(2, 3, 4, 5), (2, 3, 5), (2, 1, 6)]


def tensors(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def run(config, grads, leaves):
    leaves = [leaf.clone() for leaf in leaves]
    optimiser = Optimiser(config, leaves)
    for step in grads:
        optimiser.step(step)
    return leaves


def slow_rmsprop(w, grads, *, lr, decay, eps, momentum):
    m = v = d = np.zeros_like(w)
    for g in grads:
        m = decay * m + (1 - decay) * g
        v = decay * v + (1 - decay) * g * g
        d = momentum * d + lr * g / np.sqrt(v - m * m + eps)
        w = w - d
    return w


def slow_adam(w, grads, *, lr, beta1, beta2, eps):
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return w


def numbers(x):
    return x.double().numpy()


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_rmsprop_is_centred_with_epsilon_inside_the_root(momentum, scale):
    options: dict[str, Any] = dict(lr=2.5e-4, decay=0.95, eps=9.765625e-6, momentum=momentum)
    start, grads = tensors(0, 1e-4), [tensors(k, scale) for k in range(1, 21)]
    ours = run(RmsPropConfig(**options), grads, start)
    for k, leaf in enumerate(ours):
        want = slow_rmsprop(numbers(start[k]), [numbers(g[k]) for g in grads], **options)
        moved = want - numbers(start[k])
        assert_agree(leaf - start[k], moved)


def test_rmsprop_by_hand():
    # g = 2: m = 0.1 * 2, v = 0.1 * 4, root = sqrt(0.4 - 0.04 + 0.28) = 0.8, step = 0.5 * 2 / 0.8
    leaf = torch.ones(1, 1, 1)
    config = RmsPropConfig(lr=0.5, decay=0.9, eps=0.28)
    Optimiser(config, [leaf]).step([torch.full((1, 1, 1), 2.0)])
    assert float(leaf) == pytest.approx(1 - 1.25)


def test_rmsprop_survives_a_constant_gradient_whose_variance_rounds_below_zero():
    leaf = torch.zeros(1, 1, 64)
    config = RmsPropConfig(lr=1e-3, decay=0.95, eps=1e-10)
    optimiser = Optimiser(config, [leaf])
    grad = torch.linspace(0.1, 3000, 64).view(1, 1, 64)
    for _ in range(600):
        optimiser.step([grad])
    assert bool(leaf.isfinite().all())


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_adam_equals_the_published_algorithm_and_torchs(scale):
    options: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=3.125e-4)
    start, grads = tensors(0, 1e-4), [tensors(k, scale) for k in range(1, 31)]
    ours = run(AdamConfig(**options), grads, start)
    theirs = [torch.nn.Parameter(leaf.clone()) for leaf in start]
    adam = torch.optim.Adam(theirs, lr=1e-3, betas=(0.9, 0.999), eps=3.125e-4)
    for step in grads:
        for leaf, grad in zip(theirs, step, strict=True):
            leaf.grad = grad.clone()
        adam.step()
    for k, leaf in enumerate(ours):
        want = slow_adam(numbers(start[k]), [numbers(g[k]) for g in grads], **options)
        moved = want - numbers(start[k])
        assert_agree(leaf - start[k], moved)
        assert_agree(leaf, theirs[k].data)


def test_clipping_scales_each_members_gradient_and_shared_leaves_apart():
    grads = tensors(4)
    grads[0][0, 1], grads[1][0, 1] = 0.0, 0.01  # a member below the limit stays as it is
    clipped = clip_members(grads, 2.0)
    for s in range(2):
        for i in range(3):
            norm = math.sqrt(sum(float(grads[k][s, i].double().square().sum()) for k in (0, 1)))
            factor = min(1.0, 2.0 / norm)
            for k in (0, 1):
                assert_agree(clipped[k][s, i], grads[k][s, i] * factor)
        norm = math.sqrt(float(grads[2][s].double().square().sum()))
        assert_agree(clipped[2][s], grads[2][s] * min(1.0, 2.0 / norm))
    assert torch.equal(clipped[1][0, 1], grads[1][0, 1])
    assert float(grads[0][1, 2].norm()) > 2  # the limit bound somewhere


def test_clipping_of_a_single_member_counts_all_its_leaves():
    grads = [torch.full((1, 1, 3), 1.0), torch.full((1, 1, 2, 3), 1.0)]
    clipped = clip_members(grads, 1.5)
    assert torch.cat([g.flatten() for g in clipped]).tolist() == pytest.approx([0.5] * 9)


@pytest.mark.parametrize(
    "config",
    [
        RmsPropConfig(lr=1e-2, eps=1e-4, momentum=0.5, clip_norm=0.7),
        AdamConfig(lr=1e-2, clip_norm=0.7),
    ],
    ids=["rmsprop", "adam"],
)
def test_stacked_members_move_as_separate_ones(config):
    start, grads = tensors(0)[:2], [tensors(k)[:2] for k in range(1, 8)]
    stacked = run(config, grads, start)
    for s in range(2):
        for i in range(3):
            part = (slice(s, s + 1), slice(i, i + 1))
            alone = run(
                config, [[g[part] for g in step] for step in grads], [w[part] for w in start]
            )
            for together, single in zip(stacked, alone, strict=True):
                assert_agree(together[part], single)


@pytest.mark.parametrize(
    "config",
    [RmsPropConfig(lr=1e-2, clip_norm=1.0, momentum=0.3), AdamConfig(lr=1e-2, clip_norm=1.0)],
    ids=["rmsprop", "adam"],
)
def test_a_nan_gradient_of_one_seed_leaves_the_others_bitwise_alone(config):
    start, clean = tensors(0), [tensors(k) for k in range(1, 4)]
    broken = [[g.clone() for g in step] for step in clean]
    for step in broken:
        for g in step:
            g[1] = float("nan")
    for a, b in zip(run(config, clean, start), run(config, broken, start), strict=True):
        assert torch.equal(a[0], b[0]) and bool(b[1].isnan().all())


@pytest.mark.parametrize(
    "config", [RmsPropConfig(lr=1e-2, momentum=0.5), AdamConfig(lr=1e-2)], ids=["rmsprop", "adam"]
)
def test_a_saved_optimiser_goes_on_bitwise_and_in_place(config):
    grads = [tensors(k) for k in range(1, 9)]
    whole = run(config, grads, tensors(0))
    leaves = tensors(0)
    first = Optimiser(config, leaves)
    for step in grads[:4]:
        first.step(step)
    second = Optimiser(config, leaves)
    places = [x.data_ptr() for x in (*second.first, *second.second, second.count)]
    second.load_state_dict(first.state_dict())
    assert places == [x.data_ptr() for x in (*second.first, *second.second, second.count)]
    for step in grads[4:]:
        second.step(step)
    assert all(torch.equal(a, b) for a, b in zip(whole, leaves, strict=True))


@pytest.mark.parametrize(
    "config", [RmsPropConfig(lr=0.1), AdamConfig(lr=0.1)], ids=["rmsprop", "adam"]
)
def test_targets_move_towards_the_new_leaves(config):
    leaves, targets, grads = tensors(0), tensors(1), [tensors(k) for k in range(2, 5)]
    optimiser, alone = Optimiser(config, leaves, targets=targets, rate=0.25), tensors(0)
    other, wanted = Optimiser(config, alone), tensors(1)
    for step in grads:
        optimiser.step(step)
        other.step(step)
        wanted = [0.75 * old + 0.25 * new for old, new in zip(wanted, alone, strict=True)]
    for ours, theirs in zip((*leaves, *targets), (*alone, *wanted), strict=True):
        assert_agree(ours, theirs)
    with pytest.raises(ValueError, match="one of each of 3 leaves or none, got 2"):
        Optimiser(config, leaves, targets=targets[:2], rate=0.25)


@pytest.mark.parametrize("count", [1, 3, 1_000, 3_000_000])
def test_adams_kernel_corrects_early_and_late_moments(count):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    kinds: list[tuple[Any, torch.dtype]]
    kinds = [("reference", torch.float64), ("triton", torch.float32)]
    for impl, dtype in kinds:
        w, g, m = ([x.to(device, dtype)] for x in tensors(0)[:1] + tensors(1)[:1] + tensors(2)[:1])
        v = [m[0].square() * (1.0 - 0.999**count)]
        options: dict[str, Any] = dict(lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, rate=0.0)
        step = torch.tensor(count, device=device)
        kernels.adam(w, g, m, v, (), count=step, **options, impl=impl)
        results.append(w[0])
    assert_agree(results[1], results[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
@pytest.mark.parametrize("targets", [0, 2])
def test_operators_are_ones_that_torch_compiles(targets):
    pytest.importorskip("triton")
    from cerl.kernels import optim_triton

    *lists, others = ([torch.rand(3, 2) for _ in range(count)] for count in (2, 2, 2, 2, targets))
    checks = ("test_schema", "test_faketensor")
    call: tuple[Any, ...] = (*lists, others, 0.1, 0.9, 1e-3, 0.5 if targets else 0.0)
    torch.library.opcheck(optim_triton.rmsprop.registered, call, test_utils=checks)
    call = (*lists, others, torch.tensor(3), 0.1, 0.9, 0.99, 1e-3, 0.1)
    torch.library.opcheck(optim_triton.adam.registered, call, test_utils=checks)
