"""The examples run as their first lines say and have their effects; own code is checked."""

import ast
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

import cerl
from cerl import draw
from cerl.config import ConfigError, EnsembleConfig, load
from cerl.config.form import overridden
from cerl.data import EnvSpec, Row
from cerl.explore import Moment, Noise, ruled
from cerl.heads import head_table
from cerl.record import trust
from cerl.record.folder import FILE, load_file
from cerl.replay import Replay
from cerl.sampler import Sampling, Uniform
from cerl.wiring import assemble, close

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
SMALL = {
    "device": "cpu",
    "seeds": [0, 1],
    "schedule.steps": 600,
    "replay.start": 100,
    "log.every": 300,
    "eval.every": 600,
    "eval.episodes": 2,
}
OWN = {
    "ensemble.heads": "to_mean:TO_MEAN",
    "replay.sampler.name": "own",
    "replay.sampler.by": "newest:Newest",
    "explore.rules": ["ladder:ladder"],
    "log.measures": ["sparsity:zero_share"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A user's folder with the examples in it, which is the current one."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    for path in FOLDER.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in [*names, "mine"]:
        sys.modules.pop(name, None)


def trained(name: str, **changes) -> Path:
    """Trains by the command of an example. Returns: its run folder."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    (line,) = re.findall(r"^    cerl train (.*)$", text, re.MULTILINE)
    preset, *words = line.split()
    config = overridden(preset, words, prog="cerl train", changes=SMALL | changes)
    assert f"{name}:" in (str(config.env.name) + str(config.model_dump(exclude={"env"})))
    return cerl.train(config)


def metric(run: Path, name: str) -> list[dict]:
    return pq.read_table(run / "metrics.parquet", filters=[("name", "=", name)]).to_pylist()


def values(run: Path, name: str) -> list[float]:
    return [row["value"] for row in metric(run, name)]


def mine(code: str) -> None:
    """Writes a module `mine` into the user's folder."""
    Path("mine.py").write_text(code)
    sys.modules.pop("mine", None)
    importlib.invalidate_caches()


def test_heads_regress_to_the_mean_of_all_members_but_for_the_own_one():
    kind = importlib.import_module("to_mean").TO_MEAN
    following = torch.randn(2, 3, 4)  # [S, N, B]: the value of every member's next action

    class Values:
        members = heads = 3

        def take(self, source):
            owners = [[source(i, j).owner for j in range(3)] for i in range(3)]
            return torch.stack([following[:, row].movedim(1, -1) for row in owners], 1)

    target = kind.target(Values())
    assert target.shape == (2, 3, 4, 3)
    for s, i, b, j in torch.cartesian_prod(*map(torch.arange, target.shape)).tolist():
        members = following[s, :, b].tolist()
        wanted = members[i] if j == 0 else sum(members) / 3
        assert abs(target[s, i, b, j].item() - wanted) < 1e-6


def test_a_run_with_heads_of_ones_own_learns_other_auxiliary_targets():
    run = trained("to_mean")
    assert load_file(run / FILE).ensemble.heads == "to_mean:TO_MEAN"
    usual = cerl.train("catch/cerl", SMALL)
    own, theirs = values(run, "auxiliary_loss"), values(usual, "auxiliary_loss")
    assert len(own) == len(theirs) > 0 and all(0 < value < 10 for value in own)
    assert all(a != b for a, b in zip(own, theirs, strict=True))


def test_half_of_a_batch_comes_from_the_newest_tenth_of_the_replay():
    newest = importlib.import_module("newest").Newest
    spec = EnvSpec("toy", (1,), torch.float32, 2, 2, 1, resident=True, exact_state=True)
    sampling = Sampling(64, 0, 1, False, 1, "shared", 1.0, 8)
    ages = {}
    for sampler in (newest, Uniform):
        replay = Replay(
            spec,
            keys=draw.seed_keys([0, 1]),
            capacity=200,
            device=torch.device("cpu"),
            sampler=sampler,
        )
        for _ in range(250):  # the ring of 100 rows of two environments is overwritten
            replay.add(
                Row(
                    torch.zeros(2, 2, 1),
                    torch.zeros(2, 2, dtype=torch.int64),
                    torch.zeros(2, 2),
                    torch.zeros(2, 2, dtype=torch.bool),
                    torch.ones(2, 2, dtype=torch.bool),
                    torch.zeros(2, 2, dtype=torch.int64),
                )
            )
        windows = [replay.sample(sampling, step=torch.tensor(step)) for step in range(30)]
        assert all(bool((window.weight == 1).all()) for window in windows)
        ages[sampler] = 249 - torch.cat([window.row // 2 for window in windows], 1)
    young = ages[newest][..., :32]
    assert {*young.flatten().tolist()} == {*range(1, 11)}
    counts = torch.bincount(young.flatten())[1:].double()
    mean = counts.mean()
    assert float((counts - mean).abs().max()) < 5 * float(mean.sqrt())
    assert torch.equal(ages[newest][..., 32:], ages[Uniform][..., 32:])


def test_a_run_with_a_sampler_of_ones_own_learns_from_other_rows():
    run, usual = trained("newest"), cerl.train("catch/ddqn", SMALL)
    assert load_file(run / FILE).replay.sampler.name == "own"
    assert values(run, "loss") and values(run, "loss") != values(usual, "loss")
    assert values(run, "own_data_share") == values(usual, "own_data_share")


def test_members_of_the_ladder_explore_less_and_less():
    ladder = importlib.import_module("ladder").ladder
    member = torch.arange(3).repeat(2, 1000)  # [S, E]
    shape = member.shape
    nothing = torch.zeros(*shape, 0)
    noise = Noise(
        torch.zeros(shape, dtype=torch.bool), member, nothing, torch.zeros(shape), nothing
    )
    start = torch.zeros(shape, dtype=torch.bool)
    moment = Moment(draw.seed_keys([0, 1]), torch.tensor(5), torch.tensor(0.5), member, start, 3)
    after = ruled([ladder], noise, moment)
    for i, share in enumerate((0.5, 0.5**4.5, 0.5**8)):
        found = float(after.explore[member == i].float().mean())
        assert abs(found - share) < 5 * (share * (1 - share) / 2000) ** 0.5
    assert all(a is b for a, b in zip(after[1:], noise[1:], strict=True))


def test_a_rule_of_ones_own_decides_the_actions_of_training():
    mine(
        "import torch\n"
        "def x(noise, moment):\n"
        "    assert moment.members == 5 and moment.member.shape == noise.explore.shape\n"
        "    action = torch.full_like(noise.action, 2)\n"
        "    return noise._replace(explore=torch.ones_like(noise.explore), action=action)\n"
    )
    actions = {}
    for rules in ([], ["mine:x"]):
        config = load("catch/bootdqn", {**SMALL, "explore.start": 0.5, "explore.rules": rules})
        parts = assemble(config)
        for _ in range(60):
            parts.collector.step()
        actions[len(rules)] = {*parts.replay.last(50).action.flatten().tolist()}
        close(parts)
    assert actions == {0: {0, 1, 2}, 1: {2}}


def test_a_run_with_the_ladder_learns_from_other_experience():
    run, usual = trained("ladder"), cerl.train("catch/bootdqn", SMALL)
    assert values(run, "loss") and values(run, "loss") != values(usual, "loss")


def test_the_metric_of_ones_own_is_the_share_of_zeros():
    outputs = torch.tensor([[[[0.0, 1.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 3.0]]]])  # [1, 2, 2, 2]
    learner = SimpleNamespace(agent=SimpleNamespace(activations=lambda *_: [outputs]), net=None)
    found = importlib.import_module("sparsity").zero_share(learner, None)
    assert found["zero_share"].tolist() == [[0.5, 0.75]]


def test_a_metric_of_ones_own_is_in_the_metrics_of_every_member_and_changes_nothing():
    run, usual = trained("sparsity"), cerl.train("catch/bootdqn", SMALL)
    rows = metric(run, "zero_share")
    members = load_file(run / FILE).ensemble.members
    assert {(row["step"], row["seed"], row["member"]) for row in rows} == {
        (step, seed, member) for step in (300, 600) for seed in (0, 1) for member in range(members)
    }
    assert all(0 < row["value"] < 1 for row in rows)
    assert values(run, "loss") == values(usual, "loss")
    assert values(run, "misses") == values(usual, "misses")


@pytest.mark.parametrize("name", ["cat_and_mouse", "corridor"])
def test_an_environment_of_ones_own_is_learnt(name):
    run = trained(name, **{"schedule.steps": 1_500, "explore.hold": 100, "explore.decay": 700})
    rows = pq.read_table(run / "rows.parquet").to_pylist()
    assert all(f"{name}:" in row["env"] for row in rows)
    assert max(row["return"] for row in rows if row["policy"] == "individual") == 1


def test_the_model_of_ones_own_learns_with_forgetting_attention():
    module = importlib.import_module("own_model")
    losses = module.train(60)
    assert losses[0] > 5 and losses[-1] < 0.5
    layer, x = module.Forgetting(8, heads=2), torch.randn(1, 6, 8)
    layer(x).square().sum().backward()
    assert float(layer.gate.weight.grad.abs().max()) > 0
    later = x.clone()
    later[:, 4:] += 1
    assert torch.equal(layer(x)[:, :4], layer(later)[:, :4])


def test_a_sweep_is_read_as_a_data_frame_and_drawn():
    pytest.importorskip("pandas")
    module = importlib.import_module("sweep_frame")
    small = {**SMALL, "eval.every": 300}
    runs = {name: cerl.train(name, small) for name in ("catch/ddqn", "catch/bootdqn")}
    frame = module.scores(Path("runs"))
    assert len(frame) == 2 * 2 * 2  # presets, evaluations, seeds
    for name, run in runs.items():
        own = [row for row in pq.read_table(run / "rows.parquet").to_pylist() if row["seed"] == 1]
        last = [r["return"] for r in own if (r["policy"], r["step"]) == ("individual", 600)]
        found = frame[(frame.preset == name) & (frame.step == 600) & (frame.seed == 1)]["return"]
        assert abs(found.item() - sum(last) / len(last)) < 1e-9
    module.figure(frame, Path("frame.png"))
    assert Path("frame.png").stat().st_size > 5_000


def test_the_notebook_trains_looks_and_prints_verdicts(capsys, monkeypatch):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    notebook = json.loads(Path("first_steps.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    for long, short in (
        ("[0, 1, 2, 3, 4]", "[0, 1]"),
        ('"schedule.steps": 4_000', '"schedule.steps": 400, "replay.start": 100'),
        ('"log.every": 500', '"log.every": 200'),
        ('"eval.every": 1_000', '"eval.every": 200'),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    names: dict = {}
    exec(compile(code, "first_steps.ipynb", "exec"), names)
    scores, losses = names["figure"].axes
    assert shown == [names["figure"]]
    assert [line.get_label() for line in scores.lines] == [
        "catch/ddqn",
        "catch/bootdqn",
        "catch/cerl",
    ]
    assert all(list(line.get_xdata()) == [200, 400] for line in (*scores.lines, *losses.lines))
    printed = capsys.readouterr().out
    assert "Curse gap: At 400 agent steps" in printed and "CERL's gain" in printed
    plt.close("all")


def test_a_resumed_run_with_code_of_ones_own_equals_an_uninterrupted_one():
    options = {**SMALL, **OWN, "log.every": 100, "explore.decay": 300}
    whole = cerl.train("catch/cerl", options)
    half = cerl.train("catch/cerl", {**options, "schedule.steps": 300})
    cerl.resume(half, changes={"schedule.steps": 600})
    for name in ("loss", "auxiliary_loss", "zero_share"):
        last = [
            [row["value"] for row in metric(run, name) if row["step"] == 600]
            for run in (whole, half)
        ]
        assert last[0] and last[0] == last[1]


def test_a_strangers_run_is_read_without_its_code_and_resumed_with_trust_only(monkeypatch):
    mine("raise RuntimeError('its code ran')")
    run = cerl.train("catch/cerl", SMALL | OWN)
    for option, named in OWN.items():
        if option == "replay.sampler.name":
            continue
        own = {option: ["mine:x"] if isinstance(named, list) else "mine:x"}
        config = load("catch/cerl", {**OWN, **own})
        assert "import the module mine and run its code" in list(trust.code(config))
    assert len(list(trust.code(load_file(run / FILE)))) == 4
    assert list(trust.code(load("catch/cerl"))) == []
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("another user").resolve()))
    with pytest.raises(ConfigError, match="import the module to_mean and run its code and import"):
        cerl.resume(run, changes={"schedule.steps": 700})
    cerl.resume(run, changes={"schedule.steps": 700}, trusted=True)


HEADS, RULES, MEASURES = "ensemble.heads", "explore.rules", "log.measures"
SAMPLER = "replay.sampler.by"
# The code of a module, the option, what it names, the error.
WRONG = {
    "no module": ("", HEADS, "nowhere:x", "ensemble.heads: no module nowhere in the current"),
    "no name": ("kind_of_mine = 1", HEADS, "mine:kind_of_min", "did you mean kind_of_mine"),
    "no kind": ("x = 1", HEADS, "mine:x", "HeadKind with heads 'one' or 'members', got 1"),
    "fails": ("1 / 0", RULES, "mine:x", "explore.rules: importing mine failed .ZeroDivision"),
    "no function": ("x = 1", RULES, "mine:x", "expected mine:x to be a function or a class"),
    "no noise": (
        "def x(noise, moment): return noise.explore",
        *(RULES, "mine:x", "x to return a cerl.explore.Noise of explore .*bool.*, got Tensor"),
    ),
    "no sampler": ("x = 1", SAMPLER, "mine:x", "replay.sampler.by: expected mine:x to be"),
    "name taken": (
        "def x(learner, batch): return {'loss': 0}",
        *(MEASURES, "mine:x", "measures 'loss', a name that is taken"),
    ),
    "no measure": ("x = 1", MEASURES, "mine:x", "log.measures: expected mine:x to be a funct"),
    "shape": (
        "import torch\ndef x(learner, batch): return {'a': torch.zeros(7)}",
        *(MEASURES, "mine:x", r"expected 'a' of mine:x as \[S, N\] \[2, 5\], .* got \[7\]"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_code_that_does_not_keep_the_contract_is_refused(name):
    code, option, named, message = WRONG[name]
    mine(code)
    options = {option: [named] if option in (RULES, MEASURES) else named}
    if option == SAMPLER:
        options["replay.sampler.name"] = "own"
    with pytest.raises((ImportError, RuntimeError, ValueError), match=message):
        cerl.train("catch/cerl", SMALL | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble.heads": "mine"}, "ensemble.heads: expected own, cerl, .*, got 'mine'"),
        ({"explore.rules": ["mine:"]}, "explore.rules.0: expected MODULE:NAME, .*, got 'mine:'"),
        ({"log.measures": [":x"]}, "log.measures.0: expected MODULE:NAME"),
        ({"replay.sampler.name": "own"}, "replay.sampler.by: expected MODULE:NAME, .*, got ''"),
    ],
)
def test_a_name_of_another_form_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load("catch/cerl", options)


def test_heads_that_exist_nowhere_are_refused():
    mine(
        "from cerl.head_kinds import HeadKind, Source\n"
        "x = HeadKind('', lambda values: values.take(lambda i, j: Source(i + 1, i)), heads='one')"
    )
    ensemble = EnsembleConfig(members=2, heads="mine:x")
    with pytest.raises(ValueError, match="ensemble.heads: mine:x names chooser 2"):
        head_table(ensemble, gamma=0.99, device="cpu")


def test_the_game_of_contributing_is_the_example():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"^```python\n# my_game.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert (FOLDER / "cat_and_mouse.py").read_text().split('"""\n\n', 1)[1] == code


def test_the_page_lists_every_example():
    page = (ROOT / "docs" / "examples.md").read_text()
    files = {path.name for path in FOLDER.iterdir() if path.is_file()}
    listed = set(re.findall(r"^\| `examples/([\w.]+)`", page, re.MULTILINE))
    assert files == listed and len(files) >= 9
