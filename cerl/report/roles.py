"""Roles of the settings of a report, and the setting that each is compared with.

A setting is a single agent, an ensemble, CERL, a tandem, or a variant of these. Its options decide,
never the name of its preset, so presets of one's own are read like those of cerl. The baseline of a
setting is trained on the same environment with the same options, but for those that make the role:
an ensemble of 10 with a buffer of 100k rows is compared with the single agent with 100k rows.

Rows of older versions may not state their options. Such a setting is taken to have the options of
the preset that it names, and `Pair.assumed` marks the comparison.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from cerl.config import ConfigError, load, preset
from cerl.config.labels import ordered, short_names, value_of
from cerl.record import results
from cerl.report.curves import Cell
from cerl.report.settings import Options
from cerl.text import few

Role = Literal["single", "ensemble", "cerl", "tandem", "other"]

# What notes call the settings of a role: one, several.
NAMES: dict[Role, tuple[str, str]] = {
    "single": ("single agent", "single agents"),
    "ensemble": ("ensemble", "ensembles"),
    "cerl": ("CERL", "settings of CERL"),
    "tandem": ("tandem", "tandems"),
    "other": ("variant", "variants"),
}

# Options that do not change what an episode returns: which policies are evaluated and how often,
# and where rows are stored. The environment's family and name stand in the rows.
ASIDE = ("env.family", "env.name", "compile", "replay.placement")
ASIDE += tuple(f"eval.{name}" for name in ("policies", "every", "episodes", "share", "slots"))
# Options that CERL and the ensemble that it is compared with may differ in. The agent's are those
# that only a member with several heads reads.
OF_HEADS = ("ensemble.heads", "ensemble.fork", "ensemble.horizons", "agent.gradient_scale")
# Options that an ensemble and the single agent that it is compared with may differ in.
OF_MEMBERS = ("ensemble", "loss.batches", "loss.batches_probability", "loss.mask_probability")
OF_MEMBERS += ("agent.gradient_scale", "agent.spread_temperature")

# The options that make each pair of roles: the setting's, then the baseline's. A variant may also
# differ in the options of those `VARIANTS` that it is.
PAIRED: dict[tuple[Role, Role], tuple[str, ...]] = {
    ("ensemble", "single"): OF_MEMBERS,
    ("cerl", "single"): (*OF_MEMBERS, *OF_HEADS),
    ("cerl", "ensemble"): OF_HEADS,
    ("other", "single"): (*OF_MEMBERS, *OF_HEADS),
    ("other", "ensemble"): OF_HEADS,
}


class Variant(NamedTuple):
    """A way to train that is neither the plain ensemble's, nor CERL's, nor the single agent's."""

    marks: Callable[[Callable[[str], Any]], bool]  # whether a setting is one, by its options
    options: tuple[str, ...]  # that make it, beside those of the heads


VARIANTS = {
    "batches of a member's own": Variant(
        lambda value: value("loss.batches") not in ("shared", "independent"),
        ("loss.batches", "loss.batches_probability", "replay.candidates"),
    ),
    "masks": Variant(lambda value: value("loss.mask_probability") < 1, ("loss.mask_probability",)),
    "heads of another kind": Variant(
        lambda value: (
            value("ensemble.heads") not in ("own", "cerl") or value("ensemble.fork") != "final"
        ),
        (),
    ),
    "one member acts": Variant(
        lambda value: value("ensemble.duty") == "first",
        ("ensemble.duty", "ensemble.active_probability"),
    ),
    "MICo": Variant(
        lambda value: (value("agent.mico_weight") or 0) > 0,
        ("agent.mico_weight", "agent.mico_beta"),
    ),
    "weights of SUNRISE": Variant(
        lambda value: (value("agent.spread_temperature") or 0) > 0, ("agent.spread_temperature",)
    ),
    "critics of REDQ": Variant(
        lambda value: (value("agent.target_critics") or 0) > 0,
        (
            *("agent.critics", "agent.target_critics", "agent.actor_value", "agent.policy_every"),
            *("agent.target_entropy", "schedule.updates", "schedule.update_every"),
        ),
    ),
}


class Known(NamedTuple):
    """What a cell of a report was trained as."""

    role: Role
    options: Options  # differences from the defaults
    assumed: bool  # the rows do not state the options; they are those of the preset of that name


