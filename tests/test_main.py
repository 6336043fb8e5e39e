"""The command line: what it calls with which arguments, and its errors."""

import dataclasses
import errno
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import cerl
from cerl import __main__ as command
from cerl import config
from cerl.bench import BENCHMARKS
from cerl.bench import runs as bench
from cerl.config import load, preset
from cerl.config.errors import keys
from cerl.config.form import form_of
from cerl.head_kinds import HEAD_KINDS
from cerl.record import results as rows
from cerl.record.folder import changeable, dump

ROOT = Path(__file__).resolve().parent.parent
ROW_TYPES = list(zip(rows.ROWS.names, rows.ROWS.types, strict=True))


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces a module of cerl by functions that note how they are called."""

    def replace(name, **functions):
        module = types.ModuleType(f"cerl.{name}")
        for key, value in functions.items():
            setattr(module, key, value)
        package, _, last = f"cerl.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"cerl.{name}", module)
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)

    return replace


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    dump(load("catch/cerl"), folder / "config.yaml")
    return folder


def refused(capsys, *arguments):
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def test_train_hands_the_overridden_config_to_the_loop(stand_in, capsys):
    seen = []
    stand_in("training", train=lambda run: seen.append(run) or Path("runs/x"))
    line = "train minatar/cerl --env.name asterix --seeds 0 1 2 3 --optim.lr 1e-4 "
    line += "--agent.no-double --net.hidden 64 32 --schedule.steps 2_000_000"
    assert command.main(line.split()) == 0
    overrides = {"env.name": "asterix", "seeds": [0, 1, 2, 3], "optim.lr": 1e-4}
    overrides |= {"agent.double": False, "net.hidden": [64, 32], "schedule.steps": 2_000_000}
    assert seen == [load("minatar/cerl", overrides)]
    assert capsys.readouterr().out == "runs/x\n"


def test_train_without_options_is_the_preset(stand_in):
    seen = []
    stand_in("training", train=seen.append)
    names = [
        "catch/tandem",
        "minatar/qrdqn",
        "atari/paper-cerl",
        "atari/machado-dqn",
        "gym/cartpole",
    ]
    for name in names:
        assert command.main(["train", name]) == 0
    assert seen == [load(name) for name in names]


def test_train_takes_the_config_file_of_a_run(stand_in, run_folder):
    seen = []
    stand_in("training", train=seen.append)
    assert command.main(["train", str(run_folder / "config.yaml")]) == 0
    assert seen == [load("catch/cerl")]


def test_resume_hands_on_folder_changes_and_trust(stand_in, run_folder, capsys):
    seen = []
    stand_in("training", resume=lambda folder, **more: seen.append((folder, more)) or folder)
    run = str(run_folder)
    for line in (
        f"train --resume {run}",
        f"train --resume {run} --schedule.steps 2_000_000 --log.no-save-replay --device cpu",
        f"train --trust --resume {run} --log.checkpoint-every=7",
        f"train --resume {run} --trust",
    ):
        assert command.main(line.split()) == 0
    changes = {"schedule.steps": 2_000_000, "log.save_replay": False, "device": "cpu"}
    assert seen == [
        (run_folder, {"changes": {}, "trusted": False}),
        (run_folder, {"changes": changes, "trusted": False}),
        (run_folder, {"changes": {"log.checkpoint_every": 7}, "trusted": True}),
        (run_folder, {"changes": {}, "trusted": True}),
    ]
    assert capsys.readouterr().out == f"{run_folder}\n" * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seeds 0 7", "seeds cannot change in a run; expected one of schedule.steps, log.*"),
        ("--optim.lr 1 --agent.no-double", "optim.lr, agent.double cannot change in a run"),
        ("--env.rows=3", "env.rows cannot change in a run"),
        ("--schedule.steps 3", "schedule.steps: the run would end before its first update"),
        ("--log.every 0", "log.every: expected greater than or equal to 1, got 0"),
        ("--device gpu", "device: expected auto, cpu, cuda"),
        ("more", "expected one run folder, got"),
    ],
)
def test_resume_refuses_other_changes_by_name(run_folder, capsys, options, message):
    assert message in refused(capsys, "train", "--resume", str(run_folder), *options.split())


def test_resume_and_eval_want_a_run_whose_config_is_whole(run_folder, capsys):
    assert "no such folder" in refused(capsys, "train", "--resume", str(run_folder / "no"))
    assert "no config.yaml" in refused(capsys, "train", "--resume", str(run_folder.parent))
    assert "got nothing" in refused(capsys, "train", "--resume")
    assert "--trust, which --resume takes" in refused(capsys, "train", "catch/ddqn", "--trust")
    path = run_folder / "config.yaml"
    path.write_text(path.read_text().replace("gamma: 0.99", "gamma: 0.5"))
    for words in (["train", "--resume"], ["eval"]):
        assert "changed or cut since the run wrote it" in refused(capsys, *words, str(run_folder))


def test_a_changed_config_still_starts_another_run(stand_in, run_folder):
    seen = []
    stand_in("training", train=seen.append)
    path = run_folder / "config.yaml"
    path.write_text(path.read_text().replace("gamma: 0.99", "gamma: 0.5"))
    assert command.main(["train", str(path)]) == 0
    assert seen == [load("catch/cerl", {"loss.gamma": 0.5})]


def test_help_of_resume_shows_what_may_change(run_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["train", "--resume", str(run_folder), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    shown = set(re.findall(r"--([a-z][\w.-]*)", out)) - {"help", "resume"}
    known = {key.replace("_", "-") for key in keys(config.Config) if changeable(key)}
    assert {name.replace("no-", "") for name in shown} == known - {"log"}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gym/cartpole", "conf_strangers_tasks:Mine-v0"),
        ("game/ddqn", "conf_strangers_tasks:rules"),
    ],
)
def test_a_strangers_module_is_imported_with_trust_only(
    name, task, run_folder, capsys, tmp_path, monkeypatch
):
    (tmp_path / "conf_strangers_tasks.py").write_text("raise RuntimeError('its code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    run = load(name, {"env.name": task})
    dump(run, run_folder / "config.yaml")
    commands = (["train", "--resume", str(run_folder)], ["eval", str(run_folder)])
    for words in commands:
        assert "its code ran" in refused(capsys, *words)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    for words in commands:
        text = refused(capsys, *words)
        assert "it would import the module conf_strangers_tasks and run its code" in text
        assert "its code ran" in refused(capsys, *words, "--trust")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("trian catch/ddqn", "no command 'trian'; did you mean train?"),
        ("train catch/dqn", "did you mean catch/ddqn"),
        ("train --env.name breakout", "expected a preset first"),
        ("train minatar/ddqn --env.name brekout", "did you mean breakout?"),
        ("train minatar/ddqn --seeds 1 1", "seeds: 1 is given 2 times"),
        ("train minatar/ddqn --seeds", "at least one seed"),
        ("train minatar/ddqn --loss.gamma 2", "loss.gamma: expected less than or equal to 1"),
        ("train atari/cerl --ensemble.shared-layers 4", "expected at most 3 with heads cerl"),
        ("train catch/ddqn --device gpu", "device: expected auto, cpu, cuda or cuda:NUMBER"),
        ("eval nowhere", "expected a run folder, got no such folder"),
        ("report nowhere", "nowhere"),
        ("report --out x", "expected at least one run folder"),
        ("report a --last 0", "expected a number of evaluations, at least 1, got '0'"),
        ("report a --last -1", "expected a number of evaluations, at least 1, got '-1'"),
        (f"report a --last {'9' * 5000}", "report --last: expected a number of evaluations"),
        ("report a --until 0", "expected a number of agent steps, at least 1, got '0'"),
        ("report a --until x", "expected a number of agent steps, at least 1, got 'x'"),
        ("report a --out /dev/null", "report --out: expected a folder that can be made"),
        ("sweep catch/ddqn --out /dev/null/x", "sweep --out: expected a folder that can be made"),
        ("train catch/ddqn --out /dev/null", "--out: expected a folder that can be made"),
        ("train catch/ddqn --seeds 0 --seeds 1", "--seeds: given 2 times"),
        ("train catch/ddqn --agent.double --agent.no-double", "--agent.double: given 2 times"),
        ("train catch/ddqn --optim.lr=1 --optim.lr 2 --optim.lr 3", "--optim.lr: given 3 times"),
        ("sweep catch/ddqn --envs a --envs b", "--envs: given 2 times"),
        ("report a --oot x", "no such option '--oot'"),
        ("list presets --all", "list: no such option '--all'"),
        ("train catch/ddqn --resume runs/x", "expected catch/ddqn or --resume runs/x, got both"),
        ("train catch/ddqn catch/cerl", "expected one PRESET, got catch/ddqn catch/cerl"),
        ("report a --out", "report --out: expected one folder, got nothing"),
        ("report a --last 1 --last 2", "--last: given 2 times"),
        ("eval --episodes 3", "eval: expected a run folder first"),
        ("bench updat", "no benchmark 'updat'; did you mean update?"),
        ("bench --calls 3", "no benchmark '--calls'"),
        ("sweep --envs breakout", "expected at least one preset"),
        ("sweep catch/ddqn --out a b", "expected one folder"),
        ("sweep minatar/ddqn --envs", "expected a value, got nothing"),
        ("sweep minatar/ddqn mujoco/sac --envs breakout", "no Gym-MuJoCo robot is called"),
        ("sweep minatar/ddqn --envs pong", "expected asterix, breakout"),
        ("list presets games", "expected presets, studies or envs, got 'games'"),
    ],
)
def test_mistakes_are_one_clear_error(arguments, message, capsys):
    assert message in refused(capsys, *arguments.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("train catch/ddqn --lr 1", ("--lr", "--optim.lr")),
        ("train catch/ddqn --schedule.steps 1e6", ("--schedule.steps", "1e6")),
    ],
)
def test_options_that_cannot_be_read_exit_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert all(word in out + err for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device exists here")
def test_device_that_is_not_there_is_refused(capsys, tmp_path):
    arguments = ("train", "catch/ddqn", "--device", "cuda", "--out", str(tmp_path))
    assert "cuda" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_exit_130(stand_in, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    stand_in("training", train=interrupted)
    assert command.main(["train", "catch/ddqn"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_expected_errors_have_no_traceback_unless_asked(stand_in, capsys, monkeypatch):
    def full(run):
        raise OSError(28, "No space left on device")

    stand_in("training", train=full)
    assert "No space left on device" in refused(capsys, "train", "catch/ddqn")
    monkeypatch.setenv("CERL_DEBUG", "1")
    with pytest.raises(OSError, match="No space left"):
        command.main(["train", "catch/ddqn"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "runs/x: Permission denied; it has to be readable and writable for you"),
        (errno.EROFS, "runs/x: Read-only file system; the file system is read-only; copy"),
    ],
)
def test_errors_of_the_system_name_the_file_and_what_to_do(stand_in, capsys, number, words):
    def fails(run):
        raise OSError(number, os.strerror(number), "runs/x")

    stand_in("training", train=fails)
    text = refused(capsys, "train", "catch/ddqn")
    assert words in text and "Errno" not in text


def test_errors_show_control_characters_and_brackets_as_they_are(stand_in, capsys):
    def fails(run):
        raise ValueError("no licence at [/opt/sim] \x1b[31m\r\udc80 [bold]\nsecond line")

    stand_in("training", train=fails)
    text = refused(capsys, "train", "catch/ddqn")
    assert r"error: no licence at [/opt/sim] \x1b[31m\r\udc80 [bold]" in text
    assert "\nsecond line\n" in text


def test_faults_of_ours_keep_their_traceback(stand_in):
    stand_in("training", train=lambda run: run["no"])
    with pytest.raises(TypeError):
        command.main(["train", "catch/ddqn"])


def test_help_of_a_preset_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["train", "minatar/cerl", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    words = " ".join(out.replace("│", " ").split())
    run = load("minatar/cerl")
    for path in keys(type(run), kinds=run.kinds):
        if "." not in path or path in ("env.family", "env.observe") or path.startswith("origin."):
            continue
        assert f"--{path.replace('_', '-')}" in out, path
    assert "agent steps of one seed from one round of updates to the next (default: 4)" in words
    assert "E, environments per seed (default: 8)" in words
    assert f"{{{','.join(HEAD_KINDS)}}}" in out
    assert all(f"{kind}: {about.text}" in words for kind, about in HEAD_KINDS.items())
    assert "--env.family" not in out and "--origin" not in out
    # Nothing of other kinds, whose names are offered.
    for path in ("agent.log-std-min", "agent.quantiles", "encoder.layers", "optim.momentum"):
        assert f"--{path}" not in out
    assert "{frames,mlp,gru,transformer,fox}" in out and "{adam,rmsprop}" in out


def test_form_has_the_values_of_the_model():
    for name in ("minatar/cerl", "atari/paper-qrdqn", "gym/cartpole", "catch/tandem"):
        run = load(name)
        _, default = form_of(run)
        tree = dataclasses.asdict(default)
        tree["env"]["family"] = run.env.family
        assert config.validated(tree, where=name) == run


def test_eval_hands_on_only_what_is_given(stand_in, run_folder, capsys):
    seen = []

    def evaluate(folder, *, trusted, **asked):
        assert not trusted
        seen.append((folder, asked))
        result = types.SimpleNamespace(
            returns=torch.tensor([[[1.0, 3.0], [5.0, torch.nan]]]),
            lengths=torch.tensor([[[9.0, 9.0], [9.0, torch.nan]]]),
        )
        return {"individual": result}

    stand_in("evaluate_run", evaluate_run=evaluate)
    assert command.main(["eval", str(run_folder)]) == 0
    options = ["--episodes", "20", "--policies", "vote", "mean"]
    assert command.main(["eval", str(run_folder), *options]) == 0
    assert seen == [
        (run_folder, {}),
        (run_folder, {"episodes": 20, "policies": ("vote", "mean")}),
    ]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    cells = [[word for word in row if word not in "│┃"] for row in rows]
    assert ["individual", "0", "2.000", "1.000", "2", "9.0"] in cells
    assert ["individual", "1", "5.000", "0.000", "1", "9.0"] in cells
    assert "policies.0" in refused(capsys, "eval", str(run_folder), "--policies", "best")
    assert "eval.epsilon" in refused(capsys, "eval", str(run_folder), "--epsilon", "2")


def test_what_returns_to_its_default_is_told_once_where_a_run_starts(
    stand_in, capsys, tmp_path, monkeypatch
):
    """The sentence goes to stderr, so that stdout keeps the run folder alone."""
    monkeypatch.chdir(tmp_path)
    stand_in("training", train=lambda run: Path(str(run.ensemble.fork)))
    stand_in("sweep.local", sweep=lambda runs, out, **more: [], check_tasks=lambda configs: None)
    own = ["--ensemble.heads", "own"]
    assert command.main(["train", "minatar/cerl-both", *own]) == 0
    out, err = capsys.readouterr()
    assert out == "final\n"
    assert err.startswith("note: minatar/cerl-both: ensemble.fork: both has no effect unless ")
    assert err.count("\n") == 1
    # With these heads both presets train alike, and the sentence holds for one of them only.
    words = ["minatar/cerl-both", "minatar/bootdqn", "--envs", "asterix", "freeway", *own]
    assert command.main(["sweep", *words]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first == err.rstrip("\n") + " (in 2 of 4 cells)"
    assert second.startswith("note: 2 cells train like others and are left out")
    # A config that is refused has its error only.
    assert "note" not in refused(capsys, "train", "minatar/cerl-both", *own, "--seeds", "1", "1")


def test_report_hands_on_folders_and_options(stand_in):
    reported = []
    stand_in(
        "report.tables", main=lambda folders, out, **more: reported.append((folders, out, more))
    )
    plain = {"at": None, "normalise": "", "mix": False, "figures": (), "formats": ("png",)}
    plain |= {"latex": False, "html": False, "method": "t"}
    assert command.main(["report", "runs/study"]) == 0
    assert command.main(["report", "a", "b", "--last", "3", "--until", "20_000"]) == 0
    assert command.main(["report", "a", "--out", "here", "--x", "ensemble.members"]) == 0
    assert reported == [
        ([Path("runs/study")], Path("runs/study"), {"last": 1, "until": 0, "x": "", **plain}),
        ([Path("a"), Path("b")], Path("report"), {"last": 3, "until": 20_000, "x": "", **plain}),
        ([Path("a")], Path("here"), {"last": 1, "until": 0, "x": "ensemble.members", **plain}),
    ]


def test_bench_shows_help_of_each_measure(monkeypatch, capsys):
    seen = []

    def measure(*, games: int = 8) -> None:
        """Times something.

        Args:
            games: games that step together
        """
        seen.append(games)

    monkeypatch.setattr(bench, "env", measure)
    assert command.main(["bench", "env", "--games", "3"]) == 0
    assert seen == [3]
    with pytest.raises(SystemExit) as caught:
        command.main(["bench", "env", "--help"])
    assert caught.value.code == 0
    assert "games that step together" in capsys.readouterr().out


def test_list_names_every_preset_with_its_description(capsys):
    assert command.main(["list", "presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(preset.presets())
    for line, name in zip(lines, preset.presets(), strict=True):
        assert line.split()[0] == name
        assert line.endswith(preset.description(name))


def test_list_names_every_study_with_its_description(capsys):
    assert command.main(["list", "studies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset.studies()
    assert "worse than a single agent" in lines[preset.studies().index("curse")]
    assert command.main(["list", "studies", "presets"]) == 0
    both = capsys.readouterr().out.splitlines()
    assert both.index("presets:") == 0 and both[both.index("studies:") + 1 :] == lines


def test_help_lists_what_there_is(capsys):
    for words in ([], ["--help"], ["help"]):
        assert command.main(words) == 0
        out = capsys.readouterr().out
        lines = out.splitlines()[5 : 5 + len(command.COMMANDS)]
        assert [line.split()[0] for line in lines] == list(command.COMMANDS)
    known = {"train": ("presets", preset.presets()), "sweep": ("studies", preset.studies())}
    known["bench"] = ("benchmarks", list(BENCHMARKS))
    for name in command.COMMANDS:
        assert command.main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: cerl {name} ")
        what, names = known.get(name, ("nothing", []))
        listed = out.partition(f"\n{what}:\n")[2].splitlines()
        assert [line.split()[0] for line in listed] == names
    assert command.main(["sweep", "demo", "--help"]) == 0
    assert "--jobs N" in capsys.readouterr().out


def test_list_names_environments_of_every_family(capsys):
    assert command.main(["list", "envs"]) == 0
    out, _, named = capsys.readouterr().out.partition("\nlists, for --envs")
    families = dict(line.split(": ", 1) for line in out.splitlines())
    ours = {"catch", "minatar", "atari", "gym", "point_mass", "mujoco", "dmc", "memory", "popgym"}
    assert set(families) == ours | {"game"}
    assert families["minatar"] == "asterix breakout freeway seaquest space_invaders"
    assert "CartPole-v1" in families["gym"] and "Pendulum-v1" in families["gym"]
    for family, name in (("mujoco", "HalfCheetah-v4"), ("dmc", "cheetah-run")):
        assert name in families[family] or "pip install" in families[family]
    assert "  minatar-5: asterix breakout freeway seaquest space_invaders\n" in named
    assert "Young and Tian 2019" in named


def cerl_process(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "cerl", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, **options)


@pytest.mark.slow
def test_help_and_version_do_not_wait_for_torch():
    lines = [["--help"], ["list", "presets", "studies"], ["train", "catch/dqn"], ["bench"]]
    lines += [["train", "--help"], ["sweep", "--help"], ["report", "a", "--last", "0"], ["bech"]]
    probe = (
        f"import sys; from cerl.__main__ import main; print([main(line) for line in {lines}]); "
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment)
    assert done.returncode == 0
    assert done.stdout.decode().splitlines()[-1] == "[0, 0, 2, 0, 0, 0, 2, 2]"
    assert time.perf_counter() - start < 5  # 0.6 s on an idle core
    assert cerl_process("--version").stdout == f"cerl {cerl.__version__}\n"


def piped(*arguments, **options):
    """A command whose output nobody reads. Returns: exit code, what it said on stderr."""
    line = [sys.executable, "-c", "import sys; from cerl.__main__ import main; sys.exit(main())"]
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run(
            [*line, *map(str, arguments)],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_pipe_without_reader_is_no_error(tmp_path):
    row = {name: 1 if pa.types.is_integer(kind) else 1.0 for name, kind in ROW_TYPES}
    row |= {name: "member" for name, kind in ROW_TYPES if pa.types.is_string(kind)}
    row |= {name: False for name, kind in ROW_TYPES if pa.types.is_boolean(kind)}
    table = pa.Table.from_pylist([row | {"policy": "individual"}], schema=rows.ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert piped("train", "catch/ddqn", "--help") == (0, "")
    assert piped("report", tmp_path) == (0, "")
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "table.md").is_file()


def test_a_run_that_ends_well_does_so_without_a_reader(stand_in, monkeypatch):
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            return unread

    unread = os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", Gone())
    stand_in("training", train=lambda run: Path("runs/x"))
    assert command.main(["train", "catch/ddqn"]) == 0

    def lost(run):
        raise SystemExit(1)  # rich's, in the midst of training

    stand_in("training", train=lost)
    with pytest.raises(SystemExit):
        command.main(["train", "catch/ddqn"])
    os.close(unread)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_modules_are_imported_ends_at_once_without_traceback(tmp_path):
    (tmp_path / "slow").mkdir()
    # Stands in for torch, which catches whatever is raised while it is imported.
    (tmp_path / "slow" / "torch.py").write_text(
        "import sys, time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\nprint('went on')\n"
    )
    line = [sys.executable, "-c", "from cerl.__main__ import main; main(['train', 'catch/ddqn'])"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'slow'}:{ROOT}"}
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell that starts the tests in the background has them ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130
