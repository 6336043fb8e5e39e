"""Names for trained settings: the preset, and the options in which its runs differ.

Run folders, tables, legends and plans call a setting by its `Label`, e.g. "bootdqn, members 5,
capacity 100k". A label is worked out from all settings that are shown together, so it has the same
text in every environment and states an option only if that tells settings of the preset apart.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from cerl.config import errors, preset
from cerl.config.effects import SAME, section_of
from cerl.config.errors import ConfigError
from cerl.config.load import sections
from cerl.config.numbers import human
from cerl.config.options import Config
from cerl.text import visible

# Options, or groups of options, that may follow from the environment: its own options, and those
# that follow from the length of its episodes. A preset that is run on several environments keeps
# one name though these options differ between them.
FOLLOWS_ENV = (
    *("env", "eval.time_limit", "explore.end"),
    *("encoder.context", "encoder.learnt", "encoder.cache"),
)
ABSENT = object()  # in place of the value of an option that a setting does not have
_SAME = {one.option: one for one in SAME}


class Setting(NamedTuple):
    """The preset, environment and options of a run, without its seeds and its length."""

    preset: str
    env: str  # as in result rows: family/name
    options: Mapping[str, Any] | None  # `effects.differences` of the Config; None: unknown


class Label(NamedTuple):
    """The name of a setting: a method, and its values of the options that tell settings apart."""

    method: str  # the preset, without its family where that is unambiguous
    options: dict[str, Any]  # values by dotted key, in the order of the config
    short: Mapping[str, str] = {}  # what `text` calls options; default: as `short_names` does

    @property
    def text(self) -> str:
        """The name on one line, e.g. "bootdqn, members 5, capacity 100k"."""
        names = {**short_names([*self.options]), **self.short}
        values = (f"{names[key]} {human(value)}" for key, value in self.options.items())
        return visible(", ".join([self.method, *values]))

    def without(self, option: str) -> "Label":
        """The label of all settings that differ from this one in that option alone."""
        return self._replace(options={k: v for k, v in self.options.items() if k != option})


def labelled(settings: Sequence[Setting]) -> list[Label]:
    """The label of each setting, in the order of the settings.

    An option is part of the labels of a preset if, for this preset, it has several values within
    one environment, or several values over environments and is none of `FOLLOWS_ENV`. Options of
    one kind of a section, such as those of encoder gru, are only compared between runs of that
    kind. Where runs of several kinds state an option, such as the learning rate of optimisers, it
    is compared between them too, except in the section encoder, whose kinds have sizes of their
    own. Only forks say where they were forked. Settings whose options are unknown are called by
    their preset alone.

    Args: settings, all that are shown together; options that do not influence scores, such as the
          device, must not be among their options (`cerl.record.results.scoring`).
    """
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.preset, []).append(setting)
    told = {name: ordered(_telling(own)) for name, own in groups.items()}
    short = short_names([key for found in told.values() for key in found])
    methods = _methods(settings)
    labels = []
    for name, _, options in settings:
        values: dict[str, Any] = {}
        if options is not None:
            there = [key for key in told[name] if exists(options, key)]
            values = {key: value_of(options, key) for key in there}
            if not values.get("origin.forked_at"):
                values.pop("origin.forked_at", None)
        labels.append(Label(methods[name], values, short))
    return labels


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that have several values among some settings, in the order of the config.

    The family and the name of the environment are left out.

    Args: settings, the options of each, as in `Setting`.
    """
    several: dict[str, set[Any]] = {}
    keys = {key for options in settings for key in options} - {"env.family", "env.name"}
    for options in settings:
        for key, code in _codes(options, keys).items():
            several.setdefault(key, set()).add(code)
    return ordered(key for key, codes in several.items() if len(codes) > 1)


def ranked(labels: Sequence[Label]) -> list[str]:
    """The different texts of some labels, as legends list them: by method in the order in which
    methods first come, then by values ascending, numbers as numbers."""
    first: dict[str, Label] = {}
    for label in labels:
        first.setdefault(label.text, label)
    methods = [*dict.fromkeys(label.method for label in labels)]
    places = {
        text: (methods.index(label.method), [rank_of(value) for value in label.options.values()])
        for text, label in first.items()
    }
    return sorted(first, key=places.__getitem__)


