"""The mark in a run folder that says that its run came to its end."""

import hashlib
from pathlib import Path

from cerl.record.files import read_small, write_text

FILE = "finished"


def mark(folder: Path, steps: int) -> None:
    """Says that a run has trained for so many agent steps of one seed, all that it was asked for.

    Raises: OSError.
    """
    write_text(folder / FILE, _line(steps))


def finished(folder: Path, *, steps: int) -> bool:
    """Whether the run of a folder came to its end, and trained for at least `steps`.

    `schedule.steps` may have been raised since: the run is then not finished any more.
    """
    try:
        content, _ = read_small(folder / FILE, most=200)
        done = int(content.decode().partition(" ")[0])
    except (OSError, ValueError):
        return False
    return content.decode() == _line(done) and done >= steps


def _line(steps: int) -> str:
    """What the file says; a number with a flipped bit is not taken for another."""
    digest = hashlib.sha256(str(steps).encode()).hexdigest()[:12]
    return f"{steps} agent steps of one seed ({digest})\n"
