"""The file plan.json, and the planning of runs: which folders cover which cells and seeds."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cerl.config import Config, ConfigError, load
from cerl.record import finished, folder
from cerl.record.results import config_hash
from cerl.sweep import plan, planning
from cerl.sweep.cells import Cell
from cerl.sweep.planning import Planned


def cell(
    preset: str = "catch/bootdqn",
    *,
    seeds: tuple[int, ...] = (0, 1),
    steps: int = 1000,
    **more: Any,
) -> Cell:
    """A cell; more, options of its axes, with `__` for the dots."""
    varied = {key.replace("__", "."): value for key, value in more.items()}
    return Cell(load(preset, {"seeds": list(seeds), "schedule.steps": steps, **varied}), varied)


def grid(*members: int, **options: Any) -> list[Cell]:
    return [cell(ensemble__members=count, **options) for count in members]


def planned(
    cells: list[Cell], out: Path, *, study: str = "size", options: Any = None, most: Any = 100
) -> Planned:
    return planning.made(cells, out, study=study, options=options or {}, seeds_per_run=most)


def swept(cells: list[Cell], out: Path, **options: Any) -> Planned:
    """Plans and writes, as a sweep does before it trains."""
    return planning.written(planned(cells, out, **options), out)


def folders(out: Path) -> set[str]:
    return {path.parent.name for path in out.glob("*/config.yaml")}


def names(result: Planned) -> list[str]:
    return [asked.run.folder for asked in result.asked]


def check_whole(out: Path, cells: list[Cell]) -> plan.Plan:
    """Every cell and seed is trained by exactly one run, and the plan says what folders say."""
    found = plan.read(out)
    assert found is not None
    assert {run.folder for run in found.runs} == folders(out)
    trained = []
    for run in found.runs:
        config = folder.load_file(out / run.folder / "config.yaml")
        assert (run.cell, run.seeds) == (config_hash(config), config.seeds)
        trained += [(run.cell, seed) for seed in run.seeds]
    wanted = [(config_hash(one.config), seed) for one in cells for seed in one.config.seeds]
    assert sorted(trained) == sorted(wanted)
    assert len({run.number for run in found.runs}) == len(found.runs)
    return found


def test_a_plan_is_made_without_writing_and_written_as_it_was_made(tmp_path):
    out = tmp_path / "deep" / "sweep"
    result = planned(grid(2, 5), out)
    assert not out.parent.exists()
    assert names(result) == [
        "0001-bootdqn-members-2-catch",
        "0002-bootdqn-members-5-catch",
    ]
    assert [asked.state for asked in result.asked] == ["new", "new"]
    assert planning.written(result, out) == result
    assert check_whole(out, grid(2, 5)) == result.plan
    assert [run.varied for run in result.plan.runs] == [
        {"ensemble.members": 2},
        {"ensemble.members": 5},
    ]
    for asked in result.asked:
        read = folder.load_file(out / asked.run.folder / "config.yaml")
        assert read == asked.config and read.out == str(out)


def test_the_same_command_finds_its_runs_and_writes_nothing(tmp_path):
    first = swept(grid(2, 5), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = swept(grid(2, 5), tmp_path)
    assert names(again) == names(first) and again.plan == first.plan and not again.notes
    assert {asked.state for asked in again.asked} == {"planned"}
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    del before[tmp_path / planning.LOCK], after[tmp_path / planning.LOCK]
    assert after == before


def test_more_values_presets_and_environments_are_added_and_old_labels_follow(tmp_path):
    swept([cell(ensemble__members=5)], tmp_path)
    more = swept([*grid(2, 5), cell("catch/ddqn")], tmp_path)
    assert [asked.state for asked in more.asked] == ["new", "planned", "new"]
    assert names(more)[1] == "0001-bootdqn-catch"  # a folder keeps its name
    assert [run.label for run in more.plan.runs] == [
        "bootdqn, members 5",
        "bootdqn, members 2",
        "ddqn",
    ]
    check_whole(tmp_path, [*grid(2, 5), cell("catch/ddqn")])


def test_added_seeds_get_runs_of_their_own(tmp_path):
    swept([cell(seeds=(0, 1, 2))], tmp_path)
    more = swept([cell(seeds=(1, 2, 3, 4, 9))], tmp_path)
    assert names(more) == ["0001-bootdqn-catch", "0002-bootdqn-catch-seeds-3..4-9"]
    assert [asked.config.seeds for asked in more.asked] == [(0, 1, 2), (3, 4, 9)]
    check_whole(tmp_path, [cell(seeds=(0, 1, 2, 3, 4, 9))])


@pytest.mark.parametrize("most", [2, lambda config: config.ensemble.members])
def test_seeds_are_divided_evenly_among_as_few_runs_as_possible(tmp_path, most):
    cells = [cell(seeds=(0, 1, 2, 3, 4), ensemble__members=2)]
    result = swept(cells, tmp_path, most=most)
    assert [asked.run.seeds for asked in result.asked] == [(0,), (1, 2), (3, 4)]
    assert names(result)[1] == "0002-bootdqn-catch-seeds-1..2"
    assert names(swept([cell(seeds=(0, 1, 2, 3, 4), ensemble__members=2)], tmp_path)) == names(
        result
    )


def test_seeds_per_run_below_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--seeds-per-run: expected at least 1, got 0"):
        planned([cell()], tmp_path, most=0)


def test_a_longer_sweep_makes_its_runs_longer_and_a_shorter_one_leaves_them(tmp_path):
    swept([cell(steps=1000)], tmp_path)
    longer = swept([cell(steps=3000)], tmp_path).asked[0]
    assert longer.run.steps == longer.config.schedule.steps == 3000
    path = tmp_path / longer.run.folder / "config.yaml"
    assert folder.load_file(path).schedule.steps == 1000  # the resume changes it, not the plan
    shorter = swept([cell(steps=500)], tmp_path)
    assert shorter.asked[0].run.steps == 1000
    # A sweep of other seeds leaves the length that was asked for before.
    swept([cell(steps=3000)], tmp_path)
    others = swept([cell(seeds=(7,), steps=500)], tmp_path).plan
    assert [run.steps for run in others.runs] == [3000, 500]


def test_options_that_may_change_make_no_other_study_but_only_count_for_new_runs(tmp_path):
    first = swept([cell()], tmp_path)
    other = cell(log__every=10, diverged="cut")._replace(varied={})
    assert not swept([other], tmp_path).notes
    changed = swept([other], tmp_path, options={"log.every": 10, "device": "cpu"})
    assert changed.asked[0].config == first.asked[0].config and changed.plan == first.plan
    assert len(changed.notes) == 1 and "log.every only counts for new runs" in changed.notes[0]
    assert names(first)[0] in changed.notes[0]


def test_run_folders_in_no_plan_are_adopted(tmp_path):
    config = cell(seeds=(0, 1, 2)).config.model_copy(update={"out": str(tmp_path)})
    made = folder.new_folder(config)
    other = folder.new_folder(
        cell(ensemble__members=3).config.model_copy(update={"out": str(tmp_path)})
    )
    result = swept([cell(seeds=(1, 3))], tmp_path)
    assert [(asked.state, asked.run.seeds) for asked in result.asked] == [
        ("adopted", (0, 1, 2)),
        ("new", (3,)),
    ]
    assert names(result)[0] == made.name
    assert other.name not in {run.folder for run in result.plan.runs}
    assert len(result.notes) == 1 and made.name in result.notes[0]
    assert [asked.state for asked in swept([cell(seeds=(1, 3))], tmp_path).asked] == ["planned"] * 2


def test_of_two_folders_that_train_the_same_the_finished_one_is_adopted(tmp_path):
    config = cell().config.model_copy(update={"out": str(tmp_path)})
    done, other = folder.new_folder(config), folder.new_folder(config)
    finished.mark(done, 1000)
    os.utime(done, (1, 1))
    assert names(planned([cell()], tmp_path)) == [done.name]
    os.remove(done / finished.FILE)
    os.utime(done, (1, 1))
    assert names(planned([cell()], tmp_path)) == [other.name]


def test_a_lost_plan_is_made_anew_with_the_same_numbers(tmp_path):
    first = swept(grid(2, 5, 10), tmp_path)
    (tmp_path / plan.FILE).unlink()
    again = swept([*reversed(grid(2, 5, 10)), *grid(20)], tmp_path)
    assert again.plan.runs[:3] == first.plan.runs
    assert names(again) == [*reversed(names(first)), "0004-bootdqn-members-20-catch"]


@pytest.mark.parametrize("how", ["edited", "cut", "missing"])
def test_a_damaged_folder_is_left_out_untouched_and_its_seeds_get_a_new_run(tmp_path, how):
    swept(grid(2, 5), tmp_path)
    path = tmp_path / "0001-bootdqn-members-2-catch" / "config.yaml"
    text = path.read_text()
    (path.parent / "rows.parquet").write_text("rows")
    if how == "missing":
        path.unlink()
    else:
        path.write_text(text.replace("seeds", "seed") if how == "edited" else text[:-30])
    before = path.read_text() if path.exists() else None
    for _ in range(2):
        result = swept(grid(2, 5), tmp_path)
        assert names(result) == ["0003-bootdqn-members-2-catch", "0002-bootdqn-members-5-catch"]
        assert len(result.notes) == 1 and path.parent.name in result.notes[0]
    assert (path.read_text() if path.exists() else None) == before
    assert (path.parent / "rows.parquet").read_text() == "rows"


def test_a_folder_that_has_vanished_is_planned_again_under_its_own_name(tmp_path):
    first = swept([cell(seeds=(0, 1)), *grid(3)], tmp_path)
    for path in (tmp_path / names(first)[0]).iterdir():
        path.unlink()  # the empty folder stays
    again = swept([cell(seeds=(1,), steps=700), *grid(3)], tmp_path)
    assert names(again) == names(first) and [asked.state for asked in again.asked] == [
        "new",
        "planned",
    ]
    assert again.asked[0].config.seeds == (0, 1) and again.asked[0].run.steps == 700
    assert len(again.notes) == 1 and names(first)[0] in again.notes[0]
    check_whole(tmp_path, [cell(seeds=(0, 1)), *grid(3)])


def test_numbers_are_never_reused(tmp_path):
    swept(grid(2, 5), tmp_path)
    for path in tmp_path.iterdir():  # the folder of number 7 has lost its plan
        if path.name.startswith("0002"):
            path.rename(tmp_path / path.name.replace("0002", "0007"))
    assert names(swept(grid(10), tmp_path)) == ["0008-bootdqn-members-10-catch"]


def test_a_cell_that_is_asked_twice_is_one_run(tmp_path):
    swept([cell(), cell()], tmp_path)
    check_whole(tmp_path, [cell()])


def test_the_plan_does_not_name_its_place(tmp_path):
    first = swept(grid(2), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "link").symlink_to("b")
    again = swept(grid(2, 5), tmp_path / "link")
    assert names(again)[0] == names(first)[0] and again.asked[0].state == "planned"
    check_whole(tmp_path / "b", grid(2, 5))
    assert str(tmp_path) not in (tmp_path / "b" / plan.FILE).read_text()


def test_names_of_folders_are_short_and_plain(tmp_path):
    seeds = list(range(0, 90, 2))
    config = load("gym/cartpole", {"env.name": "ä/../$(rm):" + "Ü" * 150, "seeds": seeds})
    first, second = names(swept([Cell(config, {})], tmp_path, most=44))
    assert re.fullmatch(r"0001-cartpole-ä-..-rm-Ü+-seeds-0-2-4-6-to-42", first)
    assert second.startswith("0002-") and max(len(first.encode()), len(second.encode())) < 220
    check_whole(tmp_path, [Cell(config, {})])


def test_seeds_in_words_join_neighbours():
    assert planning.seeds_in_words((0, 1, 2, 5, 7, 8)) == "0..2-5-7..8"
    assert planning.seeds_in_words((3,)) == "3"
    assert planning.seeds_in_words(tuple(range(0, 40, 2))) == "0-2-4-6-to-38"


# What OUT may not be.


def test_another_study_is_refused(tmp_path):
    swept(grid(2), tmp_path, options={"loss.gamma": 0.9})
    with pytest.raises(ConfigError, match="holds the study 'size', got the study 'curse'; choose"):
        planned(grid(2), tmp_path, study="curse", options={"loss.gamma": 0.9})
    with pytest.raises(ConfigError, match=r"loss.gamma 0.8 \(its runs: 0.9\).*--grid loss.gamma"):
        planned(grid(2), tmp_path, options={"loss.gamma": 0.8})
    with pytest.raises(ConfigError, match=r"loss.gamma as the presets say \(its runs: 0.9\)"):
        planned(grid(2), tmp_path)


def test_an_option_may_become_an_axis_and_the_old_command_still_works(tmp_path):
    first = swept(
        [cell(loss__gamma=0.9)._replace(varied={})], tmp_path, options={"loss.gamma": 0.9}
    )
    both = swept([cell(loss__gamma=0.9), cell(loss__gamma=0.8)], tmp_path)
    assert names(both)[0] == names(first)[0] and len(both.plan.runs) == 2
    again = swept(
        [cell(loss__gamma=0.9)._replace(varied={})], tmp_path, options={"loss.gamma": 0.9}
    )
    assert names(again) == names(first)


def test_a_run_folder_is_no_folder_for_a_sweep(tmp_path):
    swept(grid(2), tmp_path)
    run = tmp_path / "0001-bootdqn-catch"
    with pytest.raises(ConfigError, match="is the folder of a single run"):
        planned(grid(2), run)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder that can be made"):
        planned(grid(2), tmp_path / "file")
    with pytest.raises(ConfigError, match="expected a folder that can be made"):
        swept(grid(2), tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_plan_is_made_in_a_read_only_folder_but_not_written(tmp_path):
    first = swept(grid(2), tmp_path)
    tmp_path.chmod(0o555)
    try:
        assert names(planned(grid(2, 5), tmp_path))[0] == names(first)[0]
        with pytest.raises(ConfigError, match="cannot be written to"):
            swept(grid(2, 5), tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_a_newer_or_damaged_plan_is_refused(tmp_path):
    swept(grid(2, 5), tmp_path)
    path = tmp_path / plan.FILE
    tree = json.loads(path.read_text())

    def refused(match: str, **changes: Any) -> None:
        path.write_text(json.dumps({**tree, **changes}))
        with pytest.raises(ConfigError, match=match) as caught:
            plan.read(tmp_path)
        assert str(path) in str(caught.value)
        with pytest.raises(ConfigError, match=match):
            planned(grid(2), tmp_path)

    one, two = tree["runs"]
    refused("expected format 1, got 2: a newer version", format=2)
    refused("2 runs have the folder", runs=[one, {**two, "folder": one["folder"]}])
    refused("2 runs have the number 1", runs=[one, {**two, "number": 1}])
    for name in ("../x", "", "..", "a/b", "\0"):
        refused("expected the name of a folder", runs=[{**one, "folder": name}])
    refused("steps: expected int, got str", runs=[{**one, "steps": "1"}])
    refused("number: expected int, got bool", runs=[{**one, "number": True}])
    refused("expected whole numbers as seeds", runs=[{**one, "seeds": []}])
    refused("expected whole numbers as seeds", runs=[{**one, "seeds": ["0"]}])
    refused("no key 'cell'", runs=[{k: v for k, v in one.items() if k != "cell"}])
    refused("study: expected str", study=None)
    refused("damaged", runs=5)
    text = json.dumps(tree)
    for cut in ("", "[]", "null", text[:-9], "\xff", "[" * 100_000):
        path.write_bytes(cut.encode("latin1"))
        with pytest.raises(ConfigError, match="damaged"):
            plan.read(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        plan.read(tmp_path)


def test_a_folder_without_a_plan_has_none(tmp_path):
    assert plan.read(tmp_path) is None and plan.read(tmp_path / "none") is None


# Processes that are killed, and several at once.


def test_a_sweep_that_dies_while_it_writes_the_plan_is_repaired_by_the_same_command(
    tmp_path, monkeypatch
):
    cells = grid(*range(1, 9))
    dump, count = folder.dump, itertools.count(1)

    def dying(config: Config, path: Path) -> None:
        if next(count) > 3:
            raise MemoryError
        dump(config, path)

    monkeypatch.setattr(folder, "dump", dying)
    with pytest.raises(MemoryError):
        swept(cells, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / plan.FILE).exists() and len(folders(tmp_path)) == 3
    again = swept(cells, tmp_path)
    assert sorted(asked.state for asked in again.asked) == ["adopted"] * 3 + ["new"] * 5
    check_whole(tmp_path, cells)


SWEEP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_plan import grid, swept
cells = grid(*range(1, 1 + int(sys.argv[3])))
print("ready", flush=True)
sys.stdin.readline()
swept(cells, Path(sys.argv[1]))
"""


