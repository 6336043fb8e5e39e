"""The file `finished` in a run folder, which says that the run has trained to its end."""

import hashlib
from pathlib import Path

from cerl.record.files import read_small, write_text

FILE = "finished"


def mark(folder: Path, steps: int) -> None:
    """Writes the file `finished`. Args: steps, agent steps of one seed. Raises: OSError."""
    write_text(folder / FILE, _line(steps))


def finished(folder: Path, *, steps: int) -> bool:
    """Whether a run is finished and has trained for at least `steps` agent steps of one seed.

    If schedule.steps was raised after it finished, the run counts as unfinished.
    """
    try:
        content, _ = read_small(folder / FILE, most=200)
        done = int(content.decode().partition(" ")[0])
    except (OSError, ValueError):
        return False
    return content.decode() == _line(done) and done >= steps


def _line(steps: int) -> str:
    """The content of the file. A hash guards the number against flipped bits."""
    digest = hashlib.sha256(str(steps).encode()).hexdigest()[:12]
    return f"{steps} agent steps of one seed ({digest})\n"
