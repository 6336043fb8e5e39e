"""Signals that tell a run to stop: Ctrl-C, a closed terminal, a cluster's scheduler."""

import contextlib
import signal
import time
from collections.abc import Iterator

SAVED = 75  # exit code of a run that was stopped and has saved: EX_TEMPFAIL of sysexits.h
TOGETHER = 1.0  # seconds within which Ctrl-C counts as one with the signal before it
# Seconds after the first signal in which repetitions of it do not disturb a process that has saved
# and is about to end. SLURM signals every process of a job, and a worker passes the signal on.
LATER = 10.0

# Signals that ask a run to save and end. SIGUSR1 and SIGUSR2 are there since SLURM and others can
# be told to send one of them before a job's time is up.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """Raised by a run or a sweep that was told to stop and has saved what resuming needs."""


class Flag:
    """Whether a signal came: a function without arguments that returns True from then on.

    Attributes: signals, the numbers of all that came, in their order.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __call__(self) -> bool:
        return bool(self.signals)


@contextlib.contextmanager
def stop_flag() -> Iterator[Flag]:
    """A context that catches the signals of `SIGNALS`.

    Ctrl-C (SIGINT) more than TOGETHER seconds after the first signal raises KeyboardInterrupt at
    once: somebody is impatient. The other signals never do, however often they come. A scheduler
    repeats SIGTERM at the end of a job's time, and a launcher passes on what the scheduler may have
    sent already, while the run still saves. A signal that the process ignored before stays ignored:
    `nohup`, and shells that start a job in the background, rely on that.

    Yields: the flag, which is True once a signal came.
    """
    flag = Flag()
    first: list[float] = []

    def handler(number: int, frame: object) -> None:
        now = time.monotonic()
        flag.signals.append(number)
        if not first:
            first.append(now)
        elif number == signal.SIGINT and now - first[0] > TOGETHER:
            raise KeyboardInterrupt

    def late(number: int, frame: object) -> None:
        """Handles signals after the run has saved: a repetition of the first one is ignored, later
        ones are handled as before the context."""
        if time.monotonic() - first[0] > (TOGETHER if number == signal.SIGINT else LATER):
            signal.signal(number, before[number])
            signal.raise_signal(number)

    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in found.items() if old != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield flag
    finally:
        for number, old in before.items():
            signal.signal(number, late if first else old)
