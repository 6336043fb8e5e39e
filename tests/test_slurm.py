"""Sweeps on a real cluster of SLURM: whatever ends a job, its runs end like undisturbed ones.

Submission without a cluster (scripts, arrays, refusals) is tested at the end.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from campaign import differences, read_all
from slurm_cluster import Cluster

from cerl import __version__ as VERSION
from cerl.__main__ import main
from cerl.config import load
from cerl.record import checkpoint, failure, finished
from cerl.sweep import slurm, slurm_queue
from cerl.sweep.command import Asked
from cerl.sweep.state import states

ROOT = Path(__file__).resolve().parents[1]
# A game whose steps are slow as long as there is a file `slow` in the current folder. So a run can
# be disturbed in its middle, on fast and slow machines alike, and the undisturbed run is quick. Its
# rules have to run as Python at every step, so runs are told not to play them from tapes.
GAME = """
import os, time
from typing import NamedTuple

import torch
from torch import Tensor

from cerl.envs.resident import Game


class State(NamedTuple):
    place: Tensor  # [G] int64


def rules() -> Game:
    def reset(u):
        return State((7 * u[:, 0]).long())

    def step(state, action, u):
        time.sleep(0.1 if os.path.exists("slow") else 0.0)
        if os.path.exists("faulty"):  # in the current folder
            raise RuntimeError("the rules are wrong")
        place = (state.place + action - 1 + (2 * u[:, 0]).long()).clamp(0, 6)
        return State(place), (place == 3).float(), place == 6

    def observe(state):
        return torch.arange(7, device=state.place.device) == state.place[:, None]

    return Game(reset, step, observe, 1, 1, (7,), actions=(0, 1, 2))
