"""`cerl status`: states of runs from their folders, the time left, and how many runs are shown."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cerl.config import ConfigError, load
from cerl.record import finished, heartbeat, lock, results
from cerl.record.folder import FILE, dump
from cerl.record.lock import held
from cerl.sweep import plan, status
from cerl.sweep.plan import PlannedRun
from cerl.sweep.status import RunState, left, shown, states

HERE, ELSEWHERE = platform.node(), "node7"
STEPS = 1000


def run(number: int = 1, **changes: Any) -> PlannedRun:
    name = f"{number:04d}-ddqn"
    one = PlannedRun(number, name, "catch/ddqn", "catch", "ddqn", (0, 1), STEPS, "abc", {})
    return one._replace(**changes)


def planned(out: Path, *runs: PlannedRun) -> None:
    """Makes a sweep's folder with the folders of its runs, which hold no files yet."""
    for one in runs:
        (out / one.folder).mkdir(parents=True)
    (out / plan.FILE).write_text(plan.text(plan.Plan("", {}, runs)))


def beat(folder: Path, *, host: str = ELSEWHERE, ago: float = 0.0, **changes: Any) -> None:
    """Writes a heartbeat that is `ago` seconds old."""
    then = time.time() - ago
    found = heartbeat.Beat(host, 1, "cuda:1 NVIDIA H200", 400, STEPS, 10.0, then, then - 60)
    (folder / heartbeat.FILE).write_text(json.dumps(found._replace(**changes)._asdict()))
    os.utime(folder / heartbeat.FILE, (then, then))


def error(folder: Path, message: str) -> None:
    found = {"message": message, "kind": "error", "signal": 0, "tries": 1, "time": time.time()}
    (folder / "error.json").write_text(json.dumps(found))


def only(out: Path) -> RunState:
    [found] = states(out)
    return found


def printed(found: list[RunState], *, width: int = 200, **options: Any) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(shown(found, width=width, **options))
    return capture.get()


def test_a_planned_run_waits(tmp_path):
    planned(tmp_path, run())
    found = only(tmp_path)
    assert (found.state, found.step, found.steps) == ("waiting", 0, STEPS)
    assert math.isnan(found.left)
    (tmp_path / run().folder).rmdir()  # nothing says that its folder must exist
    assert only(tmp_path).state == "waiting"


def test_a_finished_run_is_done_and_one_that_shall_be_longer_waits(tmp_path):
    planned(tmp_path, run(1), run(2, steps=2 * STEPS))
    for one in (run(1), run(2)):
        finished.mark(tmp_path / one.folder, STEPS)
        beat(tmp_path / one.folder, ago=5000, step=STEPS, over=True)
        error(tmp_path / one.folder, "of an earlier try") if one.number == 1 else None
    done, longer = states(tmp_path)
    assert (done.state, done.step, done.left, done.error) == ("done", STEPS, 0.0, "")
    assert (longer.state, longer.step, longer.steps) == ("waiting", STEPS, 2 * STEPS)


def test_a_heartbeat_of_another_machine_counts_while_its_file_is_young(tmp_path):
    planned(tmp_path, run())
    folder = tmp_path / run().folder
    # The clock of the other machine is wrong; only the time at which the file was written counts.
    beat(folder, updated=time.time() - 7200)
    found = only(tmp_path)
    assert (found.state, found.step, found.left) == ("running", 400, 60.0)
    assert (found.device, found.host) == ("cuda:1 NVIDIA H200", ELSEWHERE)
    beat(folder, ago=2 * lock.FRESH)
    found = only(tmp_path)
    assert found.state == "stopped" and f"for 2 min on {ELSEWHERE}" in found.error
    beat(folder, over=True)  # the process said that it ended
    assert (only(tmp_path).state, only(tmp_path).error) == ("stopped", "")


def test_on_this_machine_the_lock_decides_not_the_age_of_the_heartbeat(tmp_path):
    planned(tmp_path, run())
    folder = tmp_path / run().folder
    beat(folder, host=HERE)
    with held(folder):
        beat(folder, host=HERE, ago=5000)
        assert only(tmp_path).state == "running"
        (folder / heartbeat.FILE).unlink()  # it has not written one yet
        assert only(tmp_path).state == "running"
    (folder / ".lock").touch()  # some versions of filelock delete it
    beat(folder, host=HERE)
    assert only(tmp_path).state == "stopped"


