"""Sweeps on a Ray cluster of two nodes, and what a node does for them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from ray_cluster import LOOPBACK, RayCluster, cluster, descendants
from ray_driver import FINISH, runs_in, started

from cerl import __version__
from cerl.config import ConfigError
from cerl.record import failure
from cerl.stop import SAVED
from cerl.sweep import on_ray, plan, ray_cluster, ray_task
from cerl.sweep.ray_cluster import Need, Node

TESTS = Path(__file__).resolve().parent
SAVES = "trap 'sleep 0.2; touch $1/saved; exit 75' TERM; touch $1/here; sleep 60 & wait\n"

# Where CERL_REQUIRE names ray, these tests fail instead of being skipped.
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None and "ray" not in os.environ.get("CERL_REQUIRE", ""),
    reason="needs Ray: pip install 'cerl[ray]'",
)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayCluster]:
    with cluster() as found:
        yield found


def driver(out: Path, **options) -> subprocess.Popen:
    """A sweep on Ray in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(TESTS / "ray_driver.py"), str(out), json.dumps(options)],
        env={**os.environ, **(LOOPBACK if "address" in options else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def driven(out: Path, **options) -> tuple[int, str, str]:
    """Exit code, output and errors of a sweep on Ray."""
    process = driver(out, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def wait_until(condition, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Needs of runs


def node(cpus: float, gpus: float = 0) -> Node:
    return Node("id", "name", cpus, gpus)


@pytest.mark.parametrize("per_gpu", [1, 2, 3, 6, 7, 11, 13])
def test_as_many_runs_as_asked_share_a_gpu(per_gpu):
    """Ray counts in ten-thousandths: six times 1/6, rounded up, is more than a GPU."""
    nodes = [node(64, 4)]
    need = ray_cluster.need_on_gpus(nodes, jobs=None, per_gpu=per_gpu)
    assert round(need.gpus * 10_000, 6) == int(10_000 / per_gpu)
    assert need.places(nodes[0]) == 4 * per_gpu


@pytest.mark.parametrize(
    ("nodes", "jobs", "per_gpu", "expected", "places"),
    [
        ([node(16, 2)], None, None, Need(8, 1), 2),
        ([node(16, 2), node(8, 2)], None, None, Need(4, 1), 4),
        ([node(16, 2)], 5, None, Need(2, 0.3333), 6),  # 5 on 2 GPUs are at most 3 on each
        ([node(16, 2)], 1, None, Need(8, 1), 2),
        ([node(2, 2)], None, 2, Need(0.5, 0.5), 4),
        ([node(0, 2)], None, None, Need(0, 1), 2),
    ],
)
def test_runs_share_the_cpus_of_a_node_with_gpus(nodes, jobs, per_gpu, expected, places):
    need = ray_cluster.need_on_gpus(nodes, jobs=jobs, per_gpu=per_gpu)
    assert need == expected and sum(map(need.places, nodes)) == places


@pytest.mark.parametrize(
    ("cpus", "jobs", "each"),
    [
        ([2, 2], None, 2),
        ([2, 2], 4, 1),
        ([8], 3, 2),
        ([4, 64], None, 32),
        ([64, 0], None, 64),
        ([2, 2], 9, 1),
        ([], None, 1),
    ],
)
def test_runs_take_as_many_cpus_as_lets_all_jobs_train_at_once(cpus, jobs, each):
    assert ray_cluster.need_on_cpus([node(count) for count in cpus], jobs=jobs) == Need(each, 0)


# Clusters that are not there


@pytest.mark.parametrize("address", ["nowhere", "ray://head:10001", "head:", ":6379", "local"])
def test_an_address_of_another_form_is_refused(tmp_path, address):
    runs_in(tmp_path, FINISH)
    found = plan.read(tmp_path)
    assert found is not None
    with pytest.raises(ConfigError, match=r"--address: expected auto or HOST:PORT.* got"):
        on_ray.sweep(found.runs, tmp_path, address=address)


def test_no_cluster_at_an_address_is_an_error_at_once(tmp_path):
    runs_in(tmp_path, FINISH)
    found = plan.read(tmp_path)
    assert found is not None
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers there .*without --address"):
        on_ray.sweep(found.runs, tmp_path, address="127.0.0.1:1")
    assert time.monotonic() - begin < 10
    assert not started(tmp_path)


def test_without_ray_the_error_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    runs_in(tmp_path, FINISH)
    found = plan.read(tmp_path)
    assert found is not None
    with pytest.raises(ConfigError, match=r"pip install 'cerl\[ray\]'"):
        on_ray.sweep(found.runs, tmp_path, address="auto")


def test_finished_runs_need_no_cluster(tmp_path, capsys):
    runs_in(tmp_path, FINISH)
    found = plan.read(tmp_path)
    assert found is not None
    folder = tmp_path / found.runs[0].folder
    (folder / "whole").rename(folder / "finished")
    assert on_ray.sweep(found.runs, tmp_path, address="127.0.0.1:1") == [folder]
    assert "1 of 1 runs are finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"jobs": 0}, "--jobs: expected at least 1, got 0"),
        ({"per_gpu": -1}, "--per-gpu: expected at least 1, got -1"),
        ({"cpus": 0}, "--cpus: expected at least 1, got 0"),
        ({"device": "cuda:1"}, "device: expected auto, cpu or cuda, got 'cuda:1'"),
    ],
)
def test_options_without_sense_are_refused(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        on_ray.sweep([], tmp_path, address="auto", **options)


# A node


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_task, "PATIENCE", 0.0)
    runs_in(tmp_path, FINISH)
    common = {"version": __version__, "environment": {}}
    assert ray_task.check(out=str(tmp_path), folder="0001-ddqn", **common) == ""
    for out, folder in ((tmp_path / "elsewhere", "0001-ddqn"), (tmp_path, "0002-ddqn")):
        why = ray_task.check(out=str(out), folder=folder, **common)
        assert f"does not see {out}" in why and f"no plan.json with {folder}" in why
    (tmp_path / "plan.json").write_text("{")
    assert "does not see" in ray_task.check(out=str(tmp_path), folder="0001-ddqn", **common)


def test_a_node_with_another_version_names_both(tmp_path):
    runs_in(tmp_path, FINISH)
    other = tmp_path / "other" / "cerl"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("__version__ = '0.0.7'")

    def checked() -> str:
        return ray_task.check(
            out=str(tmp_path),
            folder="0001-ddqn",
            version="0.2.0",
            environment={"PYTHONPATH": str(other.parent)},
        )

    assert "has cerl 0.0.7, and this command is of cerl 0.2.0" in checked()
    (other / "__init__.py").write_text("import no_such_module")
    assert "cannot import cerl (ModuleNotFoundError" in checked()
    assert "install cerl 0.2.0 there" in checked()


def guarded(code: str) -> subprocess.Popen:
    line = [sys.executable, "-I", "-S", "-c", ray_task.GUARD, sys.executable, "-S", "-c", code]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(75)", 75),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("", 0),
    ],
)
def test_the_guard_ends_as_its_command_does(code, expected):
    with guarded(code) as process:
        assert process.wait(timeout=20) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_is_told_to_stop_if_its_guard_is_told_or_killed(number):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells the command of its guard's death")
    code = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("here", flush=True)
