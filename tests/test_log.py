"""The record of a run: rows, metrics, TensorBoard, progress; what remains after a resume."""

import errno
import io
import math
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cerl import __version__, config
from cerl.agents.sac import SAC
from cerl.data import EnvSpec
from cerl.evaluate import Result
from cerl.record import progress
from cerl.record import results as rows
from cerl.record.log import Logger
from cerl.record.record import over_episodes
from cerl.record.results import RowsError
from cerl.record.screen import PipeConsole
from cerl.record.tags import weighted
from cerl.record.tensorboard import TensorBoard

SEEDS = (3, 8)
NAN = math.nan


def make_logger(folder, *, preset="catch/bootdqn", quiet=True, changes=None) -> Logger:
    options = {"ensemble.members": 3, **(changes or {})}
    if preset == "catch/tandem":
        options["ensemble.members"] = 2
    c = config.load(preset, {"seeds": list(SEEDS), "schedule.steps": 1000, **options})
    spec = EnvSpec("catch", (10, 5), torch.float32, 3, 4, 4, True, True)
    return Logger(folder, config=c, spec=spec, quiet=quiet)


def scores_at(step: int, *, members: int = 3) -> dict[str, Result]:
    """Scores of 4 episodes, different for every seed, member and step."""
    g = torch.Generator().manual_seed(step)
    individual = torch.rand(2, members, 4, generator=g, dtype=torch.float64)
    vote = torch.rand(2, 1, 4, generator=g, dtype=torch.float64) + 1
    return {
        "individual": Result(
            individual,
            torch.full_like(individual, 9.0),
            torch.ones(2, members),
            {"value_error": individual[..., 0] - 0.5},
        ),
        "vote": Result(vote, torch.full_like(vote, 7.0), torch.ones(2, 1)),
    }


def finished(count) -> dict:
    """Training episodes by member: `count` [S, N]."""
    episodes = torch.tensor(count, dtype=torch.float64)
    nothing = torch.where(episodes > 0, 1.0, NAN)
    k = torch.arange(episodes.numel()).view_as(episodes)
    return {
        "episodes": episodes,
        "return": k * nothing,
        "length": 9 * nothing,
        "value": (2.0 + k) * nothing,
        "mc": 1.5 * nothing,
    }


