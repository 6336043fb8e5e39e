"""The table of benchmarks: the rows that it prints, writes and compares."""

import contextlib
import json
import subprocess

import pytest
import torch

from cerl import __main__ as command
from cerl import bench
from cerl.bench import Slower, clock, table
from cerl.bench.rows import place
from cerl.bench.stored import partner, read
from cerl.bench.table import Output, Printed, Table


def test_columns_are_as_wide_as_the_widest_cell_so_far(capsys):
    printed = Printed("times")
    printed.add({"what": "a", "S": 1, "ms": 0.123456, "ratio": None})
    printed.add({"what": "much longer", "S": 10, "ms": 12345.678, "ratio": 2.0})
    assert capsys.readouterr().out.splitlines() == [
        "times",
        "what           S       ms    ratio",
        "a              1   0.1235",
        "much longer       10  12,345.7        2",
    ]


def test_rows_that_are_all_known_are_in_columns_as_wide_as_the_widest_cell(capsys):
    printed = Printed("times")
    printed.add_all([{"what": "a", "ms": 0.123456}, {"what": "much longer", "ms": 12345678.9}])
    printed.add_all([])
    assert capsys.readouterr().out.splitlines() == [
        "times",
        "what                   ms",
        "a                  0.1235",
        "much longer  12,345,678.9",
    ]


def test_rows_are_written_with_what_they_depend_on_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "commit", lambda: "abc+")
    out = tmp_path / "below" / "rows.jsonl"
    measured = Table("update", Output(out=out), device="GPU")
    measured.add({"what": "x", "S": 2, "microseconds": 3.5, "updates/s": 1e6 / 3.5})
    (row,) = read(out)
    assert row.pop("versions")["torch"] == torch.__version__
    assert row == {
        "bench": "update",
        "table": "update on GPU",
        "what": "x",
        "S": 2,
        "microseconds": 3.5,
        "updates/s": 1e6 / 3.5,
        "units": {"microseconds": "us"},
        "device": "GPU",
        "commit": "abc+",
    }
    measured.fail({"what": "y"}, RuntimeError("too large\nmore"))
    assert len(read(out)) == 1
    assert json.loads(out.read_text().splitlines()[1])["error"] == "RuntimeError: too large"
    with pytest.raises(RuntimeError, match="1 of 2 rows failed"):
        measured.finished()
    Table("update", Output(out=out), device="GPU").add({"what": "z", "ms": 1.0})
    assert [row["what"] for row in read(out)] == ["x", "z"]


def test_a_number_that_no_list_of_columns_knows_is_a_fault_of_ours():
    with pytest.raises(AssertionError, match="nanoseconds: a number that is measured"):
        Table("update", Output(), device="GPU").add({"what": "x", "nanoseconds": 3.5})


def test_a_row_is_told_by_everything_that_is_not_measured():
    row = {"bench": "b", "what": "x", "S": 2, "pruned": False, "ms": 1.0, "ratio": 2.0}
    assert place(row) == (("what", "x"), ("S", "2"), ("pruned", "False"))
    others = [
        row | {"S": 3},
        row | {"ms": 5.0},
        row | {"ms": 6.0, "commit": "newer"},
        {"what": "y", "S": 2},
    ]
    assert partner(row, others) == others[2]  # the last one of the same
    assert partner(row | {"N": 4}, others) == others[2]  # a column that is new since
    assert partner(row | {"what": "z"}, others) is None
    with pytest.raises(ValueError, match="what x, pruned False: 2 different rows"):
        partner({"what": "x", "pruned": False}, others)


@pytest.fixture
def stored(tmp_path):
    """Rows of a GPU, two of `update` and one of `replay`."""
    path = tmp_path / "gpu.jsonl"
    measured = Table("update", Output(out=path), device="GPU")
    for name, spent in (("x", 100.0), ("y", 50.0)):
        measured.add({"what": name, "S": 1, "microseconds": spent, "updates/s": 1e6 / spent})
    Table("replay", Output(out=path), device="GPU").add({"what": "x", "S": 1, "microseconds": 1.0})
    return path


def compared(stored, spent, *, bench="update", device="GPU", tolerance=0.02):
    """Measures the row x again. Returns: what `finished` gives."""
    measured = Table(bench, Output(against=stored, tolerance=tolerance), device=device)
    measured.add({"what": "x", "S": 1, "microseconds": spent, "updates/s": 1e6 / spent})
    return measured.finished()


