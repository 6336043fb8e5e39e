"""Exchange: what other programs read of our runs, and what we read of theirs."""

import csv
import io
import json
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboard.summary.writer.record_writer import RecordWriter

import cerl
from cerl.config import ConfigError
from cerl.exchange import cleanrl, export, foreign, imports, member, tensors
from cerl.exchange.tensors import TensorsError
from cerl.record import results
from cerl.record.results import RowsError
from cerl.report import tables
from cerl.report.curves import cells, final, load_rows
from cerl.report.normalise import NORMALISATIONS, scale_of
from tests.result_rows import ensemble, row, trained, write

ROOT = Path(__file__).resolve().parent.parent


def printed(function, *args, **options) -> str:
    text = io.StringIO()
    function(*args, console=Console(file=text, width=1000), **options)
    return text.getvalue()


# Exports of scores.


def study(folder: Path) -> Path:
    """Two methods on two environments; the score says which member, seed, step and env it is of."""
    for env, level in (("atari/BeamRider", 1000.0), ("atari/Pong", 2000.0)):
        single = [
            row(env=env, seed=seed, step=step, frames=4 * step, **{"return": level + seed + step})
            for step in (100, 200)
            for seed in (0, 1)
        ]
        trained = {"policy": "train", "episodes": 3, "return": 7.0, "step": 150}
        write(folder / env / "single", [*single, row(env=env, **trained)])
        returns = np.arange(12.0).reshape(2, 2, 3)  # [T, S, N]
        both = ensemble(returns, 100 + returns[..., 0], env=env, preset="catch/bootdqn")
        write(folder / env / "ensemble", [{**line, "config_hash": "1" * 12} for line in both])
    return folder


def test_rliable_gets_runs_by_tasks_and_steps(tmp_path):
    export.main([study(tmp_path / "runs")], tmp_path / "out", to="rliable")
    scores = dict(np.load(tmp_path / "out" / "scores.npz"))
    curves = dict(np.load(tmp_path / "out" / "curves.npz"))
    facts = json.loads((tmp_path / "out" / "rliable.json").read_text())
    assert facts["tasks"] == ["atari/BeamRider", "atari/Pong"] and facts["steps"] == [100, 200]
    assert scores["catch/ddqn"].tolist() == [[1200, 2200], [1201, 2201]]
    assert curves["catch/ddqn"][1].tolist() == [[1101, 1201], [2101, 2201]]
    # The score of a seed is the mean over its members: (6 + 7 + 8) / 3 and (9 + 10 + 11) / 3.
    assert scores["catch/bootdqn"].tolist() == [[7, 7], [10, 10]]
    assert scores["catch/bootdqn, aggregate (vote)"].tolist() == [[106, 106], [109, 109]]
    assert facts["methods"]["catch/bootdqn"]["seeds"]["atari/Pong"] == [0, 1]


@pytest.mark.parametrize("how", [*NORMALISATIONS])
def test_rliable_has_scores_on_every_scale_that_reports_have(tmp_path, how):
    for name, level in (("ddqn", 20.0), ("bootdqn", 10.0)):
        trained(tmp_path / "runs" / name, f"minatar/{name}", {}, level, seeds=(0, 1))
    where = tmp_path / "out"
    if how == "human":
        with pytest.raises(ConfigError, match="--normalise human: minatar/breakout has no ref"):
            export.main([tmp_path / "runs"], where, to="rliable", normalise=how)
        return
    export.main([tmp_path / "runs"], where, to="rliable", normalise=how)
    found = dict(np.load(where / "scores.npz"))
    read, _ = cells(load_rows([tmp_path / "runs"]))
    for cell in read:
        scale = scale_of(cell, "individual", read, how)
        wanted = scale(final(cell.curves["individual"], last=1))
        np.testing.assert_allclose(found[cell.name][:, 0], wanted)


def test_rliable_averages_the_last_evaluations_and_normalises_atari(tmp_path):
    runs = study(tmp_path / "runs")
    export.main([runs], tmp_path / "out", to="rliable", last=2, normalise="human")
    scores = np.load(tmp_path / "out" / "scores.npz")["catch/ddqn"]
    # Pong: a random policy returns -20.7, a human 14.6 (Wang et al. 2016).
    assert scores[0, 1] == pytest.approx((2150 + 20.7) / (14.6 + 20.7))
    runs = write(tmp_path / "other", [row()])
    with pytest.raises(ConfigError, match="export --normalise human: catch has no reference"):
        export.main([runs], tmp_path / "out", to="rliable", normalise="human")