class Pair(NamedTuple):
    """A setting and its baseline, on one environment."""

    cell: Cell
    baseline: Cell
    assumed: bool  # the options of one of the two are assumed, see `Known`


def role_of(options: Options) -> Role:
    """The role of a setting.

    "single": one member. "ensemble": several members that learn from data of all, each by its own
    head, all of which act. "cerl": the same with heads cerl. "tandem": duty tandem. "other": the
    `VARIANTS` of all these.

    Args: options, differences from the defaults.
    """

    value = functools.partial(value_of, options)
    heads, members = value("ensemble.heads"), value("ensemble.members")
    if members > 1 and value("ensemble.duty") == "tandem":
        return "tandem"
    found = variants_of(options)
    if members == 1:
        # A CERL agent of one member has a single head, and regresses it as the single agent does.
        # Whose turn it is, and whose rows, are no questions there.
        only = {"masks", "MICo", "critics of REDQ"}
        other = only & {*found} or heads not in ("own", "cerl")
        return "other" if other else "single"
    if found or value("ensemble.duty") != "uniform" or value("ensemble.frozen"):
        return "other"
    return "cerl" if heads == "cerl" else "ensemble"


def variants_of(options: Options) -> list[str]:
    """The keys of `VARIANTS` that a setting is. Args: options, differences from the defaults."""
    value = functools.partial(value_of, options)
    return [name for name, variant in VARIANTS.items() if variant.marks(value)]


def known(cell: Cell) -> Known | None:
    """What a cell was trained as; None if neither its rows nor the presets tell.

    A number of members in the rows counts more than that of an assumed preset.
    """
    options, assumed = cell.options, cell.options is None
    if options is None:
        # A label ends in digits of the hash where one preset was run with several configurations,
        # which cannot all be the preset's own.
        if f"[{cell.config_hash[:6]}]" in cell.name:
            return None
        options = _of_preset(cell.preset)
        if options is None:
            return None
        options = {**options, "ensemble.members": cell.members}
    return Known(role_of(options), options, assumed)


@functools.cache
def _of_preset(name: str) -> Options | None:
    """The options of a preset of cerl; None if there is none of that name. It is never taken for
    the path of a file, since names in rows may be anybody's."""
    if name not in preset.presets():
        return None
    try:
        return results.scoring(load(name))
    except ConfigError:
        return None


def pairs(
    found: Sequence[Cell], role: Role, baseline: Role
) -> tuple[list[Pair], dict[str, list[Cell]]]:
    """The settings of one role with their baselines of another role.

    Of several possible baselines the one with the most equal options counts; then the first whose
    preset is of the same family. A fork without a baseline among forks of the same run has that run
    as its baseline, if it is one.

    Args:    found, from `curves.cells`; role and baseline, a key of `PAIRED`.
    Returns: pairs, in the order of `found`; settings without a baseline, by the reason.
    """
    all_known = [(cell, own) for cell in found if (own := known(cell)) is not None]
    baselines = [(cell, own) for cell, own in all_known if own.role == baseline]
    others: dict[str, list[tuple[Cell, Known]]] = {}
    for cell, own in baselines:
        others.setdefault(cell.env, []).append((cell, own))
    # Baselines by what they have to be equal in, for each set of options that may differ.
    there: dict[tuple[str, ...], dict[tuple[str, str], list[tuple[Cell, Known]]]] = {}
    paired: list[Pair] = []
    alone: dict[str, list[Cell]] = {}
    for cell, own in all_known:
        # A variant of a single agent has no ensemble beside it.
        if own.role != role or (baseline == "ensemble" and cell.members == 1):
            continue
        free = _free(own, role, baseline)
        if free not in there:
            there[free] = {}
            for one in baselines:
                there[free].setdefault(_key(*one, free), []).append(one)
        here = others.get(cell.env, [])
        if candidates := there[free].get(_key(cell, own, free)) or _parents(cell, own, free, here):
            best = min(candidates, key=functools.partial(_distance, (cell, own)))
            paired.append(Pair(cell, best[0], own.assumed or best[1].assumed))
        else:
            reason = _reason(own, here, baseline, free)
            alone.setdefault(reason, []).append(cell)
    return paired, alone