def test_rows_are_compared_with_stored_ones_of_the_device(stored, capsys):
    assert compared(stored, 101.9)[0]["microseconds"] == 101.9
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "1.019" in line)
    assert line.split() == ["x", "1", "microseconds", "100", "101.9", "1.019"]
    assert "SLOWER" not in out and "commit" in out
    with pytest.raises(
        Slower, match=r"1 of 1 measurements are more than 2.0% above those in .*gpu"
    ):
        compared(stored, 102.1)
    assert "1.021  SLOWER" in capsys.readouterr().out
    compared(stored, 109.0, tolerance=0.1)
    compared(stored, 30.0)


def test_what_differs_since_is_told(stored, capsys, monkeypatch):
    monkeypatch.setattr("cerl.bench.stored.versions", lambda: {"torch": "9.9"})
    compared(stored, 100.0)
    assert f"torch {torch.__version__} (now 9.9)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "other"}, "`update` in .* are of GPU, and this is other; times can be"),
        ({"bench": "env"}, "has no rows of `env`; measure some with --out"),
        ({"tolerance": -0.1}, "--tolerance: expected a share from 0 on"),
        ({"tolerance": float("nan")}, "--tolerance: expected a share from 0 on"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_is_measured(stored, options, message):
    options = {"bench": "update", "device": "GPU", "tolerance": 0.02} | options
    output = Output(against=stored, tolerance=options["tolerance"])
    with pytest.raises(ValueError, match=message):
        Table(options["bench"], output, device=options["device"])


def test_files_that_hold_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a file of rows, but .* is no file"):
        Table("update", Output(against=tmp_path / "no"), device="GPU")
    path = tmp_path / "rows"
    path.write_text('{"bench": "update"}\nno row\n')
    with pytest.raises(ValueError, match=r"rows:2: expected a row of JSON, got 'no row'"):
        Table("update", Output(against=path), device="GPU")


def test_rows_that_were_never_measured_are_no_success(stored, capsys):
    measured = Table("update", Output(against=stored), device="GPU")
    measured.add({"what": "new", "S": 1, "microseconds": 1.0})
    with pytest.raises(ValueError, match="none of the rows was measured before"):
        measured.finished()
    assert "what new, S 1: not measured before" in capsys.readouterr().out


def test_the_commit_is_that_of_the_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "__file__", str(tmp_path / "cerl/bench/table.py"))
    assert table.commit() is None

    def git(*words):
        line = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert table.commit() is None  # has none yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag")
    assert table.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert table.commit() == git("rev-parse", "HEAD") + "+"


def test_the_list_of_kernels_is_by_time_a_call(capsys):
    class Event:
        def __init__(self, key, spent, count):
            self.key, self.self_device_time_total, self.count = key, spent, count

    events = [Event("small", 20.0, 40), Event("host", 0.0, 9), Event("large", 300.0, 20)]
    clock.list_kernels(events, calls=20)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["15.0", "1.0", "large"], ["1.0", "2.0", "small"], ["16.0", "3.0", "all"]]


def test_microseconds_are_the_median_of_a_call_on_the_cpu(monkeypatch):
    now, spans = [0.0], iter([1.0, 5.0, 1.0, 1.0, 9.0, 1.0])
    warm = []

    def step():
        warm.append(1)
        now[0] += 0.0 if len(warm) <= 6 else next(spans)

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    assert clock.microseconds(step, torch.device("cpu"), calls=1) == 1e6


def test_a_timing_makes_at_least_one_call():
    assert clock.Timing(calls=1).calls == 1
    with pytest.raises(ValueError, match="--calls: expected a number from 1 on, got 0"):
        clock.Timing(calls=0)


@pytest.mark.parametrize("name", ["update", "train", "checkpoint"])
def test_seeds_are_counted(name, capsys):
    assert command.main(["bench", name, "--seeds", "0", "--device", "cpu"]) == 2
    text = "error: --seeds: expected a number of seeds from 1 on, got 0"
    assert capsys.readouterr().err.startswith(text)


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_the_help_of_a_benchmark_says_what_a_path_leads_to(name, capsys):
    pytest.importorskip("triton")
    with contextlib.suppress(SystemExit):
        bench.run(name, ["--help"])
    text = capsys.readouterr().out
    assert "--out FILE" in text
    assert ("--against FILE" in text) == (name != "compare")
    assert ("--official FOLDER" in text) == (name in ("attention", "lm"))
    assert "PATH" not in text and "{None}" not in text and "default: None" not in text
