"""Options of version 0.1 as those of today: all kinds of agents and encoders then shared sections.

A run folder keeps the config.yaml that its run began with, so that its seal and its checkpoints
agree; what it says is converted whenever it is read. Options that the chosen kinds did not read
then are left out, as they cannot be written any more.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from cerl.config import preset
from cerl.config.effects import idle
from cerl.config.encoders import SequenceOptions
from cerl.config.errors import MOVED, ConfigError, section_models
from cerl.config.model import Model
from cerl.config.options import Config

# Sections that every complete file of version 0.1 has, beside its agent, then a word.
_SECTIONS = (
    *("env", "net", "sequence", "ensemble", "loss", "optim", "replay", "schedule", "explore"),
    *("eval", "log"),
)
_OLD = {new: old for old, new in MOVED.items()}
_NONE = object()  # no value


def is_0_1(tree: preset.Tree) -> bool:
    """Whether a tree states every section as version 0.1 did."""
    return isinstance(tree.get("agent"), str) and all(
        isinstance(tree.get(section), dict) for section in _SECTIONS
    )


def upgraded(tree: preset.Tree, *, where: str) -> preset.Tree:
    """A tree of options as today's `Config` reads it; itself if it is none of version 0.1.

    Raises: ConfigError if no options of today train the same.
    """
    if not is_0_1(tree):
        return tree
    try:
        return _converted(tree, where=where)
    except (KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(
            f"{where}: has the sections of version 0.1, but not its options; expected a file that "
            "it wrote"
        ) from None


def _converted(tree: preset.Tree, *, where: str) -> preset.Tree:
    if problems := list(_lost(tree)):
        raise ConfigError(
            "\n".join(f"{where}: {problem}; cerl 0.1 can go on with it" for problem in problems)
        )
    found = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    found["env"] = tree["env"]
    kinds = {"agent": tree["agent"], "encoder": tree["net"]["encoder"]}
    kinds["optim"] = tree["optim"].get("name", preset.UNIONS["optim"].default)
    for section, model in _models(kinds).items():
        # What the file does not say has its default, as then.
        named = {name: _found(tree, f"{section}.{name}") for name in model.model_fields}
        found[section] = {name: value for name, value in named.items() if value is not _NONE}
    if tree["net"]["encoder"] in ("mlp", "gru", "transformer"):
        found["encoder"] |= _sized(tree)
    try:
        config = Config.model_validate(found)
    except ValidationError:
        return found  # whoever reads it says what is wrong
    for effect, default, _ in idle(config):
        section, _, name = effect.option.partition(".")
        found[section] = {**found[section], name: default}
    return found


def _models(kinds: dict[str, str]) -> dict[str, type[Model]]:
    """The model of every section but env, those of unions by their kinds."""
    found = {}
    for section in Config.model_fields:
        if section != "env" and (models := section_models(Config, section)):
            found[section] = models[kinds[section]] if section in kinds else models[""]
    return found


def _found(tree: preset.Tree, option: str) -> Any:
    """The value that a file of version 0.1 has for an option of today."""
    value: Any = tree
    for part in _OLD.get(option, option).split("."):
        value = value.get(part, _NONE) if isinstance(value, dict) else _NONE
    return value


def _lost(tree: preset.Tree) -> Iterator[str]:
    """What no options of today can say."""
    kind, sequence = tree["net"]["encoder"], tree["sequence"]
    if kind == "gru" and sequence.get("cache") and sequence.get("cache_refresh"):
        yield "sequence.cache: a gru is refreshed from a whole window now, not from a part of it"
    if kind == "mlp" and not sequence.get("context_grad", True):
        yield "sequence.context_grad: the rows of an mlp do not depend on each other"
    if tree["optim"].get("name") == "adam" and tree["optim"].get("momentum"):
        yield "optim.momentum: adam has none, but the checkpoints hold one"
    if kind in ("mlp", "gru") and sequence.get("width", 64) % sequence.get("heads", 2):
        yield "sequence.heads: no multiple of them is the width"


def _sized(tree: preset.Tree) -> preset.Tree:
    """Options that give the blocks the number of units that they had.

    Version 0.1 asked for the heads of the fox block whose size a network has; today its heads have
    32 features where the network has none. Where that is another number of units, `ratio` makes up
    for the difference.
    """
    kind, options = tree["net"]["encoder"], tree["sequence"]
    width, heads = options.get("width", 64), options.get("heads", 2)
    ratio, variant = options.get("ratio", 3.5), options.get("variant", "pro")
    sized = SequenceOptions(name=kind, width=width)
    now = heads if kind == "transformer" else sized.fox_heads
    before = _fox_units(width, ratio) + _more_units(kind, width, heads, variant)
    missing = max(before, 16) - _more_units(kind, width, now, variant)
    if missing != _fox_units(width, ratio):
        ratio = 1.5 * (missing - 8) / width
    return {"sized_like": variant, "ratio": ratio}


def _fox_units(width: int, ratio: float) -> int:
    """Hidden units of the perceptron of a fox block, a multiple of 16."""
    return -(-int(width * ratio * 2.0 / 3.0) // 16) * 16


def _more_units(kind: str, width: int, heads: int, variant: str) -> int:
    """Hidden units that a block of another kind has beyond a fox block's, a multiple of 16."""
    pro = width * width + 2 * width * heads + 3 * width if variant == "pro" else 0
    fox = 4 * width * width + (width + 1) * heads + width + pro
    mixing = {
        "transformer": 4 * width * width + width,
        "gru": 6 * width * width + 5 * width,
        "mlp": 0,
    }[kind]
    return 16 * round((fox - mixing) / (3 * width) / 16)
