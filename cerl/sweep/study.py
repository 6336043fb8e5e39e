"""Studies: presets that are trained and reported together, and the options that they share.

A study is a YAML file beside the presets' folders in `configs/`, with a section for each kind of
device: the same comparison may be smaller on a CPU.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from cerl.config import ConfigError, Model, errors, preset


class Study(Model):
    """The section of a study for one kind of device."""

    presets: Annotated[tuple[str, ...], Field(strict=False)]
    """names of presets"""
    options: dict[str, bool | int | float | str] = {}
    """dotted keys of the command line, for every preset"""


def load_study(name: str, device: Literal["cpu", "cuda"]) -> Study:
    """A study's presets and options for a kind of device.

    Args:    name of the study, that of its file without `.yaml`.
    Raises:  ConfigError if the file has no section for the device, an unknown key or a wrong type.
    """
    path = preset.FOLDER / f"{name}.yaml"
    tree = preset.read(path)
    if device not in tree:
        raise ConfigError(f"{path}: expected a key {device}, got {', '.join(tree) or 'none'}")
    try:
        return Study.model_validate(tree[device])
    except ValidationError as error:
        raise errors.refused(error, Study, where=f"{path}: {device}") from None
