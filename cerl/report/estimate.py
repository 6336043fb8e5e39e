"""Scores and their intervals as text."""

import math
from collections.abc import Mapping


def number(value: float | None, *, size: float | None = None) -> str:
    """A score as text with about three significant digits, "n/a" where there is none.

    Args: size, the number whose magnitude decides how many decimals are shown (default: the score
          itself), so that a score and its interval can have the same number of decimals.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    size = abs(value) if size is None else size
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def estimate(line: Mapping[str, float | None]) -> str:
    """The value of a row of a summary with its interval as text, with equally many decimals.

    A value of several seeds without an interval has the least and the greatest seed in parentheses
    instead, such as "12.3 (10.1..14.0)".

    Args: line, with `value`, `low` and `high`, and where known `least` and `greatest`.
    """
    sure = line["low"] is not None
    names = ("value", "low", "high") if sure else ("value", "least", "greatest")
    found = [line.get(name) for name in names]
    size = max((abs(value) for value in found if value is not None), default=0.0)
    value, low, high = (number(x, size=size) for x in found)
    if sure:
        return f"{value} [{low}, {high}]"
    return value if found[1] is None else f"{value} ({low}..{high})"


def folded(text: str) -> str:
    """An estimate in two lines, for narrow columns: the value, then what stands in brackets."""
    return text.replace(" [", "\n[").replace(" (", "\n(")
