"""Rows of benchmarks: which columns are measurements, and how a row is printed.

Columns are of three kinds. Those in `MEASURED` hold measurements. Those in `DERIVED` are computed
from measurements or describe a result. All other columns together say what was measured, and no two
rows of a table agree in all of them.
"""

from typing import Any

Row = dict[str, Any]
Rows = list[Row]

# Columns that `--against` and `cerl bench compare` compare, with their units; less is better.
MEASURED = {
    "microseconds": "us",
    "microseconds a step": "us",
    "cached us": "us",
    "recomputed us": "us",
    "call us": "us",
    "us": "us",
    "ms": "ms",
    "s": "s",
    "fwd graph": "ms",
    "fwd eager": "ms",
    "fwd+bwd graph": "ms",
    "fwd+bwd eager": "ms",
    "forward": "ms",
    "fwd+bwd": "ms",
    "both": "ms",
    "save ms": "ms",
    "check ms": "ms",
    "load ms": "ms",
    "peak GiB": "GiB",
}
DERIVED = frozenset(
    (
        *("million steps a second", "agent steps a second, all seeds", "updates a second"),
        *("updates/s", "rows/us", "attention", "ratio", "graph/ours", "eager/ours", "official JAX"),
        *("cache MiB", "GB", "ring MB", "on disk MB", "file MB", "streamed MB/s", "pause max ms"),
        *("pause %", "skipped", "range", "error", "error_fp32", "threshold", "allowed"),
        *("cpu s", "% of training"),
        *("held-out loss", "exact match"),
        *("t", "studentised", "bca", "percentile", "hierarchical"),  # coverage of intervals, %
        *("registers", "spills", "shared", "regs/spills/shared", "difference"),
    )
)
# Keys that a written row has beside the columns of its table.
ORIGIN = frozenset(("bench", "table", "device", "units", "versions", "commit"))


class Printed:
    """Prints rows in columns, each as wide as its widest cell so far."""

    def __init__(self, title: str) -> None:
        self.widths: dict[str, int] = {}
        print(title)

    def add(self, row: Row) -> None:
        self.add_all([row])

    def add_all(self, rows: Rows) -> None:
        """Prints several rows, in columns that are wide enough for all of them."""
        texts = [{name: cell(value) for name, value in row.items()} for row in rows]
        untitled = not self.widths
        if untitled and rows:
            self.widths = {name: max(len(name), 7) for name in rows[0]}
        for cells in texts:
            for name, text in cells.items():
                self.widths[name] = max(self.widths.get(name, 0), len(text))
        if untitled and rows:
            print(self._line({name: name for name in rows[0]}, rows[0]))
        for row, cells in zip(rows, texts, strict=True):
            print(self._line(cells, row), flush=True)

    def _line(self, cells: dict[str, str], row: Row) -> str:
        padded = (
            text.ljust(self.widths[name])
            if isinstance(row[name], str)
            else text.rjust(self.widths[name])
            for name, text in cells.items()
        )
        return "  ".join(padded).rstrip()


def cell(value: object) -> str:
    """A value as text for a table; floats have four significant digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def check_tolerance(tolerance: float) -> None:
    """Raises: ValueError if the tolerance is negative or NaN."""
    if not tolerance >= 0.0:
        raise ValueError(f"--tolerance: expected a share from 0 on, like 0.02, got {tolerance}")


# What a row measured: the columns that are neither measurements nor the origin of the row, as pairs
# of name and text. Two rows with equal places can be compared.
Place = tuple[tuple[str, str], ...]


def place(row: Row) -> Place:
    """What a row measured, for example a preset, a part of the update, and S."""
    names = row.keys() - MEASURED.keys() - DERIVED - ORIGIN
    return tuple((name, cell(row[name])) for name in row if name in names)
