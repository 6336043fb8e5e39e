"""A seed is alone: its training, scores and diagnostics do not depend on the other seeds.

Every kind of agent and family is trained in a tiny size: seed 2 by itself, among three seeds, in
another order, and beside a seed whose parameters are NaN. All of its rows must be equal to the bit,
except for wall-clock times.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from options import suited

from cerl import training, wiring
from cerl.config import Config, load, preset

TINY: dict[str, Any] = {
    "device": "cpu",
    "env": {"envs": 2},
    "net": {"hidden": (12, 12)},
    "ensemble": {"members": 2},
    "replay": {"capacity": 200, "batch": 8, "start": 24},
    "schedule": {"steps": 72, "update_every": 4, "target_every": 20},
    "explore": {"hold": 20, "decay": 40},
    "eval": {"every": 24, "episodes": 2, "time_limit": 60},
    "log": {"every": 24, "checkpoint_every": 10**9, "save_replay": False},
}
GRU = {
    "net": {"hidden": (12,)},
    "encoder": {"name": "gru", "width": 8, "context": 2, "learnt": 4, "cache_refresh": 5},
}
FOX = {
    "net": {"hidden": (12,)},
    "encoder": {
        **{"name": "fox", "width": 16, "context": 2, "learnt": 4, "cache_refresh": 5},
        **{"heads": 2, "cache": 6},
    },
}
TANDEM = {"members": 2, "duty": "tandem", "active_probability": 0.7}
CUT = {"diverged": "cut", "envs": 2}
OBSERVE = {"noise": 0.1, "dropout": 0.2, "flicker": 0.2}
VARIANCES = {"policies": ("individual", "mean", "random"), "every": 24, "episodes": 2}
# EnvPool's simulators are built anew for every evaluation.
ONCE = {"policies": ("individual", "mean"), "every": 72, "episodes": 1, "share": False}

# Cheap ones first; what takes longer than most is marked slow.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "catch_dqn": ("catch/bootdqn", {}),
    "catch_cerl_fox": ("catch/cerl", FOX),
    "catch_tandem": ("catch/tandem", {"ensemble": TANDEM}),
    "minatar_budget": (
        "minatar/ddqn",
        {
            "env": {"name": "asterix"},
            "net": {"hidden": (8,)},
            "eval": {"steps": 60, "slots": 2, "episodes": 10},
        },
    ),
    "memory_gru": (
        "catch/cerl",
        {**GRU, "env": {"family": "memory", "name": "tmaze_active", "length": 4, "envs": 2}},
    ),
    "point_mass_sac": ("point_mass/cerl", {"env": {"time_limit": 20}, "eval": VARIANCES}),
    "gym_dqn": ("gym/cartpole", {"env": CUT}),
    "gym_sac": (
        "gym/pendulum",
        {"env": {**CUT, "time_limit": 20, "observe": OBSERVE}, "eval": VARIANCES},
    ),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "minatar_quantile": ("minatar/qrdqn", {"net": {"hidden": (8,)}, "agent": {"quantiles": 5}}),
    "popgym_sac_fox": (
        "point_mass/cerl",
        {
            **FOX,
            "env": {"family": "popgym", "name": "PositionOnlyPendulumEasy", "envs": 2},
            "eval": VARIANCES,
        },
    ),
    "popgym_package": (
        "catch/cerl",
        {"env": {"family": "popgym", "name": "AutoencodeEasy", "backend": "package", "envs": 2}},
    ),
    "mujoco_sac": ("mujoco/cerl", {"env": {**CUT, "name": "Hopper-v4"}, "eval": ONCE}),
    "dmc_sac": (
        "dmc/cerl",
        {"env": {**CUT, "name": "reacher-easy", "time_limit": 20}, "eval": ONCE},
    ),
    "atari_dqn": (
        "atari/ddqn",
        {
            "env": {"name": "Pong", "envs": 1},
            "net": {"channels": (2,), "kernels": (8,), "strides": (8,), "hidden": (8,)},
            "eval": {
                **{"steps": 0, "slots": 0, "time_limit": 20, "every": 72, "episodes": 1},
                "policies": ("individual", "vote"),
            },
        },
    ),
}
NEEDED = {"popgym_package": "popgym", "mujoco_sac": "envpool", "dmc_sac": "envpool"}
NEEDED["atari_dqn"] = "ale_py"


def tiny(out: Path, name: str, seeds: Sequence[int]) -> Config:
    source, changes = (CASES | SLOW)[name]
    options = preset.merged(preset.merged(TINY, changes), {"seeds": tuple(seeds), "out": str(out)})
    return load(source, suited(source, options))


def rows_of(folder: Path, seed: int) -> dict[str, dict[str, list]]:
    """Both tables of a run, one seed's rows, without the time; NaN as a word that equals itself."""
    tables = {}
    for name in ("rows", "metrics"):
        table = pq.read_table(folder / f"{name}.parquet").filter(pc.field("seed") == seed)
        columns = table.to_pydict()
        columns.pop("wall_seconds", None)
        tables[name] = {
            key: ["nan" if value != value else value for value in values]
            for key, values in columns.items()
        }
    return tables


