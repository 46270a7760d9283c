"""Heatmaps with labelled axes and a colour scale that never moves, so that pictures of two models compare."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lightning_moe.canvas import FAINT, INK, Canvas, Number, text_width

_TOP, _LEGEND, _SHORTEST_LEGEND = 52, 74, 110


@dataclass(frozen=True)
class ColourScale:
    """Which colour a number has.

    Args:
        stops: numbers, ascending; what lies outside has the colour of the nearest.
        colours: the colour of each stop, red, green and blue from 0 to 255.
        labels: what to write beside some numbers.
    """

    stops: tuple[float, ...]
    colours: tuple[tuple[int, int, int], ...]
    labels: dict[float, str]

    def rgb(self, values: Float[np.ndarray, "..."]) -> NDArray[np.uint8]:
        """The colours of numbers; what is no number is grey."""
        known = np.nan_to_num(values)
        table = np.array(self.colours, dtype=float)
        channels = [np.interp(known, self.stops, table[:, channel]) for channel in range(3)]
        colours = np.stack(channels, axis=-1)
        colours[np.isnan(values)] = 225
        result: NDArray[np.uint8] = colours.round().astype(np.uint8)
        return result


RELATIVE = ColourScale(
    (0.0, 0.5, 1.0, 1.5, 2.0),
    ((33, 60, 120), (150, 180, 220), (250, 250, 250), (235, 160, 110), (160, 30, 30)),
    {0.0: "0", 0.5: "0.5", 1.0: "1", 1.5: "1.5", 2.0: "2 or more"},
)
"""Times the fair share: white is 1, blue less, red more, dark red twice or beyond."""

SHARE = ColourScale(
    (0.0, 0.25, 0.5, 0.75, 1.0),
    ((250, 250, 250), (197, 218, 235), (120, 169, 208), (52, 112, 168), (18, 52, 104)),
    {0.0: "0", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1.0: "1"},
)
"""A share from 0, white, to 1, dark blue."""


def heatmap(
    values: Sequence[Sequence[Number]],
    rows: Sequence[str],
    *,
    title: str,
    row_title: str,
    column_title: str,
    scale: ColourScale,
    largest_cell: int = 48,
) -> Canvas:
    """Draws a table of numbers as colours, and writes the numbers where there is room.

    Args:
        values: the rows, from top to bottom; shorter ones are filled up with grey.
        rows: a label for each row.
        title: what the numbers are.
        row_title: what a row is.
        column_title: what a column is; columns are numbered.
        scale: the colours.
        largest_cell: width of a cell, where few columns would leave them wider.
    """
    num_columns = max(map(len, values))
    table = np.array([[*row, *[np.nan] * (num_columns - len(row))] for row in values], dtype=float)
    cell_width, cell_height = max(3, min(largest_cell, 760 // num_columns)), max(3, min(24, 760 // len(rows)))
    left = max(text_width(row_title), *(text_width(row) for row in rows)) + 18
    bottom, right = _TOP + cell_height * len(rows), left + cell_width * num_columns
    legend = max(bottom - _TOP, _SHORTEST_LEGEND)
    canvas = Canvas(max(right + 18 + _LEGEND, text_width(title, 14) + 20), _TOP + legend + 44)
    canvas.text(8, 16, title, size=14)
    canvas.text(left - 8, _TOP - 12, row_title, anchor="rm", colour=FAINT)
    canvas.text(left, bottom + 32, column_title, colour=FAINT)
    _draw_cells(canvas, table, scale, left, cell_width, cell_height)
    for row in range(0, len(rows), -(-15 // cell_height)):
        canvas.text(left - 8, _TOP + (row + 0.5) * cell_height, rows[row], anchor="rm")
    for column in range(0, num_columns, -(-max(18, 9 * len(str(num_columns))) // cell_width)):
        canvas.text(left + (column + 0.5) * cell_width, bottom + 12, str(column), anchor="mm")
    draw_legend(canvas, scale, right + 18, _TOP, legend)
    return canvas


def draw_legend(canvas: Canvas, scale: ColourScale, left: Number, top: Number, height: Number) -> None:
    """Draws a bar of all colours of a scale, the highest above, with its labels at the right."""
    low, high = scale.stops[0], scale.stops[-1]
    steps = high - (high - low) * (np.arange(round(height)) + 0.5) / height
    canvas.cells(left, top, 12, height, scale.rgb(steps[:, None]))
    for value, label in scale.labels.items():
        canvas.text(left + 18, top + (high - value) / (high - low) * height, label, size=12)


def _draw_cells(
    canvas: Canvas, table: NDArray[np.float64], scale: ColourScale, left: Number, cell_width: int, cell_height: int
) -> None:
    colours = scale.rgb(table)
    digits = 2 if cell_width >= 36 else 1
    has_room = cell_width >= 26 and cell_height >= 18
    num_rows, num_columns = table.shape
    canvas.cells(left, _TOP, num_columns * cell_width, num_rows * cell_height, colours)
    for (row, column), value in np.ndenumerate(table):
        if has_room and not np.isnan(value):
            red, green, blue = (int(channel) for channel in colours[row, column])
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 130 else INK
            place = (left + (column + 0.5) * cell_width, _TOP + (row + 0.5) * cell_height)
            canvas.text(*place, f"{value:.{digits}f}", anchor="mm", size=12, colour=ink)
