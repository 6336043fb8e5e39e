"""Constants of the hash behind all random numbers: splitmix64 (Steele et al. 2014)."""

STEP, INDEX = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """The low 64 bits of `value` as int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
