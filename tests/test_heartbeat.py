"""Heartbeats and notes of failures: what they say while a run starts, trains, ends and fails."""

import json
import os
import platform
import time

import pytest
import torch

from cerl import training
from cerl.config import load
from cerl.device import cores, pick
from cerl.record import failure, heartbeat
from cerl.record.attended import attended
from cerl.record.lock import held, under_way
from cerl.run import Run
from cerl.stop import Stopped

TINY = {
    "seeds": (3,),
    "device": "cpu",
    "net": {"hidden": (16,)},
    "replay": {"capacity": 400, "batch": 8, "start": 40},
    "schedule": {"steps": 160, "update_every": 4, "target_every": 20},
    "explore": {"hold": 20, "decay": 100},
    "eval": {"every": 80, "episodes": 2},
    "log": {"every": 40, "checkpoint_every": 10_000, "checkpoint_minutes": 0.0},
}


def beat_of(folder) -> heartbeat.Beat:
    found = heartbeat.read(folder)
    assert found is not None
    return found


def test_a_heartbeat_follows_the_run_and_the_last_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    done, begin = [0], time.time()
    with heartbeat.beating(tmp_path, steps=1_000) as pulse:
        first = beat_of(tmp_path)
        assert (first.step, first.steps, first.device) == (0, 1_000, "")
        assert (first.host, first.pid) == (platform.node(), os.getpid())
        assert first.steps_per_second is None and not first.over and not first.orphan
        pulse.follow(lambda: done[0], device="cpu")
        done[0] = 500
        until = time.monotonic() + 10
        while beat_of(tmp_path).step != 500:
            assert time.monotonic() < until
            time.sleep(0.01)
        now = beat_of(tmp_path)
        assert now.device == "cpu" and begin <= now.started <= now.updated <= time.time()
        done[0] = 600
    last = beat_of(tmp_path)
    assert last.step == 600 and last.over
    assert [path.name for path in tmp_path.iterdir()] == [heartbeat.FILE]
    # The process that goes on with the run shows this step until it has loaded its checkpoint.
    with heartbeat.beating(tmp_path, steps=1_000):
        assert beat_of(tmp_path).step == 600 and not beat_of(tmp_path).over


def test_the_speed_is_that_of_the_last_minute(tmp_path, monkeypatch):
    pulse, clock = heartbeat.Pulse(tmp_path, steps=10_000), [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    pulse.follow(lambda: round(10 * min(clock[0], 100) + 2 * max(clock[0] - 100, 0)), device="cpu")
    for now in range(5, 105, 5):
        clock[0] = now
        pulse.beat()
    assert beat_of(tmp_path).steps_per_second == pytest.approx(10)
    for now in range(105, 305, 5):
        clock[0] = now
        pulse.beat()
    assert beat_of(tmp_path).steps_per_second == pytest.approx(2)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"host": 1}', "x" * 20_000, "\xff"])
def test_damaged_files_count_as_missing(tmp_path, content):
    for name in (heartbeat.FILE, failure.FILE):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert heartbeat.read(tmp_path) is None and failure.read(tmp_path) is None


def test_a_heartbeat_that_cannot_be_written_disturbs_nothing(tmp_path):
    with heartbeat.beating(tmp_path / "gone", steps=1) as pulse:
        pulse.beat()
    assert not (tmp_path / "gone").exists()


def test_a_heartbeat_is_not_written_through_a_link(tmp_path):
    outside = tmp_path / "mine"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (heartbeat.FILE, failure.FILE):
        (folder / name).symlink_to(outside)
    with heartbeat.beating(folder, steps=1):
        failure.note(folder, "no")
    assert outside.read_text() == "mine" and beat_of(folder).over


