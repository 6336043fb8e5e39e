"""Named lists of environments, e.g. atari-26: what `--envs` and the `envs` of a study may say.

The lists are in `configs/lists.yaml`, each with a sentence that says where it comes from.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cerl.config import errors, preset
from cerl.config.errors import ConfigError

FILE = preset.FOLDER / "lists.yaml"


class EnvList(NamedTuple):
    """Some environments of one family."""

    family: str
    names: tuple[str, ...]  # values of env.name
    source: str  # a sentence: who chose them, and how sure that is


def lists() -> dict[str, EnvList]:
    """All lists by name. Raises: ConfigError if their file cannot be read."""
    return dict(_read())


@functools.cache
def _read() -> Mapping[str, EnvList]:
    found = {}
    for name, entry in preset.read(FILE).items():
        if not isinstance(entry, dict) or entry.keys() != set(EnvList._fields):
            raise ConfigError(f"{FILE}: {name}: expected {', '.join(EnvList._fields)}")
        found[name] = EnvList(entry["family"], tuple(entry["names"]), entry["source"])
    return found


def expanded(words: Sequence[str], *, family: str) -> list[str]:
    """Names of environments, where the name of a list stands for the names in it.

    Every environment comes once, where it comes first.

    Args:    words, names of environments and of lists; family, that of the preset.
    Raises:  ConfigError if a list is of another family, or a word is nearly the name of a list.
    """
    known = lists()
    found: dict[str, Any] = {}
    for word in words:
        if word not in known:
            _refuse_misspelt(word, known)
            found[word] = None
            continue
        if known[word].family != family:
            own = [name for name, entry in known.items() if entry.family == family]
            has = f"lists of family {family}: {', '.join(own)}" if own else "names of environments"
            raise ConfigError(
                f"{word} is a list of environments of family {known[word].family}, but the preset "
                f"is of family {family}; expected {has}"
            )
        found |= dict.fromkeys(known[word].names)
    return list(found)


def _refuse_misspelt(word: str, known: Mapping[str, EnvList]) -> None:
    """Raises: ConfigError if a word looks like the name of a list, and is neither that nor the name
    of an environment that a list has."""
    if any(word in entry.names for entry in known.values()):
        return
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    same = [name for name in known if name.replace("-", "") == plain]
    hint = errors.nearest(word, same or list(known))
    begins = "-" in word and word.partition("-")[0] in {name.partition("-")[0] for name in known}
    counts = hint and re.fullmatch("[a-z_]+-[0-9]+", word)
    if same or begins or counts:
        raise ConfigError(
            f"no list of environments is called {word!r}{hint} (`cerl list envs` shows them all)"
        )
