"""The base class of all models of a config: frozen, strict, with finite numbers only."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Ints = Annotated[tuple[int, ...], Field(strict=False)]

COUNTABLE = 2**63


class Model(BaseModel):
    """Frozen and strict: no unknown keys, no silent conversions, finite numbers only."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Refuses whole numbers that no 64-bit integer of a tensor or file can hold."""
        if type(value) is int and abs(value) >= COUNTABLE:
            raise PydanticCustomError("too_large", "a whole number below 2**63")
        return value


Kind = TypeVar("Kind", bound=Model)


def of_kind(section: Model, kind: type[Kind]) -> Kind:
    """The section itself, for callers that need one kind of a union (and for the type checker).

    Raises: TypeError if the section is of another kind.
    """
    if not isinstance(section, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(section).__name__}")
    return section
