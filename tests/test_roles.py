"""Roles of settings: they and their baselines follow from options, never from names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cerl.config import load, preset
from cerl.config.labels import Setting, labelled
from cerl.record import results
from cerl.report import roles
from cerl.report.curves import Cell, Curve

ONE = Curve(np.array([100]), np.zeros((1, 2)), np.ones((1, 2), dtype=np.int64))


def cells(*settings: tuple[str, Mapping[str, Any]], known: bool = True) -> list[Cell]:
    """A cell for each (preset, overrides)."""
    configs = [load(name, options) for name, options in settings]
    found = [results.scoring(config) for config in configs]
    envs = [results.env_name(config) for config in configs]
    names = [name for name, _ in settings]
    labels = labelled([Setting(*each) for each in zip(names, envs, found, strict=True)])
    return [
        Cell(
            env,
            name,
            label,
            options if known else None,
            results.hash_of(options),
            config.ensemble.members,
            (0, 1),
            {},
            {"individual": ONE},
        )
        for env, name, label, options, config in zip(
            envs, names, labels, found, configs, strict=True
        )
    ]


def named(pairs: list[roles.Pair]) -> list[tuple[str, str]]:
    return [(pair.cell.name, pair.baseline.name) for pair in pairs]


@pytest.mark.parametrize(
    ("name", "overrides", "role"),
    [
        ("minatar/ddqn", {}, "single"),
        ("minatar/cerl", {"ensemble.members": 1}, "single"),
        ("minatar/ddqn", {"loss.mask_probability": 0.5}, "other"),
        ("minatar/bootdqn", {}, "ensemble"),
        ("minatar/bootdqn-l1", {}, "ensemble"),
        ("minatar/bootdqn", {"loss.mask_probability": 0.5}, "other"),
        ("minatar/cerl", {}, "cerl"),
        ("minatar/cerl-both", {}, "other"),
        ("minatar/tandem", {}, "tandem"),
        ("minatar/cerl-own-target", {}, "other"),
        ("minatar/cerl-single-actor", {}, "other"),
        ("minatar/multi-horizon", {}, "other"),
        ("minatar/own-batches", {}, "other"),
        ("minatar/mico", {}, "other"),
        ("minatar/bootdqn", {"loss.batches": "disjoint", "replay.candidates": 128}, "other"),
        ("mujoco/sunrise", {}, "other"),
        ("mujoco/redq", {}, "other"),
        ("mujoco/standard-sac", {"agent.critics": 4}, "single"),
        ("mujoco/paper-cerl", {}, "cerl"),
    ],
)
def test_roles_follow_from_options(name: str, overrides: dict, role: str):
    assert roles.role_of(results.scoring(load(name, overrides))) == role


FAMILIES = sorted({name.partition("/")[0] for name in preset.presets()})


# Ensembles whose single agent with the same options is not shipped.
ALONE = ("atari/paper-qrdqn", "atari/qrdqn", "minatar/qrdqn")


def test_every_shipped_ensemble_and_cerl_has_its_baselines_among_the_presets():
    for family in FAMILIES:
        names = [name for name in preset.presets() if name.startswith(f"{family}/")]
        names = [name for name in names if name not in ALONE]
        settings: list[tuple[str, Mapping[str, Any]]] = [(name, {}) for name in names]
        if family == "mujoco":  # SUNRISE has five members
            settings.append(("mujoco/standard-ensemble", {"ensemble.members": 5}))
        found = cells(*settings)
        for role, baseline in roles.PAIRED:
            paired, alone = roles.pairs(found, role, baseline)
            assert not alone, (family, role, baseline, alone)
            for one in paired:
                a, b = roles.known(one.cell), roles.known(one.baseline)
                assert a is not None and b is not None
                assert (a.role, b.role) == (role, baseline)
                # What the two have in common in spite of their roles.
                for key in ("replay.capacity", "optim.lr", "encoder.name", "net.hidden"):
                    assert a.options.get(key) == b.options.get(key)


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("minatar/own-batches", {}),
        ("minatar/bootdqn", {"loss.batches": "disjoint", "replay.candidates": 128}),
        ("minatar/bootdqn", {"loss.mask_probability": 0.5}),
        ("minatar/mico", {}),
        ("minatar/multi-horizon", {}),
        ("minatar/cerl-own-target", {}),
        ("minatar/cerl-both", {}),
        ("minatar/cerl-single-actor", {}),
    ],
)
def test_a_variant_is_compared_with_the_plain_ensemble_and_the_single_agent(variant, overrides):
    several = [("minatar/ddqn", {}), ("minatar/bootdqn", {}), ("minatar/bootdqn-l1", {})]
    found = cells(*several, ("minatar/bootdqn", {"ensemble.members": 5}), (variant, overrides))
    baselines: tuple[tuple[roles.Role, int], ...] = (("single", 0), ("ensemble", 1))
    for baseline, place in baselines:
        paired, alone = roles.pairs(found, "other", baseline)
        assert not alone
        assert [(one.cell, one.baseline) for one in paired] == [(found[-1], found[place])]
    # It is no baseline itself, and no ensemble.
    assert found[-1] not in [p.cell for p in roles.pairs(found, "ensemble", "single")[0]]


def test_sunrise_is_compared_with_the_ensemble_of_its_size_and_redq_with_sac():
    own = {"ensemble.members": 5}
    found = cells(
        ("mujoco/standard-sac", {}),
        ("mujoco/standard-ensemble", {}),
        ("mujoco/standard-ensemble", own),
        ("mujoco/sunrise", {}),
        ("mujoco/redq", {}),
    )
    assert [p.baseline for p in roles.pairs(found, "other", "ensemble")[0]] == [found[2]]
    paired, alone = roles.pairs(found, "other", "single")
    assert [(p.cell, p.baseline) for p in paired] == [(found[3], found[0]), (found[4], found[0])]
    assert not alone and not roles.notes(found)


def test_a_variant_may_differ_in_nothing_but_what_makes_it():
    """Rows are drawn from more candidates where members have batches of their own."""
    found = cells(("minatar/bootdqn", {}), ("minatar/mico", {"replay.candidates": 128}))
    paired, alone = roles.pairs(found, "other", "ensemble")
    assert not paired and "candidates" in next(iter(alone))


def test_settings_of_a_grid_are_compared_within_the_same_other_options():
    grid = [
        (f"minatar/{name}", {"replay.capacity": size, "ensemble.members": members})
        for size in (25_000, 400_000)
        for name, several in (("ddqn", (1,)), ("bootdqn", (2, 5)), ("cerl", (2, 5)))
        for members in several
    ]
    found = cells(*grid)
    paired, alone = roles.pairs(found, "ensemble", "single")
    assert not alone
    assert named(paired) == [
        ("bootdqn, members 2, capacity 25k", "ddqn, capacity 25k"),
        ("bootdqn, members 5, capacity 25k", "ddqn, capacity 25k"),
        ("bootdqn, members 2, capacity 400k", "ddqn, capacity 400k"),
        ("bootdqn, members 5, capacity 400k", "ddqn, capacity 400k"),
    ]
    gains, _ = roles.pairs(found, "cerl", "ensemble")
    assert [(a.replace("cerl", "bootdqn"), b) for a, b in named(gains)] == [
        (pair.cell.name, pair.cell.name) for pair in paired
    ]


def test_without_an_equal_baseline_there_is_none_and_a_note_says_what_differs():
    found = cells(("catch/ddqn", {"replay.capacity": 500}), ("catch/bootdqn", {}))
    paired, alone = roles.pairs(found, "ensemble", "single")
    assert not paired and sum(alone.values(), []) == [found[1]]
    [note] = roles.notes(found)
    assert "no verdict of bootdqn against the single agent on catch" in note
    assert "ddqn differs in capacity" in note


def test_environments_are_not_mixed():
    found = cells(("minatar/ddqn", {"env.name": "asterix"}), ("minatar/bootdqn", {}))
    assert not roles.pairs(found, "ensemble", "single")[0]
    [note] = roles.notes(found)
    assert "on minatar/breakout: no single agent was run there" in note


def test_names_of_presets_do_not_matter():
    found = [
        cell._replace(preset=name, label=cell.label._replace(method=name))
        for cell, name in zip(
            cells(("catch/ddqn", {}), ("catch/bootdqn", {}), ("catch/cerl", {})),
            ("mine/cerl", "mine/sac", "mine/ddqn"),
            strict=True,
        )
    ]
    assert named(roles.pairs(found, "ensemble", "single")[0]) == [("mine/sac", "mine/cerl")]
    assert named(roles.pairs(found, "cerl", "ensemble")[0]) == [("mine/ddqn", "mine/sac")]


def test_losses_that_only_other_heads_read_do_not_separate_cerl_from_its_baselines():
    found = cells(("mujoco/paper-sac", {}), ("mujoco/paper-cerl", {}))
    assert len(roles.pairs(found, "cerl", "single")[0]) == 1
    found = cells(("mujoco/paper-sac", {}), ("mujoco/standard-cerl", {}))
    assert not roles.pairs(found, "cerl", "single")[0]


def test_of_several_baselines_the_one_with_the_most_equal_options_counts():
    whole = {"eval.every": 1_000}
    found = cells(("catch/ddqn", {}), ("catch/ddqn", whole), ("catch/bootdqn", whole))
    [pair] = roles.pairs(found, "ensemble", "single")[0]
    assert pair.baseline is found[1]


def test_options_that_rows_do_not_state_are_assumed_from_the_preset_and_that_is_said():
    found = cells(("catch/ddqn", {}), ("catch/bootdqn", {"ensemble.members": 3}), known=False)
    [pair] = roles.pairs(found, "ensemble", "single")[0]
    assert pair.assumed
    own = roles.known(found[1])
    assert own is not None and own.options["ensemble.members"] == 3
    assert "taken to be those of the presets of that name" in roles.notes(found)[0]


@pytest.mark.parametrize(
    "name", ["nobody/knows", "catch/ddqn.yaml", "../catch/ddqn", "/etc/passwd"]
)
def test_without_options_and_without_a_preset_there_is_no_role(name: str):
    [single, ensemble] = cells(("catch/ddqn", {}), ("catch/bootdqn", {}), known=False)
    found = [single, ensemble._replace(preset=name)]
    assert roles.known(found[1]) is None
    assert not roles.pairs(found, "ensemble", "single")[0]
    assert roles.notes([*cells(("catch/bootdqn", {})), found[1]])


def test_configurations_told_apart_only_by_their_hash_have_no_assumed_role():
    [cell] = cells(("catch/bootdqn", {}), known=False)
    label = cell.label._replace(method=f"catch/bootdqn [{cell.config_hash[:6]}]")
    assert roles.known(cell) is not None
    assert roles.known(cell._replace(label=label)) is None


def test_single_agents_alone_need_no_notes():
    assert roles.notes(cells(("memory/fox", {}), ("memory/gru", {}))) == []
