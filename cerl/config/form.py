"""The options of a run as a command line: a form for tyro, made of the models of `cerl/config`.

The form has the options of the kinds that the preset has chosen, or that the command line chooses
in their place: `--encoder.name gru` shows and takes the options of a gru, from their defaults.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from cerl.config import errors, preset
from cerl.config.envs import GameEnv, GymEnv
from cerl.config.errors import ConfigError
from cerl.config.load import options, sections, validated
from cerl.config.options import Config


def overridden(
    name: str, arguments: Sequence[str], *, prog: str, changes: Mapping[str, Any] | None = None
) -> Config:
    """The Config of a preset with options of the command line on top.

    Args:   changes to the preset by dotted key, e.g. those of a study; the command line wins.
    Raises: ConfigError; SystemExit after --help, or where an option cannot be read at all.
    """
    import tyro

    refuse_moved(arguments)
    tree = preset.merged(options(name), preset.nested(changes or {}))
    tree = preset.merged(tree, _kinds(arguments))
    run = sections(tree, where=name)
    _refuse_foreign(arguments, run)
    form, default = form_of(run)
    filled = tyro.cli(
        form,
        default=default,
        args=list(arguments),
        prog=prog,
        description=preset.description(name),
    )
    found = dataclasses.asdict(filled)
    found["env"]["family"] = run.env.family
    return validated(found, where=name)


def form_of(model: BaseModel, *, only: Sequence[str] = (), prefix: str = "") -> tuple[type, Any]:
    """A model, or some of its keys, as a plain dataclass for tyro; the model itself checks later.

    So a wrong value reads the same whether it comes from a file or from the command line.

    Args: prefix, where a `Config` has the model: its dotted key and a dot, empty for the `Config`.
    """
    import tyro

    fields: list[tuple[str, Any, Any]] = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        below = [key.partition(".")[2] for key in only if key.startswith(f"{name}.")]
        if name == "family" or (only and name not in only and not below):
            continue
        if isinstance(value, BaseModel):
            section = f"{prefix}{name}"
            form, value = form_of(value, only=below, prefix=f"{section}.")
            if section in preset.UNIONS and section != "env":
                form = _with_kinds(form, section=section, text=info.description or "")
                value = form()
            fields.append((name, form, dataclasses.field(default=value)))
            continue
        kind, choices = _plain(info.annotation)
        if isinstance(model, GymEnv | GameEnv) and name == "kwargs":
            kind, choices = tuple[str, ...], ()
            value = tuple(f"{key}={preset.as_word(part)}" for key, part in value)
        text = " ".join((info.description or "").split())
        argument = tyro.conf.arg(help=text, metavar=f"{{{','.join(choices)}}}" if choices else None)
        fields.append((name, Annotated[kind, argument], dataclasses.field(default=value)))
    form = dataclasses.make_dataclass(type(model).__name__, fields, frozen=True)
    form.__doc__ = type(model).__doc__
    return form, form()


def _with_kinds(form: type, *, section: str, text: str) -> type:
    """The form of a section, whose name may be that of any of the section's kinds."""
    import tyro

    names = list(errors.unions(Config)[section])
    text = f"{' '.join(text.split())}. Another kind starts from its own defaults."
    argument = tyro.conf.arg(help=text, metavar=f"{{{','.join(names)}}}")
    fields = [
        (
            field.name,
            Annotated[str, argument] if field.name == "name" else field.type,
            dataclasses.field(default=field.default),
        )
        for field in dataclasses.fields(form)
    ]
    whole = dataclasses.make_dataclass(form.__name__, fields, frozen=True)
    whole.__doc__ = form.__doc__
    return whole


def key_of(word: str) -> str:
    """The dotted key of an option as it is written, e.g. log.save_replay of --log.no-save-replay;
    empty for other words."""
    if not word.startswith("--"):
        return ""
    group, dot, name = word[2:].partition("=")[0].replace("-", "_").rpartition(".")
    return f"{group}{dot}{name.removeprefix('no_')}"


def refuse_moved(arguments: Sequence[str]) -> None:
    """Raises: ConfigError if an option is given by its name in version 0.1."""
    if lines := [sentence for word in arguments if (sentence := errors.moved(key_of(word)))]:
        raise ConfigError("\n".join(f"--{line}" for line in lines))


def _kinds(arguments: Sequence[str]) -> preset.Tree:
    """The kinds that a command line chooses, as a tree of options."""
    found: preset.Tree = {}
    for word, after in itertools.pairwise([*arguments, ""]):
        section, _, name = key_of(word).rpartition(".")
        if section in preset.UNIONS and section != "env" and name == "name":
            kind = word.partition("=")[2] if "=" in word else after
            found = preset.merged(found, preset.nested({f"{section}.name": kind}))
    return found


def _refuse_foreign(arguments: Sequence[str], run: Config) -> None:
    """Raises: ConfigError if an option is one of other kinds than those of the run."""
    known = set(errors.keys(Config, kinds=run.kinds))
    for word in arguments:
        key = key_of(word)
        if key and key not in known and (text := errors.foreign(key, Config, run.kinds)):
            raise ConfigError(f"--{key}: no such option; {text}")


def _plain(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The type to read from the command line, and the words it may be if there is a choice."""
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is tuple:
        kind, choices = _plain(get_args(annotation)[0])
        return tuple[kind, ...], choices
    return annotation, ()
