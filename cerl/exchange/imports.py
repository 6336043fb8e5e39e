"""Turns the logs of other programs into run folders with result rows, which reports read."""

from pathlib import Path

from rich.console import Console

from cerl.config import ConfigError, errors
from cerl.exchange import authors, cleanrl, foreign
from cerl.record.folder import check_out
from cerl.record.results import RowsError
from cerl.record.screen import PipeConsole
from cerl.text import visible

SOURCES = ("cleanrl", "authors")


def main(
    folder: Path,
    out: Path,
    *,
    source: str,
    every: int = 0,
    env: str = "",
    console: Console | None = None,
) -> list[Path]:
    """Imports all runs in or below a folder; prints them, and which logs were left out.

    Args:    folder, with logs; out, a folder, in which every imported run gets a folder of its own;
             source, the program that wrote the logs, one of SOURCES; every, for cleanrl: agent
             steps of the windows over which training episodes are averaged (0: about a hundredth of
             the longest run); env, for authors: the environment where their config.json is missing,
             e.g. atari/Pong; console, where to print (default: standard output).
    Returns: the run folders, which `cerl report` takes.
    Raises:  ConfigError for a wrong argument, or if no log can be read.
    """
    if source not in SOURCES:
        hint = errors.nearest(source, SOURCES)
        raise ConfigError(f"import --from: expected cleanrl or authors, got {source!r}{hint}")
    if every < 0:
        raise ConfigError(f"import --every: expected 0 or more agent steps, got {every}")
    if (source == "authors" and every) or (source == "cleanrl" and env):
        option, other = ("--every", "cleanrl") if every else ("--env", "authors")
        raise ConfigError(f"import {option}: expected with --from {other} only")
    if not folder.is_dir():
        raise ConfigError(f"import: expected a folder of logs, got {str(folder)!r}")
    check_out(out, option="import --out")
    console = console or PipeConsole(highlight=False)
    if source == "cleanrl":
        logs, notes = cleanrl.logs(folder)
        runs, more = cleanrl.runs(logs, every=every)
        notes += more
    else:
        runs, notes = authors.runs(folder, env=env)
    written = []
    for run, name in zip(runs, foreign.folder_names(runs, folder), strict=True):
        path = out / name
        try:
            foreign.write(run, path)
        except (ConfigError, RowsError, OSError) as error:
            notes.append(f"{error}; left out")
            continue
        written.append(path)
        seeds = sorted({row["seed"] for row in run.rows})
        steps = max(row["step"] for row in run.rows)
        text = f"{path}: {run.method} on {run.env}, seed {' '.join(map(str, seeds))}, to step"
        console.print(visible(f"{text} {steps:,}"), soft_wrap=True, markup=False)
    for note in notes:
        console.print(visible(f"note: {note}"), soft_wrap=True, markup=False)
    if not written:
        what = "; see the notes above" if notes else f", no files of {source} in or below it"
        raise ConfigError(f"{folder}: no run that can be imported{what}")
    return written