def run_until(logger: Logger, steps) -> None:
    for step in steps:
        real = torch.tensor([step - 10, step - 20])
        logger.training(step, step // 4, {"loss": torch.rand(2, 3), "misses": torch.zeros(2)})
        logger.episodes(step, step // 4, real, finished([[1, 2, 1], [3, 0, 1]]))
        logger.evaluation(step, step // 4, real, scores_at(step))


def read_rows(folder) -> list[dict]:
    return pq.read_table(folder / "rows.parquet").to_pylist()


def read_metrics(folder) -> list[dict]:
    return pq.read_table(folder / "metrics.parquet").to_pylist()


def scalars(folder, seed) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard" / f"seed_{seed}"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_evaluation_rows_equal_a_loop_over_the_episodes(tmp_path):
    results = scores_at(100)
    with make_logger(tmp_path) as logger:
        logger.evaluation(100, 25, torch.tensor([90, 95]), results)
    assert pq.read_schema(tmp_path / "rows.parquet").equals(rows.ROWS)
    found = {(r["seed"], r["policy"], r["member"]): r for r in read_rows(tmp_path)}
    assert len(found) == 2 * 3 + 2
    for s, seed in enumerate(SEEDS):
        for policy, (returns, lengths, *_) in results.items():
            for k in range(returns.shape[1]):
                row = found[seed, policy, k if policy == "individual" else -1]
                each = [float(x) for x in returns[s, k]]
                mean = sum(each) / 4
                assert row["return"] == pytest.approx(mean, rel=1e-12)
                square = sum((x - mean) ** 2 for x in each) / 4
                assert row["return_std"] == pytest.approx(math.sqrt(square), rel=1e-12)
                assert row["length"] == float(lengths[0, 0, 0])
                assert row["role"] == ("member" if policy == "individual" else "aggregate")
                assert (row["episodes"], row["step"], row["updates"]) == (4, 100, 25)
                assert row["real_steps"] == (90, 95)[s] and row["frames"] == 4 * (90, 95)[s]
                assert (row["preset"], row["env"]) == ("catch/bootdqn", "catch")
                assert row["members"] == 3 and row["version"] == __version__
                assert 0 <= row["wall_seconds"] < 60


def test_roles_of_a_tandem_and_of_a_drawn_member(tmp_path):
    one = Result(torch.zeros(2, 1, 4), torch.ones(2, 1, 4), torch.zeros(2, 1))
    two = Result(torch.arange(16.0).view(2, 2, 4), torch.ones(2, 2, 4), torch.zeros(2, 2))
    with make_logger(tmp_path, preset="catch/tandem") as logger:
        logger.evaluation(10, 0, torch.tensor([10, 10]), {"individual": two, "random": one})
    roles = {(r["policy"], r["member"]): r["role"] for r in read_rows(tmp_path)}
    assert roles == {
        ("individual", 0): "active",
        ("individual", 1): "passive",
        ("random", -1): "random",
    }
    tags = scalars(tmp_path, 3)
    assert tags["Eval/active/return"] == [(10, 1.5)]
    assert tags["Eval/passive/return"] == [(10, 5.5)]
    assert tags["Eval/random/return"] == [(10, 0.0)]
    assert scalars(tmp_path, 8)["Eval/active/return"] == [(10, 9.5)]
    # The mean over an active and a passive member is the score of no policy.
    assert not [tag for tag in tags if tag.startswith("Eval/individual")]


def test_episodes_that_were_not_played_do_not_count():
    returns = np.array([[[1.0, 3.0, NAN], [NAN, NAN, NAN], [NAN, 1.0, 2.0]]])
    lengths = np.array([[[10.0, 20.0, NAN], [NAN, NAN, NAN], [5.0, 5.0, 5.0]]])
    found = over_episodes(returns, lengths)
    np.testing.assert_array_equal(found["episodes"], [[2, 0, 3]])
    # The last member played an episode whose return is not a number: neither is its mean.
    np.testing.assert_array_equal(found["return"], [[2.0, NAN, NAN]])
    np.testing.assert_array_equal(found["return_std"], [[1.0, NAN, NAN]])
    np.testing.assert_array_equal(found["length"], [[15.0, NAN, 5.0]])


def test_columns_that_only_other_seeds_have_played_change_no_bit():
    rng = np.random.default_rng(0)
    returns, lengths = rng.normal(size=(9, 1, 11)), rng.integers(1, 99, (9, 1, 11)).astype(float)
    beside = np.full((9, 1, 300), NAN)
    alone = over_episodes(returns, lengths)
    among = over_episodes(*(np.concatenate([x, beside], -1) for x in (returns, lengths)))
    assert all(np.array_equal(alone[name], among[name]) for name in alone)


def test_training_rows_only_where_a_member_acted(tmp_path):
    with make_logger(tmp_path) as logger:
        logger.episodes(40, 10, torch.tensor([30, 35]), finished([[1, 2, 0], [0, 0, 4]]))
    found = {(r["seed"], r["member"]): r for r in read_rows(tmp_path)}
    assert {key: r["episodes"] for key, r in found.items()} == {(3, 0): 1, (3, 1): 2, (8, 2): 4}
    assert {r["policy"] for r in found.values()} == {"train"}
    assert found[8, 2]["return"] == 5.0 and found[8, 2]["return_std"] is None
    # value_error = Q - Monte Carlo return: here 2 + k - 1.5, positive as Q is too high.
    errors = [m for m in read_metrics(tmp_path) if m["name"] == "value_error"]
    assert {(m["seed"], m["member"]): m["value"] for m in errors} == {
        (3, 0): 0.5,
        (3, 1): 1.5,
        (8, 2): 5.5,
    }


def test_metrics_hold_every_seed_and_member_once(tmp_path):
    loss = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with make_logger(tmp_path) as logger:
        logger.training(20, 5, {"loss": loss, "misses": torch.tensor([7, 8])})
    assert pq.read_schema(tmp_path / "metrics.parquet").equals(rows.METRICS)
    found = {(m["name"], m["seed"], m["member"]): m["value"] for m in read_metrics(tmp_path)}
    expected = {("loss", s, k): float(loss[i, k]) for i, s in enumerate(SEEDS) for k in range(3)}
    assert found == expected | {("misses", 3, -1): 7.0, ("misses", 8, -1): 8.0}


def logged(folder, members: str) -> tuple[dict, dict]:
    """The scalars of both seeds after one line of metrics, episodes and an evaluation."""
    changes = {"explore.hold": 10, "explore.decay": 100, "log.members": members}
    with make_logger(folder, changes=changes) as logger:
        q = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        logger.progress(4, 1)
        metrics = {"loss": q, "q_data": 2 * q, "q_pi": 3 * q, "rank": 4 * q}
        metrics["rank/layer0/head1"] = 5 * q
        logger.training(60, 15, metrics | {"misses": torch.tensor([1, 0])})
        logger.episodes(60, 15, torch.tensor([50, 50]), finished([[1, 3, 0], [2, 0, 0]]))
        logger.evaluation(60, 15, torch.tensor([50, 50]), scores_at(60))
    return scalars(folder, 3), scalars(folder, 8)


def test_value_errors_of_evaluations_are_metrics_of_every_member(tmp_path):
    with make_logger(tmp_path) as logger:
        logger.evaluation(60, 15, torch.tensor([50, 50]), scores_at(60))
    found = {
        (m["seed"], m["member"]): m["value"]
        for m in read_metrics(tmp_path)
        if m["name"] == "value_error_individual"
    }
    wanted = scores_at(60)["individual"].errors["value_error"]
    assert found == {(s, k): float(wanted[i, k]) for i, s in enumerate(SEEDS) for k in range(3)}


def test_tensorboard_has_means_over_members_under_the_names_of_the_tables(tmp_path):
    first, second = logged(tmp_path, "mean")
    assert first["losses/td_loss"] == [(60, 2.0)] and second["losses/td_loss"] == [(60, 5.0)]
    assert first["losses/q_values"] == [(60, 4.0)] and second["losses/q_pi"] == [(60, 15.0)]
    assert second["Diagnostics/rank"] == [(60, 20.0)]
    assert first["Diagnostics/misses"] == [(60, 1.0)]
    assert "Diagnostics/rank/layer0/head1" not in first  # a mean over heads has no slash
    # Half of the decay is left after the 10 steps of hold: (10 + 100 - 60) / 100.
    assert first["charts/epsilon"][0][1] == pytest.approx(0.05 + 0.95 * 0.5, abs=1e-6)
    assert first["charts/learning_rate"][0][1] == pytest.approx(1e-3)
    # Members 0 and 1 returned 0 and 1 in 1 and 3 episodes, and predicted 2 and 3.
    assert first["charts/episodic_return"] == [(60, 0.75)]
    assert first["charts/episodic_length"] == [(60, 9.0)]
    assert first["Train/episodes"] == [(60, 4.0)]
    assert first["Train/value"] == [(60, 2.75)] and first["Train/mc"] == [(60, 1.5)]
    assert first["Train/value_error"] == [(60, 1.25)]
    individual, vote = (scores_at(60)[name][0] for name in ("individual", "vote"))
    for s, tags in enumerate((first, second)):
        ((_, value),) = tags["Eval/individual/return"]
        assert value == pytest.approx(float(individual[s].mean()), rel=1e-6)
        ((_, value),) = tags["Eval/vote/return"]
        assert value == pytest.approx(float(vote[s].mean()), rel=1e-6)
        assert tags["Eval/individual/episodes"] == [(60, 12.0)]
        ((_, value),) = tags["Eval/individual/value_error"]
        assert value == pytest.approx(float(individual[s, :, 0].mean()) - 0.5, rel=1e-5)
        assert tags["Eval/vote/vote_entropy"] == [(60, 1.0)]
        assert tags["Eval/vote/length"] == [(60, 7.0)]
    assert first["charts/SPS"][0][1] > 0 and first["charts/updates_per_second"][0][1] > 0
    # Nothing stands there twice, and no member alone.
    score = ("return", "length", "episodes", "vote_entropy")
    assert set(first) == {
        *("charts/epsilon", "charts/learning_rate", "charts/SPS", "charts/updates_per_second"),
        *("charts/episodic_return", "charts/episodic_length"),
        *("losses/td_loss", "losses/q_values", "losses/q_pi"),
        *("Diagnostics/rank", "Diagnostics/misses"),
        *("Train/episodes", "Train/value", "Train/mc", "Train/value_error"),
        *(f"Eval/{policy}/{name}" for policy in ("individual", "vote") for name in score),
        "Eval/individual/value_error",
    }


def test_tensorboard_has_every_member_on_request(tmp_path):
    first, second = logged(tmp_path, "each")
    assert first["losses/td_loss"] == [(60, 2.0)]  # means are there as well
    assert first["Members/td_loss_2"] == [(60, 3.0)]
    assert second["Members/q_values_0"] == [(60, 8.0)]
    assert second["Members/rank_1"] == [(60, 20.0)]
    assert second["Members/rank/layer0/head1_1"] == [(60, 25.0)]
    assert second["Diagnostics/rank/layer0/head1"] == [(60, 25.0)]
    assert first["Members/train_episodes_1"] == [(60, 3.0)]
    assert first["Members/train_value_1"] == [(60, 3.0)]
    assert first["Members/train_mc_1"] == [(60, 1.5)]
    assert first["Members/train_value_error_1"] == [(60, 1.5)]
    assert "Members/train_episodes_2" not in first  # it has finished no episode
    individual = scores_at(60)["individual"][0]
    for s, tags in enumerate((first, second)):
        for k in range(3):
            (point,) = tags[f"Eval/individual/return_{k}"]
            assert point[1] == pytest.approx(float(individual[s, k].mean()), rel=1e-6)


def test_losses_of_sac_stand_under_losses(tmp_path):
    with make_logger(tmp_path, preset="point_mass/ensemble") as logger:
        names = (*SAC.metrics, "auxiliary_loss", "td_error_own", "actor_gradient_norm")
        logger.training(60, 15, {name: torch.ones(2, 3) for name in names})
    tags = scalars(tmp_path, 3)
    assert {tag for tag in tags if tag.startswith("losses/")} == {
        *("losses/td_loss", "losses/q_values", "losses/q_pi", "losses/actor_loss"),
        *("losses/alpha_loss", "losses/entropy", "losses/alpha", "losses/auxiliary_loss"),
        *("losses/td_error_own", "losses/actor_gradient_norm"),
    }
    rates = {"learning_rate", "actor_learning_rate", "temperature_learning_rate"}
    assert {tag for tag in tags if tag.endswith("learning_rate")} == {f"charts/{r}" for r in rates}


def test_tensorboard_has_the_config_as_text(tmp_path):
    with make_logger(tmp_path) as logger:
        logger.training(60, 15, {"loss": torch.ones(2, 3)})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "seed_8"))
    events.Reload()
    (event,) = events.Tensors("config")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 0 and text.startswith("```yaml\n") and text.endswith("```")
    assert yaml.safe_load(text.strip("`").removeprefix("yaml"))["ensemble"]["members"] == 3
    metadata = events.SummaryMetadata("config")
    assert metadata.plugin_data.plugin_name == "text"


def test_nan_in_one_seed_leaves_the_other_and_the_log_alone(tmp_path):
    clean, dirty = tmp_path / "clean", tmp_path / "dirty"
    for folder in (clean, dirty):
        folder.mkdir()
        results = scores_at(50)
        loss = torch.arange(6.0).view(2, 3)
        if folder is dirty:
            results["individual"].returns[1] = NAN
            results["vote"].returns[1] = NAN
            loss[1] = NAN
        with make_logger(folder) as logger:
            logger.training(50, 12, {"loss": loss})
            logger.evaluation(50, 12, torch.tensor([50, 50]), results)
            assert all(math.isfinite(value) for value in logger.record.latest.values())
    for name in ("rows", "metrics"):
        one, other = (
            [{k: v for k, v in r.items() if k != "wall_seconds"} for r in read if r["seed"] == 3]
            for read in (
                pq.read_table(folder / f"{name}.parquet").to_pylist() for folder in (clean, dirty)
            )
        )
        assert one == other and one
    bad = [r for r in read_rows(dirty) if r["seed"] == 8]
    assert len(bad) == 4 and all(math.isnan(r["return"]) and r["episodes"] == 4 for r in bad)
    tags = scalars(dirty, 8)
    assert math.isnan(tags["Eval/vote/return"][0][1])
    assert scalars(dirty, 3)["losses/td_loss"] == [(50, 1.0)]


def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    torch.manual_seed(0)
    with make_logger(whole) as logger:
        run_until(logger, [100, 200, 300, 400])
    torch.manual_seed(0)
    with make_logger(broken) as logger:
        run_until(logger, [100, 200])
        state = logger.state_dict()
        random = torch.get_rng_state()
        run_until(logger, [250, 300])  # lost: the run dies after its checkpoint
    torch.set_rng_state(random)
    # The rows of a run stay one configuration, whatever a newer version makes of its options.
    resumed = make_logger(broken, changes={"optim.lr": 1.0})
    resumed.load_state_dict(state)
    assert resumed.clock.seconds() >= state["wall_seconds"]
    with resumed:
        run_until(resumed, [300, 400])

    def timeless(found):
        return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in found]

    assert timeless(read_rows(broken)) == timeless(read_rows(whole))
    assert read_metrics(broken) == read_metrics(whole)
    for seed in SEEDS:
        one, other = scalars(broken, seed), scalars(whole, seed)
        assert [step for step, _ in one["losses/td_loss"]] == [100, 200, 300, 400]
        assert one["losses/td_loss"] == other["losses/td_loss"]


