"""Makes a checked `Config` from a preset or a file, and overrides."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cerl.config import convert, errors, preset
from cerl.config.contradictions import contradictions
from cerl.config.options import Config


def sections(tree: Mapping[str, Any], *, where: str) -> Config:
    """The Config of a tree of options; checks each section, but not how sections go together.

    Args:   where, what error messages call the tree, e.g. a file.
    Raises: ConfigError naming `where`, the key, what was expected and got, and the nearest key.
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
    """The Config of a tree of options, after all checks.

    Args:   where, what error messages call the tree, e.g. a file.
    Raises: ConfigError naming `where`, the key, what was expected and got, and the nearest key.
    """
    config = sections(tree, where=where)
    if problems := list(contradictions(config)):
        raise errors.ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def options(name: str) -> preset.Tree:
    """The tree of options of a preset or a YAML file; files of version 0.1 are converted.

    Raises: ConfigError.
    """
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
    """The Config of a run with other options of its evaluation.

    Args:   asked, options of `eval` by name. If it has `episodes`, they replace a budget of agent
            steps (eval.steps).
    Raises: ConfigError.
    """
    changes = dict(asked)
    if "episodes" in changes:
        changes |= {"steps": 0, "slots": 0}
    found = preset.merged(config.model_dump(), {"eval": changes})
    return validated(found, where=f"eval of {config.preset or 'a run'}")