def rank_of(value: Any) -> tuple[Any, ...]:
    """A key that sorts values of one option: none, numbers, lists of numbers, texts."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return 1, value
    if isinstance(value, list | tuple):
        return 2, tuple(rank_of(part) for part in value)
    return 3, str(value)


def short_names(options: Sequence[str]) -> dict[str, str]:
    """Short names of options: the last part of the dotted key, in words; more parts where two
    options would be called the same. The kind of a section, `encoder.name`, is called `encoder`.

    Returns: {dotted key: name}.
    """
    parts = {key: key.removesuffix(".name").split(".") for key in options}
    length = dict.fromkeys(parts, 1)
    while True:
        found = {key: " ".join(p[-length[key] :]).replace("_", " ") for key, p in parts.items()}
        names = list(found.values())
        longer = [k for k, p in parts.items() if names.count(found[k]) > 1 and length[k] < len(p)]
        if not longer:
            return found
        for key in longer:
            length[key] += 1


def ordered(options: Iterable[str]) -> list[str]:
    """Dotted keys in the order of the config; unknown ones come last."""
    places = _places()
    return sorted(set(options), key=lambda key: (places.get(key, len(places)), key))


def exists(options: Mapping[str, Any], key: str) -> bool:
    """Whether a setting has an option: the kinds of its sections have it, or it is stated."""
    return key in options or _default(key, _kinds(options))[0]


def value_of(options: Mapping[str, Any], key: str) -> Any:
    """The value of an option of a setting; its default if the setting does not state it.

    Where the default stands for another number, as 0 slots do for as many as episodes, it is that
    number. None if the setting has no such option.

    Args: options of the setting, as in `Setting`; key, dotted.
    """
    if key in options:
        return options[key]
    _, value = _default(key, _kinds(options))
    if key in _SAME:
        try:
            config = sections(preset.nested(options), where="")
        except ConfigError:  # options of another version
            return value
        section, name = section_of(config, key)
        if section is not None and getattr(section, name) == value:
            return _SAME[key].meant(config)
    return value


def _telling(own: Sequence[Setting]) -> Iterator[str]:
    """The options that are part of the labels of one preset. Args: own, its settings."""
    known = [(env, options) for _, env, options in own if options is not None]
    keys = {key for _, options in known for key in options}
    # The values of each option, by the kind of its section, and by environment where it may follow.
    values: dict[tuple[str, str, str], set[Any]] = {}
    follow = {k for k in keys if any(k == x or k.startswith(f"{x}.") for x in FOLLOWS_ENV)}
    for env, options in known:
        kinds = {key: _kind_of_section(options, key) for key in keys}
        for key, code in _codes(options, keys).items():
            if code is not ABSENT:
                compared = key, kinds[key], env if key in follow else ""
                values.setdefault(compared, set()).add(code)
                # All kinds together, if they state the option: what it is by default may differ.
                if key in options and not key.startswith("encoder."):
                    values.setdefault((key, "", compared[2]), set()).add(code)
    yield from {key for (key, _, _), codes in values.items() if len(codes) > 1}


def _kind_of_section(options: Mapping[str, Any], key: str) -> str:
    """The kind that a setting has in the section of an option; "" for the option that chooses the
    kind and in sections that have no kinds. Forks at the same step count as a kind, so that their
    origin is only told where it differs between them."""
    if key.startswith("origin.") and key != "origin.forked_at":
        return f"forked at {options.get('origin.forked_at', 0)}"
    for section, union in preset.UNIONS.items():
        if key.startswith(f"{section}.") and key != f"{section}.{union.key}" and section != "env":
            return str(options.get(f"{section}.{union.key}", union.default))
    return ""


def _codes(options: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Values of options of a setting, such that they can be compared; ABSENT where it has none."""
    codes, kinds = {}, _kinds(options)
    for key in keys:
        if key in options or _default(key, kinds)[0]:
            value = value_of(options, key) if key in _SAME else options.get(key, ABSENT)
            value = _default(key, kinds)[1] if value is ABSENT else value
            codes[key] = json.dumps(value) if isinstance(value, list | tuple | dict) else value
        else:
            codes[key] = ABSENT
    return codes


def _methods(settings: Sequence[Setting]) -> dict[str, str]:
    """{preset: what labels call it}: without the family, unless two presets would then be called
    the same, or options of some settings are unknown, as in rows of older versions."""
    names = dict.fromkeys(setting.preset for setting in settings)
    tails = [name.rpartition("/")[2] for name in names]
    if any(setting.options is None for setting in settings):
        return {name: name for name in names}
    return {
        name: tail if tail and tails.count(tail) == 1 else name
        for name, tail in zip(names, tails, strict=True)
    }


def _kinds(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of every section that is a union, in the order of `preset.UNIONS`."""
    return tuple(
        str(options.get(f"{section}.{union.key}", union.default))
        for section, union in preset.UNIONS.items()
    )


@cache
def _default(key: str, kinds: tuple[str, ...]) -> tuple[bool, Any]:
    """Whether there is an option under some kinds, and its default as a plain value."""
    chosen = dict(zip(preset.UNIONS, kinds, strict=True))
    model: Any = Config
    *groups, name = key.split(".")
    path = ""
    for group in groups:
        path = f"{path}.{group}".removeprefix(".")
        models = errors.section_models(model, group) if group in model.model_fields else {}
        model = models.get("") or models.get(chosen.get(path, ""))
        if model is None:
            return False, None
    if name not in model.model_fields:
        return False, None
    value = model.model_fields[name].default
    return True, [*value] if isinstance(value, tuple) else value


@cache
def _places() -> dict[str, int]:
    """The place of every option in the order of the config."""
    return {key: place for place, key in enumerate(dict.fromkeys(errors.keys(Config)))}