def test_the_state_survives_a_checkpoint(tmp_path):
    from cerl.record import checkpoint

    logger = make_logger(tmp_path)
    run_until(logger, [100])
    checkpoint.save(tmp_path, {"logger": logger.state_dict()})
    again = make_logger(tmp_path)
    again.load_state_dict(checkpoint.load(tmp_path).state["logger"])
    assert (again.step, again.updates, again.record.latest) == (100, 25, logger.record.latest)
    logger.record.boards.close()


def test_rows_of_another_run_are_never_overwritten(tmp_path):
    with make_logger(tmp_path) as logger:
        run_until(logger, [100])
    before = (tmp_path / "rows.parquet").read_bytes()
    with pytest.raises(RowsError, match="rows of another run"), make_logger(tmp_path) as logger:
        run_until(logger, [100])
    assert (tmp_path / "rows.parquet").read_bytes() == before


@pytest.mark.parametrize("how", ["freeze", "cut"])
def test_a_seed_that_diverged_is_marked_from_then_on(tmp_path, how):
    logger, text, diverged = make_logger(tmp_path, changes={"diverged": how}), io.StringIO(), {}
    logger.console.quiet, logger.record.diverged = False, diverged
    logger.console.screen.console = PipeConsole(file=text, soft_wrap=True)
    with logger:
        run_until(logger, [100])
        diverged[1] = 200
        run_until(logger, [200, 300])
    steps = {200} if how == "cut" else {200, 300}
    for seed, sound, marked in ((SEEDS[0], {100, 200, 300}, set()), (SEEDS[1], {100}, steps)):
        own = [r for r in read_rows(tmp_path) if r["seed"] == seed]
        assert {r["step"] for r in own if r["diverged"]} == marked
        assert {r["step"] for r in own if not r["diverged"]} == sound
        measured = {r["step"] for r in read_metrics(tmp_path) if r["seed"] == seed}
        assert measured == sound | marked
        tags = scalars(tmp_path, seed)
        assert {step for step, _ in tags.get("charts/diverged", [])} == marked
    # Headlines are means over seeds: one that is cut does not count, one that stays is named.
    own = scores_at(300)["vote"].returns[: 1 if how == "cut" else 2].mean()
    assert logger.record.latest["vote"] == pytest.approx(float(own))
    assert text.getvalue().count("seed 8 diverged at 200 agent steps") == 5
    assert "done, but seed 8 diverged at 200 agent steps: 300 agent steps" in text.getvalue()


