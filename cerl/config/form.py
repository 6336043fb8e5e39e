"""Makes command-line options of the options of a run.

tyro reads the command line into a form: a plain dataclass with the same fields as the pydantic
models of `cerl/config`. For `agent`, `encoder` and `optim` it has the fields of the kind that the
preset or the command line chooses: after `--encoder.name gru` it has those of a gru, at their
defaults.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from cerl.config import errors, numbers, preset
from cerl.config.envs import GameEnv, GymEnv
from cerl.config.errors import ConfigError
from cerl.config.load import options, sections, settled, validated
from cerl.config.options import Config


def overridden(
    name: str,
    arguments: Sequence[str],
    *,
    prog: str,
    changes: Mapping[str, Any] | None = None,
    note: Callable[[str], None] | None = None,
) -> Config:
    """The Config of a preset, overridden by options of the command line.

    Args:   name of a preset or path of a YAML file; arguments, words of the command line; prog,
            what usage messages call the program; changes to the preset by dotted key, e.g. those
            of a study: options of the command line override them too; note is called with a
            sentence for each option of the preset that the command line makes idle, and that
            therefore returns to its default.
    Raises: ConfigError; SystemExit after --help, or if tyro cannot read an option.
    """
    base, _ = settled(options(name), preset.nested(changes or {}), name=name)
    given = stated(base, arguments, name=name, prog=prog)
    found, sentences = settled(base, preset.nested(given), name=name)
    config = validated(found, where=name)
    if note is not None:
        for sentence in sentences:
            note(sentence)
    return config


def stated(base: preset.Tree, arguments: Sequence[str], *, name: str, prog: str) -> dict[str, Any]:
    """The values that a command line gives to options of a run, by dotted key.

    Args:   base, the options that the command line overrides; arguments, words of the command line;
            name of the preset that `base` belongs to; prog, what usage messages call the program.
    Raises: ConfigError; SystemExit after --help, or if tyro cannot read an option.
    """
    import tyro

    refuse_moved(arguments)
    run = sections(preset.merged(base, _kinds(arguments)), where=name)
    _refuse_foreign(arguments, run)
    form, default = form_of(run)
    filled = tyro.cli(
        form,
        default=default,
        args=written_out(arguments, types_of(form)),
        prog=prog,
        description=preset.description(name),
    )
    values = dict(preset.leaves(dataclasses.asdict(filled)))
    return {key: values[key] for word in arguments if (key := key_of(word)) in values}


def form_of(model: BaseModel, *, only: Sequence[str] = (), prefix: str = "") -> tuple[type, Any]:
    """A form for a model, and a form filled with the model's values.

    The form checks nothing. Its values are validated by the model later, so that a wrong value has
    the same error message whether it comes from a file or from the command line.

    Args: only, dotted keys to include, empty: all; prefix, the dotted key of the model in a
          `Config` and a dot, empty for the `Config` itself.
    """
    import tyro

    fields: list[tuple[str, Any, Any]] = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        below = [key.partition(".")[2] for key in only if key.startswith(f"{name}.")]
        # Nobody chooses the family of a preset, or the run that a run was forked from.
        if name in ("family", "origin") or (only and name not in only and not below):
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
    """The form of a section that is a union: its `name` accepts all kinds of the section.

    Args: form, that of the chosen kind; text, the help text of `name`.
    """
    import tyro

    names = list(errors.unions(Config)[section])
    text = f"{' '.join(text.split())}. Choosing another kind resets the section to its defaults."
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
    """The dotted key of an option of the command line; "" for words that are no options.

    E.g. `--log.no-save-replay` and `--log.save_replay=true` are both log.save_replay.
    """
    if not word.startswith("--"):
        return ""
    group, dot, name = word[2:].partition("=")[0].replace("-", "_").rpartition(".")
    return f"{group}{dot}{name.removeprefix('no_')}"


def written_out(arguments: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Words of the command line, in which `25k` is 25000 and `0..4` is 0 1 2 3 4.

    Only values of options that take numbers are rewritten.

    Args:   types, the type of every option by its dotted key.
    Raises: ConfigError if a range runs backwards, or is too long or not of whole numbers.
    """
    found = {key: numbers.numeric(annotation) for key, annotation in types.items()}
    kinds = {key: kind for key, kind in found.items() if kind is not None}
    return numbers.words(arguments, kinds, keys=[key_of(word) for word in arguments])


def types_of(form: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option of a form and of the forms in it, by dotted key."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(form):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= types_of(field.type, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = field.type
    return found


def refuse_moved(arguments: Sequence[str]) -> None:
    """Raises: ConfigError if an option has the name that it had in version 0.1."""
    if lines := [sentence for word in arguments if (sentence := errors.moved(key_of(word)))]:
        raise ConfigError("\n".join(f"--{line}" for line in lines))


def _kinds(arguments: Sequence[str]) -> preset.Tree:
    """The kinds that a command line chooses, as a tree, e.g. {"encoder": {"name": "gru"}}."""
    found: preset.Tree = {}
    for word, after in itertools.pairwise([*arguments, ""]):
        section, _, name = key_of(word).rpartition(".")
        if section in preset.UNIONS and section != "env" and name == "name":
            kind = word.partition("=")[2] if "=" in word else after
            found = preset.merged(found, preset.nested({f"{section}.name": kind}))
    return found


def _refuse_foreign(arguments: Sequence[str], run: Config) -> None:
    """Raises: ConfigError if an option exists only for other kinds than the run has."""
    known = set(errors.keys(Config, kinds=run.kinds))
    for word in arguments:
        key = key_of(word)
        if key and key not in known and (text := errors.foreign(key, Config, run.kinds)):
            raise ConfigError(f"--{key}: no such option; {text}")


def _plain(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The type that tyro reads for an annotation, and the allowed words if it is a Literal."""
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is tuple:
        kind, choices = _plain(get_args(annotation)[0])
        return tuple[kind, ...], choices
    return annotation, ()
