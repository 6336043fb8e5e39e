"""The worker of every launcher, with stand-ins for the processes of runs and for SLURM's programs;
and two processes that train one run, since the file system has no locks between them."""

import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import SETTINGS, differences, line, read_all, spawn, without_repeats
from test_local import FINISH, failure_of, program, programs, runs_in, started

from cerl.__main__ import main
from cerl.config import ConfigError
from cerl.record import failure, finished, heartbeat, lock
from cerl.record.heartbeat import Beat
from cerl.stop import Stopped
from cerl.sweep import job, plan, worker
from cerl.sweep.plan import PlannedRun

__all__ = ["programs"]  # a fixture that replaces Python by a stand-in, for every test here
NEVER = 'until [ -e "$folder/../go" ]; do sleep 0.05; done'
SAVES = "trap 'echo saved >> \"$folder/saved\"; exit 75' TERM; sleep 60 & wait"


@pytest.fixture(autouse=True)
def no_job(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def swept(out: Path, *acts: str) -> list[PlannedRun]:
    """A planned sweep whose runs do what shell commands say."""
    runs = runs_in(out, *acts)
    (out / plan.FILE).write_text(plan.text(plan.Plan("", {}, tuple(runs))))
    return runs


def work(out: Path, *numbers: int, per_job: int = 2, **more: str) -> None:
    worker.work(out, [str(n) for n in numbers], per_job=per_job, device="cpu", **more)


def tries(out: Path, run: PlannedRun) -> int:
    return [line["run"] for line in started(out)].count(run.folder)


def once(found: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Starts a thread that does something as soon as a function returns True."""

    def wait() -> None:
        until = time.monotonic() + 20
        while not found() and time.monotonic() < until:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_runs_that_are_named_are_trained_and_finished_ones_are_left_alone(tmp_path):
    out = tmp_path / "out"
    runs = swept(out, *[FINISH] * 3)
    work(out, 1, 3)
    work(out, 1, 2, 3)
    assert [tries(out, run) for run in runs] == [1, 1, 1]
    assert {line["threads"] for line in started(out)}.isdisjoint({""})


def test_a_run_that_a_signal_kills_is_tried_three_times_and_one_that_fails_once(tmp_path, capsys):
    out = tmp_path / "out"
    runs = swept(out, "kill -9 $$", "echo error: no licence; exit 2", FINISH)
    with pytest.raises(RuntimeError, match="2 of 3 runs failed") as caught:
        work(out, 1, 2, 3)
    assert [tries(out, run) for run in runs] == [3, 1, 1]
    assert "no licence" in str(caught.value) and "signal 9 (Killed)" in str(caught.value)
    assert failure_of(out, runs[0]).tries == 3
    assert capsys.readouterr().out.count("it is tried again") == 2
    # Whoever repeats the command wants new tries, as many as before.
    with pytest.raises(RuntimeError):
        work(out, 1)
    assert tries(out, runs[0]) == 6


def test_memory_that_ran_out_once_does_not_matter(tmp_path):
    out = tmp_path / "out"
    swept(out, f'[ -e "$folder/second" ] || {{ touch "$folder/second"; kill -9 $$; }}; {FINISH}')
    work(out, 1)


def test_after_a_restart_by_slurm_failed_runs_stay_failed(tmp_path, monkeypatch):
    """Otherwise a job that requeues itself would try them for ever."""
    out = tmp_path / "out"
    runs = swept(out, "exit 2", "kill -9 $$", FINISH, FINISH)
    with pytest.raises(RuntimeError, match="2 of 3 runs failed"):
        work(out, 1, 2, 3)
    failure.note(out / runs[3].folder, "killed by signal 9", signal=9)  # once: to be tried again
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(RuntimeError, match="2 of 4 runs failed"):
        work(out, 1, 2, 3, 4)
    assert [tries(out, run) for run in runs] == [1, 3, 1, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("code", [0, 1])
def test_only_before_its_time_is_over_a_job_queues_again(
    tmp_path, programs, monkeypatch, capsys, number, code
):
    program(programs / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit {code}\n')
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    out = tmp_path / "out"
    runs = swept(out, SAVES, SAVES)
    ready = once(
        lambda: (out / "started").exists() and len(started(out)) == 2,
        lambda: (time.sleep(0.2), os.kill(os.getpid(), number)),
    )
    before = signal.getsignal(number)
    try:
        with pytest.raises(Stopped):
            work(out, 1, 2)
    finally:
        signal.signal(number, before)
    ready.join()
    assert [(out / run.folder / "saved").read_text() for run in runs] == ["saved\n"] * 2
    calls = tmp_path / "calls"
    assert calls.exists() == (number == signal.SIGUSR2)
    if calls.exists():
        assert calls.read_text() == "requeue 17_4\n"
        words = "submits its runs again" if code else "17_4 is in the queue again"
        assert words in capsys.readouterr().out


def test_the_stop_file_stops_all_runs(tmp_path):
    out = tmp_path / "out"
    (run,) = swept(out, SAVES)
    once(lambda: (out / "started").exists(), lambda: (time.sleep(0.2), (out / "stop").touch()))
    with pytest.raises(Stopped):
        work(out, 1)
    assert (out / run.folder / "saved").exists()
    with pytest.raises(Stopped):  # as long as the file is there, nothing is started
        work(out, 1)
    assert tries(out, run) == 1


def test_runs_that_somebody_else_stopped_are_no_failures(tmp_path):
    out = tmp_path / "out"
    swept(out, "exit 75", FINISH, "kill -15 $$")
    with pytest.raises(Stopped):
        work(out, 1, 2, 3)
    assert main(["sweep-run", str(out), "--runs", "1", "--device", "cpu"]) == 75
    assert main(["sweep-run", str(out), "--runs", "2", "--device", "cpu"]) == 0


def test_a_run_that_another_process_trains_is_waited_for_and_taken_over(tmp_path, capsys):
    out = tmp_path / "out"
    (run,) = swept(out, FINISH)
    claim = job.claim(out / run.folder)
    assert claim is not None
    once(lambda: (time.sleep(0.5), True)[1], lambda: os.close(claim))
    work(out, 1)
    assert tries(out, run) == 1 and "another process trains it" in capsys.readouterr().out


def test_runs_share_the_cores_that_slurm_gave(tmp_path, monkeypatch):
    out = tmp_path / "out"
    swept(out, FINISH, FINISH, FINISH)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "12")
    work(out, 1, 2, per_job=2)
    assert {line["threads"] for line in started(out)} == {"6"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    work(out, 3)
    assert started(out)[-1]["threads"] == "5"


@pytest.mark.parametrize(
    ("numbers", "more", "message"),
    [
        (["1"], {"version": "0.0.1"}, "cerl 0.0.1 planned the sweep, and .* has cerl"),
        (["2"], {}, r"expected numbers of runs in .*plan.json \(1 to 1\), got '2'"),
        ([], {}, "expected --runs NUMBER..., got none"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, numbers, more, message):
    swept(tmp_path / "out", FINISH)
    with pytest.raises(ConfigError, match=message):
        worker.work(tmp_path / "out", numbers, per_job=1, device="cpu", **more)


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(ConfigError, match=f"{platform.node()} sees no plan.json there.*share"):
        work(tmp_path / "nowhere", 1)
    (run,) = swept(tmp_path, FINISH)
    for file in (tmp_path / run.folder).iterdir():
        file.unlink()
    (tmp_path / run.folder).rmdir()
    with pytest.raises(ConfigError, match="expected a run folder, found none on"):
        work(tmp_path, 1)


# Two machines without common locks.


def on_machine(name: str) -> Callable[[], None]:
    """Makes the process that calls it one of another machine, whose locks nobody else sees."""

    def disguise() -> None:
        platform.node = lambda: name
        lock.FileLock = None  # pyright: ignore[reportAttributeAccessIssue]
        lock.works = lambda path: False
        lock.held_by_any = lambda path: None
        heartbeat.EVERY = 0.2
        # The output goes into the file of `spawn`, not to where pytest collects it.
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))

    return disguise


def beat_by(folder: Path, host: str, *, ago: float = 0.0, **changes: object) -> None:
    """Leaves a heartbeat of a process on another machine."""
    then = time.time() - ago
    beat = Beat(host, 17, "cpu", 40, 1000, None, then, then - 60)._replace(**changes)  # pyright: ignore
    heartbeat._replace(folder / heartbeat.FILE, beat._asdict())
    os.utime(folder / heartbeat.FILE, (then, then))


def test_a_run_of_another_machine_is_not_joined_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    (run,) = runs_in(tmp_path, FINISH)
    folder = tmp_path / run.folder
    beat_by(folder, "node7", updated=0.0)  # the clock of the other machine does not matter
    with (
        pytest.raises(ValueError, match=r"another process .* on node7 \(process 17"),
        lock.held(folder),
    ):
        pass
    assert job.elsewhere(folder) and job.claim(folder) is None
    for changes in ({"ago": 2 * lock.FRESH}, {"over": True}):
        beat_by(folder, "node7", **changes)
        assert not job.elsewhere(folder)
        with lock.held(folder):
            pass
    beat_by(folder, platform.node())  # here the lock tells that the process is dead
    assert not job.elsewhere(folder)
    monkeypatch.setattr(lock, "works", lambda path: False)
    monkeypatch.setattr(lock, "held_by_any", lambda path: None)
    assert job.elsewhere(folder)  # without locks only the heartbeat tells
    with pytest.raises(ValueError, match="another process"), lock.held(folder):
        pass


def test_of_two_processes_the_later_one_finds_a_rival(tmp_path):
    first = heartbeat.Pulse(tmp_path, steps=10)
    second = heartbeat.Pulse(tmp_path, steps=10)
    second.started = first.started + 1
    first.beat()
    first.check()
    # Both are this process; what tells them apart is when they began.
    second.beat()
    first.beat()
    first.check()
    second.beat()
    with pytest.raises(heartbeat.Rival, match=f"process {os.getpid()} on {platform.node()}"):
        second.check()
    found = heartbeat.read(tmp_path)
    assert found is not None and found.started == first.started  # nothing was written after that
    second.beat(over=True)
    assert heartbeat.read(tmp_path) == found
    first.beat(over=True)
    assert first.rival is None


@pytest.mark.slow
def test_two_machines_without_locks_do_not_train_one_run_for_long(tmp_path):
    """The one that begins later stops without saving; the other ends like an undisturbed run."""
    name = "catch/cerl"
    settings = without_repeats([*SETTINGS[name], *line(schedule_steps=600, eval_every=300)])
    assert main(["train", name, *settings, "--out", str(tmp_path / "out")]) == 0
    (whole,), both = (tmp_path / "out").iterdir(), tmp_path / "both"
    both.mkdir()
    shutil.copy(whole / "config.yaml", both)
    resume = ["train", "--resume", str(both)]
    first = spawn(resume, tmp_path / "first.txt", on_machine("node1"))
    until = time.monotonic() + 30
    while (found := heartbeat.read(both)) is None or found.over:
        assert time.monotonic() < until
        time.sleep(0.005)

    def hidden() -> None:
        on_machine("node2")()
        lock._recent = lambda folder, *, now: False  # as if both had begun at the same moment

    second = spawn(resume, tmp_path / "second.txt", hidden)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (second, first)]
    text = (tmp_path / "second.txt").read_text()
    assert codes == [2, 0], text
    assert "on node1 trains this run too" in text and "saved;" not in text
    assert failure.read(both) is None
    assert finished.finished(both, steps=600)
    # What the second one has told TensorBoard before it stopped stays in its files.
    found = differences(read_all(whole), read_all(both))
    assert not [text for text in found if not text.startswith("scalars: ")]
