"""Grids: options that take several values in a study, and the points of a grid.

An axis is an option with its values. Axes of one group advance together (`--zip`), and the groups
are multiplied (`--grid`: each axis is a group of its own). Every value is checked against the type
of its option here, before any preset is read.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cerl.config import Config, ConfigError, errors, numbers, preset
from cerl.record.results import ASIDE


class Axis(NamedTuple):
    """An option with the values that it takes."""

    option: str  # its dotted key
    values: tuple[Any, ...]


class Axes(NamedTuple):
    """Axes that advance together; a group of one axis is an ordinary axis of the product."""

    preset: str  # the only preset that they are for; "": for every preset
    axes: tuple[Axis, ...]


def read(words: Sequence[str], *, option: str = "--grid") -> list[Axes]:
    """The groups of `[PRESET:]OPTION=VALUES` words, one for each word.

    Args:   option, what error messages call the option of the command line.
    Raises: ConfigError.
    """
    groups = [
        Axes(name, (_distinct(axis, where=f"{option} {word}"),))
        for word in words
        for name, axis in [_axis(word, option=option)]
    ]
    refuse_repeated(groups, where=option)
    return groups


def zipped(words: Sequence[str], *, option: str = "--zip") -> list[Axes]:
    """The groups of `[PRESET:]OPTION=VALUES` words, one for each preset named (or for none).

    Raises: ConfigError, for example if options of one group have different numbers of values.
    """
    found: dict[str, list[Axis]] = {}
    for word in words:
        name, axis = _axis(word, option=option)
        found.setdefault(name, []).append(axis)
    groups = [_together(name, axes, where=option) for name, axes in found.items()]
    refuse_repeated(groups, where=option)
    return groups


def of_tree(
    grid: Mapping[str, Any], together: Mapping[str, Any], *, where: str, name: str = ""
) -> list[Axes]:
    """The groups of a study file.

    Args:   grid, together: values by option, of the keys `grid:` and `zip:`. The values of an
            option are a list, one value, or a text as on the command line ("25k,100k", "0..4");
            where, what error messages call the place; name of the preset that the groups are for,
            "" for every preset.
    Raises: ConfigError.
    """
    groups = [
        Axes(name, (_distinct(_listed(key, given, where=at), where=at),))
        for key, given in preset.leaves(preset.nested(grid))
        for at in [f"{where}: grid: {key}"]
    ]
    axes = [
        _listed(key, given, where=f"{where}: zip: {key}")
        for key, given in preset.leaves(preset.nested(together))
    ]
    if axes:
        groups.append(_together(name, axes, where=f"{where}: zip"))
    refuse_repeated(groups, where=where)
    return groups


def points(groups: Sequence[Axes]) -> list[dict[str, Any]]:
    """Every point of a grid: the values of its options. The last group varies fastest.

    Without groups there is one point, without any options.
    """
    steps = [
        [
            dict(zip([axis.option for axis in group.axes], values, strict=True))
            for values in zip(*[axis.values for axis in group.axes], strict=True)
        ]
        for group in groups
    ]
    return [
        {option: value for step in chosen for option, value in step.items()}
        for chosen in itertools.product(*steps)
    ]


def in_words(axis: Axis) -> str:
    """An axis as a word of the command line, e.g. ensemble.members=2,5,10."""
    return f"{axis.option}={','.join(preset.as_word(value) for value in axis.values)}"


def holders(option: str) -> list[type[BaseModel]]:
    """The models that have an option: one for each kind of its section that has it.

    Empty if there is no such option, or if its dotted key is that of a section.
    """
    *groups, name = option.split(".")
    models: list[type[BaseModel]] = [Config]
    for group in groups:
        models = [
            below
            for model in models
            if group in model.model_fields
            for below in errors.section_models(model, group).values()
        ]
    return [
        model
        for model in models
        if name in model.model_fields and not errors.section_models(model, name)
    ]


@functools.cache
def every_option() -> tuple[str, ...]:
    """The dotted keys of all options of all kinds, without those of sections."""
    return tuple(key for key in dict.fromkeys(errors.keys(Config)) if holders(key))


def takes_several(option: str) -> bool:
    """Whether the value of an option is a list, so that `--OPTION 1 2 3` gives it one value."""
    return any(get_origin(kind) is tuple for kind in _types(option))


def is_text(option: str) -> bool:
    """Whether the values of an option are texts, which are not read as numbers."""
    return all(
        kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))
        for kind in _types(option)
    )


def check_option(option: str, *, where: str) -> None:
    """Raises: ConfigError if no axis can be made of an option."""
    if option == "env.name":
        raise ConfigError(f"{where}: expected other options; environments are chosen by --envs")
    if option in ("env.family", "preset"):
        raise ConfigError(f"{where}: expected other options; name several presets instead")
    if option == "seeds":
        raise ConfigError(
            f"{where}: seeds are no axis of a grid, since a run trains all of its seeds; expected "
            "--seeds, e.g. --seeds 0..4"
        )
    if option == "schedule.steps":
        raise ConfigError(
            f"{where}: the length of a run is no axis of a grid, since the longest run contains "
            "the shorter ones; train with the largest number (--schedule.steps) and compare at "
            "fewer agent steps with `cerl report --until`"
        )
    if any(option == name or option.startswith(f"{name}.") for name in ASIDE):
        raise ConfigError(
            f"{where}: {option} has no influence on scores, so it is no axis of a grid; expected "
            f"one value for all runs: --{option}"
        )
    if moved := errors.moved(option):
        raise ConfigError(f"{where}: {moved}")
    if not holders(option):
        inside = [key for key in every_option() if key.startswith(f"{option}.")]
        if inside and option not in errors.unions(Config):
            raise ConfigError(
                f"{where}: {option} is a group of options; expected one of them: "
                f"{', '.join(inside)}"
            )
        if option in errors.unions(Config):
            hint = f"; did you mean {option}.{preset.UNIONS[option].key}?"
        else:
            hint = errors.nearest(option, every_option())
        raise ConfigError(f"{where}: no option {option!r}{hint}")


def check_values(tree: Mapping[str, Any], *, where: str) -> None:
    """Checks single values of options, as `options:` of a study states them.

    Args:   tree, nested or with dotted keys; where, what error messages call it.
    Raises: ConfigError if there is no such option, or if no kind of its section accepts the value.
    """
    known = every_option()
    problems: list[str] = []
    for key, value in preset.leaves(preset.nested(tree)):
        if key in known and (text := _refused(key, value)):
            problems.append(f"{where}: {key}: {text}")
        # Options such as env.kwargs are mappings themselves, with keys of their own.
        elif key not in known and not any(key.startswith(f"{name}.") for name in known):
            hint = errors.moved(key) or f"no such option{errors.nearest(key, known)}"
            problems.append(f"{where}: {key}: {hint.removeprefix(f'{key}: ')}")
    if problems:
        raise ConfigError("\n".join(problems))


def _types(option: str) -> list[Any]:
    name = option.rpartition(".")[2]
    return [model.model_fields[name].annotation for model in holders(option)]


def _axis(word: str, *, option: str) -> tuple[str, Axis]:
    """The preset that a word of the command line names ("" for none), and its axis."""
    where = f"{option} {word}"
    left, equals, text = word.partition("=")
    name, _, key = left.rpartition(":")
    key = key.replace("-", "_")
    if not equals or not key:
        if word in (*preset.presets(), *preset.studies()) or word.endswith(preset.SUFFIXES):
            raise ConfigError(
                f"{where}: expected OPTION=VALUES, got a preset or study; those come first: "
                f"cerl sweep {word} {option} OPTION=VALUES"
            )
        raise ConfigError(f"{where}: expected OPTION=VALUES, e.g. ensemble.members=2,5,10")
    check_option(key, where=where)
    return name, _checked(Axis(key, tuple(_typed(key, text, where=where))), where=where)


def _listed(key: str, given: Any, *, where: str) -> Axis:
    """An axis from the values that a study file gives to an option."""
    check_option(key, where=where)
    values: list[Any] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        values += _typed(key, item, where=where) if isinstance(item, str) else [item]
    if not values:
        raise ConfigError(f"{where}: expected values, got an empty list")
    return _checked(Axis(key, tuple(values)), where=where)


def _typed(option: str, text: str, *, where: str) -> list[Any]:
    """The values of a comma-separated text, read by the type of the option that they are for."""
    if not is_text(option):
        try:
            return numbers.values(text)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{where}: expected values separated by commas, got {text!r}")
    return list(words)


def _checked(axis: Axis, *, where: str) -> Axis:
    """The axis, with a single item as a list where the option takes lists.

    Raises: ConfigError if no kind of the option's section accepts one of the values.
    """
    several = takes_several(axis.option)
    values = [[x] if several and not isinstance(x, list | tuple) else x for x in axis.values]
    problems = [line for value in values if (line := _refused(axis.option, value))]
    if problems:
        raise ConfigError("\n".join(f"{where}: {line}" for line in problems))
    return Axis(axis.option, tuple(tuple(x) if isinstance(x, list) else x for x in values))


def _refused(option: str, value: Any) -> str:
    """Why no kind of the option's section accepts a value; "" if one of them does."""
    group, _, name = option.rpartition(".")
    if group in preset.UNIONS and name == preset.UNIONS[group].key:
        kinds = list(errors.unions(Config)[group])
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        hint = errors.nearest(str(value), kinds)
        return "" if value in kinds else f"expected {known}, got {value!r}{hint}"
    lines: list[str] = []
    for model in holders(option):
        try:
            model.model_validate({name: value})
            return ""
        except ValidationError as error:
            found = errors.explained(error, model)
        # Only this option counts: others may be missing, or contradict it.
        about = [line for line in found if line.startswith((f"{name}:", f"{name}."))]
        if not about:
            return ""
        lines += about
    key, _, text = lines[0].partition(": ")
    item = key.removeprefix(name).removeprefix(".")
    return f"item {item}: {text}" if item else text


