"""Presets as plain trees of options: one YAML file each, stating only differences from its `base:`.

Reading and merging only; what a tree means is checked by `cerl/config.py`.
"""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cerl import mistakes
from cerl.mistakes import ConfigError

FOLDER = Path(__file__).resolve().parent / "configs"

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: 1e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{self.name}: key {key!r} is given {keys.count(key)} times")
        return super().construct_mapping(node, deep=deep)


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, [*"-+.0123456789"])


def read(path: Path) -> Tree:
    """The tree of one file. Raises: ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    return tree


def scalar(text: str, *, where: str) -> Any:
    """A word of the command line, read as a value in a YAML file is. Raises: ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: expected a YAML value, got {text!r}") from error


def written(value: Any) -> str:
    """A value as one word that `scalar` reads."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def presets() -> list[str]:
    """Names of the shipped presets, e.g. minatar/cerl."""
    files = (path.relative_to(FOLDER) for path in FOLDER.glob("*/*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files)


def studies() -> list[str]:
    """Names of the shipped studies (presets that are run and reported together), e.g. demo."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a preset; a name that ends in .yaml is a path. Raises: ConfigError."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in presets():
        raise ConfigError(
            f"preset: no preset {name!r}{mistakes.nearest(name, presets())} "
            "(`cerl list presets` shows them all; a path ending in .yaml is read as a file)"
        )
    return FOLDER / f"{name}.yaml"


def description(name: str) -> str:
    """First comment line of a preset's file: its source, and what to expect."""
    first = find(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def tree(name: str) -> Tree:
    """What a preset says on top of its bases, and its name as `preset`. Raises: ConfigError."""
    path = find(name)
    return {"preset": name.removesuffix(path.suffix)} | _chain(path, ())


def _chain(path: Path, above: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in above:
        names = " -> ".join(p.stem for p in (*above, path))
        raise ConfigError(f"{path}: `base:` leads back to itself: {names}")
    tree = read(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of a preset, got {base!r}")
    try:
        below = find(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from error
    # A base that is a file lies beside the file that names it.
    return merged(_chain(path.parent / below, (*above, path)), tree)


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """`top` over `base`, key by key; another environment family starts from its own defaults."""
    family = "family" in top and top["family"] != base.get("family")
    out: Tree = {} if family else dict(base)
    for key, value in top.items():
        below = out.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        out[key] = value
    return out


def nested(overrides: Mapping[str, Any]) -> Tree:
    """{"env.name": "asterix"} as {"env": {"name": "asterix"}}; nested keys stay as they are."""
    out: Tree = {}
    for key, value in overrides.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        out = merged(out, value)
    return out


def words(overrides: Mapping[str, Any]) -> str:
    """Overrides on one line, for messages."""
    return yaml.safe_dump(dict(overrides), default_flow_style=True, width=10**6).strip()
