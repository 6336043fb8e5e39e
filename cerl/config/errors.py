"""Error messages of configs: which key, what was expected, what it got, and what to do.

`explained` turns the errors of pydantic into such sentences and suggests the nearest key or value.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cerl.text import visible


class ConfigError(ValueError):
    """A config that cannot be run; the message says where, what was expected and what it got."""


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error message, e.g. "; did you mean asterix?"; "" if no known word is close."""
    close = closest(word, known, most=2)
    return f"; did you mean {_or(close)}?" if close else ""


def closest(word: str, known: Iterable[str], *, most: int) -> list[str]:
    """The known words that resemble `word`, best first. Case and punctuation do not matter.

    Args: most, how many at most.
    """
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), name)
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    return [folded[name] for name in difflib.get_close_matches(plain, folded, n=most, cutoff=0.6)]


def _or(words: Sequence[object]) -> str:
    names = [str(word) for word in words]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


# The dotted keys of options in version 0.1, and what they are called in the current version.
MOVED = {
    "agent": "agent.name",
    "net.encoder": "encoder.name",
    "net.stack": "encoder.frames",
    "loss.kind": "agent.loss",
    "sequence": "encoder",
    **{
        f"net.{name}": f"agent.{name}"
        for name in (
            *("shared_bias", "feature_norm", "critics", "critic_norm"),
            *("log_std", "log_std_min", "log_std_max"),
        )
    },
    **{
        f"loss.{name}": f"agent.{name}"
        for name in (
            *("double", "huber_delta", "quantiles", "mico_weight", "mico_beta"),
            *("target_critics", "actor_value", "backup_entropy", "target_entropy"),
            *("temperature", "spread_temperature"),
        )
    },
    **{
        f"sequence.{name}": f"encoder.{name}"
        for name in (
            *("layers", "width", "heads", "variant", "ratio", "gate_scales", "prune"),
            *("precision", "previous_action", "previous_reward", "context", "learnt"),
            *("context_grad", "sampling", "cache", "stored_state", "cache_refresh"),
        )
    },
    "optim.actor_lr": "agent.actor_lr",
    "optim.temperature_lr": "agent.temperature_lr",
    "schedule.policy_every": "agent.policy_every",
    "ensemble.gradient_scale": "agent.gradient_scale",
}

Kinds = Mapping[str, str]  # the chosen kind of every section that is a union: {"agent": "dqn", ...}


def moved(key: str) -> str:
    """A sentence that gives the new key of an option of version 0.1; "" for other keys."""
    return f"{key}: moved to {MOVED[key]}" if key in MOVED else ""


def keys(model: type[BaseModel], prefix: str = "", *, kinds: Kinds | None = None) -> Iterator[str]:
    """Every dotted key of a model and its sections, e.g. loss.gamma.

    Args: prefix of all keys; kinds, the kinds of the sections that are unions. For a union that is
          not in `kinds`, the keys of all its kinds are given.
    """
    for name, field in model.model_fields.items():
        choices = _models(field.annotation)
        wanted = (kinds or {}).get(f"{prefix}{name}")
        own = [choice for choice in choices if _kind(choice, field.discriminator) == wanted]
        for choice in own or choices:
            yield from keys(choice, f"{prefix}{name}.", kinds=kinds)
        yield f"{prefix}{name}"


def _kind(model: type[BaseModel], discriminator: Any) -> str | None:
    """The kind that a model of a union describes; None if there is no union."""
    field = model.model_fields.get(discriminator) if isinstance(discriminator, str) else None
    return field.default if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def section_models(root: type[BaseModel], section: str) -> dict[str, type[Any]]:
    """The models of a section, by kind. A section that is no union has one model, under the key "".

    Empty if `section` is a plain option.
    """
    field = root.model_fields[section]
    models = _models(field.annotation)
    return {_kind(model, field.discriminator) or "": model for model in models}


def unions(root: type[BaseModel], prefix: str = "") -> dict[str, dict[str, type[BaseModel]]]:
    """The models of every section that is a union, by the section's dotted key and by kind.

    Unions inside the models of a union are not among them.
    """
    found = {}
    for name in root.model_fields:
        models = section_models(root, name)
        if "" in models:
            found |= unions(models[""], f"{prefix}{name}.")
        elif models:
            found[f"{prefix}{name}"] = models
    return found


def refused(
    error: ValidationError, root: type[BaseModel], *, where: str, kinds: Kinds | None = None
) -> ConfigError:
    """A ConfigError with one line for each error of a model; each line starts with `where`."""
    lines = explained(error, root, kinds=kinds)
    return ConfigError("\n".join(f"{where}: {line}" for line in lines))


