"""Options of small runs of many presets, without those that mean nothing to a preset."""

from collections.abc import Mapping
from typing import Any

from cerl.config import Config, load
from cerl.config.errors import section_models


def encoder(kind: str, **options: Any) -> dict[str, Any]:
    """Options of an encoder, without those that the kind does not have."""
    fields = section_models(Config, "encoder")[kind].model_fields
    return {"name": kind} | {name: value for name, value in options.items() if name in fields}


def suited(preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested changes of a preset; `target_every` is left out where targets follow by a share."""
    schedule = dict(changes.get("schedule", {}))
    if load(preset).schedule.target_rate < 1:
        schedule.pop("target_every", None)
    return {**changes, "schedule": schedule}