def _free(own: Known, role: Role, baseline: Role) -> tuple[str, ...]:
    """The options in which a setting may differ from its baseline."""
    more = [VARIANTS[name].options for name in variants_of(own.options)] if role == "other" else []
    return tuple(dict.fromkeys([*PAIRED[role, baseline], *sum(more, ())]))


def _key(cell: Cell, own: Known, free: Iterable[str]) -> tuple[str, str]:
    """The environment and the options in which a setting and its baseline are equal."""
    return cell.env, json.dumps(_compared(own.options, free), sort_keys=True)


def _parents(
    cell: Cell, own: Known, free: Iterable[str], candidates: Sequence[tuple[Cell, Known]]
) -> list[tuple[Cell, Known]]:
    """The baselines that a fork comes from, for a fork that has no other: up to the fork they are
    one run, so their seeds are pairs. The options have to be equal but for the fork itself."""
    if not own.options.get("origin.forked_at"):
        return []
    free = (*free, "origin")
    wanted = _compared(own.options, free)
    return [
        (other, theirs)
        for other, theirs in candidates
        if other.config_hash == own.options.get("origin.options")
        and _compared(theirs.options, free) == wanted
    ]


def _compared(options: Options, free: Iterable[str]) -> dict[str, Any]:
    """The options of a setting in which its baseline must be equal. Args: free, options that may
    differ."""
    left_out = (*ASIDE, *free)
    kept = {
        key: value
        for key, value in options.items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }
    # Loss mse_huber is the squared error, which is the default, for a member's own head.
    if kept.get("agent.loss") == "mse_huber":
        kept = {k: v for k, v in kept.items() if k not in ("agent.loss", "agent.huber_delta")}
    return kept


def _distance(setting: tuple[Cell, Known], candidate: tuple[Cell, Known]) -> tuple[int, bool]:
    """How far a possible baseline is from a setting: the options that differ, and whether the
    family of the preset does."""
    (cell, own), (other, theirs) = setting, candidate
    away = cell.preset.rpartition("/")[0] != other.preset.rpartition("/")[0]
    return len(_differing(own.options, theirs.options)), away


def _differing(one: Options, other: Options) -> list[str]:
    keys = {*one, *other}
    return ordered(key for key in keys if one.get(key) != other.get(key))


def _reason(
    own: Known, candidates: Sequence[tuple[Cell, Known]], baseline: Role, free: Sequence[str]
) -> str:
    """Why a setting has no baseline, as the end of a sentence."""
    if not candidates:
        return f"no {NAMES[baseline][0]} was run there"
    wanted = _compared(own.options, free)
    options = [_differing(wanted, _compared(theirs.options, free)) for _, theirs in candidates]
    nearest = min(range(len(options)), key=lambda k: len(options[k]))
    short = short_names(options[nearest])
    differing = few([short[key] for key in options[nearest]])
    name = candidates[nearest][0].name
    return f"no {NAMES[baseline][0]} has the same options; {name} differs in {differing}"


def notes(found: Sequence[Cell]) -> list[str]:
    """What a reader of verdicts has to know about roles: settings without a baseline, and settings
    whose options are assumed. One sentence each."""
    out = []
    for role, baseline in PAIRED:
        _, alone = pairs(found, role, baseline)
        for reason, cells in alone.items():
            which = few([*dict.fromkeys(cell.name for cell in cells)], between=" / ")
            envs = [*dict.fromkeys(cell.env for cell in cells)]
            out.append(
                f"no verdict of {which} against the {NAMES[baseline][0]} on {few(envs)}: {reason}"
            )
    each = [(cell, known(cell)) for cell in found]
    roles = {own.role for _, own in each if own is not None}
    if not roles - {"single"}:
        return []
    if assumed := [cell.preset for cell, own in each if own is not None and own.assumed]:
        names = [*dict.fromkeys(assumed)]
        out.append(
            "rows do not state the options of some settings; for verdicts they are taken to be "
            f"those of the presets of that name: {few(names)}"
        )
    if unknown := [cell.name for cell, own in each if own is None]:
        out.append(
            "rows do not state the options of some settings and no preset tells them, so there "
            f"are no verdicts on them: {few([*dict.fromkeys(unknown)], between=' / ')}"
        )
    return out
