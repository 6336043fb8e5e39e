"""`cerl bench compare`: two source trees are run alternately; fake trees say how long they take."""

import json
import math
from pathlib import Path

import pytest

from cerl import __main__ as command
from cerl import bench
from cerl.bench import attention, compare, runs, sac, sequences
from cerl.bench.compare import GUARDED, Turn

# Appends its name to `turns`, and writes a row of each `(part, times)`: the times of its rounds.
MAIN = """
import json, pathlib, sys
here = pathlib.Path(__file__).resolve().parent.parent
turns = here.parent / "turns"
done = turns.read_text().split() if turns.exists() else []
turns.write_text(" ".join([*done, here.name]))
words = sys.argv[1:]
assert words[:2] == ["bench", "update"], words
if "--fail" in words:
    sys.exit("no such thing")
rows = json.loads((here / "rows.json").read_text())
with open(words[words.index("--out") + 1], "a") as file:
    for head, times in rows:
        spent = times[done.count(here.name)]
        file.write(json.dumps(head | {"microseconds": spent, "updates/s": 1.0}) + chr(10))
"""


@pytest.fixture
def trees(tmp_path):
    """Makes the trees old and new of rows, each with the times of its rounds."""

    def make(**rows):
        for name, given in rows.items():
            (tmp_path / name / "cerl").mkdir(parents=True)
            (tmp_path / name / "cerl/__init__.py").write_text("")
            (tmp_path / name / "cerl/__main__.py").write_text(MAIN)
            (tmp_path / name / "rows.json").write_text(json.dumps(given))
        return tmp_path

    return make


def run(folder, *words):
    return command.main(["bench", "compare", str(folder / "old"), str(folder / "new"), *words])


OLD = ({"table": "update on GPU", "what": "x", "part": "update"}, [100.0, 110.0, 120.0])
NEW = {"bench": "update", "what": "x", "part": "update", "B": 32, "device": "GPU"}


def test_trees_run_in_turns_and_ratios_are_paired(trees, tmp_path, capsys):
    """Machines drift: by 10% a round here, which the ratios do not show."""
    other = ({"what": "x", "part": "gone"}, [1.0] * 3)
    folder = trees(
        old=[OLD, other],
        new=[(NEW, [101.0, 111.1, 121.2]), (NEW | {"part": "sample"}, [1.0] * 3)],
    )
    out = tmp_path / "rows.jsonl"
    assert run(folder, "update", "--rounds", "3", "--calls", "7", "--out", str(out)) == 0
    assert (folder / "turns").read_text() == "old new new old old new"
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "1.010" in line)
    assert line.split() == [
        *("x", "update", "32", "microseconds", "110", "111.1", "1.010", "1.010", "to", "1.010")
    ]
    assert "what x, part sample, B 32: not measured by both" in text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["round"] for row in rows if row["tree"] == "old"] == [0, 0, 1, 1, 2, 2]


def test_slower_than_the_tolerance_is_exit_code_1(trees, capsys):
    folder = trees(old=[OLD], new=[(NEW, [103.0, 113.4, 123.5])])
    assert run(folder, "update", "--rounds", "3") == 1
    captured = capsys.readouterr()
    assert "SLOWER" in captured.out
    assert "slower: 1 measurements, the first what x, part update" in captured.err
    (folder / "turns").unlink()
    assert run(folder, "update", "--rounds", "3", "--tolerance", "0.04") == 0


def test_what_varies_too_much_is_unsure_and_no_failure(trees, capsys):
    folder = trees(old=[OLD], new=[(NEW, [90.0, 120.0, 150.0])])
    assert run(folder, "update", "--rounds", "3") == 0
    assert "unsure" in capsys.readouterr().out


def test_the_interval_is_students():
    turn = Turn([1.0, 1.0, 1.0], [math.exp(0.01), math.exp(0.02), math.exp(0.03)])
    ratio, low, high = turn.ratio()
    half = 4.303 * 0.01 / math.sqrt(3)
    assert ratio == pytest.approx(math.exp(0.02))
    assert low == pytest.approx(math.exp(0.02 - half), rel=1e-4)
    assert high == pytest.approx(math.exp(0.02 + half), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["update", "--rounds", "1"], "--rounds: expected a number from 2 on, got 1"),
        (["update", "--tolerance", "-1"], "--tolerance: expected a share from 0 on"),
        (["updat"], "no benchmark 'updat'"),
        (["compare"], "no benchmark 'compare'"),
        (["--calls", "3"], "'--calls' is an option of which benchmark?"),
        (["update", "--fail", "x"], "cerl bench update --fail x failed under"),
        (["update", "--calls", "1", "--calls", "2"], "--calls: given 2 times"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(trees, capsys, words, message):
    folder = trees(old=[OLD], new=[(NEW, [1.0] * 5)])
    assert run(folder, *words) == 2
    assert message in capsys.readouterr().err


def test_trees_without_rows_in_common_are_refused(trees, capsys):
    folder = trees(old=[OLD], new=[(NEW | {"what": "y"}, [1.0] * 5)])
    assert run(folder, "update", "--rounds", "2") == 2
    assert "the two trees measure nothing in common" in capsys.readouterr().err


def test_a_folder_without_the_package_is_no_tree(trees, capsys):
    folder = trees(old=[OLD])
    (folder / "new").mkdir()
    assert run(folder, "update") == 2
    assert "expected new to be a source tree with cerl/, got" in capsys.readouterr().err
    assert not (folder / "turns").exists()


def test_without_a_name_all_that_is_guarded_runs(trees, monkeypatch, capsys):
    times = [100.0] * 4  # one for the run that fails
    folder = trees(old=[(OLD[0], times)], new=[(NEW, times)])
    monkeypatch.setattr(compare, "GUARDED", ("update --fail", "update"))
    assert run(folder, "--rounds", "3") == 2
    captured = capsys.readouterr()
    assert "cerl bench update: " in captured.out
    assert "1 benchmarks failed, the first: cerl bench update --fail failed" in captured.err


@pytest.mark.parametrize("line", GUARDED)
def test_guarded_benchmarks_can_be_read(line, monkeypatch):
    class Read(Exception):
        pass

    def stop(*_):
        raise Read

    for module in (runs, sac, sequences):
        monkeypatch.setattr(module, "pick", stop)
    monkeypatch.setattr(attention, "needed_device", stop)
    name, *words = line.split()
    with pytest.raises(Read):
        bench.run(name, words)


def test_every_benchmark_is_a_function_of_its_module():
    for name, (module, _) in bench.BENCHMARKS.items():
        text = (Path(bench.__file__).parent / f"{module}.py").read_text()
        assert f"\ndef {name.replace('-', '_')}(" in text
