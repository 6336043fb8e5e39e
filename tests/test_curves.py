"""Short runs of every kind of agent, network and task have the losses of tests/golden/curves.

The tolerance of a case is about twenty times what rounding moved it by on other CPUs (`python -m
tests.curves spread`), relative to the largest value of a curve.
"""

import math
from pathlib import Path

import pytest
import torch
from curves import CASES, GOLDEN, Made, compare, compared, distance, golden, trained


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_golden_file(name):
    assert distance(trained(name).curves, golden(name)) <= CASES[name].tolerance


def test_every_golden_file_belongs_to_a_case():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_distance_is_relative_to_the_largest_value_of_a_metric():
    want = {"loss/0/0": [1.0, 0.0], "loss/1/0": [4.0, 0.5], "actor_loss/0/0": [-100.0, 0.0]}
    assert distance(want, want) == 0.0
    assert distance(want | {"loss/0/0": [1.0, 0.04]}, want) == pytest.approx(0.01)
    assert distance(want | {"actor_loss/0/0": [-100.0, 0.04]}, want) == pytest.approx(0.0004)
    assert distance(want | {"loss/0/0": [1.0, math.nan]}, want) == math.inf
    assert distance(want | {"loss/0/0": [1.0]}, want) == math.inf
    assert distance({"loss/0/0": [1.0, 0.0]}, want) == math.inf


def made(**state: list[float]) -> Made:
    tensors = {name: torch.tensor(values) for name, values in state.items()}
    columns = {"step": [4, 8], "return": [1.0, math.nan], "role": ["member", None]}
    return Made({"loss/0/0": [0.5, math.nan]}, tensors, {"rows": columns, "metrics": {}})


OLD = made(weight=[1.0, 2.0], bias=[0.0], scale=[0.0])


def test_equal_runs_are_equal_and_nan_equals_itself():
    verdict = compared(OLD, OLD)
    assert verdict.equal and verdict.by_content == 0 and verdict.largest == 0.0


def test_renamed_tensors_are_found_by_their_content():
    verdict = compared(OLD, made(kernel=[1.0, 2.0], bias=[0.0], offset=[0.0]))
    assert verdict.equal and verdict.by_content == 2


def test_tensors_that_exchange_names_are_found_by_their_content():
    verdict = compared(made(first=[1.0], second=[2.0]), made(first=[2.0], second=[1.0]))
    assert verdict.equal and verdict.by_content == 2


def test_one_bit_of_a_parameter_is_seen():
    above = math.nextafter(2.0, 3.0)
    assert not compared(
        Made({}, {"w": torch.tensor(2.0, dtype=torch.float64)}, {}),
        Made({}, {"w": torch.tensor(above, dtype=torch.float64)}, {}),
    ).equal
    verdict = compared(OLD, made(weight=[1.0, 2.0], bias=[-0.0], scale=[0.0]))
    assert not verdict.equal and verdict.largest == 0.0
    verdict = compared(OLD, made(weight=[1.0, 2.5], bias=[0.0], scale=[0.0]))
    assert not verdict.state and verdict.losses and verdict.tables and verdict.largest == 0.5


def test_a_tensor_that_is_gone_is_seen():
    assert not compared(OLD, made(weight=[1.0, 2.0], bias=[0.0])).equal
    assert not compared(made(weight=[1.0, 2.0], bias=[0.0]), OLD).equal


def test_rows_and_losses_that_differ_are_seen():
    tables = {**OLD.tables, "rows": {**OLD.tables["rows"], "return": [1.0, 2.0]}}
    verdict = compared(OLD, OLD._replace(tables=tables))
    assert not verdict.tables and verdict.state and verdict.notes == ["rows: column return differs"]
    verdict = compared(OLD, OLD._replace(curves={"loss/0/0": [0.75, math.nan]}))
    assert not verdict.losses and verdict.tables and verdict.largest == 0.25
    lost = {key: values for key, values in OLD.tables["rows"].items() if key != "role"}
    assert not compared(OLD, OLD._replace(tables={**OLD.tables, "rows": lost})).equal
    assert compared(OLD._replace(tables={**OLD.tables, "rows": lost}), OLD).equal


def written(folder: Path, **runs: Made) -> Path:
    folder.mkdir()
    for name, run in runs.items():
        torch.save(run._asdict(), folder / f"{name}.pt")
    return folder


def test_folders_of_runs_are_compared_in_a_table(tmp_path, capsys):
    old = written(tmp_path / "old", a=OLD, b=OLD)
    other = made(weight=[1.0, 2.5], bias=[0.0], scale=[0.0])
    assert compare(old, old)
    assert not compare(old, written(tmp_path / "new", a=OLD, b=other))
    assert ["b", "equal", "DIFFER", "equal", "0.5"] in map(
        str.split, capsys.readouterr().out.splitlines()
    )
    assert not compare(old, written(tmp_path / "less", a=OLD))
    assert compare(tmp_path / "less", old)
    assert not compare(written(tmp_path / "none"), old)
