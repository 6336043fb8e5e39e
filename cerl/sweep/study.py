"""Studies: a question as a file: presets, environments, seeds, and options that are varied.

A study is a YAML file: a shipped one in `configs/studies/`, or a user's own with `presets:` in it.
Its keys hold for every kind of device. The sections `cpu:` and `cuda:` lie over them, so that the
same question may be smaller on a CPU.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from cerl.config import ConfigError, Model, errors, lists, numbers, preset
from cerl.sweep.grid import Axes, check_values, every_option, of_tree

DEVICES = ("cpu", "cuda")


def _words(value: Any) -> Any:
    """A text as a list of its words; other values as they are."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _seeds(value: Any) -> Any:
    """Seeds as a list: a number or a text such as 0..4 stands for its values."""
    if isinstance(value, str):
        return tuple(numbers.values(value))
    return (value,) if isinstance(value, int) else value


def _part(value: Any) -> Any:
    """The name of a preset as the mapping that it stands for."""
    return {"preset": value} if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words), Field(strict=False)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(_seeds), Field(strict=False)]


class Part(Model):
    """A preset of a study; its options and axes come before those of the study."""

    preset: str
    """name of a preset, or path of a YAML file (relative to the study's own file)"""
    envs: Words = ()
    """environments or names of lists of them; none: those of the study"""
    options: dict[str, Any] = {}
    """values by dotted key"""
    grid: dict[str, Any] = {}
    """options with several values, of which every combination is trained"""
    zip: dict[str, Any] = {}
    """options with several values that advance together"""

    def groups(self) -> list[Axes]:
        """The axes of this preset alone. Raises: ConfigError."""
        return of_tree(self.grid, self.zip, where=self.preset, name=self.preset)


Parts = Annotated[
    tuple[Annotated[Part, BeforeValidator(_part)], ...],
    BeforeValidator(_words),
    Field(strict=False),
]


class Study(Model):
    """A study for one kind of device."""

    presets: Parts
    """the presets, each a name, or a mapping with `preset:` and what holds for it alone"""
    envs: Words = ()
    """environments, or names of lists of them; none: each preset's own"""
    seeds: Seeds = ()
    """seeds of every cell, e.g. 0..4; none: each preset's own"""
    options: dict[str, Any] = {}
    """values by dotted key, for every preset"""
    grid: dict[str, Any] = {}
    """options with several values, of which every combination is trained"""
    zip: dict[str, Any] = {}
    """options with several values that advance together"""
    skip: Literal["none", "contradictions"] = "none"
    """cells that are left out. none: a contradictory cell is an error; contradictions: it is left
    out, with a note"""
    answers: str = ""
    """the question that the study answers"""
    costs: str = ""
    """number of runs, and hours on a device"""

    def groups(self) -> list[Axes]:
        """The axes for every preset. Raises: ConfigError."""
        return of_tree(self.grid, self.zip, where="the study")


def file(name: str) -> Path:
    """The file of a study: a shipped study by its name, or the path itself of a YAML file."""
    if name.endswith(preset.SUFFIXES):
        return Path(name)
    return preset.FOLDER / preset.STUDIES / f"{name}.yaml"


def is_study(word: str) -> bool:
    """Whether a word names a study: a shipped one, or a YAML file with `presets:` in it.

    Raises: ConfigError if the file cannot be read.
    """
    if not word.endswith(preset.SUFFIXES):
        return word in preset.studies()
    tree = preset.read(Path(word))
    return any("presets" in part for part in [tree, *map(tree.get, DEVICES)] if part)


def load_study(name: str, device: Literal["cpu", "cuda"]) -> Study:
    """A study for a kind of device.

    Args:    name of a shipped study, or path of a YAML file.
    Raises:  ConfigError if a key is unknown or missing, or a value has a wrong type.
    """
    path = file(name)
    tree = preset.read(path)
    above = {kind: tree.pop(kind, None) for kind in DEVICES}
    for kind, part in above.items():
        if part is not None and not isinstance(part, Mapping):
            raise ConfigError(f"{path}: {kind}: expected `key: value` lines below it, got {part!r}")
    tree = preset.merged(tree, above[device] or {})
    _check_presets(tree.get("presets", ["absent"]), path)
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        where = f"{path}: {device}" if above[device] else str(path)
        raise errors.refused(error, Study, where=where) from None
    study = study.model_copy(update={"presets": tuple(_beside(p, path) for p in study.presets)})
    try:
        _check(study)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None
    return study


