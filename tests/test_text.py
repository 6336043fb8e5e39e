"""Texts: ranges of whole numbers."""

import pytest

from cerl.text import ranges


@pytest.mark.parametrize(
    ("numbers", "least", "texts"),
    [
        ((), 3, []),
        ((0,), 3, ["0"]),
        ((4, 0, 1, 2), 3, ["0..2", "4"]),
        ((3, 4), 3, ["3", "4"]),
        ((3, 4, 9), 2, ["3..4", "9"]),
        ((3, 5), 2, ["3", "5"]),
    ],
)
def test_consecutive_numbers_are_ranges(numbers, least, texts):
    assert ranges(numbers, least=least) == texts
