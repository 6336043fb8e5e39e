"""Converts the options of a config.yaml of version 0.1, in which all kinds of agents and encoders
shared their sections.

The file in the run folder stays as it is, since its seal and the checkpoints depend on its content;
it is converted whenever it is read. An option that the chosen kind of agent or encoder never reads
is dropped.
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

# Sections of every complete file of version 0.1. There `agent` is no section but a single word.
_SECTIONS = (
    *("env", "net", "sequence", "ensemble", "loss", "optim", "replay", "schedule", "explore"),
    *("eval", "log"),
)
_OLD = {new: old for old, new in MOVED.items()}
_NONE = object()  # stands for an option that the file does not have


def is_0_1(tree: preset.Tree) -> bool:
    """Whether a tree of options has all sections of version 0.1."""
    return isinstance(tree.get("agent"), str) and all(
        isinstance(tree.get(section), dict) for section in _SECTIONS
    )


def upgraded(tree: preset.Tree, *, where: str) -> preset.Tree:
    """A tree of options converted to the current sections; unchanged if it is not of version 0.1.

    Args:   where, the name of its file, for error messages.
    Raises: ConfigError if a run with these options cannot be expressed with the current ones.
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
        # Options that the file does not have keep their defaults, which are those of version 0.1.
        named = {name: _found(tree, f"{section}.{name}") for name in model.model_fields}
        found[section] = {name: value for name, value in named.items() if value is not _NONE}
    if tree["net"]["encoder"] in ("mlp", "gru", "transformer"):
        found["encoder"] |= _sized(tree)
    try:
        config = Config.model_validate(found)
    except ValidationError:
        return found  # the caller validates the tree and reports what is wrong
    for effect, default, _ in idle(config):
        section, _, name = effect.option.partition(".")
        found[section] = {**found[section], name: default}
    return found


def _models(kinds: dict[str, str]) -> dict[str, type[Model]]:
    """The model of every section except env. Args: kinds, the kind of every union."""
    found = {}
    for section in Config.model_fields:
        if section != "env" and (models := section_models(Config, section)):
            found[section] = models[kinds[section]] if section in kinds else models[""]
    return found


def _found(tree: preset.Tree, option: str) -> Any:
    """The value that a file of version 0.1 has for a current option, or _NONE."""
    value: Any = tree
    for part in _OLD.get(option, option).split("."):
        value = value.get(part, _NONE) if isinstance(value, dict) else _NONE
    return value


def _lost(tree: preset.Tree) -> Iterator[str]:
    """One sentence for each option of version 0.1 that no current option can express."""
    kind, sequence = tree["net"]["encoder"], tree["sequence"]
    if kind == "gru" and sequence.get("cache") and sequence.get("cache_refresh"):
        yield "sequence.cache: a gru is always refreshed from a whole window, not from a part of it"
    if kind == "mlp" and not sequence.get("context_grad", True):
        yield "sequence.context_grad: expected true with an mlp, whose rows are independent"
    if tree["optim"].get("name") == "adam" and tree["optim"].get("momentum"):
        yield "optim.momentum: adam has no momentum buffer, but the checkpoints contain one"
    if kind in ("mlp", "gru") and sequence.get("width", 64) % sequence.get("heads", 2):
        yield "sequence.heads: the width is no multiple of the number of heads"


def _sized(tree: preset.Tree) -> preset.Tree:
    """Values of `sized_like` and `ratio` that give the MLPs as many hidden units as in version 0.1.

    A block of encoder mlp or gru is made as large as a fox block. In version 0.1 `heads` said how
    many heads that fox block has; the current version always assumes heads of 32 features. Where
    the two differ, `ratio` is changed so that the number of hidden units stays the same.
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
    """Hidden units of the MLP of a fox block, a multiple of 16."""
    return -(-int(width * ratio * 2.0 / 3.0) // 16) * 16


def _more_units(kind: str, width: int, heads: int, variant: str) -> int:
    """How many more hidden units the MLP of another kind needs, to make its block as large as a fox
    block; a multiple of 16."""
    pro = width * width + 2 * width * heads + 3 * width if variant == "pro" else 0
    fox = 4 * width * width + (width + 1) * heads + width + pro
    mixing = {
        "transformer": 4 * width * width + width,
        "gru": 6 * width * width + 5 * width,
        "mlp": 0,
    }[kind]
    return 16 * round((fox - mixing) / (3 * width) / 16)
