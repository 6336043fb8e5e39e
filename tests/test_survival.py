"""Whatever stops a run: its state is saved, and the run can be continued."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from planned import planned

from cerl import stop, training
from cerl.__main__ import main
from cerl.config import Config, load, preset
from cerl.envs.gym import Gym
from cerl.envs.resident import Resident
from cerl.evaluate import Evaluator
from cerl.evaluate_run import evaluate_run
from cerl.record import checkpoint, failure, finished, saver
from cerl.record.lock import held, under_way
from cerl.record.log import Logger
from cerl.run import Run
from cerl.sweep.local import sweep

TINY = {
    "seeds": (3, 1),
    "device": "cpu",
    "env": {"envs": 1},
    "net": {"hidden": (16,)},
    "replay": {"capacity": 400, "batch": 8, "start": 40},
    "schedule": {"steps": 160, "update_every": 4, "target_every": 20},
    "explore": {"hold": 20, "decay": 100},
    "eval": {"every": 80, "episodes": 2},
    "log": {"every": 40, "checkpoint_every": 10_000, "checkpoint_minutes": 0.0},
}


def tiny(out: Path, name: str = "catch/ddqn", **changes) -> Config:
    return load(name, preset.merged(TINY, {"out": str(out), **changes}))


def rows(folder: Path) -> dict:
    """Rows without the clock, and without the hash that says which config they belong to."""
    table = pq.read_table(folder / "rows.parquet")
    return table.drop_columns(["wall_seconds", "config_hash"]).to_pydict()


@contextlib.contextmanager
def at_step(step: int, action):
    """Calls an action once, when training has come to an agent step."""
    progress = Logger.progress

    def spy(self, now: int, updates: int) -> None:
        progress(self, now, updates)
        if now == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logger, "progress", spy)
        yield


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


OTHERS = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, capsys, name):
    number = getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    whole = training.train(tiny(tmp_path / "whole"))
    with at_step(60, lambda: tell(number)), pytest.raises(stop.Stopped):
        training.train(tiny(tmp_path / "halves"))
    (half,) = (tmp_path / "halves").iterdir()
    assert f"cerl train --resume {half}" in capsys.readouterr().out
    assert checkpoint.load(half).state["iteration"] >= 60
    training.resume(half)
    assert rows(whole) == rows(half)


def test_signals_count_once_however_often_they_come_and_a_later_ctrl_c_interrupts(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    with stop.stop_flag() as stopped:
        assert not stopped()
        tell(signal.SIGTERM)
        clock[0] = 0.9
        tell(signal.SIGINT)
        assert stopped()
        clock[0] = 100.0
        # SLURM repeats SIGTERM when a job's time is over: the run may still be saving.
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            tell(number)
        assert stopped.signals == [
            *(signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
        ]
        with pytest.raises(KeyboardInterrupt) as caught:
            tell(signal.SIGINT)
            time.sleep(1)
        assert caught.type is KeyboardInterrupt


def test_a_signal_right_after_the_run_has_saved_changes_nothing(monkeypatch):
    """A scheduler signals a job and its children: the second one may come when all is done."""
    heard, clock = [], [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGTERM, lambda *ignored: heard.append(clock[0]))
    try:
        with stop.stop_flag() as stopped:
            tell(signal.SIGTERM)
            assert stopped()
        clock[0] = 0.9 * stop.LATER
        tell(signal.SIGTERM)
        assert not heard
        clock[0] = 1.1 * stop.LATER
        tell(signal.SIGTERM)
        assert heard == [clock[0]]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_was_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.stop_flag() as stopped:
            tell(signal.SIGHUP)
            assert not stopped()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stopped_and_saved_has_an_exit_code_of_its_own(tmp_path):
    arguments = ["train", "catch/ddqn", "--out", str(tmp_path), "--device", "cpu"]
    with at_step(60, lambda: tell(signal.SIGTERM)):
        assert main(arguments) == stop.SAVED == 75


@pytest.mark.slow
def test_a_signal_is_heard_inside_an_evaluation_which_is_made_on_resuming(tmp_path, monkeypatch):
    """Also in the evaluation that ends the run."""
    whole = training.train(tiny(tmp_path / "whole"))
    for evaluation in (1, 2):
        run, calls = Evaluator.run, []

        def stopping(self, number, *, stopped, run=run, calls=calls, evaluation=evaluation):
            calls.append(number)
            if len(calls) == evaluation:
                tell(signal.SIGTERM)
            return run(self, number, stopped=stopped)

        out = tmp_path / str(evaluation)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(stop.Stopped):
            patch.setattr(Evaluator, "run", stopping)
            training.train(tiny(out))
        (half,) = out.iterdir()
        assert checkpoint.load(half).state["iteration"] == 80 * evaluation
        training.resume(half)
        assert rows(whole) == rows(half)


def test_an_evaluation_that_never_ends_can_be_stopped(tmp_path, monkeypatch):
    step = Resident.step
    endless = [False]

    def never_over(self, action):
        result = step(self, action)
        if endless[0]:
            tell(signal.SIGTERM)
            return result._replace(terminated=result.terminated & False)
        return result

    run = Evaluator.run

    def spy(self, number, *, stopped):
        endless[0] = True
        return run(self, number, stopped=stopped)

    monkeypatch.setattr(stop, "TOGETHER", 1e9)
    monkeypatch.setattr(Resident, "step", never_over)
    monkeypatch.setattr(Evaluator, "run", spy)
    with pytest.raises(stop.Stopped):
        training.train(tiny(tmp_path))


@pytest.mark.slow
def test_scores_are_recorded_once_however_often_an_evaluation_is_made(tmp_path, monkeypatch):
    """Stopped in an evaluation, made on resuming, and killed before the next checkpoint."""
    whole = training.train(tiny(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(stop.Stopped):
        patch.setattr(Evaluator, "run", lambda self, number, *, stopped: tell(signal.SIGTERM))
        training.train(tiny(tmp_path / "halves"))
    (half,) = (tmp_path / "halves").iterdir()
    count = Run.count

    def killed(self):
        if self.iteration == 90:
            self.logger.flush()
            raise KeyboardInterrupt
        count(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "count", killed)
        training.resume(half)
    training.resume(half)
    assert rows(whole) == rows(half)


@pytest.mark.slow
def test_a_checkpoint_never_leads_the_rows(tmp_path, monkeypatch, capsys):
    """Rows that could not be written are made again from the checkpoint before them."""
    from cerl.record import results as tables

    whole = training.train(tiny(tmp_path / "whole"))
    flush, full = tables.Rows.flush, [False]

    def limited(self):
        if full[0]:
            raise OSError(28, "No space left on device")
        flush(self)

    def fill():
        full[0] = True

    def stopped_when_full():
        fill()
        tell(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.Rows, "flush", limited)
        with at_step(90, stopped_when_full), pytest.raises(checkpoint.CheckpointError):
            training.train(tiny(tmp_path / "halves"))
    (half,) = (tmp_path / "halves").iterdir()
    training.resume(half)
    assert rows(whole) == rows(half)


@pytest.mark.slow
def test_a_run_can_be_resumed_before_its_first_step(tmp_path, monkeypatch):
    """A first checkpoint comes before training; without it a resumed run starts from its config."""
    whole = training.train(tiny(tmp_path / "whole"))

    def killed(self, *ignored):
        raise KeyboardInterrupt

    for owner, name in ((training, "loop"), (Run, "save")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, killed)
            training.train(tiny(tmp_path / name))
        (folder,) = (tmp_path / name).iterdir()
        assert len(checkpoint.files(folder)) == (name == "loop")
        training.resume(folder)
        assert rows(whole) == rows(folder)


def test_a_simulator_that_raises_ends_the_run_saved(tmp_path, monkeypatch, capsys):
    step, calls = Gym.step, []

    def failing(self, action):
        calls.append(self)
        if calls.count(calls[0]) == 90:  # the first one belongs to training
            raise ZeroDivisionError("the simulator is gone")
        return step(self, action)

    config = tiny(tmp_path, "gym/cartpole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Gym, "step", failing)
        training.train(config)
    (folder,) = tmp_path.iterdir()
    state = checkpoint.load(folder).state
    assert state["iteration"] == 90 and int(state["learner"]["updates"]) == (90 - 40) // 4
    assert f"saved; go on with: cerl train --resume {folder}" in capsys.readouterr().out
    training.resume(folder)
    assert "episodes under way were cut" in capsys.readouterr().out
    assert int(checkpoint.load(folder).state["learner"]["updates"]) == (160 - 40) // 4


def test_an_update_that_raises_saves_nothing_torn(tmp_path, monkeypatch, capsys):
    def failing():
        raise RuntimeError("a kernel failed")

    runs, init = [], Run.__init__

    def spy(self, *arguments):
        init(self, *arguments)
        runs.append(self)

    monkeypatch.setattr(Run, "__init__", spy)
    with (
        at_step(60, lambda: setattr(runs[0], "update", failing)),
        pytest.raises(RuntimeError, match="a kernel failed"),
    ):
        training.train(tiny(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert "in the middle of a step or an update" in capsys.readouterr().out
    assert checkpoint.load(folder).state["iteration"] == 0


@pytest.mark.slow
def test_checkpoints_are_saved_by_the_clock(tmp_path):
    log = {"every": 40, "checkpoint_every": 10_000, "checkpoint_minutes": 1e-9}
    folder = training.train(tiny(tmp_path, log=log))
    newest = checkpoint.files(folder)[-1].name
    assert int(newest.removeprefix("checkpoint-").removesuffix(".pt")) > 100


def test_a_checkpoint_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch, capsys):
    save, tries = checkpoint.Checkpoints.save, []

    def full(self, state, **how):
        tries.append(state["iteration"])
        if len(tries) < 4:
            raise checkpoint.CheckpointError("the disk is full")
        return save(self, state, **how)

    monkeypatch.setattr(saver, "RETRY", 0.0)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", full)
    log = {"every": 40, "checkpoint_every": 20, "checkpoint_minutes": 0.0}
    folder = training.train(tiny(tmp_path, log=log))
    assert tries[:4] == [0, 1, 2, 3]  # with RETRY 0 at every iteration
    assert capsys.readouterr().out.count("the disk is full; the run goes on and tries again") == 1
    assert checkpoint.load(folder).state["iteration"] == 160


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    command = [sys.executable, "-m", "cerl", "train", "catch/ddqn", "--out", str(tmp_path)]
    options = ["--device", "cpu", "--schedule.steps", "2000", "--log.every", "40"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.wait(120)
    (folder,) = tmp_path.iterdir()
    assert (folder / finished.FILE).is_file()


@pytest.mark.slow
def test_a_finished_run_is_trained_longer_and_stays_one_run(tmp_path, capsys):
    whole = training.train(tiny(tmp_path / "whole"))
    folder = training.train(tiny(tmp_path / "longer", schedule={**TINY["schedule"], "steps": 80}))
    with pytest.raises(ValueError, match="is finished.*--schedule.steps"):
        training.resume(folder)
    (folder / finished.FILE).unlink()
    with pytest.raises(ValueError, match="schedule.steps.*80.*got 60"):
        training.resume(folder, changes={"schedule.steps": 60})
    assert main(["train", "--resume", str(folder), "--schedule.steps", "160"]) == 0
    assert rows(whole) == rows(folder)
    table = pq.read_table(folder / "rows.parquet")
    assert len(set(table["config_hash"].to_pylist())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_trains_a_finished_run_longer_if_the_plan_says_so(tmp_path, jobs):
    whole = training.train(tiny(tmp_path / "whole"))
    (run,) = planned([tiny(tmp_path, schedule={**TINY["schedule"], "steps": 80})], tmp_path)
    (folder,) = sweep([run], tmp_path)
    before = (folder / finished.FILE).stat()
    assert sweep([run], tmp_path, jobs=jobs) == [folder]
    assert (folder / finished.FILE).stat() == before
    assert sweep([run._replace(steps=160)], tmp_path, jobs=jobs) == [folder]
    assert rows(whole) == rows(folder)


@pytest.mark.slow
def test_a_sweep_waits_for_runs_of_one_that_was_killed_and_adds_to_their_logs(tmp_path):
    """The parent is killed, its runs train on; the same command waits for them."""
    schedule = {**TINY["schedule"], "steps": 3_000}
    log = {**TINY["log"], "every": 1000}
    (run,) = planned([tiny(tmp_path, schedule=schedule, log=log)], tmp_path)
    folder = tmp_path / run.folder
    program = "import sys; from pathlib import Path; from cerl.sweep.local import sweep\n"
    program += "from cerl.sweep.plan import PlannedRun\n"
    program += f"sweep([{run}], Path(sys.argv[1]), jobs=2)"
    command = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not under_way(folder):
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert sweep([run], tmp_path, jobs=2) == [folder]
    assert (folder / finished.FILE).is_file()
    assert log.read_text().count("agent steps each; folder") == 1 and "\0" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_whose_owner_ends_early_is_taken_over(tmp_path, jobs):
    (run,) = planned([tiny(tmp_path)], tmp_path)
    folder = tmp_path / run.folder
    with at_step(60, lambda: tell(signal.SIGTERM)), pytest.raises(stop.Stopped):
        training.resume(folder)
    program = "import sys, time; from pathlib import Path; from cerl.record.lock import held\n"
    program += "with held(Path(sys.argv[1])): print(flush=True); time.sleep(1)"
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert under_way(folder)
        assert sweep([run], tmp_path, jobs=jobs) == [folder]
    assert (folder / finished.FILE).is_file()


def test_another_process_is_not_joined(tmp_path):
    with at_step(60, lambda: tell(signal.SIGTERM)), pytest.raises(stop.Stopped):
        training.train(tiny(tmp_path))
    (folder,) = tmp_path.iterdir()
    with held(folder), pytest.raises(ValueError, match="another process is training this run"):
        training.resume(folder)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_one_bad_task_keeps_no_other_from_its_turn(tmp_path, jobs, monkeypatch, capsys):
    """Whatever its constructor raises, and whatever brackets its message holds."""
    (tmp_path / "bad_tasks.py").write_text(
        "import gymnasium\n"
        "def make(**kwargs):\n"
        "    raise KeyError('no licence at [/opt/sim/licence]')\n"
        "gymnasium.register('Bad-v0', entry_point=make)\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    bad = tiny(out, "gym/cartpole", env={"name": "bad_tasks:Bad-v0"})
    runs = planned([bad, tiny(out)], out)
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 runs failed.*\[/opt/sim/licence\]"):
        sweep(runs, out, jobs=jobs)
    assert (out / runs[1].folder / finished.FILE).is_file()
    found = failure.read(out / runs[0].folder)
    assert found is not None and "[/opt/sim/licence]" in found.message and found.tries == 1


@pytest.mark.slow
def test_nothing_is_written_through_links_in_a_run_folder(tmp_path):
    """A stranger's folder may hold links to files and folders of whoever resumes the run."""
    with at_step(60, lambda: tell(signal.SIGTERM)), pytest.raises(stop.Stopped):
        training.train(tiny(tmp_path / "out"))
    (folder,) = (tmp_path / "out").iterdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    for name in ("checkpoint.tmp", "finished", "versions.yaml", ".rows.parquet.tmp"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / "mine")
    for name in ("tensorboard", "replay"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(outside, target_is_directory=True)
    with pytest.raises(RuntimeError, match="link"):
        training.resume(folder)  # rows of replay are not read through links either
    (folder / "replay").unlink()
    (tmp_path / "replay").rename(folder / "replay")
    training.resume(folder)
    assert [path.name for path in outside.iterdir()] == ["mine"]
    assert (outside / "mine").read_text() == "mine"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return training.train(tiny(tmp_path_factory.mktemp("trained")))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop("learner"), "learner"),
        (lambda state: state["learner"].update(net=[1]), "learner.net"),
        (lambda state: state["learner"]["net"].update({7: 1}), "learner.net"),
        (lambda state: state.update(learner=3), "learner"),
        (lambda state: state.update(config="0" * 64), "config.yaml"),
    ],
)
def test_an_evaluation_takes_no_checkpoint_of_something_else(trained, tmp_path, spoil, says):
    folder = shutil.copytree(trained, tmp_path / "run")
    state = dict(checkpoint.load(folder).state)
    state["learner"] = {**state["learner"], "net": dict(state["learner"]["net"])}
    spoil(state)
    checkpoint.save(folder, state)
    with pytest.raises((checkpoint.CheckpointError, ValueError), match=says):
        evaluate_run(folder, episodes=1)


