"""The Console of a run: lines, and on a terminal a bar that is redrawn. The only place that prints
while a run trains."""

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
    """What a user sees of a run.

    Args of the constructor: seeds, how many train side by side; steps, agent steps of one seed in
    the whole run; quiet, prints notes only.
    """

    def __init__(self, *, seeds: int, steps: int, quiet: bool) -> None:
        self.seeds, self.quiet = seeds, quiet
        self.pace, self.screen = Pace(steps), Screen()
        self.bar: Live | None = None
        self.drawn = 0.0

    def start(self) -> None:
        """Begins to draw the bar, where lines go to a terminal."""
        if self.screen.console.is_terminal and not self.quiet:
            self.bar = Live(console=self.screen.console, auto_refresh=False)
            with self.screen.spared():
                self.bar.start()

    def stop(self, step: int, scores: str) -> None:
        """Draws the bar for the last time."""
        self.draw(step, scores)
        if self.bar is not None:
            with self.screen.spared():
                self.bar.stop()
            self.bar = None

    def note(self, text: str) -> None:
        """Prints a sentence that the user must see, quiet or not."""
        self.screen.line(text)

    def line(self, text: str) -> None:
        """Prints a line, unless quiet."""
        if not self.quiet:
            self.screen.line(text)

    def is_due(self) -> bool:
        """Whether the bar was drawn long enough ago to be drawn again."""
        now = time.monotonic()
        if now - self.drawn < REFRESH:
            return False
        self.drawn = now
        return True

    def draw(self, step: int, scores: str) -> None:
        """Redraws the bar, where there is one. Args: scores, words of the latest ones."""
        if self.bar is not None:
            grid = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=self.pace.total, completed=step, width=10)
            grid.add_row(bar, Text(self.position(step), no_wrap=True, overflow="ellipsis"))
            with self.screen.spared():
                self.bar.update(Group(grid, Text(scores)), refresh=True)

    def headline(self, step: int, scores: str) -> None:
        """Where there is no bar: a line that says the same."""
        if self.bar is None:
            self.line(f"{self.position(step)}  {scores}".rstrip())

    def position(self, step: int) -> str:
        """Where the run is, and its pace, in words."""
        steps, updates = self.pace.rates()
        seeds = f" x {self.seeds} seeds" if self.seeds > 1 else ""
        return (
            f"{step:,}/{self.pace.total:,} steps  ETA {duration(self.pace.left())}  "
            f"{rate(steps)} steps/s{seeds}  {rate(updates)} updates/s"
        )
