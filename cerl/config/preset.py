"""Reads presets (YAML files that state only differences from their `base:`) and merges them.

The result is a tree of options: nested dicts of plain values. This module does not check which
options exist; the models of `cerl/config` do.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.composer import Composer

from cerl.config import errors
from cerl.config.errors import ConfigError
from cerl.text import visible

FOLDER = Path(__file__).resolve().parents[1] / "configs"
STUDIES = "studies"  # the folder of FOLDER that holds studies; the others hold presets
SUFFIXES = (".yaml", ".yml")  # a name that ends like this is the path of a user's own file

Tree = dict[str, Any]


class Union(NamedTuple):
    """A section of a config that has several kinds, with different options.

    The section may lie in another one; its key is then dotted."""

    key: str  # the option that says which kind it is
    default: str  # the kind if that option is missing; "": it must not be missing


UNIONS = {
    "env": Union("family", ""),
    "agent": Union("name", "dqn"),
    "encoder": Union("name", "frames"),
    "optim": Union("name", "adam"),
    "replay.sampler": Union("name", "uniform"),
}

DEEPEST = 32  # most levels of nested lists and mappings
LARGEST = 200_000  # most values of a file; the values of an alias count at each of its uses
LONGEST = 40  # most digits of a whole number
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
# Words are read by the core schema of YAML 1.2, so `yes`, `on`, `1:30` and dates are texts, and
# 1e-4 is a number. In addition, underscores may separate digits.
_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}


class _Loader(Composer, yaml.CSafeLoader):
    """Reads one YAML document as plain values; error messages name the path of the key.

    libyaml splits the text into events, which is five times as fast as PyYAML's own parser: a sweep
    reads the config.yaml of each of its runs.
    """

    yaml_implicit_resolvers = {}

    def __init__(self, text: str | bytes) -> None:
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)  # its `compose_node` is Python's, which the one below can extend
        self.path: list[str] = []  # keys that lead to the node that is being read
        self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Reads a node. PyYAML recurses once a level, so deep nesting is refused before Python's
        recursion limit is reached."""
        self.path.append(str(getattr(index, "value", index)))
        if len(self.path) > DEEPEST:
            key = ".".join(self.path[1:4])
            raise ConfigError(f"{key}...: expected at most {DEEPEST} levels, got more")
        node = super().compose_node(parent, index)
        self.path.pop()
        return node

    def plain(self, node: Any, key: str, depth: int = 0) -> Any:
        """The value of a node. Raises: ConfigError."""
        self.values += 1
        if self.values > LARGEST or depth > DEEPEST:
            raise ConfigError(f"{key}: expected fewer values, got aliases that repeat too many")
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.plain(n, f"{key}.{i}", depth + 1) for i, n in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._mapping(node, key, depth)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        try:
            if not isinstance(node, yaml.ScalarNode):
                raise ValueError(f"expected a plain list or mapping, got !!{kind}")
            return _scalar(kind, node.value)
        except ValueError as error:
            raise ConfigError(f"{key or 'the file'}: {error}") from None

    def _mapping(self, node: yaml.MappingNode, key: str, depth: int) -> Tree:
        out: Tree = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{key or 'the file'}: expected names as keys, got a {name.id}")
            if not name.tag.endswith(":str"):
                got = name.value[:40] or "nothing"
                raise ConfigError(f"{key or 'the file'}: expected names as keys, got {got}")
            path = f"{key}.{name.value}".removeprefix(".")
            if name.value in out:
                count = sum(other.value == name.value for other, _ in node.value)
                raise ConfigError(f"{path}: the key {name.value!r} is given {count} times")
            out[name.value] = self.plain(value, path, depth + 1)
        return out


class _Dumper(yaml.CSafeDumper):
    """Writes YAML; quotes every text that `_Loader` would read as something else."""


for _name, (_pattern, _first) in _SCHEMA.items():
    for _schema in (_Loader, _Dumper):
        _schema.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first
        )


def _scalar(kind: str, text: str) -> Any:
    """The value of a YAML scalar. Args: kind, its type, e.g. int. Raises: ValueError."""
    digits = text.replace("_", "")
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int" if len(text) > LONGEST:
            raise ValueError(f"expected at most {LONGEST} digits, got {len(text):,}")
        case "int" if digits[:2] in ("0o", "0x"):
            return int(digits, 0)
        case "int":
            return int(digits)
        case "float":
            return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError(f"expected a text, a number, true or false, got !!{kind} {text[:40]!r}")


def parsed(text: str | bytes, *, where: str) -> Any:
    """The plain values of a YAML document; None if it is empty.

    Args:   where, what error messages call the document, e.g. a file.
    Raises: ConfigError naming `where` and the key.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{where}: expected YAML: {error}") from error


def written(tree: Mapping[str, Any]) -> str:
    """A tree as a YAML document; `parsed` reads it back."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)