time.sleep(20)
"""
    with guarded(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=20) == (75 if number == signal.SIGTERM else -9)


# A cluster


@needs_ray
@pytest.mark.slow
def test_two_runs_share_each_gpu_of_both_nodes(tmp_path, two_nodes):
    wait = f"until [ $(wc -l < $1/../started) = 8 ]; do sleep 0.05; done; {FINISH}"
    runs_in(tmp_path, *[wait] * 8, device="cuda")
    code, output, errors = driven(tmp_path, address=two_nodes.address, per_gpu=2, device="cuda")
    assert code == 0, errors
    assert Counter(line["gpu"] for line in started(tmp_path)) == {"0": 4, "1": 4}
    assert "nodes 2, places for runs 8," in output and "8 done" in output


@needs_ray
@pytest.mark.slow
def test_only_killed_runs_are_tried_again(tmp_path, two_nodes):
    once = f"[ -e $1/again ] && {{ {FINISH} exit 0; }}; touch $1/again; kill -9 $$"
    noted = '{"message": "own words", "kind": "error", "signal": 0, "tries": 4, "time": 4e9}'
    runs_in(
        tmp_path,
        "echo error: no licence; echo bye; exit 2",
        f"echo '{noted}' > $1/error.json; exit 2",
        "kill -9 $$",
        once,
        FINISH,
    )
    code, _, errors = driven(tmp_path, address=two_nodes.address, jobs=4, device="cpu")
    assert code == 2
    tries = Counter(line["run"] for line in started(tmp_path))
    assert [tries[f"000{number}-ddqn"] for number in range(1, 6)] == [1, 1, 3, 2, 1]
    assert {(line["gpu"], line["threads"]) for line in started(tmp_path)} == {("", "1")}
    head, *lines = errors.splitlines()
    assert "3 of 5 runs failed" in head and "same command" in head
    one, two, three = sorted(line for line in lines if line.startswith("run "))
    assert "failed: no licence" in one and "failed: own words" in two
    assert "killed by signal 9 (Killed)" in three and "3 times" in three
    first, third = (failure.read(tmp_path / f"000{number}-ddqn") for number in (1, 3))
    assert first is not None and (first.message, first.kind) == ("no licence", "error")
    assert third is not None and (third.kind, third.signal) == ("signal", 9)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("way", ["stop file", "SIGTERM", "SIGINT to all"])
def test_a_stopped_sweep_waits_until_runs_have_saved_and_the_same_command_goes_on(
    tmp_path, two_nodes, way
):
    runs_in(tmp_path, SAVES, SAVES, FINISH)
    options = {"address": two_nodes.address, "device": "cpu"}
    process = driver(tmp_path, **options)
    wait_until(lambda: len(list(tmp_path.glob("*/here"))) == 2)
    if way == "stop file":
        (tmp_path / "stop").touch()
    elif way == "SIGTERM":
        process.terminate()
    else:  # as Ctrl-C in a terminal
        os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == SAVED, errors
    saved = sorted(path.parent.name for path in tmp_path.glob("*/saved"))
    assert saved == ["0001-ddqn", "0002-ddqn"]
    assert "the same command continues the sweep" in output
    assert not (tmp_path / "stop").exists()
    assert not list(tmp_path.glob("*/error.json"))
    for folder in tmp_path.glob("000*"):
        (folder / "act").write_text(FINISH)
    code, output, errors = driven(tmp_path, **options)
    assert code == 0, errors
    assert "3 done" in output


@needs_ray
@pytest.mark.slow
def test_runs_save_if_the_command_is_killed(tmp_path, two_nodes):
    runs_in(tmp_path, SAVES)
    process = driver(tmp_path, address=two_nodes.address, device="cpu")
    wait_until(lambda: (tmp_path / "0001-ddqn" / "here").exists())
    process.kill()
    process.communicate()
    wait_until(lambda: (tmp_path / "0001-ddqn" / "saved").exists())


@needs_ray
@pytest.mark.slow
def test_what_no_node_has_and_other_versions_are_errors_before_anything_is_trained(
    tmp_path, two_nodes
):
    runs_in(tmp_path, FINISH)
    common = {"address": two_nodes.address, "device": "cpu"}
    code, _, errors = driven(tmp_path, **common, cpus=64)
    assert code == 2 and "expected a node with 64 CPUs for a run" in errors
    assert errors.count("2 GPUs, 2 CPUs") == 2
    code, _, errors = driven(tmp_path, **common, version="9.9")
    assert code == 2
    assert errors.count(f"has cerl {__version__}, and this command is of cerl 9.9") == 2
    code, _, errors = driven(tmp_path, **common, per_gpu=2)
    assert code == 2 and "--per-gpu 2: expected a GPU" in errors
    assert not started(tmp_path)


def heard_at(processes: list[int]) -> set[str]:
    """The addresses, as Linux writes them, at which processes accept connections by TCP."""
    sockets = set()
    for process in processes:
        for path in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(path))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cluster_that_is_started_here_is_out_of_reach_and_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    runs_in(tmp_path, f"until [ -e $1/../go ]; do sleep 0.05; done; {FINISH}", FINISH)
    before = set(Path("/tmp").glob("cerl-ray-*"))
    process = driver(tmp_path, jobs=2, device="cpu")
    wait_until(lambda: len(started(tmp_path)) == 2)
    processes = descendants(process.pid)
    addresses = heard_at([process.pid, *processes])
    (tmp_path / "go").touch()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "2 done" in output
    # 127.0.0.1, as such or within an address of IPv6
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"} and addresses
    assert set(Path("/tmp").glob("cerl-ray-*")) <= before
    wait_until(lambda: not any(Path(f"/proc/{number}").exists() for number in processes))


def checkpoints(folder: Path) -> int:
    """The step of the newest checkpoint in a run folder, 0 if there is none."""
    names = (path.stem.partition("-")[2] for path in folder.glob("checkpoint-*.pt"))
    return max(map(int, names), default=0)


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_of_lost_nodes_go_on_elsewhere_and_end_equal_to_the_bit(tmp_path, two_nodes):
    from campaign import differences, line, read_all

    sweep = [
        *(sys.executable, "-m", "cerl", "sweep", "catch/cerl", "--device", "cpu"),
        *line(seeds=(0, 1), threads=1, schedule_steps=3000),
        *line(ensemble_members=2, net_hidden=(16, 16), replay_start=100, eval_every=1500),
        *line(eval_episodes=2, log_checkpoint_every=200),
        *("--seeds-per-run", "1"),
    ]
    out, alone = tmp_path / "ray", tmp_path / "alone"
    process = subprocess.Popen(
        [*sweep, "--out", str(out), "--launcher", "ray", "--address", two_nodes.address],
        env={**os.environ, **LOOPBACK},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        wait_until(lambda: len([one for one in out.glob("0*") if checkpoints(one)]) == 2)
        # One run is killed with its machine; the other one is told to save.
        two_nodes.kill(0)
        two_nodes.kill_raylet(0)
        two_nodes.add()
        two_nodes.add()
        output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert output.count("its node is lost; it goes on from its last checkpoint") == 2
    assert "2 runs: 2 done" in output
    done = subprocess.run([*sweep, "--out", str(alone)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = sorted(path.name for path in out.glob("0*"))
    assert len(folders) == 2
    for name in folders:
        assert differences(read_all(out / name), read_all(alone / name)) == []
