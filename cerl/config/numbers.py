"""Numbers as people write them, and lists of values of the command line.

`25k` is 25 thousand, `1M` a million, `0..4` the whole numbers from 0 to 4. The same words are read
in files of options and on the command line, but only where an option is a number: in an option that
is a text, they stay texts.
"""

import re
import types
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from cerl.config.errors import ConfigError

UNITS = {"k": 1_000, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}
WORDS = {"true": True, "false": False, "null": None, "~": None, "None": None}
MOST = 10_000  # most values of a range
DEEPEST = 8  # most brackets within one another

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_PLAIN = rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})"
_NUMBER = re.compile(rf"({_PLAIN})(?:([{''.join(UNITS)}])|([eE][-+]?[0-9]{{1,3}}))?")
_RANGE = re.compile(r"([-+]?[0-9][0-9_.]*?[kKMG]?)\.\.([-+]?[0-9][0-9_.]*[kKMG]?)")


class Unfit(ConfigError):
    """A word that cannot be read; `expected` says what can be, for a message of the caller's."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}, got {got!r}")
        self.expected = expected


class Numeric(NamedTuple):
    """What kind of numbers an option takes."""

    whole: bool  # whole numbers only
    many: bool  # a list of them


def number(text: str) -> int | float | None:
    """The number that a text is, e.g. 25_000 for "25k"; None if the text is no number.

    The units k (or K), M and G stand for 10^3, 10^6 and 10^9. Numbers without a fraction are ints,
    however they are written: "1.5M", "1e6" and "2.0" too.
    """
    found = _NUMBER.fullmatch(text) if len(text) <= 40 else None
    if found is None:
        return None
    digits, unit, exponent = found.groups(default="")
    # Decimals are exact: 1.005k is 1005, where a product of floats is slightly less.
    exact = Decimal(digits.replace("_", "") + exponent) * UNITS.get(unit, 1)
    fits = not exponent or abs(exact) < 2**63  # 1e999 would be an int of a thousand digits
    return int(exact) if fits and exact == exact.to_integral_value() else float(exact)


def whole(text: str) -> int | None:
    """The whole number that a text is, e.g. 400_000 for "400k" or "400_000"; else None.

    Unlike `number`, it refuses exponents, and a point without a unit.
    """
    plain = re.fullmatch(rf"[-+]?{_DIGITS}", text)
    found = number(text) if plain or text[-1:] in UNITS else None
    return found if isinstance(found, int) else None


def span(text: str) -> range | None:
    """The whole numbers of a range such as "0..4", whose end belongs to it; None for other texts.

    Raises: Unfit if an end is no whole number, the range runs backwards, or it has more than
            `MOST` numbers.
    """
    found = _RANGE.fullmatch(text)
    if found is None:
        return None
    first, last = whole(found[1]), whole(found[2])
    if first is None or last is None:
        raise Unfit("a range of whole numbers, e.g. 0..4 (4 belongs to it)", text)
    if last < first:
        raise Unfit(f"a range that runs upwards, e.g. {last}..{first}", text)
    if last - first >= MOST:
        raise Unfit(f"a range of at most {MOST:,} numbers", text)
    return range(first, last + 1)


def values(text: str) -> list[Any]:
    """The values of a list as people write it: separated by commas, ranges written out.

    E.g. "2,5,10" and "25k,100k", "0..4" for five values, "gru,fox" for two texts. Brackets make
    one value of several: "[256,256],[512,512]" are two tuples. true, false and null are read as in
    YAML, and None as on the command line.

    Raises: ConfigError if there is no value, if one is empty, if brackets do not match, or as
            `span`.
    """
    parts = _parts(text)
    if not any(parts):
        raise Unfit("values separated by commas, e.g. 2,5,10", text)
    return [value for part in parts for value in _values_of(part, text)]


def _values_of(part: str, text: str) -> list[Any]:
    """The values of one part of a list: those of a range, else one. Args: text, the whole list."""
    if not part:
        raise Unfit("a value before and after every comma", text)
    if part.startswith("["):
        inside = part[1:-1].strip()
        if not part.endswith("]") or "][" in part:
            raise Unfit("one list of brackets between commas", text)
        return [tuple(values(inside)) if inside else ()]
    found = number(part)
    if found is not None:
        return [found]
    whole_range = span(part)
    return [WORDS.get(part, part)] if whole_range is None else list(whole_range)


def _parts(text: str) -> list[str]:
    """Splits a list at the commas that are in no brackets, and strips spaces."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "[") - (char == "]")
        if not 0 <= depth <= DEEPEST:
            break
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    if depth:
        raise Unfit("brackets that open and close, e.g. [256,256],[512,512]", text)
    return [part.strip() for part in parts]


