"""Scales of returns: what becomes 0 and 1, and when a task has no scale."""

import numpy as np
import pytest
from result_rows import row, trained, write

from cerl.config import ConfigError
from cerl.report import curves, normalise


def cells_of(*folders):
    found, _ = curves.cells(curves.load_rows(folders))
    return {(cell.env, cell.name): cell for cell in found}


def study(folder, env="breakout", capacities=(25_000, 100_000)):
    """A single agent and an ensemble for each capacity; seeds return level and level + 1."""
    for k, capacity in enumerate(capacities):
        options = {"env.name": env, "replay.capacity": capacity}
        trained(folder / f"{env}-{k}-one", "minatar/ddqn", options, 10.0 * (k + 1))
        trained(folder / f"{env}-{k}-all", "minatar/bootdqn", options, 5.0 * (k + 1))
    return folder


def test_human_scores_are_those_of_the_reference_returns(tmp_path):
    options = {"env.name": "Pong"}
    cells = cells_of(trained(tmp_path / "a", "atari/paper-ddqn", options, -20.7))
    [cell] = cells.values()
    scale = normalise.scale_of(cell, "individual", [cell], "human")
    # Pong: -20.7 is a random policy, 14.6 a human player.
    np.testing.assert_allclose(scale(np.array([-20.7, 14.6, -3.05])), [0, 1, 0.5], atol=1e-12)
    with pytest.raises(normalise.NoScale, match="catch has no reference returns of a human"):
        other = cell._replace(env="catch")
        normalise.scale_of(other, "individual", [other], "human")


def test_the_single_agent_of_a_setting_has_its_value_of_what_differs(tmp_path):
    cells = cells_of(study(tmp_path))
    found = [*cells.values()]
    for k, capacity in ((0, "25k"), (1, "100k")):
        cell = cells["minatar/breakout", f"bootdqn, capacity {capacity}"]
        one = normalise.single_agent(cell, found)
        assert one.name == f"ddqn, capacity {capacity}"
        # Its two seeds return 10 and 11, or 20 and 21.
        scale = normalise.scale_of(cell, "individual", found, "single")
        assert scale == (0.0, 10.0 * (k + 1) + 0.5)
        assert normalise.scale_of(cell, "vote", found, "single") == scale
        assert normalise.single_agent(one, found) is one


def test_a_setting_without_a_single_agent_of_its_kind_has_no_scale_by_it(tmp_path):
    cells = cells_of(study(tmp_path / "a"))
    found = [*cells.values()]
    cell = cells["minatar/breakout", "bootdqn, capacity 25k"]
    ensembles = [other for other in found if other.members > 1]
    with pytest.raises(normalise.NoScale, match="minatar/breakout has no single agent"):
        normalise.single_agent(cell, ensembles)
    assert cell.options is not None
    third = cell._replace(options={**cell.options, "replay.capacity": 7})
    with pytest.raises(normalise.NoScale, match="0 of the 2 single agents on minatar/breakout"):
        normalise.single_agent(third, found)
    unknown = cell._replace(options=None)
    with pytest.raises(normalise.NoScale, match="2 single agents, and rows do not say"):
        normalise.single_agent(unknown, found)
    # With one single agent there is no doubt, even if rows do not state options.
    one = cells["minatar/breakout", "ddqn, capacity 25k"]
    assert normalise.single_agent(unknown, [one, unknown]) is one


@pytest.mark.parametrize("level, got", [(0.0, "(0)"), (-3.0, "(-3)"), (np.nan, "no finite")])
def test_a_single_agent_that_returns_nothing_above_0_is_no_scale(tmp_path, level, got):
    rows = [row(**{"return": level}), row(seed=1, **{"return": level})]
    cells = cells_of(write(tmp_path / "one", rows))
    [one] = cells.values()
    with pytest.raises(normalise.NoScale, match="not above 0") as error:
        normalise.scale_of(one, "individual", [one], "single")
    assert got in str(error.value)


def test_min_max_is_over_all_seeds_scores_and_settings_of_the_task_alone(tmp_path):
    cells = cells_of(study(tmp_path / "a"), study(tmp_path / "b", "asterix"))
    found = [*cells.values()]
    cell = cells["minatar/breakout", "bootdqn, capacity 25k"]
    # The lowest seed is one of the small ensemble, the highest one is the vote of the single agent.
    scale = normalise.scale_of(cell, "individual", found, "minmax")
    assert scale == pytest.approx((5.0, 21.1))
    other = [c for c in found if c.env == "minatar/breakout"]
    assert normalise.scale_of(cell, "vote", other, "minmax") == scale
    same = cell._replace(
        curves={k: c._replace(returns=0 * c.returns) for k, c in cell.curves.items()}
    )
    with pytest.raises(normalise.NoScale, match="have the same return"):
        normalise.scale_of(same, "individual", [same], "minmax")


def test_scales_from_scores_average_the_last_evaluations(tmp_path):
    for k, (name, level) in enumerate((("minatar/ddqn", 10.0), ("minatar/bootdqn", 1.0))):
        trained(tmp_path / str(k), name, {}, level, steps=(100, 200))
    cells = cells_of(tmp_path)
    found = []
    for cell in cells.values():
        own = {
            score: curve._replace(returns=curve.returns * np.array([[1.0], [3.0]]))
            for score, curve in cell.curves.items()
        }
        found.append(cell._replace(curves=own))
    [ensemble] = [cell for cell in found if cell.members > 1]
    assert normalise.scale_of(ensemble, "vote", found, "single", last=1).one == 31.5
    assert normalise.scale_of(ensemble, "vote", found, "single", last=2).one == 21.0


def test_whole_curves_are_normalised_and_what_has_no_scale_is_named(tmp_path):
    trained(tmp_path / "one", "minatar/ddqn", {"env.name": "breakout"}, 9.5, steps=(1, 2))
    trained(tmp_path / "all", "minatar/bootdqn", {"env.name": "breakout"}, 5.0, steps=(1, 2))
    trained(tmp_path / "alone", "minatar/bootdqn", {"env.name": "freeway"}, 5.0)
    found = [*cells_of(tmp_path).values()]
    out, notes = normalise.normalised(found, "single")
    assert {(c.env, c.preset) for c in out} == {
        ("minatar/breakout", "minatar/ddqn"),
        ("minatar/breakout", "minatar/bootdqn"),
    }
    [ensemble] = [cell for cell in out if cell.members > 1]
    np.testing.assert_allclose(
        ensemble.curves["individual"].returns, [[0.5, 0.6], [0.5, 0.6]], rtol=1e-12
    )
    [note] = notes
    assert "single-agent-normalised" in note and "minatar/freeway has no single agent" in note
    same, notes = normalise.normalised(found, "none")
    assert len(same) == 3 and not notes


def test_families_have_the_normalisation_that_their_returns_allow():
    assert normalise.by_default("atari") == ("human",)
    assert normalise.by_default("dmc") == ("thousand",)
    assert normalise.by_default("popgym") == normalise.by_default("memory") == ("none",)
    assert normalise.by_default("minatar") == normalise.by_default("mujoco") == ("single", "minmax")
    assert normalise.Scale(0.0, 1000.0)(np.array([250])) == 0.25
    assert normalise.known("minmax") == "minmax"
    with pytest.raises(ConfigError, match=r"no normalisation 'humans'.*did you mean human"):
        normalise.known("humans")
