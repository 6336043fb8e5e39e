"""Options of small runs that suit any preset: those that a preset does not have are left out."""

from collections.abc import Mapping
from typing import Any

from cerl.config import Config, load
from cerl.config.errors import section_models


def encoder(kind: str, **options: Any) -> dict[str, Any]:
    """The section `encoder` of a kind, without the options that the kind does not have."""
    fields = section_models(Config, "encoder")[kind].model_fields
    return {"name": kind} | {name: value for name, value in options.items() if name in fields}


def suited(preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that suit a preset: `target_every` is left out if its targets are soft-updated."""
    schedule = dict(changes.get("schedule", {}))
    if load(preset).schedule.target_rate < 1:
        schedule.pop("target_every", None)
    return {**changes, "schedule": schedule}