def human(value: Any) -> str:
    """A value as people write it in names: 100k, 1.5M, 12,345, 1e-4, on, off, none, 256 x 256.

    Different values of one option have different texts, since no digit is left out.
    """
    match value:
        case bool():
            return "on" if value else "off"
        case None:
            return "none"
        case int():
            return _whole(value)
        case float():
            return _float(value)
        case Mapping():
            return " ".join(f"{key}={human(part)}" for key, part in value.items()) or "none"
        case tuple() | list():
            texts = [f"({human(v)})" if isinstance(v, tuple | list) else human(v) for v in value]
            joint = " + " if any(isinstance(part, str) for part in value) else " x "
            return joint.join(texts) or "none"
    return str(value)


def _whole(value: int) -> str:
    """With a unit where at most three digits are then left, else with commas."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= size:
            text = f"{Decimal(value) / size:f}"
            text = text.rstrip("0").rstrip(".") if "." in text else text
            return f"{text}{unit}" if len(text.strip("-0").replace(".", "")) <= 3 else f"{value:,}"
    return str(value)


def _float(value: float) -> str:
    """Whole ones as ints; small ones as 1e-4. `repr` is the shortest text that is read back."""
    if value.is_integer() and abs(value) < 2**53:
        return _whole(int(value))
    if 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{Decimal(repr(value)):e}".partition("e")
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return f"{digits}e{int(exponent)}"
    return repr(value)


def numeric(annotation: Any) -> Numeric | None:
    """What kind of numbers an option of a type takes; None if it takes anything else too.

    Args: annotation, e.g. int, float | None, tuple[int, ...].
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return numeric(inner[0])
    if origin is tuple and inner:
        part = numeric(inner[0])
        return part and Numeric(part.whole, many=True)
    if origin in (Union, types.UnionType):
        parts = [numeric(part) for part in inner if part is not type(None)]
        if len(parts) == 1:
            return parts[0]
        found = [part for part in parts if part is not None and not part.many]
        if not found or len(found) < len(parts):
            return None
        return Numeric(all(part.whole for part in found), many=False)
    return Numeric(annotation is int, many=False) if annotation in (int, float) else None


def read(value: Any, kind: Numeric) -> Any:
    """A value of a file for an option that takes numbers: texts with a unit become numbers, and
    ranges lists. All other values are returned as they are, for the checks of the option.

    Raises: Unfit, as `span`.
    """
    if kind.many:
        if isinstance(value, str):
            found = span(value)
            return value if found is None else list(found)
        if isinstance(value, list | tuple):
            return [part for given in value for part in _several(given, kind)]
        return value
    return _with_unit(value, kind)


def _several(value: Any, kind: Numeric) -> list[Any]:
    """The numbers that one value of a list stands for."""
    found = span(value) if isinstance(value, str) else None
    return [_with_unit(value, kind)] if found is None else list(found)


def _with_unit(value: Any, kind: Numeric) -> Any:
    """A text with a unit as a number, if the option can hold it; other values as they are."""
    if not isinstance(value, str) or value[-1:] not in UNITS:
        return value
    found = number(value)
    return value if found is None or (kind.whole and not isinstance(found, int)) else found


def words(
    arguments: Sequence[str], kinds: Mapping[str, Numeric], *, keys: Sequence[str]
) -> list[str]:
    """Words of the command line, in which numbers with a unit and ranges are written out.

    Args:    arguments, the words; kinds, by dotted key, the options that take numbers; keys, the
             dotted key of every word that is an option, "" for every other word.
    Raises:  ConfigError naming the option, as `span`.
    """
    found: list[str] = []
    option, kind = "", None
    for word, key in zip(arguments, keys, strict=True):
        if key:
            option, equals, value = word.partition("=")
            kind = kinds.get(key)
            if not equals or kind is None:
                found.append(word)
                continue
        else:
            equals, value = "", word
        texts = [value] if kind is None else _texts(value, kind, option)
        if equals and len(texts) == 1:
            found.append(f"{option}={texts[0]}")
        else:  # `--seeds=0..4` becomes `--seeds 0 1 2 3 4`
            found += [option, *texts] if equals else texts
    return found


def _texts(word: str, kind: Numeric, option: str) -> list[str]:
    try:
        if kind.many:  # numbers of a list may have commas between them, as in `--seeds 0,1,2`
            given = word.removesuffix(",").split(",")
            if len(given) > 1 and not all(given):
                raise Unfit("a value before and after every comma", word)
            parts = [part for text in given for part in _several(text, kind)]
        else:
            parts = [_with_unit(word, kind)]
    except Unfit as error:
        raise ConfigError(f"{option}: {error}") from None
    return [str(part) for part in parts]
