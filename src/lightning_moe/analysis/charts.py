"""Line charts and bar charts with labelled axes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_moe.canvas import FAINT, INK, SERIES, Canvas, Number, Point, text_width, ticks

# two side by side on a page
_WIDTH, _PLOT = 500, 200


@dataclass(frozen=True)
class Line:
    """A series of numbers.

    Args:
        label: what they are.
        values: one for each place on the axis; None leaves a gap.
        is_reference: whether to draw it grey and dashed, as what the others are compared with.
    """

    label: str
    values: Sequence[Number | None]
    is_reference: bool = False


def line_chart(
    lines: Sequence[Line],
    places: Sequence[str],
    *,
    title: str,
    place_title: str,
    limits: tuple[Number, Number | None] = (0.0, None),
) -> Canvas:
    """Draws series over the same places.

    Args:
        lines: the series.
        places: what to write below each place.
        title: what the numbers are.
        place_title: what a place is.
        limits: lowest and highest number of the axis; None goes as high as the numbers do.
    """
    numbers = [value for line in lines for value in line.values if value is not None]
    low, high = limits[0], limits[1] if limits[1] is not None else 1.08 * max([*numbers, limits[0] + 1e-6])
    low = min([low, *numbers])
    marks = ticks(low, high)
    left, top = max(text_width(f"{mark:g}") for mark in marks) + 20, 40 + 20 * len(lines)
    right, bottom = _WIDTH - max(16, text_width(places[-1]) / 2 - 8), top + _PLOT
    canvas = Canvas(_WIDTH, bottom + 52)
    canvas.text(8, 16, title, size=14)
    for mark in marks:
        y = bottom - (mark - low) / (high - low) * (bottom - top)
        canvas.line([(left, y), (right, y)])
        canvas.text(left - 8, y, f"{mark:g}", anchor="rm")
    step = (right - left - 24) / max(len(places) - 1, 1)
    xs = [left + 12 + step * place for place in range(len(places))]
    if len(places) == 1:
        xs = [(left + right) / 2]
    every = max(1, -(-int(max(map(text_width, places)) + 10) // max(int(step), 1))) if len(places) > 1 else 1
    for place in range(0, len(places), every):
        canvas.text(xs[place], bottom + 14, places[place], anchor="mm")
    canvas.text(left, bottom + 36, place_title, colour=FAINT)
    for number, line in enumerate(lines):
        colour = FAINT if line.is_reference else SERIES[number % len(SERIES)]
        _draw_key(canvas, 8, 40 + 20 * number, line, colour)
        points = [
            None if value is None else (x, bottom - (value - low) / (high - low) * (bottom - top))
            for x, value in zip(xs, line.values, strict=True)
        ]
        _draw_line(canvas, points, colour, dashed=line.is_reference)
    return canvas


def bar_chart(groups: Mapping[str, Mapping[str, Number]], *, title: str, digits: int = 3) -> Canvas:
    """Draws bars from a common zero, to the right or to the left, with their numbers.

    Args:
        groups: the bars of each group, by their names; all groups have the same.
        title: what the numbers are.
        digits: of the written numbers, after the point.
    """
    names = list(next(iter(groups.values())))
    numbers = [value for bars in groups.values() for value in bars.values()]
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    written = text_width(f"+{-max(map(abs, numbers)):.{digits}f}") + 12
    left = max(map(text_width, groups)) + 20 + (written if low < 0 else 0)
    per_unit = (_WIDTH - left - written - 8) / max(high - low, 1e-12)
    zero, top = left - low * per_unit, 40 + 20 * len(names)
    height = 18 * len(names) + 14
    canvas = Canvas(_WIDTH, top + height * len(groups) + 8)
    canvas.text(8, 16, title, size=14)
    for number, name in enumerate(names):
        canvas.rectangle(8, 34 + 20 * number, 22, 46 + 20 * number, colour=SERIES[number % len(SERIES)])
        canvas.text(30, 40 + 20 * number, name)
    for place, (group, bars) in enumerate(groups.items()):
        y = top + height * place + 8
        canvas.text(8, y + 9 * len(names), group)
        for number, name in enumerate(names):
            value, bar = bars[name], y + 18 * number
            ends = sorted((zero, zero + value * per_unit))
            canvas.rectangle(ends[0], bar + 2, ends[1], bar + 16, colour=SERIES[number % len(SERIES)])
            place_of_number = (ends[1] + 6, "lm") if value >= 0 else (ends[0] - 6, "rm")
            canvas.text(
                place_of_number[0],
                bar + 9,
                f"{round(value, digits) + 0.0:+.{digits}f}",
                anchor=place_of_number[1],
                size=12,
            )
    canvas.line([(zero, top), (zero, top + height * len(groups))], colour=INK)
    return canvas


def _draw_key(canvas: Canvas, x: Number, y: Number, line: Line, colour: str) -> None:
    canvas.line([(x, y), (x + 22, y)], colour=colour, width=2, dashed=line.is_reference)
    if not line.is_reference:
        canvas.dot(x + 11, y, colour=colour)
    canvas.text(x + 30, y, line.label)


def _draw_line(canvas: Canvas, points: Sequence[Point | None], colour: str, *, dashed: bool) -> None:
    for one, other in itertools.pairwise(points):
        if one is not None and other is not None:
            canvas.line([one, other], colour=colour, width=2, dashed=dashed)
    for point in points:
        if point is not None and (not dashed or len(points) == 1):
            canvas.dot(*point, colour=colour)