def test_rliable_is_told_what_is_left_out(tmp_path):
    lines = [row(env=env, seed=seed) for env in ("a", "b") for seed in (0, 1, 2)]
    lines[-1]["return"] = float("nan")  # seed 2 on b
    write(tmp_path / "runs" / "both", lines)
    write(tmp_path / "runs" / "one", [row(env="a", preset="catch/cerl")])
    said = printed(export.main, [tmp_path / "runs"], tmp_path / "out", to="rliable")
    scores = dict(np.load(tmp_path / "out" / "scores.npz"))
    assert list(scores) == ["catch/ddqn"] and scores["catch/ddqn"].shape == (2, 2)
    assert "catch/cerl: no scores on b; left out" in said
    assert "catch/ddqn on b: seed 2 has scores that are not finite; left out" in said
    assert "catch/ddqn on a: seed 2 is left out, since rliable needs as many runs" in said


def test_csv_is_tidy_and_names_options(tmp_path):
    for size in (2, 3):
        trained(tmp_path / f"runs/{size}", "catch/bootdqn", {"ensemble.members": size}, level=size)
    export.main([tmp_path / "runs"], tmp_path / "all.csv", to="csv")
    table = pyarrow.csv.read_csv(tmp_path / "all.csv")
    assert set(results.ROWS.names) <= set(table.column_names)
    labels = set(table["label"].to_pylist())
    assert labels == {"bootdqn, members 2", "bootdqn, members 3"}
    assert set(table["ensemble.members"].to_pylist()) == {2, 3}
    assert table.num_rows == load_rows([tmp_path / "runs"]).num_rows


