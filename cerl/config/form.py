"""The options of a run as a command line: a form for tyro, made of the models of `cerl/config`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from cerl.config import preset
from cerl.config.envs import GymEnv
from cerl.config.load import load, validated
from cerl.config.options import Config


def overridden(
    name: str, arguments: Sequence[str], *, prog: str, changes: Mapping[str, Any] | None = None
) -> Config:
    """The Config of a preset with options of the command line on top.

    Args:   changes to the preset by dotted key, e.g. those of a study; the command line wins.
    Raises: ConfigError; SystemExit after --help, or where an option cannot be read at all.
    """
    import tyro

    run = load(name, changes)
    form, default = form_of(run)
    filled = tyro.cli(
        form,
        default=default,
        args=list(arguments),
        prog=prog,
        description=preset.description(name),
    )
    tree = dataclasses.asdict(filled)
    tree["env"]["family"] = run.env.family
    return validated(tree, where=name)


def form_of(model: BaseModel, *, only: Sequence[str] = ()) -> tuple[type, Any]:
    """A model, or some of its keys, as a plain dataclass for tyro; the model itself checks later.

    So a wrong value reads the same whether it comes from a file or from the command line.
    """
    import tyro

    fields: list[tuple[str, Any, Any]] = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        below = [key.partition(".")[2] for key in only if key.startswith(f"{name}.")]
        if name == "family" or (only and name not in only and not below):
            continue
        if isinstance(value, BaseModel):
            form, value = form_of(value, only=below)
            fields.append((name, form, dataclasses.field(default=value)))
            continue
        kind, choices = _plain(info.annotation)
        if isinstance(model, GymEnv) and name == "kwargs":
            kind, choices = tuple[str, ...], ()
            value = tuple(f"{key}={preset.as_word(part)}" for key, part in value)
        text = " ".join((info.description or "").split())
        argument = tyro.conf.arg(help=text, metavar=f"{{{','.join(choices)}}}" if choices else None)
        fields.append((name, Annotated[kind, argument], dataclasses.field(default=value)))
    form = dataclasses.make_dataclass(type(model).__name__, fields, frozen=True)
    form.__doc__ = type(model).__doc__
    return form, form()


def key_of(word: str) -> str:
    """The dotted key of an option as it is written, e.g. log.save_replay of --log.no-save-replay;
    empty for other words."""
    if not word.startswith("--"):
        return ""
    group, dot, name = word[2:].partition("=")[0].replace("-", "_").rpartition(".")
    return f"{group}{dot}{name.removeprefix('no_')}"


def _plain(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The type to read from the command line, and the words it may be if there is a choice."""
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is tuple:
        kind, choices = _plain(get_args(annotation)[0])
        return tuple[kind, ...], choices
    return annotation, ()