"""
STEPS = 600
OPTIONS = (
    f"--env.time-limit 20 --eval.time-limit 20 --seeds 0 1 2 --seeds-per-run 1 --net.hidden 16 "
    f"--schedule.steps {STEPS} --schedule.update-every 4 --replay.start 40 --replay.batch 8 "
    "--eval.every 300 --eval.episodes 1 --log.every 150 --log.checkpoint-every 20"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    for found in slurm_cluster.running(tmp_path_factory.mktemp("slurm")):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("PATH", "SLURM_CONF"):
                patch.setenv(name, found.variables[name])
            yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of the same sweep, trained on this machine without a pause."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = Sweep(folder, slow=False).cerl()
    assert done.returncode == 0, done.stderr
    return folder / "out"


class Sweep:
    """A sweep of three runs that differ in their seeds, into the folder `out` of a folder.

    Args of the constructor: slow, the runs take a minute until `go` is called.
    """

    def __init__(self, folder: Path, cluster: Cluster | None = None, *, slow: bool = True) -> None:
        self.folder, self.cluster, self.out = folder, cluster, folder / "out"
        if slow:
            (folder / "slow").touch()
        (folder / "pace.py").write_text(GAME)

    def go(self) -> None:
        """From now on the runs are quick."""
        (self.folder / "slow").unlink()

    def cerl(self, *more: str) -> subprocess.CompletedProcess[str]:
        """The command of the sweep with more options, or another command of cerl."""
        words = ["sweep", "game/ddqn", "--env.name", "pace:rules", *OPTIONS.split()]
        words += ["--out", "out", *more]
        return self.command(*words)

    def slurm(self, *sbatch: str, jobs: int = 3, more: tuple[str, ...] = ()) -> str:
        """Submits the sweep. Args: sbatch, options. Returns: what the command printed."""
        words = ["--launcher", "slurm", "--jobs", str(jobs), "--sbatch"]
        own = ["--cpus-per-task=1 --mem=100", *sbatch]
        done = self.cerl(*words, " ".join(own), *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        base = self.cluster.variables if self.cluster else os.environ
        variables = {**base, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CERL_EAGER": "1"}
        command = [sys.executable, "-m", "cerl", *words]
        return subprocess.run(
            command, cwd=self.folder, env=variables, capture_output=True, text=True
        )

    def run(self, number: int) -> Path:
        (found,) = self.out.glob(f"{number:04d}-*")
        return found

    def begun(self, number: int) -> bool:
        """Whether a run trains, and has saved a checkpoint since it began."""
        folder = list(self.out.glob(f"{number:04d}-*"))
        return bool(folder) and any(
            int(file.stem.partition("-")[2]) >= 2 for file in checkpoint.files(folder[0])
        )

    def states(self) -> list[str]:
        return [one.state for one in states(self.out)]

    def process(self, number: int) -> int:
        """The process that trains a run."""
        folder = str(self.run(number)).encode()
        found = [
            pid
            for pid in slurm_cluster.pids()
            if b"--resume\0" + folder in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(found) == 1, found
        return found[0]

    def log(self, number: int) -> str:
        """What the sessions of a run have printed."""
        return (self.out / "logs" / f"{self.run(number).name}.txt").read_text()

    def logs(self) -> str:
        """What the jobs have printed."""
        return "\n".join(path.read_text() for path in sorted(self.out.glob("logs/slurm-*")))

    def ends(self, undisturbed: Path, *, seconds: float = 300.0) -> None:
        """Waits until all runs are finished, and compares every bit with undisturbed ones."""
        end = time.monotonic() + seconds
        while self.states() != ["done"] * 3:
            assert time.monotonic() < end, f"{self.states()}\n{self.logs()}"
            time.sleep(0.2)
        for folder in undisturbed.glob("000*"):
            assert not differences(read_all(folder), read_all(self.out / folder.name))


@pytest.mark.slow
def test_an_array_ends_whatever_happens_to_its_tasks(cluster, undisturbed, tmp_path):
    """One run is killed as if memory had run out, one is put into the queue again by hand."""
    sweep = Sweep(tmp_path, cluster)
    said = sweep.slurm(jobs=2)
    (job,) = slurm_queue.noted(sweep.out)
    assert f"3 runs submitted: job {job.job}" in said and job.tasks == ((1,), (2,), (3,))
    cluster.until(lambda: sweep.begun(1) and sweep.begun(2))
    assert sweep.states()[2] == "queued"
    shown = sweep.command("status", "out").stdout
    assert f"pending in SLURM, job {job.job}_2 (JobArrayTaskLimit)" in shown
    assert "3 runs are in SLURM's queue already" in sweep.slurm(jobs=2)
    assert len(slurm_queue.noted(sweep.out)) == 1
    os.kill(sweep.process(1), signal.SIGKILL)
    cluster.call("scontrol", "requeue", f"{job.job}_1")
    cluster.until(lambda: "stopped and saved; go on" in sweep.log(2))
    cluster.until(lambda: "killed by signal 9" in sweep.logs())
    sweep.go()
    sweep.ends(undisturbed)
    assert "run 1" in sweep.logs() and "killed by signal 9" in sweep.logs()
    assert sweep.log(1).count("resumed at agent step") == 1
    assert sweep.log(2).count("stopped and saved; go on") == 1
    assert "restarts: 1" in sweep.logs()
    # The same command finds nothing to submit, and writes the report.
    assert "3 of 3 runs are finished already" in sweep.slurm()
    assert (sweep.out / "table.md").is_file() and len(list(sweep.out.glob("slurm/*.sh"))) == 1


@pytest.mark.slow
def test_cancelled_runs_save_once_and_the_same_command_goes_on(cluster, undisturbed, tmp_path):
    """Two runs share a job; the worker, and SLURM itself, tell them to stop."""
    sweep = Sweep(tmp_path, cluster)
    sweep.slurm(jobs=4, more=("--per-job", "2"))
    (job,) = slurm_queue.noted(sweep.out)
    assert job.tasks == ((1, 2), (3,))
    cluster.until(lambda: all(sweep.begun(number) for number in (1, 2, 3)))
    done = sweep.command("sweep", "--cancel", "out")
    assert f"cancelled: job {job.job} with 2 tasks, of which 2 were running" in done.stdout
    cluster.until(lambda: sweep.states() == ["stopped"] * 3)
    for number in (1, 2, 3):
        assert sweep.log(number).count("stopped and saved; go on") == 1
        assert "interrupted" not in sweep.log(number)
    assert (sweep.out / "stop").is_file()
    sweep.go()
    sweep.slurm()
    assert not (sweep.out / "stop").exists()
    sweep.ends(undisturbed)
    assert sweep.log(1).count("resumed at agent step") == 1


@pytest.mark.slow
def test_before_its_time_is_over_a_job_saves_and_queues_again(cluster, undisturbed, tmp_path):
    """Once the run has begun, the job is left the ten minutes before which SLURM warns."""
    sweep = Sweep(tmp_path, cluster)
    sweep.slurm("--time=60 --signal=B:USR2@600", jobs=1)
    (job,) = slurm_queue.noted(sweep.out)
    cluster.until(lambda: sweep.begun(1))
    cluster.call("scontrol", "update", f"JobId={job.job}", "TimeLimit=10")
    cluster.until(lambda: "the time of the job is almost over" in sweep.logs())
    # SLURM refuses the change while a task that has ended is not yet in the queue again.
    cluster.until(lambda: cluster.takes("scontrol", "update", f"JobId={job.job}", "TimeLimit=60"))
    sweep.go()
    sweep.ends(undisturbed)
    assert "restarts: 1" in sweep.logs()
    assert "stopped and saved; go on" in sweep.log(1) and "killed" not in sweep.logs()


@pytest.mark.slow
def test_a_preempted_job_comes_back(cluster, undisturbed, tmp_path):
    sweep = Sweep(tmp_path, cluster)
    sweep.slurm("--cpus-per-task=2", jobs=1)
    cluster.until(lambda: sweep.begun(1))
    urgent = ("--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
    cluster.call("sbatch", *urgent)
    cluster.until(lambda: "stopped and saved; go on" in sweep.log(1))
    sweep.go()
    sweep.ends(undisturbed)
    assert sweep.log(1).count("resumed at agent step") == 1


@pytest.mark.slow
def test_jobs_of_a_node_that_dies_begin_again(cluster, undisturbed, tmp_path):
    sweep = Sweep(tmp_path, cluster)
    sweep.slurm("--partition=second", jobs=2)
    cluster.until(lambda: sweep.begun(1) and sweep.begun(2))
    cluster.kill_node("n1")
    cluster.until(lambda: "down" in " ".join(cluster.states()))
    sweep.go()
    cluster.start_node("n1")
    sweep.ends(undisturbed)
    assert sweep.log(1).count("resumed at agent step") == 1


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_not_tried_again(cluster, tmp_path):
    sweep = Sweep(tmp_path, cluster, slow=False)
    (tmp_path / "faulty").touch()
    sweep.slurm()
    cluster.until(lambda: sweep.states() == ["failed"] * 3)
    cluster.until(lambda: cluster.queue().count("\n") == 1)
    found = failure.read(sweep.run(1))
    assert found is not None and (found.kind, found.tries) == ("error", 1)
    assert "the rules are wrong" in found.message and "1 of 1 runs failed" in sweep.logs()
    assert "restarts: 1" not in sweep.logs()
    # The same command tries them again.
    (tmp_path / "faulty").unlink()
    sweep.slurm()
    cluster.until(lambda: sweep.states() == ["done"] * 3)


@pytest.mark.slow
def test_what_slurm_refuses_is_told_in_its_words(cluster, tmp_path):
    sweep = Sweep(tmp_path, cluster)
    done = sweep.cerl("--launcher", "slurm", "--sbatch", "--partition=nowhere")
    assert done.returncode == 2 and "invalid partition specified: nowhere" in done.stderr
    assert not slurm_queue.noted(sweep.out)
    sweep.slurm("--hold")
    assert sweep.command("sweep", "--cancel", "out").returncode == 0


# Submission with stand-ins for SLURM's programs.

SBATCH = """#!/bin/sh
echo "$@" >> {folder}/calls
env > {folder}/environment
[ -e {folder}/refuses ] && {{ echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1; }}
wc -l < {folder}/calls | tr -d " "
"""
QUEUE = '#!/bin/sh\necho "$@" >> {folder}/asked\ncat {folder}/queue\n'


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder of stand-ins. Submitted jobs have the numbers 1, 2 and so on."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "queue").touch()
    config = "echo MaxArraySize = 3"
    for name, text in (
        ("sbatch", SBATCH),
        ("squeue", QUEUE),
        ("scancel", '#!/bin/sh\necho "$@" > {folder}/cancelled\n'),
        ("scontrol", f"#!/bin/sh\n{config}\n"),
    ):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def calls(programs: Path) -> list[str]:
    """The options of each call of sbatch, without the first one and the script."""
    lines = (programs / "calls").read_text().splitlines()
    return [re.sub(r" \S+/slurm/(\d+)\.sh ", r" \1 ", line.split(" ", 1)[1]) for line in lines]


SWEEP = "sweep catch/ddqn --seeds-per-run 1 --launcher slurm --out out"


def submit(*more: str, seeds: str = "0..7") -> None:
    assert main([*SWEEP.split(), "--seeds", seeds, *more]) == 0


def test_arrays_are_chunked_and_share_the_limit(programs, capsys):
    submit("--jobs", "5")
    assert calls(programs) == [
        "--array=0-2%2 0001 0",
        "--array=0-2%2 0001 3",
        "--array=0-1%1 0001 6",
    ]
    assert "8 runs submitted: jobs 1 2 3 (out/slurm/0001.sh)" in capsys.readouterr().out
    text = Path("out/slurm/0001.sh").read_text()
    assert "runs=(1 2 3 4 5 6 7 8)" in text and len(text.splitlines()) < 15
    assert subprocess.run(["bash", "-n", "out/slurm/0001.sh"]).returncode == 0


def test_each_task_of_a_script_trains_its_own_runs(programs):
    submit("--per-job", "3", "--setup", "echo set up", "--setup", "export A=B", "--prefix", "echo")
    assert calls(programs) == ["--array=0-2 0001 0"]
    (job,) = slurm_queue.noted(Path("out"))
    for task, runs in enumerate(job.tasks):
        done = subprocess.run(
            ["bash", "out/slurm/0001.sh", "0"],
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True,
            text=True,
        )
        first, second = done.stdout.splitlines()
        assert first == "set up"
        assert second.startswith(f"{sys.executable} -m cerl sweep-run {Path('out').absolute()} ")
        assert second.endswith(" --runs " + " ".join(map(str, runs)))
    assert [runs for runs in job.tasks] == [(1, 2, 3), (4, 5, 6), (7, 8)]


def test_with_fewer_places_than_arrays_each_array_waits_for_one_before(programs):
    submit("--jobs", "2")
    assert calls(programs) == [
        "--array=0-2%1 0001 0",
        "--array=0-2%1 0001 3",
        "--array=0-1%1 --dependency=afterany:1 0001 6",
    ]


@pytest.mark.parametrize(
    ("tasks", "most", "at_once", "expected"),
    [
        (5, 10, 0, [(0, 5, 0, None)]),
        (5, 10, 2, [(0, 5, 2, None)]),
        (5, 2, 0, [(0, 2, 0, None), (2, 2, 0, None), (4, 1, 0, None)]),
        (5, 2, 4, [(0, 2, 2, None), (2, 2, 1, None), (4, 1, 1, None)]),
        (5, 2, 1, [(0, 2, 1, None), (2, 2, 1, 0), (4, 1, 1, 1)]),
    ],
)
def test_chunks(tasks, most, at_once, expected):
    assert [tuple(chunk) for chunk in slurm.chunked(tasks, most=most, at_once=at_once)] == expected


def test_only_what_is_neither_finished_nor_queued_is_submitted(programs, capsys):
    submit(seeds="0..3")
    (programs / "queue").write_text(
        "1_0|RUNNING|None\n1_2|PENDING|Priority\n2_0|PENDING|Priority\n"
    )
    assert [job.job for job in slurm_queue.noted(Path("out"))] == ["1", "2"]
    finished.mark(next(Path("out").glob("0002-*")), load("catch/ddqn").schedule.steps)
    assert [one.state for one in states(Path("out"))] == ["queued", "done", "queued", "queued"]
    capsys.readouterr()
    submit(seeds="0..5")  # two more seeds
    out = capsys.readouterr().out
    assert "1 of 6 runs are finished already" in out and "3 runs are in SLURM's queue" in out
    assert "2 runs submitted: job 3" in out
    assert slurm_queue.noted(Path("out"))[-1].tasks == ((5,), (6,))
    # A limit holds for all jobs together: five tasks run or wait already.
    with (programs / "queue").open("a") as queue:
        queue.write("3_0|PENDING|Priority\n3_1|PENDING|Priority\n4_0|PENDING|Priority\n")
    submit("--jobs", "6", seeds="0..6")
    assert calls(programs)[-1] == "--array=0-0%1 0003 0"
    submit("--jobs", "6", seeds="0..7")
    assert calls(programs)[-1] == "--array=0-0%6 --dependency=afterany:1:2:3:4 0004 0"


def test_jobs_that_left_the_queue_are_submitted_again(programs, capsys):
    submit(seeds="0..1")
    (programs / "squeue").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n"
    )
    submit(seeds="0..1")
    assert [job.job for job in slurm_queue.noted(Path("out"))] == ["2"]
    (programs / "squeue").write_text(
        "#!/bin/sh\necho Unable to contact slurm controller >&2; exit 1\n"
    )
    assert main([*SWEEP.split(), "--seeds", "0..1"]) == 2
    assert "squeue: Unable to contact slurm controller" in capsys.readouterr().err
    assert [one.state for one in states(Path("out"))] == ["waiting"] * 2


def test_a_refusal_in_the_middle_loses_nothing(programs, capsys):
    """As if the user may have three tasks only."""
    (programs / "sbatch").write_text(SBATCH.format(folder=programs) + f"touch {programs}/refuses\n")
    assert main([*SWEEP.split(), "--seeds", "0..7"]) == 2
    error = capsys.readouterr().err
    assert "SLURM refused the job: sbatch: error: AssocMaxSubmitJobLimit" in error
    assert "submitted before that: 1." in error
    (job,) = slurm_queue.noted(Path("out"))
    assert job.tasks == ((1,), (2,), (3,))
    (programs / "refuses").unlink()
    (programs / "queue").write_text("1_0|RUNNING|None\n1_1|RUNNING|None\n1_2|RUNNING|None\n")
    (programs / "sbatch").write_text(SBATCH.format(folder=programs))
    submit()
    assert [number for job in slurm_queue.noted(Path("out")) for (number,) in job.tasks] == [
        *range(1, 9)
    ]


def test_the_guide_shows_the_script_that_its_command_writes(tmp_path):
    page = (ROOT / "docs" / "clusters.md").read_text()
    (shown,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    asked = Asked(
        names=("ensemble-size",),
        words=(),
        sbatch=("--partition=gpu --gres=gpu:1 --cpus-per-task=4 --mem=16G --time=4:00:00",),
        setup=("module load cuda",),
        jobs=8,
    )
    text = slurm.text([(number,) for number in range(1, 10)], tmp_path / "out", asked)
    for word, path in (("OUT", tmp_path / "out"), ("PYTHON", sys.executable), ("VERSION", VERSION)):
        text = text.replace(str(path), word)
    assert text == shown
    command = " ".join(page.partition("## SLURM")[2].split())
    assert all(option in command for option in (*asked.sbatch, *asked.setup, "--jobs 8"))


def test_jobs_inherit_neither_the_job_nor_the_gpus_of_this_process(programs, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    submit()
    found = (programs / "environment").read_text()
    assert "SLURM_CONF=/etc/slurm.conf" in found
    assert "SLURM_RESTART_COUNT" not in found and "CUDA_VISIBLE_DEVICES" not in found


def test_a_dry_run_prints_the_script_and_submits_nothing(programs, capsys):
    submit("--dry-run", "--jobs", "2", "--sbatch", "--time=60 --mem=1G", "--sbatch=--nice=3")
    out = capsys.readouterr().out
    assert (
        "#SBATCH --time=60 --mem=1G\n#SBATCH --nice=3\n" in out
        and "#SBATCH --signal=B:USR2@120\n" in out
    )
    assert out.count("sbatch --parsable --array=") == 3
    assert not (programs / "calls").exists() and not Path("out").exists()


def test_cancelling_needs_the_folder_only_and_the_next_command_goes_on(programs, capsys):
    submit()
    (programs / "queue").write_text("1_0|RUNNING|None\n2_1|PENDING|Priority\n")
    capsys.readouterr()
    assert main(["sweep", "--cancel", "out"]) == 0
    assert (programs / "cancelled").read_text() == "1 2\n"
    assert "jobs 1, 2 with 2 tasks, of which 1 were running" in capsys.readouterr().out
    assert Path("out/stop").is_file()
    (programs / "queue").write_text("")
    submit()
    assert not Path("out/stop").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SWEEP} --device cuda:1", "expected cpu or cuda with --launcher slurm"),
        (f"{SWEEP} --sbatch --array=0-9", "--array is set by cerl itself"),
        (f"{SWEEP} --sbatch -a0-9", "-a0-9 is set by cerl itself"),
        (f"{SWEEP} --jobs 2 --per-job 3", "--per-job: expected at most the 2 of --jobs"),
        (f"{SWEEP} --sbatch gpu", "expected options of sbatch"),
        (f"{SWEEP} --sbatch", "--sbatch: expected a value, got nothing"),
        (f"{SWEEP} --mps", "--mps: expected --launcher here with it, got --launcher slurm"),
        (f"{SWEEP} --per-gpu 2", "--per-gpu: expected --launcher here or ray with it"),
        (f"{SWEEP} --address auto", "--address: expected --launcher ray"),
        ("sweep catch/ddqn --per-job 2", "--per-job: expected --launcher slurm with it"),
        ("sweep catch/ddqn --launcher slrum", "did you mean slurm?"),
        ("sweep --cancel", "expected one folder of a sweep, got nothing"),
        ("sweep --cancel out --jobs 3", "expected only the folder of a sweep, got options"),
        ("sweep --cancel nowhere", "expected the folder of a sweep, got nowhere"),
    ],
)
def test_mistakes_are_refused_before_anything_is_submitted(programs, capsys, line, message):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err
    assert not (programs / "calls").exists() and not Path("out").exists()


def test_without_slurm_the_error_says_what_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*SWEEP.split(), "--seeds", "0"]) == 2
    assert "sbatch: no such program" in (error := capsys.readouterr().err)
    assert "apt install slurm-client" in error
    assert [one.state for one in states(Path("out"))] == ["waiting"]


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ((), "", "cpu"),
        (("--partition=gpu --gres=gpu:1",), "", "cuda"),
        (("--time=60", "--gpus 2"), "", "cuda"),
        (("-G 1",), "", "cuda"),
        (("--mem=1G -G1",), "", "cuda"),
        (("--tres-per-task=gres:gpu:1",), "", "cuda"),
        (("--job-name=a-G",), "", "cpu"),
        (("--gpus-per-node=1",), "cpu", "cpu"),
        (("--partition=gpu",), "cuda", "cuda"),
        (("--partition=gpu",), "auto", "cpu"),
    ],
)
def test_the_device_follows_from_what_sbatch_is_asked_for(options, device, expected):
    assert slurm.kind(Asked(("catch/ddqn",), (), sbatch=options, device=device)) == expected


def test_a_damaged_file_of_jobs_is_told(programs, capsys):
    submit(seeds="0")
    Path("out/slurm/jobs.json").write_text("{")
    assert [one.state for one in states(Path("out"))] == ["waiting"]
    assert main([*SWEEP.split(), "--seeds", "0"]) == 2
    assert "jobs.json: cannot be read" in capsys.readouterr().err


def test_states_of_many_runs_need_one_call_of_squeue(programs):
    submit(seeds="0..19")
    Path(programs / "asked").unlink(missing_ok=True)
    (programs / "queue").write_text("1_0|PENDING|Priority\n7_1|PENDING|Resources\n")
    found = states(Path("out"))
    assert len((programs / "asked").read_text().splitlines()) == 1
    assert [one.state for one in found] == ["queued", *["waiting"] * 18, "queued"]
    assert found[-1].error == "pending in SLURM, job 7_1 (Resources)"
