"""The benchmark of sweeps: the runs by hand are those of the sweep, and every part has its rows."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cerl import __main__ as command
from cerl.bench import by_hand, many_runs
from cerl.config.form import overridden
from cerl.record.results import config_hash
from cerl.report import curves
from cerl.sweep import planning
from cerl.sweep.command import planned_for
from cerl.sweep.state import states


def test_the_sweep_trains_the_runs_that_are_trained_by_hand(tmp_path, monkeypatch):
    lines: list[list[str]] = []
    monkeypatch.setattr(by_hand, "run", lambda words, **_: lines.append(words[3:]))
    runs = by_hand.Runs(cells=5, jobs=2, seconds=1.0, device="cpu", folder=tmp_path)
    by_hand.loop(runs, 700, tmp_path / "loop")
    by_hand.sweep(runs, 700, tmp_path / "sweep")
    *trained, swept = lines
    assert len(trained) == 5 and {words[0] for words in trained} == {"train"}
    configs = [overridden(words[1], words[2:], prog="cerl train") for words in trained]
    assert swept[0] == "sweep" and swept[swept.index("--jobs") + 1] == "2"

    planned = []

    # Instead of training, this only plans what the words of the command ask for.
    def plan(asked, *, note):
        planned.append(planned_for(asked, note=note))

    monkeypatch.setattr("cerl.sweep.command.sweep", plan)
    assert command.main(swept) == 0
    asked = [one.config for one in planned[0].asked]
    assert {config_hash(config) for config in asked} == {config_hash(c) for c in configs}
    assert len(asked) == len({config_hash(config) for config in asked}) == 5
    for config in (*asked, *configs):
        assert (config.schedule.steps, config.seeds, config.device) == (700, (0,), "cpu")


def test_a_run_that_fails_ends_the_benchmark_with_the_end_of_its_log(tmp_path):
    with (tmp_path / "log").open("w") as log:
        words = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
        with pytest.raises(RuntimeError, match=r"exit code 3 of: .*\nno room"):
            by_hand.run(words, stdout=log)


def test_a_folder_of_many_runs_has_runs_in_all_states_with_rows_that_a_report_reads(tmp_path):
    envs = ("breakout", "asterix")
    asked = many_runs.asked(("minatar/bootdqn",), envs, tmp_path, settings=10, seeds=2, members=3)
    planned = planning.written(planned_for(asked, note=print), tmp_path)
    many_runs.leave_states(planned, tmp_path)
    counts = {name: 0 for name in ("done", "running", "waiting", "stopped", "failed")}
    for one in states(tmp_path):
        counts[one.state] += 1
    assert counts == {"done": 14, "running": 2, "waiting": 2, "stopped": 0, "failed": 2}
    rows = many_runs.leave_rows(planned, tmp_path, evaluations=4)
    table = curves.load_rows([tmp_path])
    assert table.num_rows == rows
    found, notes = curves.cells(table)
    assert len(found) == 20 and not notes
    assert len({cell.name for cell in found}) == 10
    assert all(cell.seeds == (0, 1) and cell.members == 3 for cell in found)
    assert all(curve.returns.shape == (4, 2) for cell in found for curve in cell.curves.values())


def test_every_part_without_training_has_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("cerl.bench.sweep.REPEATS", 1)
    out = tmp_path / "rows.jsonl"
    words = ["--parts", "plan", "status", "report", "--settings", "2", "--members", "2"]
    words += ["--envs", "breakout", "--presets", "minatar/bootdqn", "--seeds", "2"]
    words += ["--folder", str(tmp_path), "--out", str(out)]
    assert command.main(["bench", "sweep", *words]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["plan"] * 3 + ["status"] + ["report"] * 7
    assert all(row["s"] > 0 and row["runs"] == 2 for row in rows)
    parts = {row["what"]: row["s"] for row in rows if row["part"] == "report"}
    assert parts["scores and intervals"] < parts["cerl report, the whole process"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("option", "value"), [("cells", "0"), ("jobs", "-1"), ("seconds", "0")])
def test_numbers_that_measure_nothing_are_refused(option, value, tmp_path, capsys):
    words = ["bench", "sweep", f"--{option}", value, "--folder", str(tmp_path)]
    assert command.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: --{option}: expected a number")


def test_runs_have_the_length_that_the_speed_of_the_first_ones_gives(tmp_path, monkeypatch):
    def train(runs, steps, out):
        for number, rate in enumerate((100.0, 300.0)):  # agent steps a second
            folder = out / str(number)
            folder.mkdir(parents=True)
            columns = {"step": [2000, 6000], "wall_seconds": [2000 / rate, 6000 / rate]}
            pq.write_table(pa.table(columns), folder / "rows.parquet")

    monkeypatch.setattr(by_hand, "loop", train)
    runs = by_hand.Runs(cells=9, jobs=2, seconds=10.0, device="cpu", folder=tmp_path)
    assert by_hand.calibrated(runs) == 2000