@contextlib.contextmanager
def process(out: Path, count: int) -> Iterator[subprocess.Popen]:
    """A process that is ready to plan `count` cells, and does so once it has read a line."""
    with subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(out), str(Path(__file__).parent), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as found:
        assert found.stdout and found.stdout.readline() == "ready\n"
        try:
            yield found
        finally:
            found.kill()


def go(one: subprocess.Popen) -> None:
    assert one.stdin
    one.stdin.write("\n")
    one.stdin.flush()


def test_killed_processes_leave_nothing_that_is_planned_twice(tmp_path):
    for count in (10, 40):
        with process(tmp_path, 60) as one:
            go(one)
            while len(folders(tmp_path)) < count and one.poll() is None:
                time.sleep(0.001)
            one.kill()
    left = len(folders(tmp_path))
    assert 40 <= left < 60, "no process was killed while it made folders"
    swept(grid(*range(1, 61)), tmp_path)
    check_whole(tmp_path, grid(*range(1, 61)))
    assert not list(tmp_path.glob(".*.tmp"))


def test_processes_that_plan_at_the_same_time_make_one_plan(tmp_path):
    with process(tmp_path, 20) as one, process(tmp_path, 30) as two:
        go(one)
        go(two)
        assert [one.wait(60), two.wait(60)] == [0, 0]
    check_whole(tmp_path, grid(*range(1, 31)))


