"""Forks: they go on as the run did, to the bit, and change only what their options say."""

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cerl import __main__ as command
from cerl import training
from cerl.config import Config, ConfigError, load
from cerl.evaluate import Evaluator
from cerl.fork import fork
from cerl.record import checkpoint, pieces, results, versions
from cerl.record.finished import finished
from cerl.record.folder import FILE, load_file
from cerl.report import curves, roles
from cerl.run import Run
from cerl.state import CheckpointError, leaves
from cerl.stop import Stopped
from cerl.wiring import assemble

SMALL: dict[str, Any] = {
    **{"seeds": (3, 1), "net.hidden": (12,), "env.envs": 2, "device": "cpu"},
    **{"replay.capacity": 100, "replay.batch": 4, "replay.start": 40, "schedule.steps": 240},
    **{"schedule.update_every": 4, "explore.start": 0.3, "explore.end": 0.3},
    **{"eval.every": 60, "eval.episodes": 1, "eval.time_limit": 20, "eval.slots": 0},
    **{"log.every": 40, "log.checkpoint_every": 10**9, "log.checkpoint_minutes": 0.0},
    "log.keep": (120,),
}
MINATAR = {"net.channels": (4,), "net.hidden": (8,), "env.envs": 3, "log.keep": (119,)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("catch/ddqn", {"schedule.target_every": 20}),
    "between_logs": ("catch/ddqn", {"log.keep": (150,), "log.every": 80}),
    "masked": ("catch/bootdqn", {"ensemble.members": 3, "loss.mask_probability": 0.5}),
    "cerl": ("catch/cerl", {"ensemble.members": 3, "schedule.target_every": 20}),
    "both": ("minatar/cerl-both", {**MINATAR, "ensemble.members": 3}),
    "shared": ("minatar/cerl-l1", {**MINATAR, "ensemble.members": 3}),
    "prioritised": ("catch/ddqn", {"replay.sampler.name": "prioritised"}),
    "fox": (
        "catch/flicker-fox-cerl",
        {"ensemble.members": 2, "encoder.width": 16, "replay.capacity": 120},
    ),
    "sac": ("point_mass/cerl", {"ensemble.members": 3}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def quiet(call, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **kwargs)


def parent(home: Path, case: str) -> Path:
    """The folder of a finished run, trained when it is first asked for."""
    folder = home / case
    if not folder.exists():
        preset, options = CASES[case]
        config = load(preset, SMALL | options | {"out": str(home / "made")})
        quiet(training.train, config).rename(folder)
    return folder


def forked(source: Path, out: Path, at: int = 120, picked=None, **changes: Any) -> Path:
    """The folder of a fork, not trained yet. Args: changes, options with __ for dots."""
    options = {key.replace("__", "."): value for key, value in changes.items()}
    return fork(source, at=at, changes={"out": str(out), **options}, picked=picked)


def trained(folder: Path, **changes: Any) -> Path:
    return quiet(training.resume, folder, changes=changes)


def kept(source: Path) -> checkpoint.Loaded:
    (file,) = [file for file in checkpoint.files(source) if checkpoint.step_kept(file)]
    return checkpoint.load(file)


def rows(folder: Path, *, after: int) -> list[dict[str, Any]]:
    """Result rows and metrics after a step, without what names the run or the time."""
    found = []
    for name in ("rows.parquet", "metrics.parquet"):
        for row in pq.read_table(folder / name).to_pylist():
            if row["step"] > after:
                own = {k: v for k, v in row.items() if k not in ("config_hash", "wall_seconds")}
                found.append({k: "nan" if v != v else v for k, v in own.items()})
    return found


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def held(loaded: checkpoint.Loaded) -> pieces.Manifest:
    assert loaded.replay is not None
    return loaded.replay


def assert_equal(one: Any, other: Any) -> None:
    a, b = dict(leaves(one)), dict(leaves(other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


@pytest.mark.parametrize("case", [case for case in CASES if case != "between_logs"])
def test_a_fork_without_changes_goes_on_as_the_run_did(home, tmp_path, case):
    source = parent(home, case)
    before = content(source)
    folder = trained(forked(source, tmp_path))
    assert content(source) == before
    one, other = checkpoint.load(source), checkpoint.load(folder)
    for part in ("learner", "collector", "watch", "iteration", "made"):
        assert_equal({part: one.state[part]}, {part: other.state[part]})
    assert_equal(one.state.get("sampler", {}), other.state.get("sampler", {}))
    assert_equal(pieces.whole(source, held(one)), pieces.whole(folder, held(other)))
    at = kept(source).state["iteration"] * load_file(source / FILE).env.envs
    assert rows(folder, after=at) == rows(source, after=at) != []
    # Its curve begins where it was forked, with the scores that the run had there.
    first = [row["step"] for row in pq.read_table(folder / "rows.parquet").to_pylist()]
    assert min(first) == at


def test_a_fork_can_be_stopped_resumed_and_forked_again(home, tmp_path):
    source = parent(home, "masked")
    short = forked(source, tmp_path / "one", schedule__steps=180, log__keep=(150,))
    trained(short)
    again = trained(forked(short, tmp_path / "two", at=150, schedule__steps=240))
    trained(short, **{"schedule.steps": 240})
    for folder in (short, again):
        one, other = checkpoint.load(source).state, checkpoint.load(folder).state
        assert_equal(one["learner"], other["learner"])
    assert rows(again, after=150) == rows(source, after=150)
    origin = load_file(again / FILE).origin
    assert (origin.run, origin.forked_at) == (short.name, 150)
    assert origin.options == results.config_hash(load_file(short / FILE))


@pytest.mark.parametrize("case", ["cerl", "both", "shared", "sac"])
def test_members_that_stay_keep_their_heads_and_moments(home, tmp_path, case):
    source, picked = parent(home, case), (0, 2)  # of three members
    folder = forked(source, tmp_path, picked=picked)
    old, new = kept(source).state["learner"], checkpoint.load(folder).state["learner"]
    heads = {"cerl": ("final.weight", 3), "both": ("final.hidden", 2)}
    heads |= {"shared": ("final.weight", 3), "sac": ("critic.final.weight", 4)}
    name, axis = heads[case]
    for part in ("net", "target"):
        key = name.removeprefix("critic.") if part == "target" else name
        a, b = old[part][key], new[part][key]
        for i in range(2):
            for j in range(2):
                learns_from = picked[(i + j) % 2]
                (head,) = [h for h in range(3) if (picked[i] + h) % 3 == learns_from]
                theirs = a[:, picked[i]].select(axis - 1, head)
                assert torch.equal(b[:, i].select(axis - 1, j), theirs)
    for stage, saved in zip(new["optimisers"], old["optimisers"], strict=True):
        for one, other in zip(stage, saved, strict=True):
            for mine, theirs in zip(one["first"], other["first"], strict=True):
                if theirs.shape[1] == 1:
                    assert torch.equal(mine, theirs)
                elif mine.shape[2:] == theirs.shape[2:]:
                    assert torch.equal(mine, theirs[:, list(picked)])
    trained(folder)


def test_who_acted_is_told_by_the_new_numbers(home, tmp_path):
    source = parent(home, "masked")
    folder = trained(forked(source, tmp_path, picked=(2, 1), schedule__steps=130))
    old = pieces.whole(source, held(kept(source)))
    first = min(checkpoint.files(folder), key=lambda file: file.name)
    new = pieces.whole(folder, held(checkpoint.load(first)))
    table = {0: -1, 1: 1, 2: 0}
    for a, b in zip(
        old["member"].flatten().tolist(), new["member"].flatten().tolist(), strict=True
    ):
        assert b == table[a]
    assert (new["member"] == -1).any() and torch.equal(old["obs"], new["obs"])
    # Nobody stays nobody when the fork is forked.
    twice = forked(folder, tmp_path / "twice", at=130, picked=(1,), schedule__steps=150)
    again = pieces.whole(twice, held(checkpoint.load(twice)))["member"]
    here = pieces.whole(folder, held(checkpoint.load(folder)))["member"]
    assert again.flatten().tolist() == [{-1: -1, 0: -1, 1: 0}[k] for k in here.flatten().tolist()]
    # Afterwards only the new members act.
    last = pieces.whole(folder, held(checkpoint.load(folder)))
    assert set(last["member"][:, 10:15].flatten().tolist()) <= {-1, 0, 1}


def test_a_forked_tandem_has_a_frozen_actor_and_a_twin_that_learns(home, tmp_path):
    source = parent(home, "single")
    tandem = {"ensemble__members": 2, "ensemble__duty": "tandem", "ensemble__frozen": (0,)}
    tandem |= {"ensemble__active_probability": 1.0}
    folder = trained(forked(source, tmp_path, **tandem))
    before, after = kept(source).state["learner"], checkpoint.load(folder).state["learner"]
    for name, leaf in before["net"].items():
        assert torch.equal(after["net"][name][:, 0], leaf[:, 0])
        assert not torch.equal(after["net"][name][:, 1], leaf[:, 0])
    played = [row for row in pq.read_table(folder / "rows.parquet").to_pylist()]
    assert {row["role"] for row in played if row["policy"] == "individual"} == {"active", "passive"}
    assert {row["member"] for row in played if row["policy"] == "train"} == {0}
    first = {
        row["role"]: row["return"] for row in played if row["step"] == 120 and row["seed"] == 3
    }
    assert first.keys() == {"active", "passive"}


def test_episodes_before_a_fork_are_those_of_one_copy(home, tmp_path):
    source = parent(home, "between_logs")
    assert kept(source).state["collector"]["finished"].sum() > 0
    tandem = {"ensemble__members": 2, "ensemble__duty": "tandem", "ensemble__frozen": (0,)}
    tandem |= {"ensemble__active_probability": 1.0, "schedule__steps": 162}
    folder = trained(forked(source, tmp_path, at=150, **tandem))
    played = pq.read_table(folder / "rows.parquet").to_pylist()
    found = {(row["member"], row["step"]) for row in played if row["policy"] == "train"}
    assert (0, 160) in found and {member for member, _ in found} == {0}


def test_a_passive_twin_learns_from_fixed_rows_as_the_agent_itself_would(home, tmp_path):
    source = parent(home, "single")
    alone = trained(forked(source, tmp_path / "alone", replay__fixed=True))
    tandem = {"ensemble__members": 2, "ensemble__duty": "tandem", "ensemble__frozen": (0,)}
    twin = trained(forked(source, tmp_path / "twin", replay__fixed=True, **tandem))
    one, other = (checkpoint.load(folder) for folder in (alone, twin))
    start = kept(source)
    for loaded, folder in ((one, alone), (other, twin)):
        assert_equal(pieces.whole(source, held(start)), pieces.whole(folder, held(loaded)))
    for name, leaf in one.state["learner"]["net"].items():
        twin_leaf = other.state["learner"]["net"][name][:, 1]
        torch.testing.assert_close(twin_leaf, leaf[:, 0], rtol=1e-5, atol=1e-6)
        assert not torch.equal(leaf, start.state["learner"]["net"][name])


@pytest.mark.parametrize("capacity", [30, 60, 100, 160])
@pytest.mark.parametrize("case", ["single", "prioritised"])
def test_a_ring_of_another_size_has_the_newest_rows(home, tmp_path, case, capacity):
    source = parent(home, case)
    folder = forked(source, tmp_path, replay__capacity=capacity)
    old, new = kept(source), checkpoint.load(folder)
    a, b = pieces.whole(source, held(old)), pieces.whole(folder, held(new))
    total, size = held(old).total, capacity // 2
    assert total == 60
    count = min(size, 50)
    shift = 10 if capacity == 160 else 0  # rows before the 50 of the ring are gone for ever
    assert held(new).total == total - shift and held(new).rows == size
    for row in range(total - count, total):
        there, here = row % 50, (row - shift) % size
        for name in ("obs", "action", "reward", "terminated", "real", "member"):
            assert torch.equal(a[name][:, there], b[name][:, here])
        if case == "prioritised":
            one, other = (x.state["sampler"]["units"].flatten(1) for x in (old, new))
            for env in range(2):
                assert torch.equal(one[:, there * 2 + env], other[:, here * 2 + env])
    if case == "prioritised":
        (one,) = (x.state["sampler"]["units"].flatten(1)[:, : size * 2] for x in [new])
        assert int((one > 0).sum(1).max()) <= count * 2
    trained(folder)
    assert held(checkpoint.load(folder)).total == 120 - shift


def test_batches_of_their_own_and_other_rates_need_no_other_state(home, tmp_path):
    source = parent(home, "masked")
    changes = {"loss__batches": "own", "loss__mask_probability": 1.0, "replay__candidates": 64}
    folder = trained(forked(source, tmp_path, optim__lr=1e-2, **changes))
    one, other = checkpoint.load(source).state, checkpoint.load(folder).state
    assert int(one["learner"]["updates"]) == int(other["learner"]["updates"])
    assert not torch.equal(
        one["learner"]["net"]["final.weight"], other["learner"]["net"]["final.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "picked", "said"),
    [
        ({"net.hidden": (3,)}, None, "net.hidden cannot change"),
        ({"seeds": (5,)}, None, "seeds cannot change"),
        ({"schedule.steps": 120}, None, "schedule.steps: .* begins at agent step 120"),
        ({"ensemble.members": 5}, None, "ensemble.members: .* has 3 members.* got 5"),
        ({}, (0, 3), "--members: expected 0 to 2, got 3"),
        ({"ensemble.members": 2}, (0, 1, 2), "--members: expected 2 members"),
        ({"ensemble.frozen": (0, 1, 2)}, None, "ensemble.frozen: .* at least one"),
        ({"ensemble.frozen": (7,)}, None, "ensemble.frozen: expected members 0 to 2, got 7"),
        ({"loss.mask_probability": 1.0}, (0, 0), "copies of a member .* stay equal"),
        ({"ensemble.duty": "tandem"}, None, "ensemble.members: a tandem"),
    ],
)
def test_options_that_a_fork_cannot_have_are_refused(home, tmp_path, changes, picked, said):
    source = parent(home, "masked")
    with pytest.raises(ConfigError, match=said):
        fork(source, at=120, changes={"out": str(tmp_path / "forks"), **changes}, picked=picked)
    assert not (tmp_path / "forks").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"replay.fixed": True, "encoder.cache_refresh": 5},
            "encoder.cache_refresh: .* expected 0",
        ),
        ({"loss.n_step": 3}, "loss.n_step: .* expected 1, got 3"),
    ],
)
def test_the_memory_of_acting_limits_what_may_change(home, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        fork(parent(home, "fox"), at=120, changes={"out": str(tmp_path / "forks"), **changes})
    assert not (tmp_path / "forks").exists()


def test_a_step_without_a_checkpoint_tells_which_there_are(home, tmp_path):
    source = parent(home, "single")
    with pytest.raises(CheckpointError, match="no checkpoint at agent step 100; .* at 120, 240"):
        forked(source, tmp_path, at=100)
    # With two environments the first iteration that reaches step 119 is at step 120.
    assert load_file(forked(source, tmp_path, at=119) / FILE).origin.forked_at == 120
    assert load_file(source / FILE).origin.forked_at == 0


@pytest.mark.parametrize("what", ["archive", "bit", "rows"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_made(home, tmp_path, what):
    source = tmp_path / "copy"
    shutil.copytree(parent(home, "single"), source)
    file = kept(source).file
    if what == "rows":
        (piece,) = held(kept(source)).pieces
        file = source / pieces.FOLDER / piece.name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[:-20] if what == "archive" else data)
    with pytest.raises(CheckpointError, match="damaged"):
        forked(source, tmp_path / "forks")
    assert [*(tmp_path / "forks").glob("*")] == [] == [*(tmp_path / "forks").glob(".*")]
    assert forked(source, tmp_path / "forks", at=240, schedule__steps=300).is_dir()


def test_a_run_without_its_rows_is_forked_and_fills_replay_again(tmp_path):
    options = SMALL | {"out": str(tmp_path), "log.save_replay": False}
    source = quiet(training.train, load("catch/ddqn", options))
    folder = forked(source, tmp_path / "forks", log__save_replay=True)
    trained(folder)
    # Updates are left out until 40 more agent steps have filled it.
    one, other = (int(checkpoint.load(f).state["learner"]["updates"]) for f in (source, folder))
    assert one - other == 10
    with pytest.raises(ConfigError, match="replay.fixed: .* not saved its rows"):
        forked(source, tmp_path / "forks", replay__fixed=True)


def test_what_only_a_fork_can_be_is_refused_elsewhere(home, tmp_path):
    with pytest.raises(ConfigError, match="replay.fixed: only a fork"):
        load("catch/ddqn", {"replay.fixed": True})
    folder = forked(parent(home, "single"), tmp_path)
    for file in checkpoint.files(folder):
        file.unlink()
    for call in (
        lambda: training.resume(folder),
        lambda: training.train(load_file(folder / FILE)),
    ):
        with pytest.raises(ConfigError, match="cerl fork RUN --at 120"):
            quiet(call)


def test_the_duty_of_members_may_change(home, tmp_path):
    source = parent(home, "masked")
    folder = trained(forked(source, tmp_path, ensemble__duty="first"))
    last = pieces.whole(folder, held(checkpoint.load(folder)))
    # Episodes that another member began are finished by it, within the nine steps of one.
    assert set(last["member"][:, 20:40].flatten().tolist()) == {0}


def test_rows_say_what_they_were_forked_from(home, tmp_path):
    source = parent(home, "single")
    folder = trained(forked(source, tmp_path, optim__lr=1e-2))
    table = pq.read_table(folder / "rows.parquet")
    told = json.loads(table.schema.metadata[b"cerl.origin"])
    assert (told["run"], told["forked_at"]) == ("single", 120)
    sessions = versions.read(folder / versions.FILE)
    assert [entry.get("run") for entry in sessions] == ["single", None]
    # A fork is no run from the beginning, whatever its other options.
    unchanged = load_file(forked(source, tmp_path) / FILE)
    assert results.config_hash(unchanged) != results.config_hash(load_file(source / FILE))


def test_a_report_draws_twins_from_where_they_part(home, tmp_path):
    source = parent(home, "single")
    twins = [
        trained(forked(source, tmp_path, optim__lr=1e-2)),
        trained(forked(source, tmp_path)),
    ]
    found, notes = curves.cells(curves.load_rows([source, *twins]))
    steps = {cell.name: cell.curves["individual"].steps.tolist() for cell in found}
    assert steps == {
        "ddqn, lr 0.001": [60, 120, 180, 240],
        "ddqn, lr 0.001, forked at 120": [120, 180, 240],
        "ddqn, lr 0.01, forked at 120": [120, 180, 240],
    }
    values = {cell.name: cell.curves["individual"].returns for cell in found}
    for name, own in values.items():
        assert own[-3].tolist() == values["ddqn, lr 0.001"][1].tolist(), name
    text = "lr 0.01, forked at 120 on catch begins at agent step 120, where it was forked from ddqn"
    assert any(text in note for note in notes)


def test_a_fork_has_its_run_as_baseline(home, tmp_path):
    source = parent(home, "single")
    options = {"ensemble__members": 2, "loss__batches": "independent"}
    twin = trained(forked(source, tmp_path, **options))
    found, _ = curves.cells(curves.load_rows([source, twin]))
    (pair,), alone = roles.pairs(found, "ensemble", "single")
    assert not alone and pair.cell.name == "ddqn, members 2, batches independent, forked at 120"
    assert pair.baseline.name == "ddqn, members 1, batches shared"
    # A single agent that the fork does not come from is no baseline.
    other = parent(home, "between_logs")
    rate = trained(forked(other, tmp_path, at=150, optim__lr=1e-2))
    found, _ = curves.cells(curves.load_rows([rate, twin]))
    assert roles.pairs(found, "ensemble", "single")[0] == []


def test_the_command_makes_and_trains_a_fork(home, tmp_path, capsys):
    source = parent(home, "single")
    words = [
        "fork",
        str(source),
        "--at",
        "0.12k",
        "--out",
        str(tmp_path),
        "--schedule.steps",
        "160",
    ]
    assert command.main([*words, "--members", "0", "0", "--loss.batches", "independent"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder.parent == tmp_path and finished(folder, steps=160)
    assert load_file(folder / FILE).ensemble.members == 2
    for wrong, said in (
        (["--at", "99"], "no checkpoint at agent step 99"),
        ([], "fork --at: expected a number of agent steps"),
        (["--at", "120", "--agent.name", "quantile"], "agent.name cannot change"),
        (["--at", "120", "--members", "x"], "--members: expected numbers of members, got 'x'"),
    ):
        assert command.main(["fork", str(source), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "forks.md").read_text()
    part = page[page.index("## A forked tandem") : page.index("## What a fork may change")]
    commands = [line.split()[1:] for line in part.splitlines() if line.startswith("    cerl ")]
    assert [words[0] for words in commands] == ["train", "fork", "fork", "report"]
    monkeypatch.chdir(tmp_path)
    # The example at a twentieth of its length.
    small = {"0..7": "0..2", "20k": "1k", "10k": "600", "2000": "500"}
    places = []
    for words in commands:
        places = places or ["RUN"]
        words = [small.get(word, word).replace("RUN", places[0]) for word in words]
        short = ["--eval.every", "200", "--eval.episodes", "2"] if words[0] != "report" else []
        assert command.main([*words, *short]) == 0
        out = capsys.readouterr().out
        places = [out.splitlines()[-1]] if places == ["RUN"] else places
    assert "forked at 600" in (tmp_path / "runs" / "table.md").read_text()
    assert "passive" in out


@pytest.mark.parametrize("envs", [1, 3])
def test_checkpoints_are_kept_at_the_steps_asked_for(tmp_path, envs):
    changes = {"env.envs": envs, "log.keep": (50, 100, 101), "log.keep_every": 80}
    changes |= {"log.checkpoint_every": 20, "out": str(tmp_path), "schedule.steps": 200}
    folder = quiet(training.train, load("catch/ddqn", SMALL | changes))
    steps = [checkpoint.step_kept(file) for file in checkpoint.files(folder)]
    wanted = {1: [50, 80, 100, 101, 160], 3: [51, 81, 102, 162]}[envs]
    assert [step for step in steps if step] == wanted and steps[-2:] == [0, 0]
    run = Run(load_file(folder / FILE), assemble(load_file(folder / FILE)), folder)
    assert run.schedule.kept == len(wanted)
    for file in checkpoint.files(folder):
        loaded = checkpoint.load(file)
        assert pieces.damage(folder, held(loaded)) is None
    assert checkpoint.load(folder).state["iteration"] * envs >= 200


def test_a_step_is_kept_although_the_run_was_stopped_in_its_evaluation(tmp_path, monkeypatch):
    straight = load("catch/ddqn", SMALL | {"out": str(tmp_path / "straight")})
    straight = quiet(training.train, straight)
    play = Evaluator.run

    def stopped(self, number, *, stopped):
        if number == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return play(self, number, stopped=stopped)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", stopped)
        with pytest.raises(Stopped):
            quiet(training.train, load("catch/ddqn", SMALL | {"out": str(tmp_path / "cut")}))
    (cut,) = (tmp_path / "cut").iterdir()
    assert not any(map(checkpoint.step_kept, checkpoint.files(cut)))
    trained(cut)
    assert_equal(kept(cut).state["learner"], kept(straight).state["learner"])
    assert_equal(pieces.whole(cut, held(kept(cut))), pieces.whole(straight, held(kept(straight))))


def test_steps_that_a_run_is_past_are_told_when_it_is_resumed(home, tmp_path, capsys):
    source = tmp_path / "copy"
    shutil.copytree(parent(home, "single"), source)
    changes = {"log.keep": (100, 120, 250), "schedule.steps": 260}
    training.resume(source, changes=changes)
    assert "log.keep: the run is past agent step 100, so no checkpoint" in capsys.readouterr().out
    steps = [checkpoint.step_kept(file) for file in checkpoint.files(source)]
    assert [step for step in steps if step] == [120, 250]


def test_a_checkpoint_of_another_structure_is_refused(home, tmp_path):
    source = tmp_path / "copy"
    shutil.copytree(parent(home, "masked"), source)
    loaded = kept(source)
    state = {**loaded.state, "learner": {**loaded.state["learner"], "net": {}}}
    loaded.file.unlink()
    checkpoint.save(source, state, replay=loaded.replay, kept_at=120)
    with pytest.raises(CheckpointError, match="expected net.*belongs to a run with other options"):
        forked(source, tmp_path / "forks", picked=(0, 1))
    checkpoint.save(source, {"iteration": 60, "config": ""}, replay=loaded.replay, kept_at=120)
    with pytest.raises(CheckpointError, match="expected learner"):
        forked(source, tmp_path / "forks")
    assert list((tmp_path / "forks").glob("*")) == list((tmp_path / "forks").glob(".*")) == []


def test_steps_to_keep_are_within_the_run():
    with pytest.raises(ConfigError, match="log.keep: expected agent steps from 1 to .* got 500"):
        load("catch/ddqn", SMALL | {"log.keep": (100, 500)})
    with pytest.raises(ConfigError, match="log.keep_every: expected at most"):
        load("catch/ddqn", SMALL | {"log.keep_every": 500})


def test_a_kept_checkpoint_that_is_no_archive_is_set_aside_on_resume(home, tmp_path):
    source = tmp_path / "copy"
    shutil.copytree(parent(home, "single"), source)
    file = kept(source).file
    file.write_bytes(file.read_bytes()[:1000])
    found = checkpoint.newest(source)
    assert found.state["iteration"] == 120
    assert len(found.damaged) == 1 and f"{file.name} is damaged" in found.damaged[0]
    assert not file.exists() and (source / f"damaged-{file.name}").exists()


def test_the_state_of_a_fork_fits_its_run_before_it_trains(home, tmp_path):
    folder = forked(parent(home, "fox"), tmp_path, picked=(1,))
    config: Config = load_file(folder / FILE)
    run = Run(config, assemble(config), folder)
    quiet(run.restore)
    assert run.steps == 120 and not run.recorded
    assert config.ensemble.members == 1 and config.origin.members == (1,)
