"""The terminal of a command: Ctrl-C, a reader of the output that goes away, errors in words.

Imports nothing that takes time, so that Ctrl-C is looked after before anything else is imported.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator


def _leave(number: int, frame: object) -> None:
    """Handles Ctrl-C: ends the process."""
    # RuntimeError: the signal came while something was being printed.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def interrupt_ends() -> Iterator[None]:
    """Has Ctrl-C end the process at once, instead of raising KeyboardInterrupt.

    Raised in the midst of an import, the exception is caught by torch and numpy, which then go on
    half imported. A run that saves before it ends handles the signal itself (`stop.stop_flag`).
    """
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around a command that only prints: a broken pipe is no error, and ends what it wraps."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich turns a broken pipe into SystemExit.
        if not any(isinstance(e, BrokenPipeError) for e in (error, error.__context__)):
            raise
        # Python flushes the output once more when it ends, and would fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_REMEDIES = {
    errno.EACCES: "it has to be readable and writable for you",
    errno.EPERM: "it has to be readable and writable for you",
    errno.EROFS: "the file system is read-only; copy the folder to another one",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


def explained(error: Exception) -> str:
    """An expected error in words: what went wrong and what helps, on one line or a few."""
    from pydantic import ValidationError

    from cerl.config import Config, ConfigError, errors

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, ValidationError):
        return "\n".join(errors.explained(error, Config))
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        remedy = _REMEDIES.get(error.errno or 0)
        text = f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")
    return f"{text}\n(CERL_DEBUG=1 shows where)"


def complain(head: str, text: str = "") -> None:
    """Prints to stderr, the head in red; control characters of the text are shown as escapes."""
    from rich.console import Console
    from rich.text import Text

    from cerl.text import visible

    shown = visible(text, lines=True)
    with contextlib.suppress(OSError):
        Console(stderr=True, soft_wrap=True).print(Text.assemble((head, "bold red"), shown))
