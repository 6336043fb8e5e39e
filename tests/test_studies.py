"""The shipped studies: they load, all their cells are valid, and they hold the paper's values."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from cerl.config import load, preset
from cerl.config.preset import leaves
from cerl.record.results import config_hash
from cerl.sweep import cells, study

PAGE = (Path(__file__).parent.parent / "docs" / "studies.md").read_text()
# The studies with the paper's protocol on Atari, and their twins on MinAtar.
TWINS = ("tandem", "replay-size", "ensemble-size", "layers", "own-data", "controls", "ablations")
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")

# Options of all runs on Atari (configs/boot_dqn_rmsprop.gin of the authors' code, and the README's
# 200 iterations), beside those that a study varies.
ATARI = {
    "env.envs": 1,
    "env.sticky": 0.0,
    "env.life_loss": False,
    "env.time_limit": 27_000,
    "agent.double": True,
    "agent.shared_bias": True,
    "loss.gamma": 0.99,
    "loss.n_step": 1,
    "optim.name": "rmsprop",
    "optim.lr": 2.5e-4,
    "optim.eps": 9.765625e-6,
    "replay.batch": 32,
    "replay.start": 50_000,
    "schedule.steps": 200 * 250_000,
    "schedule.update_every": 4,
    "schedule.target_every": 30_000,
    "explore.end": 0.01,
    "explore.decay": 1_000_000,
    "eval.every": 250_000,
    "eval.steps": 125_000,
    "eval.epsilon": 0.01,
}
# Options of all runs on MuJoCo (examples/configs/cel_default.py and the README's commands).
MUJOCO = {
    "env.envs": 1,
    "agent.name": "sac",
    "agent.target_entropy": -0.5,
    "agent.log_std": "tanh",
    "net.hidden": [256, 256],
    "optim.lr": 3e-4,
    "replay.batch": 256,
    "schedule.steps": 1_000_000,
    "schedule.target_rate": 0.005,
    "eval.every": 20_000,
    "eval.episodes": 30,
}
SINGLE, TEN = ("ensemble.members", 1), ("ensemble.members", 10)
OWN = (TEN, ("ensemble.shared_layers", 0), ("ensemble.heads", "own"))
CERL = (TEN, ("ensemble.shared_layers", 0), ("ensemble.heads", "cerl"))
TANDEM = (("ensemble.members", 2), ("ensemble.duty", "tandem"))
# What the cells of each study of the paper are, in order: the options that make up each.
PAPER = {
    "paper-curse": [(SINGLE,), OWN, (TEN, ("ensemble.shared_layers", 3)), CERL],
    "paper-tandem": [(SINGLE,), (*TANDEM, ("ensemble.active_probability", 0.9))],
    "paper-replay-size": [
        (*kind, ("replay.capacity", size))
        for kind in ((SINGLE,), OWN, CERL)
        for size in (250_000, 1_000_000, 4_000_000)
    ],
    "paper-ensemble-size": [
        (SINGLE,),
        *(
            (("ensemble.heads", heads), ("ensemble.members", size))
            for heads in ("own", "cerl")
            for size in (2, 5, 10, 20)
        ),
    ],
    "paper-layers": [
        (SINGLE,),
        *((TEN, ("ensemble.heads", "own"), ("ensemble.shared_layers", L)) for L in (0, 3, 4)),
        *((TEN, ("ensemble.heads", "cerl"), ("ensemble.shared_layers", L)) for L in (0, 3)),
    ],
    "paper-own-data": [
        (SINGLE,),
        *((("ensemble.members", size), ("loss.batches", "shared")) for size in (2, 5, 10)),
        *((*TANDEM, ("ensemble.active_probability", p)) for p in (0.5, 0.7, 0.9)),
        *(
            (TEN, ("loss.batches", kind), ("loss.batches_probability", share))
            for kind in ("own", "disjoint")
            for share in (0.25, 0.5, 1.0)
        ),
    ],
    "paper-controls": [
        (SINGLE,),
        OWN,
        (TEN, ("agent.mico_weight", 0.01), ("agent.mico_beta", 0.1)),
        (TEN, ("ensemble.heads", "multi_horizon"), ("ensemble.horizons", 10)),
        CERL,
    ],
    "paper-ablations": [
        (SINGLE,),
        *((*kind, ("agent.loss", loss)) for kind in (OWN, CERL) for loss in ("huber", "mse")),
        (TEN, ("ensemble.heads", "own_target")),
        (TEN, ("ensemble.heads", "single_actor"), ("ensemble.duty", "first")),
        (*CERL, ("ensemble.fork", "both")),
    ],
    "paper-continuous": [
        (*kind, ("replay.capacity", 200_000))
        for kind in (
            (SINGLE,),
            (TEN, ("ensemble.heads", "own"), ("agent.loss", "mse")),
            (
                TEN,
                ("ensemble.heads", "cerl"),
                ("agent.loss", "mse_huber"),
                ("agent.huber_delta", 10.0),
            ),
            (*TANDEM, ("ensemble.active_probability", 0.9)),
        )
    ],
    "paper-continuous-replay-size": [
        (*kind, ("replay.capacity", size))
        for kind in ((SINGLE,), (TEN, ("ensemble.heads", "own")), (TEN, ("ensemble.heads", "cerl")))
        for size in (50_000, 200_000, 1_000_000)
    ],
}


@cache
def found(name: str, device: Literal["cpu", "cuda"] = "cuda"):
    """The cells of a study, and the notes about them."""
    notes = []
    made = cells.cells(
        study.load_study(name, device), words=[], envs=[], grid=[], note=notes.append
    )
    return made, notes


def options(config):
    return dict(leaves(config.model_dump(mode="json")))


@pytest.mark.parametrize("name", preset.studies())
def test_every_cell_of_a_study_is_valid_and_none_trains_twice(name):
    for device in ("cpu", "cuda"):
        asked = study.load_study(name, device)
        assert {part.preset for part in asked.presets} <= {*preset.presets()}
        made, _ = found(name, device)
        assert len({config_hash(cell.config) for cell in made}) == len(made) > 0
        # Every preset stays in the study: none has only cells that another one has too.
        kept = {cell.config.preset for cell in made}
        assert kept == {part.preset for part in asked.presets}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", preset.studies())
def test_a_study_says_what_it_answers_and_costs(name, device):
    first = study.file(name).read_text().partition("\n")[0]
    assert re.fullmatch(r"# [A-Z1-9].*[.?]", first) and len(first) <= 100
    asked = study.load_study(name, device)
    assert asked.answers.endswith("?") and re.search("measured|computed", asked.costs)
    said = re.match(r"(\d+) runs on .+, (\d+) seeds?, (\d+)([kM]) agent steps; ", asked.costs)
    runs, seeds, steps, unit = said.groups()  # pyright: ignore
    made, _ = found(name, device)
    assert int(runs) == len(made)
    assert {len(cell.config.seeds) for cell in made} == {int(seeds)}
    length = int(steps) * {"k": 1_000, "M": 1_000_000}[unit]
    assert {cell.config.schedule.steps for cell in made} == {length}


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_studies_of_the_paper_have_its_values(name, expected):
    made, _ = found(name)
    common = MUJOCO if "continuous" in name else ATARI
    first = made[0].config.env.name
    got = [options(cell.config) for cell in made if cell.config.env.name == first]
    assert len(got) == len(expected)
    for has, wanted in zip(got, expected, strict=True):
        wanted = {**common, **dict(wanted)}
        assert {key: has[key] for key in wanted} == wanted
    if "replay-size" not in name:
        assert {has["replay.capacity"] for has in got} == {200_000 if common is MUJOCO else 1e6}
    games = Counter(cell.config.env.name for cell in made)
    assert {*games.values()} == {len(expected)}
    assert len(games) == {"paper-curse": 55, "paper-tandem": 55}.get(name, 4 + (common is ATARI))
    assert {cell.config.seeds for cell in made} == {tuple(range(10 if common is MUJOCO else 5))}


@pytest.mark.parametrize("name", TWINS)
def test_a_minatar_twin_asks_what_the_study_on_atari_asks(name):
    def shape(part):
        family, _, method = part.preset.replace("paper-", "").partition("/")
        return family, method, {key: len(values) for key, values in part.grid.items()}

    small, large = study.load_study(name, "cuda"), study.load_study(f"paper-{name}", "cuda")
    assert {shape(part)[0] for part in small.presets} == {"minatar"}
    assert {shape(part)[0] for part in large.presets} == {"atari"}
    assert small.grid.keys() == large.grid.keys()
    assert small.answers == large.answers
    if name != "tandem":  # the paper has p = 0.9 alone
        assert [shape(p)[1:] for p in small.presets] == [shape(p)[1:] for p in large.presets]


@pytest.mark.parametrize("name", ["curse", *TWINS])
def test_minatar_studies_end_in_an_evening(name):
    made, _ = found(name)
    assert {cell.config.env.name for cell in made} == {*GAMES}
    for cell in made:
        schedule, log = cell.config.schedule, cell.config.log
        assert (schedule.steps, cell.config.eval.every) == (1_000_000, 100_000)
        assert (log.checkpoint_every, log.save_replay) == (250_000, False)
        assert cell.config.seeds == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("name", ["ensemble-size", "paper-ensemble-size"])
def test_a_grid_over_ensembles_leaves_the_single_agent_in_the_study(name):
    made, notes = found(name)
    single = [cell for cell in made if cell.config.preset.endswith("ddqn")]
    assert len(single) == 5 and not any(cell.varied for cell in single)
    assert {cell.config.ensemble.members for cell in single} == {1}
    assert any("ddqn" in text for text in notes)


def test_own_and_disjoint_batches_find_rows_of_their_member():
    """The share of lost slots of a batch is so small that only the share of own data differs."""
    for name in ("own-data", "paper-own-data"):
        for cell in found(name)[0]:
            if cell.config.loss.batches != "shared":
                assert (1 - 1 / 10) ** cell.config.replay.candidates < 2e-6


def test_the_page_lists_every_study_with_its_runs():
    named = re.findall(r"`([a-z][a-z0-9-]*)`", PAGE)
    assert {*preset.studies()} <= {*named}
    rows = re.findall(r"\| `([\w-]+)` \| (\d+) \| ", PAGE)  # of the table of the paper
    rows += re.findall(r"\| `([\w-]+)` \| [^|]+ \| [^|]+ \| (\d+) \|", PAGE)  # of robots
    assert len(rows) == 2 * (len(TWINS) + 1) + 7
    assert {name: int(runs) for name, runs in rows} == {
        name: len(found(name)[0]) for name, _ in rows
    }


def test_the_study_of_the_page_is_read_and_crossed(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "rates.yaml").write_text(text)
    asked = study.load_study(str(tmp_path / "rates.yaml"), "cpu")
    made = cells.cells(asked, words=[], envs=[], grid=[], note=lambda _: None)
    got = Counter((c.config.preset, c.config.ensemble.members, c.config.optim.lr) for c in made)
    rates = (1e-4, 2.5e-4, 1e-3)
    kinds = [("minatar/ddqn", 1), ("minatar/cerl", 5), ("minatar/cerl", 10)]
    assert got == {(*kind, rate): 2 for kind in kinds for rate in rates}  # on two games
    assert {c.config.schedule.steps for c in made} == {500_000}


def test_presets_of_studies_are_the_whole_files():
    """A cell whose axis has the preset's own value trains like the preset alone."""
    base = load("atari/paper-bootdqn")
    twins = [
        cell.config
        for name in ("paper-ensemble-size", "paper-layers", "paper-own-data", "paper-ablations")
        for cell in found(name)[0]
        if cell.config.preset == "atari/paper-bootdqn"
        and all(options(base)[key] == value for key, value in cell.varied.items())
    ]
    assert len(twins) == 4 * 5
    for config in twins:
        alone = load("atari/paper-bootdqn", {"env.name": config.env.name})
        assert config_hash(config) == config_hash(alone)