def spoiled(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """From now on the parameters of a seed are NaN from the start of a run."""
    assemble = wiring.assemble

    def with_nan(config: Config) -> wiring.Parts:
        parts = assemble(config)
        at = config.seeds.index(seed)
        with torch.no_grad():
            for parameter in parts.learner.net.parameters():
                parameter[at] = float("nan")
        return parts

    monkeypatch.setattr(training, "assemble", with_nan)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*its episode is cut")
@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_seed_s_rows_are_the_same_bits_whoever_runs_beside_it(tmp_path, monkeypatch, name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])

    def rows(*seeds: int) -> dict[str, dict[str, list]]:
        where = tmp_path / "-".join(map(str, seeds))
        return rows_of(training.train(tiny(where, name, seeds)), 2)

    alone = rows(2)
    assert alone["rows"]["policy"].count("individual") >= 2
    assert {"loss", "own_data_share"} <= set(alone["metrics"]["name"])
    assert rows(0, 1, 2) == alone
    assert rows(2, 1, 0) == alone
    spoiled(monkeypatch, seed=1)
    assert rows(1, 2, 5) == alone


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["catch_cerl_fox", "minatar_budget", "point_mass_sac", "gym_dqn"])
def test_a_seed_draws_and_plays_the_same_on_a_gpu(tmp_path, name):
    """Libraries of a GPU may pick another algorithm for another number of seeds, and its sums then
    round otherwise, so trained parameters may differ. What is drawn and played with those of the
    start, which are equal, is equal."""

    def built(*seeds: int) -> wiring.Parts:
        options = {"device": "cuda", "seeds": seeds, "out": str(tmp_path)}
        return wiring.assemble(
            Config.model_validate(tiny(tmp_path, name, seeds).model_dump() | options)
        )

    alone, among = built(2), built(0, 1, 2)
    try:
        own = dict(alone.learner.net.named_parameters())
        for key, parameter in among.learner.net.named_parameters():
            assert torch.equal(parameter[2], own[key][0]), key
        # All of these actions are drawn, and what the environments answer follows from them.
        for _ in range(9):
            alone.collector.step()
            among.collector.step()
        for one, all_ in zip(alone.collector.player.last, among.collector.player.last, strict=True):
            assert torch.equal(one[0], all_[2])
        assert torch.equal(alone.replay.action[0, :9], among.replay.action[2, :9])
        for number in (1, 2):
            played, beside = alone.evaluator.run(number), among.evaluator.run(number)
            assert played is not None and beside is not None
            for policy, mine in played.items():
                theirs, real = beside[policy], ~mine.lengths[0].isnan()
                also = ~theirs.lengths[2].isnan()
                assert torch.equal(theirs.lengths[2][also], mine.lengths[0][real])
                torch.testing.assert_close(
                    theirs.returns[2][also], mine.returns[0][real], rtol=1e-4, atol=1e-4
                )
    finally:
        wiring.close(alone)
        wiring.close(among)
