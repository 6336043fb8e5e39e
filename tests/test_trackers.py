"""The boards of a run: curves in wandb and trackio, live and offline, and after a resume.

Tests of the real packages are skipped where these are not installed; no test needs a network.
"""

import json
import sqlite3
import sys
import types
from typing import Any

import pytest

from cerl import config, training
from cerl.config import ConfigError
from cerl.record import boards, trackers
from cerl.record.tags import with_usual

OPTIONS = {
    "seeds": [3, 8],
    "ensemble.members": 2,
    "schedule.steps": 400,
    "log.every": 200,
    "eval.every": 200,
    "eval.episodes": 2,
    "replay.capacity": 500,
    "replay.start": 100,
}


def options(folder, *track, **more):
    return config.load(
        "catch/bootdqn", {**OPTIONS, "out": str(folder), "log.track": list(track), **more}
    )


class FakeRun:
    def __init__(self, told, *, breaks_at=None):
        self.told, self.breaks_at, self.logged, self.finished = told, breaks_at, [], False
        self.offline, self.url = told.get("mode") == "offline", "a-page"

    def log(self, scalars, step):
        if step == self.breaks_at:
            raise ConnectionError("the network is gone")
        self.logged.append((step, scalars))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module that stands in for wandb. `runs` are its runs; `breaks_at`, a step at which they
    fail; `refuses`, whether a run cannot start online; `key`, whether somebody is logged in."""
    fake: Any = types.ModuleType("wandb")
    fake.runs, fake.breaks_at, fake.refuses, fake.key = [], None, False, True

    def init(**told):
        if fake.refuses and told["mode"] == "online":
            raise TimeoutError("no answer within 30 seconds")
        fake.runs.append(FakeRun(told, breaks_at=fake.breaks_at))
        return fake.runs[-1]

    fake.init, fake.login = init, lambda prompt: fake.key
    fake.Settings = dict
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_every_seed_is_a_run_that_gets_all_numbers(tmp_path, wandb, capsys):
    folder = training.train(options(tmp_path, "wandb"))
    assert [run.told["config"]["seed"] for run in wandb.runs] == [3, 8]
    assert {run.told["group"] for run in wandb.runs} == {folder.name}
    assert all(run.finished for run in wandb.runs)
    assert not (folder / "tensorboard").exists()
    for run in wandb.runs:
        assert {step for step, _ in run.logged} == {200, 400}
        tags = {tag for _, scalars in run.logged for tag in scalars}
        ours = {"charts/SPS", "charts/episodic_return", "losses/td_loss", "Eval/individual/return"}
        assert ours | {"global_step", "eval/episodic_return"} <= tags
        assert not any(tag.startswith("Members/") for tag in tags)
    assert "curves: wandb (a-page)" in capsys.readouterr().out


def test_every_member_is_tracked_on_request(tmp_path, wandb):
    training.train(options(tmp_path, "wandb", **{"log.members": "each"}))
    tags = {tag for _, scalars in wandb.runs[0].logged for tag in scalars}
    assert {"Members/td_loss_0", "Members/td_loss_1", "Eval/individual/return_1"} <= tags


def test_a_resumed_run_continues_the_same_curves_and_a_new_one_does_not(tmp_path, wandb):
    folder = training.train(options(tmp_path, "wandb"))
    training.resume(folder, changes={"schedule.steps": 800})
    other = training.train(options(tmp_path, "wandb"))
    ids = [run.told["id"] for run in wandb.runs]
    assert ids[:2] == ids[2:4] and len(set(ids)) == 4
    assert {run.told["resume"] for run in wandb.runs} == {"allow"}
    assert {step for step, _ in wandb.runs[2].logged} == {600, 800}
    assert json.loads((other / trackers.FILE).read_text()) == {"wandb": {"3": ids[4], "8": ids[5]}}


def test_a_run_that_starts_anew_begins_new_curves(tmp_path, wandb):
    folder = training.train(options(tmp_path, "wandb"))
    for path in [*folder.glob("checkpoint-*"), folder / "finished"]:
        path.unlink()
    training.resume(folder)
    ids = [run.told["id"] for run in wandb.runs]
    assert len(set(ids)) == 4


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, wandb, capsys):
    wandb.breaks_at = 400
    folder = training.train(options(tmp_path, "wandb", "tensorboard"))
    said = capsys.readouterr().out
    assert said.count("wandb: no more numbers are sent (the network is gone)") == 1
    assert (folder / "finished").exists()
    assert len(list((folder / "tensorboard").glob("seed_*/events*"))) == 2
    assert {step for step, _ in wandb.runs[0].logged} == {200}


@pytest.mark.parametrize("cause", ["no key", "no network"])
def test_without_a_login_or_network_runs_are_kept_offline(tmp_path, wandb, capsys, cause):
    wandb.key, wandb.refuses = cause != "no key", cause == "no network"
    folder = training.train(options(tmp_path, "wandb"))
    said = capsys.readouterr().out
    reason = {"no key": "not logged in", "no network": "no answer within 30 seconds"}[cause]
    assert said.count(f"wandb: the numbers stay in {folder / 'wandb'} ({reason}") == 1
    assert [run.told["mode"] for run in wandb.runs] == ["offline", "offline"]
    assert "wandb sync --append" in said


def test_the_training_is_the_same_with_and_without_trackers(tmp_path, wandb):
    import pyarrow.parquet as pq

    tables = []
    for name in ("wandb", "tensorboard"):
        folder = training.train(options(tmp_path, name))
        tables.append(pq.read_table(folder / "rows.parquet").drop_columns(["wall_seconds"]))
    assert tables[0].equals(tables[1])


def test_a_missing_package_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"pip install 'cerl\[trackio\]'.*--log.track tensorboard"
    ):
        training.train(options(tmp_path, "tensorboard", "trackio"))
    assert list(tmp_path.iterdir()) == []
    boards.check(options(tmp_path, "tensorboard"))


def test_unknown_and_repeated_trackers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="log.track.*wandb"):
        options(tmp_path, "wndb")
    with pytest.raises(ConfigError, match="expected different names, got wandb wandb"):
        options(tmp_path, "wandb", "wandb")


@pytest.mark.parametrize("text", ["no json", "[1]", '{"wandb": [2]}', '{"wandb": {"3": "../x"}}'])
def test_a_foreign_file_of_identifiers_begins_new_curves(tmp_path, text):
    (tmp_path / trackers.FILE).write_text(text)
    assert trackers.identifiers(tmp_path).get("wandb", {}) == {}


def test_usual_tags_stand_beside_ours():
    sac = {"losses/td_loss": 1.0, "losses/q_values": 2.0, "losses/actor_loss": 3.0}
    added = {"losses/qf_loss": 1.0, "losses/qf_values": 2.0, "global_step": 7.0}
    assert with_usual(sac, step=7) == sac | added
    tandem = {"Eval/active/return": 4.0, "Eval/passive/return": 5.0}
    assert with_usual(tandem, step=7)["eval/episodic_return"] == 4.0


@pytest.mark.slow
def test_wandb_itself_keeps_runs_offline_and_continues_them(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = training.train(options(tmp_path, "wandb"))
    training.resume(folder, changes={"schedule.steps": 800})
    ids = trackers.identifiers(folder)["wandb"].values()
    for own in ids:
        files = list((folder / "wandb").glob(f"offline-run-*-{own}/run-{own}.wandb"))
        assert len(files) == 2
        contents = b"".join(path.read_bytes() for path in files)
        for word in (b"charts/episodic_return", b"eval/episodic_return", folder.name.encode()):
            assert word in contents


@pytest.mark.slow
def test_trackio_itself_continues_its_curves(tmp_path):
    """In processes of its own, since trackio finds its database when it is imported."""
    pytest.importorskip("trackio")
    import os
    import subprocess

    out = tmp_path / "runs"
    more = [f"--{name}={value}" for name, value in OPTIONS.items() if name != "seeds"]
    line = [sys.executable, "-m", "cerl", "train"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}

    def run(*words):
        done = subprocess.run(
            [*line, *words], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Trackio" not in done.stdout  # what trackio itself prints
        return done.stdout

    run("catch/bootdqn", "--seeds", "3", "8", *more, f"--out={out}", "--log.track", "trackio")
    (folder,) = out.iterdir()
    assert "trackio show --project cerl" in run("--resume", str(folder), "--schedule.steps", "800")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step, metrics from metrics").fetchall()
    for seed, own in trackers.identifiers(folder)["trackio"].items():
        name = f"{folder.name} seed {seed} {own}"
        points = [(step, json.loads(text)) for known, step, text in found if known == name]
        assert {step for step, _ in points} == {200, 400, 600, 800}
        scores = [step for step, scalars in points if "eval/episodic_return" in scalars]
        assert sorted(scores) == [200, 400, 600, 800]
