"""Drawing and reading rows: the kernels equal their definitions bit for bit."""

import pytest
import torch

from cerl import draw
from cerl.kernels import random, sampling

pytest.importorskip("triton")
from cerl.kernels import random_triton, sampling_triton

# On a machine without CUDA the kernels run in Triton's interpreter (tests/conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ROWS, ENVS, SEEDS = 20, 3, 2


def ring(seed=0, components=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (SEEDS, ROWS, ENVS)
    action = torch.randint(0, 9, shape, generator=generator)
    if components:
        action = torch.randn(*shape, components, generator=generator)
    fields = {
        "action": action,
        "reward": torch.randn(shape, generator=generator),
        "terminated": torch.rand(shape, generator=generator) < 0.2,
        "real": torch.rand(shape, generator=generator) < 0.7,
        "member": torch.randint(0, 4, shape, generator=generator).short(),
    }
    return {name: field.to(DEVICE) for name, field in fields.items()}


def both(function, *args, **kwargs):
    expected, got = (function(*args, **kwargs, impl=impl) for impl in ("reference", "triton"))
    for want, have in zip(expected, got, strict=True):
        assert want.dtype == have.dtype
        assert torch.equal(want, have)
    return expected


@pytest.mark.parametrize("count", [1, 77, 2_500])
def test_hash_kernel_equals_the_definition(count):
    key = draw.seed_keys([3, -5, 2**40], device=DEVICE)
    for step in (0, 17, 2**33):
        at = torch.tensor(step, device=DEVICE)
        offset = draw.purpose_offset(draw.SAMPLE)
        expected, got = (
            random.hash_grid(key, at, offset=offset, count=count, impl=impl)
            for impl in ("reference", "triton")
        )
        assert torch.equal(expected, got)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("owner", ["any", "own", "disjoint"])
@pytest.mark.parametrize("total", [4, 13, 20, 57])
@pytest.mark.parametrize(("shape", "components"), [((1, 6, 8), 0), ((4, 5, 12), 3)])
def test_pick_and_window_kernels_equal_the_definitions(owner, total, shape, components, begins):
    rows = ring(components=components)
    key = draw.seed_keys([3, 5], device=DEVICE)
    step, written = (torch.tensor(x, device=DEVICE) for x in (17, total))
    picked = both(
        sampling.pick,
        key,
        step,
        written,
        rows["real"],
        rows["member"],
        offset=draw.purpose_offset(draw.SAMPLE),
        owner_offset=draw.purpose_offset(draw.OWNER),
        shape=shape,
        context=2,
        ahead=3,
        owner=owner,
        begins=begins,
    )
    row, env = picked.row[picked.hit], picked.env[picked.hit]
    seed = picked.hit.nonzero()[:, 0]
    before = rows["real"][seed, (row - 1) % ROWS, env]
    assert not (begins and before.any())
    if total <= 2 + 3:
        assert not picked.hit.any()
    both(sampling.windows, picked, *rows.values(), context=2, ahead=3)


def test_operators_are_ones_that_torch_compiles():
    rows, (key, step) = ring(), (draw.seed_keys([3, 5], device=DEVICE), torch.tensor(17))
    step, written = step.to(DEVICE), torch.tensor(57, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    for grid in (random_triton.hash_grid, random_triton.normal_grid):
        torch.library.opcheck(grid.registered, (key, step, 5, 9), test_utils=checks)
    places = (1, 2, 4, 5, 12, 2, 3, "own", True)
    call = (key, step, written, rows["real"], rows["member"], *places)
    torch.library.opcheck(sampling_triton.pick.registered, call, test_utils=checks)
    row, env, _ = sampling_triton.pick(*call)
    call = (row, env, *rows.values(), 2, 3)
    torch.library.opcheck(sampling_triton.windows.registered, call, test_utils=checks)
