"""Writes the results of runs, or one member of a run, in the formats of other programs."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.csv
from rich.console import Console

from cerl.config import ConfigError, errors
from cerl.exchange import dqn_zoo, rliable, scores, weights_biases
from cerl.record import files
from cerl.record.folder import check_out
from cerl.record.screen import PipeConsole
from cerl.report import settings
from cerl.report.normalise import known

FORMATS = ("rliable", "csv", "dqn_zoo", "wandb", "safetensors")


def main(
    runs: Sequence[Path],
    out: Path,
    *,
    to: str,
    last: int = 1,
    normalise: str = "none",
    member: int | None = None,
    seed: int | None = None,
    trusted: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Exports runs and prints which files were written, and what was left out.

    Args:    runs, as `cerl report` takes them; for safetensors one run folder. out, a folder, or
             for csv a file that ends in .csv. to, one of FORMATS. last and normalise, for rliable:
             a score is the mean over this many last evaluations, on the scale of that name in
             `report.normalise.NORMALISATIONS`.
             member and seed, for safetensors: whose parameters (seed None: the run's first);
             trusted, as --trust of `cerl eval`. console, where to print (default: standard output).
    Returns: the files or folders that were written.
    Raises:  ConfigError for arguments that do not fit the format; RowsError or CheckpointError if
             runs hold nothing to export; ImportError if the format needs a package that is missing.
    """
    _check(runs, out, to=to, last=last, normalise=normalise, member=member, seed=seed)
    console = console or PipeConsole(highlight=False)
    notes: list[str] = []
    if to == "safetensors":
        from cerl.exchange.member import export  # imports torch, which takes seconds

        assert member is not None, "checked above"
        paths = export(runs[0], out, member=member, seed=seed, trusted=trusted)
    else:
        read = scores.read(runs)
        if to == "csv":
            paths = [_csv(read, out)]
        elif to == "dqn_zoo":
            paths = dqn_zoo.export(read, out)
        elif to == "wandb":
            paths = weights_biases.export(read, out)
        else:
            paths = rliable.export(read, out, last=last, normalise=normalise)
        notes = read.notes
    for path in paths:
        console.print(str(path), soft_wrap=True, markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    if to == "wandb":
        console.print(
            f"upload them with: wandb sync {out}/wandb/offline-run-*", soft_wrap=True, markup=False
        )
    return paths


def _check(
    runs: Sequence[Path],
    out: Path,
    *,
    to: str,
    last: int,
    normalise: str,
    member: int | None,
    seed: int | None,
) -> None:
    """Raises: ConfigError for arguments that do not fit the format."""
    if to not in FORMATS:
        hint = errors.nearest(to, FORMATS)
        raise ConfigError(f"export --to: expected one of {', '.join(FORMATS)}, got {to!r}{hint}")
    if not runs:
        raise ConfigError("export: expected at least one run folder; see `cerl export --help`")
    if to == "safetensors":
        if member is None or len(runs) != 1:
            raise ConfigError(
                f"export --to safetensors: expected one run and --member, got {len(runs)} "
                f"run{'s' if len(runs) != 1 else ''} and {'no' if member is None else 'a'} member"
            )
    elif member is not None or seed is not None:
        option = "--member" if member is not None else "--seed"
        raise ConfigError(f"export {option}: expected with --to safetensors only, got --to {to}")
    if to != "rliable" and (last, normalise) != (1, "none"):
        option = "--last" if last != 1 else "--normalise"
        raise ConfigError(f"export {option}: expected with --to rliable only, got --to {to}")
    if last < 1:
        raise ConfigError(f"export --last: expected at least 1 evaluation, got {last}")
    known(normalise, command="export")
    check_out(out.parent if to == "csv" and out.suffix == ".csv" else out, option="export --out")


def _csv(read: scores.Read, out: Path) -> Path:
    """Writes every result row, with its label and the options in which runs differ, as CSV."""
    path = out if out.suffix == ".csv" else out / "rows.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = settings.named_rows(read.table)
    files.write_atomically(path, lambda file: pyarrow.csv.write_csv(table, file))
    return path