def _distinct(axis: Axis, *, where: str) -> Axis:
    """The axis. Raises: ConfigError if a value is given twice."""
    for value in axis.values:
        if axis.values.count(value) > 1:
            raise ConfigError(
                f"{where}: the value {preset.as_word(value)} is given {axis.values.count(value)} "
                "times (a list is one value in brackets: [64,64])"
            )
    return axis


def _together(name: str, axes: Sequence[Axis], *, where: str) -> Axes:
    """Axes as one group. Raises: ConfigError if they cannot advance together."""
    if len(axes) < 2:
        raise ConfigError(
            f"{where}: expected two or more options, which advance together, got only "
            f"{in_words(axes[0])}; a single one is an axis of the grid (--grid)"
        )
    if len({len(axis.values) for axis in axes}) > 1:
        counts = ", ".join(f"{axis.option} has {len(axis.values)}" for axis in axes)
        raise ConfigError(f"{where}: expected as many values for each option, but {counts}")
    return Axes(name, tuple(axes))


def refuse_repeated(groups: Sequence[Axes], *, where: str) -> None:
    """Checks that no option is given twice: for all presets, or for one.

    Args:   where, what error messages call the place that the groups come from.
    Raises: ConfigError if a preset, or all presets, have two axes of one option.
    """
    given = [(group.preset, axis.option) for group in groups for axis in group.axes]
    for name, option in given:
        if given.count((name, option)) > 1:
            raise ConfigError(f"{where}: {option} is given twice; expected all values in one list")
