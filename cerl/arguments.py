"""Reads the words of the command line: the values of a command's options, and options of a run."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from cerl.config import Config, ConfigError, errors, evaluated, preset
from cerl.config.form import form_of, key_of, refuse_moved
from cerl.record.folder import CHANGEABLE, FILE, changeable, unchangeable

Value = TypeVar("Value")
Kind = TypeVar("Kind")


HELP = ("-h", "--help")


def asks_help(words: Sequence[str]) -> bool:
    """Whether --help is among the words."""
    return any(word in HELP for word in words)


class Unread(Exception):
    """A value that cannot be read.

    It is no ValueError, since tyro would catch that and print it in a frame of its own.
    """


def filled(kind: type[Kind], arguments: Sequence[str], *, prog: str) -> tuple[Kind, list[str]]:
    """Fills the dataclass of a command from words of the command line.

    Args:    kind, the dataclass; prog, what usage messages call the program.
    Returns: the filled dataclass, and all words that are none of its options (--help included).
    Raises:  ConfigError if a value cannot be read, or an option is given twice.
    """
    _refuse_repeated(arguments)
    try:
        return tyro.cli(
            kind, args=list(arguments), prog=prog, add_help=False, return_unknown_args=True
        )
    except Unread as error:
        raise ConfigError(str(error)) from None


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Raises: ConfigError if an option is given twice; tyro would silently take the last."""
    given = [key for word in arguments if (key := key_of(word))]
    for key in given:
        if given.count(key) > 1:
            raise ConfigError(
                f"--{key}: given {given.count(key)} times, and only the last would count; expected "
                "once, several values one after the other (--seeds 0 1 2)"
            )


def refuse_unknown(command: str, rest: Sequence[str]) -> None:
    """Raises: ConfigError if there are words that the command does not know."""
    if rest:
        raise ConfigError(f"{command}: no such option {rest[0]!r}; see `cerl {command} --help`")


def _value(read: Callable[[list[str]], Value], metavar: str) -> PrimitiveConstructorSpec[Value]:
    """Tells tyro to pass all words after an option to the function `read`."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def count(option: str, what: str) -> PrimitiveConstructorSpec[int]:
    """An option that takes a whole number of at least 1; underscores are allowed.

    Args: option, its name, and what, what it counts, both for error messages.
    """

    def read(words: list[str]) -> int:
        text = " ".join(words).replace("_", "")
        if not words:
            raise Unread(f"{option}: expected a value, got nothing")
        if not (re.fullmatch("[0-9]{1,18}", text) and int(text)):
            raise Unread(f"{option}: expected {what}, at least 1, got {' '.join(words)!r}")
        return int(text)

    return _value(read, "N")


def folder(option: str, what: str = "folder") -> PrimitiveConstructorSpec[Path]:
    """An option that takes the path of one folder. Args: option, what: for error messages."""

    def read(words: list[str]) -> Path:
        if len(words) != 1:
            raise Unread(f"{option}: expected one {what}, got {' '.join(words) or 'nothing'}")
        return Path(words[0])

    return _value(read, "FOLDER")


def maybe(metavar: str) -> Any:
    """An option that may be left out, for which the help shows `metavar` and no default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def word(command: str, name: str) -> PrimitiveConstructorSpec[str]:
    """A positional argument of at most one word; "" if it is not given."""

    def read(words: list[str]) -> str:
        if len(words) > 1:
            raise Unread(f"{command}: expected one {name}, got {' '.join(words)}")
        return "".join(words)

    return _value(read, name)


def some(option: str, metavar: str) -> PrimitiveConstructorSpec[tuple[str, ...]]:
    """An option that takes one or more words."""

    def read(words: list[str]) -> tuple[str, ...]:
        if not words:
            raise Unread(f"{option}: expected a value, got nothing")
        return tuple(words)

    return _value(read, metavar)


def run_folder(path: Path) -> Path:
    """The path itself. Raises: ConfigError if it is not a run folder."""
    if not path.is_dir():
        nature = "a file" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: expected a run folder, got {nature}")
    if not (path / FILE).is_file():
        raise ConfigError(f"{path}: expected a run folder, but it has no {FILE}")
    return path


def changes(run: Config, options: Sequence[str], *, folder: Path) -> dict[str, Any]:
    """New values of options for a run that is resumed, by dotted key.

    Args:   run, its config; options, words of the command line; folder of the run.
    Raises: ConfigError if an option may not change; SystemExit after --help, or if tyro cannot read
            an option.
    """
    refuse_moved(options)
    known = set(errors.keys(Config, kinds=run.kinds))
    given = dict.fromkeys(key for word in options if (key := key_of(word)) in known)
    if fixed := [key for key in given if not changeable(key)]:
        raise ConfigError(unchangeable(fixed, folder / FILE))
    form, default = form_of(run, only=CHANGEABLE)
    form = tyro.cli(
        form,
        default=default,
        args=list(options),
        prog=f"cerl train --resume {folder}",
        description="Options of a run that may change when it is resumed.",
    )
    values = dict(preset.leaves(dataclasses.asdict(form)))
    return {key: values[key] for key in given}


def of_evaluation(run: Config, options: Sequence[str], *, prog: str) -> dict[str, Any]:
    """The options of `cerl eval` that are given (episodes, policies, epsilon), by name.

    Args:   run, the config of the run; options, words of the command line; prog, what usage
            messages call the program.
    Raises: ConfigError if a value does not suit the run; SystemExit after --help, or if tyro cannot
            read an option.
    """
    keys = ("episodes", "policies", "epsilon")
    form, default = form_of(run.eval, only=keys)
    form = tyro.cli(form, default=default, args=list(options), prog=prog)
    given = set(map(key_of, options))
    asked = {key: getattr(form, key) for key in keys if key in given}
    evaluated(run, asked)  # raises an error before the slow import of torch
    return asked
