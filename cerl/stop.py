"""Being told to stop: Ctrl-C, the end of a terminal, a scheduler that wants its machine back."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

SAVED = 75  # exit code of a run that was stopped and saved: sysexits' "try again later"
TOGETHER = 1.0  # seconds within which signals count as one: a scheduler may signal a job twice

# What asks a run to save and end. SLURM and others are told which of the two user signals to send.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """A run, or a sweep, that was told to stop and has saved all that it needs to go on."""


@contextlib.contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """True once a signal of `SIGNALS` came; one that comes over a second later interrupts at once.

    A signal that was ignored from the start stays ignored: `nohup` and shells that start a job in
    the background ask for that.
    """
    first: list[float] = []

    def handler(number: int, frame: object) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
        elif now - first[0] > TOGETHER:
            raise KeyboardInterrupt

    def late(number: int, frame: object) -> None:
        """After the run has saved: the rest of what counts as one signal changes nothing."""
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