def test_a_plan_that_another_process_has_overtaken_is_made_anew(tmp_path):
    mine = planned(grid(2, 5), tmp_path)
    theirs = swept(grid(5, 10), tmp_path)
    now = planning.written(mine, tmp_path)
    assert [asked.state for asked in now.asked] == ["new", "planned"]
    assert names(now)[1] == names(theirs)[0]
    check_whole(tmp_path, grid(2, 5, 10))


def test_a_lock_that_another_process_keeps_is_told(tmp_path, monkeypatch):
    swept(grid(2), tmp_path)
    monkeypatch.setattr(planning, "PATIENCE", 0.05)
    with planning._locked(tmp_path), pytest.raises(ConfigError, match="another process has been"):
        swept(grid(2, 5), tmp_path)


def test_a_thousand_runs_are_planned_in_seconds(tmp_path):
    base = cell(seeds=(0,)).config
    cells = []
    for number in range(1000):
        loss = base.loss.model_copy(update={"gamma": 0.5 + number / 2500})
        changed = base.model_copy(update={"loss": loss})
        cells.append(Cell(changed, {"loss.gamma": loss.gamma}))
    begin = time.process_time()
    swept(cells, tmp_path)
    assert len(swept(cells, tmp_path).asked) == 1000
    assert time.process_time() - begin < 15, "seconds of the processor; 3.5 where this was measured"
