"""Sweeps on this machine, with a stand-in for the process of a run that does what a test says."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.text import Text

from cerl.config import load
from cerl.record import failure, finished, heartbeat
from cerl.record.folder import dump, load_file
from cerl.record.lock import held
from cerl.record.screen import PipeConsole
from cerl.stop import Stopped
from cerl.sweep import job, side_by_side, slots, view
from cerl.sweep.local import sweep
from cerl.sweep.mps import PROGRAM
from cerl.sweep.mps import service as mps_service
from cerl.sweep.plan import PlannedRun
from cerl.sweep.slots import Slots

PYTHON = sys.executable
# It is started as `PYTHON -m cerl train --resume FOLDER --trust ...`.
RUN = """#!/bin/sh
folder=$5
echo "$(basename "$folder") gpu=$CUDA_VISIBLE_DEVICES threads=$OMP_NUM_THREADS \
pipe=$CUDA_MPS_PIPE_DIRECTORY options=$7$8$9" >> "$folder/../started"
. "$folder/act"
"""
FINISH = 'cp "$folder/whole" "$folder/finished"'
GPUS = [("GPU-aaaa-1", 80_000, 10_000), ("GPU-bbbb-2", 80_000, 70_000)]


def runs_in(out: Path, *acts: str, **options) -> list[PlannedRun]:
    """Planned runs whose processes do what shell commands say."""
    runs = []
    config = load("catch/ddqn", {"device": "cpu", "schedule.steps": 1000, **options})
    for number, act in enumerate(acts, 1):
        name = f"{number:04d}-ddqn"
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "act").write_text(act)
        finished.mark(folder, 1000)
        (folder / "finished").rename(folder / "whole")
        dump(config, folder / "config.yaml")
        runs.append(PlannedRun(number, name, "catch/ddqn", "catch", "ddqn", (0,), 1000, "", {}))
    return runs


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch) -> Path:
    """A folder of programs that the tests start instead of the real ones."""
    folder = tmp_path / "programs"
    folder.mkdir()
    program(folder / "python", RUN)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def smi(folder: Path, gpus=GPUS, name: str = "NVIDIA H200") -> None:
    lines = "\n".join(f"{uuid}, {name}, {total}, {free}" for uuid, total, free in gpus)
    program(folder / "nvidia-smi", f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")


def started(out: Path) -> list[dict[str, str]]:
    """What the processes of runs were started with, in order."""
    lines = (out / "started").read_text().splitlines()
    return [
        {"run": words[0], **dict(word.split("=", 1) for word in words[1:])}
        for words in map(str.split, lines)
    ]


def failure_of(out: Path, run: PlannedRun) -> failure.Failure:
    found = failure.read(out / run.folder)
    assert found is not None
    return found


def test_failed_runs_stop_no_other_and_the_same_command_retries_them(tmp_path, capsys):
    out = tmp_path / "out"
    runs = runs_in(
        out,
        "kill -9 $$",
        "echo error: no licence; echo bye; exit 2",
        'echo "error: other words"; echo "$noted" > "$folder/error.json"; exit 2',
        FINISH,
    )
    noted = '{"message": "own words", "kind": "error", "signal": 0, "tries": 4, "time": 4e9}'
    act = out / runs[2].folder / "act"
    act.write_text(f"noted='{noted}'\n{act.read_text()}")
    with pytest.raises(RuntimeError) as caught:
        sweep(runs, out, jobs=2, device="cpu")
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"3 of 4 runs failed, the others are in {out}")
    assert "same command tries" in head
    assert [line[:5] for line in sorted(lines)] == ["run 1", "run 2", "run 3"]
    one, two, three = (failure_of(out, run) for run in runs[:3])
    assert one[1:4] == ("signal", 9, 1) and "signal 9 (Killed)" in one.message
    assert two[:4] == ("no licence", "error", 0, 1)
    assert three.message == "own words"
    assert any("no licence" in line for line in lines)
    with pytest.raises(RuntimeError, match="3 of 4"):
        sweep(runs, out, jobs=2, device="cpu")
    assert failure_of(out, runs[0]).tries == 2
    for run in runs[:3]:
        (out / run.folder / "act").write_text(FINISH)
    assert sweep(runs, out, jobs=2, device="cpu") == [out / run.folder for run in runs]
    tries = [line["run"] for line in started(out)]
    assert [tries.count(run.folder) for run in runs] == [3, 3, 3, 1]
    assert "1 of 4 runs are finished already" in capsys.readouterr().out


def test_the_end_of_a_run_is_noticed_without_polling(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "LOOK_EVERY", 60.0)
    runs = runs_in(tmp_path / "out", *[f"sleep 0.1; {FINISH}"] * 6)
    begin = time.monotonic()
    sweep(runs, tmp_path / "out", jobs=2, device="cpu")
    assert time.monotonic() - begin < 30


def test_processes_share_the_cores_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "cores", lambda: 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    out = tmp_path / "out"
    sweep(runs_in(out, *[FINISH] * 5), out, jobs=4, device="cpu")
    assert {(line["gpu"], line["threads"]) for line in started(out)} == {("", "2")}
    (out / "started").unlink()
    for finish in out.glob("*/finished"):
        finish.unlink()
    sweep(runs_in(out, *[FINISH] * 2), out, jobs=4, device="cpu")
    assert {line["threads"] for line in started(out)} == {"4"}  # only two runs are left
    (out / "started").unlink()
    for finish in out.glob("*/finished"):
        finish.unlink()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    sweep(runs_in(out, *[FINISH] * 2), out, jobs=4, device="cpu")
    assert {line["threads"] for line in started(out)} == {"7"}


def test_runs_go_to_the_gpu_with_room(tmp_path, programs):
    smi(programs)
    out = tmp_path / "out"
    wait = f'until [ -e "$folder/../go" ]; do sleep 0.05; done; {FINISH}'
    runs = runs_in(out, *[wait] * 4, device="cuda:7")

    def go() -> None:
        while not (out / "started").exists() or len(started(out)) < 4:
            time.sleep(0.05)
        (out / "go").touch()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    sweep(runs, out, per_gpu=2)
    thread.join()
    # A run that has just started counts as half of a GPU: so 70,000 MiB less 40,000 for the second
    # run are more than 10,000, and the third one finds no free place on that GPU.
    by_run = {line["run"]: line["gpu"] for line in started(out)}
    assert [by_run[run.folder] for run in runs] == ["1", "1", "0", "0"]
    # In its process, the GPU of a run is the only one: the number that the folder names is gone.
    assert {line["options"] for line in started(out)} == {"--devicecuda"}


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("auto", None, ["0", "1"]),
        ("cuda", None, ["0", "1"]),
        ("cuda:1", None, ["1"]),
        ("cpu", None, []),
        ("auto", "1", ["1"]),
        ("cuda:0", "1,0", ["1"]),
        ("cuda", "1, GPU-aa", ["1", "GPU-aa"]),
        ("auto", "1,5,0", ["1"]),
        ("auto", "-1", []),
        ("auto", "", []),
    ],
)
def test_gpus_are_those_that_the_user_left_visible(
    programs, monkeypatch, device, visible, expected
):
    smi(programs)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots.chosen(device) == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:2", "gpu", "cuda:", "cuda:x", "cpu:1"])
def test_a_device_that_does_not_exist_is_refused(programs, monkeypatch, device):
    smi(programs)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ValueError, match=f"^device: expected .* got '{device}'$"):
        slots.chosen(device)


def test_without_nvidia_smi_torch_is_asked(programs, monkeypatch):
    program(programs / "nvidia-smi", "#!/bin/sh\necho no driver; exit 9\n")
    assert slots.listed() == [] and slots.chosen("auto") == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert slots.chosen("auto") == ["0", "1", "2"]
    places = Slots("auto", jobs=None, per_gpu=2)
    taken = [places.take() for _ in range(6)]
    # Nothing is known about their memory: the one with the fewest runs is next.
    assert [place.gpu for place in taken if place] == ["0", "1", "2", "0", "1", "2"]
    assert places.take() is None
    assert taken[4] is not None
    places.give(taken[4])
    again = places.take()
    assert again is not None and again.gpu == "1"


@pytest.mark.parametrize(
    ("gpus", "jobs", "per_gpu", "count", "each", "here"),
    [
        (0, None, None, 1, 1, True),
        (0, 3, None, 3, 3, False),
        (1, None, None, 1, 1, True),
        (1, 10, None, 10, 10, False),
        (1, 10, 2, 2, 2, False),
        (4, None, None, 4, 1, False),
        (4, None, 3, 12, 3, False),
        (4, 1, None, 1, 1, False),
        (4, 10, None, 10, 3, False),
        (4, 10, 2, 8, 2, False),
    ],
)
def test_counts_of_places(programs, gpus, jobs, per_gpu, count, each, here):
    smi(programs, [(f"GPU-{number}", 1000, 1000) for number in range(gpus)])
    places = Slots("auto" if gpus else "cpu", jobs=jobs, per_gpu=per_gpu)
    assert (places.count, places.per_gpu, places.here) == (count, each, here)


@pytest.mark.parametrize(("jobs", "per_gpu"), [(0, None), (-1, None), (None, 0), (None, 2)])
def test_counts_without_sense_are_refused(jobs, per_gpu):
    with pytest.raises(ValueError, match="^--(jobs|per-gpu)"):
        Slots("cpu", jobs=jobs, per_gpu=per_gpu)


def test_memory_is_not_looked_up_where_numbers_may_mean_other_gpus(programs, monkeypatch):
    lines = "GPU-a, NVIDIA H200, 9, 9\nGPU-b, NVIDIA A100, 9, [N/A]"
    program(programs / "nvidia-smi", f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
    assert list(slots.rows(["0", "1"])) == [] and list(slots.rows(["GPU-b"])) == ["GPU-b"]
    with pytest.raises(RuntimeError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        Slots("auto", jobs=None, per_gpu=None).name_by_uuid()
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [gpu.free for gpu in slots.rows(["0", "1"]).values()] == [9, 0]


MPS = """#!/bin/sh
[ "$1" = -d ] || read words
echo "$1$words $CUDA_VISIBLE_DEVICES" >> "{out}/service"
[ -d "$CUDA_MPS_PIPE_DIRECTORY" ] && [ -d "$CUDA_MPS_LOG_DIRECTORY" ] && {then}
"""


@pytest.mark.parametrize("fails", [False, True])
def test_the_multi_process_service_is_started_and_ended(tmp_path, programs, fails):
    smi(programs)
    out = tmp_path / "out"
    runs = runs_in(out, *["exit 2" if fails else FINISH] * 2)
    program(programs / PROGRAM, MPS.format(out=out, then="exit 0"))
    with pytest.raises(RuntimeError, match="2 of 2") if fails else contextlib.nullcontext():
        sweep(runs, out, mps=True, device="cuda")
    uuids = "GPU-aaaa-1,GPU-bbbb-2"
    calls = (out / "service").read_text().splitlines()
    assert calls == [f"-d {uuids}", f"get_server_list {uuids}", f"quit {uuids}"]
    assert sorted(line["gpu"] for line in started(out)) == ["GPU-aaaa-1", "GPU-bbbb-2"]
    (pipe,) = {line["pipe"] for line in started(out)}
    assert pipe and not Path(pipe).exists()


def test_a_multi_process_service_that_does_not_come_up_is_an_error(tmp_path, programs):
    smi(programs)
    with pytest.raises(RuntimeError, match=f"{PROGRAM} cannot be started .*leave --mps out"):
        mps_service(["GPU-a"]).__enter__()
    program(programs / PROGRAM, MPS.format(out=tmp_path, then="echo no permission && exit 1"))
    with pytest.raises(RuntimeError, match=r"failed \(no permission\); leave --mps out"):
        mps_service(["GPU-a"]).__enter__()
    assert (tmp_path / "service").read_text().splitlines() == ["-d GPU-a"]
    with pytest.raises(ValueError, match="--mps: expected a GPU"):
        sweep(runs_in(tmp_path / "out", FINISH), tmp_path / "out", mps=True, device="cpu")


def test_a_stopped_sweep_waits_until_its_runs_have_saved(tmp_path, capsys):
    out = tmp_path / "out"
    slow = "trap 'sleep 0.3; touch \"$folder/saved\"; exit 75' TERM; sleep 60 & wait"
    runs = runs_in(out, slow, slow, FINISH)

    def stop() -> None:
        while not (out / "started").exists() or len(started(out)) < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(Stopped):
            sweep(runs, out, jobs=2, device="cpu")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [(out / run.folder / "saved").exists() for run in runs] == [True, True, False]
    assert "the same command continues the sweep" in capsys.readouterr().out
    assert not any(failure.read(out / run.folder) for run in runs)


def test_a_sweep_that_is_stopped_in_this_process_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def train(*arguments, **options) -> bool:
        raise Stopped

    monkeypatch.setattr("cerl.sweep.local._train", train)
    runs = runs_in(tmp_path, FINISH, FINISH)
    with pytest.raises(Stopped):
        sweep(runs, tmp_path, device="cpu")
    assert "the same command continues the sweep" in capsys.readouterr().out
    assert not any(failure.read(tmp_path / run.folder) for run in runs)


@contextlib.contextmanager
def trained_elsewhere(folder: Path, *, seconds: float, **beat) -> Iterator[None]:
    """A stand-in for the process of another sweep, which trains a run for some seconds."""
    over = threading.Event()

    def train() -> None:
        with held(folder):
            pulse = heartbeat.Pulse(folder, steps=1000)
            pulse.beat()
            found = heartbeat.read(folder)
            assert found is not None
            heartbeat._replace(folder / heartbeat.FILE, {**found._asdict(), **beat})
            over.set()
            time.sleep(seconds)

    thread = threading.Thread(target=train)
    thread.start()
    over.wait()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("orphan", [False, True])
def test_a_run_that_another_sweep_trains_keeps_no_other_from_its_turn(tmp_path, capsys, orphan):
    out = tmp_path / "out"
    act = 'echo begin >> "$folder/../seen"; sleep 0.5; echo end >> "$folder/../seen"'
    runs = runs_in(out, FINISH, f"{act}; {FINISH}", f"{act}; {FINISH}")
    with trained_elsewhere(out / runs[0].folder, seconds=4, orphan=orphan):
        sweep(runs, out, jobs=2, device="cpu")
    order = [line["run"] for line in started(out)]
    assert sorted(order) == [run.folder for run in runs] and order[-1] == runs[0].folder
    assert capsys.readouterr().out.count("run 1, ddqn on catch: another process trains it") == 1
    # A run of a sweep that has ended takes one of the two places, one of a living sweep does not.
    alone, together = ["begin", "end"] * 2, ["begin"] * 2 + ["end"] * 2
    assert (out / "seen").read_text().split() == (alone if orphan else together)


def test_a_run_of_a_sweep_that_has_ended_takes_a_place(tmp_path):
    out = tmp_path / "out"
    runs = runs_in(out, FINISH)
    folder = out / runs[0].folder
    with trained_elsewhere(folder, seconds=0.3, orphan=True):
        assert job.needs_place(folder)
        places = Slots("cpu", jobs=2, per_gpu=None)
        assert places.take(others=1) is not None and places.take(others=1) is None
    assert not job.needs_place(folder)
    with trained_elsewhere(folder, seconds=0.1):
        assert not job.needs_place(folder)


def test_a_run_on_another_machine_is_known_by_its_heartbeat(tmp_path):
    (run,) = runs_in(tmp_path, FINISH)
    folder = tmp_path / run.folder
    with heartbeat.beating(folder, steps=1000):
        assert not job.elsewhere(folder)  # here the lock decides, and nobody holds it
        found = heartbeat.read(folder)
        assert found is not None
        other = found._replace(host="another", started=found.started + 1)
        heartbeat._replace(folder / heartbeat.FILE, other._asdict())
        assert job.elsewhere(folder) and job.claim(folder) is None
    assert not job.elsewhere(folder)


def test_a_claim_is_seen_before_the_run_has_its_lock(tmp_path):
    (run,) = runs_in(tmp_path, FINISH)
    folder = tmp_path / run.folder
    lock = job.claim(folder)
    assert lock is not None and job.elsewhere(folder) and job.claim(folder) is None
    os.close(lock)
    assert not job.elsewhere(folder)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_another_process_failed_at_is_not_tried_twice(tmp_path, monkeypatch, jobs):
    out = tmp_path / "out"
    runs = runs_in(out, FINISH, FINISH)
    monkeypatch.setattr("cerl.training.resume", lambda folder, **_: finished.mark(folder, 1000))
    folder = out / runs[0].folder

    def fail() -> None:
        time.sleep(0.7)
        failure.note(folder, "no licence")

    thread = threading.Thread(target=fail)
    thread.start()
    with (
        trained_elsewhere(folder, seconds=1.5),
        pytest.raises(RuntimeError, match="(?s)1 of 2 runs failed.*run 1, .*no licence"),
    ):
        sweep(runs, out, jobs=jobs, device="cpu")
    thread.join()
    assert (out / runs[1].folder / "finished").exists()


def test_a_process_that_comes_too_late_does_not_fail_the_run(tmp_path):
    """Another process takes the lock of the run while the own one starts up."""
    out = tmp_path / "out"
    late = 'touch "$folder/up"; until [ -e "$folder/finished" ]; do sleep 0.05; done; exit 2'
    (run,) = runs_in(out, late)
    folder = out / run.folder

    def other() -> None:
        while not (folder / "up").exists():
            time.sleep(0.02)
        with held(folder):
            (folder / "whole").rename(folder / "finished")
            time.sleep(1)

    thread = threading.Thread(target=other)
    thread.start()
    sweep([run], out, jobs=2, device="cpu")
    thread.join()
    assert failure.read(folder) is None and len(started(out)) == 1


def test_many_sweeps_at_once_train_every_run_once(tmp_path):
    out = tmp_path / "out"
    runs = runs_in(out, *[f"sleep 0.2; {FINISH}"] * 8)
    text = "import sys; from pathlib import Path; from cerl.sweep.local import sweep\n"
    text += "from cerl.sweep.plan import PlannedRun\n"
    text += f"sys.executable = {sys.executable!r}\n"
    text += f"sweep({runs}, Path({str(out)!r}), jobs=2, device='cpu')"
    sweeps = [subprocess.Popen([PYTHON, "-c", text], stdout=subprocess.PIPE) for _ in range(3)]
    for process in sweeps:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert sorted(line["run"] for line in started(out)) == [run.folder for run in runs]


def test_what_changes_in_a_folder(tmp_path):
    (run,) = runs_in(tmp_path, FINISH)
    folder = tmp_path / run.folder
    assert job.changes(run, folder, device="auto") == {}
    assert job.changes(run._replace(steps=500), folder, device="cpu") == {}
    longer = run._replace(steps=2500)
    assert job.changes(longer, folder, device="cpu") == {"schedule.steps": 2500}
    assert job.changes(run, folder, device="cuda") == {"device": "cuda"}
    config = load_file(folder / "config.yaml")
    dump(config.model_copy(update={"device": "cuda:3"}), folder / "config.yaml")
    assert job.changes(run, folder, device="auto") == {"device": "cuda"}
    assert job.changes(run, folder, device="cuda:3") == {}


def test_a_damaged_folder_fails_alone(tmp_path):
    for jobs in (1, 2):
        out = tmp_path / f"out-{jobs}"
        runs = runs_in(out, FINISH, FINISH)
        (out / runs[0].folder / "config.yaml").write_text("seeds: [")
        (out / runs[1].folder / "whole").rename(out / runs[1].folder / "finished")
        with pytest.raises(RuntimeError, match=r"(?s)1 of 2 runs failed.*config\.yaml"):
            sweep(runs, out, jobs=jobs, device="cpu")
        assert "config.yaml" in failure_of(out, runs[0]).message


def test_the_table_is_drawn_on_a_terminal_and_takes_little_of_the_time(tmp_path, monkeypatch):
    asked, clock = [], [100.0]

    def states(out):
        asked.append(out)
        clock[0] += 2.0
        return []

    def broken(out):
        raise OSError("no disk")

    monkeypatch.setattr(view.status, "states", states)
    monkeypatch.setattr(view.status, "shown", lambda states, width: Text("THE TABLE"))
    monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
    with view.View([], tmp_path) as plain:
        plain.draw()
    assert not asked
    shown = view.View([], tmp_path)
    with (tmp_path / "screen").open("w+") as screen:
        shown.screen.console = PipeConsole(file=screen, force_terminal=True, width=80)
        with shown:
            shown.draw()
            assert len(asked) == 1
            clock[0] += 39.0  # it took two seconds, so the next one is due after forty
            shown.draw()
            assert len(asked) == 1
            clock[0] += 1.5
            shown.draw()
            assert len(asked) == 2
        shown.last()
        monkeypatch.setattr(view.status, "states", broken)
        clock[0] += 100.0
        with shown:
            shown.draw()
        shown.last()
        shown.line("lines go on")
        screen.seek(0)
        text = screen.read()
    assert text.count("THE TABLE") >= 3
    assert "cannot be read: no disk" in text and "lines go on" in text
