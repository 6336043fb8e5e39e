"""From names of presets, files and overrides to a checked `Config`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cerl.config import convert, errors, preset
from cerl.config.contradictions import contradictions
from cerl.config.options import Config


def sections(tree: Mapping[str, Any], *, where: str) -> Config:
    """The Config of a complete tree of options, each section checked by itself.

    Raises: ConfigError naming `where`, the key path, what was expected and got, the nearest key.
    """
    kinds = {}
    for section, (key, default) in preset.UNIONS.items():
        options = preset.at(tree, section)
        if options is None:
            kinds[section] = default
        elif isinstance(options, Mapping):
            kinds[section] = str(options.get(key, default))
            if default and key not in options:
                tree = preset.merged(tree, preset.nested({f"{section}.{key}": default}))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise errors.refused(error, Config, where=where, kinds=kinds) from None


def validated(tree: Mapping[str, Any], *, where: str) -> Config:
    """The Config of a complete tree of options, with no contradictions between sections.

    Raises: ConfigError naming `where`, the key path, what was expected and got, the nearest key.
    """
    config = sections(tree, where=where)
    if problems := list(contradictions(config)):
        raise errors.ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def options(name: str) -> preset.Tree:
    """The options of a preset or of a file, one of version 0.1 included. Raises: ConfigError."""
    return convert.upgraded(preset.tree(name), where=name)


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The Config of a preset.

    Args:   name of a preset or path of a YAML file; overrides nested, or with dotted keys.
    Raises: ConfigError.
    """
    found = preset.merged(options(name), preset.nested(overrides or {}))
    changes = f" with {preset.words(overrides)}" if overrides else ""
    return validated(found, where=f"{name}{changes}")


def evaluated(config: Config, asked: Mapping[str, Any]) -> Config:
    """A run's Config with another evaluation.

    Args:   asked, options of `eval` by name; a number of episodes takes the place of a budget of
            agent steps.
    Raises: ConfigError.
    """
    changes = dict(asked)
    if "episodes" in changes:
        changes |= {"steps": 0, "slots": 0}
    found = preset.merged(config.model_dump(), {"eval": changes})
    return validated(found, where=f"eval of {config.preset or 'a run'}")
