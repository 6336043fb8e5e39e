"""Reads the words of the command line: the values of a command's options, and options of a run."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from cerl.config import Config, ConfigError, errors, evaluated, forks, numbers, preset
from cerl.config.form import form_of, key_of, refuse_moved, types_of, written_out
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

    Args:    kind, the dataclass; its attribute VERBATIM, if it has one, names the options that may
             be repeated and whose values are taken as they are, e.g. `--sbatch "--time=60"`; prog,
             what usage messages call the program.
    Returns: the filled dataclass, and all words that are none of its options (--help included).
    Raises:  ConfigError if a value cannot be read, or an option is given twice.
    """
    taken, left = verbatim(arguments, getattr(kind, "VERBATIM", ()))
    _refuse_repeated(left)
    try:
        found, rest = tyro.cli(kind, args=left, prog=prog, add_help=False, return_unknown_args=True)
    except Unread as error:
        raise ConfigError(str(error)) from None
    return dataclasses.replace(found, **taken), rest  # pyright: ignore[reportArgumentType]


def verbatim(
    arguments: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Takes options out of the words of the command line, each with the word after it.

    That word may begin with `--`, which a reader of options would take for another option.

    Args:    names of the options, without `--`.
    Returns: the values by name, in their order, and all other words.
    Raises:  ConfigError if an option is the last word.
    """
    taken: dict[str, tuple[str, ...]] = {}
    left: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if not option.startswith("--") or name not in names:
            left.append(word)
            continue
        if not equals and (value := next(words, None)) is None:
            raise ConfigError(f"{option}: expected a value, got nothing")
        taken[name] = (*taken.get(name, ()), value)
    return taken, left


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
    """An option that takes a whole number of at least 1, such as 3, 400_000 or 400k.

    Args: option, its name, and what, what it counts, both for error messages.
    """

    def read(words: list[str]) -> int:
        if not words:
            raise Unread(f"{option}: expected a value, got nothing")
        found = numbers.whole(" ".join(words))
        if found is None or not 1 <= found < 10**18:
            raise Unread(f"{option}: expected {what}, at least 1, got {' '.join(words)!r}")
        return found

    return _value(read, "N")


def number(option: str, what: str) -> PrimitiveConstructorSpec[int | None]:
    """An option that takes a whole number from 0 on. Args: option, what: for error messages."""

    def read(words: list[str]) -> int | None:
        text = " ".join(words)
        if not re.fullmatch("[0-9]{1,18}", text):
            raise Unread(f"{option}: expected {what}, a whole number, got {text or 'nothing'}")
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
    _refuse(run, options, changeable, lambda keys: unchangeable(keys, folder / FILE))
    about = "Options of a run that may change when it is resumed."
    prog = f"cerl train --resume {folder}"
    return _given(run, options, only=CHANGEABLE, prog=prog, about=about)


def of_fork(run: Config, options: Sequence[str], *, folder: Path) -> dict[str, Any]:
    """New values of options for a fork, by dotted key; as `changes`."""
    _refuse(run, options, forks.forkable, forks.unforkable)
    about = "Options that may differ between a run and its fork, with the run's values."
    return _given(run, options, only=forks.FORKABLE, prog=f"cerl fork {folder}", about=about)


def _refuse(
    run: Config,
    options: Sequence[str],
    allowed: Callable[[str], bool],
    refusal: Callable[[list[str]], str],
) -> None:
    """Raises: ConfigError with `refusal` of the options of the run that are not allowed."""
    refuse_moved(options)
    known = set(errors.keys(Config, kinds=run.kinds))
    given = dict.fromkeys(key for word in options if (key := key_of(word)) in known)
    if wrong := [key for key in given if not allowed(key)]:
        raise ConfigError(refusal(wrong))


def _given(
    run: Config, options: Sequence[str], *, only: Sequence[str], prog: str, about: str
) -> dict[str, Any]:
    """The values that words of the command line give to some options of a run, by dotted key.

    Args: only, the options; prog, what usage messages call the program; about, what --help says.
    """
    form, default = form_of(run, only=only)
    form = tyro.cli(
        form,
        default=default,
        args=written_out(options, types_of(form)),
        prog=prog,
        description=about,
    )
    values = dict(preset.leaves(dataclasses.asdict(form)))
    return {key: values[key] for word in options if (key := key_of(word)) in values}


def of_evaluation(run: Config, options: Sequence[str], *, prog: str) -> dict[str, Any]:
    """The options of `cerl eval` that are given (episodes, policies, epsilon), by name.

    Args:   run, the config of the run; options, words of the command line; prog, what usage
            messages call the program.
    Raises: ConfigError if a value does not suit the run; SystemExit after --help, or if tyro cannot
            read an option.
    """
    keys = ("episodes", "policies", "epsilon")
    form, default = form_of(run.eval, only=keys)
    form = tyro.cli(form, default=default, args=written_out(options, types_of(form)), prog=prog)
    given = set(map(key_of, options))
    asked = {key: getattr(form, key) for key in keys if key in given}
    evaluated(run, asked)  # raises an error before the slow import of torch
    return asked