def test_a_full_disk_costs_no_rows(tmp_path, monkeypatch):
    logger = make_logger(tmp_path)
    text = io.StringIO()
    logger.console.screen.console = PipeConsole(file=text, soft_wrap=True)
    with logger:
        run_until(logger, [100])
        before = (tmp_path / "rows.parquet").read_bytes()

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        run_until(logger, [200, 300])
        assert (tmp_path / "rows.parquet").read_bytes() == before
        assert not list(tmp_path.glob(".*tmp"))
        monkeypatch.undo()
        run_until(logger, [400])
        assert {r["step"] for r in read_rows(tmp_path)} == {100, 200, 300, 400}
    said = text.getvalue()
    assert said.count("No space left on device") == 1 and "rows stay in memory" in said
    # At the very end there is no next time.
    monkeypatch.setattr("os.fsync", full)
    logger.training(500, 125, {"loss": torch.zeros(2, 3)})
    with pytest.raises(RowsError, match="last rows are lost. Free some space"):
        logger.flush(final=True)
    logger.record.boards.close()


def test_damaged_and_foreign_tables_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    logger = make_logger(tmp_path)
    state = {"step": 10, "updates": 2, "wall_seconds": 1.0, "latest": {}, "config_hash": "x"}
    with pytest.raises(RowsError, match=f"{path}: damaged"):
        logger.load_state_dict(state)
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(RowsError, match="got none named preset"):
        logger.load_state_dict(state)
    path.unlink()
    with pytest.raises(RowsError, match="no such file"):
        rows.read(path, rows.ROWS)