def test_what_says_that_a_run_is_finished_is_checked(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    config, file = tiny(tmp_path), folder / finished.FILE
    steps = config.schedule.steps
    assert finished.finished(folder, steps=steps)
    assert finished.finished(folder, steps=steps - 1)
    assert not finished.finished(folder, steps=steps + 1)
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert not finished.finished(folder, steps=steps), bit
    file.unlink()
    (tmp_path / "outside").write_bytes(whole)
    file.symlink_to(tmp_path / "outside")
    assert not finished.finished(folder, steps=steps)


def test_a_pipe_in_place_of_a_checkpoint_does_not_hang_a_run(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    os.mkfifo(folder / "checkpoint-000000.pt")
    schedule = {"schedule.steps": 200}
    training.resume(folder, changes=schedule)
    assert checkpoint.load(folder).state["iteration"] == 200


def test_rows_of_a_run_without_its_checkpoints_are_kept_aside(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    for file in checkpoint.files(folder):
        file.unlink()
    before = (folder / "rows.parquet").read_bytes()
    training.resume(folder, changes={"schedule.steps": 200})
    (aside,) = folder.glob("dropped-*-rows.parquet")
    assert aside.read_bytes() == before
    assert f"renamed to {aside.name}" in capsys.readouterr().out


def test_an_output_that_is_full_is_worth_no_run(tmp_path):
    if not Path("/dev/full").exists():
        return
    options = ["--device", "cpu", "--schedule.steps", "1000", "--out", str(tmp_path)]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cerl", "train", "catch/ddqn", *options]
        assert subprocess.run(command, stdout=full).returncode == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / finished.FILE).is_file()