def options(text: str | bytes, *, where: str) -> Tree:
    """The tree of options in a YAML document. Raises: ConfigError if it has no keys."""
    tree = parsed(text, where=where)
    if not isinstance(tree, dict) or not tree:
        got = "nothing" if not tree else f"a {type(tree).__name__}"
        raise ConfigError(f"{where}: expected `key: value` lines, got {got}")
    return tree


def read(path: Path) -> Tree:
    """The tree of options in one file, without those of its base. Raises: ConfigError."""
    try:
        return options(path.read_bytes(), where=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def scalar(text: str, *, where: str) -> Any:
    """The value of a word of the command line, read like a YAML value. Raises: ConfigError."""
    return parsed(text, where=where)


def as_word(value: Any) -> str:
    """A value written as one word of the command line; `scalar` reads it back."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def presets() -> list[str]:
    """Names of the shipped presets, e.g. minatar/cerl."""
    files = (path.relative_to(FOLDER) for path in FOLDER.glob("*/*.yaml"))
    names = (path.with_suffix("").as_posix() for path in files if path.parts[0] != STUDIES)
    return sorted(names)


def studies() -> list[str]:
    """Names of the shipped studies (presets that are run and reported together), e.g. demo."""
    return sorted(path.stem for path in FOLDER.glob(f"{STUDIES}/*.yaml"))


def find(name: str) -> Path:
    """The file of a preset. A name that ends in .yaml or .yml is the path of a file.

    Raises: ConfigError if there is no such preset.
    """
    if name.endswith(SUFFIXES) and "\0" not in name:
        return Path(name)
    if name not in presets():
        raise ConfigError(
            f"preset: no preset {name!r}{errors.nearest(name, presets())} "
            "(`cerl list presets` shows them all; a path ending in .yaml is read as a file)"
        )
    return FOLDER / f"{name}.yaml"


def description(name: str) -> str:
    """The first line of a preset's file, if it is a comment: its source, and what to expect."""
    first = find(name).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return visible(first.lstrip("# ")) if first.startswith("#") else ""


def title(name: str) -> str:
    """What result rows and run folders call a preset: its name, or the stem of a user's file."""
    if not name.endswith(SUFFIXES):
        return name
    stem = re.sub(r"[^\w.+-]+", "-", Path(name).stem).lstrip(".-")
    return stem or "file"


def layers(name: str) -> list[Tree]:
    """The options that each file of a preset states: those of its lowest base first, those of the
    preset itself last, with its title as `preset`.

    Raises: ConfigError.
    """
    path = find(name)
    files = _chain(path, ())
    if not any("env" in tree for tree in files):
        raise ConfigError(
            f"{path}: expected an environment, got none: give it a `base: PRESET`, or `env:` with "
            "a family (`cerl list` shows both)"
        )
    files[-1] = {"preset": title(name)} | files[-1]
    return files


def _chain(path: Path, above: tuple[Path, ...]) -> list[Tree]:
    path = path.resolve()
    if path in above:
        names = " -> ".join(p.stem for p in (*above, path))
        raise ConfigError(f"{path}: `base:` leads back to itself: {names}")
    tree = read(path)
    base = tree.pop("base", None)
    if base is None:
        return [tree]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of a preset, got {base!r}")
    try:
        below = find(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from error
    # A relative path of a base is relative to the file that names it. The title of a base is
    # dropped, since the preset has its own.
    lower = _chain(path.parent / below, (*above, path))
    lower[-1].pop("preset", None)
    return [*lower, tree]


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """The options of `base`, overridden key by key by those of `top`.

    If `top` changes the kind of a section of `UNIONS`, the section starts from the defaults of the
    new kind: all options that `base` has in it are dropped.
    """
    for section, (key, default) in UNIONS.items():
        below, above = at(base, section), at(top, section)
        if not isinstance(below, Mapping) or not isinstance(above, Mapping):
            continue
        kind = below.get(key, default)
        if above.get(key, kind) != kind:
            base = without(base, section)
    return _over(base, top)


def at(tree: Any, path: str) -> Any:
    """What a tree has at a dotted key; None where it has nothing there."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def without(tree: Mapping[str, Any], path: str) -> Tree:
    """A tree without what it has at a dotted key."""
    first, _, rest = path.partition(".")
    kept = {key: value for key, value in tree.items() if key != first}
    return {**kept, first: without(tree[first], rest)} if rest else kept


def _over(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """`base`, overridden key by key by `top`, without special treatment of unions."""
    out = dict(base)
    for key, value in top.items():
        below = out.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _over(below, value)
        out[key] = value
    return out


def nested(overrides: Mapping[str, Any]) -> Tree:
    """Splits dotted keys: {"env.name": "asterix"} becomes {"env": {"name": "asterix"}}."""
    out: Tree = {}
    for key, value in overrides.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        out = _over(out, value)
    return out


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a tree: its dotted key and value. An empty mapping counts as a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def words(overrides: Mapping[str, Any]) -> str:
    """Overrides on one line, for messages."""
    return yaml.safe_dump(dict(overrides), default_flow_style=True, width=10**6).strip()
