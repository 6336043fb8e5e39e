"""Makes a checked `Config` from a preset or a file, and overrides.

Options come in layers: the files of a preset from its lowest base upwards, then the options of the
user. Each layer overrides those below it. A layer may also make an option of the layers below
idle, i.e. without effect: such an option returns to its default (`settled`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from cerl.config import convert, errors, preset
from cerl.config.contradictions import contradictions
from cerl.config.effects import Effect, idle
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


def settled(base: preset.Tree, top: preset.Tree, *, name: str) -> tuple[preset.Tree, list[str]]:
    """The options of `base` overridden by those of `top`; what only `base` states and `top` makes
    idle returns to its default.

    An idle option that `top` states itself stays, and so does one that was idle in `base` already:
    these are refused by `validated`. All stay where one of the trees cannot be read.

    Args:    name, what the sentences call the preset that `base` belongs to.
    Returns: the tree; a sentence for each option that returned to its default.
    """
    found, sentences = preset.merged(base, top), []
    after = _idle(found)
    before = _idle(base) if after else after
    if after is None or before is None:
        return found, []
    stated = dict(preset.leaves(top)).keys()
    for option, (effect, default, value) in after.items():
        if option not in stated and option not in before:
            found = preset.without(found, option)
            sentences.append(
                f"{name}: {option}: {preset.as_word(value)} has no effect unless {effect.unless}; "
                f"this run has the default, {preset.as_word(default)}"
            )
    return found, sentences


def _idle(tree: preset.Tree) -> dict[str, tuple[Effect, Any, Any]] | None:
    """The idle options of a tree, as from `effects.idle`, by dotted key; None if the tree cannot be
    read."""
    try:
        config = sections(tree, where="")
    except errors.ConfigError:
        return None
    return {effect.option: (effect, default, value) for effect, default, value in idle(config)}


def options(name: str) -> preset.Tree:
    """The tree of options of a preset or a YAML file; files of version 0.1 are converted.

    Raises: ConfigError.
    """
    found, *above = preset.layers(name)
    for layer in above:
        found, _ = settled(found, layer, name=name)
    return convert.upgraded(found, where=name)


def load(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    note: Callable[[str], None] | None = None,
) -> Config:
    """The Config of a preset.

    Args:   name of a preset or path of a YAML file; overrides nested, or with dotted keys; note is
            called with a sentence for each option of the preset that the overrides make idle, and
            that therefore returns to its default.
    Raises: ConfigError.
    """
    found, sentences = settled(options(name), preset.nested(overrides or {}), name=name)
    changes = f" with {preset.words(overrides)}" if overrides else ""
    config = validated(found, where=f"{name}{changes}")
    if note is not None:
        for sentence in sentences:
            note(sentence)
    return config


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
