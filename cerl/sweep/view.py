"""What a sweep shows while it trains runs in other processes: lines, and a table on a terminal."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from cerl.record.screen import Screen
from cerl.sweep import status
from cerl.sweep.plan import PlannedRun

TABLE_EVERY = 1.0  # seconds between two drawings of the table, at least
TABLE_SHARE = 0.05  # largest share of the time that is spent on drawing the table


class View:
    """Prints the progress of a sweep; a context, in which the table is shown on a terminal.

    Args of the constructor: runs of the sweep; out, its folder.
    """

    def __init__(self, runs: Sequence[PlannedRun], out: Path) -> None:
        self.folders, self.out = {run.folder for run in runs}, out
        self.screen, self.live, self.due = Screen(), None, 0.0

    def __enter__(self) -> "View":
        console = self.screen.console
        if console.is_terminal:
            self.live = Live(Text(), console=console, auto_refresh=False, transient=True)
            with self.screen.spared():
                self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            with self.screen.spared():
                self.live.stop()
            self.live = None

    def line(self, text: str, *, style: str = "") -> None:
        """Prints a line, above the table. Args: style, of rich, e.g. bold."""
        self.screen.line(text, style=style)

    def draw(self) -> None:
        """Redraws the table, if there is one and it is due."""
        if self.live is None or time.monotonic() < self.due:
            return
        begin = time.monotonic()
        # If the states cannot be read, e.g. for a moment on a file system of a network, the runs
        # train on and the table is drawn again later.
        with contextlib.suppress(OSError, ValueError):
            table = self._table()
            with self.screen.spared():
                self.live.update(table, refresh=True)
        end = time.monotonic()
        self.due = end + max(TABLE_EVERY, (end - begin) / TABLE_SHARE)

    def last(self) -> None:
        """Prints the table of the sweep's runs as they are now."""
        try:
            table = self._table()
        except (OSError, ValueError) as error:
            self.line(f"the states of the runs cannot be read: {error}")
            return
        with self.screen.spared():
            self.screen.console.print(table, soft_wrap=False)

    def _table(self) -> RenderableType:
        own = [state for state in status.states(self.out) if state.run.folder in self.folders]
        return status.shown(own, width=self.screen.console.width)
