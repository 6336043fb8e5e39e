"""Options that may name code of the user's own as `module:name`.

Reading such an option imports nothing: a config says what a run would import, and a run that is
built imports it (`cerl/own_code.py`). So a folder of somebody else's is read without its code.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(word: object) -> bool:
    """Whether a word names something of a module, as in `my_module:name`."""
    return isinstance(word, str) and _NAME.fullmatch(word) is not None


def _checked(word: str) -> str:
    if not is_own(word):
        raise PydanticCustomError("own_name", "MODULE:NAME, e.g. my_module:my_function")
    return word


def _either(word: Any, known: ValidatorFunctionWrapHandler) -> Any:
    return word if is_own(word) else known(word)


OwnName = Annotated[str, AfterValidator(_checked)]
"""A text of the form MODULE:NAME."""

OR_OWN = (WrapValidator(_either), PlainSerializer(str))
"""Lets an option that chooses between words also take MODULE:NAME."""