def test_failures_are_counted_and_cleared_by_a_try_that_ends_well(tmp_path):
    for tries in (1, 2):
        with pytest.raises(ValueError, match="no licence"), failure.noted(tmp_path):
            raise ValueError("no licence\nfor [/opt/sim]")
        found = failure.read(tmp_path)
        assert found is not None
        assert found[:4] == ("no licence\nfor [/opt/sim]", "error", 0, tries)
        assert abs(time.time() - found.time) < 60
    failure.note(tmp_path, "killed by signal 9", signal=9)
    found = failure.read(tmp_path)
    assert found is not None and found[1:4] == ("signal", 9, 3)
    # A second Ctrl-C says nothing about the run.
    with pytest.raises(KeyboardInterrupt), failure.noted(tmp_path):
        raise KeyboardInterrupt
    assert failure.read(tmp_path) == found
    with pytest.raises(Stopped), failure.noted(tmp_path):
        raise Stopped
    assert failure.read(tmp_path) is None
    failure.note(tmp_path, "again")
    with failure.noted(tmp_path):
        pass
    assert failure.read(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_run_leaves_its_last_heartbeat_and_no_failure(tmp_path, monkeypatch):
    config = load("catch/ddqn", {**TINY, "out": str(tmp_path)})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):

        def breaks(self, updates):
            if self.steps == 100:
                raise RuntimeError("the learner is broken")

        patch.setattr(Run, "learn", breaks)
        training.train(config)
    (folder,) = tmp_path.iterdir()
    found = failure.read(folder)
    assert found is not None and found[:3] == ("the learner is broken", "error", 0)
    last = beat_of(folder)
    assert (last.step, last.steps, last.device, last.over) == (100, 160, "cpu", True)
    training.resume(folder)
    assert failure.read(folder) is None and beat_of(folder).step == 160


def test_an_error_before_the_first_step_of_a_resumed_run_is_noted(tmp_path, monkeypatch):
    folder = training.train(load("catch/ddqn", {**TINY, "out": str(tmp_path)}))

    def breaks(config):
        raise OSError("no simulator")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no simulator"):
        patch.setattr(training, "assemble", breaks)
        training.resume(folder, changes={"schedule.steps": 200})
    found = failure.read(folder)
    assert found is not None and found.message == "no simulator"
    # Asking for nothing new is no failure of the run; nor is it one that another process trains it.
    failure.clear(folder)
    with pytest.raises(ValueError, match="nothing to resume"):
        training.resume(folder)
    config = load("catch/ddqn", TINY)
    with held(folder), pytest.raises(ValueError, match="another process"), attended(folder, config):
        pass
    assert failure.read(folder) is None


def test_tests_of_a_lock_neither_see_each_other_nor_need_to_write(tmp_path, monkeypatch):
    assert not under_way(tmp_path) and not list(tmp_path.iterdir())
    with held(tmp_path):
        assert under_way(tmp_path)
        (tmp_path / ".lock").chmod(0o444)
        assert under_way(tmp_path)
    fcntl = pytest.importorskip("fcntl")
    # Another test that is under way: it holds a shared lock.
    with (tmp_path / ".lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not under_way(tmp_path)


def test_devices_are_numbered_as_the_user_numbers_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick.described(torch.device("cpu")) == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pick.described(torch.device("cuda")) == "cuda:1 NVIDIA H200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, 3")
    assert pick.described(torch.device("cuda")) == "cuda:3 NVIDIA H200"
    assert pick.described(torch.device("cuda:0")) == "cuda:6 NVIDIA H200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    assert pick.described(torch.device("cuda:0")) == "GPU-8932f937 NVIDIA H200"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("3", 3), ("4,2", 4), (" 5 ", 5), ("", 2), ("0", 2), ("many", 2), ("-1", 2), (None, 2)],
)
def test_threads_follow_the_environment_then_the_cores(monkeypatch, asked, expected):
    monkeypatch.setattr(cores, "cores", lambda: 2)
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores.threads() == expected


def test_a_run_takes_the_threads_that_its_process_was_given(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pick.prepare(load("catch/ddqn", {"device": "cpu", "threads": 0}))
    pick.prepare(load("catch/ddqn", {"device": "cpu", "threads": 2}))
    assert taken == [3, 2]


def test_a_heartbeat_is_json_that_others_can_read(tmp_path):
    with heartbeat.beating(tmp_path, steps=7):
        assert json.loads((tmp_path / heartbeat.FILE).read_text())["steps"] == 7