def test_dqn_zoo_gets_its_columns(tmp_path):
    export.main([study(tmp_path / "runs")], tmp_path / "out", to="dqn_zoo")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "catch-bootdqn-aggregate-vote.csv",
        "catch-bootdqn.csv",
        "catch-ddqn.csv",
    ]
    with (tmp_path / "out" / "catch-ddqn.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line[""] for line in lines] == [str(k) for k in range(8)]
    first, second = (
        line for line in lines if (line["environment_name"], line["seed"]) == ("pong", "0")
    )
    assert (first["iteration"], first["frame"], first["train_episode_return"]) == ("1", "400", "")
    assert (second["eval_episode_return"], second["eval_num_episodes"]) == ("2200.0", "10")
    # The training episodes between the evaluations at 100 and 200.
    assert (second["train_episode_return"], second["train_num_episodes"]) == ("7.0", "3")
    score = (2200 + 20.7) / (14.6 + 20.7)
    assert float(second["normalized_return"]) == pytest.approx(score)
    assert (second["capped_normalized_return"], second["human_gap"]) == ("1.0", "0.0")
    assert {line["environment_name"] for line in lines} == {"pong", "beam_rider"}


def test_wandb_gets_a_run_for_each_seed_offline(tmp_path, monkeypatch):
    made = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.done = options, [], False
            self.dir = str(Path(options["dir"]) / f"run-{len(made)}" / "files")
            made.append(self)

        def log(self, values, *, step):
            self.logged.append((step, values))

        def finish(self):
            self.done = True

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: Run(**options)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", fake)
    runs = trained(tmp_path / "run", "catch/bootdqn", {"ensemble.members": 2}, steps=(100, 200))
    export.main([runs], tmp_path / "out", to="wandb")
    assert [run.options["config"]["seed"] for run in made] == [0, 1]
    assert all(run.done and run.options["mode"] == "offline" for run in made)
    assert made[0].options["config"]["ensemble"]["members"] == 2
    assert [step for step, _ in made[0].logged] == [100, 200]
    assert set(made[0].logged[0][1]) == {"eval/individual", "eval/vote", "agent_steps"}


def test_wandb_that_is_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="run `pip install wandb`"):
        export.main([write(tmp_path / "run", [row()])], tmp_path / "out", to="wandb")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "rlable"}, "did you mean rliable"),
        ({"to": "csv", "member": 1}, "export --member: expected with --to safetensors only"),
        ({"to": "csv", "last": 3}, "export --last: expected with --to rliable only"),
        ({"to": "rliable", "last": 0}, "expected at least 1 evaluation"),
        ({"to": "rliable", "normalise": "z"}, "export --normalise: no normalisation .z."),
        ({"to": "safetensors"}, "expected one run and --member"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export.main([tmp_path], tmp_path / "out", **options)


def test_exports_name_a_folder_without_rows(tmp_path):
    with pytest.raises(RowsError, match="no rows.parquet in or below it"):
        export.main([tmp_path], tmp_path / "out", to="csv")


# One member.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    options = {"seeds": [3, 4], "schedule.steps": 40, "ensemble.members": 3, "replay.start": 20}
    options |= {"explore.hold": 20, "out": str(tmp_path_factory.mktemp("runs")), "log.every": 1000}
    return cerl.train("catch/cerl", options)


def test_an_exported_member_acts_as_it_does_in_its_run(run, tmp_path):
    export.main([run], tmp_path / "own", to="safetensors", member=2, seed=4)
    ours = member.load(tmp_path / "own", device="cpu")
    whole = cerl.load(run, policy="individual", member=2, seed=4, device="cpu")
    other = cerl.load(run, policy="individual", member=1, seed=4, device="cpu")
    observations = torch.rand(200, *ours.spec.observation) > 0.9
    assert torch.equal(ours.act(observations), whole.act(observations))
    assert not torch.equal(ours.act(observations), other.act(observations))


def test_the_file_of_a_member_is_read_by_the_format_alone(run, tmp_path):
    """Parsed here by the description of the format, without the code that wrote it."""
    member.export(run, tmp_path, member=1)
    content = (tmp_path / member.PARAMETERS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    facts = header.pop("__metadata__")
    assert (facts["seed"], facts["member"], facts["members"]) == ("3", "1", "3")
    entry = header["hidden.1.weight"]
    start, end = entry["data_offsets"]
    values = np.frombuffer(content[8 + length + start : 8 + length + end], "<f4")
    whole = cerl.load(run, seed=3, device="cpu")._net.state_dict()["hidden.1.weight"]  # pyright: ignore
    assert entry["dtype"] == "F32" and entry["shape"] == list(whole.shape[2:])
    assert np.array_equal(values.reshape(entry["shape"]), whole[0, 1].numpy())
    assert max(e["data_offsets"][1] for e in header.values()) == len(content) - 8 - length


def test_the_library_reads_the_file_of_a_member(run, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    member.export(run, tmp_path, member=1)
    ours, _ = tensors.read(tmp_path / member.PARAMETERS)
    theirs = library.load_file(tmp_path / member.PARAMETERS)
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_the_script_plays_an_episode(run, tmp_path):
    member.export(run, tmp_path / "own", member=0)
    command = [sys.executable, str(tmp_path / "own" / member.SCRIPT)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("return 1\n", "return -1\n")  # of Catch


def test_members_and_seeds_that_a_run_has_not_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="export --member: expected 0 to 2, got 3"):
        member.export(run, tmp_path, member=3)
    with pytest.raises(ConfigError, match="expected one of the run's seeds 3 4, got 0"):
        member.export(run, tmp_path, member=0, seed=0)
    with pytest.raises(ConfigError, match="expected another folder than that of the run"):
        member.export(run, run, member=0)


def test_damaged_files_of_a_member_are_refused(run, tmp_path):
    member.export(run, tmp_path, member=0)
    path = tmp_path / member.PARAMETERS
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], whole[:4], b"\xff" * 64, whole + b"0"):
        path.write_bytes(content)
        with pytest.raises(TensorsError, match="damaged, or no safetensors file"):
            member.load(tmp_path)
    path.unlink()
    with pytest.raises(TensorsError, match="expected a safetensors file"):
        member.load(tmp_path)
    kept, facts = {"one": torch.zeros(3)}, {"seed": "3", "member": "0"}
    tensors.write(path, kept, facts)
    with pytest.raises(TensorsError, match="expected the parameters of the network"):
        member.load(tmp_path)
    tensors.write(path, kept, {"seed": "9", "member": "0"})
    with pytest.raises(TensorsError, match="seed 9, member 0 are none of"):
        member.load(tmp_path)


def test_tensors_of_every_type_survive(tmp_path):
    kept = {f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in tensors.TYPES.values()}
    kept |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    tensors.write(tmp_path / "file", kept, {"a": "b"})
    found, facts = tensors.read(tmp_path / "file")
    assert facts == {"a": "b"} and set(found) == set(kept)
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


# Runs of CleanRL.


class Events:
    """A file of TensorBoard events as torch's SummaryWriter, which CleanRL uses, writes it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "events.out.tfevents.1.host.1.0"
        self.file = self.path.open("ab")
        self.records = RecordWriter(self.file)
        self.event(Event(wall_time=1000.0, file_version="brain.Event:2"))

    def event(self, event: Event) -> None:
        self.records.write(event.SerializeToString())

    def scalar(self, tag: str, value: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self.event(Event(wall_time=1000.0 + step, step=step, summary=summary))

    def arguments(self, **options) -> None:
        text = "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in options.items())
        value = Summary.Value(tag="hyperparameters/text_summary")
        value.tensor.string_val.append(text.encode())
        self.event(Event(wall_time=1000.0, summary=Summary(value=[value])))


def clean_run(
    top: Path, name: str, episodes: dict[int, float], *, end: int = 1000, **options
) -> Path:
    """A run of CleanRL. Args: episodes, returns by the step at which they end; end, its last
    event; options, its arguments (none: it logs none)."""
    events = Events(top / name)
    if options:
        events.arguments(**options)
    for step, value in episodes.items():
        events.scalar("charts/episodic_return", value, step)
        events.scalar("charts/episodic_length", 50, step)
    events.scalar("losses/td_loss", 0.5, end)
    events.file.close()
    return events.path


def test_training_episodes_are_averaged_over_windows(tmp_path):
    clean_run(tmp_path / "logs", "Hopper-v4__sac__1__17", {100: 1.0, 150: 3.0, 200: 8.0, 990: 5.0})
    (folder,) = imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=100)
    found = results.read(folder / "rows.parquet", results.ROWS).to_pylist()
    shown = [(row["step"], row["return"], row["episodes"], row["return_std"]) for row in found]
    # A window holds its last step and not its first; no episode ended in those from 200 to 900.
    assert shown == [(100, 1.0, 1, 0.0), (200, 5.5, 2, 2.5), (1000, 5.0, 1, 0.0)]
    first = found[0]
    assert (first["preset"], first["env"], first["seed"]) == ("cleanrl sac", "mujoco/Hopper-v4", 1)
    assert (first["policy"], first["role"], first["members"]) == ("train", "member", 1)
    assert (first["length"], first["wall_seconds"], first["version"]) == (
        *(50.0, 100.0),
        "imported from cleanrl",
    )


def test_a_window_that_a_run_did_not_finish_is_left_out(tmp_path):
    ended = {k: 0.0 for k in (50, 150, 210)}
    clean_run(tmp_path / "logs", "a__dqn__1__17", ended, end=250)
    # The run of seed 2 has ended as planned, within an episode of its last event.
    clean_run(tmp_path / "logs", "a__dqn__2__17", ended, end=250, total_timesteps=300, seed=2)
    folders = imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=100)
    steps = [pq.read_table(folder / "rows.parquet")["step"].to_pylist() for folder in folders]
    assert steps == [[100, 200], [100, 200, 300]]


@pytest.mark.parametrize("number, rounded", [(0.3, 1), (1, 1), (3, 5), (9_999, 10_000), (11, 20)])
def test_windows_are_round(number, rounded):
    assert cleanrl.rounded_up(number) == rounded


def test_imported_curves_stand_beside_ours(tmp_path):
    top, ours = tmp_path / "logs", []
    for seed in (1, 2):
        episodes = {step: float(step) for step in range(90, 1000, 100)}
        clean_run(top, f"catch__dqn__{seed}__17", episodes, lr=0.1, seed=seed, env_id="catch")
    imports.main(top, tmp_path / "out", source="cleanrl", every=100)
    ours = write(tmp_path / "ours", [row(step=1000), row(policy="train", step=500)])
    found, notes = cells(load_rows([tmp_path / "out", ours]))
    theirs = next(cell for cell in found if cell.name == "cleanrl dqn")
    assert theirs.env == "gym/catch" and theirs.seeds == (1, 2) and theirs.options is None
    assert theirs.curves["individual"].steps.tolist() == list(range(100, 1001, 100))
    assert theirs.curves["individual"].returns[:, 0].tolist() == list(range(90, 1000, 100))
    # Rows of our own training episodes are still no evaluations.
    single = next(cell for cell in found if cell.name == "catch/ddqn")
    assert single.curves["individual"].steps.tolist() == [1000]
    said = "cleanrl dqn on gym/catch: returns of training episodes, with exploration"
    assert sum(said in note for note in notes) == 1 and "catch/ddqn" not in "".join(notes)
    tables.main([tmp_path / "out", ours], tmp_path / "report", until=500)
    assert "cleanrl dqn" in (tmp_path / "report" / "table.md").read_text()
    export.main([tmp_path / "out"], tmp_path / "zoo", to="dqn_zoo")
    assert len((tmp_path / "zoo" / "cleanrl-dqn.csv").read_text().splitlines()) == 21


def test_other_arguments_make_another_setting_and_another_seed_does_not(tmp_path):
    for k, (seed, lr) in enumerate([(1, 0.1), (2, 0.1), (3, 0.2)]):
        clean_run(
            tmp_path / "logs",
            f"a__b__c__{k}",
            {90: 1.0},
            seed=seed,
            lr=lr,
            env_id="x",
            exp_name="y",
        )
    imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=100)
    found, _ = cells(load_rows([tmp_path / "out"]))
    assert sorted(cell.seeds for cell in found) == [(1, 2), (3,)]


def test_damaged_events_are_named_and_what_is_before_them_counts(tmp_path):
    episodes = {step: 1.0 for step in range(50, 1000, 50)}
    path = clean_run(tmp_path / "logs", "a__dqn__1__17", episodes)
    content = path.read_bytes()
    for damaged, said in (
        (content[:-5], "its last record is cut off"),
        (content[:900] + b"\0\0\0\0" + content[904:], "a checksum does not agree"),
    ):
        path.write_bytes(damaged)
        args = tmp_path / "logs", tmp_path / "out"
        text = printed(imports.main, *args, source="cleanrl", every=100)
        assert f"{path}: " in text and said in text
        rows = pq.read_table(tmp_path / "out" / "a__dqn__1__17" / "rows.parquet")
        assert 0 < rows.num_rows <= 10


def test_logs_that_cannot_be_read_are_named_and_stop_none_of_the_others(tmp_path):
    top = tmp_path / "logs"
    clean_run(top, "a__dqn__1__17", {50: 1.0, 90: 2.0})
    clean_run(top, "nameless", {50: 1.0})
    clean_run(top, "b__dqn__1__17", {})
    (top / "c__dqn__1__17").mkdir()
    (top / "c__dqn__1__17" / "events.out.tfevents.1").symlink_to(top / "nowhere")
    text = printed(imports.main, top, tmp_path / "out", source="cleanrl", every=100)
    assert text.count("left out") == 3 and text.count("to step") == 1
    for name in ("nameless", "b__dqn__1__17", "c__dqn__1__17"):
        assert f"note: {top / name}" in text or f"'{top / name}" in text
    with pytest.raises(ConfigError, match="no run that can be imported; see the notes"):
        imports.main(top / "nameless", tmp_path / "out", source="cleanrl")
    with pytest.raises(ConfigError, match="no files of cleanrl in or below it"):
        imports.main(tmp_path / "out", tmp_path / "out", source="cleanrl")


def test_importing_again_replaces_what_was_imported_and_nothing_else(tmp_path):
    clean_run(tmp_path / "logs", "a__dqn__1__17", {50: 1.0})
    (folder,) = imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=50)
    assert pq.read_table(folder / "rows.parquet").num_rows == 1
    clean_run(tmp_path / "logs", "a__dqn__1__17", {150: 1.0})
    (folder,) = imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=50)
    assert pq.read_table(folder / "rows.parquet").num_rows == 2
    write(folder, [row()])
    with pytest.raises(ConfigError, match="no run that can be imported"):
        imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=100)
    assert pq.read_table(folder / "rows.parquet")["preset"].to_pylist() == ["catch/ddqn"]


@pytest.mark.parametrize(
    "name, env",
    [
        ("ALE/Pong-v5", "atari/Pong"),
        ("BeamRiderNoFrameskip-v4", "atari/BeamRider"),
        ("Pong-v5", "atari/Pong"),
        ("MinAtar/SpaceInvaders-v1", "minatar/space_invaders"),
        ("dm_control/cheetah-run-v0", "dmc/cheetah-run"),
        ("HalfCheetah-v4", "mujoco/HalfCheetah-v4"),
        ("CartPole-v1", "gym/CartPole-v1"),
    ],
)
def test_environments_are_called_as_ours(name, env):
    assert foreign.env_name(name) == env


# Logs of the authors' code.


def logged(folder: Path, name: str, content, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def scores(folder: Path) -> list[tuple]:
    table = results.read(folder / "rows.parquet", results.ROWS)
    names = ("seed", "policy", "role", "member", "step", "return", "episodes")
    return [tuple(line[name] for name in names) for line in table.to_pylist()]


def test_the_continuous_logs_of_an_ensemble(tmp_path):
    config = {"env_name": "Hopper-v4", "n": 10, "cel": True, "tandem": False, "eval_episodes": 30}
    for seed in (0, 7):
        entry = {"step": 20_000, "return": 3.0, "avg/return": 3.0, "random/return": 2.0}
        entry |= {"random/return_4": 1.0, "random/pairwise_dist": float("nan"), "q_mean": 1.0}
        logged(tmp_path / "logs", f"{seed}_stats.json", [entry], **config, seed=[0, 7])
        logged(tmp_path / "logs", f"{seed}.txt", "20000 3.0\n")
    (folder,) = imports.main(tmp_path / "logs", tmp_path / "out", source="authors")
    assert scores(folder) == [
        (0, "random", "random", -1, 20_000, 2.0, 30),
        (0, "mean", "aggregate", -1, 20_000, 3.0, 30),
        (7, "random", "random", -1, 20_000, 2.0, 30),
        (7, "mean", "aggregate", -1, 20_000, 3.0, 30),
    ]
    (cell,), _ = cells(load_rows([folder]))
    assert (cell.name, cell.env, cell.members) == ("authors cerl", "mujoco/Hopper-v4", 10)
    assert set(cell.curves) == {"random", "mean"}


def test_the_continuous_logs_of_a_single_agent_a_tandem_and_text_alone(tmp_path):
    entry = {"step": 5, "return": 3.0, "avg/return": 3.0, "random/return": 3.0}
    logged(tmp_path / "logs" / "sac", "0_stats.json", [entry], env_name="cheetah-run", n=1)
    entry = {"step": 5, "return": 3.0, "active/return": 3.0, "passive/return": 1.0}
    config = {"env_name": "Ant-v4", "n": 2, "tandem": True}
    logged(tmp_path / "logs" / "tandem", "0_stats.json", [entry], **config)
    logged(tmp_path / "logs" / "text", "3.txt", "5 1.5\n10 2.5\n", env_name="Ant-v4", n=10)
    one, two, text = imports.main(tmp_path / "logs", tmp_path / "out", source="authors")
    assert scores(one) == [(0, "individual", "member", 0, 5, 3.0, 30)]
    assert [line[1:6] for line in scores(two)] == [
        ("individual", "active", 0, 5, 3.0),
        ("individual", "passive", 1, 5, 1.0),
    ]
    assert [line[:6] for line in scores(text)] == [
        (3, "mean", "aggregate", -1, 5, 1.5),
        (3, "mean", "aggregate", -1, 10, 2.5),
    ]
    found, _ = cells(load_rows([one, two, text]))
    named = {(cell.name, cell.env, cell.members) for cell in found}
    assert named == {
        ("authors sac", "dmc/cheetah-run", 1),
        ("authors tandem", "mujoco/Ant-v4", 2),
        ("authors ensemble", "mujoco/Ant-v4", 10),
    }


def test_the_discrete_logs(tmp_path):
    agent = "ensemble_rl-agents-boot_dqn_agent-JaxBootDQNAgent"
    game = "dopamine-discrete_domains-atari_lib-create_atari_environment"
    runner = "dopamine-discrete_domains-run_experiment-Runner"
    config = {game: {"game_name": "Pong"}, runner: {"training_steps": 1000}, "seed": 4}
    config[agent] = {"ensemble_size": 10, "aux_loss": "final"}
    both = {"Eval/Vote/AverageReturns": 5.0, "Eval/Vote/NumEpisodes": 9}
    both |= {"Eval/Random/AverageReturns": 2.0, "Eval/Random/NumEpisodes": 8}
    log = [{"iteration": 1, **both}, {"iteration": 2, "Train/AverageReturns": 1.0}]
    logged(tmp_path / "logs" / "Pong" / "0", "stats.json", log, **config)
    logged(tmp_path / "logs" / "Pong" / "1", "stats.json", log, **{**config, "seed": 5})
    folders = imports.main(tmp_path / "logs", tmp_path / "out", source="authors")
    assert [folder.name for folder in folders] == ["Pong-0", "Pong-1"]
    assert scores(folders[0]) == [
        (4, "random", "random", -1, 1000, 2.0, 8),
        (4, "vote", "aggregate", -1, 1000, 5.0, 9),
    ]
    (cell,), _ = cells(load_rows(folders))
    assert (cell.name, cell.env, cell.members, cell.seeds) == (
        "authors cerl",
        "atari/Pong",
        10,
        (4, 5),
    )
    assert pq.read_table(folders[0] / "rows.parquet")["frames"].to_pylist() == [4000, 4000]


def test_logs_of_the_authors_that_cannot_be_read_are_named(tmp_path):
    top, good = tmp_path / "logs", [{"step": 5, "avg/return": 1.0, "random/return": 1.0}]
    logged(top / "good", "0_stats.json", good, env_name="Ant-v4", n=3)
    logged(top / "good", "1_stats.json", '[{"step": 5, "avg/ret')
    logged(top / "good", "2_stats.json", {"step": 5})
    logged(top / "good", "3.txt", "5 1.0\n10 many\n")
    logged(top / "bare", "0_stats.json", good)
    logged(top / "empty", "0_stats.json", [{"step": 5}], env_name="Ant-v4", n=3)
    text = printed(imports.main, top, tmp_path / "out", source="authors")
    assert "good/1_stats.json: damaged, not readable as JSON" in text
    assert "good/2_stats.json: expected a JSON list of objects" in text
    assert "good/3.txt, line 2: expected a step and a return, got '10 many'" in text
    assert "bare/config.json: no such file" in text and "empty: no evaluations" in text
    assert text.count("to step 5") == 1
    text = printed(imports.main, top / "bare", tmp_path / "out", source="authors", env="gym/X-v0")
    assert "on gym/X-v0, seed 0, to step 5" in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "clean"}, "did you mean cleanrl"),
        ({"source": "authors", "every": 5}, "--every: expected with --from cleanrl only"),
        ({"source": "cleanrl", "env": "x"}, "--env: expected with --from authors only"),
        ({"source": "cleanrl", "every": -1}, "expected 0 or more agent steps"),
    ],
)
def test_arguments_of_an_import_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        imports.main(tmp_path, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="expected a folder of logs"):
        imports.main(tmp_path / "no", tmp_path / "out", source="cleanrl")


def test_imported_rows_are_a_table_of_results(tmp_path):
    clean_run(tmp_path / "logs", "a__dqn__1__17", {50: float("nan")})
    (folder,) = imports.main(tmp_path / "logs", tmp_path / "out", source="cleanrl", every=100)
    table = results.read(folder / "rows.parquet", results.ROWS)
    assert table.schema.remove_metadata() == results.ROWS and results.options_of(table) is None
    assert json.loads((folder / "source.json").read_text())["program"] == "cleanrl"
    assert np.isnan(table["return"][0].as_py()) and isinstance(table, pa.Table)
