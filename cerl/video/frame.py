"""One frame of a video: a panel for every policy, with its values, members and forget gates."""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cerl.video.pictures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    NIGHT,
    ORANGE,
    PALE,
    PAPER,
    PLANES,
    Drawing,
    font,
    shortened,
)
from cerl.video.play import Moment

WIDTH, MARGIN = 304, 8  # pixels of a panel, and around its parts
PICTURE = 216  # height of the environment's picture
TITLE, VALUES, GATES = 46, 84, 40  # heights of the other parts
FEW = 6  # actions, at most, whose values are drawn as bars
PAST = 100  # agent steps, at most, that curves and gates reach back
MOST_SQUARES = 12  # members, at most, that are drawn as squares


class Range(NamedTuple):
    """The least and the greatest value in a video, so that all of its panels share a scale."""

    low: float
    high: float

    def pixels(self, value: float, height: int) -> int:
        """How high a value is in a picture of the range of so many pixels.

        Rounded, so that a value which differs in its last bit is drawn the same.
        """
        return round(height * (value - self.low) / max(self.high - self.low, 1e-9))


class Style(NamedTuple):
    """What all frames of a video share."""

    caption: str
    planes: Sequence[str]  # names of a board's planes, for the legend; or ()
    actions: Sequence[str]  # names of the discrete actions, or ()
    values: Range
    heads: int  # attention heads whose forget gates are drawn; 0: none
    longest: int  # agent steps of the longest episode in the video
    panels: int

    @property
    def rows(self) -> int:
        """Rows of panels: one for up to three, else two or more."""
        return 1 if self.panels <= 3 else 2 if self.panels <= 8 else math.ceil(self.panels / 4)

    @property
    def past(self) -> int:
        """Agent steps that curves and gates reach back, 2 or more."""
        return max(min(PAST, self.longest + 1), 2)

    @property
    def columns(self) -> int:
        return math.ceil(self.panels / self.rows)

    @property
    def height(self) -> int:
        """Height of a panel, pixels."""
        return TITLE + PICTURE + VALUES + (GATES if self.heads else 0) + MARGIN

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame, pixels; both even, which the format of the file needs."""
        height = self.height * self.rows + 24 + (20 if self.planes else 0)
        return WIDTH * self.columns, height + height % 2


class Panel:
    """The part of a frame that belongs to one policy; it remembers what its curves need."""

    def __init__(self, title: str, style: Style, *, episodes: int) -> None:
        self.title, self.style, self.episodes = title, style, episodes
        self._values: deque[float] = deque(maxlen=style.past)
        self._gates: deque[np.ndarray] = deque(maxlen=style.past)

    def paint(self, moment: Moment, drawing: Drawing) -> Image.Image:
        """The panel at a moment."""
        if moment.step == 0:
            self._values.clear()
            self._gates.clear()
        self._values.append(moment.value)
        self._gates.append(moment.gates)
        image = Image.new("RGB", (WIDTH, self.style.height), PAPER)
        draw = ImageDraw.Draw(image)
        self._head(draw, moment)
        inner = WIDTH - 2 * MARGIN
        image.paste(drawing.paint(inner, PICTURE), (MARGIN, TITLE))
        top = TITLE + PICTURE + 4
        bars = len(self.style.actions) if len(self.style.actions) <= FEW else 0
        self._curve(draw, top, inner if not bars else inner // 3)
        if bars:
            self._bars(draw, moment, top, MARGIN + inner // 3 + 10)
        if self.style.heads:
            self._strip(image, top + VALUES)
        return image

    def _head(self, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        """Title, members on duty, and how far the episode is."""
        members = len(moment.duty)
        squares = members if 1 < members <= MOST_SQUARES else 0
        left = WIDTH - MARGIN - 12 * squares
        title = shortened(self.title, left - MARGIN - 6, size=15)
        draw.text((MARGIN, 6), title, INK, font(15))
        for k in range(squares):
            box = (left + 12 * k, 9, left + 12 * k + 9, 18)
            draw.rectangle(box, fill=GREEN if moment.duty[k] else PAPER, outline=PALE)
        where = f"step {moment.step:,}   return {moment.returned:,.6g}"
        if self.episodes > 1:
            where = f"episode {moment.episode} of {self.episodes}   {where}"
        draw.text((MARGIN, 27), where, INK, font(12))
        if moment.over:
            draw.text((WIDTH - MARGIN, 27), "ended", ORANGE, font(12), anchor="ra")

    def _curve(self, draw: ImageDraw.ImageDraw, top: int, width: int) -> None:
        """The value of the greedy action over the last agent steps."""
        value, scale = self._values[-1], self.style.values
        told = f"value {value:.3g}" if math.isfinite(value) else "value -"
        draw.text((MARGIN, top), told, INK, font(12))
        floor, rise = top + VALUES - 18, VALUES - 38
        draw.line((MARGIN, floor, MARGIN + width, floor), fill=GREY)
        points = [
            (MARGIN + width * k // (self.style.past - 1), floor - scale.pixels(v, rise))
            for k, v in enumerate(self._values)
            if math.isfinite(v)
        ]
        if len(points) > 1:
            draw.line(points, fill=BLUE, width=2)
        if points:
            x, y = points[-1]
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=BLUE)
        text = shortened(f"{scale.low:.3g} to {scale.high:.3g}", width, size=10)
        draw.text((MARGIN, floor + 3), text, PALE, font(10))

    def _bars(self, draw: ImageDraw.ImageDraw, moment: Moment, top: int, left: int) -> None:
        """The value of every action; the one that was taken in orange."""
        names, scale = self.style.actions, self.style.values
        step = (WIDTH - MARGIN - left) / len(names)
        floor, rise = top + VALUES - 18, VALUES - 26
        for k, (name, value) in enumerate(zip(names, moment.values, strict=True)):
            x = left + step * k
            if math.isfinite(value):
                colour = ORANGE if k == moment.action else GREY
                peak = floor - scale.pixels(float(value), rise)
                draw.rectangle((x + 3, peak, x + step - 3, floor), fill=colour)
            label = shortened(name, step, size=9)
            draw.text((x + step / 2, floor + 3), label, INK, font(9), anchor="ma")
        draw.line((left, floor, WIDTH - MARGIN, floor), fill=PALE)

    def _strip(self, image: Image.Image, top: int) -> None:
        """Forget gates over the last agent steps, one row a head: light keeps, dark forgets."""
        draw = ImageDraw.Draw(image)
        label = "forget gates of the heads: dark 0, light 1"
        draw.text((MARGIN, top), label, PALE, font(10))
        gates = np.full((self.style.heads, self.style.past), np.nan)
        gates[:, : len(self._gates)] = np.stack(self._gates, 1)
        # Grey where nothing is known yet, or where an episode begins.
        light = np.where(np.isnan(gates), 0.0, gates)[..., None] * [240, 228, 66]
        pixels = np.where(np.isnan(gates)[..., None], 200, light).astype(np.uint8)
        size = (WIDTH - 2 * MARGIN, GATES - 18)
        strip = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
        image.paste(strip, (MARGIN, top + 14))


def compose(panels: Sequence[Image.Image], style: Style) -> np.ndarray:
    """Puts panels side by side, over a caption. Returns: [H, W, 3] uint8, of `style.size`."""
    image = Image.new("RGB", style.size, PAPER)
    draw = ImageDraw.Draw(image)
    for k, panel in enumerate(panels):
        place = (WIDTH * (k % style.columns), style.height * (k // style.columns))
        image.paste(panel, place)
    y = style.height * style.rows
    width = style.size[0] - 2 * MARGIN
    draw.text((MARGIN, y + 4), shortened(style.caption, width, size=12), PALE, font(12))
    x = MARGIN
    for k, name in enumerate(style.planes):
        length = font(11).getlength(name) + 30
        if x + length > style.size[0]:
            break
        box = (x, y + 25, x + 11, y + 36)
        draw.rectangle(box, fill=PLANES[k % len(PLANES)], outline=NIGHT)
        draw.text((x + 16, y + 24), name, INK, font(11))
        x += length
    return np.asarray(image)