def test_a_failed_run_shows_its_error_until_it_trains_again(tmp_path):
    planned(tmp_path, run())
    folder = tmp_path / run().folder
    beat(folder, over=True)
    error(folder, "memory: 9 GB are needed\nuse fewer seeds\n")
    found = only(tmp_path)
    assert found.state == "failed" and found.error == "memory: 9 GB are needed\nuse fewer seeds"
    beat(folder)
    assert (only(tmp_path).state, only(tmp_path).error) == ("running", "")


def test_runs_of_cerl_train_are_named_by_what_differs(tmp_path):
    for members in (2, 5):
        for seed in (0, 1):
            folder = tmp_path / f"cerl-{members}-{seed}"
            folder.mkdir()
            config = load("catch/cerl", {"ensemble.members": members, "seeds": (seed,)})
            dump(config, folder / FILE)
    found = states(tmp_path)
    assert [one.run.folder for one in found] == ["cerl-2-0", "cerl-2-1", "cerl-5-0", "cerl-5-1"]
    texts = [one.run.label for one in found]
    assert texts[0] == texts[1] and texts[2] == texts[3]
    assert texts[0].endswith("members 2") and texts[2].endswith("members 5")
    assert found[0].run.seeds == (0,) and found[0].steps == config.schedule.steps
    one = only(tmp_path / "cerl-5-1")  # a run folder by itself
    assert (one.run.folder, one.state, one.out) == ("cerl-5-1", "waiting", str(tmp_path))


def test_a_run_without_heartbeats_shows_the_last_step_of_its_tables(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    dump(load("catch/ddqn", {"schedule.steps": STEPS}), folder / FILE)
    metrics = results.Rows(folder / "metrics.parquet", results.METRICS)
    metrics.append(
        {"step": [100, 300], "seed": [0, 0], "member": [0, 0], "name": ["x", "x"]}
        | {"value": [1.0, 2.0]}
    )
    metrics.flush()
    found = only(tmp_path)
    assert (found.state, found.step) == ("stopped", 300)


def test_a_damaged_config_is_shown_and_does_not_hide_the_others(tmp_path):
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / FILE).write_text("seeds: [")
    dump(load("catch/ddqn"), tmp_path / "good" / FILE)
    bad, good = states(tmp_path)
    assert bad.state == "failed" and "cannot be read" in bad.error
    assert good.state == "waiting"
    assert "ddqn" in printed([bad, good])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no run in it"):
        states(tmp_path)
    with pytest.raises(ConfigError, match="got no folder"):
        states(tmp_path / "nothing")


def test_a_folder_of_sweeps_says_which_there_are(tmp_path):
    for number in range(7):
        planned(tmp_path / f"study{number}", run())
    with pytest.raises(ConfigError, match=f"study4 and 2 more; .* status {tmp_path}/study0$"):
        states(tmp_path)


def test_reading_changes_no_file(tmp_path):
    planned(tmp_path, run(1), run(2))
    beat(tmp_path / run(1).folder, host=HERE)
    for one in (run(1), run(2)):
        (tmp_path / one.folder / ".lock").write_text("x")

    def facts() -> dict[str, tuple[int, int]]:
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in tmp_path.rglob("*")}

    before = facts()
    states(tmp_path)
    assert facts() == before


def trained(number: int, name: status.State, step: int, rate: float, **changes: Any) -> RunState:
    one = run(number, **changes)
    ends = (one.steps - step) / rate if name == "running" else math.nan
    return RunState(one, name, step, one.steps, ends, "cpu", HERE, "", rate)


def test_the_time_left_divides_the_work_among_the_running_ones():
    nan = math.nan
    two = [trained(1, "running", 900, 10.0), trained(2, "running", 800, 20.0, cell="b")]
    waiting = [trained(number, "waiting", 0, nan, steps=150) for number in (3, 4)]
    # Waiting ones are as fast as the run of their cell: (10 s + 10 s + 15 s + 15 s) / 2.
    assert left([*two, *waiting]) == pytest.approx(25.0)
    # No run of that cell is known, but two of the preset: on average 15 steps a second.
    other = [one._replace(run=one.run._replace(cell="c")) for one in waiting]
    assert left([*two, *other]) == pytest.approx(20.0)
    # The whole lasts as long as its longest run, and failed ones are not waited for.
    long = trained(5, "running", 0, 10.0)
    assert left([*two, long, trained(6, "failed", 0, nan)]) == pytest.approx(100.0)
    assert math.isnan(left(waiting))  # nothing trains
    assert left([trained(1, "done", STEPS, 10.0)]) == 0.0
    unknown = trained(1, "running", 0, nan)
    assert math.isnan(left([unknown])) and "- left" in printed([unknown])


