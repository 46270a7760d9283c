"""A white sheet to draw on, in the pixels of a page, at twice their number so that letters are sharp."""

import functools
import itertools
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
Number = int | float
Point = tuple[Number, Number]

INK, FAINT, RULE = "#1f2328", "#59636e", "#d5dae0"
# told apart by those who see no red or no green, too
SERIES = ("#2f5d9b", "#d9822b", "#2a9d8f", "#8a4f9e", "#b23a48", "#6b7280")


class Canvas:
    """A picture of the given size.

    Args:
        width: in pixels of the page.
        height: in pixels of the page.
    """

    def __init__(self, width: Number, height: Number) -> None:
        self.width, self.height = round(width), round(height)
        self.image = Image.new("RGB", (self.width * SCALE, self.height * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: Number, y: Number, text: str, *, anchor: str = "lm", size: int = 13, colour: str = INK) -> None:
        """Writes one line.

        Args:
            x: where the anchor is.
            y: where the anchor is.
            text: what to write.
            anchor: two letters as PIL has them: left, middle or right; ascender, middle or descender.
            size: of the letters.
            colour: of the letters.
        """
        self._draw.text((x * SCALE, y * SCALE), text, fill=colour, font=_font(size), anchor=anchor)

    def line(self, points: Sequence[Point], *, colour: str = RULE, width: Number = 1, dashed: bool = False) -> None:
        """Draws from point to point."""
        pieces = _dashes(points) if dashed else [points]
        for piece in pieces:
            scaled = [(x * SCALE, y * SCALE) for x, y in piece]
            self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def rectangle(self, left: Number, top: Number, right: Number, bottom: Number, *, colour: str) -> None:
        """Fills a rectangle."""
        # PIL draws the last pixel too, and refuses a rectangle without a width
        corners = (
            left * SCALE,
            top * SCALE,
            max(right * SCALE - 1, left * SCALE),
            max(bottom * SCALE - 1, top * SCALE),
        )
        self._draw.rectangle(corners, fill=colour)

    def cells(
        self, left: Number, top: Number, width: Number, height: Number, colours: UInt8[np.ndarray, "R C 3"]
    ) -> None:
        """Fills a rectangle with a table of colours, and draws a line around it."""
        # on whole pixels, without seams
        x, y = round(left * SCALE), round(top * SCALE)
        size = round(width * SCALE), round(height * SCALE)
        self.image.paste(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), (x, y))
        # around, and not over the first and last cells, which may be a pixel wide
        frame = (x - SCALE, y - SCALE, x + size[0] + SCALE - 1, y + size[1] + SCALE - 1)
        self._draw.rectangle(frame, outline=RULE, width=SCALE)

    def dot(self, x: Number, y: Number, *, colour: str, radius: Number = 3) -> None:
        """Draws a point."""
        box = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self._draw.ellipse(box, fill=colour)

    def png(self) -> bytes:
        """The picture as a file, the same bytes for the same picture."""
        buffer = BytesIO()
        self.image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def text_width(text: str, size: int = 13) -> float:
    """How wide a line of text is."""
    return float(_font(size).getlength(text)) / SCALE


def ticks(low: Number, high: Number, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many.

    Example:
        >>> ticks(0, 1)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-12) / count
    magnitude = 10.0 ** np.floor(np.log10(span))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= span * (1 - 1e-9))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    numbers: NDArray[np.float64] = np.arange(first, last + 1) * step
    # 0 and not -0
    return [float(f"{number:.10g}") + 0.0 for number in numbers]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def _dashes(points: Sequence[Point]) -> list[list[Point]]:
    pieces = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        steps = max(1, int(np.hypot(x1 - x0, y1 - y0) / 4))
        for step in range(0, steps, 2):
            a, b = step / steps, min(step + 1, steps) / steps
            pieces.append([(x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))])
    return pieces
