"""Benchmarks of SAC on the CPU: their rows; results for all block sizes; sizes that are refused."""

import json

import pytest
import torch

from cerl.bench import sac, sac_tiles
from cerl.bench.clock import Timing
from cerl.bench.table import Output
from cerl.bench.tiles import difference
from cerl.kernels.runtime.blocks import Blocks

CPU = torch.device("cpu")


def test_a_row_for_every_part_and_precision(tmp_path):
    rows = sac.sac(
        sizes=("1,2,3,1",),
        preset="point_mass/cerl",
        precisions=("fp32", "bf16"),
        capacity=2_000,
        parts=True,
        timing=Timing(device="cpu", calls=1),
        output=Output(out=tmp_path / "rows.jsonl"),
    )
    parts = ["update", "sample"]
    parts += [f"{x} of stage {k}" for k in (1, 2) for x in ("loss and gradients", "optimiser")]
    assert [(row["products"], row["part"]) for row in rows] == [
        (products, part) for products in ("fp32", "bf16") for part in parts
    ]
    assert all(row["ms"] > 0 and (row["S"], row["N"], row["obs"]) == (1, 2, 3) for row in rows)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["ms"] for row in written] == [row["ms"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "wanted"), [("mujoco/cerl", 1.142), ("mujoco/ensemble", None)])
def test_the_authors_time_stands_beside_their_update_alone(preset, wanted):
    options = {"precisions": ("fp32",), "capacity": 12_000}
    options["timing"] = Timing(device="cpu", calls=1)
    (row,) = sac.sac(sizes=("1,10,17,6",), preset=preset, **options)
    assert row["official JAX"] == wanted


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_launches_agree_whatever_the_blocks(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(sac_tiles, "BATCH", 20)
    monkeypatch.setattr(sac_tiles, "HIDDEN", 24)
    works = sac_tiles.works(sac.Size(1, 1, 5, 2)) + sac_tiles.works(sac.Size(1, 1, 33, 2))
    assert len({work.name for work in works}) == len(works) == 15
    for work in works:
        choices = sac_tiles.candidates(work)
        assert choices[0] is None and len(set(choices)) == len(choices) > 2
        call = sac_tiles.launch(work, 1, CPU, dtype=torch.float32)
        own = call(None)
        for blocks in (Blocks(16, 16, 16, 4, 1), Blocks(16, 16, 16, 4, 1, 16)):
            assert difference(call(blocks), own) < 1e-5
        assert any(result.numel() and bool(result.any()) for result in own)
        spoilt = [result * 1.5 if result.is_floating_point() else result for result in own]
        assert difference(spoilt, own) > 0.1


@pytest.mark.parametrize("size", ["10,10,17", "10,10,17,6,1", "0,1,1,1", "a,1,1,1", ""])
def test_sizes_that_are_not_four_numbers_are_named(size):
    with pytest.raises(ValueError, match="--sizes: expected S,N,observation,actions like"):
        sac.sac(sizes=(size,))