def test_few_runs_are_listed_and_errors_are_shown_in_full():
    failed = trained(2, "failed", 0, math.nan, env="[bold]x")
    failed = failed._replace(error="first [red]line\nlast \x1b[31mline")
    text = printed([trained(1, "running", 500, 10.0), failed])
    assert text.startswith("2 runs: 1 running, 1 failed; 25% of all agent steps; 0:00:50 left")
    assert "0..1" not in text and "0, 1" in text  # two seeds are no range
    assert "[bold]x" in text and "first [red]line" in text  # shown as they are, not as styles
    assert "\x1b" not in text and "last \\x1b[31mline" in text
    assert f"cpu@{HERE}" in text


@pytest.mark.parametrize("width", [80, 160])
def test_a_long_error_leaves_the_other_columns_their_place(width):
    failed = trained(2, "failed", 0, math.nan)._replace(error="no space " * 100)
    text = printed([trained(1, "running", 500, 10.0), failed], width=width)
    [line] = [line for line in text.splitlines() if line.startswith("0002")]
    assert line.split()[1:6] == ["ddqn", "catch", "0,", "1", "failed"]
    assert len(line) <= width and "no space" in line


def test_many_runs_are_counted_and_those_that_tell_something_listed():
    found = [trained(n, "done", STEPS, 10.0, label=f"members {n % 2}") for n in range(1, 101)]
    found += [trained(101, "running", 5, 1.0, label="members 0")]
    found += [trained(102, "failed", 5, 1.0)._replace(error="no memory")]
    text = printed(found)
    assert "0101" in text and "0102" in text and "no memory" in text and "0007" not in text
    [line] = [line for line in text.splitlines() if line.startswith("members 0  catch")]
    assert line.split()[3:6] == ["51", "50", "1"]  # runs, done, running
    assert "0007" in printed(found, every=True)
    # Runs beyond what is shown are said to exist.
    running = [trained(n, "running", 5, 1.0) for n in range(1, 101)]
    assert "and 60 more" in printed(running)


def test_more_groups_than_lines_are_joined_over_environments():
    found = [
        trained(1, "waiting", 0, math.nan, label=f"members {n}", env=f"game{game}")
        for n in range(10)
        for game in range(9)
    ]
    text = printed(found)
    assert "game3" not in text and text.count("members 3") == 1


def test_runs_of_several_folders_are_told_apart(tmp_path):
    for name in ("a", "b"):
        planned(tmp_path / name, run())
    text = printed([*states(tmp_path / "a"), *states(tmp_path / "b")])
    assert "a/0001" in text and "b/0001" in text


def test_json_has_numbers_or_null(tmp_path, capsys):
    planned(tmp_path, run(1), run(2))
    beat(tmp_path / run(1).folder)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    status.main([tmp_path], as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["counts"] == {"running": 1, "waiting": 1}
    first, second = found["runs"]
    assert (first["state"], first["left_seconds"], first["seeds"]) == ("running", 60.0, [0, 1])
    assert (second["state"], second["left_seconds"]) == ("waiting", None)


def test_a_thousand_runs_are_told_without_torch(tmp_path):
    """Half of them are in no plan. How long it takes, `cerl bench sweep` tells."""
    runs = [run(number, label=f"members {number % 7}") for number in range(1, 501)]
    planned(tmp_path, *runs)
    finished.mark(tmp_path / runs[0].folder, STEPS)
    mark = (tmp_path / runs[0].folder / finished.FILE).read_bytes()
    dump(load("minatar/cerl"), tmp_path / "config.txt")
    config = (tmp_path / "config.txt").read_text()
    for number in range(1, 1001):
        folder = tmp_path / (runs[number - 1].folder if number <= 500 else f"run-{number}")
        folder.mkdir(exist_ok=True)
        (folder / ".lock").touch()
        (folder / FILE).write_text(config.replace("members: 10", f"members: {number % 9}"))
        if number % 3 == 0:
            (folder / finished.FILE).write_bytes(mark)
        elif number % 3 == 1:
            beat(folder)
        else:
            error(folder, f"error {number}")
    code = (
        "import sys; from pathlib import Path; import cerl.__main__; from cerl.sweep import status;"
        f"status.main([Path({str(tmp_path)!r})]);"
        "assert not {'torch', 'matplotlib', 'pandas'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1000 runs: ")
