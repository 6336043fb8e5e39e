"""What the sizes of a call decide: which kernels run, on which tiles, and how large buffers are.

`make_plan` decides it and hands it down; nothing else looks at the length of a sequence in order to
choose. Needs no Triton, so that the shapes of results are known without it.
"""

from typing import Literal, NamedTuple

import torch

# short: one program holds a whole sequence, and nothing is pruned.
# medium: one launch forward and one backward take a sequence in several blocks.
# long: a scan of the gates comes first, then programs that each take one tile of queries.
Regime = Literal["short", "medium", "long"]

SHORT_KEYS, MEDIUM_KEYS = 128, 256  # the most keys of the two regimes
WIDEST = 64  # the most entries of a head in these two, whose programs hold many rows at once
# A block of rows of the medium kernels may end up to this many positions past the last one.
MARGIN = 64
# Buffers of the long kernels are whole chunks of positions, with one chunk past the last key.
CHUNK = 128


class Tiles(NamedTuple):
    """Query rows by key columns of the blocks of scores that pruning skips or keeps as a whole."""

    rows: int
    columns: int


class Plan(NamedTuple):
    """Decisions for one call; the tiles are part of the definition, all else is a speed choice."""

    regime: Regime
    tiles: Tiles
    # At most 256 keys. The long kernels then take all blocks in one loop, which masks each of them,
    # and the running rule is left out: there are too few tiles for it to skip more.
    few: bool
    sums_length: int  # positions in the buffer of decayed sums; 0 where no buffer is kept
    left_length: int  # positions in the buffer of the first key that each position visits


TILES = Tiles(64, 64)
SHORT = Plan("short", Tiles(SHORT_KEYS, SHORT_KEYS), True, 0, 0)
MEDIUM = Plan("medium", TILES, True, MEDIUM_KEYS + MARGIN, MEDIUM_KEYS)


def make_plan(keys: int, width: int, dtype: torch.dtype) -> Plan:
    """The plan for N keys in heads of D entries; it does not depend on the number of queries."""
    if keys <= SHORT_KEYS and width <= WIDEST:
        return SHORT
    if SHORT_KEYS < keys <= MEDIUM_KEYS and width <= WIDEST and dtype.itemsize == 2:
        return MEDIUM
    length = (-(-keys // CHUNK) + 1) * CHUNK
    return Plan("long", TILES, keys <= MEDIUM_KEYS, length, length)
