"""The table that all benchmarks share: prints rows, and writes them as JSON lines, as they come."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cerl.arguments import maybe
from cerl.bench import Slower
from cerl.bench.rows import DERIVED, MEASURED, Printed, Row, Rows, check_tolerance
from cerl.bench.stored import against, stored
from cerl.record.versions import versions


@dataclass(frozen=True)
class Output:
    """The file that rows are written to, and the stored rows that they are compared with."""

    out: Annotated[Path | None, maybe("FILE")] = None
    """file to which rows are appended, a line of JSON each, as soon as they are measured"""
    against: Annotated[Path | None, maybe("FILE")] = None
    """file of stored rows to compare with; only rows of a device of the same name are used"""
    tolerance: float = 0.02
    """with --against: a measurement that is larger by more than this share gives exit code 1"""


class Table:
    """The rows of one benchmark: printed, written to a file, and compared with stored ones.

    Args:    bench, the benchmark's name; device, the name of the device that is measured; title of
             the table (default: the benchmark's name).
    Raises:  ValueError if `output.against` holds no row to compare with. This is checked here,
             before anything is measured.
    """

    def __init__(self, bench: str, output: Output, *, device: str, title: str = "") -> None:
        """Args:   bench, its name; device, that of the measurements; title, more than the name.
        Raises: ValueError if there is nothing to compare with: before anything is measured.
        """
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
            slower, text = against(self.rows, self.old, tolerance=self.output.tolerance)
            if slower:
                raise Slower(f"{text} {self.output.against}")


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
