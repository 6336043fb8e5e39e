"""Errors of a configuration in words: the key path, expected, got, what to do.

`explained` turns pydantic's list of errors into sentences with the nearest key or value.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cerl.text import visible


class ConfigError(ValueError):
    """A configuration that cannot be run: says where, what was expected, what was found."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A question for the closest known words, led by a semicolon; empty where nothing is close."""
    close = closest(word, known, most=2)
    return f"; did you mean {_or(close)}?" if close else ""


def closest(word: str, known: Iterable[str], *, most: int) -> list[str]:
    """The known words that look like `word`, whatever its case and separators; best first."""
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), name)
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    return [folded[name] for name in difflib.get_close_matches(plain, folded, n=most, cutoff=0.6)]


def _or(words: Sequence[object]) -> str:
    names = [str(word) for word in words]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def keys(model: type[BaseModel], prefix: str = "", *, family: str = "") -> Iterator[str]:
    """Every key path below a model, e.g. loss.gamma.

    Args: family, that of the environment; without one, keys of all families.
    """
    for name, field in model.model_fields.items():
        choices = _models(field.annotation)
        own = [choice for choice in choices if _family(choice) == family]
        for choice in own or choices:
            yield from keys(choice, f"{prefix}{name}.", family=family)
        yield f"{prefix}{name}"


def _family(model: type[BaseModel]) -> str | None:
    """Which of the families of environments a model describes, if any."""
    field = model.model_fields.get("family")
    return field.default if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def refused(
    error: ValidationError, root: type[BaseModel], *, where: str, family: str = ""
) -> ConfigError:
    """All errors of a model in sentences, each led by where it was given."""
    lines = explained(error, root, family=family)
    return ConfigError("\n".join(f"{where}: {line}" for line in lines))


def explained(error: ValidationError, root: type[BaseModel], *, family: str = "") -> list[str]:
    """One sentence for each error: key path, expected, got, nearest of the family's keys."""
    lines = []
    for detail in error.errors(include_url=False):
        lines.extend(_sentences(detail, root, family))
    return lines


def _sentences(detail: ErrorDetails, root: type[BaseModel], family: str) -> list[str]:
    # The family of an environment is in pydantic's path, though it is no key.
    path = [visible(str(part)) for part in detail["loc"]]
    if path[:1] == ["env"] and len(path) > 2:
        del path[1]
    key, got, context = ".".join(path), detail["input"], detail.get("ctx", {})
    kind = detail["type"]
    if kind == "value_error":
        return str(context["error"]).split("\n")
    if kind == "extra_forbidden":
        return [f"{key}: no such key{_meant(key, root, family)}"]
    if kind in ("literal_error", "union_tag_invalid"):
        listed = context.get("expected", context.get("expected_tags", ""))
        choices = re.findall(r"'([^']*)'", listed)
        if kind == "union_tag_invalid":
            key, got = f"{key}.family", context["tag"]
        return [f"{key}: expected {_or(choices)}, got {_got(got)}{nearest(str(got), choices)}"]
    if kind == "union_tag_not_found":
        fields = [
            choice.model_fields["family"] for choice in _models(root.model_fields[key].annotation)
        ]
        return [f"{key}.family: missing; expected {_or([field.default for field in fields])}"]
    if kind == "missing":
        return [f"{key}: missing"]
    return [f"{key}: expected {_expected(detail)}, got {_got(got)}"]


def _meant(key: str, root: type[BaseModel], family: str) -> str:
    """A hint at the key that was meant, of those that the family at hand has."""
    known = list(dict.fromkeys(keys(root, family=family)))
    group, _, word = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[2] == word]
    if beside:
        return f"; did you mean {_or(beside)}?"
    env = root.model_fields.get("env")
    models = _models(env.annotation) if env and family else []
    if others := [_family(model) for model in models if word in model.model_fields]:
        return f"; family {family} has none, {_or(others)} does"
    return nearest(key, [name for name in known if name.startswith(f"{group}.")] or known)


def _got(value: Any) -> str:
    """What was given, in the words of a YAML file and on one line that can be read."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_unicode": "a text in Unicode",
    "tuple_type": "a list, e.g. [0, 1, 2]",
    "model_type": "`key: value` lines of its own",
    "model_attributes_type": "`key: value` lines of its own",
    "dict_type": "`key: value` lines of its own",
    "invalid_key": "names as keys",
}


def _expected(detail: ErrorDetails) -> str:
    plain = _EXPECTED.get(detail["type"])
    if plain is None:
        text = detail["msg"].removeprefix("Input should be ")
        bound = next((x for x in detail.get("ctx", {}).values() if isinstance(x, float)), None)
        # Pydantic writes out all the zeros of 1e-30.
        return text if bound is None else f"{text.rpartition(' ')[0]} {bound:g}"
    got = detail["input"]
    if detail["type"] == "int_type" and isinstance(got, float) and got.is_integer():
        return f"{plain} without point or exponent ({int(got):_})"
    return plain
