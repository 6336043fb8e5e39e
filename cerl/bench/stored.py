"""Rows that were stored by --out, and the comparison of new rows with them."""

import json
from collections.abc import Iterable
from pathlib import Path

from cerl.bench.rows import MEASURED, Place, Printed, Row, Rows, place
from cerl.record.versions import versions


def read(path: Path) -> Rows:
    """The rows of a file of JSON lines, without those that record an error.

    Raises: ValueError for a line that is no row; OSError where the file cannot be read.
    """
    rows = Rows()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a row of JSON, got {line[:60]!r}")
        if not isinstance(row.get("error"), str):
            rows.append(row)
    return rows


def stored(path: Path, *, bench: str, device: str) -> Rows:
    """The stored rows of one benchmark on one device.

    Args:    bench, the benchmark's name; device, its name as from `clock.device_name`.
    Raises:  ValueError if the file has no row of the benchmark, or only rows of other devices.
    """
    if not path.is_file():
        raise ValueError(f"--against: expected a file of rows, but {path} is no file")
    rows = [row for row in read(path) if row.get("bench") == bench]
    if not rows:
        raise ValueError(
            f"--against: {path} has no rows of `{bench}`; measure some with --out {path}"
        )
    found = sorted({str(row.get("device")) for row in rows})
    if device not in found:
        raise ValueError(
            f"--against: the rows of `{bench}` in {path} are of {', '.join(found)}, and this is "
            f"{device}; times can be compared only on one kind of device. Measure rows of this "
            "device with --out"
        )
    return [row for row in rows if row["device"] == device]


def partner(row: Row, others: Iterable[Row]) -> Row | None:
    """The row to compare with: the last of the others that agrees in all columns that both have.

    Versions may add or drop a column, so a column that only one of the two has is not compared.

    Returns: None if no other row agrees.
    Raises:  ValueError if several rows agree that differ in columns which `row` does not have.
    """
    wanted, found = dict(place(row)), {}
    for other in others:
        there = place(other)
        both = wanted.keys() & dict(there).keys()
        if both and all(wanted[name] == dict(there)[name] for name in both):
            found[there] = other
    if len(found) > 1:
        raise ValueError(f"{told(place(row))}: {len(found)} different rows to compare with")
    return next(iter(found.values()), None)


def told(there: Place) -> str:
    """The key of a measurement as text, e.g. `what minatar/cerl, S 10`."""
    return ", ".join(f"{name} {text}" for name, text in there)


def measurements(row: Row) -> dict[str, float]:
    """The measurements of a row by column, without those that are missing (NaN, None or 0)."""
    found = {name: row[name] for name in MEASURED if isinstance(row.get(name), int | float)}
    return {name: float(value) for name, value in found.items() if value > 0}


def against(rows: Rows, old: Rows, *, tolerance: float) -> tuple[int, str]:
    """Prints the ratio of every measurement to the stored one.

    Args:    rows, new ones; old, stored ones; tolerance, a share: 0.02 allows 2% more.
    Returns: how many ratios are above 1 + tolerance, and the beginning of a sentence that says so,
             to be followed by the name of the file.
    Raises:  ValueError if none of the rows was measured before.
    """
    printed, ratios, slower = Printed("compared with stored rows"), Rows(), 0
    for row in rows:
        before = partner(row, old)
        if before is None:
            print(f"{told(place(row))}: not measured before", flush=True)
            continue
        past = measurements(before)
        for name, value in measurements(row).items():
            if name not in past:
                continue
            ratio = value / past[name]
            slower += ratio > 1.0 + tolerance
            verdict = "SLOWER" if ratio > 1.0 + tolerance else ""
            head: Row = dict(place(row)) | {"measured": name, "before": past[name], "now": value}
            ratios.append(head | {"ratio": ratio, "verdict": verdict})
    printed.add_all(ratios)
    if not ratios:
        raise ValueError("--against: none of the rows was measured before; see the table")
    _tell_origin(old[-1])
    above = f"{slower} of {len(ratios)} measurements are more than {tolerance:.1%} above those in"
    return slower, above


def _tell_origin(row: Row) -> None:
    """Prints the commit of a stored row, and the versions that have changed since."""
    before, now = row.get("versions") or {}, versions()
    names = [name for name in before | now if before.get(name) != now.get(name)]
    other = [f"{name} {before.get(name, 'none')} (now {now.get(name, 'none')})" for name in names]
    print("; ".join([f"stored rows: commit {row.get('commit') or 'unknown'}", *other]), flush=True)
