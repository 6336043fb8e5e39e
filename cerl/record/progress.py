"""The duration and speed of a run, the time left, and all of them as text."""

import math
import time
from collections import deque

WINDOW = 240  # samples that a speed is measured over; at four samples a second that is a minute


class Clock:
    """Counts the seconds that a run has trained in all its sessions, without the pauses between.

    A session is one process that trains the run, from its start or from a checkpoint.
    """

    def __init__(self) -> None:
        self.earlier = 0.0  # seconds of earlier sessions
        self.start()

    def start(self) -> None:
        """Starts this session."""
        self.began = time.monotonic()

    def seconds(self) -> float:
        """Seconds of all sessions so far."""
        return self.earlier + time.monotonic() - self.began


class Pace:
    """Agent steps and updates per second over the last minute, and the time left.

    Args of the constructor: total, agent steps of one seed in the whole run.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.samples: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)

    def add(self, step: int, updates: int) -> None:
        """Adds a sample. Args: step, agent steps of one seed so far; updates so far."""
        self.samples.append((time.monotonic(), step, updates))

    def rates(self) -> tuple[float, float]:
        """Agent steps of one seed and updates per second; NaN if there are fewer than 2 samples."""
        if len(self.samples) < 2 or self.samples[-1][0] <= self.samples[0][0]:
            return math.nan, math.nan
        (t0, s0, u0), (t1, s1, u1) = self.samples[0], self.samples[-1]
        return (s1 - s0) / (t1 - t0), (u1 - u0) / (t1 - t0)

    def left(self) -> float:
        """Seconds until the end at the present speed; NaN if it is unknown."""
        steps = self.rates()[0]
        return max(self.total - self.samples[-1][1], 0) / steps if steps > 0 else math.nan


def duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    if not math.isfinite(seconds):
        return "-:--:--"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def rate(value: float) -> str:
    """A rate in about four characters, e.g. 12.3k."""
    if not math.isfinite(value):
        return "-"
    for unit in ("", "k", "M"):
        if abs(value) < 1000:
            return f"{value:.1f}{unit}" if abs(value) < 10 or unit else f"{value:.0f}"
        value /= 1000
    return f"{value:.1f}G"
