"""Stored studies: which configs their rows were made with, and which files are not believed."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from remake import studies
from result_rows import row, trained, write

from cerl.config import load
from cerl.record import results
from cerl.report import curves, stored

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def files(*, configs: bool) -> list[Path]:
    """Rows of all stored studies. Args: configs, of those with a configs.json, or of those without.

    A configs.json comes with rows of version 0.1; later ones state their options themselves.
    """
    listed = {name.partition("/")[0] for name, study in studies().items() if not study.bench}
    folders = [RESULTS / name for name in sorted(listed)]
    chosen = [folder for folder in folders if (folder / stored.FILE).exists() == configs]
    return [path.relative_to(RESULTS) for f in chosen for path in sorted(f.rglob("rows.parquet"))]


def test_rows_without_a_stored_config_state_their_options():
    stated = files(configs=False)
    assert len(stated) >= 55
    for path in stated:
        assert b"cerl.options" in pq.read_schema(RESULTS / path).metadata, path


def test_every_stored_run_has_its_config_and_its_hash_is_the_one_in_the_rows():
    assert len(files(configs=True)) == 83
    for file in files(configs=True):
        table = pq.read_table(RESULTS / file, columns=["config_hash", "preset", "env", "members"])
        [first] = set(map(tuple, (r.values() for r in table.to_pylist())))
        known, name, env, members = first
        found = stored.find(RESULTS / file, known)
        assert found is not None, file
        family, _, task = env.partition("/")
        assert found.options.get("env.family", family) == family
        assert found.options.get("ensemble.members", 1) == members
        if family not in ("memory", "catch"):
            assert found.options["env.name"] == task
        run = next(
            run
            for run in json.loads((RESULTS / file.parts[0] / stored.FILE).read_text())["runs"]
            if run["config_hash"] == known
        )
        assert known in stored.hashes(run["config"]) and run["preset"] == name


def test_reports_of_stored_studies_know_their_options():
    found, notes = curves.cells(curves.load_rows([RESULTS / "mujoco", RESULTS / "mujoco-fresh"]))
    assert all(cell.options is not None for cell in found)
    by = {(cell.env, cell.preset): cell for cell in found}
    # Both studies trained alike, so seeds 5 to 9 join the others.
    walker = by["mujoco/Walker2d-v4", "mujoco/paper-cerl"]
    assert walker.seeds == (*range(10),) and walker.options is not None
    assert walker.options["ensemble.heads"] == "cerl"
    assert walker.options["replay.capacity"] == 200_000
    # Runs of an early version are named.
    [note] = [note for note in notes if "an early version made the evaluations of" in note]
    assert "HalfCheetah-v4-cerl" in note and "tandem" not in note
    _, notes = curves.cells(curves.load_rows([RESULTS / "catch"]))
    assert not notes
    _, notes = curves.cells(curves.load_rows([RESULTS / "pong"]))
    assert any("evaluations of all runs" in note for note in notes)


def test_today_s_preset_of_a_study_says_what_differs_from_its_run():
    [cell] = curves.cells(curves.load_rows([RESULTS / "pong"]))[0]
    config = load("atari/ddqn-e8", {"env.backend": "envpool", "env.noop_max": 1})
    assert cell.options == results.scoring(config)


@pytest.mark.parametrize("damage", ["option", "hash", "half", "list", "section"])
def test_a_config_that_does_not_have_the_hash_of_the_rows_does_not_count(tmp_path, damage):
    run = tmp_path / "study" / "runs" / "a"
    shutil.copytree(RESULTS / "catch" / "ddqn", run)
    content = json.loads((RESULTS / "catch" / stored.FILE).read_text())
    text = json.dumps(content)
    path = tmp_path / "study" / stored.FILE
    path.write_text(text)
    [cell] = curves.cells(curves.load_rows([run]))[0]
    assert cell.options is not None
    [known] = set(pq.read_table(run / "rows.parquet")["config_hash"].to_pylist())
    own = next(one for one in content["runs"] if one["config_hash"] == known)
    if damage == "option":
        own["config"]["replay"]["capacity"] += 1
    if damage == "hash":
        own["config_hash"] = "0" * 12
    if damage == "section":
        del own["config"]["schedule"]
    text = json.dumps(content["runs"] if damage == "list" else content)
    path.write_text(text[: len(text) // 2] if damage == "half" else text)
    assert stored.find(run / "rows.parquet", known) is None
    [cell] = curves.cells(curves.load_rows([run]))[0]
    assert cell.options is None and cell.name == "catch/ddqn"


def test_rows_that_state_their_options_do_not_need_the_file(tmp_path):
    shutil.copy(RESULTS / "catch" / stored.FILE, tmp_path / stored.FILE)
    trained(tmp_path / "a", "catch/ddqn", {"replay.capacity": 1_230})
    write(tmp_path / "b", [row(preset="catch/own")])
    found, notes = curves.cells(curves.load_rows([tmp_path]))
    options = {cell.preset: cell.options for cell in found}
    assert options["catch/ddqn"] is not None and options["catch/own"] is None
    assert options["catch/ddqn"]["replay.capacity"] == 1_230 and not notes