def explained(
    error: ValidationError, root: type[BaseModel], *, kinds: Kinds | None = None
) -> list[str]:
    """One sentence for each error: the key, what was expected and got, and the nearest key.

    Args: root, the model that was validated; kinds, the kinds of its unions, whose keys are
          suggested.
    """
    lines = []
    for detail in error.errors(include_url=False):
        lines.extend(_sentences(detail, root, kinds or {}))
    return lines


def _sentences(detail: ErrorDetails, root: type[BaseModel], kinds: Kinds) -> list[str]:
    key, discriminator = _key(detail["loc"], root)
    got, context = detail["input"], detail.get("ctx", {})
    kind = detail["type"]
    if kind == "value_error":
        return str(context["error"]).split("\n")
    if kind == "extra_forbidden":
        inside = [f"{key}.{name}" for name in got] if isinstance(got, Mapping) else []
        gone = [sentence for name in inside if (sentence := moved(name))]
        return gone or [moved(key) or f"{key}: no such key{_meant(key, root, kinds)}"]
    if kind in ("literal_error", "union_tag_invalid"):
        listed = context.get("expected", context.get("expected_tags", ""))
        choices = re.findall(r"'([^']*)'", listed)
        if kind == "union_tag_invalid":
            key, got = f"{key}.{discriminator}", context["tag"]
        return [f"{key}: expected {_or(choices)}, got {_got(got)}{nearest(str(got), choices)}"]
    if kind == "union_tag_not_found":
        return [f"{key}.{discriminator}: missing; expected {_or(list(unions(root)[key]))}"]
    if kind == "missing":
        return [f"{key}: missing"]
    sentence = f"{key}: expected {_expected(detail)}, got {_got(got)}"
    if discriminator and isinstance(got, str):
        sentence += f" ({moved(key) or f'{key}.{discriminator} chooses its kind'})"
    return [sentence]


def _key(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[str, Any]:
    """The dotted key of pydantic's path, in which kinds of unions stand though they are no keys.

    Returns: the key; the option that says which kind the last section of the path is, None where
             that is no union.
    """
    parts, model, discriminator, found = [*loc], root, None, []
    while parts:
        name = parts.pop(0)
        found.append(visible(str(name)))
        field = model.model_fields.get(str(name)) if model else None
        models = section_models(model, str(name)) if model and field else {}
        discriminator = field.discriminator if field else None
        if discriminator and len(parts) > 1:
            model = models.get(str(parts.pop(0)))
        else:
            model = models.get("")
    return ".".join(found), discriminator


def _meant(key: str, root: type[BaseModel], kinds: Kinds) -> str:
    """The end of an error message that suggests an existing key; "" if none is similar."""
    known = list(dict.fromkeys(keys(root, kinds=kinds)))
    group, _, word = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[2] == word]
    if beside and not group:
        return f"; did you mean {_or(beside)}?"
    if other := foreign(key, root, kinds):
        return f"; {other}"
    if beside:
        return f"; did you mean {_or(beside)}?"
    return nearest(key, [name for name in known if name.startswith(f"{group}.")] or known)


def foreign(key: str, root: type[BaseModel], kinds: Kinds) -> str:
    """Says which other kinds of a section have an option, e.g. "encoder frames has none, fox does".

    Args:    key, dotted, or the name of the option alone.
    Returns: the sentence; "" if the chosen kind has the option, or no kind does.
    """
    group, _, word = key.rpartition(".")
    for section, models in unions(root).items():
        if group not in ("", section) or section not in kinds:
            continue
        label = "family" if section == "env" else section
        have = [kind for kind, model in models.items() if word in model.model_fields]
        if have and kinds[section] not in have:
            verb = "does" if len(have) == 1 else "do"
            return f"{label} {kinds[section]} has none, {_listed(have)} {verb}"
    return ""


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _got(value: Any) -> str:
    """A value for an error message, on one line of at most about 200 characters."""
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
    "model_type": "`key: value` lines below it",
    "model_attributes_type": "`key: value` lines below it",
    "dict_type": "`key: value` lines below it",
    "invalid_key": "names as keys",
}


def _expected(detail: ErrorDetails) -> str:
    plain = _EXPECTED.get(detail["type"])
    if plain is None:
        text = detail["msg"].removeprefix("Input should be ")
        bound = next((x for x in detail.get("ctx", {}).values() if isinstance(x, float)), None)
        # Pydantic's own text writes small bounds like 1e-30 with all their zeros.
        return text if bound is None else f"{text.rpartition(' ')[0]} {bound:g}"
    got = detail["input"]
    if detail["type"] == "int_type" and isinstance(got, float) and got.is_integer():
        return f"{plain} without point or exponent ({int(got):_})"
    return plain
