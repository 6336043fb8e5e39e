"""Studies: presets that are run and reported together, and the options that they share."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from cerl.config import ConfigError, Model, errors, preset


class Study(Model):
    """Presets that are run and reported together, and what they change."""

    presets: Annotated[tuple[str, ...], Field(strict=False)]
    """names of presets"""
    options: dict[str, bool | int | float | str] = {}
    """dotted keys of the command line, for every preset"""


def load_study(name: str, device: Literal["cpu", "cuda"]) -> Study:
    """A study's presets and options for a kind of device. Raises: ConfigError."""
    path = preset.FOLDER / f"{name}.yaml"
    tree = preset.read(path)
    if device not in tree:
        raise ConfigError(f"{path}: expected a key {device}, got {', '.join(tree) or 'none'}")
    try:
        return Study.model_validate(tree[device])
    except ValidationError as error:
        raise errors.refused(error, Study, where=f"{path}: {device}") from None
