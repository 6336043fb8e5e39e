"""Prints plain text so that a failure to print never ends a run.

The reader of a pipe may go away (`cerl train ... | head`), a terminal may be closed, the disk may
be full, or the encoding of the output may lack a character. Training goes on in all these cases;
everything of importance is in the run folder too.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from cerl.text import visible


class PipeConsole(Console):
    """A console that falls silent, instead of failing, when its output is closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes stdout once more when it exits. Without this redirection that would fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def drop(self) -> None:
        """Clears rich's buffer of text that could not be printed. Otherwise rich would print it
        again with the next line, and fail again."""
        quiet, self.quiet = self.quiet, True
        self.print()
        self.quiet = quiet


class Screen:
    """Prints lines of text as they are: rich's markup in brackets is not interpreted."""

    def __init__(self) -> None:
        self.console = PipeConsole(highlight=False, soft_wrap=True)

    def line(self, text: str, *, style: str = "") -> None:
        """Prints a line; a failure is ignored. Args: style, of rich, e.g. bold."""
        with self.spared():
            self.console.print(Text(visible(text, lines=True), style=style))

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """A context for printing: after a failed write nothing more is printed, and no error
        leaves the context."""
        try:
            yield
        except OSError:
            self.console.on_broken_pipe()
            self.console.drop()
        except ValueError:  # the stream is closed, or its encoding lacks a character
            self.console.drop()
