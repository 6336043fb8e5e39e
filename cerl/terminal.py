"""A command and its terminal: Ctrl-C, broken pipes (`cerl list | head`), and error messages.

This module imports nothing slow, so that Ctrl-C is handled before the slow imports begin.
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
    # Flushing raises RuntimeError if the signal interrupted a print.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def interrupt_ends() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once instead of raising KeyboardInterrupt.

    If that exception is raised during an import, torch and numpy catch it and go on half imported.
    A run that saves before it ends handles the signal itself (`stop.stop_flag`).
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
    """A context for a command that only prints. A broken pipe ends the context without an error,
    since the reader of the output has all that it wanted."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich turns a broken pipe into SystemExit.
        if not any(isinstance(e, BrokenPipeError) for e in (error, error.__context__)):
            raise
        # Python flushes stdout once more when it exits. Without this redirection that would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_REMEDIES = {
    errno.EACCES: "it has to be readable and writable for you",
    errno.EPERM: "it has to be readable and writable for you",
    errno.EROFS: "the file system is read-only; copy the folder to another one",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


def explained(error: Exception) -> str:
    """The message of an expected error: what went wrong and what to do, on one or a few lines."""
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


def note(sentence: str) -> None:
    """Prints a sentence to stderr that the user should know of, though nothing went wrong."""
    complain("note: ", sentence, style="bold")


def complain(head: str, text: str = "", *, style: str = "bold red") -> None:
    """Prints `head` (in `style`) and `text` to stderr; control characters of `text` are escaped."""
    from rich.console import Console
    from rich.text import Text

    from cerl.text import visible

    shown = visible(text, lines=True)
    with contextlib.suppress(OSError):
        Console(stderr=True, soft_wrap=True).print(Text.assemble((head, style), shown))
