"""The table that all benchmarks share: prints rows, and writes them as JSON lines, as they come.

Columns are of three kinds. Those in `MEASURED` hold measurements. Those in `DERIVED` are computed
from measurements or describe a result. All other columns together say what was measured, and no two
rows of a table agree in all of them.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cerl.bench import Slower
from cerl.record.versions import versions

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
        *("pause %", "skipped", "error", "error_fp32", "threshold", "allowed"),
        *("registers", "spills", "shared", "regs/spills/shared"),
    )
)
# Keys that a written row has beside the columns of its table.
ORIGIN = frozenset(("bench", "table", "device", "units", "versions", "commit"))


@dataclass(frozen=True)
class Output:
    """Where rows are written, and what they are compared with."""

    out: Path | None = None
    """file to which rows are appended, a line of JSON each, as soon as they are measured"""
    against: Path | None = None
    """file of stored rows to compare with; only rows of a device of the same name are used"""
    tolerance: float = 0.02
    """with --against: a measurement that is larger by more than this share gives exit code 1"""


class Printed:
    """Prints rows in columns, each as wide as its widest cell so far."""

    def __init__(self, title: str) -> None:
        self.widths: dict[str, int] = {}
        print(title)

    def add(self, row: Row) -> None:
        cells = {name: cell(value) for name, value in row.items()}
        if not self.widths:
            self.widths = {name: max(len(name), 7) for name in row}
            self._grow(cells)
            print(self._line({name: name for name in row}, row))
        self._grow(cells)
        print(self._line(cells, row), flush=True)

    def _grow(self, cells: dict[str, str]) -> None:
        for name, text in cells.items():
            self.widths[name] = max(self.widths.get(name, 0), len(text))

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


class Table:
    """The rows of one benchmark: printed, written to a file, and compared with stored ones.

    Args:    bench, the benchmark's name; device, the name of the device that is measured; title of
             the table (default: the benchmark's name).
    Raises:  ValueError if `output.against` holds no row to compare with. This is checked here,
             before anything is measured.
    """

    def __init__(self, bench: str, output: Output, *, device: str, title: str = "") -> None:
        from cerl.bench.compare import stored

        check_tolerance(output.tolerance)
        self.bench, self.device, self.output = bench, device, output
        self.title = f"{title or bench} on {device}"
        self.rows, self.failed, self.old = Rows(), Rows(), Rows()
        self.origin: Row = {}
        if output.against is not None:
            self.old = stored(output.against, bench=bench, device=device)
        if output.out is not None:
            self.origin = {"device": device, "versions": versions(), "commit": commit()}
            output.out.parent.mkdir(parents=True, exist_ok=True)
            output.out.open("a").close()  # fails now, not after the first measurement
        self.printed = Printed(self.title)

    def add(self, row: Row) -> None:
        """Takes a new row, prints it and writes it."""
        for name, value in row.items():
            known = name in MEASURED or name in DERIVED or isinstance(value, str | int | None)
            assert known, f"{name}: a number that is measured has to be in MEASURED or DERIVED"
        self.rows.append(row)
        self.printed.add(row)
        self._write(row)

    def fail(self, row: Row, error: Exception) -> None:
        """Notes a row that could not be measured; the benchmark continues with the other rows."""
        text = (str(error) or type(error).__name__).strip().partition("\n")[0]
        self.failed.append(row | {"error": f"{type(error).__name__}: {text}"})
        print(*row.values(), self.failed[-1]["error"], flush=True)
        self._write(self.failed[-1])

    def _write(self, row: Row) -> None:
        if self.output.out is not None:
            units = {name: unit for name, unit in MEASURED.items() if name in row}
            head = {"bench": self.bench, "table": self.title}
            line = head | row | {"units": units} | self.origin
            with self.output.out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def finished(self) -> Rows:
        """Ends the table, and compares it if `Output.against` asks for it. Returns: all rows.

        Raises: RuntimeError if some rows could not be measured; Slower, as `compare`.
        """
        if self.failed:
            raise RuntimeError(
                f"{len(self.failed)} of {len(self.rows) + len(self.failed)} rows failed, the first "
                f"with {self.failed[0]['error']}; the others are above"
            )
        self.compare()
        return self.rows

    def compare(self) -> None:
        """Compares the rows with those of `Output.against`, if there is one.

        Raises: Slower if a measurement exceeds the tolerance; ValueError if no row has a partner.
        """
        if self.output.against is not None:
            from cerl.bench.compare import against

            slower, text = against(self.rows, self.old, tolerance=self.output.tolerance)
            if slower:
                raise Slower(f"{text} {self.output.against}")


def check_tolerance(tolerance: float) -> None:
    """Raises: ValueError if the tolerance is negative or NaN."""
    if not tolerance >= 0.0:
        raise ValueError(f"--tolerance: expected a share from 0 on, like 0.02, got {tolerance}")


def commit() -> str | None:
    """The commit of this source tree, followed by + if files were changed; None without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        words = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--exclude=*",
            "--abbrev=40",
            "--dirty=+",
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
