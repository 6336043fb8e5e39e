"""The whole path: train, interrupt, resume, evaluate, sweep; every preset runs updates."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from options import encoder, suited
from planned import planned

from cerl import envs, explore, training, wiring
from cerl.config import Config, GymEnv, load, preset
from cerl.evaluate_run import evaluate_run
from cerl.learn import Learner
from cerl.record import checkpoint, failure, finished, pieces
from cerl.record.checkpoint import Checkpoints
from cerl.record.folder import load_file
from cerl.record.lock import under_way
from cerl.schedule import Schedule
from cerl.stop import SAVED, Stopped
from cerl.sweep.local import check_tasks, sweep

TINY = {
    "seeds": (3, 1),
    "device": "cpu",
    "net": {"hidden": (16, 16)},
    "replay": {"capacity": 400, "batch": 8, "start": 40},
    "schedule": {"steps": 240, "update_every": 4, "target_every": 20},
    "explore": {"hold": 20, "decay": 100},
    "eval": {"every": 80, "episodes": 2, "time_limit": 30},
    "log": {"every": 40, "checkpoint_every": 120},
}


def sequence(kind: str) -> dict:
    """A small sequence network that is refreshed now and then."""
    sizes = {"width": 16, "heads": 2, "context": 2, "learnt": 5, "cache": 7, "cache_refresh": 9}
    return {"net": {"hidden": (16,)}, "encoder": encoder(kind, **sizes)}


POLICY_LATE = {"agent": {"target_critics": 1, "policy_every": 2}, "schedule": {"updates": 3}}


def tiny(out: Path, name: str = "catch/cerl", **changes) -> Config:
    return load(name, suited(name, preset.merged(TINY, {"out": str(out), **changes})))


OBSERVE = {"noise": 0.1, "dropout": 0.2, "flicker": 0.2}
MEMORY = {"family": "memory", "name": "tmaze_active", "length": 5, "observe": OBSERVE}
POPGYM = {"family": "popgym", "name": "MineSweeperEasy"}


def final_state(folder: Path) -> dict:
    loaded = checkpoint.load(folder)
    rows = None if loaded.replay is None else pieces.whole(folder, loaded.replay)
    return loaded.state | {"replay": rows}


def assert_same(a, b, path=""):
    if isinstance(a, torch.Tensor):
        assert (
            torch.equal(a.nan_to_num(), b.nan_to_num())
            if a.is_floating_point()
            else torch.equal(a, b)
        ), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("wall_seconds",):
                assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{k}]")
    else:
        assert a == b, path


def columns_without_time(folder: Path) -> dict:
    table = pq.read_table(folder / "rows.parquet")
    return table.drop_columns(["wall_seconds"]).to_pydict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("catch/cerl", {}),
        ("minatar/bootdqn", {"env": {"name": "asterix", "envs": 2}, "net": {"hidden": (16,)}}),
        ("gym/cartpole", {"env": {"envs": 2}}),
        ("gym/pendulum", {"env": {"envs": 2}}),
        ("gym/pendulum", {"env": {"envs": 2, "observe": OBSERVE | {"keep": "position"}}}),
        ("catch/cerl", {"env": MEMORY}),
        ("catch/cerl", {"env": POPGYM | {"observe": {"dropout": 0.2, "flicker": 0.2}}}),
        ("point_mass/cerl", {"env": {"envs": 2}}),
        ("point_mass/cerl", POLICY_LATE),
        ("catch/cerl", {"replay": {"sampler": {"name": "prioritised"}}}),
        *[("catch/cerl", sequence(kind)) for kind in ("mlp", "gru", "transformer", "fox")],
        ("catch/cerl", {**sequence("fox"), "ensemble": {"switch": "step", "members": 2}}),
        (
            "catch/cerl",
            preset.merged(
                sequence("gru"),
                {
                    "encoder": {"stored_state": True},
                    "ensemble": {"heads": "own", "members": 2},
                    "loss": {"batches": "own"},
                    "replay": {"candidates": 64},
                },
            ),
        ),
        ("point_mass/cerl", {**sequence("gru"), "schedule": {"steps": 160}}),
    ],
)
def test_resumed_run_equals_the_one_never_stopped(tmp_path, monkeypatch, name, changes):
    short = {"schedule": {"steps": 160}, "ensemble": {"members": 3}}
    changes = preset.merged(short, changes)
    whole = training.train(tiny(tmp_path / "whole", name, **changes))
    stop_at_first_checkpoint(monkeypatch)
    with pytest.raises(Stopped):
        training.train(tiny(tmp_path / "halves", name, **changes))
    monkeypatch.undo()
    (half,) = (tmp_path / "halves").iterdir()
    assert not (half / finished.FILE).exists()
    training.resume(half)
    assert_same(final_state(whole), final_state(half))
    assert columns_without_time(whole) == columns_without_time(half)
    with pytest.raises(ValueError, match="finished"):
        training.resume(half)


def stop_at_first_checkpoint(monkeypatch):
    """As a user does: Ctrl-C, here right after the first checkpoint was written."""
    save = Checkpoints.save

    def save_and_interrupt(self, state, **how):
        path = save(self, state, **how)
        if state["iteration"]:
            os.kill(os.getpid(), signal.SIGINT)
        return path

    monkeypatch.setattr(Checkpoints, "save", save_and_interrupt)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["uniform", "prioritised"])
def test_resume_without_replay_refills_before_it_learns(tmp_path, monkeypatch, capsys, sampler):
    log = {"every": 40, "checkpoint_every": 120, "save_replay": False}
    config = tiny(tmp_path, log=log, replay={"sampler": {"name": sampler}})
    stop_at_first_checkpoint(monkeypatch)
    with pytest.raises(Stopped):
        training.train(config)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    before = final_state(folder)
    assert before["replay"] is None
    capsys.readouterr()
    training.resume(folder)
    said = capsys.readouterr().out
    assert "40 agent steps refill it" in said
    assert "episodes under way were cut" not in said  # Catch goes on exactly
    after = final_state(folder)
    made = int(after["learner"]["updates"]) - int(before["learner"]["updates"])
    assert made == (240 - 120 - 40) // 4


def rows_of_updates(monkeypatch) -> list[int]:
    """A list that gets the rows per environment that each update from now on samples from."""
    update, seen = Learner.update, []

    def counted(self):
        if not self.replay.total.is_meta:  # the memory that a run needs is not counted with rows
            seen.append(int(self.replay.total))
        update(self)

    monkeypatch.setattr(Learner, "update", counted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["catch/cerl", "gym/cartpole"])
def test_updates_wait_for_the_rows_of_the_start_and_of_a_refill(tmp_path, monkeypatch, name):
    log = {"every": 40, "checkpoint_every": 120, "save_replay": False}
    changes = {"env": {"envs": 2}, "replay": {"start": 4}, "log": log}  # the fewest: n + 1 rows
    seen = rows_of_updates(monkeypatch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at_first_checkpoint(patch)
        training.train(tiny(tmp_path, name, **changes))
    assert len(seen) == (120 - 4) // 4 and min(seen) >= 4 // 2
    seen.clear()
    (folder,) = tmp_path.iterdir()
    training.resume(folder)
    assert len(seen) == (120 - 4) // 4 and min(seen) >= 4 // 2


@pytest.mark.parametrize("saved", [True, False])
def test_simulator_that_cannot_be_restored_cuts_its_episodes(tmp_path, monkeypatch, capsys, saved):
    monkeypatch.setattr("cerl.envs.gym.Gym.load_state_dict", lambda self, state: self.reset())
    log = {"every": 40, "checkpoint_every": 120, "save_replay": saved}
    config = tiny(tmp_path, "gym/cartpole", env={"envs": 2}, log=log)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at_first_checkpoint(patch)
        training.train(config)
    (folder,) = tmp_path.iterdir()
    before = final_state(folder)
    training.resume(folder)
    assert "episodes under way were cut" in capsys.readouterr().out
    after = final_state(folder)
    made = int(after["learner"]["updates"]) - int(before["learner"]["updates"])
    assert made == (240 - 120) // 4 if saved else made == (240 - 120 - 40) // 4
    if saved:
        at = int(before["replay"]["total"])
        assert not after["replay"]["real"][:, at].any()
        assert after["replay"]["real"][:, at + 1].all()
        # What the episodes ended with is their true last observation.
        assert torch.equal(after["replay"]["obs"][:, at], before["collector"]["last"][0])


@pytest.mark.slow
def test_checkpoint_of_other_options_is_refused(tmp_path):
    folder = training.train(tiny(tmp_path / "a"))
    other = wiring.assemble(tiny(tmp_path / "b", seeds=(3,)))
    with pytest.raises(checkpoint.CheckpointError, match="other options"):
        other.replay.load_state_dict(final_state(folder)["replay"])


@pytest.mark.slow
def test_evaluate_a_finished_run(tmp_path):
    folder = training.train(tiny(tmp_path))
    results = evaluate_run(folder, episodes=3, policies=("individual", "vote", "mean", "random"))
    assert results["individual"].returns.shape == (2, 5, 3)
    for policy in ("vote", "mean", "random"):
        assert results[policy].returns.shape == (2, 1, 3)
    assert results["individual"].returns.abs().eq(1).all()  # Catch ends with +1 or -1


@pytest.mark.slow
def test_rows_hold_every_member_and_the_vote(tmp_path):
    folder = training.train(tiny(tmp_path))
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    last = [r for r in rows if r["step"] == 240 and r["policy"] == "individual"]
    assert {(r["seed"], r["member"]) for r in last} == {(s, m) for s in (3, 1) for m in range(5)}
    assert {r["preset"] for r in rows} == {"catch/cerl"}
    assert all(r["updates"] == (240 - 40) // 4 for r in last)
    metrics = pq.read_table(folder / "metrics.parquet").to_pylist()
    names = {r["name"] for r in metrics}
    assert {"own_data_share", "value_error", "feature_rank", "dormant_share"} <= names
    assert any("entropy" in name for name in names)
    shares = [r["value"] for r in metrics if r["name"] == "own_data_share" and r["step"] == 240]
    assert sum(shares) == pytest.approx(2.0)
    assert load_file(folder / "config.yaml") == tiny(tmp_path)


@pytest.mark.slow
def test_a_planned_run_is_a_new_one_to_the_bit_and_says_nothing_of_resuming(tmp_path, capsys):
    whole = training.train(tiny(tmp_path / "whole"))
    (run,) = planned([tiny(tmp_path)], tmp_path)
    capsys.readouterr()
    folder = training.resume(tmp_path / run.folder)
    said = capsys.readouterr().out
    assert "resum" not in said and "checkpoint yet" not in said
    assert_same(final_state(whole), final_state(folder))
    times = ["wall_seconds", "config_hash"]
    for name in ("rows.parquet", "metrics.parquet"):
        tables = [pq.read_table(path / name) for path in (whole, folder)]
        own = [
            table.drop_columns([key for key in times if key in table.column_names])
            for table in tables
        ]
        # As texts, since a metric without a row, such as an error on own rows, is NaN.
        assert own[0].num_rows and repr(own[0].to_pydict()) == repr(own[1].to_pydict())


@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit_of_a_small_run(tmp_path):
    """Runs of a sweep get their share of the cores, which depends on how many train at once."""
    before = torch.get_num_threads()
    try:
        one = training.train(tiny(tmp_path / "one", threads=1))
        assert torch.get_num_threads() == 1
        two = training.train(tiny(tmp_path / "two", threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    first, second = final_state(one), final_state(two)
    for state in (first, second):
        state.pop("config")  # the options of the two runs differ in their number of threads
        state["logger"].pop("config_hash")
    assert_same(first, second)


@pytest.mark.slow
def test_sweep_keeps_finished_runs_and_resumes_the_others(tmp_path, monkeypatch):
    runs = planned([tiny(tmp_path, name) for name in ("catch/ddqn", "catch/tandem")], tmp_path)
    first = sweep(runs[:1], tmp_path)
    stop_at_first_checkpoint(monkeypatch)
    with pytest.raises(Stopped):
        sweep(runs, tmp_path)
    monkeypatch.undo()
    folders = sweep(runs, tmp_path)
    assert folders[0] == first[0]
    assert len(list(tmp_path.glob("*/config.yaml"))) == 2
    assert all((folder / finished.FILE).is_file() for folder in folders)


@pytest.mark.slow
def test_sweep_side_by_side_trains_resumes_and_names_failures(tmp_path, monkeypatch, capsys):
    runs = planned([tiny(tmp_path, name) for name in ("catch/ddqn", "catch/tandem")], tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at_first_checkpoint(patch)
        training.resume(tmp_path / runs[0].folder)
    folders = sweep(runs, tmp_path, jobs=2)
    assert len(set(folders)) == 2 and all((f / finished.FILE).is_file() for f in folders)
    alone = training.train(tiny(tmp_path / "alone", "catch/ddqn"))
    assert_same(final_state(alone), final_state(folders[0]))
    capsys.readouterr()
    assert sweep(runs, tmp_path, jobs=2) == folders
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    broken = tiny(tmp_path, "gym/cartpole", env={"kwargs": {"wheels": 4}})
    with pytest.raises(RuntimeError, match="(?s)1 of 1 runs failed.*wheels"):
        sweep(planned([broken], tmp_path / "broken"), tmp_path / "broken", jobs=2)


@pytest.mark.parametrize(
    ("preset", "name", "message"),
    [
        ("gym/cartpole", "CartPol-v1", "'CartPol-v1' (did you mean CartPole-v"),
        ("gym/cartpole", "CartPole-v99", "'CartPole-v99' (did you mean CartPole-v"),
        ("atari/ddqn", "Pongg", "'Pongg' (did you mean Pong"),
    ],
)
def test_tasks_that_do_not_exist_are_refused_once_each(tmp_path, preset, name, message):
    if preset.startswith("atari") and not envs.atari_games():
        pytest.skip("no Atari games are installed")
    bad = load(preset, {"env.name": name})
    other = bad.model_copy(update={"preset": "mine"})
    with pytest.raises(ValueError) as caught:
        check_tasks([tiny(tmp_path, "catch/ddqn"), bad, bad, other])
    lines = str(caught.value).splitlines()
    assert [line.partition(" on ")[0] for line in lines] == [preset, "mine"]
    assert all(message in line for line in lines)
    check_tasks([tiny(tmp_path, "catch/ddqn")])


@pytest.mark.parametrize("name", ["CartPole-v1", "CartPole", "my_tasks:Nowhere-v0"])
def test_names_of_gymnasium_that_may_exist_are_left_to_the_run(name):
    envs.check_name(GymEnv(name=name))


@pytest.mark.slow
def test_terminated_sweep_ends_its_runs(tmp_path):
    config = tiny(tmp_path, "catch/ddqn", schedule={"steps": 10**9}, log={"checkpoint_every": 40})
    (run,) = planned([config], tmp_path)
    program = "import sys; from pathlib import Path; from cerl.stop import SAVED, Stopped\n"
    program += "from cerl.sweep.local import sweep; from cerl.sweep.plan import PlannedRun\n"
    program += f"try: sweep([{run}], Path(sys.argv[1]), jobs=2)\n"
    program += "except Stopped: sys.exit(SAVED)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    folder = tmp_path / run.folder
    try:
        while not checkpoint.files(folder):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == SAVED
    finally:
        process.kill()
    assert not under_way(folder) and not (folder / finished.FILE).exists()
    assert failure.read(folder) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["catch/cerl", "point_mass/cerl"])
def test_a_seed_sees_the_same_streams_alone_and_among_others(tmp_path, name):
    few = training.train(tiny(tmp_path / "a", name, seeds=(2,)))
    many = training.train(tiny(tmp_path / "b", name, seeds=(0, 2, 5)))
    for key in ("action", "member", "real", "obs"):
        alone, among = (final_state(f)["replay"][key] for f in (few, many))
        # Before the first update everything is exact; afterwards products of other batch sizes
        # round differently, so greedy actions may part.
        assert torch.equal(alone[0, :10], among[1, :10]), key


SMALL = {
    "seeds": (0,),
    "device": "cpu",
    "replay": {"capacity": 200, "batch": 2, "start": 8},
    "schedule": {"steps": 20, "update_every": 4, "updates": 1, "target_every": 16},
    "eval": {"every": 20, "episodes": 1, "time_limit": 6, "steps": 0, "slots": 0},
    "log": {"every": 16, "checkpoint_every": 1000, "save_replay": False},
}


QUICK = ("catch/", "point_mass/", "gym/")  # other simulators take their time


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith(QUICK) else pytest.param(name, marks=pytest.mark.slow)
        for name in preset.presets()
    ],
)
def test_every_preset_loads_and_runs_updates(tmp_path, name):
    config = load(name)
    own = preset.read(preset.FOLDER / f"{name}.yaml")
    if set(own) == {"base"}:  # a short name: what it stands for is trained under its own
        assert load(own["base"]).model_copy(update={"preset": name}) == config
        return
    narrow = {"hidden": tuple(min(units, 16) for units in config.net.hidden)}
    changes = {**SMALL, "out": str(tmp_path), "env": {"envs": 2}, "net": narrow}
    if config.ensemble.members > 3 and config.ensemble.heads != "multi_horizon":
        changes["ensemble"] = {"members": 3}
    if config.env.family in ("atari", "mujoco", "dmc"):
        pytest.importorskip("envpool")
    if config.agent.name == "quantile":
        changes["agent"] = {"quantiles": 5}
    if config.loss.batches in ("own", "disjoint"):
        changes["replay"] = {**SMALL["replay"], "candidates": 128}
    if config.encoder.name != "frames":
        changes["encoder"] = {"context": 1, "learnt": 3, "sampling": "uniform"}
        changes["replay"] = {**SMALL["replay"], "start": 16}
        changes["schedule"] = {**SMALL["schedule"], "steps": 28}
        changes["eval"] = {**SMALL["eval"], "every": 28}  # robots play whole episodes
    folder = training.train(load(name, suited(name, changes)))
    state = final_state(folder)
    assert int(state["learner"]["updates"]) == 3
    assert all(leaf.isfinite().all() for leaf in state["learner"]["net"].values())
    assert len(pq.read_table(folder / "rows.parquet")) > 0


def test_updates_and_late_policies_are_counted(tmp_path):
    changes = {
        "agent": {"policy_every": 2},
        "schedule": {"steps": 80, "update_every": 4, "updates": 5},
    }
    folder = training.train(tiny(tmp_path, "point_mass/sac", **changes))
    state = final_state(folder)["learner"]
    assert int(state["updates"]) == 5 * (80 - 40) // 4
    ((critic,), (actor, alpha)) = state["optimisers"]
    assert int(critic["count"]) == 50 and int(actor["count"]) == int(alpha["count"]) == 25


def test_the_paper_updates_from_the_ten_thousandth_step_on():
    config = load("mujoco/sac")
    schedule = Schedule.of(config, envs=1)
    assert [schedule.updates_by(step) for step in (9_999, 10_000, 10_001)] == [0, 1, 2]
    assert schedule.updates_by(1_000_000) == 990_001
    # Steps are counted from 1 there: the first 9,999 actions are random.
    random = [float(explore.epsilon(config.explore, torch.tensor(t))) for t in (0, 9_998, 9_999)]
    assert random == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gym/pendulum", {"env": {"name": "CartPole-v1"}}),
        ("gym/cartpole", {"env": {"name": "Pendulum-v1"}}),
    ],
)
def test_an_agent_for_other_actions_is_refused(tmp_path, name, changes):
    message = "agent.name: (sac|dqn) chooses .*, but .* takes .* ones; expected"
    with pytest.raises(ValueError, match=message):
        wiring.assemble(tiny(tmp_path, name, **changes))


@pytest.mark.slow
def test_rows_of_continuous_runs_hold_modes_and_action_variance(tmp_path):
    folder = training.train(tiny(tmp_path, "point_mass/cerl"))
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    last = [r for r in rows if r["step"] == 240]
    for policy in ("individual", "individual_mode"):
        mine = [r for r in last if r["policy"] == policy]
        assert {(r["seed"], r["member"]) for r in mine} == {
            (s, m) for s in (3, 1) for m in range(5)
        }
        assert all(r["episodes"] == 1 for r in mine)  # two episodes shared out over five members
    for policy in ("mean", "mean_mode"):
        assert [(r["member"], r["episodes"]) for r in last if r["policy"] == policy] == [
            (-1, 2)
        ] * 2
    names = {r["name"] for r in pq.read_table(folder / "metrics.parquet").to_pylist()}
    assert {"log_prob_own", "action_variance_mean", "own_data_share", "value_error"} <= names
    assert not any("vote" in name for name in names)


@pytest.mark.slow
def test_sac_learns_the_point_mass(tmp_path):
    """Random forces score about 23 of 50, a mass that is in the middle at once 50."""
    out = {"out": str(tmp_path), "device": "cpu", "seeds": (0, 1)}
    schedule = {"steps": 4_000}
    evaluation = {"every": 4_000}
    config = load("point_mass/cerl", {**out, "schedule": schedule, "eval": evaluation})
    folder = training.train(config)
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    scores = [r["return"] for r in rows if r["step"] == 4_000 and r["policy"] == "individual_mode"]
    assert len(scores) == 10 and min(scores) > 38 and sum(scores) / 10 > 43
