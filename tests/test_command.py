"""`cerl sweep` from the words of the command line to run folders: what is asked, planned, refused.

The launcher is replaced by a stand-in that notes which runs it gets, except where runs are trained.
"""

import json
from pathlib import Path

import pytest
import torch

from cerl import __main__ as command
from cerl.config import load
from cerl.record import finished
from cerl.record.folder import load_file
from cerl.sweep import local
from cerl.sweep.cells import cells
from cerl.sweep.study import load_study
from cerl.sweep.study import title as title_of

TINY = "--schedule.steps 400 --eval.every 200 --eval.episodes 2 --replay.start 50 --log.every 200"


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """Calls of the launcher: the configs of the runs, their folder, and the launcher's options."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def sweep(runs, out, **more):
        calls.append(([load_file(out / run.folder / "config.yaml") for run in runs], out, more))

    monkeypatch.setattr(local, "sweep", sweep)
    return calls


def refused(capsys, line: str) -> str:
    """The error of a command, which writes nothing else."""
    capsys.readouterr()
    assert command.main(line.split()) == 2
    return capsys.readouterr().err


def plain(configs):
    """Configs without the options that may change in a run."""
    return [config.model_copy(update={"out": "", "device": "auto"}) for config in configs]


def test_a_sweep_is_presets_times_environments_with_options(swept):
    line = "sweep minatar/ddqn minatar/cerl --envs asterix freeway --seeds 1 2 --out study"
    assert command.main(line.split()) == 0
    configs, out, more = swept[0]
    assert out == Path("study")
    assert more == {"jobs": None, "per_gpu": None, "mps": False, "device": "auto"}
    expected = [
        load(name, {"env.name": env, "seeds": [1, 2]})
        for env in ("asterix", "freeway")
        for name in ("minatar/ddqn", "minatar/cerl")
    ]
    assert plain(configs) == plain(expected)


def test_a_grid_is_a_product_and_leaves_the_single_agent_alone(swept, capsys):
    line = "sweep minatar/ddqn minatar/bootdqn minatar/cerl --envs minatar-5 --seeds 0..4"
    grid = "--grid ensemble.members=2,5,10 replay.capacity=25k,100k,400k"
    assert command.main([*line.split(), *grid.split()]) == 0
    configs = swept[0][0]
    assert len(configs) == 5 * (3 + 2 * 9)
    assert {config.seeds for config in configs} == {(0, 1, 2, 3, 4)}
    single = [config for config in configs if config.preset == "minatar/ddqn"]
    assert {config.ensemble.members for config in single} == {1}
    assert {config.replay.capacity for config in single} == {25_000, 100_000, 400_000}
    assert "minatar/ddqn has one member, so the axis ensemble.members leaves" in (
        capsys.readouterr().err
    )


def test_a_shipped_study_goes_into_a_folder_of_its_name(swept):
    assert command.main(["sweep", "ensemble-size", "--envs", "breakout", "--jobs", "4"]) == 0
    configs, out, more = swept[0]
    assert out == Path("runs/ensemble-size") and more["jobs"] == 4
    assert len(configs) == 9
    names = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert names[0] == "0001-ddqn-breakout"
    assert names[2] == "0003-bootdqn-members-5-breakout"
    plan = json.loads((out / "plan.json").read_text())
    assert plan["study"] == title_of(["ensemble-size"]) == "ensemble-size"


def test_a_longer_command_adds_runs_and_keeps_those_there_are(swept):
    base = "sweep catch/ddqn catch/bootdqn --grid catch/bootdqn:ensemble.members=2,3"
    for seeds, count in (("0..1", 3), ("0..2", 6)):
        assert command.main([*base.split(), "--seeds", seeds]) == 0
        assert len(swept[-1][0]) == count
    # Seed 2 is trained alone; the runs of seeds 0 and 1 are the same as before.
    assert [config.seeds for config in swept[-1][0]] == [(0, 1), (2,)] * 3
    folders = [path.name for path in Path("runs/sweep").iterdir() if path.is_dir()]
    assert len(folders) == 6


def test_seeds_are_split_over_runs(swept):
    line = "sweep catch/ddqn --seeds 0..4 --seeds-per-run 2"
    assert command.main(line.split()) == 0
    found = [config.seeds for config in swept[0][0]]
    assert sum(found, ()) == (0, 1, 2, 3, 4)
    assert sorted(map(len, found)) == [1, 2, 2]


def test_the_command_line_overrides_the_options_of_a_study(swept):
    for number, given in enumerate(([], ["--log.save-replay"])):
        line = ["sweep", "remember", "--env.length", "7", "--out", str(number), *given]
        assert command.main(line) == 0
    names = ("memory/mlp", "memory/gru", "memory/transformer", "memory/fox")
    for (configs, *_), save in zip(swept, (False, True), strict=True):
        options = {"env.length": 7, "log.save_replay": save}
        assert plain(configs) == plain([load(name, options) for name in names])


@pytest.mark.parametrize("cuda", [False, True])
def test_demo_picks_its_presets_by_device(swept, monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("cerl.sweep.slots.chosen", lambda device: ["0"] if cuda else [])
    split = ["--seeds-per-run", "16"]  # by default, the memory of the GPU would decide
    assert command.main(["sweep", "demo", *split]) == 0
    study = load_study("demo", "cuda" if cuda else "cpu")
    expected = [cell.config for cell in cells(study)]
    assert plain(swept[0][0]) == plain(expected)
    assert swept[0][0][0].env.family == ("minatar" if cuda else "catch")
    line = ["sweep", "demo", "--device", "cpu", "--seeds", "9", "--out", "other", *split]
    assert command.main(line) == 0
    assert [run.env.family for run in swept[1][0]] == ["catch"] * 4
    assert {run.seeds for run in swept[1][0]} == {(9,)}


def test_a_dry_run_says_what_there_would_be_and_writes_nothing(swept, capsys):
    line = "sweep catch/ddqn catch/bootdqn --grid ensemble.members=2,3 --seeds 0..1 --dry-run"
    assert command.main(line.split()) == 0
    out = capsys.readouterr().out
    assert "0003  bootdqn, members 3" in out and "3 runs with 6 seeds in all" in out
    assert "0 done, 0 begun, 3 new" in out
    assert swept == [] and list(Path().iterdir()) == []


def test_failed_runs_are_reported_with_the_others_and_end_in_exit_code_2(
    monkeypatch, tmp_path, capsys
):
    """A run whose checkpoint folder cannot be made fails; the other one is trained and reported."""
    monkeypatch.chdir(tmp_path)
    line = f"sweep catch/ddqn catch/bootdqn --grid ensemble.members=2 --seeds 0 {TINY}"
    train = local._train

    def failing(run, *rest, **more):
        if run.number == 1:
            raise OSError("the disk is full")
        return train(run, *rest, **more)

    monkeypatch.setattr(local, "_train", failing)
    assert command.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert "1 of 2 runs failed" in err and "the disk is full" in err
    assert "bootdqn" in Path("runs/sweep/table.md").read_text()
    assert "failed" in out
    assert command.main(["status", "runs/sweep"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs: 1 done, 1 failed" in shown and "the disk is full" in shown
    # The same command tries the failed run again, and keeps the other.
    monkeypatch.setattr(local, "_train", train)
    before = Path("runs/sweep/0002-bootdqn-catch/rows.parquet").stat().st_mtime_ns
    assert command.main(line.split()) == 0
    assert command.main(["status", "runs/sweep"]) == 0
    assert "2 runs: 2 done" in capsys.readouterr().out
    assert Path("runs/sweep/0002-bootdqn-catch/rows.parquet").stat().st_mtime_ns == before


def test_failed_runs_are_named_even_if_the_report_fails_too(swept, monkeypatch, capsys):
    def failing(runs, out, **more):
        (out / runs[0].folder / "rows.parquet").write_bytes(b"damaged")
        raise RuntimeError("1 of 1 runs failed: run 1")

    monkeypatch.setattr(local, "sweep", failing)
    assert command.main(["sweep", "catch/ddqn", "--seeds", "0"]) == 2
    error = capsys.readouterr().err
    assert "error: 1 of 1 runs failed: run 1" in error
    assert "note: runs/sweep: the report could not be written: " in error


def test_a_dry_run_knows_runs_that_are_asked_to_train_longer(swept, tmp_path, capsys):
    line = "sweep catch/ddqn --seeds 0 --out here --schedule.steps"
    assert command.main([*line.split(), "4000"]) == 0
    finished.mark(next(Path("here").glob("0001-*")), 4000)
    capsys.readouterr()
    assert command.main([*line.split(), "6000", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "to go on, 66.6%" in out and "1 run with 1 seed in all" in out
    assert "0 done, 1 begun, 0 new" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sweep", "usage: cerl sweep"),
        ("sweep minatar/ddqn ensemble.members=3", "did you mean --grid ensemble.members=3?"),
        ("sweep minatar/cerl --ensemble.members 2 5", "did you mean --grid ensemble.members=2,5?"),
        ("sweep minatar/cerl --grid", "--grid: expected a value, got nothing"),
        ("sweep minatar/cerl --grid ensemble.members=", "ensemble.members="),
        ("sweep minatar/cerl --grid ensemble.member=2", "did you mean ensemble.members or"),
        ("sweep minatar/cerl --grid ensemble.members=two", "expected a whole number"),
        ("sweep minatar/cerl --envs minatar-6", "did you mean minatar-5 or"),
        ("sweep minatar/cerl --envs atari-5", "atari"),
        ("sweep minatar/tandem --grid ensemble.members=2,3", "ensemble.members=3"),
        ("sweep ensemble-sise", "did you mean ensemble-size or"),
        ("sweep catch/ddqn --seeds 4..0", "4..0"),
        ("sweep catch/ddqn --jobs 0", "--jobs: expected a number of runs, at least 1"),
        ("sweep catch/ddqn --jobs two", "--jobs: expected a number of runs, at least 1"),
        ("sweep catch/ddqn --device cpu --mps", "--mps: expected a GPU, found none"),
        ("sweep catch/ddqn --calibrate", "--calibrate is an option of --dry-run"),
        ("sweep catch/ddqn --out /dev/null/x", "--out: expected a folder that can be made"),
        ("status", "usage: cerl status"),
        ("status nowhere", "expected a folder with runs, got no folder"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(swept, capsys, line, message):
    if message.startswith("usage"):
        assert command.main(line.split()) == 0
        assert capsys.readouterr().out.startswith(message)
    else:
        assert message in refused(capsys, line)
    assert swept == [] and list(Path().iterdir()) == []


def test_a_folder_of_another_study_is_refused_with_what_differs(swept, capsys):
    assert command.main(["sweep", "catch/ddqn", "--optim.lr", "1e-3"]) == 0
    error = refused(capsys, "sweep catch/ddqn --optim.lr 1e-4")
    assert "optim.lr 0.0001 (its runs: 0.001)" in error and "--grid optim.lr=" in error
    assert command.main(["sweep", "demo", "--device", "cpu", "--out", "runs/demo"]) == 0
    assert "holds the study 'demo'" in refused(capsys, "sweep catch/ddqn --out runs/demo")
    assert len(swept) == 2
