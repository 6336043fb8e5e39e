"""Signals that tell a run to stop: Ctrl-C, a closed terminal, a cluster's scheduler."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

SAVED = 75  # exit code of a run that was stopped and has saved: EX_TEMPFAIL of sysexits.h
TOGETHER = 1.0  # seconds within which signals count as one: a scheduler may signal a job twice

# Signals that ask a run to save and end. SIGUSR1 and SIGUSR2 are there since SLURM and others can
# be told to send one of them before a job's time is up.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """Raised by a run or a sweep that was told to stop and has saved what resuming needs."""


@contextlib.contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """A context that catches the signals of `SIGNALS`.

    A second signal, more than TOGETHER seconds after the first, raises KeyboardInterrupt at once. A
    signal that the process ignored before stays ignored: `nohup`, and shells that start a job in
    the background, rely on that.

    Yields: a function that returns True once a signal came.
    """
    first: list[float] = []

    def handler(number: int, frame: object) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
        elif now - first[0] > TOGETHER:
            raise KeyboardInterrupt

    def late(number: int, frame: object) -> None:
        """Handles signals after the run has saved: a repetition of the first one is ignored, later
        ones are handled as before the context."""
        if time.monotonic() - first[0] > TOGETHER:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in found.items() if old != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield lambda: bool(first)
    finally:
        for number, old in before.items():
            signal.signal(number, late if first else old)