def test_config_hash_ignores_seeds_and_nothing_that_decides_a_score():
    def hash_of(**overrides):
        return rows.config_hash(config.load("catch/ddqn", overrides))

    same = hash_of()
    assert hash_of(seeds=[5], out="elsewhere", device="cpu", threads=2) == same
    assert hash_of(**{"log.every": 77}) == same
    changes = {"optim.lr": 2e-3, "env.envs": 2, "precision": "fp32", "eval.episodes": 3}
    assert len({same, *(hash_of(**{key: value}) for key, value in changes.items())}) == 5
    assert len(same) == 12 and int(same, 16) >= 0


def test_env_name_tells_families_apart():
    assert rows.env_name(config.load("catch/ddqn")) == "catch"
    game = config.load("minatar/ddqn", {"env.name": "seaquest"})
    assert rows.env_name(game) == "minatar/seaquest"
    assert rows.env_name(config.load("atari/ddqn", {"env.name": "Pong"})) == "atari/Pong"


def printed(tmp_path, *, terminal: bool) -> str:
    text = io.StringIO()
    logger = make_logger(tmp_path, quiet=False)
    look = {"highlight": False, "soft_wrap": True, "width": 100}
    logger.console.screen.console = PipeConsole(file=text, force_terminal=terminal, **look)
    with logger:
        logger.console.drawn = -1.0
        logger.progress(50, 12)
        run_until(logger, [100, 200])
    return text.getvalue()