def _check(study: Study) -> None:
    """Raises: ConfigError for presets and options that do not exist, and for wrong values."""
    check_values(study.options, where="options")
    varied = {axis.option for group in study.groups() for axis in group.axes}
    for option in dict(preset.leaves(preset.nested(study.options))):
        if option in varied:
            raise ConfigError(f"{option}: expected it in options or in the grid, got both")
    for part in study.presets:
        preset.find(part.preset)
        check_values(part.options, where=f"{part.preset}: options")
        part.groups()


def _check_presets(given: Any, path: Path) -> None:
    """Raises: ConfigError if the presets of a file are an empty list, or one has a wrong key."""
    if not given:
        raise ConfigError(f"{path}: presets: expected at least one preset, got none")
    for number, part in enumerate(given if isinstance(given, list) else [], 1):
        try:
            if isinstance(part, Mapping):
                Part.model_validate(part)
        except ValidationError as error:
            name = part.get("preset", f"number {number}")
            raise errors.refused(error, Part, where=f"{path}: presets: {name}") from None


def _beside(part: Part, path: Path) -> Part:
    """A part whose preset, if it is a relative path, is relative to the file of the study."""
    if not part.preset.endswith(preset.SUFFIXES):
        return part
    return part.model_copy(update={"preset": str(path.parent / part.preset)})


def asked(names: Sequence[str], device: Literal["cpu", "cuda"]) -> list[Study]:
    """The studies that the words before the options of `cerl sweep` name.

    Presets are put together in a study without options. Each study keeps its own options and axes.

    Raises: ConfigError if a word is neither a preset, nor a study, nor a YAML file.
    """
    if not names:
        raise ConfigError("sweep: expected at least one preset or study; see `cerl list`")
    found: list[Study] = []
    together: list[str] = []
    for name in names:
        if not name.endswith(preset.SUFFIXES) and name not in (
            *preset.presets(),
            *preset.studies(),
        ):
            raise ConfigError(stray(name))
        if is_study(name):
            found += [*_of_presets(together), load_study(name, device)]
            together = []
        else:
            together.append(name)
    return [*found, *_of_presets(together)]


def _of_presets(names: Sequence[str]) -> list[Study]:
    parts = tuple(Part(preset=name) for name in dict.fromkeys(names))
    return [Study(presets=parts)] if parts else []


def title(names: Sequence[str]) -> str:
    """What a sweep is called: the name of its study, if the words name one study and nothing else;
    otherwise sweep."""
    return preset.title(names[0]) if len(names) == 1 and is_study(names[0]) else "sweep"


def stray(word: str) -> str:
    """Error message for a word that is neither a preset nor a study, with what was meant."""
    key, equals, values = word.lstrip("-").partition("=")
    prefix, colon, key = key.rpartition(":")
    key = key.replace("-", "_")
    options = every_option()
    if equals:
        close = key if key in options else next(iter(errors.closest(key, options, most=1)), key)
        first = f"{prefix} " if colon else ""  # `cerl sweep PRESET:OPTION=VALUES`
        return (
            f"sweep: expected a preset or a study, got {word!r}; did you mean {first}--grid "
            f"{prefix}{colon}{close}={values}?"
        )
    if key in options:
        return (
            f"sweep: expected a preset or a study, got the option {key}; did you mean "
            f"--{key} VALUE for one value, or --grid {key}=VALUES for several?"
        )
    if word in lists.lists():
        return (
            f"sweep: expected a preset or a study, got the list of environments {word}; did you "
            f"mean --envs {word}?"
        )
    hint = errors.nearest(word, [*preset.presets(), *preset.studies()])
    return (
        f"sweep: no preset or study {word!r}{hint} (`cerl list presets studies` shows them all; a "
        "path ending in .yaml is read as a file)"
    )
