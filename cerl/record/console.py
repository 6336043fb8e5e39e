"""The Console of a run: prints lines and, on a terminal, a progress bar. Nothing else prints while
a run trains."""

import time

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cerl.record.progress import Pace, duration, rate
from cerl.record.screen import Screen

REFRESH = 0.25  # seconds between two drawings of the bar


class Console:
    """Prints the progress of a run.

    Args of the constructor: seeds, S; steps, agent steps of one seed in the whole run; quiet, print
    notes only.
    """

    def __init__(self, *, seeds: int, steps: int, quiet: bool) -> None:
        self.seeds, self.quiet = seeds, quiet
        self.pace, self.screen = Pace(steps), Screen()
        self.bar: Live | None = None
        self.drawn = 0.0

    def start(self) -> None:
        """Starts the progress bar, if the output is a terminal."""
        if self.screen.console.is_terminal and not self.quiet:
            self.bar = Live(console=self.screen.console, auto_refresh=False)
            with self.screen.spared():
                self.bar.start()

    def stop(self, step: int, scores: str) -> None:
        """Draws the bar for the last time. Args: step, scores as in `draw`."""
        self.draw(step, scores)
        if self.bar is not None:
            with self.screen.spared():
                self.bar.stop()
            self.bar = None

    def note(self, text: str) -> None:
        """Prints a sentence that the user must see, even if quiet."""
        self.screen.line(text)

    def line(self, text: str) -> None:
        """Prints a line, unless quiet."""
        if not self.quiet:
            self.screen.line(text)

    def is_due(self) -> bool:
        """Whether at least REFRESH seconds have passed since the bar was drawn."""
        now = time.monotonic()
        if now - self.drawn < REFRESH:
            return False
        self.drawn = now
        return True

    def draw(self, step: int, scores: str) -> None:
        """Redraws the bar, if there is one.

        Args: step, agent steps of one seed so far; scores, the latest ones as text.
        """
        if self.bar is not None:
            grid = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=self.pace.total, completed=step, width=10)
            grid.add_row(bar, Text(self.position(step), no_wrap=True, overflow="ellipsis"))
            with self.screen.spared():
                self.bar.update(Group(grid, Text(scores)), refresh=True)

    def headline(self, step: int, scores: str) -> None:
        """Prints the same as the bar on a line, if there is no bar."""
        if self.bar is None:
            self.line(f"{self.position(step)}  {scores}".rstrip())

    def position(self, step: int) -> str:
        """The steps done, time left and speed as text. Args: step, agent steps of one seed."""
        steps, updates = self.pace.rates()
        seeds = f" x {self.seeds} seeds" if self.seeds > 1 else ""
        return (
            f"{step:,}/{self.pace.total:,} steps  ETA {duration(self.pace.left())}  "
            f"{rate(steps)} steps/s{seeds}  {rate(updates)} updates/s"
        )