def test_without_a_terminal_there_is_one_plain_line_per_log_interval(tmp_path):
    lines = printed(tmp_path, terminal=False).splitlines()
    assert "\x1b" not in "".join(lines)
    assert sum(line.startswith("100/1,000 steps  ETA ") for line in lines) == 1
    assert sum(line.startswith("200/1,000 steps  ETA ") for line in lines) == 1
    at = [line for line in lines if "evaluation at 200 agent steps" in line]
    results = scores_at(200)
    means = {name: float(results[name][0].mean()) for name in results}
    assert len(at) == 1 and f"individual {means['individual']:.4g}" in at[0]
    assert f"vote {means['vote']:.4g}" in at[0]
    assert any(line.startswith("  optim: {name: adam, lr: 0.001") for line in lines)
    assert lines[-1].startswith("done: 200 agent steps of 2 seeds")
    assert f"tensorboard --logdir {tmp_path}" in lines[-1]


def test_a_terminal_shows_a_bar_that_is_redrawn(tmp_path):
    text = printed(tmp_path, terminal=True)
    assert "\x1b" in text and "━" in text and "50/1,000 steps" in text
    assert "evaluation at 200 agent steps" in text and "done: 200" in text


def test_quiet_prints_notes_and_nothing_else(tmp_path):
    text = io.StringIO()
    logger = make_logger(tmp_path)
    logger.console.screen.console = PipeConsole(file=text, soft_wrap=True)
    with logger:
        run_until(logger, [100])
        logger.note("resumed at agent step [100]")
    assert text.getvalue() == "resumed at agent step [100]\n"


def test_pace_is_measured_over_the_window(monkeypatch):
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    watch = progress.Pace(1000)
    watch.add(100, 0)
    assert all(math.isnan(rate) for rate in watch.rates()) and math.isnan(watch.left())
    watch.add(200, 30)
    watch.add(400, 60)
    assert watch.rates() == (15.0, 3.0) and watch.left() == 40.0
    watch.add(1016, 80)  # many environments step past the end
    assert watch.left() == 0.0
    assert progress.duration(3723.4) == "1:02:03" and progress.duration(NAN) == "-:--:--"
    assert [progress.rate(x) for x in (3.14159, 314.2, 31415.9, 3.1e6, 4e9)] == [
        "3.1",
        "314",
        "31.4k",
        "3.1M",
        "4.0G",
    ]


def test_weighted_mean_leaves_out_what_has_no_weight():
    assert weighted(np.array([1.0, NAN, 4.0]), np.array([1.0, 0.0, 2.0])) == 3.0
    assert math.isnan(weighted(np.array([1.0]), np.array([0.0])))


def test_events_that_cannot_be_written_are_said_and_print_no_traceback(
    tmp_path, monkeypatch, capfd
):
    logger = make_logger(tmp_path)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        flush = close = lambda self: None

    with logger:
        run_until(logger, [100])
        (board,) = logger.record.boards.all
        for writer in cast(TensorBoard, board).writers:
            writer.records._writer = Full()
        run_until(logger, [200, 300])
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert said.out.count("no more TensorBoard events are written (No space left on device)") == 1
    assert {row["step"] for row in read_rows(tmp_path)} == {100, 200, 300}
