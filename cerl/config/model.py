"""The base class of all models of a config: frozen, strict, with finite numbers only."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from cerl.config import numbers

Ints = Annotated[tuple[int, ...], Field(strict=False)]

COUNTABLE = 2**63


class Model(BaseModel):
    """Frozen and strict: no unknown keys, no silent conversions, finite numbers only.

    Where an option is a number, a file may write it with a unit (25k, 1M), and a list of whole
    numbers as a range (0..4, which includes 4).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, given: Any) -> Any:
        """Reads numbers with a unit and ranges, in options that are numbers."""
        if not isinstance(given, Mapping):
            return given
        read = dict(given)
        for name, kind in _numeric_fields(cls).items():
            value = given.get(name)
            if not isinstance(value, str | list | tuple):
                continue
            try:
                read[name] = numbers.read(value, kind)
            except numbers.Unfit as error:
                problem = PydanticCustomError("range", "{expected}", {"expected": error.expected})
                detail = InitErrorDetails(type=problem, loc=(name,), input=value)
                raise ValidationError.from_exception_data(cls.__name__, [detail]) from None
        return read

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Refuses whole numbers that no 64-bit integer of a tensor or file can hold."""
        if type(value) is int and abs(value) >= COUNTABLE:
            raise PydanticCustomError("too_large", "a whole number below 2**63")
        return value


@functools.cache
def _numeric_fields(model: type[BaseModel]) -> Mapping[str, numbers.Numeric]:
    """The options of a model that take numbers, with the kind of numbers."""
    kinds = {name: numbers.numeric(info.annotation) for name, info in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


Kind = TypeVar("Kind", bound=Model)


def of_kind(section: Model, kind: type[Kind]) -> Kind:
    """The section itself, for callers that need one kind of a union (and for the type checker).

    Raises: TypeError if the section is of another kind.
    """
    if not isinstance(section, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(section).__name__}")
    return section
