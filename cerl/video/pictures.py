"""Draws an environment for people: boards of cells, photographs, and vectors of numbers.

Colours are those of Okabe and Ito (2008), which people with any kind of colour vision can tell
apart.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PALE, PAPER, NIGHT = "#222222", "#767676", "#ffffff", "#16181c"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#c8ccd2"
# One colour for each plane of a board, told apart on a dark ground.
PLANES = (
    *("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#ffffff"),
    *("#999999", "#b5e48c"),
)
MOST_NAMED = 13  # components of a vector that are drawn with their names


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all text, which matplotlib brings along. Args: size, pixels."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def shortened(text: str, width: float, *, size: int) -> str:
    """The text, cut where it is wider than `width` pixels in a font of `size`."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


class Board(NamedTuple):
    """Planes of cells, [C, H, W] bool; where several are set, the later plane is seen."""

    cells: np.ndarray

    def paint(self, width: int, height: int) -> Image.Image:
        """The board, as large as fits into the pixels, with lines between the cells."""
        _, rows, columns = self.cells.shape
        cell = max(min(width // columns, height // rows), 1)
        image = Image.new("RGB", (width, height), NIGHT)
        draw = ImageDraw.Draw(image)
        left, top = (width - cell * columns) // 2, (height - cell * rows) // 2
        gap = 1 if cell > 4 else 0
        draw.rectangle((left, top, left + cell * columns, top + cell * rows), fill="#26292f")
        # A cell of the board's own ground, where no plane is set.
        for row in range(rows):
            for column in range(columns):
                planes = np.flatnonzero(self.cells[:, row, column])
                colour = PLANES[planes[-1] % len(PLANES)] if len(planes) else NIGHT
                x, y = left + cell * column, top + cell * row
                draw.rectangle((x + gap, y + gap, x + cell - 1, y + cell - 1), fill=colour)
        return image


class Photo(NamedTuple):
    """A picture of the simulator's own, [H, W, 3] uint8."""

    pixels: np.ndarray

    def paint(self, width: int, height: int) -> Image.Image:
        """The picture, as large as fits into the pixels."""
        photo = Image.fromarray(np.ascontiguousarray(self.pixels))
        share = min(width / photo.width, height / photo.height)
        size = (max(int(photo.width * share), 1), max(int(photo.height * share), 1))
        image = Image.new("RGB", (width, height), NIGHT)
        photo = photo.resize(size, Image.Resampling.LANCZOS if share < 1 else Image.Resampling.BOX)
        image.paste(photo, ((width - size[0]) // 2, (height - size[1]) // 2))
        return image


class Vector(NamedTuple):
    """Numbers, each with a name: a bar from the middle, or a cell that is set or not."""

    values: np.ndarray  # [D]
    names: Sequence[str]
    limits: np.ndarray  # [D] above 0, the size of a number whose bar is full
    flags: bool  # whether every number is 0 or 1

    def paint(self, width: int, height: int) -> Image.Image:
        """One line for each number; without names where there are too many of them."""
        image = Image.new("RGB", (width, height), NIGHT)
        draw, count = ImageDraw.Draw(image), len(self.values)
        if count > MOST_NAMED:
            self._unnamed(draw, width, height)
            return image
        size, line = 12, min((height - 12) / count, 26)
        top = (height - line * count) / 2
        labels = [shortened(name, width * 0.36, size=size) for name in self.names]
        indent = max(font(size).getlength(label) for label in labels) + 18
        middle, half = (indent + width - 12) / 2, (width - 12 - indent) / 2
        for k, (value, label) in enumerate(zip(self.values, labels, strict=True)):
            y = top + line * k
            draw.text((indent - 8, y + line / 2), label, "#dddddd", font(size), anchor="rm")
            box = (indent, y + 3, width - 12, y + line - 3)
            if self.flags:
                draw.rectangle(box, fill=PLANES[1] if value else NIGHT, outline="#5a5f68")
                continue
            draw.rectangle(box, outline="#33373e")
            end = middle + half * _share(value, self.limits[k])
            draw.rectangle(
                (min(middle, end), y + 4, max(middle, end), y + line - 4), fill=PLANES[0]
            )
            draw.line((middle, y + 2, middle, y + line - 2), fill="#8a8f98")
        return image

    def _unnamed(self, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
        """Cells in lines, or for numbers upright bars side by side."""
        count = len(self.values)
        if self.flags:
            columns = int(np.ceil(np.sqrt(count * width / height)))
            cell = min(width / columns, height / -(-count // columns))
            for k, value in enumerate(self.values):
                x, y = cell * (k % columns), cell * (k // columns)
                colour = PLANES[1] if value else "#26292f"
                draw.rectangle((x + 1, y + 1, x + cell - 1, y + cell - 1), fill=colour)
            return
        step, middle = (width - 8) / count, height / 2
        for k, value in enumerate(self.values):
            end = middle - (middle - 8) * _share(value, self.limits[k])
            box = (4 + step * k, min(middle, end), 4 + step * (k + 0.8), max(middle, end))
            draw.rectangle(box, fill=PLANES[0])
        draw.line((4, middle, width - 4, middle), fill="#8a8f98")


Drawing = Board | Photo | Vector


def _share(value: float, limit: float) -> float:
    """A number as a share of its limit, in [-1, 1]; 0 if it is not finite."""
    return float(np.clip(value / limit, -1, 1)) if np.isfinite(value) else 0.0
