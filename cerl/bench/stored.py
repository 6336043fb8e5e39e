"""Rows that were stored by --out, and the comparison of new rows with them."""

import json
from collections.abc import Iterable
from pathlib import Path

from cerl.bench.rows import MEASURED, Place, Printed, Row, Rows, place
from cerl.record.versions import versions


def read(path: Path) -> Rows:
    """The rows of a file, those that could not be measured left out.

    Raises: ValueError for a line that is no row; OSError.
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
    """The rows of a benchmark on a device.

    Raises: ValueError if the file has none of the benchmark, or only those of other devices.
    """
    if not path.is_file():
        raise ValueError(f"--against: expected a file of rows, but {path} is none")
    rows = [row for row in read(path) if row.get("bench") == bench]
    if not rows:
        raise ValueError(
            f"--against: {path} has no rows of `{bench}`; measure some with --out {path}"
        )
    found = sorted({str(row.get("device")) for row in rows})
    if device not in found:
        raise ValueError(
            f"--against: the rows of `{bench}` in {path} are of {', '.join(found)}, and this is "
            f"{device}; times compare on one kind of device only. Measure rows of this one with "
            "--out"
        )
    return [row for row in rows if row["device"] == device]


def partner(row: Row, others: Iterable[Row]) -> Row | None:
    """The last of the others that measured the same: all columns that both have agree.

    Raises: ValueError if several differ in columns that the row does not have.
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
    """What was measured, in words."""
    return ", ".join(f"{name} {text}" for name, text in there)


def measurements(row: Row) -> dict[str, float]:
    """What is measured in a row, by column; what is not there (NaN, None, 0) left out."""
    found = {name: row[name] for name in MEASURED if isinstance(row.get(name), int | float)}
    return {name: float(value) for name, value in found.items() if value > 0}


def against(rows: Rows, old: Rows, *, tolerance: float) -> tuple[int, str]:
    """Prints the ratio of every measurement to the stored one.

    Returns: how many are above 1 + tolerance, and a sentence that says so.
    Raises:  ValueError if no row was measured before.
    """
    printed, slower, count = Printed("compared with stored rows"), 0, 0
    for row in rows:
        before = partner(row, old)
        if before is None:
            print(f"{told(place(row))}: not measured before", flush=True)
            continue
        past = measurements(before)
        for name, value in measurements(row).items():
            if name not in past:
                continue
            ratio, count = value / past[name], count + 1
            slower += ratio > 1.0 + tolerance
            verdict = "SLOWER" if ratio > 1.0 + tolerance else ""
            head: Row = dict(place(row)) | {"measured": name, "before": past[name], "now": value}
            printed.add(head | {"ratio": ratio, "verdict": verdict})
    if not count:
        raise ValueError("--against: none of the rows was measured before; see the table")
    _tell_origin(old[-1])
    return slower, f"{slower} of {count} measurements are more than {tolerance:.1%} above those in"


def _tell_origin(row: Row) -> None:
    """Prints the commit of a stored row, and which versions are others now."""
    before, now = row.get("versions") or {}, versions()
    names = [name for name in before | now if before.get(name) != now.get(name)]
    other = [f"{name} {before.get(name, 'none')} (now {now.get(name, 'none')})" for name in names]
    print("; ".join([f"stored rows: commit {row.get('commit') or 'unknown'}", *other]), flush=True)
