"""error.json: why the last try to train a run failed.

The process that trains the run writes the file when an error ends the training, and the launcher of
a sweep writes it for a process that a signal killed. Once a later try ends without an error, the
file is removed.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from cerl.record import files
from cerl.record.heartbeat import Rival
from cerl.stop import Stopped
from cerl.terminal import explained

FILE = "error.json"
_LONGEST = 4_000  # characters of a message that are kept
_LARGEST = 100_000  # bytes


class Failure(NamedTuple):
    """How a run failed."""

    message: str  # what went wrong and what to do; one or a few lines
    kind: Literal["error", "signal"]  # the training raised an error, or a signal killed the process
    signal: int  # number of the signal; 0 after an error
    tries: int  # how many tries have failed one after the other, this one included
    time: float  # when the run failed, in seconds since 1970 (Unix time)


def read(folder: Path) -> Failure | None:
    """How the run of a folder failed; None if it did not, or the file cannot be read."""
    try:
        content, _ = files.read_small(folder / FILE, most=_LARGEST)
        found = json.loads(content)
        return Failure(
            message=str(found["message"]),
            kind="signal" if found["kind"] == "signal" else "error",
            signal=int(found["signal"]),
            tries=int(found["tries"]),
            time=float(found["time"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def note(folder: Path, message: str, *, signal: int = 0) -> None:
    """Writes down that a try to train the run has failed; if that cannot be written, nothing is.

    Args: message, signal: as in `Failure`.
    """
    earlier = read(folder)
    failure = Failure(
        message=message[:_LONGEST],
        kind="signal" if signal else "error",
        signal=signal,
        tries=1 if earlier is None else earlier.tries + 1,
        time=time.time(),
    )
    with contextlib.suppress(OSError):
        files.write_text(folder / FILE, json.dumps(failure._asdict(), indent=1) + "\n")


def clear(folder: Path) -> None:
    """Removes the file, if there is one."""
    with contextlib.suppress(OSError):
        (folder / FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def noted(folder: Path) -> Iterator[None]:
    """A context around the training of a run: it notes an error that leaves it, and clears earlier
    failures if it ends without one or because the run was told to stop and has saved."""
    try:
        yield
    except Stopped:
        clear(folder)
        raise
    except Rival:  # no failure of the run, which another process goes on training
        raise
    except Exception as error:
        note(folder, in_words(error))
        raise
    clear(folder)


def in_words(error: Exception) -> str:
    """The message of an error as the command line shows it, without the hint for developers."""
    return explained(error).removesuffix("\n(CERL_DEBUG=1 shows where)")
