"""What runs print: plain text, and never worth a run.

A reader of the output may go away (`cerl train ... | head`), a terminal may be closed, the disk
behind the output be full, its alphabet too small. Training goes on then; what it has to tell is in
the run's folder.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from cerl.text import visible


class PipeConsole(Console):
    """A console whose reader may go away: then it says nothing more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes the output once more when it ends, and would fail there.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def drop(self) -> None:
        """Forgets what could not be printed, which would be tried again with the next line."""
        quiet, self.quiet = self.quiet, True
        self.print()
        self.quiet = quiet


class Screen:
    """Prints lines of text; brackets in them are no markup."""

    def __init__(self) -> None:
        self.console = PipeConsole(highlight=False, soft_wrap=True)

    def line(self, text: str, *, style: str = "") -> None:
        """Prints a line, if it can be printed."""
        with self.spared():
            self.console.print(Text(visible(text, lines=True), style=style))

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """Around what prints: an output that fails is given up, for good."""
        try:
            yield
        except OSError:
            self.console.on_broken_pipe()
            self.console.drop()
        except ValueError:  # of a text that the output's encoding does not have, or a closed stream
            self.console.drop()
