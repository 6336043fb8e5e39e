"""From names of presets, files and overrides to a checked `Config`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cerl.config import errors, preset
from cerl.config.options import Config


def validated(tree: Mapping[str, Any], *, where: str) -> Config:
    """The Config of a complete tree of options.

    Raises: ConfigError naming `where`, the key path, what was expected and got, the nearest key.
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        env = tree.get("env", {"family": "catch"})
        family = str(env.get("family", "")) if isinstance(env, Mapping) else ""
        raise errors.refused(error, Config, where=where, family=family) from None


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The Config of a preset.

    Args:   name of a preset or path of a YAML file; overrides nested, or with dotted keys.
    Raises: ConfigError.
    """
    tree = preset.merged(preset.tree(name), preset.nested(overrides or {}))
    changes = f" with {preset.words(overrides)}" if overrides else ""
    return validated(tree, where=f"{name}{changes}")
